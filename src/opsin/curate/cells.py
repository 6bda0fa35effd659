"""Vectors sorted by cell: what neighbour search and the splitting of large clusters read.

The vectors of one or several tables, one table's numbers after the other's, are assigned to the nearest of some
centroids and written cell after cell (an external sort: every part sorted by itself, then gathered bucket by bucket).
No more than a part or a bucket is in memory. A cell of any size is read in pieces. Rows have one size, so a piece is
found by its offset: these scratch files are .npy, in fp16; what steps hand to each other is Parquet.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.curate.engine import Engine, Task
from opsin.curate.kmeans import assign, lloyd
from opsin.curate.tables import Part, Table, read, tasks_of
from opsin.curate.vectors import Column, read_vectors, read_whitening, width
from opsin.data.rng import Stream, uniform
from opsin.errors import OpsinError
from opsin.output import make_folder, write

Numbers = NDArray[np.int64]

SEEN_PER_CELL = 48
"""Vectors per cell from which centroids are found: k-means on more gains nothing for a partition."""
EXACT_BELOW = 100_000
"""Vectors up to which a search compares all with all."""
PROBES = 16
"""Cells that a search looks into for the vectors of a cell, where it does not."""
ITERATIONS = 8
"""Of the k-means that finds them."""


@dataclass(frozen=True)
class VectorSet:
    """A table of vectors, as it goes into cells."""

    vectors: Table
    """The table."""
    column: Column
    """Which of its columns, and how it is read."""
    kept: Table | None = None
    """An aligned table whose boolean column `kept` says which rows count; None: all that have a vector."""


class Cells:
    """Vectors in the order of their cells; a position is a place in that order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about: dict[str, Any] = json.loads((folder / "cells.json").read_text())
        self.dimensions: int = about["dimensions"]
        """D."""
        self._written = _written(folder / "cells.json")
        self.buckets: list[int] = about["buckets"]
        """First position of every bucket, a file; and the number of vectors."""

    @property
    def count(self) -> int:
        """Vectors."""
        return self.buckets[-1]

    @cached_property
    def offsets(self) -> Numbers:
        """Position of the first vector of every cell, and at the end their number: `[cells + 1]`."""
        return np.asarray(np.load(self.folder / "offsets.npy"))

    @cached_property
    def centroids(self) -> Tensor | None:
        """`[cells, D]`; None if cells are no more than successive vectors."""
        file = self.folder / "centroids.npy"
        return torch.from_numpy(np.load(file)) if file.exists() else None

    def read(self, start: int, stop: int) -> tuple[Tensor, Numbers]:
        """The vectors at positions `start` … `stop` - 1, `[m, D]` in fp32, and their numbers `[m]`."""
        vectors, numbers = list[NDArray[Any]](), list[NDArray[Any]]()
        bucket = int(np.searchsorted(self.buckets, start, side="right")) - 1
        while start < stop:
            first, end = self.buckets[bucket], self.buckets[bucket + 1]
            here = slice(start - first, min(stop, end) - first)
            vectors.append(_mapped(self.folder / f"vectors-{bucket:06d}.npy", self._written)[here])
            numbers.append(_mapped(self.folder / f"numbers-{bucket:06d}.npy", self._written)[here])
            start, bucket = min(stop, end), bucket + 1
        return torch.from_numpy(np.concatenate(vectors)).float(), np.concatenate(numbers)


def _written(file: Path) -> tuple[int, int]:
    """Tells a file from one that takes its place later: what is cached in a process must not outlive its file."""
    about = file.stat()
    return about.st_ino, about.st_mtime_ns


@lru_cache(maxsize=512)
def _mapped(file: Path, written: tuple[int, int]) -> NDArray[Any]:  # noqa: ARG001 (part of the key)
    mapped: NDArray[Any] = np.load(file, mmap_mode="r")
    return mapped


def open_cells(folder: Path) -> Cells:
    """`Cells`, opened once in a process."""
    return _opened(folder, _written(folder / "cells.json"))


@lru_cache(maxsize=8)
def _opened(folder: Path, written: tuple[int, int]) -> Cells:  # noqa: ARG001 (part of the key)
    return Cells(folder)


def cells_for(vectors: int, exact_below: int, given: int | None) -> int:
    """How many cells so many vectors are sorted into: 0 where a search is exact, else those given, or about √n.

    With √n cells, a cell has √n vectors: products of matrices are large, and finding cells costs as much as searching.
    """
    return 0 if vectors <= exact_below else given or round(vectors**0.5)


