"""Gram anchoring: the patches of an image stay as alike, pair by pair, as they were to an earlier network (DINOv3,
2508.10104).

Long training improves class tokens while patch features lose their detail; what is held fast here is only how the
patches of an image resemble one another, so the features themselves may move on.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.errors import FINITE, OpsinError, within


@dataclass(frozen=True)
class GramRecipe:
    """Whether and at what the likeness of patches is anchored."""

    weight: float = 0.0
    """Of the term in the loss; 0 leaves it out, DINOv3 takes 2."""
    anchor: str = "start"
    """The network that is held on to: "start", the teacher with which the run or phase begins, or the path of a
    backbone's weights, such as that of an earlier checkpoint."""
    scale: Literal[1, 2] = 1
    """With 2 the anchor sees the same crops at twice the resolution, and its features are reduced to the student's
    grid, which makes them sharper."""
    refresh_every: int = 0
    """Steps after which the teacher of that moment becomes the anchor; 0 keeps the first one."""
    refresh_most: int = 3
    """How often it does."""
    over: Literal["image", "group"] = "image"
    """Patches that are compared: those of one crop, or those of one global crop of all images of a group."""

    def __post_init__(self) -> None:
        within(self, "gram.", weight=(0, 1e4), scale=(1, 2), refresh_every=(0, FINITE), refresh_most=(1, FINITE))
        if not self.anchor:
            raise OpsinError('gram.anchor is empty: give "start" or the path of a backbone\'s weights.')


def gram_loss(student: Tensor, anchor: Tensor) -> Tensor:
    """Mean over all N × N pairs of patches of the squared difference of their two cosine similarities.

    This is the mean squared error of DINOv3's code. The paper writes the squared Frobenius norm, which is N² times as
    much: its weight of 2 belongs to the mean.

    With X and Y the normalised features, E = X - Y and S = (X + Y) / 2, the difference XX' - YY' is ES' + SE'. So only
    small numbers are subtracted where the two networks are nearly equal, as at the start of a run, and no difference of
    large squares loses the digits. Its squared norm is 2⟨E'E, S'S⟩ + 2⟨E'S, S'E⟩, in which no matrix is larger than
    D × D: whichever of N × N and D × D is smaller is computed, so nothing larger than the features is ever stored.

    Args:
        student: patch features `[B, N, D]`; normalised here, and all is computed in at least fp32.
        anchor: `[B, N, D]`.

    Returns:
        `[B]`, from 0 to 4; with N > D, rounding may leave it less than one resolution of its type below 0 where the
        features differ by a rotation alone.
    """
    patches, width = student.shape[1:]
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, torch.float32)
        x, y = (F.normalize(features.to(dtype), dim=-1, eps=1e-8) for features in (student, anchor))
        apart, between = x - y, (x + y) / 2
        if patches <= width:
            half = apart @ between.mT
            return (half + half.mT).square().mean((1, 2))
        squares = (apart.mT @ apart) * (between.mT @ between)
        mixed = apart.mT @ between
        return 2 * (squares + mixed * mixed.mT).sum((1, 2)) / patches**2


def reduced(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features `[B, h, w, D]` resampled to a grid of h' × w' patches, `[B, h', w', D]`, in at least fp32.

    Bicubic and not antialiased, as DINOv3's configuration has it: at half the side, each patch is a weighted mean of
    4 × 4.
    """
    with torch.autocast(features.device.type, enabled=False):
        planes = features.to(torch.promote_types(features.dtype, torch.float32)).permute(0, 3, 1, 2)
        return F.interpolate(planes, size=grid, mode="bicubic").permute(0, 2, 3, 1)
