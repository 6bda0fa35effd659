"""Digital corruptions of ImageNet-C: contrast, elastic, pixelate, JPEG, saturate (extra); and JPEG files.

Images are float32 `[B, 3, H, W]` from 0 to 255, what was drawn lies on the same device.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from opsin.evaluate.corruptions.filters import gaussian

CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
"""What is left of it."""
ELASTIC = ((488.0, 170.8, 24.4), (488.0, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88))
"""Strength, standard deviation of the field, farthest shift of the corners, all in pixels: multiples of 244 (which the
published generator says for 224)."""
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)
"""Side of the small image as a share."""
JPEG = (25, 18, 15, 10, 7)
"""Quality."""
SATURATE = ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2))
"""What the saturation is multiplied by, and what is added."""
THREADS = min(8, os.cpu_count() or 1)
"""Of the JPEG library, which computes on the CPU: more than cores only wait for one another."""


def contrast(images: Tensor, severity: int) -> Tensor:
    """Draws values towards the mean of each colour."""
    mean = images.mean((2, 3), keepdim=True)
    return mean + (images - mean) * CONTRAST[severity - 1]


def saturate(images: Tensor, severity: int) -> Tensor:
    """Changes the saturation (HSV), hue and value staying; grey has the hue 0, red, as usual."""
    factor, added = SATURATE[severity - 1]
    value = images.amax(1, keepdim=True)
    lack = value - images  # by colour, 0 for the strongest; proportional to the saturation
    full = lack.amax(1, keepdim=True)
    saturation = full / value.clamp_min(1)
    wanted = (saturation * factor + added).clamp(0, 1)
    red = torch.tensor([0.0, 1.0, 1.0], device=images.device)[:, None, None]
    shape = torch.where(full > 0, lack / full.clamp_min(1), red)
    return value * (1 - wanted * shape)


def pixelate(images: Tensor, severity: int) -> Tensor:
    """Shrinks by averages over boxes, rounded after each direction as Pillow does, and repeats pixels."""
    share = PIXELATE[severity - 1]
    height, width = images.shape[-2:]
    across = torch.from_numpy(_boxes(width, int(width * share))).to(images)
    down = torch.from_numpy(_boxes(height, int(height * share))).to(images)
    small = (images @ across.T).add_(0.5).floor_()
    small = (down @ small).add_(0.5).floor_()
    return F.interpolate(small, (height, width), mode="nearest-exact")


@lru_cache(maxsize=32)
def _boxes(side: int, smaller: int) -> NDArray[np.float64]:
    """Means of the pixels whose centres lie in each of `smaller` boxes, `[smaller, side]`."""
    scale = side / smaller
    edges = np.arange(smaller + 1)[:, None] * scale
    centres = np.arange(side) + 0.5
    inside = ((centres >= edges[:-1]) & (centres < edges[1:])).astype(np.float64)
    weights: NDArray[np.float64] = inside / inside.sum(1, keepdims=True)
    return weights


def jpeg_compression(images: Tensor, severity: int) -> Tensor:
    """Compresses uint8 images as JPEG."""
    return recompressed(images, JPEG[severity - 1])


def recompressed(images: Tensor, quality: int) -> Tensor:
    """uint8 `[B, 3, H, W]` after a round through JPEG of a quality, on the CPU, back on its device."""

    def again(image: Tensor) -> Tensor:
        found: Tensor = decode_jpeg(encode_jpeg(image, quality))  # without Python's lock, which Pillow holds throughout
        return found

    with ThreadPoolExecutor(min(THREADS, len(images))) as pool:
        return torch.stack(list(pool.map(again, images.cpu()))).to(images.device)


def elastic_transform(images: Tensor, severity: int, corners: Tensor, chance: Tensor) -> Tensor:
    """Moves three points of the image (`corners`, uniform, `[B, 3, 2]`), then every pixel by a smooth field.

    The field is `chance` (uniform, `[B, 2, H, W]`: across and down), blurred. As in the published generator each of the
    two samples the image linearly, the first with the border mirrored at the last pixel, the second beyond it.
    """
    strength, sigma, farthest = ELASTIC[severity - 1]
    height, width = images.shape[-2:]
    middle = torch.tensor([height // 2, width // 2], dtype=torch.float64)
    reach = min(height, width) // 3
    points = middle + reach * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    moved = points + (corners.cpu().double() * 2 - 1) * farthest
    ones = torch.ones(3, 1, dtype=torch.float64)
    # Where a pixel of the result comes from: the map back from the moved points.
    back = torch.linalg.solve(torch.cat([moved, ones.expand(len(moved), 3, 1)], 2), points).to(images)
    rows, columns = torch.meshgrid(
        torch.arange(height, device=images.device), torch.arange(width, device=images.device), indexing="ij"
    )
    grid = torch.stack([columns, rows, torch.ones_like(rows)], dim=-1).to(images)
    warped = _sampled(images, *torch.einsum("hwi,bij->jbhw", grid, back), edge_twice=False)
    field = gaussian(chance * 2 - 1, sigma, truncate=3.0, border="reflect") * strength
    return _sampled(warped, columns + field[:, 0], rows + field[:, 1], edge_twice=True)


def _sampled(images: Tensor, x: Tensor, y: Tensor, *, edge_twice: bool) -> Tensor:
    """Linear samples at pixels `x` and `y` `[B, H, W]`, with mirrored borders."""
    sides = torch.tensor(images.shape[:-3:-1], device=images.device)
    places = torch.stack([x, y], dim=-1)
    # grid_sample counts from -1 to 1, over centres of the outermost pixels or over their outer edges.
    grid = (2 * places + 1) / sides - 1 if edge_twice else 2 * places / (sides - 1) - 1
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=not edge_twice)
