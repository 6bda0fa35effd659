"""The twelve sets of the SimCLR paper (Chen et al. 2020), with CUB-200 in place of Birdsnap as in the DINOv2 paper.

Where torchvision has a reader it is used, for the lists only: images are decoded as everywhere else. It wants folders
of fixed names, so it is shown a link to where the files lie. SUN397 (official splits), Pets and VOC (labels without
decoding all images) and CUB are read from their lists here.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from opsin.data.decode import shown
from opsin.errors import OpsinError
from opsin.evaluate.datasets import layout
from opsin.evaluate.datasets.archives import files
from opsin.evaluate.sets import ImageSet

FOOD: Final = "food-101.tar.gz, to be unpacked (https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/)"
"""Where Food-101 comes from."""
CIFAR10: Final = "cifar-10-python.tar.gz, to be unpacked (https://www.cs.toronto.edu/~kriz/cifar.html)"
"""Where CIFAR-10 comes from."""
CIFAR100: Final = "cifar-100-python.tar.gz, to be unpacked (https://www.cs.toronto.edu/~kriz/cifar.html)"
"""Where CIFAR-100 comes from."""
SUN: Final = "SUN397.tar.gz, to be unpacked, and Partitions.zip (https://vision.princeton.edu/projects/2010/SUN/)"
"""Where SUN397 comes from."""
CARS: Final = (
    "cars_train.tgz, cars_test.tgz and car_devkit.tgz, to be unpacked, and cars_test_annos_withlabels.mat "
    "(https://ai.stanford.edu/~jkrause/cars/car_dataset.html)"
)
"""Where Stanford Cars came from."""
AIRCRAFT: Final = "fgvc-aircraft-2013b.tar.gz, to be unpacked (https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/)"
"""Where FGVC-Aircraft comes from."""
VOC: Final = "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar (http://host.robots.ox.ac.uk/pascal/VOC/voc2007/)"
"""Where VOC 2007 comes from."""
DTD: Final = "dtd-r1.0.1.tar.gz, to be unpacked (https://www.robots.ox.ac.uk/~vgg/data/dtd/)"
"""Where DTD comes from."""
PETS: Final = "images.tar.gz and annotations.tar.gz, to be unpacked (https://www.robots.ox.ac.uk/~vgg/data/pets/)"
"""Where Oxford-IIIT Pets comes from."""
CALTECH: Final = (
    "caltech-101.zip, and 101_ObjectCategories.tar.gz in it, to be unpacked "
    "(https://data.caltech.edu/records/mzrjq-6wc02)"
)
"""Where Caltech-101 comes from."""
FLOWERS: Final = (
    "102flowers.tgz, to be unpacked, imagelabels.mat and setid.mat (https://www.robots.ox.ac.uk/~vgg/data/flowers/102/)"
)
"""Where Flowers-102 comes from."""
CUB: Final = "CUB_200_2011.tgz, to be unpacked (https://www.vision.caltech.edu/datasets/cub_200_2011/)"
"""Where CUB-200-2011 comes from."""

CALTECH_TRAIN: Final = 30
"""Images of each class of Caltech-101 that train."""
VOC_CLASSES: Final = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""The twenty classes of VOC 2007."""


def food101(path: Path, part: str) -> ImageSet:
    """Food-101, `train` or `test`; raises an OpsinError that names what is missing."""
    from torchvision.datasets import Food101

    _check("food101", part, ("train", "test"))
    base = _base(path, ["food-101", "."], ["meta/train.json", "meta/test.json", "images"], FOOD)
    return _listed(base, "food-101", [lambda root: Food101(root, part, loader=str)], f"meta/{part}.json", FOOD)


def cifar10(path: Path, part: str) -> ImageSet:
    """CIFAR-10, `train` or `test`, from memory; raises an OpsinError that names what is missing."""
    from torchvision.datasets import CIFAR10 as CIFAR

    return _cifar("cifar10", path, part, CIFAR, CIFAR10)


def cifar100(path: Path, part: str) -> ImageSet:
    """CIFAR-100 with its fine labels, `train` or `test`, from memory; raises an OpsinError as `cifar10`."""
    from torchvision.datasets import CIFAR100 as CIFAR

    return _cifar("cifar100", path, part, CIFAR, CIFAR100)


