"""Images with equal hashes, found in passes of bounded memory."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Keys = NDArray[np.uint64]


def equal_pairs(
    blocks: Callable[[], Iterable[tuple[Keys, Numbers]]], rows: int, memory: int
) -> Iterator[tuple[Numbers, Numbers]]:
    """Pairs (smallest number, other number) of all rows with equal keys.

    The range of the keys is cut into as many passes over `blocks` as memory asks for, so that a pass holds only the
    rows of its share.

    Args:
        blocks: gives keys `[m, words]` and numbers `[m]`, block by block, each time it is called.
        rows: of all blocks.
        memory: bytes for the rows of a pass.
    """
    passes = max(1, -(-rows * 96 // memory))  # two words and a number, as read, sorted and compared
    for turn in range(passes):
        keys, numbers = [], []
        for some, which in blocks():
            mine = _share(some[:, 0], passes) == turn
            keys.append(some[mine])
            numbers.append(which[mine])
        if not numbers:
            return
        all_keys, all_numbers = np.concatenate(keys), np.concatenate(numbers)
        if not len(all_numbers):
            continue
        order = np.lexsort((all_numbers, *all_keys.T))
        all_keys, all_numbers = all_keys[order], all_numbers[order]
        same = np.concatenate([[False], (all_keys[1:] == all_keys[:-1]).all(axis=1)])
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(same))))
        yield all_numbers[first[same]], all_numbers[same]


def _share(keys: Keys, passes: int) -> NDArray[np.uint64]:
    """Which pass a key belongs to: keys need not be spread evenly (a constant of Knuth's spreads them)."""
    return ((keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) % np.uint64(passes)


def words(column: NDArray[Any]) -> Keys:
    """Hashes as rows of 64-bit words: of bytes `[m, n]` the first 16, of numbers `[m]` themselves."""
    if column.dtype == np.uint64:
        return column.reshape(-1, 1)
    return np.ascontiguousarray(column[:, :16]).view(np.uint64)
