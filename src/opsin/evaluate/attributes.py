"""Groups of images by attributes in a table, what is measured by group, and how sure the gap between groups is."""

import csv
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opsin.data.decode import shown
from opsin.data.listing import IMAGES
from opsin.errors import OpsinError, unknown
from opsin.evaluate.sets import ImageSet, of_files

PATH = "path"
"""Column with the path of every image."""
MOST = 20
"""Values up to which a column counts as an attribute where none are named."""
LEVEL = 0.95
"""Of the intervals."""
EXAMPLES = 3
"""Names that a message lists."""
_CHUNK = 2**24  # numbers drawn at a time

Columns = Mapping[str, Sequence[str]]
"""Cells of a table by column, as text; an empty cell is ""."""


@dataclass(frozen=True, eq=False)
class Grouped:
    """Images with attributes."""

    images: ImageSet
    """With labels where the task needs them."""
    attributes: Mapping[str, NDArray[np.str_]]
    """The group of every image by attribute, `[N]`; "" belongs to none."""
    clusters: NDArray[np.int64] | None = None
    """Number of the cluster of every image, `[N]`, such as its household: images of one are not independent."""
    without: Sequence[str] = ()
    """Image files of the folder that have no row, by name: they count nowhere."""

    def part(self, indices: NDArray[np.int64]) -> "Grouped":
        """Some of the images."""
        return Grouped(
            self.images.part(indices),
            {name: values[indices] for name, values in self.attributes.items()},
            None if self.clusters is None else self.clusters[indices],
            self.without,
        )


class Share(NamedTuple):
    """A share, such as accuracy, of one group."""

    images: int
    """Images of the group."""
    value: float
    """The share, from 0 to 1."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end."""


class Gap(NamedTuple):
    """The difference between the best and the worst group of an attribute."""

    best: str
    """Group of the highest share."""
    worst: str
    """Group of the lowest share."""
    value: float
    """Best minus worst."""
    low: float
    """Lower end of its 95 % interval; 0 or less means that the order of the two groups may be chance."""
    high: float
    """Upper end."""
    relative: float
    """Best minus worst, divided by best: how the paper states gaps. 0 if both are 0."""


class ByGroup(NamedTuple):
    """What is known of an attribute."""

    groups: Mapping[str, Share]
    """By group, in the order of names."""
    gap: Gap | None
    """None if fewer than two groups are large enough."""


def read_columns(table: Path) -> Columns:
    """The cells of a CSV or Parquet file, as text.

    Raises:
        OpsinError: there is no such file, it cannot be read, or it has no rows.
    """
    if not table.is_file():
        raise OpsinError(f"there is no file {shown(table)}: give --table a CSV or Parquet file with a row per image.")
    if table.suffix.lower() in (".parquet", ".pq"):
        columns = _parquet(table)
    elif table.suffix.lower() == ".csv":
        columns = _csv(table)
    else:
        raise OpsinError(f"{shown(table)} is neither CSV nor Parquet: give a table that ends in .csv or .parquet.")
    if not columns or not len(next(iter(columns.values()))):
        raise OpsinError(f"{shown(table)} has no rows: give a table with a row per image.")
    return columns


def _csv(table: Path) -> Columns:
    try:
        with table.open(newline="", encoding="utf-8-sig") as opened:
            header, *rows = [row for row in csv.reader(opened, strict=True) if row] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise OpsinError(f"{shown(table)} cannot be read as CSV in UTF-8: {error}.") from None
    if twice := [name for name in header if header.count(name) > 1]:
        raise OpsinError(f"{shown(table)} has several columns '{twice[0]}': keep one.")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise OpsinError(
                f"row {number} of {shown(table)} has {len(row)} cells and the header {len(header)}: mend it."
            )
    return {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}


def _parquet(table: Path) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        read = pq.read_table(table)
    except (pa.ArrowException, OSError) as error:
        raise OpsinError(f"{shown(table)} cannot be read as Parquet: {str(error).splitlines()[0]}.") from None
    if twice := [name for name in read.column_names if read.column_names.count(name) > 1]:
        raise OpsinError(f"{shown(table)} has several columns '{twice[0]}': keep one.")
    # A number that is none (NaN, the only value that differs from itself) says nothing, as an empty cell.
    return {
        name: ["" if cell is None or cell != cell else str(cell) for cell in read[name].to_pylist()]
        for name in read.column_names
    }


