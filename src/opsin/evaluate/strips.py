"""A query beside its nearest images, as a picture to look at."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

SIDE, BORDER, GAP = 96, 4, 12
"""Pixels: of a thumbnail's square, of its frame, and between the query and its neighbours."""
RIGHT, WRONG, PLAIN = (30, 140, 60), (200, 60, 40), (128, 128, 128)
"""Frames (RGB) of right and wrong neighbours, and of the query and what is not judged."""


def strip(query: Tensor, found: Sequence[tuple[Tensor, bool | None]]) -> NDArray[np.uint8]:
    """One row `[H, W, 3]`: the query, then its nearest images, framed green if right and red if wrong.

    Args:
        query: pixels `[C, h, w]`, uint8 as a rule.
        found: the same of each neighbour, best first, and whether it is right; None where nobody knows.
    """
    full = SIDE + 2 * BORDER
    canvas = np.full((full, full * (1 + len(found)) + GAP, 3), 255, dtype=np.uint8)
    canvas[:, :full] = _framed(query, PLAIN)
    for i, (pixels, right) in enumerate(found):
        left = full * (1 + i) + GAP
        canvas[:, left : left + full] = _framed(pixels, PLAIN if right is None else RIGHT if right else WRONG)
    return canvas


def thumbnail(pixels: Tensor, side: int = SIDE) -> Image.Image:
    """A small RGB picture of `[C, h, w]`, of any type and bands: the first three, or the first as gray."""
    shown = (pixels if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1))[:3].numpy()
    if shown.dtype != np.uint8:
        low, high = float(shown.min()), float(shown.max())
        shown = ((shown - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(shown.transpose(1, 2, 0)))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _framed(pixels: Tensor, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    square = Image.new("RGB", (SIDE + 2 * BORDER,) * 2, colour)
    square.paste((255, 255, 255), (BORDER, BORDER, BORDER + SIDE, BORDER + SIDE))
    small = thumbnail(pixels)
    square.paste(small, (BORDER + (SIDE - small.width) // 2, BORDER + (SIDE - small.height) // 2))
    return np.asarray(square)
