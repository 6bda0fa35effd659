"""Every published set for classification, read from a miniature with its true layout."""

import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from opsin.errors import OpsinError
from opsin.evaluate.datasets import simclr
from opsin.evaluate.datasets.classification import SETS, allowed, metric_of, read_set
from opsin.evaluate.sets import in_classes_of, train_and_test

CAT, DOG, EEL = "n02123045", "n02084071", "n01440764"  # sorted: EEL, DOG, CAT
LABELLED = sorted(name for name in SETS if name != "imagenet-c")


def colour(path):
    """Three bytes that are only this file's: its picture shows which one was opened."""
    return tuple(hashlib.sha256(os.path.basename(path).encode()).digest()[:3])


def encoded(name):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour(name)).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def picture(root, *names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(name))


def text(root, name, *lines):
    path = Path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def mat(root, name, **values):
    path = Path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, values)


def tar_of(root, out):
    """Pack what lies in `root` and remove it."""
    with tarfile.open(out, "w:gz" if out.suffix in (".gz", ".tgz") else "w") as tar:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                tar.add(path, path.relative_to(root))
    shutil.rmtree(root)


def zip_of(root, out):
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                packed.write(path, path.relative_to(root))
    shutil.rmtree(root)


def record(fields, values):
    found = np.zeros(len(values), dtype=[(field, object) for field in fields])
    for i, value in enumerate(values):
        found[i] = value
    return found


