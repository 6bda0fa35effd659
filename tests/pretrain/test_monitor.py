"""What a run measures of itself, and the probe set."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from watched import CPU, tiny, train, varied, write

from group import together
from opsin import ranks
from opsin.backbone.probe import rank_me
from opsin.constants import normalisation
from opsin.data.reader import ImageReader
from opsin.data.sources import scan
from opsin.errors import OpsinError
from opsin.pretrain import measures, watch
from opsin.pretrain.measures import measure, pairs
from opsin.pretrain.monitor import Metrics
from opsin.pretrain.probe import Probe, Sample, labelled_sample
from opsin.pretrain.prototypes import Targets
from opsin.pretrain.recipe import from_yaml, to_yaml
from opsin.pretrain.step import build
from opsin.pretrain.watch import Watch


def targets(features, prototypes, temperature=0.05):
    return Targets(features, prototypes, torch.zeros(len(prototypes)), torch.tensor(temperature))


def drawn(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_features_that_are_all_the_same():
    found = measure(targets(drawn(1, 1, 16).expand(20, 2, 16), drawn(64, 16, seed=1)))
    assert found["spread"] == pytest.approx(0, abs=1e-6)
    assert found["rank"] == pytest.approx(1, abs=1e-3)
    assert found["prototypes"] == pytest.approx(1)
    assert found["agreement"] == pytest.approx(1 / 20)  # all are equally near, and one is its own
    even = measure(targets(torch.zeros(20, 2, 16), drawn(64, 16, seed=1)))
    assert even["entropy"] == pytest.approx(1)


def test_features_that_say_which_image_it_is():
    prototypes = torch.eye(16)
    found = measure(targets(torch.eye(16)[:, None].expand(16, 2, 16), prototypes, 0.01))
    assert found["agreement"] == 1
    assert found["entropy"] == pytest.approx(0, abs=1e-6)
    assert found["prototypes"] == pytest.approx(16)
    assert found["rank"] == pytest.approx(16, rel=1e-3)
    assert found["spread"] == pytest.approx(1 - 1 / 16)


def test_measures_are_those_of_the_definitions_and_do_not_depend_on_chunks(monkeypatch):
    z, prototypes = drawn(30, 2, 16), drawn(64, 16, seed=1)
    found = measure(targets(z, prototypes))
    q = torch.softmax(z.flatten(0, 1) @ prototypes.T / 0.05, dim=-1)
    assert found["entropy"] == pytest.approx(-(q * q.log()).sum(1).mean().item() / math.log(64), rel=1e-4)
    share = torch.bincount(q.argmax(1), minlength=64) / 60
    assert found["prototypes"] == pytest.approx(math.exp(-torch.xlogy(share, share).sum()), rel=1e-4)
    assert found["rank"] == pytest.approx(rank_me(z.flatten(0, 1)), rel=1e-4)
    monkeypatch.setattr(measures, "CHUNK_SCORES", 64 * 7)
    assert measure(targets(z, prototypes)) == pytest.approx(found, rel=1e-4)
    monkeypatch.setattr(measures, "ROWS", 10)
    assert measure(targets(z, prototypes)) == measure(targets(z[:10], prototypes))


def shared_out(z, prototypes, sample, out):
    """The measures of a process's share of the rows, and of the probe set."""
    measured = measure(targets(z[ranks.rank() :: ranks.count()], prototypes))
    recipe = tiny()
    return measured | Probe(sample, recipe, out).look(3, build(recipe, CPU)[1].backbone)


def test_processes_measure_together(classes, tmp_path):
    z, prototypes = drawn(30, 2, 16), drawn(64, 16, seed=1)
    found = sample(classes, tiny(probe_images=31))
    whole = shared_out(z, prototypes, found, tmp_path)
    halves = [measure(targets(z[rank::2], prototypes)) for rank in range(2)]
    for of_rank in together(shared_out, 2, tmp_path / "both", z, prototypes, found, tmp_path):
        for name in ("entropy", "prototypes", "spread", "probe.rank", "probe.knn"):
            assert of_rank[name] == pytest.approx(whole[name], rel=1e-4), name
        for name in ("agreement", "rank"):
            assert of_rank[name] == pytest.approx((halves[0][name] + halves[1][name]) / 2), name


