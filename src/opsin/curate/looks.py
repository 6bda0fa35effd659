"""What an image looks like, in three numbers that need no network: spread, sharpness and a perceptual hash.

All are computed from the luma (ITU-R BT.601) at small canonical scales, so that they say something of the picture and
not of its size: a photo and its copy at half the size have nearly equal numbers.
"""

from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

CANONICAL: Final = 128
"""Longer side in pixels at which spread and sharpness are measured. Larger images are averaged down, smaller ones are
left: enlarged, they would count as blurred for being small. A JPEG is decoded at a fraction of its size only while its
shorter side stays at least this long, so the fraction does not show either."""
_SIDE: Final = 32
"""Pixels of a side of what is transformed into the hash."""
_LOW: Final = 8
"""Lowest frequencies in each direction that are kept: 64 bits."""


class Looks(NamedTuple):
    """What is measured of an image."""

    spread: float
    """Standard deviation of the luma, 0 to 127.5: near 0 for a picture of one colour."""
    sharpness: float
    """Variance of the Laplacian (4 neighbours) of the luma of 0 … 255: low for one without edges, as if blurred."""
    hash: int
    """Perceptual hash of 64 bits (see `perceptual_hash`)."""


def looks(pixels: Tensor) -> Looks:
    """Measure an image, uint8 `[3, H, W]`."""
    gray = picture(pixels).convert("L")
    factor = min(1.0, CANONICAL / max(gray.size))
    width, height = (max(1, round(side * factor)) for side in gray.size)
    small = np.asarray(gray.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    inner = small[1:-1, 1:-1]
    around = small[:-2, 1:-1] + small[2:, 1:-1] + small[1:-1, :-2] + small[1:-1, 2:]
    sharpness = float((around - 4 * inner).var()) if inner.size else 0.0
    return Looks(float(small.std()), sharpness, perceptual_hash(gray))


def perceptual_hash(gray: Image.Image) -> int:
    """The 64 lowest frequencies of the image at 32 × 32, each a bit: whether it is above their median.

    The cosine transform (type II) runs over both directions of a Lanczos reduction; the first bit, the mean, is the
    highest, then row by row. So the number is that of imagehash's `phash`.
    """
    small = np.asarray(gray.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = _COSINES @ small @ _COSINES.T
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def _cosines() -> NDArray[np.float64]:
    """`[8, 32]`: the lowest rows of the cosine transform."""
    frequency, position = np.arange(_LOW)[:, None], np.arange(_SIDE)[None]
    cosines: NDArray[np.float64] = np.cos(np.pi * frequency * (2 * position + 1) / (2 * _SIDE))
    return cosines


_COSINES: Final = _cosines()


def reduction_to(side: int, height: int, width: int) -> int:
    """The largest of 1, 2, 4 and 8 that leaves the shorter side `side` pixels or more."""
    return next(factor for factor in (8, 4, 2, 1) if factor == 1 or min(height, width) >= side * factor)


def eight_bits(pixels: Tensor) -> Tensor:
    """The same image in uint8: 16 bits lose the low byte, floats of 0 … 1 are multiplied by 255."""
    if pixels.dtype == torch.uint8:
        return pixels
    values = pixels.numpy()
    return torch.from_numpy((values >> 8 if values.dtype == np.uint16 else (values * 255).round()).astype(np.uint8))


def picture(pixels: Tensor) -> Image.Image:
    """An image uint8 `[3, H, W]` as Pillow's."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def shrunk(pixels: Tensor, side: int) -> Tensor:
    """The image, uint8 `[3, H, W]`, averaged down until its shorter side is `side` pixels; never enlarged."""
    height, width = pixels.shape[1:]
    factor = side / min(height, width)
    if factor >= 1:
        return pixels.contiguous()
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return torch.from_numpy(np.array(picture(pixels).resize(size, Image.Resampling.BILINEAR))).permute(2, 0, 1)
