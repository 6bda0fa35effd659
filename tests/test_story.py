"""The report of a run, told from what the run left behind."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opsin import story
from opsin.backbone.features import load
from opsin.backbone.probe import PcaPicture
from opsin.backbone.registry import architecture
from opsin.backbone.vit import VisionTransformer
from opsin.data.crops import CropRecipe
from opsin.data.stream import BatchRecipe, DataRecipe
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.phases import pretrain
from opsin.pretrain.presets import cpu
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.step import build

CPU = torch.device("cpu")
COUNT = 14


def recipe(**changes) -> Recipe:
    return replace(
        cpu(),
        backbone=replace(architecture("vit_nano8"), depth=1, width=16, heads=2, grid=2, layerscale=1.0),
        steps=3,
        batch=BatchRecipe(size=4, group=4),
        crops=CropRecipe(global_size=16, local_size=8, local_count=2),
        heads=HeadRecipe(dino_prototypes=32, ibot_prototypes=32, hidden=16),
        data=DataRecipe(workers=2),
        **changes,
    )


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Two classes, named so that a page which forgot to escape them would break."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / ("a&b" if i % 2 else "<i>") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        low = 128 * (i % 2)
        Image.fromarray(random.integers(low, low + 128, (24, 30, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def out(labelled, tmp_path_factory) -> Path:
    """A finished run of three steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    pretrain(recipe(), labelled, out, device="cpu", quiet=True)
    return out


@pytest.fixture
def flat(labelled, tmp_path) -> Path:
    """The same photos without classes."""
    for path in labelled.rglob("*.png"):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "flat"


def without_pictures(page: str) -> str:
    return re.sub(r"data:image/[^\"')]*", "data:", page)


def test_the_report_of_labelled_photos(out, labelled):
    path = story.tell(out, labelled, device="cpu")
    assert path == out / "report.html"
    page = path.read_text()
    text = without_pictures(page)
    # self-contained: nothing is asked for from outside, and no other file is named
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", text)
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text.replace("url(data:", "")
    # 5 queries and 6 neighbours each, 4 photos with two pictures each for PCA and for norms, and curves
    assert page.count("data:image/") >= 5 * 7 + 2 * 4 * 3 + 2
    assert f"Over all patches of {COUNT} images at 32 × 32 pixels" in text
    assert "kNN, 10 neighbours, leave one out" in text
    assert "Effective rank (RankMe)" in text
    assert f"{COUNT} images of" in text
    assert "&lt;i&gt;" in text
    assert "a&amp;b" in text
    assert "<i>" not in text
    assert "dino_prototypes: 32" in text  # the recipe
    assert torch.__version__ in text
    # two classes that differ in brightness alone: neighbours are of one class
    accuracies = re.search(r"leave one out.*?(\d\.\d{3}).*?(\d\.\d{3})", text, re.S)
    assert accuracies is not None
    assert float(accuracies[2]) > 0.8
    # the saved basis gives later pictures the same colours
    basis = PcaPicture.load(out / "pca.safetensors")
    assert basis.mean.shape == (16,)


def test_the_report_of_photos_without_classes(flat, tmp_path):
    out = tmp_path / "run"
    pretrain(recipe(), flat, out, device="cpu", quiet=True)
    text = without_pictures(story.tell(out, flat, device="cpu").read_text())
    assert "kNN" not in text
    assert "folder are neighbours" not in text
    assert "Effective rank (RankMe)" in text
    assert "Before training" in text


def test_a_photo_that_cannot_be_read_is_left_out(labelled, tmp_path):
    data, out = tmp_path / "photos", tmp_path / "run"
    for path in labelled.rglob("*.png"):
        (data / path.parent.name).mkdir(parents=True, exist_ok=True)
        (data / path.parent.name / path.name).write_bytes(path.read_bytes())
    (data / "a&b" / "0.png").write_bytes(b"no picture")
    pretrain(recipe(), data, out, device="cpu", quiet=True)
    text = story.tell(out, data, device="cpu").read_text()
    assert f"On {COUNT} images of the training data" in text
    assert f"{COUNT + 1} images of" in text


def test_before_is_what_the_run_began_with_and_after_what_it_ended_with(labelled, tmp_path):
    settings = recipe(seed=5)
    out = tmp_path / "run"
    began = {}

    def look(networks):
        began.update({name: tensor.clone() for name, tensor in networks[1].backbone.state_dict().items()})
        return networks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opsin.pretrain.step.build", lambda *given: look(build(*given)))
        torch.manual_seed(99)  # the state of the caller's generator plays no part
        pretrain(settings, labelled, out, device="cpu", quiet=True)
    torch.manual_seed(7)
    before, after = story.backbones(out, settings, CPU)
    assert not before.training
    assert not after.training
    assert began.keys() == before.state_dict().keys()
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in began.items())
    other = story.backbones(out, replace(settings, seed=6), CPU)[0]
    assert not torch.equal(other.cls_token, before.cls_token)
    trained = after.state_dict()
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in began.items())


