"""Hierarchical k-means of the vectors of a table: a tree of clusters, from many small ones to a few large ones.

Written from the published description (Vo et al., "Automatic data curation for self-supervised learning", 2405.15613):
level 1 clusters the images; level t clusters the centroids of level t - 1, then again and again only those closest to
their centroids. That evens out how centroids lie: those of one k-means follow the density of the images, so one level
cannot balance them.

Level 1 streams over the parts of the table: every iteration reads all vectors once, from a copy in the step's folder
(4 D bytes per image, gone when the step is done). Levels above are made in memory.
"""

import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from opsin.curate.engine import Engine, Task
from opsin.curate.groups import size_histogram, smallest
from opsin.curate.kmeans import Precision, assign, lloyd, save_arrays
from opsin.curate.sample import LEVELS
from opsin.curate.splitting import assign_split, split
from opsin.curate.streaming import DRAWN, Points, load, store, streamed
from opsin.curate.tables import Step, Table, read, tasks_of, write_part
from opsin.curate.vectors import width
from opsin.data.decode import shown
from opsin.errors import FINITE, SEEDS, OpsinError, within

_ROWS: Final = 2**18
"""Rows of a task, unless its clusters are so many that writing their sums would take longer than making them."""


@dataclass(frozen=True)
class Cluster:
    """How images are clustered."""

    levels: tuple[int, ...] = ()
    """Clusters of each level, from the finest, such as 10000 1000 100; none: see `levels_for`."""
    iterations: int = 20
    """Of k-means, at most."""
    resample: int = 10
    """How often k-means is repeated on the points closest to their centroids; at all levels but the finest."""
    closest: tuple[int, ...] | None = None
    """How many points of a cluster that is, for each level but the finest; None: half the mean size of a cluster."""
    split: int = 1
    """Find the finest level in two steps, for millions of clusters: levels[0] / split clusters, each split by itself
    into so many. 1 for one step."""
    column: str = "semantic"
    """Of the vectors."""
    sample: int = 100_000
    """Images among which the first centroids are chosen, about so many; at least ten per cluster are used."""
    precision: Precision = "fp32"
    """Of the products while centroids move; the clusters of images are always found in fp32."""
    seed: int = 0
    """Of what is random."""

    def __post_init__(self) -> None:
        within(
            self,
            "cluster.",
            levels=(1, 2**31 - 1),
            iterations=(1, 1e6),
            resample=(0, 1e6),
            split=(1, 1e6),
            sample=(1, FINITE),
            seed=SEEDS,
        )
        if any(upper >= lower for lower, upper in pairwise(self.levels)):
            raise OpsinError(
                f"cluster.levels is {self.levels}: give fewer clusters at each level than at the one before."
            )
        if self.levels and self.levels[0] % self.split:
            raise OpsinError(f"cluster.split is {self.split}: give a number that divides {self.levels[0]} clusters.")
        if self.closest is not None:
            within(self, "cluster.", closest=(1, FINITE))
            if len(self.closest) != len(self.levels) - 1:
                raise OpsinError(
                    f"cluster.closest has {len(self.closest)} numbers: give {len(self.levels) - 1}, one for each level "
                    "but the finest, or leave it out."
                )
        if self.precision not in ("fp32", "bf16"):
            raise OpsinError(f"cluster.precision is '{self.precision}': give fp32 or bf16.")


