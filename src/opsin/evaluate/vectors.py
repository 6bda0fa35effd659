"""One unit vector per image, by which images are compared, and PCA whitening of them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.backbone.vit import Architecture
from opsin.errors import OpsinError
from opsin.evaluate.model import Model
from opsin.evaluate.pooled import PART, Pooled, features
from opsin.evaluate.sets import ImageSet
from opsin.evaluate.task import Run
from opsin.evaluate.transforms import Centre, Padded, Transform, Whole

Feature = Literal["cls", "mean", "both"]
"""The class token of the last block after the final norm, as in the paper; the mean patch token; or one after the
other, each of unit length."""
Resize = Literal["whole", "centre", "padded", "longer"]
"""How an image is brought to its size in pixels. whole: shorter side to it, nothing cropped. centre: the crop of the
classification tasks. padded: longer side to it, in a black square. longer: longer side to it, nothing cropped."""

PIECE = 16 * PART
"""Images whose features are in memory at once; of the others only the vector is."""


def transform_of(resize: Resize, size: int, arch: Architecture) -> Transform:
    """The preparation of images for a backbone.

    Raises:
        OpsinError: the crop is no multiple of the patch, or the image would be less than one.
    """
    if resize in ("centre", "padded") and size % arch.patch:
        near = max(1, round(size / arch.patch)) * arch.patch
        raise OpsinError(
            f"--size {size} is no multiple of the backbone's patch {arch.patch}: give --size {near}, or --resize whole."
        )
    if size < arch.patch:
        raise OpsinError(f"--size {size} is below the backbone's patch {arch.patch}: give --size {arch.patch} or more.")
    if resize == "centre":
        return Centre(size)
    return Padded(size) if resize == "padded" else Whole(arch.patch, size, longer=resize == "longer")


def unit(pooled: Pooled, feature: Feature) -> Tensor:
    """Vectors `[N, F]` of unit length; F is the width, or twice that for both. Rows of zeros stay zeros."""
    parts = {"cls": [pooled.cls[:, -1]], "mean": [pooled.mean], "both": [pooled.cls[:, -1], pooled.mean]}[feature]
    return F.normalize(torch.cat([F.normalize(part.float(), dim=1) for part in parts], dim=1), dim=1)


def vectors(
    model: Model, images: ImageSet, transform: Transform, feature: Feature, run: Run
) -> tuple[Tensor, dict[int, str]]:
    """Unit vectors `[N, F]` of a set on the CPU, from kept features or computed, and why images have none.

    Raises:
        OpsinError: see `features`.
    """
    if len(images) <= PIECE:
        known = features(model, images, transform, run)
        return unit(known.pooled, feature), known.bad
    found: list[Tensor] = []
    bad: dict[int, str] = {}
    for start in range(0, len(images), PIECE):
        known = features(model, images.part(np.arange(start, min(start + PIECE, len(images)))), transform, run)
        found.append(unit(known.pooled, feature))
        bad |= {start + index: reason for index, reason in known.bad.items()}
    return torch.cat(found), bad


@dataclass(frozen=True, eq=False)
class Whitening:
    """PCA whitening: centre, project on the principal axes, divide each by its deviation, make the length 1."""

    mean: Tensor
    """`[F]`."""
    projection: Tensor
    """`[F, d]`."""

    def __call__(self, found: Tensor) -> Tensor:
        """Vectors `[N, F]` to unit vectors `[N, d]`."""
        return F.normalize((found - self.mean) @ self.projection, dim=1)


def learn_whitening(found: Tensor, dimensions: int) -> Whitening:
    """PCA whitening learned on vectors `[N, F]`, as the code of the Met data set does for a shrinkage of 1.

    Keeps the `dimensions` strongest axes, or as many as the vectors span: axes without variance cannot be whitened.

    Raises:
        OpsinError: the vectors are all alike.
    """
    mean = found.double().mean(0)
    covariance = torch.zeros(found.shape[1], found.shape[1], dtype=torch.float64)
    for part in found.split(65536):
        centred = part.double() - mean
        covariance += centred.T @ centred / len(found)
    variance, axes = torch.linalg.eigh(covariance)
    variance, axes = variance.flip(0), axes.flip(1)
    kept = min(dimensions, int((variance > 1e-8 * variance[0]).sum())) if variance[0] > 1e-12 else 0
    if not kept:
        raise OpsinError(
            "all images have the same features, so there is nothing to whiten: look at images and weights."
        )
    return Whitening(mean.float(), (axes[:, :kept] / variance[:kept].sqrt()).float())
