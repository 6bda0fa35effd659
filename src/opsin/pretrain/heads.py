"""Projection heads: an MLP to a small bottleneck on the unit sphere, and prototypes there."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.errors import within
from opsin.pretrain.prototypes import Prototypes


@dataclass(frozen=True)
class HeadRecipe:
    """Sizes of the DINO head (class tokens) and the iBOT head (patches)."""

    tied: bool = False
    """One head for both losses, sized by the DINO fields (iBOT's choice; DINOv2 unties them at scale, paper §4)."""
    dino_prototypes: int = 65536
    """Prototypes of the DINO head."""
    dino_bottleneck: int = 256
    """Width of the DINO head's bottleneck."""
    ibot_prototypes: int = 65536
    """Prototypes of the iBOT head."""
    ibot_bottleneck: int = 256
    """Width of the iBOT head's bottleneck."""
    layers: int = 3
    """Linear layers of the MLP."""
    hidden: int = 2048
    """Width of the MLP's hidden layers."""

    def __post_init__(self) -> None:
        prototypes = ("dino_prototypes", "ibot_prototypes")
        widths = ("dino_bottleneck", "ibot_bottleneck", "hidden")
        within(
            self, "heads.", **dict.fromkeys(prototypes, (1, 1e8)), **dict.fromkeys(widths, (1, 1e6)), layers=(1, 100)
        )


class Head(nn.Module):
    """`[…, D]` to L2-normalised bottleneck features `[…, d]`; `last_layer` holds the prototypes.

    State-dict names are the reference's: `mlp.{0,2,4}.*`, `last_layer.weight_g`, `last_layer.weight_v`.
    """

    def __init__(self, width: int, recipe: HeadRecipe, prototypes: int, bottleneck: int) -> None:
        super().__init__()
        sizes = [width, *[recipe.hidden] * (recipe.layers - 1), bottleneck]
        layers: list[nn.Module] = []
        for into, out in pairwise(sizes):
            linear = nn.Linear(into, out)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(prototypes, bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        """Features on the unit sphere, at least fp32: half precision would cost the scores three digits."""
        z: Tensor = self.mlp(x)
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
