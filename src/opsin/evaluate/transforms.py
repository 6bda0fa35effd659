"""From pixels to what a frozen backbone takes, each way with a name by which its features are kept."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opsin.backbone.features import evaluation_transform


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
