"""From pixels to what a frozen backbone takes, each way with a name by which its features are kept."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.backbone.features import evaluation_transform
from opsin.constants import normalisation
from opsin.data.decode import DecodeError

LONGEST = 32
"""Times that one side of an image may be the other, if it is seen whole: attention grows with the square of it."""


class Transform(Protocol):
    """A deterministic preparation of an image."""

    @property
    def name(self) -> str:
        """Tells this preparation from all others: part of the key of kept features."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """`[C, H, W]`, uint8 as a rule, to float32 `[C, h, w]`, normalised, h and w multiples of the patch."""


@dataclass(frozen=True)
class Centre:
    """The centre crop on which classifiers are evaluated: resize, crop, normalise (`evaluation_transform`)."""

    size: int = 224
    """Side of the crop in pixels."""
    shorter: int | None = None
    """Shorter side before the crop; None takes the reference's ratio of 256 to 224."""

    @property
    def name(self) -> str:
        """As in "centre-224-of-256"."""
        return f"centre-{self.size}-of-{self.shorter or round(self.size * 256 / 224)}"

    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 `[C, size, size]`."""
        return evaluation_transform(pixels, self.size, self.shorter)


@dataclass(frozen=True)
class Padded:
    """The whole image in a square: the longer side resized to `size`, the rest black, as for landmarks.

    This is how DINOv3 (appendix D.8) puts Revisited Oxford and Paris: longer side to 224, then a full centre crop.
    """

    size: int = 224
    """Side of the square in pixels."""

    @property
    def name(self) -> str:
        """As in "padded-224"."""
        return f"padded-{self.size}"

    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 `[C, size, size]`; an odd row or column of black is below or to the right."""
        longer = max(pixels.shape[-2:])
        target = [max(1, self.size * side // longer) for side in pixels.shape[-2:]]
        resized = _resized(pixels, target)
        (top, bottom), (left, right) = (((self.size - side) // 2, (self.size - side + 1) // 2) for side in target)
        return _normalised(F.pad(resized, (left, right, top, bottom)))


@dataclass(frozen=True)
class Whole:
    """The whole image with its aspect kept, both sides multiples of the patch, resized once (no crop, no border)."""

    patch: int
    """Side of a patch in pixels."""
    size: int = 224
    """Pixels of the side that is prescribed."""
    longer: bool = False
    """False: `size` is the shorter side, and sides go to the nearest multiple of the patch, as in
    `FeatureExtractor.preprocess`. True: it is the longer side, and both go down to a multiple, as DINOv3 (appendix D.8)
    prepares the images of Met, with 508."""

    @property
    def name(self) -> str:
        """As in "whole-224-by-14" or "whole-longer-508-by-14"."""
        return f"whole-{'longer-' if self.longer else ''}{self.size}-by-{self.patch}"

    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 `[C, h, w]`.

        Raises:
            DecodeError: one side is more than `LONGEST` times the other.
        """
        sides = pixels.shape[-2:]
        if not self.longer and max(sides) > LONGEST * min(sides):
            raise DecodeError(None, f"one side is more than {LONGEST} times the other, too long to be seen whole")
        scale = self.size / (max(sides) if self.longer else min(sides)) / self.patch
        extra = 1e-6 if self.longer else 0.5  # 1e-6: a side that is a multiple stays one
        return _normalised(_resized(pixels, [max(1, int(side * scale + extra)) * self.patch for side in sides]))


def _resized(pixels: Tensor, size: list[int]) -> Tensor:
    """Antialiased bicubic, to floats from 0 to 1; what overshoots is clamped, as 8-bit resizing does."""
    scale = 1.0 if pixels.is_floating_point() else torch.iinfo(pixels.dtype).max
    return F.interpolate(pixels[None].float(), size, mode="bicubic", antialias=True)[0].div_(scale).clamp_(0, 1)


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in normalisation(len(pixels)))
    return (pixels - mean) / std