def devkit(root):
    """Numbers of the development kit are another order than that of the identifiers; 4 has children."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    rows = [(1, CAT, "cat", "", 0), (2, EEL, "eel", "", 0), (3, DOG, "dog", "", 0), (4, "n00001740", "entity", "", 3)]
    mat(root, "ILSVRC2012_devkit_t12/data/meta.mat", synsets=record(fields, rows))
    text(root, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", 3, 1, 1, 2)


def val_name(number):
    return f"ILSVRC2012_val_{number:08d}.JPEG"


VAL = [(val_name(1), DOG), (val_name(2), CAT), (val_name(3), CAT), (val_name(4), EEL)]
TRAIN = [(f"{wnid}_{i}.JPEG", wnid) for wnid in (EEL, DOG, CAT) for i in (3, 7)]


def imagenet(root):
    picture(root, *(f"train/{wnid}/{name}" for name, wnid in TRAIN), *(f"val/{name}" for name, _ in VAL))
    devkit(root)
    return {"train": TRAIN, "val": VAL}


def imagenet_a(root, folder="imagenet-a"):
    picture(root, f"{folder}/{CAT}/0.1_b.jpg", f"{folder}/{EEL}/0.2_a.jpg")
    text(root, f"{folder}/README.txt", "…")
    return {"test": [("0.2_a.jpg", EEL), ("0.1_b.jpg", CAT)]}


def imagenet_r(root):
    return imagenet_a(root, "imagenet-r")


def imagenet_sketch(root):
    return imagenet_a(root, "sketch")


def imagenet_v2(root):
    folder = "imagenetv2-matched-frequency-format-val"
    picture(root, f"{folder}/0/a.jpeg", f"{folder}/2/b.jpeg", f"{folder}/10/c.jpeg", f"{folder}/999/d.jpeg")
    return {"test": [("a.jpeg", 0), ("c.jpeg", 10), ("b.jpeg", 2), ("d.jpeg", 999)]}


def imagenet_real(root):
    picture(root, *(f"val/{name}" for name, _ in VAL))
    text(root, "real.json", "[[5], [], [999, 0], [7]]")
    many = [np.zeros(1000, int) for _ in VAL]
    many[0][5] = many[2][999] = many[2][0] = many[3][7] = 1
    return {"test": [(name, row) for (name, _), row in zip(VAL, many, strict=True)]}


def food101(root):
    base = "food-101"
    lists = {"train": {"pie": ["pie/11", "pie/5"], "cake": ["cake/7"]}, "test": {"pie": ["pie/2"], "cake": ["cake/9"]}}
    for part, images in lists.items():
        text(root, f"{base}/meta/{part}.json", json.dumps(images))
        picture(root, *(f"{base}/images/{name}.jpg" for names in images.values() for name in names))
    return {
        "train": [("11.jpg", "pie"), ("5.jpg", "pie"), ("7.jpg", "cake")],
        "test": [("2.jpg", "pie"), ("9.jpg", "cake")],
    }


def cifar(root, base, batches, meta, key, titles):
    """Files of one image each, whose second pixel of the first row has the number of the file."""
    folder = Path(root, base)
    folder.mkdir(parents=True)
    for i, (name, field) in enumerate(batches):
        pixels = np.zeros((1, 3, 32, 32), dtype=np.uint8)
        pixels[0, :, 0, 1] = i, 50 + i, 100 + i
        folder.joinpath(name).write_bytes(pickle.dumps({"data": pixels.reshape(1, -1), field: [i % 2]}))
    folder.joinpath(meta).write_bytes(pickle.dumps({key: titles}))


def cifar10(root):
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    batches = [(name, "labels") for name in names]
    cifar(root, "cifar-10-batches-py", batches, "batches.meta", "label_names", ["plane", "ship"])
    truth = [("image", title) for title in ("plane", "ship", "plane", "ship", "plane", "ship")]
    return {"train": truth[:5], "test": truth[5:]}


def cifar100(root):
    cifar(
        root,
        "cifar-100-python",
        [("train", "fine_labels"), ("test", "fine_labels")],
        "meta",
        "fine_label_names",
        ["a", "b"],
    )
    return {"train": [("image", "a")], "test": [("image", "b")]}


def sun397(root):
    text(root, "SUN397/ClassName.txt", "/a/abbey", "/a/apse/indoor", "/b/bar")
    text(root, "Partitions/Training_01.txt", "/b/bar/sun_3.jpg", "/a/abbey/sun_1.jpg")
    text(root, "Partitions/Testing_01.txt", "/a/apse/indoor/sun_2.jpg")
    picture(root, "SUN397/a/abbey/sun_1.jpg", "SUN397/a/apse/indoor/sun_2.jpg", "SUN397/b/bar/sun_3.jpg")
    return {"train": [("sun_3.jpg", "bar"), ("sun_1.jpg", "abbey")], "test": [("sun_2.jpg", "apse/indoor")]}


def cars(root):
    fields = ("bbox_x1", "class", "fname")
    kit = "stanford_cars/devkit"
    mat(root, f"{kit}/cars_meta.mat", class_names=np.array(["Audi", "Fiat"], dtype=object))
    rows = {"train": [(9, 2, "00001.jpg"), (9, 1, "00002.jpg")], "test": [(9, 1, "00003.jpg"), (9, 2, "00004.jpg")]}
    mat(root, f"{kit}/cars_train_annos.mat", annotations=record(fields, rows["train"]))
    mat(root, "stanford_cars/cars_test_annos_withlabels.mat", annotations=record(fields, rows["test"]))
    for part, held in rows.items():
        picture(root, *(f"stanford_cars/cars_{part}/{name}" for _, _, name in held))
    return {
        "train": [("00001.jpg", "Fiat"), ("00002.jpg", "Audi")],
        "test": [("00003.jpg", "Audi"), ("00004.jpg", "Fiat")],
    }


def aircraft(root):
    data = "fgvc-aircraft-2013b/data"
    text(root, f"{data}/variants.txt", "707-320", "DR-400 B")
    rows = {"train": ["0034309 DR-400 B"], "val": ["0034958 707-320"], "test": ["0037511 707-320"]}
    rows["trainval"] = rows["train"] + rows["val"]
    for part, lines in rows.items():
        text(root, f"{data}/images_variant_{part}.txt", *lines)
        picture(root, *(f"{data}/images/{line.split()[0]}.jpg" for line in lines))
    truth = {part: [(f"{line[:7]}.jpg", line[8:]) for line in lines] for part, lines in rows.items()}
    assert truth["trainval"] == [("0034309.jpg", "DR-400 B"), ("0034958.jpg", "707-320")]
    return truth


def voc2007(root):
    base = "VOCdevkit/VOC2007"
    images = {"train": ["000012"], "val": ["000005"], "trainval": ["000005", "000012"], "test": ["000001", "000002"]}
    marks = {("chair", "000005"): 1, ("sofa", "000005"): 0, ("car", "000012"): 1, ("tvmonitor", "000001"): 1}
    assert len(simclr.VOC_CLASSES) == 20
    truth = {}
    for part, names in images.items():
        picture(root, *(f"{base}/JPEGImages/{name}.jpg" for name in names))
        truth[part] = [(f"{name}.jpg", np.zeros(20, int)) for name in names]
        for column, title in enumerate(simclr.VOC_CLASSES):
            text(
                root,
                f"{base}/ImageSets/Main/{title}_{part}.txt",
                *(f"{name} {marks.get((title, name), -1):>2}" for name in names),
            )
            for name, (_, row) in zip(names, truth[part], strict=True):
                row[column] = {1: 1, 0: -1, -1: 0}[marks.get((title, name), -1)]
    assert truth["trainval"][0][1].tolist() == [0] * 8 + [1] + [0] * 8 + [-1, 0, 0]
    return truth


def dtd(root):
    rows = {
        "train": ["banded/banded_0002.jpg", "dotted/dotted_0001.jpg"],
        "val": ["dotted/dotted_0003.jpg", "banded/banded_0004.jpg"],
        "test": ["banded/banded_0005.jpg", "dotted/dotted_0006.jpg"],
    }
    for part, lines in rows.items():
        text(root, f"dtd/labels/{part}1.txt", *lines)
        picture(root, *(f"dtd/images/{line}" for line in lines))
    truth = {part: [(line.split("/")[1], line.split("/")[0]) for line in lines] for part, lines in rows.items()}
    return truth | {"train+val": truth["train"] + truth["val"]}


def pets(root):
    picture(root, *(f"images/{name}.jpg" for name in ("Abyssinian_1", "great_pyrenees_2", "Abyssinian_3", "pug_4")))
    text(root, "annotations/trainval.txt", "Abyssinian_1 1 1 1", "great_pyrenees_2 2 2 1")
    text(root, "annotations/test.txt", "Abyssinian_3 1 1 1", "great_pyrenees_2 2 2 1")
    pair = ("great_pyrenees_2.jpg", "great_pyrenees")
    return {"trainval": [("Abyssinian_1.jpg", "Abyssinian"), pair], "test": [("Abyssinian_3.jpg", "Abyssinian"), pair]}


def caltech101(root):
    base = "caltech-101/101_ObjectCategories"
    counts = {"ant": 33, "BACKGROUND_Google": 2, "watch": 31}
    for name, count in counts.items():
        picture(root, *(f"{base}/{name}/image_{i + 1:04d}.jpg" for i in range(count)))
    return {}


def flowers(root):
    mat(root, "flowers-102/imagelabels.mat", labels=np.array([[2, 1, 2, 102, 7, 7]]))
    split = {"trnid": np.array([[2, 4]]), "valid": np.array([[1, 5]]), "tstid": np.array([[3, 6]])}
    mat(root, "flowers-102/setid.mat", **split)
    picture(root, *(f"flowers-102/jpg/image_{i:05d}.jpg" for i in range(1, 7)))
    orchid, moon = "hard-leaved pocket orchid", "moon orchid"
    truth = {
        "train": [("image_00002.jpg", "pink primrose"), ("image_00004.jpg", "blackberry lily")],
        "val": [("image_00001.jpg", orchid), ("image_00005.jpg", moon)],
        "test": [("image_00003.jpg", orchid), ("image_00006.jpg", moon)],
    }
    return truth | {"train+val": truth["train"] + truth["val"]}


def cub200(root):
    base = "CUB_200_2011"
    names = ["001.Albatross/A_1.jpg", "001.Albatross/A_2.jpg", "002.Gull/G_1.jpg", "002.Gull/G_2.jpg"]
    text(root, f"{base}/images.txt", *(f"{i} {name}" for i, name in enumerate(names, 1)))
    text(root, f"{base}/image_class_labels.txt", "1 1", "2 1", "3 2", "4 2")
    text(root, f"{base}/train_test_split.txt", "1 0", "2 1", "3 1", "4 0")
    text(root, f"{base}/classes.txt", "1 001.Albatross", "2 002.Gull")
    picture(root, *(f"{base}/images/{name}" for name in names))
    return {
        "train": [("A_2.jpg", "001.Albatross"), ("G_1.jpg", "002.Gull")],
        "test": [("A_1.jpg", "001.Albatross"), ("G_2.jpg", "002.Gull")],
    }


def inaturalist(root, train, val, folders):
    """Images, labels and species are each in another order, and numbers have gaps."""
    species = [{"id": 8, "name": "Rana"}, {"id": 3, "name": "Abies"}]
    rows = {train: [(71, "c.jpg", 3), (12, "a.jpg", 8), (40, "b.jpg", 3)], val: [(5, "d.jpg", 8)]}
    for (name, held), folder in zip(rows.items(), folders, strict=True):
        images = [{"id": number, "file_name": f"{folder}/{file}"} for number, file, _ in held]
        answers = [{"id": 0, "image_id": number, "category_id": kind} for number, _, kind in sorted(held)]
        text(root, name, json.dumps({"images": images, "annotations": answers, "categories": species}))
        picture(root, *(f"{folder}/{file}" for _, file, _ in held))
    return {
        "train": [("c.jpg", "Abies"), ("a.jpg", "Rana"), ("b.jpg", "Abies")],
        "val": [("d.jpg", "Rana")],
    }


def inat2018(root):
    return inaturalist(root, "train2018.json", "val2018.json", ["train_val2018/Plantae/3", "train_val2018/Aves/8"])


def inat2021(root):
    return inaturalist(root, "train.json", "val.json", ["train/00003_Plantae", "val/00008_Animalia"])


def places205(root):
    images = "data/vision/torralba/deeplearning/images256"
    picture(root, *(f"{images}/{name}" for name in ("a/abbey/gsun_1.jpg", "b/bar/gsun_2.jpg", "a/abbey/gsun_3.jpg")))
    text(root, "trainvalsplit_places205/train_places205.csv", "b/bar/gsun_2.jpg 1", "a/abbey/gsun_1.jpg 0")
    text(root, "trainvalsplit_places205/val_places205.csv", "a/abbey/gsun_3.jpg 0")
    return {"train": [("gsun_2.jpg", "b/bar"), ("gsun_1.jpg", "a/abbey")], "val": [("gsun_3.jpg", "a/abbey")]}


MAKE = {
    "imagenet": imagenet,
    "imagenet-a": imagenet_a,
    "imagenet-r": imagenet_r,
    "imagenet-sketch": imagenet_sketch,
    "imagenet-v2": imagenet_v2,
    "imagenet-real": imagenet_real,
    **{name: globals()[name] for name in SETS if not name.startswith("imagenet")},
}


@pytest.fixture(autouse=True)
def any_checksum(monkeypatch):
    """torchvision compares checksums of the real files of CIFAR and Flowers."""
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, _: os.path.exists(path))


def check(found, truth):
    """Names, classes, labels and pixels against what was written."""
    assert len(found) == len(found.labels) == len(truth)
    assert found.labels.dtype == np.int64
    for i, (name, answer) in enumerate(truth):
        label = found.labels[i]
        assert name in found.name(i)
        if isinstance(answer, np.ndarray):
            assert label.tolist() == answer.tolist()
        else:
            assert answer == (found.classes[label] if found.classes else label)
        pixels = found.read(i)
        assert (pixels.dtype, pixels.shape[0]) == (torch.uint8, 3)
        if name != "image":
            assert pixels.shape[1:] == (6, 8)
            near = torch.tensor(colour(name)) - pixels.float().mean((1, 2))
            assert near.abs().max() < 3, f"{name} shows the picture of another file"


@pytest.mark.parametrize("name", LABELLED)
def test_reads_its_true_layout(name, tmp_path):
    truth = MAKE[name](tmp_path)
    fingerprints = set()
    for part, rows in truth.items():
        found = read_set(name, tmp_path, part)
        check(found, rows)
        fingerprints.add(found.fingerprint)
        assert found.fingerprint == read_set(name, tmp_path, part).fingerprint
    assert len(fingerprints) == len(truth)
    if truth:
        assert {SETS[name].train or SETS[name].test, SETS[name].test} <= truth.keys()


@pytest.mark.parametrize("name", [name for name in LABELLED if SETS[name].train])
def test_train_and_test_number_classes_alike(name, tmp_path):
    MAKE[name](tmp_path)
    if name in ("cifar100", "sun397"):  # a class of each in this miniature
        train, test = (read_set(name, tmp_path, part) for part in (SETS[name].train, SETS[name].test))
        assert train.classes == test.classes
        return
    train, test = train_and_test(f"{name}:{tmp_path}", None, 0.2, 0)
    assert list(train.classes) == list(test.classes)
    assert train.fingerprint != test.fingerprint
    names = {train.name(i) for i in range(len(train))}
    if name not in ("cifar10", "pets"):
        assert names.isdisjoint(test.name(i) for i in range(len(test)))


@pytest.mark.parametrize("name", SETS)
def test_an_empty_folder_says_what_is_missing_and_where_from(name, tmp_path):
    published = SETS[name]
    for part in {published.train or published.test, published.test}:
        wanted = "gaussian_noise/3" if name == "imagenet-c" else part
        with pytest.raises(OpsinError) as caught:
            read_set(name, tmp_path, wanted)
        told = str(caught.value)
        assert told.startswith(f"{tmp_path} has no ")
        assert published.source in told or "https://image-net.org" in told
        assert told.endswith(".")
        assert "\n" not in told
    with pytest.raises(OpsinError, match=r"there is nothing at .*nowhere: give the folder that holds"):
        read_set(name, tmp_path / "nowhere", wanted)
    assert not list(tmp_path.iterdir()), "reading leaves nothing behind"


@pytest.mark.parametrize("name", SETS)
def test_unknown_parts(name, tmp_path):
    with pytest.raises(OpsinError, match=f"{name} has no part 'most': give one of|imagenet-c is tested one corruption"):
        read_set(name, tmp_path, "most")


def told_of(name, root, part):
    """The sentence about a set that cannot be read, or nothing; anything but an OpsinError is raised."""
    try:
        read_set(name, root, part)
    except OpsinError as error:
        return str(error)
    return ""


def every_file(root):
    return [path for path in sorted(root.rglob("*")) if path.is_file() and path.name != "README.txt"]


@pytest.mark.parametrize("name", LABELLED)
def test_any_missing_file_is_one_sentence(name, tmp_path):
    """Every single file is taken away in turn: what remains is read, or one sentence names the file."""
    MAKE[name](tmp_path / "set")
    told = []
    for path in every_file(tmp_path / "set"):
        if name == "caltech101" and "image_0002" not in path.name:
            continue
        hidden = tmp_path / "hidden"
        path.rename(hidden)
        parts = {SETS[name].train or SETS[name].test, SETS[name].test}
        told += [(path, told_of(name, tmp_path / "set", part)) for part in parts]
        hidden.rename(path)
    told = [(path, sentence) for path, sentence in told if sentence]
    for path, sentence in told:
        assert path.name in sentence or path.parent.name in sentence or "their number" in sentence
        assert "\n" not in sentence
    by_folder = ("imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2")
    assert bool(told) != (name in by_folder)


LISTS = ["imagenet", "imagenet-real", "food101", "sun397", "cars", "aircraft", "voc2007", "dtd", "pets", "flowers"]


@pytest.mark.parametrize("name", [*LISTS, "cub200", "inat2018", "places205"])
def test_lists_that_are_no_lists(name, tmp_path):
    """Every list in turn holds something else: one sentence, never a traceback."""
    MAKE[name](tmp_path / "set")
    lists = [path for path in every_file(tmp_path / "set") if path.suffix in (".txt", ".csv", ".json", ".mat")]
    told = []
    for path in lists[:12]:
        unused = name in ("voc2007", "aircraft") and path.stem.endswith(("_train", "_val"))
        whole = path.read_bytes()
        for broken in (b"", b"\xff\xfe\0nonsense\n", b"[1, {}]\n"):
            path.write_bytes(broken)
            parts = {SETS[name].train or SETS[name].test, SETS[name].test}
            found = [told_of(name, tmp_path / "set", part) for part in parts]
            assert unused or any(found), (path, broken)
            told += found
        path.write_bytes(whole)
    assert any(told)
    assert all("\n" not in sentence and len(sentence) < 700 for sentence in told)


# ImageNet


def test_imagenet_train_as_a_tar_of_tars(tmp_path):
    for wnid in (EEL, DOG, CAT):
        picture(tmp_path / "x", *(name for name, own in TRAIN if own == wnid))
        (tmp_path / "tars").mkdir(exist_ok=True)
        tar_of(tmp_path / "x", tmp_path / "tars" / f"{wnid}.tar")
    (tmp_path / "set").mkdir()
    shutil.copytree(tmp_path / "tars", tmp_path / "unpacked" / "train")
    tar_of(tmp_path / "tars", tmp_path / "set" / "ILSVRC2012_img_train.tar")
    for folder in ("set", "unpacked"):
        found = read_set("imagenet", tmp_path / folder, "train")
        assert found.classes == [EEL, DOG, CAT]
        check(found, TRAIN)
    packed = tmp_path / "set" / "ILSVRC2012_img_train.tar"
    packed.write_bytes(packed.read_bytes()[:-30000])
    with pytest.raises(OpsinError, match=r"ILSVRC2012_img_train\.tar is damaged \(it is cut short.*copy it again"):
        read_set("imagenet", tmp_path / "set", "train")


@pytest.mark.parametrize("kind", ["folders", "tar", "packed kit", "kaggle"])
def test_imagenet_validation_layouts(kind, tmp_path):
    imagenet(tmp_path)
    val, kit = tmp_path / "val", "ILSVRC2012_devkit_t12"
    truth = VAL
    if kind == "folders":
        shutil.rmtree(tmp_path / kit)
        for name, wnid in VAL:
            (val / wnid).mkdir(exist_ok=True)
            (val / name).rename(val / wnid / name)
        truth = sorted(VAL, key=lambda row: (row[1], row[0]))
    elif kind == "tar":
        tar_of(val, tmp_path / "ILSVRC2012_img_val.tar")
    elif kind == "packed kit":
        (tmp_path / "x").mkdir()
        (tmp_path / kit).rename(tmp_path / "x" / kit)
        tar_of(tmp_path / "x", tmp_path / f"{kit}.tar.gz")
    else:
        (tmp_path / "ILSVRC/Data/CLS-LOC").mkdir(parents=True)
        val.rename(tmp_path / "ILSVRC/Data/CLS-LOC/val")
    found = read_set("imagenet", tmp_path, "val")
    assert found.classes == [EEL, DOG, CAT]
    check(found, truth)
    if kind in ("folders", "tar"):
        text(tmp_path, "real.json", "[[1], [2], [3], []]")
        real = read_set("imagenet-real", tmp_path, "test")
        assert [np.flatnonzero(row).tolist() for row in real.labels] == [[1], [2], [3], []]
        assert [os.path.basename(real.name(i)) for i in range(4)] == [name for name, _ in VAL]


@pytest.mark.parametrize("name", ["imagenet", "imagenet-real"])
def test_validation_labels_that_do_not_line_up(name, tmp_path):
    imagenet(tmp_path)
    text(tmp_path, "real.json", "[[1], [2], [3], []]")
    part = SETS[name].test
    (tmp_path / "val" / val_name(2)).unlink()
    with pytest.raises(OpsinError, match=r"4 labels and .* 3 images.*missing, such as ILSVRC2012_val_00000002.JPEG\."):
        read_set(name, tmp_path, part)
    picture(tmp_path / "val", *map(val_name, (2, 5, 6, 7, 8)))
    with pytest.raises(OpsinError, match=r"8 images, .*no label, such as .*00005.JPEG, .*07.JPEG and 1 more"):
        read_set(name, tmp_path, part)


def test_validation_labels_that_are_wrong(tmp_path):
    imagenet(tmp_path)
    truth = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    for lines, told in (((3, 1, 4, 2), "has the classes 4, which meta.mat has not"), ((3, 1, "x", 2), "holds 'x'")):
        text(tmp_path, truth, *lines)
        with pytest.raises(OpsinError, match=told):
            read_set("imagenet", tmp_path, "val")
    imagenet_real(tmp_path)
    text(tmp_path, "real.json", "[[1], [1000], [3], []]")
    with pytest.raises(OpsinError, match=r"not the official ones.*image 2 has the classes \[1000\]"):
        read_set("imagenet-real", tmp_path, "test")


def test_without_scipy(tmp_path, monkeypatch):
    for name in ("imagenet", "cars", "flowers"):
        MAKE[name](tmp_path)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "scipy.io", None)
            with pytest.raises(OpsinError, match=r"needs scipy, which is missing: pip install 'opsin\[eval\]'\."):
                read_set(name, tmp_path, SETS[name].test)


def test_v2_takes_numbers_only(tmp_path):
    imagenet_v2(tmp_path)
    picture(tmp_path, "imagenetv2-matched-frequency-format-val/1000/e.jpeg")
    with pytest.raises(OpsinError, match="should be numbers from 0 to 999, and some are not, such as 1000"):
        read_set("imagenet-v2", tmp_path, "test")


def test_v2_labels_are_positions_in_the_classes_of_imagenet(tmp_path):
    imagenet(tmp_path / "a")
    picture(tmp_path, *(f"imagenetv2-matched-frequency-format-val/{i}/{i}.jpeg" for i in (0, 2)))
    train, test = train_and_test(f"imagenet:{tmp_path / 'a'}", f"imagenet-v2:{tmp_path}", 0.2, 0)
    assert [test.classes[label] for label in test.labels] == [EEL, CAT]
    assert list(train.classes) == [EEL, DOG, CAT]


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r", "imagenet-sketch"])
def test_archives_and_the_folder_itself(name, tmp_path):
    truth = MAKE[name](tmp_path / "x")["test"]
    inner = next(path for path in (tmp_path / "x").iterdir())
    check(read_set(name, inner, "test"), truth)
    if name == "imagenet-sketch":
        zip_of(tmp_path / "x", archive := tmp_path / "ImageNet-Sketch.zip")
    else:
        tar_of(tmp_path / "x", archive := tmp_path / f"{name}.tar")
    for given in (tmp_path, archive):
        check(read_set(name, given, "test"), truth)


def test_test_only_sets_do_not_train(tmp_path):
    with pytest.raises(OpsinError, match="imagenet-a has images to test on only"):
        train_and_test(f"imagenet-a:{tmp_path}", None, 0.2, 0)


@pytest.mark.parametrize("kind", ["folders", "groups", "tar"])
def test_imagenet_c(kind, tmp_path):
    names = [
        f"{part}/{wnid}/{val_name(i)}"
        for part in ("gaussian_noise/3", "gaussian_noise/4", "shot_noise/3")
        for i, wnid in ((1, DOG), (2, CAT))
    ]
    root = tmp_path / "noise" if kind == "groups" else tmp_path / "x" if kind == "tar" else tmp_path
    picture(root, *names)
    if kind == "tar":
        tar_of(root, tmp_path / "noise.tar")
    found = read_set("imagenet-c", tmp_path, "gaussian_noise/3")
    check(found, [(val_name(1), DOG), (val_name(2), CAT)])
    assert found.classes == [DOG, CAT]
    other = read_set("imagenet-c", tmp_path, "gaussian_noise/4")
    assert other.fingerprint != found.fingerprint, "the miniature's pictures are the same in both"
    with pytest.raises(OpsinError, match=r"gaussian_noise/5"):
        read_set("imagenet-c", tmp_path, "gaussian_noise/5")
    for wrong in ("gaussian_noise", "gaussian_noise/6", "rain/1", "CORRUPTION/SEVERITY"):
        with pytest.raises(OpsinError, match=f"'{wrong}' is none: give one such as gaussian_noise/3"):
            read_set("imagenet-c", tmp_path, wrong)
    with pytest.raises(OpsinError, match=r"has no snow/2 or weather\.tar: it comes from noise\.tar, blur\.tar"):
        read_set("imagenet-c", tmp_path, "snow/2")


def test_allowed_classes(tmp_path):
    imagenet_a(tmp_path)
    test = read_set("imagenet-a", tmp_path, "test")
    assert allowed(test, [EEL, DOG, CAT]).tolist() == [True, False, True]
    assert allowed(test, [EEL, CAT]) is None
    assert in_classes_of(test, type("Train", (), {"classes": [EEL, DOG, CAT], "where": ""})).tolist() == [0, 2]
    imagenet_v2(tmp_path)
    assert allowed(read_set("imagenet-v2", tmp_path, "test"), [EEL, DOG]) is None
    with pytest.raises(OpsinError, match=r"no class of .*imagenet-a is among those of the train set"):
        allowed(test, ["cat", "dog"])


def test_metric_of(tmp_path):
    counted = {name: SETS[name].metric for name in SETS if SETS[name].metric != "accuracy"}
    assert counted == {
        "aircraft": "per_class",
        "pets": "per_class",
        "caltech101": "per_class",
        "flowers": "per_class",
        "voc2007": "voc_map",
    }
    assert metric_of(f"voc2007:{tmp_path}") == "voc_map"
    assert metric_of(str(tmp_path)) == metric_of("dtd:/x") == "accuracy"
    with pytest.raises(OpsinError, match="unknown published set 'flower': did you mean 'flowers'"):
        metric_of("flower:/x")
    with pytest.raises(OpsinError, match="unknown published set 'food': did you mean 'food101'"):
        read_set("food", tmp_path, "train")


# The sets of SimCLR


def test_caltech_draws_thirty_of_each_class(tmp_path):
    caltech101(tmp_path)
    train, test = (read_set("caltech101", tmp_path, part) for part in ("train", "test"))
    assert train.classes == test.classes == ["ant", "watch"]
    assert np.bincount(train.labels).tolist() == [30, 30]
    assert np.bincount(test.labels).tolist() == [3, 1]
    names = [found.name(i) for found in (train, test) for i in range(len(found))]
    assert len(set(names)) == 64
    check(
        train,
        [(os.path.basename(name), train.classes[label]) for name, label in zip(names, train.labels, strict=False)],
    )
    assert [f"/{train.classes[label]}/" in name for name, label in zip(names, train.labels, strict=False)] == [
        True
    ] * 60
    assert names[:30] != [f"101_ObjectCategories/ant/image_{i:04d}.jpg" for i in range(1, 31)], "drawn, not the first"
    shutil.rmtree(tmp_path / "caltech-101/101_ObjectCategories/ant")
    shutil.rmtree(tmp_path / "caltech-101/101_ObjectCategories/watch")
    with pytest.raises(OpsinError, match=r"their number per folder of .* lists no image"):
        read_set("caltech101", tmp_path, "test")
    picture(tmp_path, *(f"caltech-101/101_ObjectCategories/watch/image_{i:04d}.jpg" for i in range(1, 31)))
    with pytest.raises(OpsinError, match=r"class watch of .* has 30 images, and 30 are to train"):
        read_set("caltech101", tmp_path, "test")


@pytest.mark.parametrize("part", ["trainval", "test"])
def test_voc_in_its_tars(part, tmp_path):
    truth = voc2007(tmp_path / "x")[part]
    tar_of(tmp_path / "x", tmp_path / f"VOC{part}_06-Nov-2007.tar")
    check(read_set("voc2007", tmp_path, part), truth)


def test_voc_lists_of_different_images(tmp_path):
    voc2007(tmp_path)
    text(tmp_path, "VOCdevkit/VOC2007/ImageSets/Main/sofa_test.txt", "000001 -1", "000009 1")
    with pytest.raises(
        OpsinError, match=r"sofa_test.txt does not list the images of aeroplane_test.txt.*000002, 000009"
    ):
        read_set("voc2007", tmp_path, "test")
    text(tmp_path, "VOCdevkit/VOC2007/ImageSets/Main/sofa_test.txt", "000001 -1", "000002 7")
    with pytest.raises(OpsinError, match="lines without a label -1, 0 or 1, 000002 7"):
        read_set("voc2007", tmp_path, "test")


@pytest.mark.parametrize("inside", ["", "dtd", "dtd/dtd"])
def test_the_folder_may_be_called_as_one_likes(inside, tmp_path):
    truth = dtd(tmp_path / "x")["test"]
    target = tmp_path / "My textures" / inside
    target.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "x/dtd").rename(target)
    check(read_set("dtd", tmp_path / "My textures", "test"), truth)


def test_relative_paths(tmp_path, monkeypatch):
    truth = food101(tmp_path)
    monkeypatch.chdir(tmp_path)
    check(read_set("food101", Path("."), "test"), truth["test"])
    check(read_set("food101", Path("food-101"), "test"), truth["test"])


@pytest.mark.parametrize("name", ["cifar10", "flowers"])
def test_checksums_of_torchvision(name, tmp_path, monkeypatch):
    MAKE[name](tmp_path)
    monkeypatch.undo()
    with pytest.raises(OpsinError, match=r"not the official ones .*a file has another checksum.*take them from"):
        read_set(name, tmp_path, "test")


def test_cifar_keeps_rows_and_colours(tmp_path):
    cifar10(tmp_path)
    train = read_set("cifar10", tmp_path, "train")
    assert train.read(3)[:, 0, 1].tolist() == [3, 53, 103]
    assert train.read(3).sum() == 159
    assert train.open(0).shape == (3, 32, 32)


def test_lists_that_name_other_images(tmp_path):
    food101(tmp_path)
    for name in ("11", "5"):
        (tmp_path / f"food-101/images/pie/{name}.jpg").unlink()
    with pytest.raises(
        OpsinError, match=r"2 of the 3 images that meta/train.json lists are not in .*images/pie/11.jpg"
    ):
        read_set("food101", tmp_path, "train")


def test_cub_lists_of_different_images(tmp_path):
    cub200(tmp_path)
    text(tmp_path, "CUB_200_2011/train_test_split.txt", "1 0", "2 1", "3 1", "5 0")
    with pytest.raises(OpsinError, match=r"images.txt and train_test_split.txt .* same images, such as number 4, 5"):
        read_set("cub200", tmp_path, "test")
    text(tmp_path, "CUB_200_2011/train_test_split.txt", "1 0", "2 1", "3 1", "4 0")
    text(tmp_path, "CUB_200_2011/classes.txt", "1 001.Albatross")
    with pytest.raises(OpsinError, match=r"classes that classes.txt has not, such as number 2"):
        read_set("cub200", tmp_path, "test")


def test_sun_classes_without_a_name(tmp_path):
    sun397(tmp_path)
    text(tmp_path, "Partitions/Testing_01.txt", "/a/airport/sun_2.jpg")
    with pytest.raises(OpsinError, match=r"lists classes that ClassName.txt has not, /a/airport/sun_2.jpg"):
        read_set("sun397", tmp_path, "test")


def test_sun_partitions_in_their_zip(tmp_path):
    truth = sun397(tmp_path)
    zip_of(tmp_path / "Partitions", tmp_path / "Partitions.zip")
    check(read_set("sun397", tmp_path, "train"), truth["train"])


# Species and scenes


def test_lists_in_their_archives(tmp_path):
    truth = {"inat2018": inat2018(tmp_path), "places205": places205(tmp_path)}
    (tmp_path / "x").mkdir()
    (tmp_path / "train2018.json").rename(tmp_path / "x/train2018.json")
    tar_of(tmp_path / "x", tmp_path / "train2018.json.tar.gz")
    (tmp_path / "x").mkdir()
    (tmp_path / "trainvalsplit_places205").rename(tmp_path / "x/trainvalsplit_places205")
    tar_of(tmp_path / "x", tmp_path / "trainvalsplit_places205.tar.gz")
    for name, parts in truth.items():
        check(read_set(name, tmp_path, "train"), parts["train"])
    packed = tmp_path / "train2018.json.tar.gz"
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(OpsinError, match=r"train2018.json.tar.gz is damaged \(.*\): copy it again\."):
        read_set("inat2018", tmp_path, "train")


def test_species_lists_that_do_not_line_up(tmp_path):
    inat2018(tmp_path)
    path = tmp_path / "val2018.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"annotations": []}))
    with pytest.raises(
        OpsinError, match=r"1 of the 1 images of val2018.json have no label, such as train_val2018/Aves"
    ):
        read_set("inat2018", tmp_path, "val")
    path.write_text(json.dumps(held | {"categories": [{"id": 3, "name": "Abies"}]}))
    with pytest.raises(OpsinError, match=r"have a class that it does not list, such as train_val2018/Aves/8/d.jpg"):
        read_set("inat2018", tmp_path, "val")
    path.write_text(json.dumps(held | {"categories": [{"id": 8, "name": "Rana"}, {"id": 9, "name": "Rana"}]}))
    assert read_set("inat2018", tmp_path, "val").classes == ["8", "9"]


def test_scene_labels_that_contradict(tmp_path):
    places205(tmp_path)
    train = "trainvalsplit_places205/train_places205.csv"
    text(tmp_path, train, "b/bar/gsun_2.jpg 0", "a/abbey/gsun_1.jpg 0")
    with pytest.raises(OpsinError, match="gives the label 0 to b/bar and to a/abbey"):
        read_set("places205", tmp_path, "val")
    text(tmp_path, train, "b/bar/gsun_2.jpg 1")
    with pytest.raises(
        OpsinError, match=r"labels that train_places205.csv has not, such as those of a/abbey/gsun_3.jpg"
    ):
        read_set("places205", tmp_path, "val")
    text(tmp_path, train, "b/bar/gsun_2.jpg")
    with pytest.raises(OpsinError, match=r"line 1, 'b/bar/gsun_2.jpg', has 1 of 2 fields"):
        read_set("places205", tmp_path, "val")


def test_species_are_numbered_in_the_order_of_their_identifiers(tmp_path):
    from opsin.evaluate.datasets.nature import inat2021

    for name in ("0", "1"):
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    tree = {
        "images": [{"id": 5, "file_name": "0.jpg"}, {"id": 6, "file_name": "1.jpg"}],
        "categories": [{"id": 9, "name": "z"}, {"id": 2, "name": "a"}],
        "annotations": [{"image_id": 5, "category_id": 9}, {"image_id": 6, "category_id": 2}],
    }
    (tmp_path / "val.json").write_text(json.dumps(tree))
    found = inat2021(tmp_path, "val")
    assert (list(found.classes), found.labels.tolist()) == (["a", "z"], [1, 0])


def test_classes_of_places_are_in_the_order_of_their_labels(tmp_path):
    (tmp_path / "images256").mkdir()
    for name in ("z/0.jpg", "a/1.jpg"):
        (tmp_path / "images256" / name).parent.mkdir()
        (tmp_path / "images256" / name).write_bytes(b"x")
    (tmp_path / "train_places205.csv").write_text("z/0.jpg 4\na/1.jpg 2\n")
    found = read_set("places205", tmp_path, "train")
    assert (list(found.classes), found.labels.tolist()) == (["a", "z"], [1, 0])