def sun397(path: Path, part: str) -> ImageSet:
    """SUN397, `train` or `test` of the first of its ten official splits; raises an OpsinError if a file is missing.

    torchvision has no splits of this set, so its lists are read here.
    """
    _check("sun397", part, ("train", "test"))
    name = "Training_01.txt" if part == "train" else "Testing_01.txt"
    folders, packs = ["Partitions", ".", "SUN397"], ["Partitions.zip"]
    titles = layout.content(path, "ClassName.txt", ["SUN397", *folders], packs, SUN)
    lines = layout.content(path, name, folders, packs, SUN)
    place = _base(path, ["SUN397", "."], ["a"], SUN)
    number = {row[0]: i for i, row in enumerate(layout.rows(titles, "ClassName.txt", 1, SUN))}
    images = [row[0] for row in layout.rows(lines, name, 1, SUN)]
    strange = [image for image in images if os.path.dirname(image) not in number]
    if strange:
        raise OpsinError(f"{name} lists classes that ClassName.txt has not, {layout.examples(strange)}: see {SUN}.")
    labels = np.array([number[os.path.dirname(image)] for image in images], dtype=np.int64)
    classes = [title[3:] for title in number]  # without the letter that sorts them: "/a/abbey"
    return layout.listed(place, [image.lstrip("/") for image in images], labels, classes, name, SUN)


def cars(path: Path, part: str) -> ImageSet:
    """Stanford Cars, `train` or `test`; raises an OpsinError that names what is missing."""
    from torchvision.datasets import StanfordCars

    _check("cars", part, ("train", "test"))
    lists = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    base = _base(path, [".", "stanford_cars"], ["devkit/cars_meta.mat", lists[part], f"cars_{part}"], CARS)
    layout.needs_scipy(lists[part])
    return _listed(base, "stanford_cars", [lambda root: StanfordCars(root, part, loader=str)], lists[part], CARS)


def aircraft(path: Path, part: str) -> ImageSet:
    """FGVC-Aircraft by variant, `train`, `val`, `trainval` or `test`; raises an OpsinError if a file is missing."""
    from torchvision.datasets import FGVCAircraft

    _check("aircraft", part, ("train", "val", "trainval", "test"))
    names = f"data/images_variant_{part}.txt"
    base = _base(path, ["fgvc-aircraft-2013b", "."], [names, "data/variants.txt", "data/images"], AIRCRAFT)

    def build(root: str) -> Any:
        return FGVCAircraft(root, part, annotation_level="variant", loader=str)

    return _listed(base, "fgvc-aircraft-2013b", [build], names, AIRCRAFT)


def voc2007(path: Path, part: str) -> ImageSet:
    """VOC 2007 for classification, `train`, `val`, `trainval` or `test`: labels `[N, 20]`.

    From the official lists per class, `aeroplane_test.txt`: 1 is a class of the image, -1 one that is not, and 0, all
    objects of the class are difficult, becomes -1: it does not count. The tars need not be unpacked.

    Raises:
        OpsinError: a file is missing, or the lists are of different images.
    """
    _check("voc2007", part, ("train", "val", "trainval", "test"))
    pack = "VOCtest_06-Nov-2007.tar" if part == "test" else "VOCtrainval_06-Nov-2007.tar"
    first = f"{VOC_CLASSES[0]}_{part}.txt"
    places, needed = ["VOCdevkit/VOC2007", "VOC2007", ".", pack], f"VOCdevkit/VOC2007/ImageSets/Main/{first}"
    held = files(layout.find(path, places, f"ImageSets/Main/{first}", needed, VOC))
    number = {name: i for i, name in enumerate(held.names)}
    root = next((name for name in held.names if f"/{name}".endswith(f"/ImageSets/Main/{first}")), None)
    if root is None:
        raise layout.missing(held.where, needed, VOC)
    root = root.removesuffix(f"ImageSets/Main/{first}")
    columns, images = [], list[str]()
    for title in VOC_CLASSES:
        name = f"ImageSets/Main/{title}_{part}.txt"
        if root + name not in number:
            raise layout.missing(held.where, name, VOC)
        stored = held.open(number[root + name])
        rows = layout.rows(stored.read_bytes() if isinstance(stored, Path) else stored, name, 2, VOC)
        strange = [" ".join(row) for row in rows if row[1] not in ("-1", "0", "1")]
        if strange:
            raise OpsinError(f"{name} has lines without a label -1, 0 or 1, {layout.examples(strange)}: see {VOC}.")
        listed = [row[0] for row in rows]
        if images and listed != images:
            odd = sorted(set(listed) ^ set(images)) or [a for a, b in zip(listed, images, strict=True) if a != b]
            raise OpsinError(
                f"{name} does not list the images of {first}, examples are {layout.examples(odd)}: take all lists from "
                f"{VOC}."
            )
        images = listed
        columns.append([{"1": 1, "-1": 0, "0": -1}[row[1]] for row in rows])
    labels = np.array(columns, dtype=np.int64).T.copy()
    absent = [image for image in images if f"{root}JPEGImages/{image}.jpg" not in number]
    if absent:
        raise OpsinError(
            f"{len(absent):,} of the {len(images):,} images that {first} lists are not in {shown(held.where)}, such as "
            f"{layout.examples([f'JPEGImages/{image}.jpg' for image in absent])}: they come from {VOC}."
        )
    chosen = [number[f"{root}JPEGImages/{image}.jpg"] for image in images]
    return layout.of_members(held, chosen, labels, VOC_CLASSES)


