"""The earlier network that Gram anchoring holds on to; see `gram` for what is compared."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from opsin.backbone import weights
from opsin.backbone.vit import VisionTransformer
from opsin.data.stream import Batch
from opsin.errors import OpsinError
from opsin.pretrain.gram import GramRecipe, reduced

START = "start"
"""The anchor that is the teacher with which a run begins."""


class Anchor:
    """A backbone in the precision of the products, whole in every process, that no gradient changes.

    Args:
        recipe: how it is used.
        teacher: the teacher's backbone at the start, whole, whose place and form it takes.
        dtype: of the products.
        device: that computes.
    """

    def __init__(
        self, recipe: GramRecipe, teacher: VisionTransformer, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.recipe, self.dtype = recipe, dtype
        backbone = copy.deepcopy(teacher)
        if recipe.anchor != START:
            try:
                weights.adapt(backbone, recipe.anchor)
            except OpsinError as error:
                raise OpsinError(f"gram.anchor: {str(error).partition(': only channels')[0]}") from None
        self.backbone = backbone.to(device, dtype).requires_grad_(False)

    @torch.no_grad()
    def patches(self, batch: Batch, micro: int) -> Tensor:
        """Its features of a micro-batch's global crops, unmasked: `[2b, N, D]` on the student's grid."""
        crops = batch.crops("global", micro, self.recipe.scale).to(self.dtype)
        features = self.backbone([crops])[0].patches
        side = batch.recipe.crops.global_size // batch.recipe.patch
        return reduced(features, (side, side)).flatten(1, 2)

    def follow(self, step: int, teacher: VisionTransformer) -> None:
        """Before a step: become the teacher of this moment if that is due. All processes call it together."""
        every = self.recipe.refresh_every
        if every and step and step % every == 0 and step // every <= self.recipe.refresh_most:
            with torch.no_grad():
                for mine, theirs in zip(self.backbone.parameters(), teacher.parameters(), strict=True):
                    mine.copy_(whole(theirs))

    def state(self) -> Mapping[str, Tensor]:
        """Tensors that a checkpoint keeps."""
        return self.backbone.state_dict()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded over the processes, which then call this together."""
    gathered = getattr(tensor.detach(), "full_tensor", None)
    full: Tensor = tensor.detach() if gathered is None else gathered()
    return full
