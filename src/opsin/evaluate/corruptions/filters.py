"""Filters on batches of images that corruptions share. Pixels are float32 from 0 to 255."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Border = Literal["nearest", "reflect"]
"""What lies beyond the edge: its last pixel, or the image mirrored with that pixel twice (names as in scipy)."""
ROUNDING = 1e-3
"""Levels added before fractions are cut off, so that fp32 does not turn a whole level into the one below."""


def stored(pixels: Tensor) -> Tensor:
    """uint8, fractions cut off as in the published generator, of pixels that may lie outside 0 to 255."""
    return (pixels + ROUNDING).clamp(0, 255).to(torch.uint8)


def gaussian(images: Tensor, sigma: float, *, truncate: float = 4.0, border: Border = "nearest") -> Tensor:
    """Gaussian blur of images `[..., H, W]`, cut off at `truncate` standard deviations `sigma` (pixels).

    One product with a matrix along each side: the border is part of the matrix, and nothing is padded.
    """
    down, across = (torch.from_numpy(_gaussian(side, sigma, truncate, border)).to(images) for side in images.shape[-2:])
    return down @ images @ across.T


@lru_cache(maxsize=32)
def _gaussian(side: int, sigma: float, truncate: float, border: Border) -> NDArray[np.float64]:
    """The blur of a line of pixels as a matrix `[side, side]`."""
    radius = int(truncate * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    sources = np.arange(side)[:, None] + offsets
    if border == "nearest":
        sources = sources.clip(0, side - 1)
    else:
        sources = sources % (2 * side)
        sources = np.where(sources < side, sources, 2 * side - 1 - sources)
    matrix = np.zeros((side, side))
    np.add.at(matrix, (np.arange(side)[:, None], sources), weights / weights.sum())
    return matrix


def convolve(images: Tensor, kernels: Tensor, pad: Callable[[Tensor, list[int]], Tensor]) -> Tensor:
    """Images `[B, C, H, W]`, each with its kernel `[B or 1, 2r + 1, 2r + 1]`, by the Fourier transform.

    A kernel's entry (r + y, r + x) weighs the pixel y below and x to the right.

    Args:
        images: float32.
        kernels: float32, on the same device.
        pad: extends by (left, right, top, bottom) pixels.
    """
    radius = kernels.shape[-1] // 2
    padded = pad(images, [radius] * 4)
    size = padded.shape[-2:]
    spectrum = torch.fft.rfft2(kernels, s=size).conj()[:, None]
    found: Tensor = torch.fft.irfft2(torch.fft.rfft2(padded) * spectrum, s=size)
    return found[..., : images.shape[-2], : images.shape[-1]]


def enlarged(images: Tensor, factor: float) -> Tensor:
    """The centre of images `[B, C, H, W]` magnified linearly by `factor` to the same size, corners on corners."""
    height, width = images.shape[-2:]
    rows, columns = (int(np.ceil(side / factor)) for side in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    size = [round(rows * factor), round(columns * factor)]
    part = images[..., top : top + rows, left : left + columns]
    larger = torch.nn.functional.interpolate(part, size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return larger[..., top : top + height, left : left + width]


def motion(images: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Motion blur of `[B, C, H, W]`: half a Gaussian of 2 `radius` + 1 pixels and `sigma`, along `angle` `[B]`.

    Degrees: the trail comes from the right at 0, from below at 90. Steps are whole pixels, as ImageMagick takes them.
    """
    length = 2 * radius + 1
    steps = torch.arange(length, dtype=torch.float64)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    turn = torch.deg2rad(angle.double().cpu())[:, None]
    rows = torch.ceil(steps * turn.sin() - 0.5).long() + length
    columns = torch.ceil(steps * turn.cos() - 0.5).long() + length
    kernels = torch.zeros(len(angle), 2 * length + 1, 2 * length + 1, dtype=torch.float64)
    which = torch.arange(len(angle))[:, None].expand(-1, length)
    kernels.index_put_((which, rows, columns), (weights / weights.sum()).expand(len(angle), -1), accumulate=True)
    return convolve(images, kernels.to(images), lambda x, by: torch.nn.functional.pad(x, by, mode="replicate"))