def cluster(engine: Engine, vectors: Table, out: Path, settings: Cluster, kept: Table | None = None) -> dict[str, Any]:
    """Cluster the images that have a vector; of `kept`, if given, only those whose `kept` is true.

    Writes columns `cluster` (int32, of the finest level) and `distance` (float32, squared, to its centroid), one row
    per image, null where it was not clustered; and the tree (see `opsin.curate.sample.LEVELS`).

    Args:
        engine: runs it.
        vectors: a table with a column of vectors.
        out: folder to write.
        settings: see `Cluster`.
        kept: a table with a column `kept`, of the same images.

    Returns:
        `images` that were clustered; `levels`, from the finest: see `opsin.curate.groups.size_histogram`; `cost`: mean
        squared distance of images to their centroids; `seconds` of this command.

    Raises:
        OpsinError: there are fewer images than clusters, a level does not fit into memory, tables do not belong
            together, or a vector is not finite.
    """
    started = time.monotonic()
    dimensions = width(vectors, settings.column)
    inputs = {"vectors": vectors}
    if kept is not None:
        kept.require("kept")
        vectors.aligned(kept)
        inputs["kept"] = kept
    step = Step(out, "cluster", asdict(settings), inputs)
    if step.done:
        return step.facts
    points = Points(
        tuple(vectors.parts),
        None if kept is None else tuple(kept.parts),
        settings.column,
        dimensions,
        step.scratch,
    )
    if not settings.levels:
        settings = replace(settings, levels=levels_for(_kept(kept) if kept is not None else vectors.rows))
    _check_memory(engine, points, settings)
    rows = [part.rows for part in vectors.parts]
    everywhere = tasks_of(range(len(rows)), rows, max(_ROWS, 4 * settings.levels[0] // settings.split))
    images = store(engine, points, everywhere, step.scratch)
    if images < settings.levels[0]:
        raise OpsinError(
            f"{shown(vectors.path)} has {images:,} images to cluster, fewer than the {settings.levels[0]:,} clusters "
            "of the finest level: give smaller --levels, or more images."
        )
    k = settings.levels[0] // settings.split
    chosen = streamed(
        engine,
        points,
        everywhere,
        step.scratch,
        k=k,
        drawn=_drawn(settings, k) / images,
        iterations=settings.iterations,
        precision=settings.precision,
        seed=settings.seed,
    )
    if settings.split > 1:
        chosen = split(
            engine,
            points,
            chosen,
            step.scratch,
            pieces=settings.split,
            drawn=_drawn(settings, settings.split),
            iterations=settings.iterations,
            precision=settings.precision,
            seed=settings.seed,
        )
    missing = step.missing(len(rows))
    tasks = [{"parts": parts} for parts in tasks_of(missing, rows, _ROWS)]
    write = _Write(points, chosen, settings.split > 1, step.folder)
    for _ in engine.run("assign images", write, tasks, total=sum(rows[i] for i in missing)):
        pass
    sizes, cost = _counted([step.part(i) for i in range(len(rows))], len(load(chosen)))
    tree = _tree(engine, chosen, sizes, settings, step.scratch)
    save_file(tree, step.folder / LEVELS)
    return step.finish(
        {
            "images": images,
            "levels": [size_histogram(tree[f"sizes.{level + 1}"]) for level in range(len(settings.levels))],
            "cost": cost / images,
            "seconds": time.monotonic() - started,
        }
    )


def levels_for(images: int) -> tuple[int, ...]:
    """Clusters of each level where none are given: at each further level a tenth as many as at the one before.

    The finest has 25 images to a cluster, or 2,000 clusters, or a hundred images to a cluster, as the heap grows; the
    top level has four or more, unless it is the only one.
    """
    levels = [max(2, min(images // 25, max(2000, images // 100)))]
    while levels[-1] >= 40:
        levels.append(levels[-1] // 10)
    return tuple(levels)


def _kept(table: Table) -> int:
    return sum(int(np.count_nonzero(read(part, ["kept"])["kept"].to_numpy())) for part in table.parts)


def _counted(files: list[Path], k: int) -> tuple[NDArray[np.int64], float]:
    """Images of each cluster, and the sum of their distances, from the parts that were written."""
    sizes = np.zeros(k, dtype=np.int64)
    cost = 0.0
    for part in (part for file in files for part in Table(file).parts):
        table = read(part, ["cluster", "distance"])
        sizes += np.bincount(table["cluster"].drop_null().to_numpy(), minlength=k)
        cost += float(table["distance"].drop_null().to_numpy().sum(dtype=np.float64))
    return sizes, cost


def _tree(
    engine: Engine, finest: Path, sizes: NDArray[np.int64], settings: Cluster, scratch: Path
) -> dict[str, NDArray[Any]]:
    """The levels above the finest, and all levels as they are written (see `opsin.curate.sample.LEVELS`)."""
    below = finest
    tree: dict[str, NDArray[Any]] = {"centroids.1": load(finest), "sizes.1": sizes}
    for level in range(2, len(settings.levels) + 1):
        file = scratch / f"level-{level}.npz"
        if not file.exists():
            task = {"level": level, "below": str(below), "file": str(file)}
            for _ in engine.run(f"level {level}", _Level(settings), [task], unit=""):
                pass
        parents = load(file, "parents")
        sizes = np.bincount(parents, weights=sizes, minlength=settings.levels[level - 1]).astype(np.int64)
        tree |= {f"parents.{level - 1}": parents, f"centroids.{level}": load(file), f"sizes.{level}": sizes}
        below = file
    return tree


def _drawn(settings: Cluster, k: int) -> int:
    """Images among which the first centroids of k clusters are chosen."""
    return max(settings.sample, DRAWN * k)


def _check_memory(engine: Engine, points: Points, settings: Cluster) -> None:
    """Raise an OpsinError if something does not fit into the memory of a task."""
    number = points.dimensions * 4
    k = settings.levels[0] // settings.split
    drawn = _drawn(settings, max(k, settings.split))
    needs = {
        "reading the largest row group of the vectors": 3 * number * max(part.rows for part in points.parts),
        f"choosing first centroids among {drawn:,} images": (number + 64) * drawn,
        f"adding up {k:,} clusters": 6 * number * k,
    }
    for level, (below, above) in enumerate(pairwise(settings.levels), start=2):
        needs[f"clustering {below:,} centroids at level {level}"] = 2 * number * below + 6 * number * above
    what, most = max(needs.items(), key=lambda need: need[1])
    if most > engine.bytes:
        raise OpsinError(
            f"{what} takes {most / 1e9:.1f} GB, more than the {engine.memory:g} GB of a task: give more --memory, "
            "fewer clusters, a smaller --sample, or a table of smaller row groups."
        )


@dataclass(frozen=True)
class _Write:
    """Task: assign the images of some parts and write their parts of the step's table."""

    points: Points
    centroids: Path
    split: bool
    folder: Path

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        centroids = torch.from_numpy(load(self.centroids)).to(engine.device)
        for i in task["parts"]:
            vectors, rows = self.points.read(i)
            vectors = vectors.to(engine.device)
            if self.split:
                found = assign_split(vectors, centroids, self.centroids, i, engine.bytes // 4)
            else:
                found = assign(vectors, centroids, engine.bytes // 4)
            missing = np.ones(self.points.parts[i].rows, dtype=bool)
            missing[rows] = False
            columns = {}
            for name, values, kind in zip(("cluster", "distance"), found, (np.int32, np.float32), strict=True):
                full = np.zeros(len(missing), dtype=kind)
                full[rows] = values.cpu().numpy()
                columns[name] = pa.array(full, mask=missing)
            write_part(self.folder / f"part-{i:08d}.parquet", pa.table(columns))
        return {"done": self.points.rows(task["parts"])}


@dataclass(frozen=True)
class _Level:
    """Task: cluster the centroids of the level below, with resampling."""

    settings: Cluster

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        settings, level, file = self.settings, task["level"], Path(task["file"])
        points = torch.from_numpy(load(Path(task["below"]))).to(engine.device)
        k = settings.levels[level - 1]
        closest = max(1, round(len(points) / k / 2)) if settings.closest is None else settings.closest[level - 2]
        some = points
        for turn in range(settings.resample + 1):
            found = lloyd(
                some,
                k,
                settings.iterations,
                settings.seed + (level << 40) + turn,
                chunk_bytes=engine.bytes // 4,
                precision=settings.precision,
                keep=file.with_name(f"level-{level}-turn-{turn}.npz"),
            )
            centroids = torch.from_numpy(found.centroids).to(engine.device)
            parents, distance = (each.cpu().numpy() for each in assign(points, centroids, engine.bytes // 4))
            near = _closest(parents, distance, k, closest, engine.bytes // 4)
            if len(near) < k:  # empty clusters: fewer points than k-means can start with
                break
            some = points[torch.from_numpy(near).to(engine.device)]
        save_arrays(file, centroids=found.centroids, parents=parents)
        return {}


def _closest(cluster: NDArray[Any], distance: NDArray[Any], k: int, count: int, memory: int) -> NDArray[np.int64]:
    """Numbers of the points of each of k clusters that are closest to its centroid, at most `count` in each."""
    rows = (cluster, distance, np.arange(len(cluster)))
    return smallest(lambda: [rows], np.full(k, count), memory)