def test_features_that_are_not_finite_give_nan():
    z = drawn(8, 2, 16)
    z[3, 0, 0] = torch.nan
    found = measure(targets(z, drawn(64, 16)))
    assert all(math.isnan(found[name]) for name in ("entropy", "spread", "rank"))


@pytest.mark.parametrize(("views", "weight"), [(2, 2 / 3), (3, 1.0), (10, 1.0)])
def test_weights_of_pairs_are_those_of_the_loss(views, weight):
    from opsin.pretrain.objective import _pairs

    assert pairs(views) == pytest.approx(weight)
    assert pairs(views) == pytest.approx(_pairs(views, torch.zeros(())).sum().item())


def test_a_record_has_everything(tmp_path):
    records, _, _ = train(
        replace(tiny(4, probe_every=2), log_every=4),
        varied(varied(tmp_path / "a" / "b", 20).parent / "c", 20).parent,
        tmp_path / "run",
    )
    assert [record["step"] for record in records] == [2, 4]
    assert records == [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    record = records[-1]
    documented = {
        "step",
        "images",
        "epoch",
        "loss",
        "rate",
        "last_layer_rate",
        "decay",
        "momentum",
        "skipped",
        "lowered",
    }
    documented |= {f"loss.{name}" for name in ("dino", "dino_global", "dino_local", "ibot", "koleo")}
    documented |= {f"grad_norm.{name}" for name in ("backbone", "dino_head", "ibot_head")}
    documented |= {f"teacher.{name}" for name in ("entropy", "prototypes", "agreement", "spread", "rank")}
    documented |= {"student.divergence", "teacher_temperature", "probe.rank", "probe.knn"}
    documented |= {"skipped", "lowered", "images_per_second", "step_seconds", "data_seconds"}
    assert record.keys() == documented
    assert record["images"] == 128
    assert record["epoch"] == pytest.approx(128 / 40)
    cross_entropy = record["student.divergence"] + record["teacher.entropy"] * math.log(256)
    assert cross_entropy == pytest.approx(record["loss.dino"])
    assert record["student.divergence"] >= 0
    pictures = sorted(path.name for path in (tmp_path / "run" / "probe").iterdir())
    assert pictures == ["step-00000000.png", "step-00000002.png", "step-00000004.png"]


def test_metrics_drop_what_a_resumed_run_makes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    metrics = Metrics(path, 2)
    metrics.write({"step": 3, "loss": 1.0})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": 1.0},
    ]


# The probe set


