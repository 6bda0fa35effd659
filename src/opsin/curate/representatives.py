"""Which image of a component stays: the largest, then the sharpest, then the one with the smallest hash of its path."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.curate.components import Components
from opsin.curate.tables import Part, Table, read

Numbers = NDArray[np.int64]


class Representatives:
    """The best image and the number of images of every component, on disk and updated part by part."""

    def __init__(self, scratch: Path, components: Components, considered: NDArray[np.bool_], images: Table | None):
        """Visit all images.

        Args:
            scratch: folder for the files, one value per image each.
            components: whose images are compared.
            considered: `[images]`, which of them count.
            images: size, sharpness and path of each; without it the smallest number stays.
        """
        self._components, nodes = components, components.nodes
        self._size = _file(scratch / "sizes.npy", np.int32, nodes)
        self._best = _file(scratch / "best.npy", np.int64, nodes)
        self._best[:] = -1
        step = 1 << 20
        for start in range(0, nodes, step):
            numbers = start + np.flatnonzero(considered[start : start + step])
            roots, counts = np.unique(components.of(numbers), return_counts=True)
            self._size[roots] += counts.astype(np.int32)
        if images is None:
            for start in reversed(range(0, nodes, step)):
                numbers = start + np.flatnonzero(considered[start : start + step])
                self._best[components.of(numbers[::-1])] = numbers[::-1]  # the smallest is written last
            return
        rank = [
            _file(scratch / f"rank-{i}.npy", kind, nodes) for i, kind in enumerate((np.int64, np.float32, np.uint64))
        ]
        for part in images.parts:
            numbers = part.first + np.flatnonzero(considered[part.first : part.first + part.rows])
            roots = components.of(numbers)
            several = self._size[roots] > 1
            self._best[roots[~several]] = numbers[~several]
            numbers, roots = numbers[several], roots[several]
            if len(numbers):
                self._compare(numbers, roots, _ranks(part, numbers - part.first), rank)

    def _compare(self, numbers: Numbers, roots: Numbers, ranks: list[NDArray[Any]], best: list[NDArray[Any]]) -> None:
        """Let the images of a part compete with those that led before; lower ranks win."""
        order = np.lexsort((numbers, *reversed(ranks), roots))
        first = order[np.concatenate([[True], np.diff(roots[order]) != 0])]  # the best of every component in this part
        roots, numbers, ranks = roots[first], numbers[first], [rank[first] for rank in ranks]
        better = np.zeros(len(roots), bool)
        tied = np.ones(len(roots), bool)
        for mine, leading in zip(ranks, best, strict=True):
            better |= tied & (mine < leading[roots])
            tied &= mine == leading[roots]
        better |= self._best[roots] < 0
        self._best[roots[better]] = numbers[better]
        for mine, leading in zip(ranks, best, strict=True):
            leading[roots[better]] = mine[better]

    def of(self, numbers: Numbers) -> Numbers:
        """The representative of each image's component."""
        return np.array(self._best[self._components.of(numbers)])

    def sizes(self, numbers: Numbers) -> NDArray[np.int32]:
        """How many images each image's component has."""
        return np.array(self._size[self._components.of(numbers)])

    def largest(self, count: int) -> Numbers:
        """The representatives of the largest components that have two images or more."""
        sizes = np.asarray(self._size)
        several = np.flatnonzero(sizes > 1)
        order = several[np.lexsort((several, -sizes[several]))[:count]]
        return np.array(self._best[order])


def _ranks(part: Part, rows: Numbers) -> list[NDArray[Any]]:
    """Of some rows of a part, by what the best is chosen: the lowest first."""
    columns = read(part, ["width", "height", "sharpness", "path"]).take(rows)
    area = columns["width"].to_numpy().astype(np.int64) * columns["height"].to_numpy()
    paths = [hashlib.sha256(path.encode()).digest()[:8] for path in columns["path"].to_pylist()]
    return [
        -area,
        -columns["sharpness"].to_numpy(),
        np.frombuffer(b"".join(paths), dtype=">u8").astype(np.uint64),
    ]


def _file(path: Path, kind: Any, rows: int) -> NDArray[Any]:
    found: NDArray[Any] = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(rows,))
    return found
