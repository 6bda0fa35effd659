"""What a segmentation is measured by, and how it is shown."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from opsin.evaluate.segmentation_head import IGNORED
from opsin.evaluate.sliding import size_with
from opsin.evaluate.task import Picture

PICTURE_SIDE = 512
"""Longer side of a photo in them, at most."""


class Scores(NamedTuple):
    """What a confusion matrix says."""

    iou: NDArray[np.float64]
    """Intersection over union of every class, `[K]`; NaN where a class is neither there nor predicted."""
    miou: float
    """Its mean over the other classes."""
    accuracy: float
    """Share of counted pixels that are right."""


def confused(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Pixels by true and predicted class, int64 `[K, K]`, where the truth is not `IGNORED`."""
    counted = truth != IGNORED
    cells = truth[counted] * classes + predicted[counted]
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def scored(confusion: NDArray[np.int64]) -> Scores:
    """Intersection over union by class, its mean over classes that occur in truth or prediction, and pixel accuracy."""
    right = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - np.diagonal(confusion)
    iou = np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)
    return Scores(iou, float(np.nanmean(iou)), float(right.sum() / confusion.sum()))


def colours(classes: int) -> NDArray[np.uint8]:
    """Colours `[K, 3]` of classes, the same for every K: PASCAL VOC's, whose channels take the bits of the number."""
    number = np.arange(classes)
    table = np.zeros((classes, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            table[:, channel] |= ((number >> (3 * bit + channel)) & 1) << (7 - bit)
    return table.astype(np.uint8)


def side_by_side(name: str, pixels: Tensor, truth: Tensor, predicted: Tensor) -> Picture:
    """Photo, truth (white where it does not count) and prediction."""
    height, width = truth.shape
    shrunk = size_with(max(min(height, width) * PICTURE_SIDE // max(height, width), 1), height, width)
    size = shrunk if max(height, width) > PICTURE_SIDE else (height, width)
    bands = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    photo = F.interpolate(bands[None], size, mode="bilinear", antialias=True)[0]
    table = colours(max(int(truth.max()), int(predicted.max())) + 1)
    table = np.concatenate([table, np.full((1, 3), 255, dtype=np.uint8)])  # the last one is that of IGNORED, -1
    parts = [photo.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()]
    for classes in (truth, predicted):
        small = F.interpolate(classes[None, None].float(), size, mode="nearest-exact")[0, 0].long()
        parts.append(table[small.numpy()])
    return Picture(f"{name}: image, truth, prediction", np.concatenate(parts, axis=1))
