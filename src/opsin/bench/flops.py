"""Operations that a step needs, counted by torch on tensors without values."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from opsin.data.stream import Batch
from opsin.pretrain.heads import Head
from opsin.pretrain.objective import Network
from opsin.pretrain.recipe import Recipe


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention that a call makes.

    On tensors of the meta device nothing is computed, so counting costs no time or memory.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


class _Shapes(Batch):
    """A batch of which only the shapes matter."""

    def crops(self, kind: Literal["global", "local"], micro: int, scale: int = 1) -> Tensor:  # noqa: ARG002
        """Crops without pixels."""
        recipe = self.recipe.crops
        count, size = recipe.count(kind), recipe.size(kind)
        return torch.empty((count * self.micro_size, 3, size, size), device=self.device)


def step_flops(recipe: Recipe) -> int:
    """Operations of matrix products, convolutions and attention in one step, counted on a textbook step.

    That is: teacher and student forward, student backward, all scores formed once; Sinkhorn–Knopp has none.
    """
    meta = torch.device("meta")
    with meta:
        network = Network(recipe.backbone, recipe.heads)
    image = torch.empty((3, 1, 1), dtype=torch.uint8)
    batch = _Shapes(recipe.stream(), 0, [image] * recipe.batch.size, meta)
    hidden = batch.masked(0).hidden

    def scores(head: Head, tokens: Tensor) -> Tensor:
        return F.linear(head(tokens), head.last_layer.weight())

    def forward(crops: list[Tensor], kept: list[Tensor] | None) -> Tensor:
        features = network.backbone(crops, None, kept)
        image = scores(network.dino_head, torch.cat([f.cls for f in features]))
        patch = scores(network.patch_head, features[0].patches.flatten(0, 2)[hidden])
        return image.sum() + patch.sum()

    def both() -> None:
        crops = [batch.crops("global", 0), batch.crops("local", 0)]
        with torch.no_grad():
            forward(crops[:1], None)
        forward(crops, batch.kept(0)).backward()

    return flops(both)
