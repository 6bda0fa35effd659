"""Euclidean k-means in torch: seeding, assignment, sums, and a Lloyd loop over whatever holds the points.

The same numbers come out of the same points in the same pieces on every run: sums are added in a fixed order, ties go
to the lowest cluster, and random numbers are keyed. The loop asks a function for the sums of an assignment, so it
serves points in memory (`lloyd`) and points that are read part by part (opsin.curate.cluster).
"""

import heapq
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.data.decode import shown
from opsin.data.rng import Stream, uniform
from opsin.errors import OpsinError

Precision = Literal["fp32", "bf16"]
"""Of the products in the iterations: bf16 rounds points, centroids and, on CPUs, products to 8 bits of mantissa."""

CHUNK: Final = 2**28
"""Bytes of products at a time, unless told otherwise."""

_BLOCK: Final = {"cpu": (2**20, 1024), "cuda": (2**27, 8192)}
"""Products at a time, and centroids among them, that a device multiplies and compares fastest (a CPU: in its cache)."""

_GROWTH: Final = 0.25
"""Share by which a round of seeding raises the number of centroids."""

_APART: Final = 1 / 1024
"""How far, relative to its length, the copy of a centroid that takes the place of an empty one lies from it."""


@dataclass(frozen=True)
class Statistics:
    """What an assignment of points to k centroids adds up to."""

    sums: NDArray[np.float64]
    """Of the points of each cluster, `[k, D]`."""
    counts: NDArray[np.int64]
    """Points of each cluster, `[k]`."""
    cost: float
    """Sum of the squared distances of all points to their centroids."""

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(self.sums + other.sums, self.counts + other.counts, self.cost + other.cost)


@dataclass(frozen=True)
class Centroids:
    """What k-means found."""

    centroids: NDArray[np.float32]
    """`[k, D]`."""
    cost: float
    """Sum of the squared distances to the centroids before the last update; infinite if there was none."""
    iterations: int
    """Updates that were made."""


