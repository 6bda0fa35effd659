"""Evaluations from files that somebody else made: a stereo pair, photos of VOC, clips, near-duplicates.

They come in Debian packages (`make debian`); each test skips itself without them.
"""

import csv
import json
import os
from xml.etree import ElementTree

import av
import numpy as np
import pytest
import torch
from PIL import Image

from debian import LABELME, OPENCV, SKIMAGE, debian
from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.backbone.weights import save
from opsin.cli import main
from opsin.evaluate.clips import centres, read_clip
from opsin.evaluate.datasets.boxes import read_boxes
from opsin.evaluate.datasets.segmentation import read_set


@pytest.fixture
def evaluate(tmp_path):
    """The command `evaluate TASK` on an untrained backbone: what it writes with --out."""
    torch.manual_seed(0)
    arch = Architecture(width=24, depth=4, heads=2, patch=8, grid=2, layerscale=0.5)
    save(VisionTransformer(arch), tmp_path / "w.safetensors")

    def run(task, *options):
        common = ["--weights", tmp_path / "w.safetensors", "--device", "cpu", "--cache", tmp_path / "kept"]
        given = ["evaluate", task, *options, *common, "--no-progress", "--out", tmp_path / f"{task}.json"]
        assert main([str(one) for one in given]) == 0
        return json.loads((tmp_path / f"{task}.json").read_text())

    return run


def voc(folder, photos, **parts):
    """VOC 2012's layout around photos and other folders, by links, with lists of all names."""
    root = folder / "VOCdevkit" / "VOC2012"
    root.mkdir(parents=True)
    for name, place in {"JPEGImages": photos, **parts}.items():
        (root / name).symlink_to(place)
    names = sorted(path.stem for path in photos.iterdir())
    for kind, part, some in (
        ("Segmentation", "train", names[:2]), ("Segmentation", "val", names[2:]), ("Main", "trainval", names)
    ):  # fmt: skip
        (root / "ImageSets" / kind).mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / kind / f"{part}.txt").write_text("\n".join(some) + "\n")
    return names


# Middlebury's Motorcycle at a quarter of its size: focal length 994.978 px, baseline 193.001 mm, doffs 31.086 px
FOCAL, BASELINE, DOFFS = 994.978, 0.193001, 31.086


def test_depth_from_the_disparity_of_a_stereo_camera(evaluate, tmp_path):
    photo = np.asarray(Image.open(debian(f"{SKIMAGE}/motorcycle_left.png")))
    with np.load(debian(f"{SKIMAGE}/motorcycle_disp.npz")) as file:
        disparity = file["arr_0"]
    assert photo.shape[:2] == disparity.shape
    metres = FOCAL * BASELINE / (disparity + DOFFS)  # infinite disparity is unknown, and so is a depth of 0
    assert 2 < metres[np.isfinite(disparity)].min() < metres.max() < 6  # a motorcycle in a garage
    for folder in ("images", "disparity", "metres"):
        (tmp_path / folder).mkdir()
    for number, (top, left) in enumerate((top, left) for top in (0, 250) for left in (0, 240, 480)):
        part = slice(top, top + 240), slice(left, left + 240)
        Image.fromarray(photo[part]).save(tmp_path / "images" / f"{number}.png")
        np.save(tmp_path / "disparity" / f"{number}.npy", disparity[part])
        np.save(tmp_path / "metres" / f"{number}.npy", metres[part])
    common = ["--data", tmp_path / "images", "--size", "64", "64", "--steps", "20", "--images-per-step", "4"]
    stereo = ["--disparity", "--focal-times-baseline", FOCAL * BASELINE, "--disparity-offset", DOFFS]
    found = evaluate("depth", *common, "--depths", tmp_path / "disparity", *stereo, "--rate", "1e-2")
    known = evaluate("depth", *common, "--depths", tmp_path / "metres", "--rate", "1e-2")
    assert found["metrics"] == pytest.approx(known["metrics"], rel=1e-5)
    assert found["metrics"]["rmse"] < 3  # it starts near 5 m, the middle of the range


