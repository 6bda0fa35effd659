"""Random views of an image with its mask, on which segmentation heads are trained: scale, crop, flip, colours.

The steps and their probabilities are those of the toolbox that the reference trains its heads with.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.evaluate.dense import normalised
from opsin.evaluate.segmentation_head import IGNORED
from opsin.evaluate.sliding import size_with

TRIES = 10
"""Crops that are drawn before one with too much of a class is taken after all."""
BRIGHTNESS = 32.0
"""Largest shift of all channels, of 255."""
FACTORS = (0.5, 1.5)
"""Range of the factors of contrast and saturation."""
HUE = 36.0
"""Largest turn of the hue in degrees."""


@dataclass(frozen=True)
class Views:
    """How views are drawn."""

    crop: int
    """Side of the view in pixels."""
    shorter: int
    """Shorter side of the image at scale 1, in pixels."""
    ratios: tuple[float, float]
    """Range of the scale."""
    most: float
    """Largest share of a view's counted pixels that one class may fill, if there are other views."""

    def draw(self, pixels: Tensor, mask: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A view of an image with its mask.

        Args:
            pixels: `[C, H, W]` from 0 to 255.
            mask: int64 `[H, W]`, `IGNORED` where a pixel does not count.
            rng: decides everything.

        Returns:
            The view, normalised float32 `[C, crop, crop]`, and its mask `[crop, crop]`. Where the image is too small
            they are filled up below and to the right, with zeros and `IGNORED`.
        """
        scale = rng.uniform(*self.ratios)
        size = size_with(max(int(self.shorter * scale), 1), *mask.shape)
        for _ in range(TRIES):
            rows, columns = (self._window(side, rng) for side in size)
            seen = mask[_nearest(rows, size[0], mask.shape[0])][:, _nearest(columns, size[1], mask.shape[1])]
            counts = torch.bincount(seen[seen != IGNORED])
            if len(counts) and counts.max() <= self.most * counts.sum():
                break
        view = _bilinear(_bilinear(pixels.float(), rows, size[0]).mT, columns, size[1]).mT
        if rng.random() < 0.5:
            view, seen = view.flip(-1), seen.flip(-1)
        view = normalised(distorted(view, rng))
        missing = (0, self.crop - seen.shape[1], 0, self.crop - seen.shape[0])
        return F.pad(view, missing), F.pad(seen, missing, value=IGNORED)

    def _window(self, side: int, rng: np.random.Generator) -> Tensor:
        """Positions of the resized image, along one side of it, that the view shows."""
        start = int(rng.integers(max(side - self.crop, 0) + 1))
        return torch.arange(start, min(start + self.crop, side))


def _nearest(positions: Tensor, resized: int, side: int) -> Tensor:
    """Where, along a side, lie the centres of pixels of the resized image."""
    return ((positions + 0.5) * (side / resized)).long().clamp_(max=side - 1)


def _bilinear(pixels: Tensor, rows: Tensor, resized: int) -> Tensor:
    """Some rows of an image `[C, H, W]` that is resized to `resized` rows, linear and without antialiasing.

    Only the rows that are wanted are computed: a view at scale 2 is a small part of the resized image.
    """
    side = pixels.shape[1]
    at = ((rows + 0.5) * (side / resized) - 0.5).clamp_(0, side - 1)
    low = at.long()
    share = (at - low)[:, None]
    return torch.lerp(pixels[:, low], pixels[:, (low + 1).clamp_(max=side - 1)], share)


def distorted(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Random brightness, contrast, saturation and hue, each with probability 1/2, of pixels `[C, H, W]` in 0 … 255.

    Contrast is a factor of the values themselves and comes before or after the colours, as likely. The reference rounds
    to 8 bits after each step; here nothing is rounded. Other than three channels have no colour: it is left as it is.
    """
    if rng.random() < 0.5:
        pixels = (pixels + rng.uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 255)
    contrast = rng.uniform(*FACTORS) if rng.random() < 0.5 else None
    early = rng.random() < 0.5
    saturation = rng.uniform(*FACTORS) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-HUE, HUE) if rng.random() < 0.5 else 0.0
    if contrast is not None and early:
        pixels = (pixels * contrast).clamp(0, 255)
    if len(pixels) == 3 and (saturation, hue) != (1, 0):
        pixels = coloured(pixels, saturation, hue)
    if contrast is not None and not early:
        pixels = (pixels * contrast).clamp(0, 255)
    return pixels


def coloured(pixels: Tensor, saturation: float, hue: float) -> Tensor:
    """RGB `[3, H, W]` with its saturation in HSV multiplied, at most to 1, and its hue turned by degrees."""
    red, green, blue = pixels
    value, least = pixels.amax(0), pixels.amin(0)
    chroma = value - least
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    chroma = torch.minimum(chroma * saturation, value)
    places = torch.tensor([5.0, 3.0, 1.0])[:, None, None] + sixths + hue / 60
    places = places.remainder(6)
    return value - chroma * torch.minimum(places, 4 - places).clamp(0, 1)
