"""What depth is trained with and measured by: the scale-invariant log loss, a gradient loss, and the field's metrics.

Predictions and targets are metres `[B, H, W]`. A target that is 0, negative, infinite or NaN is unknown there.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from opsin.errors import OpsinError

Area = Literal["all", "eigen", "garg", "sun"]
"""The part of an image that is measured: all of it, the crop of Eigen et al. (NYU) or Garg et al. (KITTI), or the rows
and columns of Eigen's crop in depth maps of any size, as published for SUN RGB-D."""
EPSILON = 1e-3
"""Metres that are added before the logarithm, in losses."""
MEAN_WEIGHT = 0.15
"""Weight of the squared mean error beside the variance of the logarithms."""
GROUP = 2
"""Images over which the loss takes its variance: those of one GPU of the reference."""
SCALES = 4
"""Of the gradient loss: every pixel, every second, fourth, eighth."""


def known(target: Tensor) -> Tensor:
    """Booleans: where a target is above 0 and finite."""
    return (target > 0) & target.isfinite()


def sig_loss(prediction: Tensor, target: Tensor, *, mean_only: bool = False) -> Tensor:
    """The scale-invariant log loss sqrt(var(g) + 0.15 mean(g)²) with g = log(p + ε) - log(t + ε), over known pixels.

    As in the reference: one variance (unbiased) over all pixels of all images given, ε = 1e-3 m. See `grouped`.

    Args:
        prediction: `[B, H, W]`.
        target: of the same shape.
        mean_only: leave the variance out, as the reference does in its first 100 steps.

    Returns:
        A scalar; 0, with a gradient of 0, if nothing is known.
    """
    valid = known(target)
    if not valid.any():
        return prediction.sum() * 0
    error = torch.log(prediction[valid] + EPSILON) - torch.log(target[valid] + EPSILON)
    squared = MEAN_WEIGHT * error.mean() ** 2
    if not mean_only and error.numel() > 1:
        squared = squared + error.var()
    # A perfect fit, where the root has no slope, is kept from giving NaN.
    return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()


def gradient_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The multi-scale gradient loss of MegaDepth (1804.00607): how far slopes of the log depth are off.

    At each of four scales (every 2^k-th pixel) the absolute differences of g between neighbours, of rows and of
    columns, where both are known, are summed and divided by the number of known pixels of that scale.

    The reference names this loss with weight 0.5, but its code slices the axes of batch and channel, so that it is 0
    for one image or two per GPU: the released heads were trained without it.
    """
    valid = known(target)
    error = torch.log(prediction + EPSILON) - torch.log(torch.where(valid, target, 1.0) + EPSILON)
    total = prediction.sum() * 0
    for scale in range(SCALES):
        step = 2**scale
        slopes, there = error[:, ::step, ::step], valid[:, ::step, ::step]
        count = there.sum().clamp_min(1)
        rows = (slopes[:, 1:] - slopes[:, :-1]).abs()[there[:, 1:] & there[:, :-1]].sum()
        columns = (slopes[:, :, 1:] - slopes[:, :, :-1]).abs()[there[:, :, 1:] & there[:, :, :-1]].sum()
        total = total + (rows + columns) / count
    return total


def grouped(loss: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    """The mean of a loss over groups of two images, in order: what the reference's GPUs, with two each, average."""
    pairs = zip(prediction.split(GROUP), target.split(GROUP), strict=True)
    return torch.stack([loss(*pair) for pair in pairs]).mean()


def measured_area(area: Area, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns that are measured, of a target of this size.

    Eigen's are rows 45 to 470 and columns 41 to 600 of 480×640, and for "sun" the same of any size; Garg's are shares
    of the size, rounded down.

    Raises:
        OpsinError: Eigen's crop of another size.
    """
    if area in ("eigen", "sun"):
        if area == "eigen" and (height, width) != (480, 640):
            raise OpsinError(
                f"Eigen's crop is of depth maps of 480×640, and here is one of {height}×{width}: give --area all."
            )
        return slice(45, 471), slice(41, 601)
    if area == "garg":
        rows = slice(int(0.40810811 * height), int(0.99189189 * height))
        return rows, slice(int(0.03594771 * width), int(0.96405229 * width))
    return slice(None), slice(None)


def to_measure(target: Tensor, area: Area, min_depth: float, max_depth: float) -> Tensor:
    """Booleans `[H, W]`: pixels of a target that count, strictly between the depths and within the area."""
    inside = torch.zeros_like(target, dtype=torch.bool)
    inside[measured_area(area, *target.shape)] = True
    return inside & (target > min_depth) & (target < max_depth)


def measures(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """The field's figures for the pixels of one image, both `[P]`, in metres and above 0, with P at least 1.

    - rmse: root of the mean squared error, metres.
    - abs_rel: mean of |p - t| / t.
    - delta1, delta2, delta3: share of pixels with max(p / t, t / p) < 1.25, 1.25², 1.25³.
    - log10: mean of |log10 p - log10 t|.
    - rmse_log: root of the mean squared error of natural logarithms.
    - silog: 100 times the standard deviation (biased) of log p - log t, as KITTI's board gives it.
    """
    p, t = prediction.double(), target.double()
    ratio = torch.maximum(p / t, t / p)
    logs = p.log() - t.log()
    return {
        "rmse": (p - t).square().mean().sqrt().item(),
        "abs_rel": ((p - t).abs() / t).mean().item(),
        "delta1": (ratio < 1.25).double().mean().item(),
        "delta2": (ratio < 1.25**2).double().mean().item(),
        "delta3": (ratio < 1.25**3).double().mean().item(),
        "log10": (logs.abs() / math.log(10)).mean().item(),
        "rmse_log": logs.square().mean().sqrt().item(),
        "silog": 100 * logs.var(correction=0).sqrt().item(),
    }


def averages(images: list[dict[str, float]]) -> Mapping[str, float]:
    """Each figure's mean over images: an image counts once, however many of its pixels are known."""
    return {name: float(np.mean([image[name] for image in images])) for name in images[0]}
