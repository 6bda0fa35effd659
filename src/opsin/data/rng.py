"""Random numbers as a pure function of (seed, stream, position, draw).

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 64-bit key and a 128-bit
counter into 128 random bits without any state. So what an image, a group or a step draws does not depend on what was
drawn before it, on the number of ranks, on threads, or on how the batch is split, and a run resumes without loader
state. Everything is drawn on the CPU with numpy, vectorised over positions, and is equal on every machine.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Stream(IntEnum):
    """What a number is drawn for: two streams never share a number. Append only: values are part of every run."""

    ORDER = 0
    CROPS = 1
    MASK_RATIO = 2
    MASK_BLOCKS = 3
    STOCHASTIC_DEPTH = 4
    WEIGHTS = 5
    WINDOW = 6
    MIXTURE = 7
    COPIES = 8
    CURATION = 9


_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """Ten rounds of Philox-4x32 on four arrays of 32-bit words held in uint64; returns four such arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, stream: Stream, position: Integers | int, draws: int, *, offset: int = 0) -> Floats:
    """Uniform numbers in [0, 1), shape `position.shape + (draws,)`, with 53 random bits each.

    Draw d at a position is the same whatever `draws` is and whatever other positions are asked for; `offset` skips the
    first draws of the position.
    """
    where = np.asarray(position, dtype=np.uint64)[..., None]
    draw = np.arange(offset, offset + draws, dtype=np.uint64)
    where, draw = np.broadcast_arrays(where, draw)
    counter = (where & _LOW, where >> _SHIFT, draw, np.full_like(draw, int(stream)))
    w0, w1, _, _ = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return ((w0 << np.uint64(21)) ^ (w1 >> np.uint64(11))).astype(np.float64) * 2.0**-53


def permutation(seed: int, stream: Stream, position: Integers | int, n: int, *, offset: int = 0) -> Integers:
    """A random order of 0 … n-1 for every position, shape `position.shape + (n,)`."""
    return np.argsort(uniform(seed, stream, position, n, offset=offset), axis=-1, kind="stable")


def shuffled_index(seed: int, epoch: Integers, index: Integers, n: int, *, stream: Stream = Stream.ORDER) -> Integers:
    """Where sample `index` of `epoch` lies in the data: a keyed permutation of 0 … n-1 for every epoch, in O(1) memory.

    Four Feistel rounds with Philox as the round function permute the smallest power of four that holds n; values beyond
    n walk on until they fall inside ("cycle walking").
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    value = np.asarray(index, dtype=np.uint64).copy()
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.uint64), value.shape)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right, when = value[outside] >> shift, value[outside] & mask, epochs[outside]
        for turn in range(4):
            tag = np.full_like(right, (turn << 8) | int(stream))
            noise = philox((right, when & _LOW, when >> _SHIFT, tag), key)[0]
            left, right = right, (left ^ noise) & mask
        value[outside] = (left << shift) | right
        outside = value >= np.uint64(n)
    return value.astype(np.int64)
