"""ImageNet-1k and the sets that test what was trained on it, as they are distributed.

Labels come from folders named after WordNet identifiers or from the official development kit, never from files that
somebody else made.
"""

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from opsin.data.decode import shown
from opsin.errors import OpsinError
from opsin.evaluate.datasets import layout
from opsin.evaluate.datasets.archives import Files, files, tars_of_classes
from opsin.evaluate.sets import ImageSet

IMAGENET: Final = (
    "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz "
    "(https://image-net.org/challenges/LSVRC/2012/2012-downloads.php)"
)
"""Where the ImageNet files come from."""
IMAGENET_A: Final = "imagenet-a.tar (https://github.com/hendrycks/natural-adv-examples)"
"""Where ImageNet-A comes from."""
IMAGENET_R: Final = "imagenet-r.tar (https://github.com/hendrycks/imagenet-r)"
"""Where ImageNet-R comes from."""
IMAGENET_SKETCH: Final = "ImageNet-Sketch.zip (https://github.com/HaohanWang/ImageNet-Sketch)"
"""Where ImageNet-Sketch comes from."""
IMAGENET_V2: Final = "imagenetv2-matched-frequency.tar.gz, to be unpacked (https://github.com/modestyachts/ImageNetV2)"
"""Where ImageNet-V2 comes from."""
IMAGENET_REAL: Final = "https://github.com/google-research/reassessed-imagenet (real.json)"
"""Where the ReaL labels come from."""
IMAGENET_C: Final = "noise.tar, blur.tar, weather.tar, digital.tar and extra.tar (https://zenodo.org/records/2235448)"
"""Where ImageNet-C comes from."""

CLASSES: Final = 1000
"""Classes of ImageNet-1k."""
CORRUPTIONS: Final = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
"""The corruptions of ImageNet-C by the tar that holds them; the last four are not part of its mean error."""

_DATA = ("", "ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/")
_NUMBER = re.compile(r"(?:^|/)ILSVRC2012_val_(\d{8})\.jpeg$", re.IGNORECASE)
_DEVKIT = ("ILSVRC2012_devkit_t12/data", "data", ".")


def imagenet(path: Path, part: str) -> ImageSet:
    """Training or validation images of ImageNet-1k (ILSVRC 2012); classes are WordNet identifiers, sorted.

    `train` is a folder per class, or the official tar of a tar per class, or those tars unpacked from it. `val` is a
    folder per class, or the flat images (a folder or the official tar), whose labels come from the development kit.

    Raises:
        OpsinError: a file is missing, or the labels do not line up with the images.
    """
    if part not in ("train", "val"):
        raise layout.no_part("imagenet", part, ("train", "val"))
    if part == "val":
        return _validation(path)
    places = [f"{root}train" for root in _DATA] + ["ILSVRC2012_img_train", "ILSVRC2012_img_train.tar"]
    place = layout.find(path, places, "n[0-9]*", "train, a folder of class folders", IMAGENET)
    if place.is_file() or not any(entry.is_dir() for entry in place.glob("n[0-9]*")):
        return layout.in_class_folders(tars_of_classes(place))
    return layout.by_folder(place, IMAGENET)


def imagenet_real(path: Path, part: str) -> ImageSet:
    """The validation images with the labels "ReaL" (Beyer et al. 2020): `[N, 1000]`, any number of classes per image.

    They number the sorted WordNet identifiers; an image without any counts nowhere. `path` holds `real.json` beside
    the validation images, which lie as for `imagenet`.

    Raises:
        OpsinError: a file is missing, or the labels do not line up with the images.
    """
    if part != "test":
        raise layout.no_part("imagenet-real", part, ("test",))
    found = layout.content(path, "real.json", [".", "reassessed-imagenet"], [], IMAGENET_REAL)
    try:
        answers: Any = json.loads(found)
        labels = np.zeros((len(answers), CLASSES), dtype=np.int64)
        for image, classes in enumerate(answers):
            if any(not 0 <= number < CLASSES for number in classes):
                raise ValueError(f"image {image + 1} has the classes {classes}")
            labels[image, classes] = 1
    except (ValueError, TypeError, IndexError) as error:
        raise layout.damaged(path / "real.json", error, IMAGENET_REAL) from error
    held, chosen = _numbered(files(_validation_place(path)), len(answers), "real.json")
    return layout.of_members(held, chosen, labels, ())


def imagenet_v2(path: Path, part: str) -> ImageSet:
    """ImageNet-V2, matched frequency (Recht et al. 2019).

    Its folders "0" to "999" number the sorted WordNet identifiers, so the labels are these numbers and there are no
    class names.

    Raises:
        OpsinError: the images are missing, or a folder is no such number.
    """
    if part != "test":
        raise layout.no_part("imagenet-v2", part, ("test",))
    places = ["imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency", "."]
    places += ["imagenetv2-matched-frequency.tar"]
    needed = "imagenetv2-matched-frequency-format-val, a folder of folders 0 to 999"
    found = layout.by_folder(layout.find(path, places, "[0-9]*", needed, IMAGENET_V2), IMAGENET_V2)
    strange = [name for name in found.classes if not re.fullmatch(r"0|[1-9][0-9]{0,2}", name)]
    if strange:
        raise OpsinError(
            f"the folders of {found.where} should be numbers from 0 to {CLASSES - 1}, and some are not, such as "
            f"{layout.examples(strange)}: leave it as it is in {IMAGENET_V2}."
        )
    assert found.labels is not None
    numbers = np.array([int(name) for name in found.classes], dtype=np.int64)
    return replace(found, labels=numbers[found.labels], classes=())


