"""Readers of depth sets on miniatures with the true layouts: the right pairs, in metres, and what is missing."""

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from opsin.errors import OpsinError
from opsin.evaluate.datasets.depth import SETS, check_unit, pairs, read_depth, read_set


def write_image(path, value=0, size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)


def write_depth(path, stored, size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, stored, dtype=np.uint16)).save(path)


def first_values(found):
    return [found.target(i)[0, 0].item() for i in range(len(found))]


# NYU Depth V2


def nyu(root, names=("nyu_train.txt", "nyu_test.txt"), sync="", test=""):
    train, tests = [], []
    for i in range(3):
        write_image(root / sync / "kitchen_0028b" / f"rgb_{i:05}.jpg", i)
        write_depth(root / sync / "kitchen_0028b" / f"sync_depth_{i:05}.png", 1500 + i)
        train.append(f"/kitchen_0028b/rgb_{i:05}.jpg /kitchen_0028b/sync_depth_{i:05}.png 518.8579")
    write_image(root / test / "bathroom" / "rgb_00045.jpg")
    write_depth(root / test / "bathroom" / "sync_depth_00045.png", 9000)
    tests.append("bathroom/rgb_00045.jpg bathroom/sync_depth_00045.png 518.8579")
    (root / names[0]).write_text("\n".join(train) + "\n")
    (root / names[1]).write_text("\n".join(tests) + "\n")


@pytest.mark.parametrize("bts", [False, True])
def test_nyu_by_its_lists(bts, tmp_path):
    if bts:
        names = ("nyudepthv2_train_files_with_gt.txt", "nyudepthv2_test_files_with_gt.txt")
        nyu(tmp_path, names, "sync", "official_splits/test")
    else:
        nyu(tmp_path)
    train, test = (read_set("nyu", tmp_path, part) for part in ("train", "test"))
    assert first_values(train) == pytest.approx([1.5, 1.501, 1.502])
    assert first_values(test) == [9.0]
    assert train.images.read(2).shape == (3, 6, 8)
    assert train.images.name(2).endswith("kitchen_0028b/rgb_00002.jpg")
    assert train.images.fingerprint != test.images.fingerprint


def test_nyu_says_what_is_missing(tmp_path):
    with pytest.raises(OpsinError, match=r"there is no folder .*: give nyu:PATH with the sync folders"):
        read_set("nyu", tmp_path / "none", "train")
    with pytest.raises(OpsinError, match=r"holds no nyu_train\.txt or nyudepthv2_train_files_with_gt\.txt: take the"):
        read_set("nyu", tmp_path, "train")
    nyu(tmp_path)
    (tmp_path / "kitchen_0028b" / "sync_depth_00001.png").unlink()
    with pytest.raises(
        OpsinError, match=r"1 of 3 files of the list are not in .*, such as kitchen_0028b/sync_depth_00001"
    ):
        read_set("nyu", tmp_path, "train")
    (tmp_path / "nyu_train.txt").write_text("kitchen_0028b/rgb_00000.jpg\n")
    with pytest.raises(OpsinError, match="has lines without image and depth"):
        read_set("nyu", tmp_path, "train")


def test_the_official_file_of_nyu(tmp_path):
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (4, 3, 640, 480), dtype=np.uint8)
    depths = rng.uniform(1, 9, (4, 640, 480)).astype("f4")
    depths[:, 9] = 0  # what the camera did not see
    with h5py.File(path, "w") as file:
        file["images"], file["rawDepths"], file["depths"] = images, depths, depths + 1
    with pytest.raises(OpsinError, match=r"there is no .*splits\.mat: take it from the official page"):
        read_set("nyu", tmp_path, "test")
    savemat(tmp_path / "splits.mat", {"testNdxs": [[1], [4]], "trainNdxs": [[2], [3]]})
    test = read_set("nyu", tmp_path, "test")
    assert len(test) == 2
    found, wanted = test.images.read(1), torch.from_numpy(images[3]).transpose(1, 2)
    assert torch.equal(found[:, 7:474, 7:632], wanted[:, 7:474, 7:632])
    assert int((found.amax(0) > 0).sum()) == 467 * 625  # the frame is black
    np.testing.assert_allclose(test.target(1), np.floor(depths[3].T * np.float32(1000)) / 1000, rtol=1e-6)
    assert read_set("nyu", tmp_path, "train").images.fingerprint != test.images.fingerprint


