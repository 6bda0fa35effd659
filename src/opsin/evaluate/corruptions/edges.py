"""Edges, distances and levels of grey images: what the drops of spatter are shaded by.

The published generator has OpenCV do it; its definitions are followed, but distances are exact here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TANGENT = 13573 / 2**15
"""Tangent of 22.5 degrees, as OpenCV rounds it."""


def edges(images: Tensor, low: float, high: float) -> Tensor:
    """Canny's edges of grey images `[B, 1, H, W]` from 0 to 255, booleans of the same shape.

    Sobel gradients, their size as the sum of both; maxima across the edge above `high`, and those above `low` that are
    connected with them.
    """
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None].to(images)
    x, y = F.conv2d(F.pad(images, [1] * 4, mode="replicate"), kernels).split(1, dim=1)
    size = x.abs() + y.abs()
    height, width = size.shape[-2:]
    around = F.pad(size, [1] * 4)

    def at(down: int, right: int) -> Tensor:
        return around[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    level = y.abs() < x.abs() * TANGENT
    upright = y.abs() > x.abs() * (TANGENT + 2)
    falling = (x * y) >= 0
    before = torch.where(level, at(0, -1), torch.where(upright, at(-1, 0), torch.where(falling, at(-1, -1), at(-1, 1))))
    after = torch.where(level, at(0, 1), torch.where(upright, at(1, 0), torch.where(falling, at(1, 1), at(1, -1))))
    # Of equal neighbours the first is the edge; on a diagonal neither.
    highest = (size > before) & torch.where(level | upright, size >= after, size > after)
    possible = highest & (size > low)
    found: Tensor = highest & (size > high)
    while True:
        grown = possible & (F.max_pool2d(found.float(), 3, 1, 1) > 0)
        if torch.equal(grown, found):
            return found
        found = grown


def distance_to(marked: Tensor, most: int) -> Tensor:
    """Distance in pixels of every pixel to the nearest marked one `[B, 1, H, W]`, `most` at most."""
    height, width = marked.shape[-2:]
    column = torch.arange(width, device=marked.device, dtype=torch.float32)
    left = torch.where(marked, column, -torch.inf).cummax(-1).values  # the last marked one of the row so far
    right = torch.where(marked, column, torch.inf).flip(-1).cummin(-1).values.flip(-1)
    across = torch.minimum(column - left, right - column).clamp_max(most + 1).square()
    padded = F.pad(across, [0, 0, most, most], value=float((most + 1) ** 2))
    nearest = across
    for step in range(-most, most + 1):
        nearest = torch.minimum(nearest, padded[..., most + step : most + step + height, :] + step**2)
    return nearest.sqrt().clamp_max(most)


def equalised(images: Tensor) -> Tensor:
    """Images `[B, 1, H, W]` of whole levels from 0 to 255 whose levels are spread so that each is equally frequent."""
    levels = images.flatten(1).long()
    counts = torch.zeros(len(images), 256, device=images.device).scatter_add_(
        1, levels, torch.ones_like(levels).float()
    )
    sums = counts.cumsum(1)
    lowest = counts.gather(1, levels.amin(1, keepdim=True))  # those of the lowest level stay 0
    rest = levels.shape[1] - lowest
    table = torch.where(rest > 0, ((sums - lowest) * (255 / rest.clamp_min(1))).round().clamp_min(0), levels[:, :1])
    return table.gather(1, levels).view_as(images)
