"""A linear classifier on pooled features, as linear evaluation trains it and the official release ships it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opsin.evaluate.pooled import Pooled


@dataclass(frozen=True, eq=False)
class Classifier:
    """One linear layer on the class tokens of the last blocks, with or without the mean patch token."""

    weight: Tensor
    """`[K, F]`, F = (blocks + mean) · D."""
    bias: Tensor
    """`[K]`."""
    blocks: int
    """Last blocks whose class tokens go in, after the final norm: 1 or 4."""
    mean: bool
    """Whether the mean patch token of the last block follows them."""

    def logits(self, pooled: Pooled) -> Tensor:
        """Scores `[N, K]` of pooled features."""
        return inputs(pooled, self.blocks, self.mean) @ self.weight.T + self.bias


def inputs(pooled: Pooled, blocks: int, mean: bool) -> Tensor:
    """What such a classifier sees, `[N, (blocks + mean)·D]`: earlier blocks first, the mean patch token last."""
    tokens = pooled.cls[:, -blocks:].flatten(1).float()
    return torch.cat([tokens, pooled.mean.float()], dim=1) if mean else tokens
