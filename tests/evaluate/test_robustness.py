"""Robustness: errors by condition, mCE as published, results that survive a stop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.errors import OpsinError
from opsin.evaluate import robustness as task
from opsin.evaluate.classifier import Classifier, save
from opsin.evaluate.corruptions import KINDS, corrupt
from opsin.evaluate.corruptions.published import ALEXNET, corruption_errors, mean
from opsin.evaluate.dense import normalised
from opsin.evaluate.model import wrap
from opsin.evaluate.pooled import pool
from opsin.evaluate.probe import Probe
from opsin.evaluate.robustness import Robustness, crop, robustness
from opsin.evaluate.sets import own
from opsin.evaluate.task import Run


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 11)):
        for i in range(count):
            place = tmp_path / part / f"class{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (*rng.integers(30, 50, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i:02}.png")
    return tmp_path


@pytest.fixture
def head(tmp_path):
    path = tmp_path / "head.safetensors"
    torch.manual_seed(1)
    save(Classifier(torch.randn(2, 48), torch.zeros(2), blocks=1, mean=True), path)
    return path


def settings_in(folders, head, **options):
    options = {"corruptions": ("gaussian_noise", "contrast"), "severities": (1, 5), "probe": Probe(size=32)} | options
    return Robustness(data=str(folders / "train"), test_data=str(folders / "test"), head=head, **options)


def run_in(tmp_path, **options):
    return Run(batch_size=3, workers=2, cache=tmp_path / "kept", progress=False, **options)


def test_errors_are_those_of_each_image_by_itself(model, folders, head, tmp_path):
    result = robustness(model, settings_in(folders, head, stored_as="png"), run_in(tmp_path))
    images, classifier = own(str(folders / "test")), task.load(head, 24, 2)
    by_image = np.zeros(len(images))
    for kind in ("gaussian_noise", "contrast"):
        for severity in (1, 5):
            wrong = np.zeros(len(images))
            for i in range(len(images)):
                seen = corrupt(crop(images.read(i), 32)[None], kind, severity, 0, [i])
                wrong[i] = int(classifier.logits(pool(model, normalised(seen))).argmax()) != images.labels[i]
            assert result.details["errors"][kind][severity] == pytest.approx(wrong.mean())
            by_image += wrong / 4
    assert list(result.metrics) == ["corruption_error", "accuracy", "degradation"]
    np.testing.assert_allclose(result.outcomes, by_image)
    assert result.metrics["corruption_error"] == pytest.approx(by_image.mean())
    assert "no mCE" in result.table.note
    assert {len(row) for row in result.table.rows} == {len(result.table.headers)} == {4}


def test_without_corruptions_the_clean_images_count(model, folders, head, tmp_path):
    result = robustness(model, settings_in(folders, head, corruptions=("none",)), run_in(tmp_path))
    assert list(result.metrics) == ["accuracy"]
    assert result.outcomes.mean() == pytest.approx(result.metrics["accuracy"])


def test_images_of_mce_are_weighed_by_kind_as_it_is():
    rng = np.random.default_rng(0)
    wrong = {(kind, s): (rng.random(9) < 0.5).astype(float) for kind in ("fog", "contrast") for s in (1, 3)}
    for one in wrong.values():
        one[4] = np.nan  # cannot be decoded
    errors = {kind: {s: np.nanmean(wrong[kind, s]) for s in (1, 3)} for kind in ("fog", "contrast")}
    by_image = task._by_image(wrong, ["fog", "contrast"], [1, 3], relative=True)
    assert len(by_image) == 8
    assert by_image.mean().item() == pytest.approx(mean(list(corruption_errors(errors).values())))
    wrong["fog", 1] = wrong["fog", 1][:7]  # a published part that is not whole
    assert task._by_image(wrong, ["fog", "contrast"], [1, 3], relative=True) is None


def test_what_is_random_is_drawn_by_the_number_in_the_set(model, folders, head, tmp_path, monkeypatch):
    asked, real = [], task.drawn
    monkeypatch.setattr(task, "PART", 4)
    monkeypatch.setattr(task, "drawn", lambda kind, seed, index, *s: asked.extend(index) or real(kind, seed, index, *s))
    robustness(model, settings_in(folders, head, corruptions=("snow",)), run_in(tmp_path))
    assert asked == list(range(11))


def test_a_stopped_run_goes_on(model, folders, head, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "PART", 4)
    whole = robustness(model, settings_in(folders, head), Run(3, 2, tmp_path / "other", False))
    calls, real = [], task.applied

    def stops(images, *rest):
        calls.append(len(images))
        if sum(calls) > 20:
            raise KeyboardInterrupt
        return real(images, *rest)

    monkeypatch.setattr(task, "applied", stops)
    with pytest.raises(KeyboardInterrupt):
        robustness(model, settings_in(folders, head), run_in(tmp_path))
    calls.clear()
    monkeypatch.setattr(task, "applied", lambda images, *rest: calls.append(len(images)) or real(images, *rest))
    again = robustness(model, settings_in(folders, head), run_in(tmp_path))
    assert again.details == whole.details
    assert sum(calls) == (11 - 4) * 4
    calls.clear()
    robustness(model, settings_in(folders, head, corruptions=("contrast", "fog")), run_in(tmp_path))
    assert sum(calls) == 11 * 2  # fog alone


def test_unreadable_images_count_nowhere(model, folders, head, tmp_path):
    before = robustness(model, settings_in(folders, head), run_in(tmp_path))
    (folders / "test" / "class0" / "zz.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    after = robustness(model, settings_in(folders, head, corruptions=("contrast",)), run_in(tmp_path))
    assert after.details["errors"]["contrast"] == before.details["errors"]["contrast"]
    assert len(after.left_out) == 1


def test_mean_corruption_error_of_alexnet_is_one():
    alexnet = {kind: {i + 1: value / 100 for i, value in enumerate(ALEXNET[kind])} for kind in KINDS}
    assert mean(list(corruption_errors(alexnet).values())) == pytest.approx(1)
    two = {"fog": {1: 0.337, 2: 0.4}, "contrast": {5: 0.5}}
    terms = corruption_errors(two)
    assert terms["fog"] == pytest.approx(0.737 / (0.67474 + 0.7605))
    assert terms["contrast"] == pytest.approx(0.5 / 0.9927)


def test_distributed_images_are_read_and_other_sets_measured(model, folders, head, tmp_path):
    rng = np.random.default_rng(1)
    names = ("n01440764", "n01443537")
    for old, new in zip(("class0", "class1"), names, strict=True):
        for part in ("train", "test"):
            (folders / part / old).rename(folders / part / new)
        place = folders / "c" / "contrast" / "2" / new
        place.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.JPEG")
    tests = (f"imagenet-c:{folders / 'c'}", str(folders / "train"))
    options = {"corruptions": ("contrast",), "severities": (2,), "tests": tests}
    result = robustness(model, settings_in(folders, head, **options), run_in(tmp_path))
    error = result.details["errors"]["contrast"][2]
    assert result.metrics["mce"] == pytest.approx(error / 0.7615)
    assert next(iter(result.metrics)) == "mce"
    assert result.outcomes.mean() == pytest.approx(result.metrics["mce"])
    assert f"accuracy_{folders / 'train'}" in result.metrics


def test_missing_frost_is_in_the_table(model, folders, head, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "missing", lambda: {"frost": "no textures"})
    result = robustness(model, settings_in(folders, head, corruptions=("frost", "contrast")), run_in(tmp_path))
    assert result.details["missing"] == {"frost": "no textures"}
    assert "frost is left out" in result.table.note
    with pytest.raises(OpsinError, match="no corruption is left"):
        robustness(model, settings_in(folders, head, corruptions=("frost",)), run_in(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruptions": ("fogg",)}, "did you mean 'fog'"),
        ({"severities": (6,)}, "--severities is"),
        ({"severities": ()}, "different numbers from 1 to 5"),
        ({"test_fraction": 1.0}, "between 0 and 1"),
    ],
)
def test_wrong_settings_are_one_sentence(options, message):
    with pytest.raises(OpsinError, match=message):
        Robustness(**options)


def test_whatever_decides_errors_leads_to_results_of_their_own(model, folders, head, tmp_path):
    at, other = run_in(tmp_path), tmp_path / "other.safetensors"
    save(Classifier(torch.ones(2, 48), torch.zeros(2), blocks=1, mean=True), other)
    with torch.no_grad():
        second = wrap(type(model.backbone)(model.arch))
    asked = [
        (model, head, {}),
        (model, head, {"stored_as": "png"}),
        (model, head, {"seed": 1}),
        (second, head, {}),
        (model, head, {"probe": Probe(size=40)}),
        (model, other, {}),
    ]
    for one, given, options in asked:
        robustness(one, settings_in(folders, given, corruptions=("contrast",), severities=(1,), **options), at)
    assert len(list(at.cache.glob("judged-*"))) == len(asked)


def test_other_labels_of_the_same_images_are_counted_anew(model, folders, head, tmp_path, monkeypatch):
    options = {"corruptions": ("contrast",), "severities": (1,)}
    before = robustness(model, settings_in(folders, head, **options), run_in(tmp_path))
    real = task.train_and_test

    def relabelled(*a):
        train, test = real(*a)
        return train, replace(test, labels=1 - test.labels)

    monkeypatch.setattr(task, "train_and_test", relabelled)
    after = robustness(model, settings_in(folders, head, **options), run_in(tmp_path))
    assert after.details["errors"]["contrast"][1] == pytest.approx(1 - before.details["errors"]["contrast"][1])


@pytest.mark.parametrize("stored_as", ["png", "jpeg85"])
def test_the_backbone_sees_the_corruption_of_seed_and_number(model, folders, head, tmp_path, monkeypatch, stored_as):
    seen = []
    monkeypatch.setattr(task, "pool", lambda model, images: seen.append(images) or pool(model, images))
    options = {"corruptions": ("gaussian_noise",), "severities": (2,), "seed": 7, "stored_as": stored_as}
    robustness(model, settings_in(folders, head, **options), run_in(tmp_path))
    images = own(str(folders / "test"))
    wanted = corrupt(crop(images.read(0), 32)[None], "gaussian_noise", 2, 7, [0], stored_as)
    assert any(torch.equal(batch[0], normalised(wanted)[0]) for batch in seen)


def test_the_crop_is_the_centre_of_256_for_224():
    from torchvision.transforms.functional import center_crop, resize

    photo = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    assert torch.equal(crop(photo, 224), center_crop(resize(photo, 256, antialias=True), 224))


def test_distributed_images_are_seen_as_they_are_and_numbered_as_the_training(
    model, folders, head, tmp_path, monkeypatch
):
    for old, new in (("class0", "n01440764"), ("class1", "n01443537")):
        for part in ("train", "test"):
            (folders / part / old).rename(folders / part / new)
    place = folders / "c/contrast/2/n01443537"  # the second class alone
    place.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / "0.JPEG")
    seen = []
    monkeypatch.setattr(task, "pool", lambda model, images: seen.append(images) or pool(model, images))
    options = {"corruptions": ("contrast",), "severities": (2,), "tests": (f"imagenet-c:{folders / 'c'}",)}
    result = robustness(model, settings_in(folders, head, **options), run_in(tmp_path))
    pixels = torch.from_numpy(np.array(Image.open(place / "0.JPEG"))).permute(2, 0, 1)
    torch.testing.assert_close(seen[-1][0], normalised(pixels), atol=1e-4, rtol=1e-4)
    answer = int(task.load(head, 24, 2).logits(pool(model, seen[-1])).argmax())
    assert result.details["errors"]["contrast"][2] == float(answer != 1)


def test_a_further_set_of_one_class_can_only_be_right(model, folders, head, tmp_path):
    (folders / "some").mkdir()
    (folders / "some/class1").symlink_to(folders / "test/class1")
    settings = settings_in(folders, head, corruptions=("none",), tests=(str(folders / "some"),))
    assert robustness(model, settings, run_in(tmp_path)).metrics[f"accuracy_{folders / 'some'}"] == 1.0


def test_the_error_is_the_mean_over_kinds_and_degrades_from_the_same_crop(model, folders, head, tmp_path, monkeypatch):
    monkeypatch.setattr(
        task, "_made", lambda *a: {(k, s): np.full(4, {"clean": 0.25, "fog": 0.5, "snow": 0.9}[k]) for k, s in a[3]}
    )
    found = robustness(model, settings_in(folders, head, corruptions=("fog", "snow")), run_in(tmp_path))
    assert found.metrics["corruption_error"] == pytest.approx(0.7)
    assert found.metrics["degradation"] == pytest.approx(0.45)