def grouped(
    data: Path,
    table: Path,
    label_column: str | None,
    attribute_columns: Sequence[str] = (),
    cluster_column: str | None = None,
) -> Grouped:
    """Images of a folder with labels and attributes from a table.

    Args:
        data: the folder.
        table: CSV or Parquet with a row per image; its column `path` is relative to `data`.
        label_column: holds the class of every image; None reads no labels.
        attribute_columns: hold groups; empty takes all columns of 2 to 20 different values but those named here.
        cluster_column: holds what images have in common, such as a household.

    Raises:
        OpsinError: a column is missing; rows and files do not line up; a label is empty; there is no attribute.
    """
    columns = read_columns(table)
    for name in (PATH, *([label_column] if label_column else []), *attribute_columns, *filter(None, [cluster_column])):
        if name not in columns:
            raise OpsinError(f"{shown(table)}: {unknown('column', name, columns)}")
    without = _line_up(data, table, columns[PATH])
    labels, classes = None, list[str]()
    if label_column:
        empty = [path for path, label in zip(columns[PATH], columns[label_column], strict=True) if not label]
        if empty:
            raise OpsinError(
                f"{len(empty)} rows of {shown(table)} have no '{label_column}', such as {_some(empty)}: fill it in."
            )
        classes = sorted(set(columns[label_column]))
        labels = numbered(columns[label_column], classes)
    images = of_files(shown(data), [data / cell for cell in columns[PATH]], labels, classes)
    others = {PATH, label_column, cluster_column}
    names = list(attribute_columns) or [
        name for name in columns if name not in others and 2 <= len(set(columns[name]) - {""}) <= MOST
    ]
    attributes = {name: np.array(columns[name], dtype=np.str_) for name in names}
    for name, values in attributes.items():
        if len(groups := np.unique(values[values != ""])) < 2:
            only = f"only the group '{groups[0]}'" if len(groups) else "no value at all"
            raise OpsinError(
                f"column '{name}' of {shown(table)} has {only}, and a comparison needs two groups or more."
            )
    if not attributes:
        raise OpsinError(
            f"{shown(table)} has no attribute, a column of 2 to {MOST} different values beside {PATH} and label: add "
            "one, or name a column of more values as an attribute column."
        )
    clusters = None
    if cluster_column:
        clusters = _clusters(columns[cluster_column], columns[PATH], table, cluster_column)
    return Grouped(images, attributes, clusters, without)


def numbered(cells: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """The place of every cell in `names`, `[N]`."""
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[cell] for cell in cells], dtype=np.int64)


def _clusters(cells: Sequence[str], paths: Sequence[str], table: Path, column: str) -> NDArray[np.int64]:
    empty = [path for path, cell in zip(paths, cells, strict=True) if not cell]
    if empty:
        raise OpsinError(f"{len(empty)} rows of {shown(table)} have no '{column}', such as {_some(empty)}: fill it in.")
    return numbered(cells, sorted(set(cells)))


def _line_up(data: Path, table: Path, cells: Sequence[str]) -> list[str]:
    """Checks that every row has a file of its own; returns the image files that have no row."""
    if not data.is_dir():
        raise OpsinError(f"there is no folder {shown(data)}: give the one that the paths of {shown(table)} start from.")
    rows = Counter(os.path.normpath(cell) for cell in cells)
    if twice := [cell for cell, count in rows.items() if count > 1]:
        raise OpsinError(
            f"{len(twice)} paths of {shown(table)} have several rows, such as {_some(twice)}: keep one each."
        )
    if lost := [cell for cell in cells if not (data / cell).is_file()]:
        raise OpsinError(
            f"{len(lost)} of {len(cells)} rows of {shown(table)} have no file in {shown(data)}, such as {_some(lost)}: "
            f"the column '{PATH}' must hold paths relative to that folder."
        )
    files = (path for path in data.rglob("*") if path.suffix.lower() in IMAGES)
    return sorted(name for name in (os.fspath(path.relative_to(data)) for path in files) if name not in rows)