def test_the_official_file_of_nyu_without_h5py(tmp_path, monkeypatch):
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(OpsinError, match=r"is read with h5py, which is missing: pip install 'opsin\[eval\]'"):
        read_set("nyu", tmp_path, "test")


# KITTI


def kitti(root, raw="", depths="data_depth_annotated", ending=".png"):
    lines = []
    for i, half in enumerate(("train", "val")):
        drive = f"2011_09_26_drive_000{i}_sync"
        image = f"2011_09_26/{drive}/image_02/data/000000006{i}.png"
        depth = f"{drive}/proj_depth/groundtruth/image_02/000000006{i}.png"
        write_image((root / raw / image).with_suffix(ending), i)
        write_depth(root / depths / ("" if depths == "gt_depth" else half) / depth, 256 * (10 + i))
        lines.append(f"{image} {depth} 721.5377")
    lines.append("2011_09_28/2011_09_28_drive_0001_sync/image_02/data/0000000001.png None 707.0493")
    for part in ("train", "test"):
        (root / f"kitti_eigen_{part}.txt").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("raw", "depths", "ending"),
    [("", "data_depth_annotated", ".png"), ("raw", "", ".jpg"), ("input", "gt_depth", ".png")],
)
def test_kitti_by_eigens_lists(raw, depths, ending, tmp_path):
    kitti(tmp_path, raw, depths, ending)
    found = read_set("kitti", tmp_path, "test")
    assert first_values(found) == [10.0, 11.0]  # the entry without depth is dropped
    assert found.images.read(1).float().mean().item() == pytest.approx(1, abs=0.5)
    assert Path(found.images.name(0)).suffix == ending


def test_kitti_says_what_is_missing(tmp_path):
    kitti(tmp_path)
    next(tmp_path.glob("data_depth_annotated/val/**/*.png")).unlink()
    with pytest.raises(
        OpsinError, match=r"1 of 2 files .* such as 2011_09_26_drive_0001_sync/.*: take them from the raw"
    ):
        read_set("kitti", tmp_path, "train")


# SUN RGB-D


def sunrgbd(root, millimetres=(1234, 8191, 9500)):
    scenes = []
    for i, value in enumerate(millimetres):
        scene = f"SUNRGBD/kv2/kinect2data/00000{i}_2014-05-26"
        write_image(root / scene / "image" / f"{i:07}.jpg", i)
        write_depth(root / scene / "depth" / f"{i:07}.png", ((value << 3) | (value >> 13)) & 0xFFFF)
        scenes.append(f"/n/fs/sun3d/data/{scene}")
    cells = np.empty((1, len(scenes)), dtype=object)
    cells[0] = scenes
    folder = root / "SUNRGBDtoolbox" / "traintestSUNRGBD"
    folder.mkdir(parents=True)
    savemat(folder / "allsplit.mat", {"alltest": cells, "alltrain": cells[:, :1]})


def test_damaged_lists_are_one_sentence(tmp_path):
    nyu(tmp_path)
    for text in (b"\xff\xfe", b"\n"):
        (tmp_path / "nyu_train.txt").write_bytes(text)
        with pytest.raises(OpsinError, match=r"are not the official ones|is empty: take it from"):
            read_set("nyu", tmp_path, "train")
    other = tmp_path / "official"
    other.mkdir()
    (other / "splits.mat").write_text("text " * 99)
    (other / "nyu_depth_v2_labeled.mat").write_bytes(b"no HDF5")
    with pytest.raises(OpsinError, match=r"splits.mat is damaged or no MATLAB file"):
        read_set("nyu", other, "test")
    savemat(other / "splits.mat", {"trainNdxs": [[1]]})
    with pytest.raises(OpsinError, match=r"are not the official ones \(KeyError: 'testNdxs'\)"):
        read_set("nyu", other, "test")
    savemat(other / "splits.mat", {"testNdxs": [[1], [4]]})
    with pytest.raises(OpsinError, match=r"nyu_depth_v2_labeled.mat are not the official ones"):
        read_set("nyu", other, "test").target(0)


