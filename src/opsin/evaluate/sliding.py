"""Dense prediction on images of any size: overlapping windows, several scales, flips."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.evaluate.dense import normalised

Scorer = Callable[[Tensor], Tensor]
"""From normalised windows `[B, C, h, w]` to logits `[B, K, h', w']` on a grid that spans each window."""
Box = tuple[int, int, int, int]
"""Top, left, bottom, right: rows top … bottom - 1, columns left … right - 1."""


def windows(height: int, width: int, crop: int, stride: int) -> list[Box]:
    """Windows of `crop` pixels, or of the image's side where that is smaller, that cover an image row by row.

    They lie `stride` apart, but the last in each direction is moved back so that it ends with the image, as in the
    reference.
    """

    def starts(side: int) -> list[int]:
        count = math.ceil(max(side - crop, 0) / stride) + 1
        return [max(min(i * stride, side - crop), 0) for i in range(count)]

    return [
        (top, left, min(top + crop, height), min(left + crop, width))
        for top in starts(height)
        for left in starts(width)
    ]


def sliding(score: Scorer, image: Tensor, crop: int, stride: int, batch_size: int) -> Tensor:
    """Logits `[K, H, W]` of a normalised image `[C, H, W]`: the mean of all windows that see a pixel.

    Args:
        score: scores windows; its grid is stretched over the window, bilinear.
        image: on the device where it is scored.
        crop: side of a window in pixels.
        stride: pixels from one to the next, at most `crop`.
        batch_size: windows that are scored together; they are stretched one by one, for they are large.
    """
    height, width = image.shape[-2:]
    boxes = windows(height, width, crop, stride)
    total: Tensor | None = None
    count = torch.zeros(height, width, device=image.device)
    for start in range(0, len(boxes), batch_size):
        batch = boxes[start : start + batch_size]
        grids = score(torch.stack([image[:, top:bottom, left:right] for top, left, bottom, right in batch]))
        if total is None:
            total = grids.new_zeros(grids.shape[1], height, width)
        for grid, (top, left, bottom, right) in zip(grids, batch, strict=True):
            size = (bottom - top, right - left)
            full = F.interpolate(grid[None], size, mode="bilinear", align_corners=False)
            total[:, top:bottom, left:right] += full[0]
            count[top:bottom, left:right] += 1
    assert total is not None  # an image has a window
    return total / count


def size_with(shorter: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of an image at another shorter side, aspect kept, each rounded to the nearest pixel."""
    scale = shorter / min(height, width)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def probabilities(
    score: Scorer,
    pixels: Tensor,
    shorter: int,
    scales: Sequence[float],
    flips: bool,
    crop: int,
    stride: int,
    batch_size: int,
) -> Tensor:
    """Class probabilities `[K, H, W]` of an image at its own size: the mean over scales, and flips if wanted.

    As in the reference the image is resized without antialiasing, logits are stretched to its own size, and softmax
    comes before the mean.

    Args:
        score: see `sliding`.
        pixels: `[C, H, W]` from 0 to 255, on the device where it is scored.
        shorter: side at scale 1, in pixels.
        scales: factors of it.
        flips: also score every scale mirrored.
        crop: see `sliding`.
        stride: see `sliding`.
        batch_size: see `sliding`.
    """
    height, width = pixels.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        size = size_with(int(shorter * scale), height, width)
        resized = F.interpolate(pixels[None].float(), size, mode="bilinear", align_corners=False)[0]
        for mirrored in (False, True) if flips else (False,):
            view = normalised(resized.flip(-1) if mirrored else resized)
            logits = sliding(score, view, crop, stride, batch_size)
            logits = logits.flip(-1) if mirrored else logits
            share = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)[0].softmax(0)
            total = share if total is None else total.add_(share)
    assert total is not None  # settings ask for a scale or more
    return total / (len(scales) * (1 + flips))
