"""One optimiser step, and everything that it changes.

A step is four pieces of static shape, one after the other:

    look      the teacher sees the global crops of a micro-batch
    balance   its assignments of the whole batch are balanced
    learn     the student's losses of a micro-batch, and their gradients
    update    clipping, AdamW, the teacher's average

On CUDA each piece is recorded as a CUDA graph once it has run a few times, and then replayed: a small backbone's step
has thousands of kernels that take less time than launching them. Nothing waits for the device.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from opsin import ranks
from opsin.backbone.fused import fuse
from opsin.backbone.graphs import Piece, Recorder
from opsin.data.stream import Batch
from opsin.machine import has_triton
from opsin.pretrain import parallel
from opsin.pretrain.anchor import Anchor
from opsin.pretrain.objective import Learner, Network, Objective, StepTargets, total
from opsin.pretrain.optim import AdamW, LossScale, Scalars, scalar_dtype
from opsin.pretrain.parallel import ALONE, Spread
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.schedules import Scheduled

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the products, by the recipe's `precision`."""


class Outcome(NamedTuple):
    """What a step says of itself, all on the device."""

    terms: dict[str, Tensor]
    """Of the loss, see `Objective.losses`: this process's share of them."""
    norms: dict[str, Tensor]
    """Of the gradients of each part, before clipping."""
    finite: Tensor
    """Whether the gradients were; if not, the step has changed nothing."""
    targets: StepTargets | None
    """What the teacher made of this process's share of the batch; None where there are no prototypes."""


class Method(Protocol):
    """What a student is trained through, and by."""

    name: str
    """For run.json."""

    def network(self, recipe: Recipe) -> Learner:
        """A new student."""
        ...

    def objective(
        self, recipe: Recipe, student: Learner, average: Learner, dtype: torch.dtype, anchor: Anchor | None
    ) -> Any:
        """What is to be minimised, with the methods of `Objective`: look, balance, targets, inputs, losses, state."""
        ...


class SelfDistillation:
    """The student's moving average is its teacher (paper §4)."""

    name = "self"

    def network(self, recipe: Recipe) -> Network:
        """A backbone with its heads."""
        return Network(recipe.backbone, recipe.heads)

    def objective(
        self, recipe: Recipe, student: Learner, average: Learner, dtype: torch.dtype, anchor: Anchor | None
    ) -> Objective:
        """DINO, iBOT and KoLeo, and Gram anchoring if there is an anchor."""
        assert isinstance(student, Network)
        assert isinstance(average, Network)
        return Objective(recipe.loss, student, average, dtype, anchor)


SELF = SelfDistillation()
"""The method of pretraining."""
Initial = Callable[[Learner, Learner], None]
"""Gives a whole student and its average the weights with which they begin."""


