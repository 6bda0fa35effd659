"""Noise of ImageNet-C: Gaussian, shot, impulse, and speckle (extra). Severities 1 to 5 index the tuples.

Images are float32 `[B, 3, H, W]` from 0 to 255, what was drawn lies on the same device.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GAUSSIAN = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviation; white is 1."""
SHOT = (60, 25, 12, 5, 3)
"""Photons of a white pixel."""
IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)
"""Share of samples (a pixel has three) that become 0 or 255."""
SPECKLE = (0.15, 0.2, 0.35, 0.45, 0.6)
"""Standard deviation as a share of the value."""
BITS = 24
"""A uniform fp32 number between 0 and 1 is a multiple of 2^-24."""


def gaussian_noise(images: Tensor, severity: int, normal: Tensor) -> Tensor:
    """Adds `normal` `[B, 3, H, W]`, scaled."""
    return images + normal * (GAUSSIAN[severity - 1] * 255)


def speckle_noise(images: Tensor, severity: int, normal: Tensor) -> Tensor:
    """Adds `normal` `[B, 3, H, W]`, scaled by value."""
    return images + images * normal * SPECKLE[severity - 1]


def impulse_noise(images: Tensor, severity: int, chance: Tensor) -> Tensor:
    """Salt where `chance` (uniform, `[B, 3, H, W]`) is low, pepper where it is high: each in half of the share."""
    half = IMPULSE[severity - 1] / 2
    return torch.where(chance < half, 255.0, torch.where(chance >= 1 - half, 0.0, images))


def shot_noise(images: Tensor, severity: int, chance: Tensor) -> Tensor:
    """Counts photons: Poisson numbers by inversion of `chance` (uniform, `[B, 3, H, W]`)."""
    photons = SHOT[severity - 1]
    sums, first = (torch.from_numpy(table).to(images.device) for table in _poisson(photons))
    level = images.long()
    sought = ((level << BITS) + (chance * 2**BITS).long()).contiguous()
    return (torch.searchsorted(sums, sought, right=True) - first[level]).float() * (255 / photons)


@lru_cache(maxsize=len(SHOT))
def _poisson(photons: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cumulative probabilities for each of 256 levels, one after the other, and where each begins.

    Those of level v lie from v·2^24 to (v + 1)·2^24: all of it ascends, and one search finds count and level.
    """
    counts = np.arange(4 * photons + 20)
    logarithms = np.concatenate([[0.0], np.cumsum(np.log(counts[1:]))])
    means = np.arange(256)[:, None] / 255 * photons
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.exp(np.where(counts == 0, 0.0, counts * np.log(means)) - means - logarithms)
    sums = np.ceil(np.minimum(np.cumsum(terms, axis=1), 1.0) * 2**BITS).astype(np.int64)
    sums[:, -1] = 2**BITS
    sums += np.arange(256)[:, None] << BITS
    return sums.ravel(), np.arange(256) * len(counts)