def dtd(path: Path, part: str) -> ImageSet:
    """DTD, the first of its ten partitions: `train`, `val`, `test`, or `train+val`; an OpsinError as the others."""
    from torchvision.datasets import DTD as Textures

    _check("dtd", part, ("train", "val", "test", "train+val"))
    splits = part.split("+")
    lists = [f"labels/{split}1.txt" for split in splits]
    base = _base(path, ["dtd", "dtd/dtd", "."], [*lists, "images"], DTD)

    def build(split: str) -> Callable[[str], Any]:
        return lambda root: Textures(root, split, partition=1, loader=str)

    return _listed(base, "dtd/dtd", [build(split) for split in splits], " and ".join(lists), DTD)


def pets(path: Path, part: str) -> ImageSet:
    """Oxford-IIIT Pets, 37 breeds, `trainval` or `test`; raises an OpsinError that names what is missing.

    Its lists are read here: torchvision gives a label only together with the decoded image.
    """
    _check("pets", part, ("trainval", "test"))
    name = f"annotations/{part}.txt"
    base = _base(path, [".", "oxford-iiit-pet"], [name, "images"], PETS)
    rows = layout.rows(layout.content(base, name, ["."], [], PETS), name, 4, PETS)
    numbers = [layout.whole(row[1], name, PETS) for row in rows]
    breeds = {number: row[0].rpartition("_")[0] for row, number in zip(rows, numbers, strict=True)}
    if sorted(breeds) != list(range(1, len(breeds) + 1)):
        raise OpsinError(f"{name} does not number its breeds from 1 without a gap: take it from {PETS}.")
    labels = np.array(numbers, dtype=np.int64) - 1
    images = [f"images/{row[0]}.jpg" for row in rows]
    return layout.listed(base, images, labels, [breeds[number] for number in sorted(breeds)], name, PETS)


def caltech101(path: Path, part: str) -> ImageSet:
    """Caltech-101, `train`: 30 images of each of the 101 classes, `test`: the others.

    The set has no split. As in the SimCLR paper 30 images of each class are drawn, here with seed 0 from a generator
    per class, so they are other images than in any published table. The class of background images is left out, as
    the 3,030 training images of the DINOv2 paper say.

    Raises:
        OpsinError: images are missing, or a class has no image to test.
    """
    from torchvision.datasets import Caltech101

    _check("caltech101", part, ("train", "test"))
    needed = ["101_ObjectCategories", "101_ObjectCategories/BACKGROUND_Google"]
    base = _base(path, ["caltech-101", "caltech101", "."], needed, CALTECH)
    data = _built(base, "caltech101", Caltech101, CALTECH)
    targets = np.array(data.y, dtype=np.int64)
    chosen = [np.zeros(0, dtype=np.int64)]
    for label, name in enumerate(data.categories):
        own = np.flatnonzero(targets == label)
        if len(own) <= CALTECH_TRAIN:
            raise OpsinError(
                f"class {shown(name)} of {shown(base)} has {len(own)} images, and {CALTECH_TRAIN} are to train and at "
                f"least one to test: unpack {CALTECH} again."
            )
        drawn = np.random.default_rng([0, label]).permutation(own)
        chosen.append(np.sort(drawn[:CALTECH_TRAIN] if part == "train" else drawn[CALTECH_TRAIN:]))
    indices = np.concatenate(chosen)
    names = [
        f"101_ObjectCategories/{data.categories[targets[index]]}/image_{data.index[index]:04d}.jpg" for index in indices
    ]
    return layout.listed(base, names, targets[indices], data.categories, "their number per folder", CALTECH)


def flowers(path: Path, part: str) -> ImageSet:
    """Flowers-102, `train`, `val`, `test`, or `train+val`; raises an OpsinError that names what is missing."""
    from torchvision.datasets import Flowers102

    _check("flowers", part, ("train", "val", "test", "train+val"))
    base = _base(path, [".", "flowers-102"], ["jpg", "imagelabels.mat", "setid.mat"], FLOWERS)
    layout.needs_scipy("setid.mat")

    def build(split: str) -> Callable[[str], Any]:
        return lambda root: Flowers102(root, split, loader=str)

    return _listed(base, "flowers-102", [build(split) for split in part.split("+")], "setid.mat", FLOWERS)


