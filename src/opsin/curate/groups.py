"""Choosing rows by group: the few with the smallest keys in each, in bounded memory; and how large groups are."""

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

Rows = tuple[NDArray[Any], NDArray[Any], Integers]
"""Of some rows: their groups (integers), keys (real numbers) and numbers (all different), `[m]` each."""

_ROW: Final = 128
"""Bytes that sorting a held row takes at most: group, key, number, their copies and their order."""

_BINS: Final = 24
"""Log-spaced bins of a histogram of sizes."""

_POINTS: Final = 512
"""Points of a curve of sorted sizes."""


def smallest(
    parts: Callable[[], Iterable[Rows]], counts: Integers, memory: int, groups: range | None = None
) -> Integers:
    """Numbers of the rows with the smallest keys in their groups, ascending.

    Args:
        parts: gives all rows, some at a time; called once per pass (see `passes`).
        counts: how many rows to choose in each group, `[G]`; all of them where it has fewer.
        memory: bytes that may be held beside the rows of a part and the answer; at least one group is held.
        groups: only these groups, in one pass; None for all, in as many passes as memory asks for.

    Of rows with equal keys, those with the lower numbers are chosen. Rows whose group is negative are left out.
    """
    if groups is None:
        chosen = [smallest(parts, counts, memory, some) for some in passes(counts, memory)]
        return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
    wanted = counts[groups.start : groups.stop]
    most = max(2 * int(wanted.sum()), 2**16)
    limit = np.full(len(wanted), np.inf)  # a row with a larger key cannot be among the smallest of its group
    held: list[Rows] = []
    size = 0
    for group, key, number in parts():
        inside = np.flatnonzero((group >= groups.start) & (group < groups.stop))
        at = group[inside].astype(np.int64) - groups.start
        fits = (wanted[at] > 0) & (key[inside] <= limit[at])
        inside, at = inside[fits], at[fits]
        held.append((at, key[inside].astype(np.float64), number[inside]))
        size += len(at)
        if size > most:
            held = [_best(held, wanted, limit)]
            size = len(held[0][0])
    return np.sort(_best(held, wanted, limit)[2])


def passes(counts: Integers, memory: int, row: int = 2 * _ROW) -> list[range]:
    """Successive groups put together so that their rows, of `row` bytes, take `memory` bytes at most; or one group.

    By default a row takes what choosing it does (see `smallest`).
    """
    ranges: list[range] = []
    most = max(1, memory // row)
    reach = np.concatenate([[0], np.cumsum(counts)])
    start = 0
    while start < len(counts):
        stop = max(start + 1, int(np.searchsorted(reach, reach[start] + most, side="right")) - 1)
        ranges.append(range(start, stop))
        start = stop
    return ranges


def _best(held: list[Rows], wanted: Integers, limit: Floats) -> Rows:
    """The `wanted` rows with the smallest keys in each group; sets the `limit` of groups that are full."""
    if not held:
        return np.empty(0, dtype=np.int64), np.empty(0), np.empty(0, dtype=np.int64)
    group, key, number = (np.concatenate(arrays) for arrays in zip(*held, strict=True))
    order = np.lexsort((number, key, group))
    group, key, number = group[order], key[order], number[order]
    rank = np.arange(len(group)) - np.searchsorted(group, group)
    stays = rank < wanted[group]
    last = rank == wanted[group] - 1
    limit[group[last]] = key[last]
    return group[stays], key[stays], number[stays]


def size_histogram(sizes: Integers) -> dict[str, Any]:
    """How large the clusters of a level are, for a table and a plot.

    Returns:
        `clusters`, `empty`, `smallest`, `median` and `largest` (of those that are not empty), `images`; `edges` and
        `bins`: clusters whose size is at least an edge and below the next, log-spaced; `ranks` and `sorted`: sizes in
        descending order, at most 512 of them, and at which ranks.
    """
    there = np.sort(sizes[sizes > 0])[::-1]
    about: dict[str, Any] = {"clusters": len(sizes), "empty": len(sizes) - len(there), "images": int(sizes.sum())}
    if not len(there):
        return about
    edges = np.unique(np.round(np.geomspace(1, int(there[0]) + 1, _BINS + 1)).astype(np.int64))
    ranks = np.unique(np.linspace(0, len(there) - 1, min(_POINTS, len(there))).round().astype(np.int64))
    return about | {
        "smallest": int(there[-1]),
        "median": float(np.median(there)),
        "largest": int(there[0]),
        "edges": edges.tolist(),
        "bins": np.histogram(there, edges)[0].tolist(),
        "ranks": ranks.tolist(),
        "sorted": there[ranks].tolist(),
    }


def imbalance(sizes: Integers) -> float:
    """Kullback-Leibler divergence of sizes from equal ones, in nats: 0 when equal, log(G) when all are in one group."""
    total = sizes.sum()
    if total == 0:
        return 0.0
    share = sizes[sizes > 0] / total
    return float((share * np.log(share * len(sizes))).sum())
