"""Published sets for classification, read as they are distributed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from opsin.errors import OpsinError, unknown
from opsin.evaluate.datasets import imagenet, layout, nature, simclr
from opsin.evaluate.sets import ImageSet, named

Metric = Literal["accuracy", "per_class", "voc_map"]
"""Share of right images; mean of that over classes; mean average precision by the 11-point rule of VOC 2007."""


@dataclass(frozen=True)
class Published:
    """A published set."""

    title: str
    """How tables call it."""
    read: Callable[[Path, str], ImageSet]
    """Folder and part → images; an OpsinError says exactly which file is missing and where it comes from."""
    train: str
    """The part that trains; "" for a set that only tests."""
    test: str
    """The part that tests."""
    metric: Metric
    """What the published tables count."""
    source: str
    """Where its files come from."""


SETS: dict[str, Published] = {
    "imagenet": Published("ImageNet-1k", imagenet.imagenet, "train", "val", "accuracy", imagenet.IMAGENET),
    "imagenet-a": Published("ImageNet-A", imagenet.imagenet_a, "", "test", "accuracy", imagenet.IMAGENET_A),
    "imagenet-r": Published("ImageNet-R", imagenet.imagenet_r, "", "test", "accuracy", imagenet.IMAGENET_R),
    "imagenet-sketch": Published(
        "ImageNet-Sketch", imagenet.imagenet_sketch, "", "test", "accuracy", imagenet.IMAGENET_SKETCH
    ),
    "imagenet-v2": Published("ImageNet-V2", imagenet.imagenet_v2, "", "test", "accuracy", imagenet.IMAGENET_V2),
    "imagenet-real": Published("ImageNet-ReaL", imagenet.imagenet_real, "", "test", "accuracy", imagenet.IMAGENET_REAL),
    "imagenet-c": Published(
        "ImageNet-C", imagenet.imagenet_c, "", "CORRUPTION/SEVERITY", "accuracy", imagenet.IMAGENET_C
    ),
    "food101": Published("Food-101", simclr.food101, "train", "test", "accuracy", simclr.FOOD),
    "cifar10": Published("CIFAR-10", simclr.cifar10, "train", "test", "accuracy", simclr.CIFAR10),
    "cifar100": Published("CIFAR-100", simclr.cifar100, "train", "test", "accuracy", simclr.CIFAR100),
    "sun397": Published("SUN397", simclr.sun397, "train", "test", "accuracy", simclr.SUN),
    "cars": Published("Stanford Cars", simclr.cars, "train", "test", "accuracy", simclr.CARS),
    "aircraft": Published("FGVC-Aircraft", simclr.aircraft, "trainval", "test", "per_class", simclr.AIRCRAFT),
    "voc2007": Published("VOC 2007", simclr.voc2007, "trainval", "test", "voc_map", simclr.VOC),
    "dtd": Published("DTD", simclr.dtd, "train+val", "test", "accuracy", simclr.DTD),
    "pets": Published("Oxford-IIIT Pets", simclr.pets, "trainval", "test", "per_class", simclr.PETS),
    "caltech101": Published("Caltech-101", simclr.caltech101, "train", "test", "per_class", simclr.CALTECH),
    "flowers": Published("Flowers-102", simclr.flowers, "train+val", "test", "per_class", simclr.FLOWERS),
    "cub200": Published("CUB-200-2011", simclr.cub200, "train", "test", "accuracy", simclr.CUB),
    "inat2018": Published("iNaturalist 2018", nature.inat2018, "train", "val", "accuracy", nature.INAT2018),
    "inat2021": Published("iNaturalist 2021", nature.inat2021, "train", "val", "accuracy", nature.INAT2021),
    "places205": Published("Places205", nature.places205, "train", "val", "accuracy", nature.PLACES205),
}
"""By the name that `--data NAME:PATH` gives."""


def read_set(name: str, path: Path, part: str) -> ImageSet:
    """A part of a published set whose files lie at `path`.

    Raises:
        OpsinError: the set has no such part, or a file is missing.
    """
    if name not in SETS:
        raise unknown("published set", name, SETS)
    if not part:
        raise OpsinError(f"{name} has images to test on only: train on another set, such as imagenet:PATH.")
    with layout.understood(path, SETS[name].source):
        return SETS[name].read(path, part)


def metric_of(spec: str) -> Metric:
    """What tables count for `NAME:PATH`; accuracy for images of one's own.

    Raises:
        OpsinError: there is no set of this name.
    """
    name, _ = named(spec, SETS)
    return "accuracy" if name is None else SETS[name].metric


def allowed(test: ImageSet, train_classes: Sequence[str]) -> Tensor | None:
    """Which of the K trained classes an answer for `test` may be: those that it has a name for, booleans `[K]`.

    ImageNet-A and -R have 200 of ImageNet's 1000 classes and are tested among these only, as their authors and the
    reference code do.

    Args:
        test: as it was read, with class names of its own: `sets.train_and_test` replaces them by those of the training.
        train_classes: names of the trained classes.

    Returns:
        None if all classes count: `test` has them all, or no class names.

    Raises:
        OpsinError: no class of `test` was trained.
    """
    held = set(test.classes)
    mask = torch.tensor([name in held for name in train_classes])
    if not held or bool(mask.all()):
        return None
    if not mask.any():
        raise OpsinError(
            f"no class of {test.where} is among those of the train set: name the class folders alike in both."
        )
    return mask