def _some(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:EXAMPLES])


def by_group(
    hits: NDArray[np.bool_],
    groups: NDArray[np.str_],
    clusters: NDArray[np.int64] | None = None,
    *,
    repeats: int,
    seed: int,
    smallest: int,
    equal_clusters: bool = False,
) -> ByGroup:
    """Shares of hits by group, and the gap between the best and the worst, with percentile bootstrap intervals.

    The whole set is drawn again with replacement, all groups at once: images, or whole clusters where they are given.
    The gap's interval is of the difference between the two groups that are best and worst in the data, which a repeat
    may turn round: it holds 0 where their order may be chance. (The largest difference of each repeat would always be
    above 0.) Being picked as the extremes of many groups still makes a gap look larger than it is.

    Args:
        hits: what is averaged, `[N]`.
        groups: of every image, `[N]`; "" belongs to none.
        clusters: number of the cluster of every image, `[N]`, from 0 on.
        repeats: how often the set is drawn.
        seed: of the draws.
        smallest: images that a group needs to count in the gap; smaller ones are shown only.
        equal_clusters: a group's share is the mean over its clusters of theirs, so that each counts the same, however
            many images it has.
    """
    names = np.unique(groups[groups != ""])
    place = np.searchsorted(names, groups)  # of no meaning where the group is ""
    inside = groups != ""
    cell = 2 * place[inside] + hits[inside]  # misses and hits of each group in turn
    kinds = 2 * len(names)
    counts = np.bincount(cell, minlength=kinds)
    if clusters is None:
        weights, drawn = counts, _drawn(cell, kinds, len(hits), repeats, seed)
    else:
        sums = np.zeros((int(clusters.max()) + 1, kinds))
        np.add.at(sums, (clusters[inside], cell), 1)
        if equal_clusters:
            images = (sums[:, ::2] + sums[:, 1::2]).repeat(2, axis=1)
            sums = np.divide(sums, images, out=sums, where=images > 0)
        weights, drawn = sums.sum(0), _drawn_clusters(sums, repeats, seed)
    values = weights[1::2] / (weights[::2] + weights[1::2])
    with np.errstate(invalid="ignore"):  # a repeat may have no image of a group: it says nothing about that group
        again = drawn[:, 1::2] / (drawn[:, ::2] + drawn[:, 1::2])
    shares = {
        str(name): Share(int(counts[2 * i] + counts[2 * i + 1]), float(values[i]), *_interval(again[:, i]))
        for i, name in enumerate(names)
    }
    large = [i for i, name in enumerate(names) if shares[str(name)].images >= smallest]
    if len(large) < 2:
        return ByGroup(shares, None)
    best, worst = max(large, key=values.__getitem__), min(large, key=values.__getitem__)
    if values[best] == values[worst]:
        best, worst = large[0], large[1]  # none is better: any two
    value = float(values[best] - values[worst])
    low, high = _interval(again[:, best] - again[:, worst])
    relative = value / float(values[best]) if values[best] else 0.0
    return ByGroup(shares, Gap(str(names[best]), str(names[worst]), value, low, high, relative))


def _drawn(cell: NDArray[np.int64], kinds: int, count: int, repeats: int, seed: int) -> NDArray[np.float64]:
    """Images of each kind in each repeat, `[repeats, kinds]`, where images are drawn.

    Images of a kind are alike, so drawing N images is drawing how many are of each kind: one multinomial.
    """
    sizes = np.append(np.bincount(cell, minlength=kinds), count - len(cell))
    return np.random.default_rng(seed).multinomial(count, sizes / count, size=repeats)[:, :-1].astype(np.float64)


def _drawn_clusters(sums: NDArray[np.float64], repeats: int, seed: int) -> NDArray[np.float64]:
    """What each kind has in each repeat, `[repeats, kinds]`, where clusters are drawn that have `sums [C, kinds]`."""
    rng, number = np.random.default_rng(seed), len(sums)
    step = max(1, _CHUNK // number)
    parts = [
        rng.multinomial(number, np.full(number, 1 / number), size=min(step, repeats - start)) @ sums
        for start in range(0, repeats, step)
    ]
    return np.concatenate(parts)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
