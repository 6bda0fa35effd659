"""Pictures of grids over patches: beside the photo or laid over it, and lines between matching patches."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from opsin.report.figures import Pixels

HEAT = colormaps["inferno"]  # even steps to the eye, also in grey
LINES = colormaps["hsv"]


def enlarged(grid: ArrayLike, shape: tuple[int, int]) -> Pixels:
    """Colours per patch `[h, w, 3]` from 0 to 1, as an image of `shape` (height, width) with one square per patch."""
    small = Image.fromarray((np.asarray(grid, dtype=np.float64).clip(0, 1) * 255).round().astype(np.uint8))
    return np.asarray(small.resize(shape[::-1], Image.Resampling.NEAREST))


def heat(grid: ArrayLike, shape: tuple[int, int], low: float | None = None, high: float | None = None) -> Pixels:
    """Values per patch `[h, w]` as colours, dark to bright from `low` to `high`, by default the extremes."""
    values = np.asarray(grid, dtype=np.float64)
    low = values.min() if low is None else low
    high = values.max() if high is None else high
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return enlarged(HEAT(scaled)[..., :3], shape)


def beside(pictures: Sequence[Pixels], gap: int = 4) -> Pixels:
    """Pictures of equal height in a row, with white between."""
    height = max(picture.shape[0] for picture in pictures)
    rows: list[NDArray[np.uint8]] = []
    for picture in pictures:
        rows.append(np.pad(picture, ((0, height - picture.shape[0]), (0, 0), (0, 0)), constant_values=255))
        rows.append(np.full((height, gap, 3), 255, dtype=np.uint8))
    return np.concatenate(rows[:-1], axis=1)


def marked(picture: Pixels, at: tuple[int, int], patch: int) -> Pixels:
    """A picture with a frame around the patch at (row, column)."""
    image = Image.fromarray(picture)
    y, x = (place * patch for place in at)
    draw = ImageDraw.Draw(image)
    draw.rectangle((x - 1, y - 1, x + patch, y + patch), outline="white", width=3)
    draw.rectangle((x, y, x + patch - 1, y + patch - 1), outline="red", width=2)
    return np.asarray(image)


def joined(
    first: Pixels, second: Pixels, pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]], patch: int
) -> Pixels:
    """Two pictures beside one another, with a line from patch to patch for every pair of (row, column)."""
    gap = 4
    image = Image.fromarray(beside([first, second], gap))
    draw, offset = ImageDraw.Draw(image), first.shape[1] + gap
    for number, (one, other) in enumerate(pairs):
        colour = tuple(int(255 * part) for part in LINES(number / max(1, len(pairs)))[:3])
        (y1, x1), (y2, x2) = (tuple(patch * place + patch // 2 for place in at) for at in (one, other))
        draw.line((x1, y1, x2 + offset, y2), fill=colour, width=2)
        for x, y in ((x1, y1), (x2 + offset, y2)):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour, outline="white")
    return np.asarray(image)
