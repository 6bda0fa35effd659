"""The two ways in which a student learns from a frozen teacher, in the form that `pretrain.step` asks for.

prototypes   the losses of pretraining, with the teacher's assignments to its prototypes as the targets (paper §5)
features     the student's tokens, projected, follow the teacher's tokens; see `matching`
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opsin.data.crops import Kind
from opsin.data.stream import Batch
from opsin.distill.matching import MatchedNetwork, Matching
from opsin.distill.teacher import Teacher
from opsin.pretrain.anchor import Anchor
from opsin.pretrain.objective import Learner, LossRecipe, Network, Objective, StepTargets
from opsin.pretrain.recipe import Recipe


class Guided(Objective):
    """`Objective` with a frozen teacher, whose view of a batch several students share."""

    def __init__(self, loss: LossRecipe, student: Network, teacher: Teacher, dtype: torch.dtype) -> None:
        assert teacher.network is not None
        super().__init__(loss, student, teacher.network, dtype)
        self.guide = teacher
        self.centres = teacher.centres = teacher.centres or self.centres

    def targets(
        self,
        batch: Batch,
        temperature: Tensor,
        look: Callable[..., Any] | None = None,  # noqa: ARG002
        balance: Callable[..., Any] | None = None,
    ) -> StepTargets:
        """The teacher's assignments of all micro-batches, balanced together."""
        return self.guide.targets(
            batch, lambda: self.balanced(temperature, self._views(batch), balance or self.balance)
        )

    @torch.no_grad()
    def _views(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        views = []
        for micro in range(batch.micro_batches):
            seen, masked = self.guide.view(batch, micro), batch.masked(micro)
            image = self.teacher.dino_head(seen.cls.unflatten(0, (2, -1)).transpose(0, 1))
            patch = self.teacher.patch_head(seen.patches.flatten(0, 1).index_select(0, masked.hidden))
            views.append((image, patch[:, None], masked.weight))
        return views


class ByPrototypes:
    """The student has heads like the teacher's, and as many prototypes."""

    name = "prototypes"

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def network(self, recipe: Recipe) -> Network:
        """A backbone with its heads."""
        return Network(recipe.backbone, recipe.heads)

    def objective(
        self, recipe: Recipe, student: Learner, _average: Learner, dtype: torch.dtype, _anchor: Anchor | None
    ) -> Guided:
        """DINO, iBOT and KoLeo against the frozen teacher."""
        assert isinstance(student, Network)
        return Guided(recipe.loss, student, self.teacher, dtype)


class Followed(Matching):
    """`Matching` against what the teacher sees in each micro-batch."""

    def __init__(self, student: MatchedNetwork, teacher: Teacher, dtype: torch.dtype) -> None:
        super().__init__(student, dtype)
        self.guide = teacher

    def look(self) -> None:
        """Nothing has to be seen of a whole batch before its first micro-batch."""

    def balance(self) -> None:
        """Features need no balancing."""

    def targets(self, *_: Any) -> None:
        """Nothing of a whole batch."""

    def inputs(self, batch: Batch, micro: int, targets: None) -> tuple[Any, ...]:  # noqa: ARG002
        """The arguments of `losses` for one micro-batch."""
        seen = self.guide.view(batch, micro)
        kinds: list[Kind] = ["global", "local"] if batch.recipe.crops.local_count else ["global"]
        return (
            seen.cls.unflatten(0, (2, -1)).transpose(0, 1),
            seen.patches,
            [batch.crops(kind, micro).to(self.dtype) for kind in kinds],
            batch.kept(micro),
            batch.recipe.batch.size,
        )


class ByFeatures:
    """The student has a projection to the teacher's width."""

    name = "features"

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def network(self, recipe: Recipe) -> MatchedNetwork:
        """A backbone with its projection."""
        return MatchedNetwork(recipe.backbone, self.teacher.width)

    def objective(
        self, _recipe: Recipe, student: Learner, _average: Learner, dtype: torch.dtype, _anchor: Anchor | None
    ) -> Followed:
        """Class and patch tokens."""
        assert isinstance(student, MatchedNetwork)
        return Followed(student, self.teacher, dtype)