def cub200(path: Path, part: str) -> ImageSet:
    """CUB-200-2011, `train` or `test`, from its lists; raises an OpsinError that names what is missing."""
    _check("cub200", part, ("train", "test"))
    base = _base(path, ["CUB_200_2011", "."], ["images.txt", "images"], CUB)

    def table(name: str) -> dict[str, str]:
        return {row[0]: row[1] for row in layout.rows(layout.content(base, name, ["."], [], CUB), name, 2, CUB)}

    images, titles = table("images.txt"), table("classes.txt")
    answers, trains = table("image_class_labels.txt"), table("train_test_split.txt")
    for name, held in (("image_class_labels.txt", answers), ("train_test_split.txt", trains)):
        odd = sorted(images.keys() ^ held.keys())
        if odd:
            raise OpsinError(
                f"images.txt and {name} of {shown(base)} do not list the same images, such as number "
                f"{layout.examples(odd)}: take both from {CUB}."
            )
    number = {key: i for i, key in enumerate(titles)}
    strange = sorted(set(answers.values()) - number.keys())
    if strange:
        raise OpsinError(
            f"image_class_labels.txt of {shown(base)} has classes that classes.txt has not, such as number "
            f"{layout.examples(strange)}: take both from {CUB}."
        )
    chosen = [key for key in images if trains[key] == ("1" if part == "train" else "0")]
    labels = np.array([number[answers[key]] for key in chosen], dtype=np.int64)
    return layout.listed(
        base, [f"images/{images[key]}" for key in chosen], labels, [*titles.values()], "images.txt", CUB
    )


def _check(name: str, part: str, parts: Sequence[str]) -> None:
    if part not in parts:
        raise layout.no_part(name, part, parts)


def _base(path: Path, places: Sequence[str], needed: Sequence[str], source: str) -> Path:
    """The first of `places` below `path` that has all of what is `needed`; an OpsinError names what is missing."""
    whole, some = (
        [path / place for place in places if test((path / place / name).exists() for name in needed)]
        for test in (all, any)
    )
    if not some:
        raise layout.missing(path, os.path.normpath(os.path.join(places[0], needed[0])), source)
    if not whole:
        absent = next(name for name in needed if not (some[0] / name).exists())
        raise layout.missing(some[0], absent, source)
    return whole[0]


def _built(base: Path, inside: str, build: Callable[[str], Any], source: str) -> Any:
    """A data set of torchvision that finds `base` under the name `inside` which it wants, by a link."""
    with TemporaryDirectory() as folder:
        link = Path(folder, inside)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(base.absolute(), target_is_directory=True)
        try:
            return build(folder)
        except RuntimeError:  # all files are there, so what torchvision has not found is their checksums
            reason = ValueError("a file has another checksum")
            raise layout.damaged(base, reason, source) from None
        except Exception as error:  # lists that are others than expected make torchvision raise almost anything
            raise layout.damaged(base, error, source) from error


def _listed(base: Path, inside: str, builds: Sequence[Callable[[str], Any]], by: str, source: str) -> ImageSet:
    """The images of one or several splits of a torchvision data set that gives the path in place of the image."""
    names, labels, classes = list[str](), list[int](), list[str]()
    for build in builds:
        data = _built(base, inside, build, source)
        if not len(data):
            raise OpsinError(f"{by} of {shown(base)} lists no image: take it from {source}.")
        if classes and list(data.classes) != classes:
            raise layout.damaged(base, ValueError("splits have different classes"), source)
        classes = list(data.classes)
        for index in range(len(data)):
            image, label = data[index]
            names.append(Path(image).as_posix().rpartition(f"/{inside}/")[2])
            labels.append(int(label))
    return layout.listed(base, names, np.array(labels, dtype=np.int64), classes, by, source)


def _cifar(name: str, path: Path, part: str, kind: Any, source: str) -> ImageSet:
    _check(name, part, ("train", "test"))
    needed = [file for file, _ in [*kind.train_list, *kind.test_list]] + [kind.meta["filename"]]
    base = _base(path, [kind.base_folder, "."], needed, source)
    data = _built(base, kind.base_folder, lambda root: kind(root, train=part == "train"), source)
    return layout.in_memory(shown(base), data.data, np.array(data.targets, dtype=np.int64), list(data.classes))
