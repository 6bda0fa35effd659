"""Splitting each cluster of a k-means by itself into a few: millions of clusters for the price of two small k-means.

The members of a cluster are scattered over the table. One pass over it writes them, put together by ranges of clusters
that fit into memory, and a task then splits the clusters of a range.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsin.curate.engine import Engine, Task
from opsin.curate.groups import Floats, Integers, passes
from opsin.curate.kmeans import Precision, assign, lloyd, save_arrays
from opsin.curate.streaming import Points, load
from opsin.curate.tables import tasks_of
from opsin.data.rng import Stream, uniform


def split(
    engine: Engine,
    points: Points,
    coarse: Path,
    scratch: Path,
    *,
    pieces: int,
    drawn: int,
    iterations: int,
    precision: Precision,
    seed: int,
) -> Path:
    """Split each cluster.

    Args:
        engine: runs it.
        points: what was clustered.
        coarse: file of the centroids of the clusters to split.
        scratch: folder for files.
        pieces: into how many each is split; into as many as it has different images, if those are fewer.
        drawn: images of a cluster by which it is split, about so many at most.
        iterations: of k-means, at most.
        precision: of its products.
        seed: of what is random.

    Returns:
        File of the centroids of all pieces, cluster by cluster, and of where those of each begin, `starts` `[k + 1]`.
    """
    whole = scratch / "split.npz"
    if whole.exists():
        return whole
    rows = [part.rows for part in points.parts]
    k = len(load(coarse))
    most = engine.bytes // (16 * points.dimensions)  # vectors as read, and cut into ranges
    tasks = tasks_of(range(len(rows)), rows, most)
    labelling: list[Task] = [{"parts": parts} for parts in tasks]
    sizes = np.zeros(k, dtype=np.int64)
    for _ in engine.run("assign to clusters to split", _Label(points, coarse, scratch), labelling, total=sum(rows)):
        pass
    for number in range(len(rows)):
        sizes += np.bincount(load(_labels(scratch, number), "labels"), minlength=k)
    shares = np.minimum(1, drawn / np.maximum(sizes, 1))
    # Of random draws about so many; the vectors, of a cluster's copies and what k-means makes of them.
    ranges = passes(np.minimum(sizes, drawn), engine.bytes // 2, 12 * points.dimensions)
    edges = np.array([0, *(some.stop for some in ranges)])
    scatter = _Scatter(points, shares, edges, scratch, seed)
    scattering: list[Task] = [{"parts": parts, "number": number} for number, parts in enumerate(tasks)]
    for _ in engine.run("gather clusters to split", scatter, scattering, total=sum(rows)):
        pass
    work = _Split(pieces, iterations, precision, seed, scratch)
    splitting: list[Task] = [
        {
            "first": some.start,
            "stop": some.stop,
            "from": [str(_members(scratch, number, task)) for task in range(len(tasks))],
            "file": str(scratch / f"split-{some.start}-{some.stop}.npz"),
        }
        for number, some in enumerate(ranges)
    ]
    for _ in engine.run("split clusters", work, splitting, total=k, unit="clusters"):
        pass
    files = [Path(task["file"]) for task in splitting]
    starts = np.concatenate([[0], np.cumsum(np.concatenate([load(file, "counts") for file in files]))])
    save_arrays(whole, centroids=np.concatenate([load(file) for file in files]), starts=starts)
    return whole


def assign_split(
    vectors: Tensor, centroids: Tensor, pieces: Path, number: int, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """As `opsin.curate.kmeans.assign`, to the nearest piece of the cluster that was split.

    Args:
        vectors: of a part, `[m, D]`.
        centroids: of all pieces, `[k, D]`.
        pieces: what `split` returned: the file that also says which of them are whose.
        number: of the part.
        chunk_bytes: as in `assign`.
    """
    labels = load(_labels(pieces.parent, number), "labels")
    starts = load(pieces, "starts")
    found = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    distance = torch.empty(len(vectors), device=vectors.device)
    order = np.argsort(labels, kind="stable")
    there, first = np.unique(labels[order], return_index=True)
    for cluster, rows in zip(there, np.split(order, first[1:]), strict=True):
        at = torch.from_numpy(rows).to(vectors.device)
        start, stop = int(starts[cluster]), int(starts[cluster + 1])
        piece, distance[at] = assign(vectors[at], centroids[start:stop], chunk_bytes)
        found[at] = piece + start
    return found, distance


def _labels(scratch: Path, number: int) -> Path:
    """File of the clusters of a part's images."""
    return scratch / f"labels-{number:08d}.npz"