def test_sunrgbd_by_its_split_with_decoded_millimetres(tmp_path):
    sunrgbd(tmp_path)
    found = read_set("sunrgbd", tmp_path, "test")
    assert first_values(found) == pytest.approx([1.234, 8.191, 9.5])
    assert found.images.name(1).endswith("SUNRGBD/kv2/kinect2data/000001_2014-05-26/image/0000001.jpg")


def test_sunrgbd_says_what_is_missing(tmp_path):
    with pytest.raises(OpsinError, match=r"allsplit\.mat: take it from SUNRGBD\.zip and SUNRGBDtoolbox\.zip of rgbd"):
        read_set("sunrgbd", tmp_path, "test")
    sunrgbd(tmp_path)
    next(tmp_path.glob("SUNRGBD/kv2/kinect2data/000001*/depth/*")).unlink()
    with pytest.raises(OpsinError, match=r"1 of 3 scenes lack .* such as SUNRGBD/kv2/kinect2data/000001"):
        read_set("sunrgbd", tmp_path, "test")
    with pytest.raises(OpsinError, match="sunrgbd only tests heads, as the paper does: give --data nyu:PATH"):
        read_set("sunrgbd", tmp_path, SETS["sunrgbd"].train)
    (tmp_path / "SUNRGBDtoolbox" / "traintestSUNRGBD" / "allsplit.mat").write_text("no MATLAB file at all" * 20)
    with pytest.raises(OpsinError, match="is damaged or no MATLAB file"):
        read_set("sunrgbd", tmp_path, "test")


def test_protocols_of_published_sets():
    assert (SETS["nyu"].protocol.max_depth, SETS["nyu"].protocol.crop, SETS["nyu"].protocol.area) == (
        10,
        (416, 544),
        "eigen",
    )
    assert (SETS["kitti"].protocol.max_depth, SETS["kitti"].protocol.crop, SETS["kitti"].protocol.area) == (
        80,
        (352, 704),
        "garg",
    )
    assert (SETS["nyu"].protocol.brightness, SETS["kitti"].protocol.brightness) == (0.25, 0.1)
    assert (SETS["nyu"].protocol.border, SETS["kitti"].protocol.border) == ("nyu", "kb")
    sun = SETS["sunrgbd"].protocol
    assert (sun.max_depth, sun.size, sun.area, sun.cap) == (10, (640, 480), "sun", 8)
    with pytest.raises(OpsinError, match="unknown published set 'nyuu': did you mean 'nyu'"):
        read_set("nyuu", Path(), "test")


# One's own


def own(root, count=3):
    for i in range(count):
        write_image(root / "images" / "room" / f"{i}.jpg", i)
        write_depth(root / "depths" / "room" / f"{i}.png", 2000 + i)
    return root / "images", root / "depths"


def test_folders_are_paired_by_name(tmp_path):
    found = pairs(*own(tmp_path), scale=1000)
    assert first_values(found) == pytest.approx([2.0, 2.001, 2.002])
    assert pairs(*own(tmp_path), scale=100).images.fingerprint != found.images.fingerprint
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "room" / "2.png")
    with pytest.raises(OpsinError, match=r"has 2.jpg and 2.png, alike but for the ending"):
        pairs(tmp_path / "images", tmp_path / "depths")
    (tmp_path / "images" / "room" / "2.png").unlink()
    (tmp_path / "depths" / "room" / "1.png").unlink()
    with pytest.raises(OpsinError, match=r"1 of 3 files .* have no target of the same name, such as room/1"):
        pairs(tmp_path / "images", tmp_path / "depths")