def sample(data, recipe):
    source = scan(data, progress=False)
    with ImageReader(source, workers=1, channels=recipe.backbone.channels, max_bad_fraction=1) as reader:
        return Sample(source, reader, recipe)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Two classes that any backbone tells apart."""
    folder = tmp_path_factory.mktemp("classes")
    random = np.random.default_rng(0)
    for i in range(30):
        write(folder / "dark", i, random.integers(0, 60, (40, 40, 3)))
        write(folder / "light", i, random.integers(190, 256, (40, 40, 3)))
    return folder


def test_the_probe_set_depends_on_the_data_alone(classes):
    one, two = sample(classes, tiny()), sample(classes, tiny())
    assert np.array_equal(one.indices, two.indices)
    assert len(set(one.indices.tolist())) == 32
    assert torch.equal(one.images, two.images)
    assert one.images.shape == (32, 3, 32, 32)
    assert np.array_equal(one.indices, sample(classes, replace(tiny(), seed=1)).indices)
    assert len(sample(classes, tiny(probe_images=1000)).images) == 60


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_the_probe_of_other_channels(channels, tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(8):
        np.save(tmp_path / "data" / f"{i}.npy", random.integers(0, 65536, (channels, 40, 40), dtype=np.uint16))
    recipe = tiny(probe_images=8)
    mean, std = normalisation(channels)
    recipe = replace(
        recipe,
        backbone=replace(recipe.backbone, channels=channels),
        crops=replace(recipe.crops, mean=mean, std=std),
    )
    probe = Probe(sample(tmp_path / "data", recipe), recipe, tmp_path)
    images = probe.sample.images
    assert images.shape == (8, channels, 32, 32)
    assert 0 <= images.amin() < 0.2 < 0.8 < images.amax() <= 1
    assert probe.look(1, build(recipe, CPU)[1].backbone)["probe.rank"] > 1
    picture = np.asarray(Image.open(tmp_path / "probe" / "step-00000001.png"))
    shown = images[:, :3] if channels > 2 else images[:, [0, 0, 0]]
    assert np.array_equal(picture[:32], (shown * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2).numpy())


def test_the_probe_measures_and_draws(classes, tmp_path):
    recipe = tiny()
    backbone = build(recipe, CPU)[1].backbone
    probe = Probe(sample(classes, recipe), recipe, tmp_path)
    found = probe.look(7, backbone)
    assert found["probe.knn"] == 1
    assert 1 < found["probe.rank"] <= 32
    picture = np.asarray(Image.open(tmp_path / "probe" / "step-00000007.png"))
    assert picture.shape == (2 * 32, 8 * 32, 3)
    crops = (probe.sample.images[:8] * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2)
    assert np.array_equal(picture[:32], crops.numpy())
    assert len(np.unique(picture[32:].reshape(-1, 3), axis=0)) > 4
    with torch.no_grad():
        backbone.norm.weight[0] = torch.nan
    assert math.isnan(probe.look(8, backbone)["probe.rank"])
    assert not (tmp_path / "probe" / "step-00000008.png").exists()


def test_each_image_is_seen_once_in_many_forwards(classes, tmp_path, monkeypatch):
    from opsin.pretrain import probe

    recipe = tiny()
    backbone = build(recipe, CPU)[1].backbone
    whole = Probe(sample(classes, recipe), recipe, tmp_path)._tokens(backbone)
    monkeypatch.setattr(probe, "BATCH", 5)
    parts = Probe(sample(classes, recipe), recipe, tmp_path)._tokens(backbone)
    assert torch.allclose(whole, parts, atol=1e-5)


def test_an_unreadable_image_has_no_class(tmp_path):
    for i in range(4):
        write(tmp_path / "a", i, np.full((40, 40, 3), 60 * i))
    assert sample(tmp_path, tiny()).labels is None  # one class is none
    write(tmp_path / "b", 0, np.zeros((40, 40, 3)))
    (tmp_path / "a" / "001.png").write_bytes(b"nothing")
    assert sample(tmp_path, tiny()).labels.tolist() == [0, -1, 0, 0, 1]


def test_a_labelled_folder_beside_unlabelled_data(classes, tmp_path):
    data = varied(tmp_path / "data", 40)
    recipe = replace(tiny(2, probe_every=2), log_every=2)
    records, said, _ = train(recipe, data, tmp_path / "plain")
    assert "probe.knn" not in records[-1]
    assert "probe.rank" in records[-1]
    recipe = replace(tiny(2, probe_every=2, labelled=str(classes)), log_every=2)
    records, said, _ = train(recipe, data, tmp_path / "labelled")
    assert records[-1]["probe.knn"] == 1
    assert said[0].startswith("probe after step 0: probe.rank ")
    with pytest.raises(OpsinError, match=r"monitor\.labelled is .*, and its images do not all lie in sub-folders: put"):
        labelled_sample(tiny(labelled=str(data)), tmp_path)


def test_settings_survive_a_file():
    recipe = tiny(trackers=("tensorboard", "wandb"), policy="stop")
    assert from_yaml(to_yaml(recipe), "here") == recipe
    with pytest.raises(OpsinError, match="trackers"):
        from_yaml(to_yaml(recipe).replace("wandb", "wandbb"), "here")


def test_a_watch_that_never_began_can_be_closed(tmp_path):
    with Watch(tiny(), tmp_path, CPU, print):
        pass
    assert list(tmp_path.iterdir()) == []


def test_energy_is_added_up_over_restarts(monkeypatch):
    counter = iter([1000.0, 1500.0, 4600.0, 10_000.0, 13_600.0])
    monkeypatch.setattr(watch, "joules", lambda _: next(counter))
    meter = watch.Meter(CPU)
    assert [meter.read() for _ in range(2)] == [{"kilowatt_hours": 500 / 3.6e6}, {"kilowatt_hours": 3600 / 3.6e6}]
    again = watch.Meter(CPU)
    again.total.copy_(meter.total)
    assert again.read() == {"kilowatt_hours": 0.002}


def test_without_a_meter_there_is_no_number():
    assert watch.Meter(CPU).read() == {}
