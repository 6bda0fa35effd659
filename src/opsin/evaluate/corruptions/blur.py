"""Blur of ImageNet-C: defocus, glass, motion, zoom, and Gaussian (extra). Severities 1 to 5 index the tuples.

Images are float32 `[B, 3, H, W]` from 0 to 255, what was drawn lies on the same device.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.evaluate.corruptions.filters import convolve, enlarged, gaussian, motion

GAUSSIAN = (1, 2, 3, 4, 6)
"""Standard deviation in pixels."""
DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
"""Radius of the disk and standard deviation of the blur of its edge, in pixels."""
GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
"""Standard deviation of the blur before and after, farthest shift in pixels, number of passes."""
MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
"""Radius and standard deviation of the trail in pixels."""
ZOOM = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
"""End and step of the magnifications, which begin at 1."""
PASSES = 3
"""Most passes of glass blur."""


def gaussian_blur(images: Tensor, severity: int) -> Tensor:
    """Blurs with a Gaussian."""
    return gaussian(images, GAUSSIAN[severity - 1])


def defocus_blur(images: Tensor, severity: int) -> Tensor:
    """Blurs with a disk."""
    disk = _disk(*DEFOCUS[severity - 1]).to(images)
    return convolve(images, disk[None], lambda x, by: F.pad(x, by, mode="reflect"))


@lru_cache(maxsize=len(DEFOCUS))
def _disk(radius: int, softness: float) -> Tensor:
    """The disk, its edge blurred over 3 pixels (5 for radii above 8), mirrored at the kernel's border."""
    reach, blur = (8, 1) if radius <= 8 else (radius, 2)
    line = torch.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).double()
    weights = torch.exp(-0.5 * (torch.arange(-blur, blur + 1).double() / softness) ** 2)
    weights /= weights.sum()
    padded = F.pad((disk / disk.sum())[None, None], [blur] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, weights[None, None, :, None]), weights[None, None, None])[0, 0]


def motion_blur(images: Tensor, severity: int, chance: Tensor) -> Tensor:
    """Blurs along a direction within 45 degrees of the horizontal, by `chance` (uniform, `[B, 1]`)."""
    return motion(images, *MOTION[severity - 1], angle=chance[:, 0] * 90 - 45)


def zoom_blur(images: Tensor, severity: int) -> Tensor:
    """Averages the image with magnified ones."""
    factors = np.arange(1, *ZOOM[severity - 1])
    total = images.clone()
    for factor in factors:
        total += enlarged(images, float(factor))
    return total / (len(factors) + 1)


def glass_blur(images: Tensor, severity: int, chance: Tensor) -> Tensor:
    """Blurs, takes pixels from near by, blurs again; shifts by `chance` (uniform, `[B, PASSES, 2, H, W]`)."""
    sigma, farthest, passes = GLASS[severity - 1]
    # The published generator swaps pixels of an array through views of it, so that a pixel takes the other's value and
    # the other keeps its own. The published images are made so.
    shifts = (chance[:, :passes] * (2 * farthest)).long() - farthest
    blurred = gaussian(images, sigma).add(1e-3).floor()
    return gaussian(shuffled(blurred, shifts, farthest), sigma)


def shuffled(images: Tensor, shifts: Tensor, farthest: int) -> Tensor:
    """Copies pixels one after the other, from the last to the first, each from where a shift points; several passes.

    A pixel may take one that was copied before in the same pass, and so on: the chains are followed for all pixels at
    once, twice as far in each round.

    Args:
        images: `[B, C, H, W]`.
        shifts: integers `[B, passes, 2, H, W]`, to the right and downward, from -farthest to farthest - 1.
        farthest: also the margin of pixels that stay, one more at the left and top.
    """
    height, width = images.shape[-2:]
    count = height * width
    here = torch.arange(count, device=images.device)
    row, column = here // width, here % width
    moved = (
        (row > farthest) & (row <= height - farthest) & (column > farthest) & (column <= width - farthest)
    )  # of the published loop, from height - farthest down to farthest + 1
    values = images.flatten(2)
    for shift in shifts.unbind(1):
        across, down = shift[:, 0].flatten(1), shift[:, 1].flatten(1)
        target = torch.where(moved, (row + down) * width + column + across, here)
        # Pixels are numbered twice: as they are after this pass, and (+ count) as they were before it.
        after = torch.where(target > here, target, target + count)
        links = torch.cat([after, (here + count).expand_as(after)], dim=1)
        while (links[:, :count] < count).any():
            links = links.gather(1, links)
        source = (links[:, :count] - count)[:, None].expand_as(values)
        values = values.gather(2, source)
    return values.view_as(images)
