"""Some images of a curation to look at: of every reason to drop, of some clusters, and by their numbers.

Of the tables only some parts are read, one after another, so a billion images take no more memory than a thousand.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opsin.curate.heap import kind_of
from opsin.curate.looks import eight_bits, reduction_to, shrunk
from opsin.curate.tables import LISTING, Table, read, read_step
from opsin.data.decode import DecodeError, decode_reduced, shown
from opsin.data.sources import Source, scan
from opsin.errors import OpsinError

LOOKED_AT: Final = 5_000_000
"""Rows of a table, in evenly spaced parts, among which examples are looked for."""
CLUSTERS: Final = 3
"""Clusters that are taken of the largest, of those in the middle and of the smallest."""
EXAMPLES: Final = 8
"""Images that are taken of a cluster or a reason."""
SIDE: Final = 128
"""Shorter side in pixels at which images are looked at; smaller ones stay as they are."""

Item = TypeVar("Item")


def evenly(items: Sequence[Item], wanted: int) -> list[Item]:
    """Up to `wanted` of the items, evenly spaced, with the first and the last."""
    if len(items) <= wanted:
        return list(items)
    return [items[i * (len(items) - 1) // (wanted - 1)] for i in range(wanted)]


def looked_at(table: Table) -> range:
    """Numbers of the parts among which examples are looked for: evenly spaced, about `LOOKED_AT` rows in all."""
    return range(0, len(table.parts), max(1, -(-table.rows // LOOKED_AT)))


def dropped_examples(images: Table) -> dict[str, list[int]]:
    """Numbers of some images that ingest dropped, by the kind of reason."""
    found: dict[str, list[int]] = {}
    for part in (images.parts[i] for i in looked_at(images)):
        told = read(part, ["reason"])["reason"].combine_chunks().dictionary_encode()
        kinds = np.array([kind_of(reason) for reason in told.dictionary.to_pylist()])
        rows = np.flatnonzero(told.indices.is_valid().to_numpy(zero_copy_only=False))
        of_row = kinds[told.indices.drop_null().to_numpy()] if len(rows) else kinds
        for kind in np.unique(of_row):
            numbers = part.first + rows[of_row == kind][:EXAMPLES]
            found.setdefault(str(kind), []).extend(numbers.tolist())
    return {kind: evenly(numbers, EXAMPLES) for kind, numbers in found.items()}


class Cluster(NamedTuple):
    """Some images of a cluster of level 1, and what was seen of it among the rows looked at."""

    number: int
    """Of the cluster."""
    size: int
    """Its images."""
    seen: int
    """Its images among the rows looked at."""
    taken: int
    """Of these, those that the sample chose."""
    numbers: list[int]
    """Of images in it, from the nearest to its centre to the farthest."""
    chosen: list[bool | None]
    """Whether the sample chose each of these images; None without a sample."""


def cluster_examples(clusters: Table, sample: Table | None) -> list[Cluster]:
    """The largest clusters, some of middle size, and the smallest, of those that occur among the rows looked at.

    Args:
        clusters: what clustering wrote, with `levels.safetensors` beside it.
        sample: what sampling wrote of them, if it did.

    Raises:
        OpsinError: the tables are not of the same images, or a file is missing or damaged.
    """
    if sample is not None:
        clusters.aligned(sample)
    sizes = _sizes(clusters.path / "levels.safetensors")
    occurs = np.zeros(len(sizes), bool)
    for i in looked_at(clusters):
        numbers = read(clusters.parts[i], ["cluster"])["cluster"].drop_null().to_numpy()
        occurs[numbers] = True
    order = np.flatnonzero(occurs)
    order = order[np.argsort(-sizes[order], kind="stable")]
    middle = max(0, (len(order) - CLUSTERS) // 2)
    wanted = list(dict.fromkeys([*order[:CLUSTERS], *order[middle : middle + CLUSTERS], *order[-CLUSTERS:]]))
    members = _members(clusters, sample, wanted)
    found = []
    for number in wanted:
        of_it = members[:, members[1] == number]
        some = of_it[:, evenly(np.argsort(of_it[2], kind="stable").tolist(), EXAMPLES)]
        found.append(
            Cluster(
                number=int(number),
                size=int(sizes[number]),
                seen=of_it.shape[1],
                taken=int(of_it[3].sum()),
                numbers=[int(image) for image in some[0]],
                chosen=[None if sample is None else bool(chosen) for chosen in some[3]],
            )
        )
    return found


def _members(clusters: Table, sample: Table | None, wanted: Sequence[int]) -> NDArray[np.float64]:
    """Number, cluster, distance and choice, `[4, m]`, of the images looked at that are in these clusters."""
    found = [np.zeros((4, 0))]
    for i in looked_at(clusters):
        rows = read(clusters.parts[i], ["cluster", "distance"])
        cluster = rows["cluster"].fill_null(-1).to_numpy()
        inside = np.flatnonzero(np.isin(cluster, wanted))
        chosen = np.zeros(len(inside))
        if sample is not None:
            chosen = read(sample.parts[i], ["chosen"])["chosen"].fill_null(False).to_numpy()[inside]
        distance = rows["distance"].to_numpy()[inside]
        found.append(np.stack([clusters.parts[i].first + inside, cluster[inside], distance, chosen]))
    return np.concatenate(found, axis=1)


def _sizes(file: Path) -> NDArray[np.int64]:
    """Images in every cluster of level 1."""
    try:
        with safe_open(file, "numpy") as levels:
            sizes: NDArray[np.int64] = levels.get_tensor("sizes.1")
    except (OSError, SafetensorError) as error:
        raise OpsinError(
            f"{shown(file)} is missing or damaged ({error}): remove its folder and cluster again."
        ) from None
    return sizes


@dataclass(frozen=True)
class Look:
    """An image of the table, as it can be shown."""

    place: str
    """Where it lies."""
    width: int | None
    """Pixels from left to right, if ingest could tell."""
    height: int | None
    """Pixels from top to bottom, if ingest could tell."""
    pixels: Tensor | None
    """uint8 `[3, H, W]`, shrunk; None if it cannot be read any more."""
    reason: str | None
    """Why ingest dropped it, or else why it cannot be read any more; None if neither."""


def look(images: Table, numbers: Iterable[int]) -> dict[int, Look]:
    """The images with these numbers, decoded at a small size.

    Args:
        images: the finished table of `ingest`, beside which the listings of its sources lie.
        numbers: of images.
    """
    rows = rows_of(images, numbers, ["source", "index", "path", "width", "height", "reason"])
    sources = read_step(images.path)["facts"]["sources"]
    opened: dict[int, Source | str] = {}
    for place in sorted({row["source"] for row in rows.values()}):
        try:
            opened[place] = scan(sources[place]["spec"], images.path / LISTING, progress=False)
        except OpsinError as error:
            opened[place] = str(error)
    with ThreadPoolExecutor(4) as pool:  # each may hold a whole image
        looks = pool.map(lambda row: _look(row, opened[row["source"]]), rows.values())
        return dict(zip(rows, looks, strict=True))


def rows_of(table: Table, numbers: Iterable[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Some columns of the images with these numbers, in the numbers' order; only their parts are read."""
    return dict(_rows_of(table, sorted(set(numbers)), columns))


def _rows_of(table: Table, numbers: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    starts = [part.first for part in table.parts]
    by_part: dict[int, list[int]] = {}
    for number in numbers:
        by_part.setdefault(bisect_right(starts, number) - 1, []).append(number)
    for i, held in by_part.items():
        first = table.parts[i].first
        rows: pa.Table = read(table.parts[i], columns).take([number - first for number in held])
        yield from zip(held, rows.to_pylist(), strict=True)


def _look(row: Mapping[str, Any], source: Source | str) -> Look:
    pixels, reason = None, None
    if isinstance(source, str):
        reason = source
    else:
        try:
            if row["index"] < len(source) and shown(source.place(row["index"])) == row["path"]:
                whole, _ = decode_reduced(source.open(row["index"]), partial(reduction_to, SIDE))
                pixels = shrunk(eight_bits(whole), SIDE)
            else:
                reason = "its source has changed"
        except DecodeError as error:
            reason = error.reason
        except OpsinError as error:  # the connection is lost, or a shard is damaged
            reason = str(error)
    return Look(row["path"], row["width"], row["height"], pixels, row["reason"] or reason)
