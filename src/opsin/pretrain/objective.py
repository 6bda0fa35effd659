"""What one training step computes: DINO + iBOT + KoLeo between a student and its moving average (paper §4).

The teacher does not change within a step, and balancing needs only bottleneck features. So the teacher sees *all*
micro-batches first, its assignments are balanced over the whole batch, and then the student goes through the
micro-batches one by one: the gradients are those of the undivided batch (up to the order of floating-point sums).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.data.crops import Kind
from opsin.data.stream import Batch
from opsin.errors import within
from opsin.pretrain.heads import Head, HeadRecipe
from opsin.pretrain.koleo import koleo
from opsin.pretrain.prototypes import Prototypes, Targets


@dataclass(frozen=True)
class LossRecipe:
    """The terms of the loss."""

    dino: float = 1.0
    """Weight of the image-level loss."""
    ibot: float = 1.0
    """Weight of the patch-level loss."""
    koleo: float = 0.1
    """Weight of the spreading regulariser."""
    koleo_crops: Literal["both", "first"] = "both"
    """Global crops whose class tokens are spread: both, as the released weights were trained, or the first (paper)."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax."""
    centering: Literal["sinkhorn", "average"] = "sinkhorn"
    """What keeps the teacher's assignments from collapsing: Sinkhorn–Knopp, or subtracting a moving average."""
    sinkhorn_iterations: int = 3
    """Iterations of Sinkhorn–Knopp."""
    centre_momentum: float = 0.9
    """Momentum of the moving average, for centering: average."""

    def __post_init__(self) -> None:
        within(self, "loss.", dino=(0, 1e6), ibot=(0, 1e6), koleo=(0, 1e6), student_temperature=(1e-3, 1e3))
        within(self, "loss.", sinkhorn_iterations=(1, 1000), centre_momentum=(0, 1))


class Network(nn.Module):
    """A backbone with its heads: the student, or its moving average, the teacher."""

    def __init__(self, architecture: Architecture, heads: HeadRecipe) -> None:
        super().__init__()
        self.backbone = VisionTransformer(architecture)
        width = architecture.width
        self.dino_head = Head(width, heads, heads.dino_prototypes, heads.dino_bottleneck)
        if not heads.tied:
            self.ibot_head = Head(width, heads, heads.ibot_prototypes, heads.ibot_bottleneck)

    @property
    def patch_head(self) -> Head:
        """The head of the patch loss: its own, or the DINO head when they are tied."""
        head = getattr(self, "ibot_head", self.dino_head)
        assert isinstance(head, Head)
        return head


@dataclass(frozen=True)
class StepTargets:
    """The teacher's assignments of a whole batch."""

    image: Targets
    """Of n images with 2 views, the global crops."""
    patch: Targets
    """Of all hidden patches of the batch, one view each."""
    patch_starts: list[int]
    """Where each micro-batch's hidden patches begin, and the end of the last."""


