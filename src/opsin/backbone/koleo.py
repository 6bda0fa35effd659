"""KoLeo: spreads the class tokens of a group evenly over the sphere (Sablayrolles et al., 1806.03198; paper §4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

CLOSEST = 1e-6
"""Distances are not taken below this: copies of an image have distance 0, whose logarithm and gradient are infinite.
Below it the term is constant and has no gradient. It is ten times fp32's resolution, and well below the distances of a
fresh network with LayerScale 1e-5 (some 1e-5 between images), which must still be driven apart."""


def koleo(features: Tensor) -> Tensor:
    """-1/n Σ log d_i, with d_i the distance of sample i to its nearest neighbour in its group; one value per group.

    Args:
        features: `[groups, n, D]`, n ≥ 2; normalised here, in at least fp32: small distances underflow in half.

    Returns:
        `[groups]`.
    """
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1, eps=1e-8)
        with torch.no_grad():
            similarity = x @ x.transpose(-1, -2)
            similarity.diagonal(dim1=-2, dim2=-1).fill_(-2)
            nearest = similarity.argmax(dim=-1, keepdim=True)
        neighbour = torch.take_along_dim(x, nearest, dim=1)
        squared = (x - neighbour).square().sum(-1).clamp(min=CLOSEST**2)
        return -0.5 * squared.log().mean(-1)