@pytest.mark.parametrize("ending", [".npy", ".tif", ".png"])
def test_depth_is_read_from_every_format(ending, tmp_path):
    values = np.array([[0.0, 1.5, 2.25], [3.0, 4.0, 5.0]], dtype="f4")
    path = tmp_path / f"a{ending}"
    if ending == ".npy":
        np.save(path, values[None])
    elif ending == ".tif":
        Image.fromarray(values).save(path)
    else:
        Image.fromarray((values * 4000).astype(np.uint16)).save(path)
    metres = read_depth(path, 4000 if ending == ".png" else 1)
    assert metres.dtype == torch.float32
    np.testing.assert_array_equal(metres.numpy(), values)


def test_unknown_depth_is_zero(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[np.nan, np.inf, -np.inf], [-1.0, 0.0, 7.0]]))
    assert read_depth(tmp_path / "a.npy", 1).tolist() == [[0, 0, 0], [0, 0, 7]]


def test_disparity_becomes_depth(tmp_path):
    write_image(tmp_path / "images" / "a.png", size=(2, 2))
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "a.npy", np.array([[16.0, 32.0], [0.0, np.nan]]))
    found = pairs(tmp_path / "images", tmp_path / "maps", scale=16, disparity=True, focal_times_baseline=6.0)
    assert found.target(0).tolist() == [[6.0, 3.0], [0.0, 0.0]]
    (tmp_path / "maps" / "a.npy").unlink()
    Image.fromarray(np.array([[2, 4], [0, 1]], dtype=np.uint8)).save(tmp_path / "maps" / "a.png")
    found = pairs(tmp_path / "images", tmp_path / "maps", disparity=True, focal_times_baseline=6.0)
    assert found.target(0).tolist() == [[3.0, 1.5], [0.0, 6.0]]  # 8 bits do for disparity


def test_files_that_are_no_depth_are_one_sentence(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / "bytes.png")
    with pytest.raises(
        OpsinError, match=r"bytes\.png has samples of type uint8, which cannot hold depth in metres: store"
    ):
        read_depth(tmp_path / "bytes.png", 1)
    Image.fromarray(np.zeros((4, 5, 3), dtype=np.uint8)).save(tmp_path / "colours.png")
    with pytest.raises(OpsinError, match=r"colours\.png has the shape 4×5×3 and no single value per pixel"):
        read_depth(tmp_path / "colours.png", 1)
    (tmp_path / "text.npy").write_text("text")
    with pytest.raises(OpsinError, match=r"cannot read the depth .*text\.npy: it is damaged or no depth map"):
        read_depth(tmp_path / "text.npy", 1)
    with pytest.raises(OpsinError, match="there is no such file"):
        read_depth(tmp_path / "none.png", 1)


def test_another_unit_is_one_sentence(tmp_path):
    found = pairs(*own(tmp_path))
    with pytest.raises(
        OpsinError, match=r"the depths of x have a median of 2001 m and go from 2000 to 2002 m, where .*: hint"
    ):
        check_unit(found, "x", 1e-3, 10, "hint")
    check_unit(pairs(*own(tmp_path), scale=1000), "x", 1e-3, 10, "hint")
    with pytest.raises(OpsinError, match="median"):  # all of it nearer than what is measured
        check_unit(pairs(*own(tmp_path), scale=1e9), "x", 1e-3, 10, "hint")
    for path in (tmp_path / "depths" / "room").iterdir():
        write_depth(path, 0)
    with pytest.raises(OpsinError, match=r"3 depth maps of x, such as that of .*, hold no value above 0"):
        check_unit(pairs(tmp_path / "images", tmp_path / "depths"), "x", 1e-3, 10, "hint")


def test_other_maps_of_the_same_images_are_other_pairs(tmp_path):
    for folder in ("i", "d"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "i/0.png")
    np.save(tmp_path / "d/0.npy", np.ones((8, 8)))
    before = pairs(tmp_path / "i", tmp_path / "d").images.fingerprint
    np.save(tmp_path / "d/0.npy", np.ones((4, 4)))
    assert pairs(tmp_path / "i", tmp_path / "d").images.fingerprint != before