def _members(scratch: Path, number: int, task: int) -> Path:
    """File of the images of a range of clusters that are in a task's parts."""
    return scratch / f"members-{number}-{task}.npz"


@dataclass(frozen=True)
class _Label:
    """Task: write which cluster the images of some parts are in."""

    points: Points
    coarse: Path
    scratch: Path

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        centroids = torch.from_numpy(load(self.coarse)).to(engine.device)
        for i in task["parts"]:
            file = _labels(self.scratch, i)
            if not file.exists():
                labels, _ = assign(self.points.read(i)[0].to(engine.device), centroids, engine.bytes // 4)
                save_arrays(file, labels=labels.cpu().numpy())
        return {"done": self.points.rows(task["parts"])}


@dataclass(frozen=True)
class _Scatter:
    """Task: write the vectors of some parts' images, one file for each range of clusters."""

    points: Points
    shares: Floats
    """Of the images of each cluster that are written."""
    edges: Integers
    """Where the ranges begin, and where the last ends."""
    scratch: Path
    seed: int

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:  # noqa: ARG002 (tasks are cut to fit)
        vectors, labels = [], []
        for i in task["parts"]:
            some, rows = self.points.read(i)
            label = load(_labels(self.scratch, i), "labels")
            lot = uniform(self.seed, Stream.CURATION, self.points.parts[i].first + rows, 1)[:, 0]
            drawn = lot < self.shares[label]
            vectors.append(some.numpy()[drawn])
            labels.append(label[drawn])
        vector, label = np.concatenate(vectors), np.concatenate(labels)
        order = np.argsort(label, kind="stable")
        cuts = np.searchsorted(label[order], self.edges)
        for number, (start, stop) in enumerate(pairwise(cuts)):
            rows = order[start:stop]
            save_arrays(_members(self.scratch, number, task["number"]), vectors=vector[rows], labels=label[rows])
        return {"done": self.points.rows(task["parts"])}


@dataclass(frozen=True)
class _Split:
    """Task: split the clusters of a range."""

    pieces: int
    iterations: int
    precision: Precision
    seed: int
    scratch: Path

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        file = Path(task["file"])
        done = task["stop"] - task["first"]
        if file.exists():
            return {"done": done}
        vectors = np.concatenate([load(Path(name), "vectors") for name in task["from"]])
        labels = np.concatenate([load(Path(name), "labels") for name in task["from"]])
        order = np.argsort(labels, kind="stable")
        cuts = np.searchsorted(labels[order], np.arange(task["first"], task["stop"] + 1))
        found = []
        for cluster, (start, stop) in enumerate(pairwise(cuts), start=task["first"]):
            members = vectors[order[start:stop]]
            pieces = min(self.pieces, len(np.unique(members, axis=0)))
            if pieces:
                split = lloyd(
                    torch.from_numpy(members).to(engine.device),
                    pieces,
                    self.iterations,
                    self.seed + (1 << 40) + cluster,
                    chunk_bytes=engine.bytes // 4,
                    precision=self.precision,
                )
                found.append(split.centroids)
            else:
                found.append(np.empty((0, vectors.shape[1]), dtype=np.float32))
        save_arrays(file, centroids=np.concatenate(found), counts=np.array([len(each) for each in found]))
        return {"done": done}