def build_cells(
    engine: Engine, heaps: Sequence[VectorSet], folder: Path, *, cells: int, like: Cells | None = None, seed: int = 0
) -> Cells:
    """Sort the vectors of `heaps` by cell into `folder`; what is there already is not done again.

    Args:
        engine: where it runs.
        heaps: tables of vectors of one width; numbers go on from one to the next.
        folder: where the cells are written.
        cells: how many, at most; 0 for cells of successive vectors, without centroids.
        like: use the centroids of these cells instead of finding some.
        seed: of the k-means.

    Raises:
        OpsinError: vectors differ in width, are not finite, or there are none.
    """
    if (folder / "cells.json").exists():
        return open_cells(folder)
    widths = [width(heap.vectors, heap.column.name) for heap in heaps]
    dimensions, file = _dimensions(heaps[0].column, widths[0]), folder / "centroids.npy"
    if like is not None and like.dimensions != dimensions:
        widths = [like.dimensions, dimensions]
    if len({*widths}) > 1:
        raise OpsinError(
            f"vectors of {' and '.join(map(str, dict.fromkeys(widths)))} numbers cannot be compared: embed all sets "
            "with one network."
        )
    plan = json.dumps({"memory": engine.bytes, "cells": cells, "seed": seed})
    if (folder / "plan.json").exists() and (folder / "plan.json").read_text() != plan:
        shutil.rmtree(folder)  # of a run that was stopped and had cut its tasks otherwise
    write(make_folder(folder) / "plan.json", plan)
    if like is not None and like.centroids is not None:
        _save(file, like.centroids.numpy())
    elif cells and not file.exists():
        seen = _sample(engine, heaps, dimensions, cells * SEEN_PER_CELL, seed)
        different = len({hash(vector.tobytes()) for vector in seen.numpy()})
        _save(file, _side_by_side(lloyd(seen, min(cells, different), ITERATIONS, seed).centroids, seed))
    tasks: list[Task] = []
    first = 0
    for heap in heaps:
        rows = [part.rows for part in heap.vectors.parts]
        # a part in fp32 and fp16, sorted, and its products with the centroids, which `assign` cuts to size
        pieces = tasks_of(range(len(rows)), rows, engine.bytes // (16 * dimensions))
        tasks += [{"heap": heaps.index(heap), "parts": parts, "first": first} for parts in pieces]
        first += heap.vectors.rows
    left = [i for i in range(len(tasks)) if not (folder / f"counts-{i:06d}.npy").exists()]
    sort = _Sort(tuple(heaps), folder, dimensions)
    done = engine.run("sorting vectors", sort, [{**tasks[i], "out": i} for i in left], total=first, unit="vectors")
    for _ in done:
        pass
    return _gather(engine, folder, len(tasks), dimensions)


def _gather(engine: Engine, folder: Path, sorted_files: int, dimensions: int) -> Cells:
    """From every task's file sorted by itself to buckets sorted together."""
    counts = [np.load(folder / f"counts-{i:06d}.npy") for i in range(sorted_files)]
    number = int(max((pairs[0].max(initial=-1) for pairs in counts), default=-1)) + 1
    centroids = folder / "centroids.npy"
    number = max(number, len(np.load(centroids, mmap_mode="r")) if centroids.exists() else 0)
    sizes = np.zeros(number, np.int64)
    for found, held in counts:
        sizes[found] += held
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    total = int(offsets[-1])
    if not total:
        raise OpsinError("there are no vectors to compare: all images were dropped before, or have none.")
    most = max(1, engine.bytes // (8 * dimensions))  # in fp16, once as read and once in order, with room to spare
    starts = [*range(0, total, most), total]
    starts = sorted({_near(offsets, start, most) for start in starts[:-1]} | {0, total})
    tasks = [
        {"bucket": b, "start": starts[b], "stop": starts[b + 1], "files": sorted_files}
        for b in range(len(starts) - 1)
        if not (folder / f"numbers-{b:06d}.npy").exists()
    ]
    _save(folder / "offsets.npy", offsets)
    for _ in engine.run("gathering cells", _Gather(folder), tasks, total=total, unit="vectors"):
        pass
    write(folder / "cells.json", json.dumps({"dimensions": dimensions, "buckets": starts}))
    for i in range(sorted_files):
        for kind in ("sorted", "rows", "counts"):
            (folder / f"{kind}-{i:06d}.npy").unlink(missing_ok=True)
    return open_cells(folder)


def _near(offsets: Numbers, position: int, most: int) -> int:
    """The cell boundary before a position, or the position itself inside a cell larger than a quarter of a bucket."""
    boundary = int(offsets[np.searchsorted(offsets, position, side="right") - 1])
    return boundary if position - boundary < most // 4 else position


@dataclass(frozen=True)
class _Sort:
    """Assign the vectors of some parts, and write them in the order of their cells."""

    heaps: tuple[VectorSet, ...]
    folder: Path
    dimensions: int

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        heap = self.heaps[task["heap"]]
        parts = [heap.vectors.parts[i] for i in task["parts"]]
        found = [_read(heap, i, self.dimensions) for i in task["parts"]]
        vectors = torch.cat([vectors for vectors, _ in found])
        numbers = np.concatenate([rows + part.first for (_, rows), part in zip(found, parts, strict=True)])
        file = self.folder / "centroids.npy"
        if not file.exists():
            cells = np.full(len(numbers), task["out"], np.int64)
        else:
            centroids = _centroids(file, _written(file))
            cells = assign(vectors, centroids, engine.bytes // 4)[0].numpy()
        order = np.argsort(cells, kind="stable")
        name = f"{task['out']:06d}.npy"
        _save(self.folder / f"sorted-{name}", vectors.half().numpy()[order])
        _save(self.folder / f"rows-{name}", numbers[order] + task["first"])
        _save(self.folder / f"counts-{name}", np.stack(np.unique(cells, return_counts=True)))
        return {"done": sum(part.rows for part in parts)}


@dataclass(frozen=True)
class _Gather:
    """Write the vectors at successive positions."""

    folder: Path

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:  # noqa: ARG002
        start, stop = task["start"], task["stop"]
        offsets = np.load(self.folder / "offsets.npy")
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, stop, side="left"))  # cells first … last - 1
        taken = offsets[first:last].copy()  # the next position of every cell, file after file
        vectors, numbers, places = [], [], []
        for i in range(task["files"]):
            cells, held = np.load(self.folder / f"counts-{i:06d}.npy")
            at = np.concatenate([[0], np.cumsum(held)])
            here = slice(*np.searchsorted(cells, [first, last]))
            rows = slice(at[here.start], at[here.stop])
            within = np.arange(rows.stop - rows.start) - np.repeat(at[here] - rows.start, held[here])
            position = np.repeat(taken[cells[here] - first], held[here]) + within
            taken[cells[here] - first] += held[here]
            wanted = np.flatnonzero((position >= start) & (position < stop))
            if len(wanted):
                span = slice(rows.start + wanted[0], rows.start + wanted[-1] + 1)
                inside = wanted - wanted[0]
                vectors.append(np.load(self.folder / f"sorted-{i:06d}.npy", mmap_mode="r")[span][inside])
                numbers.append(np.load(self.folder / f"rows-{i:06d}.npy", mmap_mode="r")[span][inside])
                places.append(position[wanted] - start)
        order = np.argsort(np.concatenate(places))
        name = f"{task['bucket']:06d}.npy"
        _save(self.folder / f"vectors-{name}", np.concatenate(vectors)[order])
        _save(self.folder / f"numbers-{name}", np.concatenate(numbers)[order])
        return {"done": stop - start}


def _side_by_side(centroids: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """The centroids in an order in which near ones tend to follow each other: cells read together lie together."""
    groups = max(1, round(len(centroids) ** 0.5))
    points = torch.from_numpy(centroids)
    middles = torch.from_numpy(lloyd(points, groups, ITERATIONS, seed).centroids)
    left, path = list(range(1, groups)), [0]
    while left:  # from each group to the nearest that is left
        nearest = int((middles[left] - middles[path[-1]]).square().sum(1).argmin())
        path.append(left.pop(nearest))
    place = np.empty(groups, np.int64)
    place[path] = np.arange(groups)
    return centroids[np.argsort(place[assign(points, middles)[0].numpy()], kind="stable")]


def _sample(engine: Engine, heaps: Sequence[VectorSet], dimensions: int, wanted: int, seed: int) -> Tensor:
    """About so many vectors `[m, D]`, from many parts of all heaps, as far as memory allows."""
    wanted = min(wanted, engine.bytes // (12 * dimensions))
    parts = [(heap, i) for heap in heaps for i in range(len(heap.vectors.parts))]
    rows = sum(heap.vectors.rows for heap in heaps)
    keys = uniform(seed, Stream.CURATION, np.arange(len(parts)), 1)[:, 0]
    share = min(1.0, wanted / rows * max(1.0, len(parts) / 256))  # of a part, of at most some 256 parts
    seen: list[Tensor] = []
    for place in np.argsort(keys, kind="stable"):
        heap, i = parts[place]
        vectors, numbers = _read(heap, i, dimensions)
        chosen = uniform(seed + 1, Stream.CURATION, numbers + heap.vectors.parts[i].first, 1)[:, 0] < share
        seen.append(vectors[torch.from_numpy(chosen)])
        if sum(map(len, seen)) >= wanted:
            break
    found = torch.cat(seen)[:wanted]
    if not len(found):
        raise OpsinError("there are no vectors to compare: all images were dropped before, or have none.")
    return found


def _read(heap: VectorSet, number: int, dimensions: int) -> tuple[Tensor, Numbers]:
    """The vectors of a part that count, and their rows in it."""
    part: Part = heap.vectors.parts[number]
    raw = dimensions if heap.column.whitening is None else len(read_whitening(heap.column.whitening)[0])
    vectors, rows = read_vectors(part, heap.column, raw)
    if heap.kept is None:
        return vectors, rows
    kept = read(heap.kept.parts[number], ["kept"])["kept"].to_numpy()[rows]
    return vectors[torch.from_numpy(kept)], rows[kept]


def _dimensions(column: Column, raw: int) -> int:
    """Of vectors of `raw` numbers, once they are whitened."""
    return raw if column.whitening is None else int(read_whitening(column.whitening)[1].shape[1])


@lru_cache(maxsize=2)
def _centroids(file: Path, written: tuple[int, int]) -> Tensor:  # noqa: ARG001 (part of the key)
    return torch.from_numpy(np.load(file))


def _save(file: Path, array: NDArray[Any]) -> None:
    """Whole or not at all."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as out:
        np.save(out, array)
    partial.replace(file)