class Objective:
    """Computes the loss of `student` against `teacher`; owns the centres when centering is a moving average."""

    def __init__(self, loss: LossRecipe, student: Network, teacher: Network, dtype: torch.dtype) -> None:
        self.loss, self.student, self.teacher, self.dtype = loss, student, teacher, dtype
        self.weights_dtype = student.backbone.cls_token.dtype
        # Scores need products with an fp32 result, which a CPU has not for half precision: rounding would gain nothing.
        self.scores_dtype = dtype if student.backbone.cls_token.device.type != "cpu" else self.weights_dtype
        prototypes = (teacher.dino_head.last_layer, teacher.patch_head.last_layer)
        self.centres = {
            name: layer.weight_g.new_zeros(len(layer.weight_g))
            for name, layer in zip(("image", "patch"), prototypes, strict=True)
            if loss.centering == "average"
        }

    def _autocast(self, device: torch.device) -> torch.autocast:
        half = self.dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(device.type, self.dtype if half else None, enabled=half)

    @torch.no_grad()
    def targets(self, batch: Batch, temperature: Tensor) -> StepTargets:
        """The teacher's view: all micro-batches, unmasked and without stochastic depth, then balanced together."""
        images, patches, starts = [], [], [0]
        for micro in range(batch.micro_batches):
            crops = batch.crops("global", micro).to(self.weights_dtype)
            masked = batch.masked(micro)
            with self._autocast(crops.device):
                features = self.teacher.backbone([crops])[0]
                images.append(self.teacher.dino_head(features.cls.unflatten(0, (2, -1)).transpose(0, 1)))
                patches.append(self.teacher.patch_head(features.patches.flatten(0, 2)[masked.index])[:, None])
            starts.append(starts[-1] + len(masked.index))
        return StepTargets(
            image=self._balanced("image", self.teacher.dino_head.last_layer, torch.cat(images), temperature),
            patch=self._balanced("patch", self.teacher.patch_head.last_layer, torch.cat(patches), temperature),
            patch_starts=starts,
        )

    def _balanced(self, name: str, layer: Prototypes, features: Tensor, temperature: Tensor) -> Targets:
        if self.loss.centering == "sinkhorn":
            return layer.balance(features, temperature, self.loss.sinkhorn_iterations, self.scores_dtype)
        centre = self.centres[name]
        targets = layer.centre(features, temperature, centre.clone(), self.scores_dtype)
        if len(features):  # the centre in use is one step old, as in the reference
            centre.lerp_(layer.mean_scores(features), 1 - self.loss.centre_momentum)
        return targets

    def terms(self, batch: Batch, micro: int, targets: StepTargets) -> dict[str, Tensor]:
        """The weighted terms of one micro-batch; their sum over terms and micro-batches is the loss of the batch."""
        kinds: list[Kind] = ["global", "local"] if batch.recipe.crops.local_count else ["global"]
        crops = [batch.crops(kind, micro).to(self.weights_dtype) for kind in kinds]
        masked = batch.masked(micro)
        first = micro * batch.micro_size
        b = batch.micro_size
        with self._autocast(crops[0].device):
            features = self.student.backbone(crops, [masked.mask, None][: len(crops)], batch.kept(micro))
            # [views, b, D] to [b, views, D]: two global views, then the local ones
            tokens = torch.cat([f.cls.unflatten(0, (-1, b)) for f in features]).transpose(0, 1)
            image = self.student.dino_head(tokens)
            patch = self.student.patch_head(features[0].patches.flatten(0, 2)[masked.index])[:, None]
        pairs = _pairs(image.shape[1], image)
        _, per_view = image_loss = self.student.dino_head.last_layer(
            image,
            targets.image.rows(first, first + b),
            pairs * self.loss.dino,
            image.new_full((b,), 1 / batch.recipe.batch.size),
            self.loss.student_temperature,
        )
        terms = {"dino": image_loss[0], "dino_global": per_view[:2].sum(), "dino_local": per_view[2:].sum()}
        terms["ibot"], _ = self.student.patch_head.last_layer(
            patch,
            targets.patch.rows(*targets.patch_starts[micro : micro + 2]),
            patch.new_full((1, 1), self.loss.ibot),
            masked.weight.to(patch.dtype),
            self.loss.student_temperature,
        )
        spread = features[0].cls.unflatten(0, (2, -1, batch.recipe.batch.group))  # [2, groups, group, D]
        spread = spread if self.loss.koleo_crops == "both" else spread[:1]
        share = self.loss.koleo * batch.recipe.batch.group / batch.recipe.batch.size
        terms["koleo"] = share * koleo(spread.flatten(0, 1)).sum()
        return terms

    def state(self) -> Mapping[str, Tensor]:
        """Tensors that a checkpoint keeps besides the networks."""
        return self.centres


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The loss: `dino_global` and `dino_local` only tell where `dino` comes from."""
    return terms["dino"] + terms["ibot"] + terms["koleo"]


def _pairs(views: int, like: Tensor) -> Tensor:
    """`[views, 2]`: every student view against both global views of the teacher but itself, all pairs counting equally.

    The reference divides by the number of local pairs, at least 1, plus the 2 global pairs.
    """
    pairs = like.new_ones((views, 2))
    pairs[0, 0] = pairs[1, 1] = 0
    return pairs / (max(2 * (views - 2), 1) + 2)