def test_segmentation_of_photos_of_voc(evaluate, tmp_path):
    folder = debian(f"{LABELME}/semantic_segmentation/data_dataset_voc")
    names = voc(tmp_path, folder / "JPEGImages", SegmentationClass=folder / "SegmentationClassPNG")
    for part, some in (("train", names[:2]), ("val", names[2:])):
        pairs = read_set("voc2012", tmp_path, part, 3)
        for index, name in enumerate(some):
            assert name in pairs.images.name(index)
            # labelme's own arrays of the same masks, where -1 counts nowhere
            np.testing.assert_array_equal(pairs.target(index), np.load(folder / "SegmentationClass" / f"{name}.npy"))
    size = ["--crop", "64", "--shorter", "64", "--steps", "3", "--train-batch", "2"]
    found = evaluate("segmentation", "--data", f"voc2012:{tmp_path}", *size)
    there = set(np.load(folder / "SegmentationClass" / f"{names[2]}.npy").ravel().tolist()) - {-1}
    measured = {index for index, value in enumerate(found["details"]["iou"]) if value is not None}
    assert there <= measured
    assert found["details"]["classes"][15] == "person"


def test_discovery_of_the_objects_of_voc(evaluate, tmp_path):
    folder = debian(f"{LABELME}/bbox_detection/data_dataset_voc")
    names = voc(tmp_path, folder / "JPEGImages", Annotations=folder / "Annotations")
    images, boxes = read_boxes(f"voc2012:{tmp_path}", None)
    for index, name in enumerate(names):
        assert name in images.name(index)
        objects = ElementTree.parse(folder / "Annotations" / f"{name}.xml").findall("object/bndbox")
        widths = [float(box.find("xmax").text) - float(box.find("xmin").text) + 1 for box in objects]
        np.testing.assert_allclose(boxes[index][:, 2] - boxes[index][:, 0], widths, rtol=1e-5)
    found = evaluate("discovery", "--data", f"voc2012:{tmp_path}", "--size", "96")
    assert found["details"]["images"] == 3
    assert 0 < found["metrics"]["overlap"] < 1


def test_frames_of_clips_of_other_encoders(evaluate, tmp_path):
    tree = debian(f"{OPENCV}/tree.avi")
    with av.open(str(tree)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for seen, number in zip(read_clip(tree, 5), centres(len(frames), 5), strict=True):
        np.testing.assert_array_equal(seen.permute(1, 2, 0), frames[number])
    for label, names in (("drawn", ("Megamind.avi", "Megamind_bugy.avi")), ("filmed", ("tree.avi", "vtest.avi"))):
        (tmp_path / "clips" / label).mkdir(parents=True)
        for name in names:
            os.symlink(debian(f"{OPENCV}/{name}"), tmp_path / "clips" / label / name)
    probe = ["--probe.size", "64", "--probe.steps", "40", "--probe.train-batch", "4"]
    found = evaluate("video", "--data", tmp_path / "clips", "--test-fraction", "0.5", "--frames", "3", *probe)
    assert (found["details"]["n_train"], found["details"]["n_test"]) == (2, 2)
    assert found["left_out"] == []


def test_photos_of_the_same_thing_are_copies(evaluate, tmp_path):
    folder = debian(OPENCV)
    copies = [("ela_original.jpg", "ela_modified.jpg"), ("aloeL.jpg", "aloeR.jpg"), ("leuvenA.jpg", "leuvenB.jpg")]
    others = [(one[0], two[1]) for one in copies for two in copies if one != two]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["first", "second", "copy"])
        rows.writerows([*((*pair, 1) for pair in copies), *((*pair, 0) for pair in others)])
    found = evaluate("copies", "--data", folder, "--pairs", tmp_path / "pairs.csv", "--size", "64")
    assert (found["details"]["copies"], found["details"]["others"]) == (3, 6)
    assert found["metrics"]["micro_ap"] > 0.5  # chance is 1/3