def imagenet_a(path: Path, part: str) -> ImageSet:
    """ImageNet-A (Hendrycks et al. 2021): 200 classes of ImageNet, by their WordNet identifiers.

    Raises:
        OpsinError: the images are missing.
    """
    return _by_identifier("imagenet-a", path, part, ["imagenet-a", ".", "imagenet-a.tar"], IMAGENET_A)


def imagenet_r(path: Path, part: str) -> ImageSet:
    """ImageNet-R (Hendrycks et al. 2021): 200 classes of ImageNet, by their WordNet identifiers.

    Raises:
        OpsinError: the images are missing.
    """
    return _by_identifier("imagenet-r", path, part, ["imagenet-r", ".", "imagenet-r.tar"], IMAGENET_R)


def imagenet_sketch(path: Path, part: str) -> ImageSet:
    """ImageNet-Sketch (Wang et al. 2019): all classes of ImageNet, by their WordNet identifiers.

    Raises:
        OpsinError: the images are missing.
    """
    places = ["sketch", "ImageNet-Sketch", "imagenet-sketch", ".", "ImageNet-Sketch.zip"]
    return _by_identifier("imagenet-sketch", path, part, places, IMAGENET_SKETCH)


def imagenet_c(path: Path, part: str) -> ImageSet:
    """One corruption of ImageNet-C (Hendrycks and Dietterich 2019) at one severity, 1 to 5.

    Args:
        path: holds `gaussian_noise/3/n01440764/….JPEG` and so on, in folders of the five tars' names or not, or the
            tars themselves.
        part: such as `gaussian_noise/3`.

    Raises:
        OpsinError: there is no such part, or its images are missing.
    """
    corruption, _, severity = part.partition("/")
    group = next((group for group, names in CORRUPTIONS.items() if corruption in names), None)
    if group is None or severity not in ("1", "2", "3", "4", "5"):
        raise OpsinError(
            f"imagenet-c is tested one corruption and severity at a time, and '{part}' is none: give one such as "
            "gaussian_noise/3."
        )
    places = [part, f"{group}/{part}", f"{group}.tar"]
    place = layout.find(path, places, "n[0-9]*", f"{part} or {group}.tar", IMAGENET_C)
    folder = place.is_dir()
    found = layout.by_folder(place, IMAGENET_C) if folder else layout.in_class_folders(files(place), below=part)
    # Names are alike in all parts, and sizes might be.
    return replace(found, fingerprint=hashlib.sha256(f"{part} {found.fingerprint}".encode()).hexdigest())


def _by_identifier(name: str, path: Path, part: str, places: list[str], source: str) -> ImageSet:
    if part != "test":
        raise layout.no_part(name, part, ("test",))
    place = layout.find(path, places, "n[0-9]*", f"{places[0]}, a folder of class folders such as n01440764", source)
    return layout.by_folder(place, source)


def _validation_place(path: Path) -> Path:
    places = [f"{root}val" for root in _DATA] + ["ILSVRC2012_img_val", "ILSVRC2012_img_val.tar"]
    return layout.find(path, places, "[nI]*[0-9]*", "val, a folder of images or of class folders", IMAGENET)


def _validation(path: Path) -> ImageSet:
    place = _validation_place(path)
    if place.is_dir() and any(entry.is_dir() for entry in place.glob("n[0-9]*")):
        return layout.by_folder(place, IMAGENET)
    pack, name = "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_validation_ground_truth.txt"
    truth = layout.content(path, name, _DEVKIT, [pack], IMAGENET)
    identifiers = _identifiers(layout.content(path, "meta.mat", _DEVKIT, [pack], IMAGENET))
    answers = [layout.whole(row, name, IMAGENET) for (row,) in layout.rows(truth, name, 1, IMAGENET)]
    strange = sorted({str(answer) for answer in answers if answer not in identifiers})
    if strange:
        raise OpsinError(
            f"{name} has the classes {layout.examples(strange)}, which meta.mat has not: take both from {IMAGENET}."
        )
    classes = sorted(identifiers.values())
    number = {identifier: i for i, identifier in enumerate(classes)}
    labels = np.array([number[identifiers[answer]] for answer in answers], dtype=np.int64)
    held, chosen = _numbered(files(place), len(answers), name)
    return layout.of_members(held, chosen, labels, classes)


def _identifiers(data: bytes) -> dict[int, str]:
    """WordNet identifiers by the numbers of the development kit, of the synsets without children."""
    synsets = layout.matlab(data, "meta.mat", IMAGENET).get("synsets")
    try:
        return {
            int(one["ILSVRC2012_ID"]): str(one["WNID"])
            for one in np.atleast_1d(synsets)  # type: ignore[arg-type]  # refused below if it is none
            if int(one["num_children"]) == 0
        }
    except (ValueError, IndexError, TypeError) as error:
        raise OpsinError(f"meta.mat is not that of the development kit: take it from {IMAGENET}.") from error


def _numbered(held: Files, count: int, by: str) -> tuple[Files, list[int]]:
    """The validation images in the order of their numbers, which must be 1 to `count`, as many as `by` has labels."""
    places = {int(found[1]): i for i, name in enumerate(held.names) if (found := _NUMBER.search(name))}
    absent = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, count + 1) if number not in places]
    more = [os.path.basename(held.names[places[number]]) for number in sorted(places) if not 1 <= number <= count]
    if absent or more:
        told = [f"images are missing, such as {layout.examples(absent)}"] * bool(absent)
        told += [f"images have no label, such as {layout.examples(more)}"] * bool(more)
        raise OpsinError(
            f"{by} has {count:,} labels and {shown(held.where)} {len(places):,} images, so they do not line up: "
            f"{'; '.join(told)}."
        )
    return held, [places[number] for number in range(1, count + 1)]