def test_facts_are_those_of_the_files(out):
    facts = story.facts(out, recipe())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = {item["label"]: item["value"] for item in facts["summary"]}
    assert summary["Steps"] == "3"
    assert summary["Images seen"] == "12"
    assert summary["Final loss"] == f"{records[-1]['loss']:.3f}"
    speeds = sorted(record["images_per_second"] for record in records)
    assert summary["Images per second"] == f"{speeds[1]:.0f}"
    assert facts["recipe"] == (out / "recipe.yaml").read_text()
    versions = {item["label"]: item["value"] for item in facts["versions"]}
    assert versions["seed"] == "0"
    timings = {item["label"]: item["value"] for item in facts["timings"]}
    assert timings["Backbone"] == "1 blocks, width 16, patch 8"
    waiting = sum(r["data_seconds"] for r in records) / sum(r["step_seconds"] for r in records)
    assert timings["Waiting for images"] == f"{waiting:.1%} of the time"


def test_neighbours_are_the_nearest_and_never_the_image_itself():
    images = [torch.full((3, 8, 8), 10 * i, dtype=torch.uint8) for i in range(5)]
    angles = torch.tensor([0.0, 0.1, 0.3, 1.5, 1.7])
    tokens = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [9.0], [0.1], [5.0], [1.0]])
    rows = story.neighbours(images, tokens, [0, 3], list("abcde"), shown=3)
    assert [row["query"]["label"] for row in rows] == ["a", "d"]
    assert [[item["label"] for item in row["nearest"]] for row in rows] == [["b", "c", "d"], ["e", "c", "b"]]
    few = story.neighbours(images[:2], tokens[:2], [0], None)
    assert len(few[0]["nearest"]) == 1


def test_an_image_is_not_its_own_neighbour_in_the_measure():
    tokens = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    table = story._measures({"before": tokens, "after": tokens}, labels=list(range(6)))  # no two of one class
    assert table["rows"][0] == ["kNN, 10 neighbours, leave one out", "0.000", "0.000"]
    assert table["note"] == "On 6 images of the training data."


@pytest.mark.parametrize("registers", [0, 2])
def test_patch_norms_are_those_before_the_final_norm(registers):
    torch.manual_seed(0)
    backbone = VisionTransformer(replace(recipe().backbone, registers=registers, depth=2))
    images = [torch.randint(0, 256, (3, 24, 24 + i), dtype=torch.uint8) for i in range(9)]  # more than one batch
    entered = []
    backbone.norm.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    squares = torch.stack([story._square(image, 24) for image in images])
    with torch.no_grad():
        backbone([story._normalised(list(squares))])
    tokens = entered[0].view(9, 1 + registers + 9, 16)
    expected = tokens[:, 1 + registers :].norm(dim=-1).view(9, 3, 3)
    torch.testing.assert_close(story.patch_norms(images, backbone, 31), expected)  # rounded down to the patch
    assert len(entered) == 1  # patch_norms did not go through it


def test_the_pictures_of_norms_are_in_medians_of_each_model():
    norms = torch.ones(5, 4, 4)
    norms[1, 1, 1] = 12
    images = [torch.zeros(3, 32, 32, dtype=torch.uint8)] * 5
    section = story.norm_pictures(images, {"small": norms, "large": 50 * norms, "calm": torch.ones(5, 4, 4)}, 32)
    assert section["columns"] == ["Image", "small", "large", "calm"]
    usual, with_outlier, *_ = (pictures[1:] for pictures in section["rows"])
    assert len(section["rows"]) == 4
    assert usual[0] == usual[1] == usual[2]
    assert with_outlier[0] == with_outlier[1] != with_outlier[2] == usual[2]
    assert section["table"]["rows"] == [
        ["small", "1.25%", "12.00", "1"],
        ["large", "1.25%", "12.00", "50"],
        ["calm", "none", "1.00", "1"],
    ]
    assert section["limit"] == "3"


def test_registers_learn_and_come_back_with_the_weights(labelled, tmp_path):
    settings = recipe()
    settings = replace(
        settings, backbone=replace(settings.backbone, registers=4, position_offset=0.0, position_antialias=True)
    )
    out = tmp_path / "run"
    pretrain(settings, labelled, out, device="cpu", quiet=True)
    assert all(np.isfinite(record["loss"]) for record in story.metrics(out))
    before, after = story.backbones(out, settings, CPU)
    moved = (after.register_tokens - before.register_tokens).norm(dim=-1)[0]
    assert (moved > 1e-4).all()  # they begin at a scale of 1e-6
    assert len(torch.unique(after.register_tokens, dim=1)[0]) == 4
    again = load(out / "backbone.safetensors")
    assert again.backbone.arch == settings.backbone
    image = torch.randint(0, 256, (3, 20, 28), dtype=torch.uint8)
    features = again.features(image, size=16)
    assert features.registers.shape == (1, 4, 16)
    assert features.patches.shape == (1, 2, 3, 16)
    text = without_pictures(story.tell(out, labelled, device="cpu").read_text())
    assert "<h2>Patch norms</h2>" in text
    assert "registers: 4" in text  # the recipe


@pytest.mark.parametrize(
    ("count", "wanted", "rows"), [(10, 5, [1, 3, 5, 7, 9]), (3, 5, [0, 1, 2]), (1, 4, [0]), (512, 2, [128, 384])]
)
def test_pictures_are_spread_over_the_data(count, wanted, rows):
    assert story._spread(count, wanted) == rows
