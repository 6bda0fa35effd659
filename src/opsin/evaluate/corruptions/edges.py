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
    bordered = F.pad(images, [1] * 4, mode="replicate")
    across, down = bordered[..., 2:] - bordered[..., :-2], bordered[..., 2:, :] - bordered[..., :-2, :]
    x = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    y = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
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
        grown = possible & _with_neighbours(found)
        if torch.equal(grown, found):
            return found
        found = grown


def _with_neighbours(found: Tensor) -> Tensor:
    """The marked pixels and the eight around each; a filter of torch's takes several times as long on a CPU."""
    tall = F.pad(found, [0, 0, 1, 1])
    tall = tall[..., :-2, :] | tall[..., 1:-1, :] | tall[..., 2:, :]
    wide = F.pad(tall, [1, 1])
    return wide[..., :-2] | wide[..., 1:-1] | wide[..., 2:]


def distance_to(marked: Tensor, most: int) -> Tensor:
    """Distance in pixels of every pixel to the nearest marked one `[B, 1, H, W]`, `most` at most."""
    height, width = marked.shape[-2:]
    column = torch.arange(width, device=marked.device, dtype=torch.float32)
    left = torch.where(marked, column, -torch.inf).cummax(-1).values  # the last marked one of the row so far
    right = torch.where(marked, column, torch.inf).flip(-1).cummin(-1).values.flip(-1)
    across = torch.minimum(column - left, right - column).clamp_max(most + 1).square()
    padded = F.pad(across, [0, 0, most, most], value=float((most + 1) ** 2))
    nearest, there = across.clone(), torch.empty_like(across)
    for step in range(-most, most + 1):
        torch.add(padded[..., most + step : most + step + height, :], step**2, out=there)
        torch.minimum(nearest, there, out=nearest)
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
