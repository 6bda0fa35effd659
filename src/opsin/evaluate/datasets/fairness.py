"""Published sets with attributes: Dollar Street."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np

from opsin.data.decode import shown
from opsin.errors import OpsinError
from opsin.evaluate.attributes import Grouped, numbered, read_columns
from opsin.evaluate.sets import of_files

IMAGENET_CLASSES = 1000
"""Whose numbers, in the order of sorted WordNet identifiers, are the labels."""
REGIONS = {"af": "africa", "am": "americas", "as": "asia", "eu": "europe"}
"""Names of Dollar Street's codes."""
BUCKETS = ("low", "medium", "high")
_SOURCE = "dataset_dollarstreet.zip of https://www.kaggle.com/datasets/mlcommons/the-dollar-street-dataset"
_TABLES = ("images_v2_imagenet_train.csv", "images_v2_imagenet_test.csv")
_COLUMNS = ("country.name", "region.id", "imageRelPath", "income", "imagenet_sysnet_id")


@dataclass(frozen=True)
class PublishedGroups:
    """A published set with attributes."""

    title: str
    """How tables call it."""
    read: Callable[[Path], Grouped]
    """Folder → images; an OpsinError says which file is missing and where it comes from."""
    top: int
    """Labels of an image among which its own must be."""


def income_bucket(income: float) -> str:
    """Of a household's monthly income in dollars: low below about 90, high above about 1,808, else medium.

    As the code of Goyal et al. (2022, VISSL's inference_geographical_diversity.py) has it: the natural logarithm over
    3, rounded, is 1, 2 or 3. That code knows no others; here what is below 1 is low and what is above 3 is high.
    """
    return BUCKETS[min(max(round(log(income) / 3), 1), 3) - 1]


def dollarstreet(folder: Path) -> Grouped:
    """Dollar Street with ImageNet's classes, by income and by region, as MLCommons distributes it.

    Both of its tables are read, as the classifier is trained on ImageNet and every image can test it. An image may have
    several classes; it is a hit if one of them is among the first five.

    What differs from Table 12 of the paper, which follows Goyal et al. (2022): theirs are 16,073 images of an earlier
    copy, 94 concepts and a head for 108 classes of ImageNet-22k with a map from those to concepts; these are the images
    to which MLCommons assigned classes of ImageNet-1k. The shares are comparable between models, not to that table's
    digits.

    The tables name no household. Images with the same country and income are taken to be of one: by these clusters
    the intervals are drawn, and over them shares are averaged, as the code of Goyal et al. averages over households.

    Raises:
        OpsinError: a file is missing, or a table is not of this set.
    """
    base = folder / "dataset_dollarstreet" if (folder / "dataset_dollarstreet").is_dir() else folder
    rows: dict[str, list[str]] = {name: [] for name in _COLUMNS}
    for table in _TABLES:
        if not (base / table).is_file():
            raise OpsinError(f"{shown(base / table)} is missing: it comes from {_SOURCE}.")
        columns = read_columns(base / table)
        if lost := [name for name in _COLUMNS if name not in columns]:
            raise OpsinError(f"{shown(base / table)} has no column {lost[0]}: get it again from {_SOURCE}.")
        for name in _COLUMNS:
            rows[name] += columns[name]
    paths = [base / cell for cell in rows["imageRelPath"]]
    if missing := [path for path in paths if not path.is_file()]:
        raise OpsinError(
            f"{len(missing)} of {len(paths)} images are missing, such as {shown(missing[0])}: unpack all of {_SOURCE}."
        )
    try:
        incomes = [income_bucket(float(cell)) for cell in rows["income"]]
        regions = [REGIONS[cell] for cell in rows["region.id"]]
        labels = np.zeros((len(paths), IMAGENET_CLASSES), dtype=np.int64)
        for i, cell in enumerate(rows["imagenet_sysnet_id"]):
            labels[i, json.loads(cell)] = 1
    except (ValueError, KeyError, IndexError) as error:
        raise OpsinError(
            f"the tables of {shown(base)} hold an income, region or class that Dollar Street does not have ({error}): "
            f"get them again from {_SOURCE}."
        ) from None
    homes = [f"{country} {income}" for country, income in zip(rows["country.name"], rows["income"], strict=True)]
    return Grouped(
        of_files("Dollar Street", paths, labels, ()),
        {"income": np.array(incomes, dtype=np.str_), "region": np.array(regions, dtype=np.str_)},
        numbered(homes, sorted(set(homes))),
    )


GROUP_SETS = {"dollarstreet": PublishedGroups("Dollar Street", dollarstreet, 5)}
"""By the name that `--data NAME:PATH` gives."""