def assign(
    points: Tensor, centroids: Tensor, chunk_bytes: int = CHUNK, precision: Precision = "fp32"
) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every point.

    Args:
        points: `[m, D]` in fp32, on any device.
        centroids: `[k, D]` in fp32, on that device.
        chunk_bytes: memory for products; at most so many are held at a time.
        precision: of the products.

    Returns:
        Number of the centroid (int64, `[m]`; the lowest of equally near ones) and the squared distance to it (fp32,
        `[m]`; exactly 0 for a point that is its centroid).
    """
    k = len(centroids)
    block, columns = _BLOCK.get(points.device.type, _BLOCK["cpu"])
    block = max(1, min(block, chunk_bytes // 8))  # products, and a copy of them in another precision or order
    columns = min(k, columns, block)
    rows = max(1, min(block // columns, 2**14))
    half = -0.5 * centroids.double().square().sum(dim=1).float()
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    factors = centroids.to(kind)
    cluster = torch.empty(len(points), dtype=torch.int64, device=points.device)
    distance = torch.empty(len(points), device=points.device)
    for start in range(0, len(points), rows):
        some = points[start : start + rows]
        factor = some.to(kind)
        best, where = _scores(factor, factors[:columns], half[:columns]).max(dim=1)
        for at in range(columns, k, columns):
            score, index = _scores(factor, factors[at : at + columns], half[at : at + columns]).max(dim=1)
            better = score > best
            best, where = torch.where(better, score, best), torch.where(better, index + at, where)
        length = torch.linalg.vector_norm(some, dim=1).square_()
        apart = (length - 2 * best).clamp_(min=0)
        # Differences of nearly equal numbers: those of points close to their centroids are taken directly.
        close = (apart < 1e-3 * length).nonzero()[:, 0]
        apart[close] = (some[close] - centroids[where[close]]).square().sum(dim=1)
        cluster[start : start + rows] = where
        distance[start : start + rows] = apart
    return cluster, distance


def _scores(points: Tensor, centroids: Tensor, half: Tensor) -> Tensor:
    """x·c − ½|c|² of all pairs in fp32, `[m, k]`: largest where the distance is smallest."""
    if points.dtype == torch.float32:
        return torch.addmm(half, points, centroids.T)
    if points.is_cuda:
        return torch.mm(points, centroids.T, out_dtype=torch.float32).add_(half)
    return torch.mm(points, centroids.T).float().add_(half)


def statistics_of(
    points: Tensor, centroids: Tensor, chunk_bytes: int = CHUNK, precision: Precision = "fp32"
) -> Statistics:
    """Assign the points and add them up; arguments as in `assign`."""
    cluster, distance = assign(points, centroids, chunk_bytes, precision)
    k = len(centroids)
    counts = np.bincount(cluster.cpu().numpy(), minlength=k).astype(np.int64)
    return Statistics(_sums(points, cluster, k), counts, float(distance.double().sum()))


def _sums(points: Tensor, cluster: Tensor, k: int) -> NDArray[np.float64]:
    """Sums of the points of each cluster, `[k, D]`, added in a fixed order."""
    total = torch.zeros(k, points.shape[1], dtype=torch.float64, device=points.device)
    # fp32 adds several times faster than fp64: it holds sums of a few points per cluster, and fp64 those sums.
    rows = min(max(8 * k, 1024), 2**16)
    for start in range(0, len(points), rows):
        some, where = points[start : start + rows], cluster[start : start + rows]
        part = torch.zeros(k, points.shape[1], device=points.device)
        if points.is_cuda:  # adding by index is in no fixed order there, putting by index is
            part.index_put_((where,), some, accumulate=True)
        else:
            part.index_add_(0, where, some)
        total += part
    return total.cpu().numpy()


def seed_centroids(points: Tensor, k: int, seed: int, chunk_bytes: int = CHUNK) -> Tensor:
    """Choose k of the points as first centroids, far apart: k-means++ in rounds.

    A point is drawn with probability proportional to its squared distance to the centroids chosen before. A round draws
    a quarter as many as there are, so all rounds together cost about one assignment.

    Args:
        points: `[m, D]` in fp32.
        k: centroids.
        seed: of the draws.
        chunk_bytes: as in `assign`.

    Returns:
        `[k, D]`, all different.

    Raises:
        OpsinError: there are fewer points, or fewer different ones, than k.
    """
    if len(points) < k:
        raise OpsinError(f"{len(points):,} points cannot make {k:,} clusters: ask for fewer clusters, or add images.")
    first = int(uniform(seed, Stream.CURATION, 0, 1)[0] * len(points))
    chosen = new = points[first : first + 1]
    nearest = torch.full((len(points),), math.inf, device=points.device)
    turn = 0
    while len(chosen) < k:
        turn += 1
        nearest = torch.minimum(nearest, assign(points, new, chunk_bytes)[1])
        weights = nearest.double().cpu().numpy()
        reach = np.cumsum(weights)
        if reach[-1] == 0:
            raise OpsinError(
                f"{len(points):,} points, of which only {len(chosen):,} are different, cannot make {k:,} clusters: ask "
                "for fewer clusters, or drop duplicates first."
            )
        wanted = min(k - len(chosen), math.ceil(_GROWTH * len(chosen)))
        draws = uniform(seed, Stream.CURATION, turn, wanted) * reach[-1]
        rows = np.unique(np.searchsorted(reach, draws, side="right").clip(max=len(points) - 1))
        rows = rows[weights[rows] > 0]
        if not len(rows):  # the last number of the sum was rounded away
            rows = np.array([weights.argmax()])
        new = points[torch.from_numpy(rows).to(points.device)]
        _, kept = np.unique(new.cpu().numpy(), axis=0, return_index=True)
        new = new[torch.from_numpy(np.sort(kept)).to(points.device)]
        chosen = torch.cat([chosen, new])
    return chosen.clone()


def updated(statistics: Statistics, centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    """The means of the clusters, `[k, D]`; the largest clusters are split to fill empty ones.

    Where nothing is left to split (no cluster has two points), an empty cluster keeps its centroid of `centroids`.
    """
    counts = statistics.counts
    means = (statistics.sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        most = np.argsort(-counts, kind="stable")[: len(empty)]
        largest = [(-int(counts[i]), int(i)) for i in most]
        heapq.heapify(largest)
        signs = np.where(np.arange(means.shape[1]) % 2 == 0, _APART, -_APART).astype(np.float32)
        for turn, number in enumerate(empty.tolist()):
            count, parent = heapq.heappop(largest)
            if count > -2:
                means[empty[turn:]] = centroids[empty[turn:]]
                break
            means[number] = means[parent] * (1 + signs * (1 + turn / len(empty)))  # no two copies are the same
            heapq.heappush(largest, (count // 2, parent))
            heapq.heappush(largest, (count - count // 2, number))
    return means


def improve(
    start: Callable[[], NDArray[np.float32]],
    statistics: Callable[[NDArray[np.float32], int], Statistics],
    iterations: int,
    keep: Path | None = None,
) -> Centroids:
    """Lloyd's iterations: assign all points to the centroids, move these to the means, until they stay.

    Args:
        start: gives the first centroids, `[k, D]`.
        statistics: assigns all points to the centroids given and adds them up; told the number of the iteration.
        iterations: at most so many.
        keep: a file (.npz) that holds where it is after every iteration: with it there, the loop goes on from it.
    """
    if keep is not None and keep.exists():
        with np.load(keep) as kept:
            now = Centroids(kept["centroids"], float(kept["cost"]), int(kept["iterations"]))
            finished = bool(kept["finished"])
    else:
        now, finished = Centroids(start(), math.inf, 0), iterations == 0
    while not finished:
        found = statistics(now.centroids, now.iterations)
        following = updated(found, now.centroids)
        finished = (
            now.iterations + 1 >= iterations or found.cost == now.cost or bool(np.array_equal(following, now.centroids))
        )
        now = Centroids(following, found.cost, now.iterations + 1)
        if keep is not None:
            save_arrays(keep, centroids=now.centroids, cost=now.cost, iterations=now.iterations, finished=finished)
    return now


def lloyd(
    points: Tensor,
    k: int,
    iterations: int,
    seed: int,
    *,
    chunk_bytes: int = CHUNK,
    precision: Precision = "fp32",
    keep: Path | None = None,
) -> Centroids:
    """k-means of points in memory.

    Args:
        points: `[m, D]` in fp32, on the device that computes.
        k: clusters.
        iterations: at most so many.
        seed: of the first centroids.
        chunk_bytes: as in `assign`.
        precision: of the iterations' products.
        keep: as in `improve`.

    Raises:
        OpsinError: there are fewer different points than k.
    """

    def start() -> NDArray[np.float32]:
        first: NDArray[np.float32] = seed_centroids(points, k, seed, chunk_bytes).cpu().numpy()
        return first

    def statistics(centroids: NDArray[np.float32], _: int) -> Statistics:
        return statistics_of(points, torch.from_numpy(centroids).to(points.device), chunk_bytes, precision)

    return improve(start, statistics, iterations, keep)


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write named arrays to a .npz file, whole or not at all.

    Raises:
        OpsinError: it cannot be written.
    """
    _save(path, lambda file: np.savez(file, **arrays))


def save_array(path: Path, array: NDArray[Any]) -> None:
    """As `save_arrays`, one array to a .npy file, which is read faster."""
    _save(path, lambda file: np.save(file, array))


def _save(path: Path, write: Callable[[BinaryIO], None]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    except OSError as error:
        raise OpsinError(
            f"cannot write {shown(path)}: {error.strerror or error}; free some space and give the same command again: "
            "what is finished stays."
        ) from None
