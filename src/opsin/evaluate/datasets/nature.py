"""Large sets of species and scenes, read by their official lists: iNaturalist 2018 and 2021, Places205."""

import json
import os
from pathlib import Path
from typing import Any, Final

import numpy as np

from opsin.errors import OpsinError
from opsin.evaluate.datasets import layout
from opsin.evaluate.sets import ImageSet

INAT2018: Final = (
    "train_val2018.tar.gz, to be unpacked, train2018.json.tar.gz and val2018.json.tar.gz "
    "(https://github.com/visipedia/inat_comp/tree/master/2018)"
)
"""Where iNaturalist 2018 comes from."""
INAT2021: Final = (
    "train.tar.gz and val.tar.gz, to be unpacked, train.json.tar.gz and val.json.tar.gz "
    "(https://github.com/visipedia/inat_comp/tree/master/2021)"
)
"""Where iNaturalist 2021 comes from."""
PLACES205: Final = (
    "imagesPlaces205_resize.tar.gz, to be unpacked, and trainvalsplit_places205.tar.gz (http://places.csail.mit.edu/)"
)
"""Where Places205 comes from."""


def inat2018(path: Path, part: str) -> ImageSet:
    """iNaturalist 2018, 8,142 species, `train` or `val`: `train2018.json` beside the images `train_val2018/…`.

    Raises:
        OpsinError: a file is missing, or the list and the images do not line up.
    """
    return _inaturalist("inat2018", path, part, f"{part}2018.json", INAT2018)


def inat2021(path: Path, part: str) -> ImageSet:
    """iNaturalist 2021, 10,000 species, `train` or `val`: `train.json` beside the images `train/…`.

    Raises:
        OpsinError: a file is missing, or the list and the images do not line up.
    """
    return _inaturalist("inat2021", path, part, f"{part}.json", INAT2021)


def places205(path: Path, part: str) -> ImageSet:
    """Places205, `train` or `val`; a class is called by the folder of its training images, such as `a/abbey`.

    Raises:
        OpsinError: a file is missing, or the list and the images do not line up.
    """
    if part not in ("train", "val"):
        raise layout.no_part("places205", part, ("train", "val"))
    found = {name: _scenes(path, f"{name}_places205.csv") for name in {"train", part}}
    titles: dict[int, str] = {}
    for image, label in found["train"]:
        title = os.path.dirname(image)
        if titles.setdefault(label, title) != title:
            raise OpsinError(
                f"train_places205.csv gives the label {label} to {titles[label]} and to {title}: take it from "
                f"{PLACES205}."
            )
    classes = sorted(titles)
    number = {label: i for i, label in enumerate(classes)}
    strange = [image for image, label in found[part] if label not in number]
    if strange:
        raise OpsinError(
            f"{part}_places205.csv has labels that train_places205.csv has not, such as those of "
            f"{layout.examples(strange)}: take both from {PLACES205}."
        )
    folders = ["data/vision/torralba/deeplearning/images256", "images256"]
    root = next((path / folder for folder in folders if (path / folder).is_dir()), None)
    if root is None:
        raise layout.missing(path, f"{folders[0]}, the folder of the images", PLACES205)
    names, labels = ([row[at] for row in found[part]] for at in (0, 1))
    places = np.array([number[int(label)] for label in labels], dtype=np.int64)
    by = f"{part}_places205.csv"
    return layout.listed(root, [str(name) for name in names], places, [titles[i] for i in classes], by, PLACES205)


def _scenes(path: Path, name: str) -> list[tuple[str, int]]:
    packs = ["trainvalsplit_places205.tar.gz", "trainvalsplit_places205.zip"]
    text = layout.content(path, name, ["trainvalsplit_places205", "."], packs, PLACES205)
    return [(row[0], layout.whole(row[1], name, PLACES205)) for row in layout.rows(text, name, 2, PLACES205)]


def _inaturalist(title: str, path: Path, part: str, name: str, source: str) -> ImageSet:
    if part not in ("train", "val"):
        raise layout.no_part(title, part, ("train", "val"))
    text = layout.content(path, name, [".", "annotations"], [f"{name}.tar.gz"], source)
    try:
        found: Any = json.loads(text)
        images = {int(image["id"]): str(image["file_name"]) for image in found["images"]}
        answers = {int(one["image_id"]): int(one["category_id"]) for one in found["annotations"]}
        species = {int(one["id"]): str(one.get("name", one["id"])) for one in found["categories"]}
    except (ValueError, KeyError, TypeError) as error:
        raise layout.damaged(path / name, error, source) from error
    lonely = sorted(images.keys() - answers.keys())
    if lonely:
        raise OpsinError(
            f"{len(lonely):,} of the {len(images):,} images of {name} have no label, such as "
            f"{layout.examples([images[image] for image in lonely])}: take the list from {source}."
        )
    number = {category: i for i, category in enumerate(sorted(species))}
    strange = [file for image, file in images.items() if answers[image] not in number]
    if strange:
        raise OpsinError(
            f"{len(strange):,} of the {len(images):,} images of {name} have a class that it does not list, such as "
            f"{layout.examples(strange)}: take the list from {source}."
        )
    labels = np.array([number[answers[image]] for image in images], dtype=np.int64)
    titles = [species[category] for category in number]
    if len(set(titles)) < len(titles):  # species that share a name are told apart by their numbers
        titles = [str(category) for category in number]
    return layout.listed(path, list(images.values()), labels, titles, name, source)