class Step:
    """A student, its moving average and its optimiser, and the step that changes them.

    Several processes share a step: each takes its part of the batch, and all have the same weights after it.

    Args:
        recipe: all settings.
        device: that computes.
        spread: of the networks over the processes.
        initial: fills the networks; without, their weights depend on the seed only.
        method: what the student learns from.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        spread: Spread = ALONE,
        initial: Initial | None = None,
        method: Method = SELF,
    ) -> None:
        self.device, self.dtype = device, DTYPES[recipe.precision]
        grid = parallel.mesh(spread, device)
        # A model that is to be cut up need not fit a GPU whole.
        self.student, self.average = build(recipe, torch.device("cpu") if grid else device, method)
        if initial is not None:
            initial(self.student, self.average)
        self.student.backbone.requires_grad_(recipe.train == "all")
        working = self.student, self.average
        if grid is None:
            working = working_copy(self.student, self.dtype), working_copy(self.average, self.dtype)
        for network in working:
            fuse(network.backbone)
        # While the average is whole and as it begins. A backbone that learns nothing cannot drift away from anything.
        anchored = recipe.gram.weight > 0 and recipe.train == "all"
        anchor = Anchor(recipe.gram, working[1].backbone, self.dtype, device) if anchored else None
        if recipe.train == "all":
            parallel.recompute(working[0], recipe.parallel.recompute)
        if grid is not None:
            for network in working:
                parallel.shard(network, grid, self.dtype)
        self.objective = method.objective(recipe, *working, self.dtype, anchor)
        self._computing = tuple(zip((self.student, self.average), working, strict=True))
        self.working = working[1]
        """The average as it computes: in the precision of the products, maybe sharded."""
        shards = parallel.shard_group(grid)
        self.optimiser = AdamW(self.student, self.average, recipe.backbone.depth, recipe.optim, working, shards)
        self.loss_scale = LossScale(device, enabled=self.dtype == torch.float16)
        # Only the kernel updates without asking the device whether the gradients are finite.
        recordable = device.type == "cuda" and recipe.graphs and has_triton() and self.dtype != torch.float64
        recorder = Recorder(device) if recordable and grid is None else None
        self.look, self.learn, self.update = (
            Piece(function, recorder) for function in (self.objective.look, self._learn, self._update)
        )
        self.balance = Piece(self.objective.balance, recorder if ranks.count() == 1 else None)

    def __call__(self, batch: Batch, values: Scheduled) -> Outcome:
        """Train on a batch, with the scheduled values of its step."""
        return train([self], batch, [values])[0]

    def begin(self, batch: Batch, values: Scheduled) -> None:
        """The teacher's view of a batch."""
        numbers = torch.tensor(list(asdict(values).values()), dtype=scalar_dtype(self.device))
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()
        scalars = dict(zip(asdict(values), numbers.to(self.device, non_blocking=True).unbind(), strict=True))
        temperature = scalars.pop("teacher_temperature")
        self._batch, self._scalars = batch, Scalars(**scalars)
        self._sums: dict[str, Tensor] = {}
        self._targets = self.objective.targets(batch, temperature, self.look, self.balance)

    def visit(self, micro: int) -> None:
        """The student's losses of a micro-batch, and their gradients."""
        parallel.last_micro_batch(self.student, micro == self._batch.micro_batches - 1)
        terms = self.learn(self.loss_scale.scale, *self.objective.inputs(self._batch, micro, self._targets))
        self._sums = {name: self._sums[name] + term if self._sums else term for name, term in terms.items()}

    def finish(self) -> Outcome:
        """The update."""
        for _, network in self._computing:
            parallel.forget_forwards(network)
        self.optimiser.gather()
        norms, finite = self.update(self._scalars)
        outcome = Outcome(self._sums, norms, finite, self._targets)
        del self._batch, self._targets
        return outcome

    def _learn(self, scale: Tensor, *inputs: Any) -> dict[str, Tensor]:
        terms = self.objective.losses(*inputs)
        (total(terms) * scale).backward()
        return {name: term.detach() for name, term in terms.items()}

    def _update(self, scalars: Scalars) -> tuple[dict[str, Tensor], Tensor]:
        clipped = self.optimiser.clip(1 / self.loss_scale.scale)
        self.optimiser.step(scalars, clipped)
        self.loss_scale.update(clipped.finite)
        return clipped.norms, clipped.finite

    def state(self) -> dict[str, Tensor]:
        """Every tensor that decides how a run goes on, by name; see `loaded`."""
        parts = {
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "objective": self.objective.state(),
            "optimiser": self.optimiser.state(),
            "loss_scale": {"scale": self.loss_scale.scale, "good": self.loss_scale.good},
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def loaded(self) -> None:
        """To be called after a checkpoint was copied into the tensors of `state`."""
        # All copies, not only those of the optimiser's slots: a backbone that does not learn has none.
        for network, copied in self._computing:
            for master, low in zip(network.parameters(), copied.parameters(), strict=True):
                if low is not master:
                    low.data.copy_(master.data)


def train(steps: Sequence[Step], batch: Batch, values: Sequence[Scheduled]) -> list[Outcome]:
    """Train students on a batch together: each micro-batch is prepared, and seen by a teacher they share, once."""
    for step, scheduled in zip(steps, values, strict=True):
        step.begin(batch, scheduled)
    for micro in range(batch.micro_batches):
        for step in steps:
            step.visit(micro)
    return [step.finish() for step in steps]


def build(recipe: Recipe, device: torch.device, method: Method = SELF) -> tuple[Learner, Learner]:
    """A student and its average, equal at the start; the initial weights depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        student = method.network(recipe)
    average = method.network(recipe)
    average.load_state_dict(student.state_dict())
    average.requires_grad_(False)
    dtype = torch.float64 if recipe.precision == "fp64" else torch.float32
    return student.to(device, dtype), average.to(device, dtype)


def working_copy(network: Learner, dtype: torch.dtype) -> Learner:
    """The network that computes in `dtype` for one that holds the weights: itself, if that is their type.

    Else a copy whose gradients are added to those of `network`, so that layers need no casts. Prototypes are shared:
    their products choose their own type.
    """
    if dtype == network.backbone.cls_token.dtype:
        return network
    low = copy.deepcopy(network)
    for head in ("dino_head", "ibot_head"):
        if hasattr(network, head):
            getattr(low, head).last_layer = getattr(network, head).last_layer
    masters = dict(network.named_parameters())
    for name, parameter in low.named_parameters():
        if parameter is not masters[name]:
            parameter.data = parameter.data.to(dtype)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_hand_over, masters[name]))
    return low


def _hand_over(master: nn.Parameter, low: Tensor) -> None:
    """Add the gradient of a copy to that of its master, where the micro-batches of a step are summed in full."""
    assert low.grad is not None
    if master.grad is None:
        master.grad = low.grad.to(master.dtype)
    else:
        master.grad.add_(low.grad)
    low.grad = None
