"""What one training step computes: DINO + iBOT + KoLeo between a student and a teacher (paper §4).

The teacher is the student's moving average, or a frozen network (`opsin.distill`).

The teacher does not change within a step, and balancing needs only bottleneck features. So the teacher sees *all*
micro-batches first, its assignments are balanced over the whole batch, and then the student goes through the
micro-batches one by one: the gradients are those of the undivided batch (up to the order of floating-point sums).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from opsin.backbone.koleo import koleo
from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.data.crops import Kind
from opsin.data.stream import Batch, Masked
from opsin.errors import within
from opsin.pretrain.anchor import Anchor
from opsin.pretrain.gram import gram_loss
from opsin.pretrain.heads import Head, HeadRecipe
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


class Learner(nn.Module):
    """A backbone with whatever it is trained through."""

    backbone: VisionTransformer


class Network(Learner):
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
    """Of the hidden patches of the batch, one view each, padded for each micro-batch as in `Masked`."""

    @staticmethod
    def rows(micro: int, size: int) -> tuple[int, int]:
        """Where a micro-batch's rows begin and end, if each has `size`."""
        return micro * size, (micro + 1) * size


class Objective:
    """Computes the loss of `student` against `teacher`; owns the centres when centering is a moving average.

    The networks compute in `dtype`; prototypes and sums are at least fp32. Where several processes share a batch, each
    computes its part of it, and assignments are balanced over all of it. The work on tensors of
    static shape is in `look`, `balance` and `losses`, which a GPU can record (see `step.py`).
    """

    def __init__(
        self, loss: LossRecipe, student: Network, teacher: Network, dtype: torch.dtype, anchor: Anchor | None = None
    ) -> None:
        self.loss, self.student, self.teacher, self.dtype, self.anchor = loss, student, teacher, dtype, anchor
        weight = student.dino_head.last_layer.weight_g
        # Scores need products with an fp32 result, which a CPU has not for half precision: rounding would gain nothing.
        self.scores_dtype = weight.dtype if weight.device.type == "cpu" else dtype
        prototypes = (teacher.dino_head.last_layer, teacher.patch_head.last_layer)
        self.centres = {
            name: torch.zeros(len(layer.weight_g), dtype=weight.dtype, device=weight.device)
            for name, layer in zip(("image", "patch"), prototypes, strict=True)
            if loss.centering == "average"
        }

    @torch.no_grad()
    def look(self, crops: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's bottleneck features of the class tokens `[b, 2, d]` and of the hidden patches `[M, 1, d]`.

        Of the global crops `[2b, C, S, S]`, unmasked and without stochastic depth; `hidden` `[M]` as in `Masked`.
        """
        features = self.teacher.backbone([crops])[0]
        image = self.teacher.dino_head(features.cls.unflatten(0, (2, -1)).transpose(0, 1))
        patch = self.teacher.patch_head(features.patches.flatten(0, 2).index_select(0, hidden))
        return image, patch[:, None]

    @torch.no_grad()
    def balance(self, image: Tensor, patch: Tensor, weight: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        """The teacher's prototypes and biases for images `[n, 2, d]` and hidden patches `[P, 1, d]` of a whole batch.

        `weight` `[P]` is 0 where there is no hidden patch. Returns prototypes `[K, d]` and bias `[K]` for the images,
        then for the patches.
        """
        layers = (self.teacher.dino_head.last_layer, self.teacher.patch_head.last_layer)
        counted = (torch.ones(len(image), dtype=torch.bool, device=image.device), weight > 0)
        found = []
        for name, layer, features, rows in zip(("image", "patch"), layers, (image, patch), counted, strict=True):
            targets = self._balanced(name, layer, features, rows, temperature)
            found += [targets.prototypes, targets.bias]
        return tuple(found)

    def _balanced(self, name: str, layer: Prototypes, features: Tensor, rows: Tensor, temperature: Tensor) -> Targets:
        if self.loss.centering == "sinkhorn":
            return layer.balance(features, rows, temperature, self.loss.sinkhorn_iterations, self.scores_dtype)
        centre = self.centres[name]
        targets = layer.centre(features, temperature, centre.clone(), self.scores_dtype)
        if len(features):  # the centre in use is one step old, as in the reference
            centre.lerp_(layer.mean_scores(features, rows), 1 - self.loss.centre_momentum)
        return targets

    def targets(
        self,
        batch: Batch,
        temperature: Tensor,
        look: Callable[..., Any] | None = None,
        balance: Callable[..., Any] | None = None,
    ) -> StepTargets:
        """The teacher's view: all micro-batches, then balanced together.

        `look` and `balance` are recordings of the methods of these names.
        """
        if self.anchor is not None:
            self.anchor.follow(batch.step, self.teacher.backbone)
        look, balance = look or self.look, balance or self.balance
        views = []
        for micro in range(batch.micro_batches):
            crops, masked = batch.crops("global", micro).to(self.dtype), batch.masked(micro)
            views.append((*look(crops, masked.hidden), masked.weight))
        return self.balanced(temperature, views, balance)

    def balanced(
        self,
        temperature: Tensor,
        views: Sequence[tuple[Tensor, Tensor, Tensor]],
        balance: Callable[..., Any],
    ) -> StepTargets:
        """The assignments of a batch, balanced over all of it.

        `views` holds, for each micro-batch, what `look` gives and the weights of its patches.
        """
        image, patch, weight = (torch.cat(parts) for parts in zip(*views, strict=True))
        prototypes, bias, patch_prototypes, patch_bias = balance(image, patch, weight, temperature)
        return StepTargets(
            image=Targets(image.to(prototypes.dtype), prototypes, bias, temperature),
            patch=Targets(patch.to(patch_prototypes.dtype), patch_prototypes, patch_bias, temperature),
        )

    def losses(
        self,
        image: Targets,
        patch: Targets,
        crops: Sequence[Tensor],
        masked: Masked,
        kept: Sequence[Tensor] | None,
        shares: tuple[int, int],
        anchored: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms of b images; their sum over terms and micro-batches is the loss of the batch.

        Args:
            image, patch: the teacher's assignments of these b images, and of their hidden patches.
            crops: global `[2b, C, S, S]`, and if there are any local ones.
            masked: of the global crops.
            kept: samples that stochastic depth keeps, for each of `crops`.
            shares: images of the whole batch, and of a group.
            anchored: patches of the global crops as the anchor sees them `[2b, N, D]`, if there is one.
        """
        size, group = shares
        b = len(crops[0]) // 2
        features = self.student.backbone(crops, [masked.mask, None][: len(crops)], kept)
        # [views, b, D] to [b, views, D]: two global views, then the local ones
        tokens = torch.cat([f.cls.unflatten(0, (-1, b)) for f in features]).transpose(0, 1)
        z_image = self.student.dino_head(tokens)
        z_patch = self.student.patch_head(features[0].patches.flatten(0, 2).index_select(0, masked.hidden))[:, None]
        _, per_view = image_loss = self.student.dino_head.last_layer(
            z_image,
            image,
            _pairs(z_image.shape[1], z_image) * self.loss.dino,
            z_image.new_full((b,), 1 / size),
            self.loss.student_temperature,
        )
        terms = {"dino": image_loss[0], "dino_global": per_view[:2].sum(), "dino_local": per_view[2:].sum()}
        terms["ibot"], _ = self.student.patch_head.last_layer(
            z_patch,
            patch,
            z_patch.new_full((1, 1), self.loss.ibot),
            masked.weight.to(z_patch.dtype),
            self.loss.student_temperature,
        )
        spread = features[0].cls.unflatten(0, (2, -1, group))  # [2, groups, group, D]
        spread = spread if self.loss.koleo_crops == "both" else spread[:1]
        terms["koleo"] = self.loss.koleo * group / size * koleo(spread.flatten(0, 1)).sum()
        if self.anchor is not None and anchored is not None:
            pair = features[0].patches.flatten(1, 2), anchored
            if self.anchor.recipe.over == "group":
                student, anchor = (x.unflatten(0, (-1, group)).flatten(1, 2) for x in pair)
                pair = student, anchor
            terms["gram"] = self.anchor.recipe.weight * b / size * gram_loss(*pair).mean()
        return terms

    def inputs(self, batch: Batch, micro: int, targets: StepTargets) -> tuple[Any, ...]:
        """The arguments of `losses` for one micro-batch."""
        kinds: list[Kind] = ["global", "local"] if batch.recipe.crops.local_count else ["global"]
        masked = batch.masked(micro)
        # Before the crops, after which a batch may give its images back.
        anchored = None if self.anchor is None else self.anchor.patches(batch, micro)
        return (
            targets.image.rows(*targets.rows(micro, batch.micro_size)),
            targets.patch.rows(*targets.rows(micro, len(masked.hidden))),
            [batch.crops(kind, micro).to(self.dtype) for kind in kinds],
            masked,
            batch.kept(micro),
            (batch.recipe.batch.size, batch.recipe.batch.group),
            anchored,
        )

    def terms(self, batch: Batch, micro: int, targets: StepTargets) -> dict[str, Tensor]:
        """`losses` of one micro-batch."""
        return self.losses(*self.inputs(batch, micro, targets))

    def state(self) -> Mapping[str, Tensor]:
        """Tensors that a checkpoint keeps besides the networks."""
        anchor = {} if self.anchor is None else self.anchor.state()
        return {
            **{f"centre.{name}": centre for name, centre in self.centres.items()},
            **{f"anchor.{name}": tensor for name, tensor in anchor.items()},
        }


Number = TypeVar("Number", Tensor, float)


PARTS_OF_DINO = ("dino_global", "dino_local")
"""Terms that only tell where `dino` comes from."""


def total(terms: Mapping[str, Number]) -> Number:
    """The loss: the sum of its terms."""
    return reduce(add, (term for name, term in terms.items() if name not in PARTS_OF_DINO))


def _pairs(views: int, like: Tensor) -> Tensor:
    """`[views, 2]`: every student view against both global views of the teacher but itself, all pairs counting equally.

    The reference divides by the number of local pairs, at least 1, plus the 2 global pairs.
    """
    pairs = like.new_ones((views, 2))
    pairs[:2].fill_diagonal_(0)  # assigning a number to an element would copy it from the host
    return pairs / (max(2 * (views - 2), 1) + 2)
