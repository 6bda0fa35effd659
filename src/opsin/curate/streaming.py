"""k-means of the vectors of a table that are never all in memory: every iteration reads them once, part by part."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.curate.engine import Engine, Task, in_order
from opsin.curate.kmeans import Precision, Statistics, improve, save_array, save_arrays, seed_centroids, statistics_of
from opsin.curate.tables import Part, read
from opsin.curate.vectors import Column, read_vectors
from opsin.data.rng import Stream, uniform

DRAWN: Final = 10
"""Images per cluster, at least, among which the first centroids are chosen."""


@dataclass(frozen=True)
class Points:
    """The vectors of a table that are clustered, part by part, in a form that is read in no time."""

    parts: tuple[Part, ...]
    kept: tuple[Part, ...] | None
    column: str
    dimensions: int
    scratch: Path
    """Holds them in fp32 while the step runs: 4 D bytes per image."""

    def rows(self, numbers: Iterable[int]) -> int:
        """Rows of some parts."""
        return sum(self.parts[number].rows for number in numbers)

    def read(self, number: int) -> tuple[Tensor, NDArray[np.int64]]:
        """Vectors of a part, `[m, D]`, and the rows in it that have them, `[m]`; once `store` has written them."""
        return torch.from_numpy(np.load(self._file("vectors", number))), np.load(self._file("rows", number))

    def store(self, number: int) -> int:
        """Write what `read` returns of a part, and return how many vectors that is.

        Decoding a part of a Parquet table takes as long as assigning it to a thousand centroids, and every iteration
        reads all parts.
        """
        files = [self._file(name, number) for name in ("vectors", "rows")]
        if not all(file.exists() for file in files):
            vectors, rows = read_vectors(self.parts[number], Column(self.column), self.dimensions)
            if self.kept is not None:
                stays = read(self.kept[number], ["kept"])["kept"].to_numpy()[rows]
                vectors, rows = vectors[torch.from_numpy(stays)], rows[stays]
            for file, array in zip(files, (vectors.numpy(), rows), strict=True):
                save_array(file, array)
        return len(np.load(files[1], mmap_mode="r"))

    def _file(self, name: str, number: int) -> Path:
        return self.scratch / f"{name}-{number:08d}.npy"


def load(path: Path, name: str = "centroids") -> NDArray[Any]:
    """An array of a file of `save_arrays`."""
    with np.load(path) as kept:
        array: NDArray[Any] = kept[name]
        return array


def store(engine: Engine, points: Points, tasks: list[list[int]], scratch: Path) -> int:
    """Store the points, and return how many images have a vector and are kept."""
    file = scratch / "count.npz"
    if not file.exists():
        rows = sum(part.rows for part in points.parts)
        counting = [{"parts": parts} for parts in tasks]
        found = sum(result["found"] for _, result in engine.run("read vectors", _Store(points), counting, total=rows))
        save_arrays(file, found=found)
    return int(load(file, "found"))


def streamed(
    engine: Engine,
    points: Points,
    tasks: list[list[int]],
    scratch: Path,
    *,
    k: int,
    drawn: float,
    iterations: int,
    precision: Precision,
    seed: int,
) -> Path:
    """k-means over the parts of a table.

    Args:
        engine: runs it.
        points: the table.
        tasks: numbers of its parts, task by task: sums are added up in their order.
        scratch: folder for files; one holds the centroids after every iteration, and the work goes on from it.
        k: clusters.
        drawn: share of the images among which the first centroids are chosen.
        iterations: at most so many.
        precision: of the products.
        seed: of what is random.

    Returns:
        The file of the centroids (see `load`).

    Raises:
        OpsinError: fewer different images than k were drawn.
    """
    keep, now = scratch / "streamed.npz", scratch / "centroids.npz"
    rows = sum(part.rows for part in points.parts)

    def start() -> NDArray[np.float32]:
        files = [str(scratch / f"drawn-{i}.npz") for i in range(len(tasks))]
        drawing = [{"parts": parts, "file": file} for parts, file in zip(tasks, files, strict=True)]
        for _ in engine.run("draw images", _Draw(points, drawn, seed), drawing, total=rows):
            pass
        for _ in engine.run("first centroids", _Seed(k, seed), [{"from": files, "file": str(now)}], unit=""):
            pass
        for file in files:
            Path(file).unlink()
        return load(now)

    def statistics(centroids: NDArray[np.float32], iteration: int) -> Statistics:
        save_arrays(now, centroids=centroids)
        adding = [{"parts": parts, "file": str(scratch / f"sums-{i}.npz")} for i, parts in enumerate(tasks)]
        sums: list[Statistics] = []

        def add(result: dict[str, Any]) -> None:
            path = Path(result["file"])
            found = Statistics(load(path, "sums"), load(path, "counts"), float(load(path, "cost")))
            path.unlink()
            sums[:] = [sums[0] + found] if sums else [found]

        what = f"k-means, iteration {iteration + 1} of {iterations}"
        in_order(engine.run(what, _Add(points, now, precision), adding, total=rows), add)
        return sums[0]

    improve(start, statistics, iterations, keep)
    return keep


@dataclass(frozen=True)
class _Store:
    """Task: store the points of some parts, and count them."""

    points: Points

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:  # noqa: ARG002 (a part at a time)
        found = sum(self.points.store(i) for i in task["parts"])
        return {"found": found, "done": self.points.rows(task["parts"])}


@dataclass(frozen=True)
class _Draw:
    """Task: write the vectors of a random share of some parts' images."""

    points: Points
    share: float
    seed: int

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:  # noqa: ARG002 (a part at a time)
        drawn = []
        for i in task["parts"]:
            vectors, rows = self.points.read(i)
            lot = uniform(self.seed, Stream.CURATION, self.points.parts[i].first + rows, 1)[:, 0]
            drawn.append(vectors[torch.from_numpy(lot < self.share)].numpy())
        save_arrays(Path(task["file"]), vectors=np.concatenate(drawn))
        return {"done": self.points.rows(task["parts"])}


@dataclass(frozen=True)
class _Seed:
    """Task: choose first centroids among drawn vectors."""

    k: int
    seed: int

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        drawn = np.concatenate([load(Path(file), "vectors") for file in task["from"]])
        chosen = seed_centroids(torch.from_numpy(drawn).to(engine.device), self.k, self.seed, engine.bytes // 4)
        save_arrays(Path(task["file"]), centroids=chosen.cpu().numpy())
        return {}


@dataclass(frozen=True)
class _Add:
    """Task: assign the images of some parts to centroids and write what they add up to."""

    points: Points
    centroids: Path
    precision: Precision

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        centroids = torch.from_numpy(load(self.centroids)).to(engine.device)
        total: Statistics | None = None
        for i in task["parts"]:
            vectors, _ = self.points.read(i)
            found = statistics_of(vectors.to(engine.device), centroids, engine.bytes // 4, self.precision)
            total = found if total is None else total + found
        assert total is not None  # a task has parts
        save_arrays(Path(task["file"]), sums=total.sums, counts=total.counts, cost=total.cost)
        return {"file": task["file"], "done": self.points.rows(task["parts"])}
