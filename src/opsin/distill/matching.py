"""Distillation without prototypes: the student's tokens, projected to the teacher's width, follow the teacher's.

The distance of two tokens s (the student's, projected) and t (the teacher's) is 1 - s·t / (|s| |t|), from 0 to 2.
AM-RADIO (2312.06709) compared it with L1, mean squared error and smooth L1 and found that it made the better students.
It has no scale, so no statistics of the teacher's channels are needed, and it leaves the lengths of tokens free:
neighbours are found by cosine. For patches AM-RADIO adds a tenth of smooth L1, so that lengths match too; here they do
not, and the loss has no scale in any term.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError
from opsin.pretrain.objective import Learner


class MatchedNetwork(Learner):
    """A backbone, and the linear maps that take its class and patch tokens to the teacher's width."""

    def __init__(self, architecture: Architecture, teacher_width: int) -> None:
        super().__init__()
        self.backbone = VisionTransformer(architecture)
        self.projection = nn.ModuleDict()
        for token in ("cls", "patch"):
            linear = nn.Linear(architecture.width, teacher_width)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            self.projection[token] = linear


class Matching:
    """Computes the loss of `student` against a frozen teacher's features.

    The network computes in `dtype`; distances and sums are at least fp32.
    """

    def __init__(self, student: MatchedNetwork, dtype: torch.dtype) -> None:
        self.student, self.dtype = student, dtype

    def losses(
        self, cls: Tensor, patches: Tensor, crops: Sequence[Tensor], kept: Sequence[Tensor] | None, size: int
    ) -> dict[str, Tensor]:
        """The terms of b images; their sum over terms and micro-batches is the loss of the batch.

        "cls": a global crop's distance is that of its class token to the teacher's of the same crop, a local crop's the
        mean of the two to the teacher's of both global crops; the mean over all crops, then over images. "patch": the
        mean over the patches of both global crops, each to the teacher's same patch, then over images. Both terms have
        weight 1.

        Args:
            cls: the teacher's class tokens `[b, 2, D]` of the global crops.
            patches: the teacher's patch tokens `[2b, N, D]` of the global crops, on the student's grid.
            crops: global `[2b, C, S, S]`, and if there are any local ones `[m·b, C, s, s]`, crop by crop.
            kept: samples that stochastic depth keeps, for each of `crops`; None keeps all.
            size: images of the whole batch.

        Raises:
            OpsinError: the teacher's tokens are not as many or as wide as the student's projected ones.
        """
        b = len(crops[0]) // 2
        features = self.student.backbone([crop.to(self.dtype) for crop in crops], None, kept)
        # [views, b, D] to [b, views, D]: two global views, then the local ones
        tokens = torch.cat([f.cls.unflatten(0, (-1, b)) for f in features]).transpose(0, 1)
        image = _directions(self.student.projection["cls"](tokens))
        patch = _directions(self.student.projection["patch"](features[0].patches.flatten(1, 2)))
        if patches.shape != patch.shape or cls.shape != image[:, :2].shape:
            raise OpsinError(
                f"the teacher gives class tokens {list(cls.shape)} and patch tokens {list(patches.shape)} where the "
                f"student needs {list(image[:, :2].shape)} and {list(patch.shape)}: resample the teacher's patches to "
                "the student's grid, and make the student for the teacher's width."
            )
        with torch.no_grad():
            image_target, patch_target = _directions(cls.to(image.dtype)), _directions(patches.to(patch.dtype))
        distances = 1 - torch.einsum("bvd,bgd->bvg", image, image_target)
        return {
            "cls": (distances * _pairs(image.shape[1], image)).sum() / size,
            "patch": (1 - (patch * patch_target).sum(-1)).mean() * (b / size),
        }

    def state(self) -> Mapping[str, Tensor]:
        """Tensors that a checkpoint keeps besides the network: none."""
        return {}


def _directions(tokens: Tensor) -> Tensor:
    """Tokens `[…, D]` at length 1, at least fp32."""
    return F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)


def _pairs(views: int, like: Tensor) -> Tensor:
    """`[views, 2]`: how much each student view's distance to each of the teacher's counts; rows have equal sums."""
    pairs = like.new_full((views, 2), 0.5)
    pairs[:2] = torch.eye(2, dtype=like.dtype, device=like.device)
    return pairs / views
