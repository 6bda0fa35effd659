"""AdamW, parameter groups, clipping by part, and the teacher's moving average, without a host synchronisation.

Rates, decay and momentum enter as scalars on the device, and so does `finite`: in a step whose gradients are not finite
weights, moments, step count and teacher stay as they are, and the host learns of it when it next reads the losses.
torch's AdamW takes the weight decay as a Python float, which is why this one is ours; a test holds them equal.

One visit to a parameter does all that a step does to it: clipping, moments, decay, update, the teacher's average, the
low-precision copies that compute, and the gradient set back to zero. On CUDA that is one Triton kernel per parameter,
elsewhere torch code on pieces that fit a cache.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opsin import ranks
from opsin.errors import FINITE, within
from opsin.machine import has_triton


@dataclass(frozen=True)
class OptimRecipe:
    """AdamW and how it treats the parts of the network."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    layer_decay: float = 0.9
    """Rate multiplier per block, from the last (1) down to the tokens and the patch embedding."""
    patch_embed_rate: float = 0.2
    """Further multiplier for the patch embedding."""
    clip: float = 3.0
    """Largest gradient norm of each part (backbone, DINO head, iBOT head, projection); 0 does not clip."""

    def __post_init__(self) -> None:
        within(self, "optim.", betas=(0, 1 - 1e-9), epsilon=(0, 1), layer_decay=(1e-3, 1), patch_embed_rate=(0, 1e3))
        within(self, "optim.", clip=(0, FINITE))


@dataclass(frozen=True)
class Group:
    """How one parameter is updated."""

    rate: float
    """Multiplier of the learning rate."""
    decays: bool
    """Whether weight decay acts on it."""
    last_layer: bool
    """Whether it is a prototype, which the schedule freezes at first."""


def group_of(name: str, depth: int, recipe: OptimRecipe) -> Group:
    """The group of a parameter by its name in the network, by the reference's rules.

    No decay for biases, norms and LayerScale; tokens and positions do decay. Block i has rate layer_decay^(depth - i),
    tokens and patch embedding layer_decay^(depth + 1), the final norm and the heads 1.
    """
    rate = 1.0
    part, _, rest = name.partition(".")
    if part == "backbone":
        if rest.startswith("blocks."):
            rate = recipe.layer_decay ** (depth - int(rest.split(".")[1]))
        elif not rest.startswith("norm."):
            rate = recipe.layer_decay ** (depth + 1)
        if rest.startswith("patch_embed."):
            rate *= recipe.patch_embed_rate
    decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    return Group(rate, decays, "last_layer" in name)


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Of rates, momenta and counts: fp64 where there is one; MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class Slot(NamedTuple):
    """What this process holds of a parameter, with everything that one update reads and writes, each of its shape."""

    part: str
    """Of the network: backbone, dino_head, ibot_head or projection, which are clipped each by itself."""
    group: Group
    weight: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    teacher: Tensor
    copies: tuple[Tensor, Tensor] | None
    """Low-precision copies of weight and teacher, of the networks that compute; None if these compute themselves."""


class Scalars(NamedTuple):
    """What the update of a step needs besides tensors of weights, each a scalar on the device."""

    rate: Tensor
    last_layer_rate: Tensor
    decay: Tensor
    momentum: Tensor
    """Of the teacher."""


class Clipped(NamedTuple):
    """The gradients of a step, measured."""

    norms: dict[str, Tensor]
    """Norm of each part before clipping."""
    factors: dict[str, Tensor]
    """By which each part's gradients are multiplied in the update: loss scaling undone, and clipped."""
    finite: Tensor
    """Whether all norms are finite, a boolean on the device."""


ALIGNMENT = 64
"""Elements: 256 bytes in fp32."""
PIECE = 2**16
"""Elements that a CPU updates at a time, so that a parameter's seven arrays stay in its cache."""


class AdamW:
    """AdamW (Loshchilov & Hutter, 1711.05101) on the parameters that learn, and their moving average, the teacher.

    `student` and `teacher` hold the weights. Where other networks compute with copies of them in lower precision (see
    `step.working_copy`), these are given too. Gradients are accumulated into `student`'s `.grad`, which an update
    leaves at zero. Weights may be sharded (DTensor): then each process updates its own shards, and `shards` is the
    group of processes that hold one model together.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        depth: int,
        recipe: OptimRecipe,
        working: tuple[nn.Module, nn.Module] | None = None,
        shards: dist.ProcessGroup | None = None,
    ) -> None:
        self.recipe, self.shards = recipe, shards
        teachers = dict(teacher.named_parameters())
        copies = [dict(network.named_parameters()) for network in working or (student, teacher)]
        self.slots: dict[str, Slot] = {}
        self.moments: dict[str, Tensor] = {}
        self.gradients = None if shards is not None else _one_buffer(student)
        """Of whole models, all gradients in one piece of memory: several processes sum them in one call."""
        for name, p in trained(student).items():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self.moments[f"mean.{name}"] = torch.zeros_like(p.data)
            self.moments[f"square.{name}"] = torch.zeros_like(p.data)
            copied = None if copies[0][name] is p else (copies[0][name].data, copies[1][name].data)
            self.slots[name] = Slot(
                part=name.partition(".")[0],
                group=group_of(name, depth, recipe),
                weight=local(p.data),
                grad=local(p.grad),
                mean=local(self.moments[f"mean.{name}"]),
                square=local(self.moments[f"square.{name}"]),
                teacher=local(teachers[name].data),
                copies=copied,
            )
        device = next(iter(self.slots.values())).weight.device
        self.count = torch.zeros((), dtype=scalar_dtype(device), device=device)

    def gather(self) -> None:
        """Sum the gradients of whole models over all processes; sharded ones were summed in the backward."""
        if self.gradients is not None:
            ranks.sum_(self.gradients)

    @torch.no_grad()
    def clip(self, unscale: Tensor) -> Clipped:
        """Measure the gradients, which are `1 / unscale` times too large, and say how to clip each part."""
        norms, factors = {}, {}
        for part in dict.fromkeys(slot.part for slot in self.slots.values()):
            grads = [slot.grad for slot in self.slots.values() if slot.part == part]
            norm = torch.nn.utils.get_total_norm(grads) * unscale
            if self.shards is not None:
                square = norm.double().square()  # of large gradients it can leave fp32's range
                dist.all_reduce(square, group=self.shards)
                norm = square.sqrt().to(norm.dtype)
            norms[part], factors[part] = norm, unscale
            if self.recipe.clip:
                factors[part] = unscale * (self.recipe.clip / (norm + 1e-6)).clamp(max=1)
        return Clipped(norms, factors, torch.isfinite(torch.stack(list(norms.values()))).all())

    @torch.no_grad()
    def step(self, scalars: Scalars, clipped: Clipped) -> None:
        """Update weights, teacher and copies; nothing but the gradients changes unless they were finite."""
        beta1, beta2 = self.recipe.betas
        self.count += clipped.finite
        count = self.count.clamp(min=1)  # 0 when the very first step is not finite
        corrections = 1 - beta1**count, (1 - beta2**count).sqrt()
        full = next(iter(self.slots.values())).weight.dtype == torch.float32
        if self.count.device.type == "cuda" and full and has_triton():
            from opsin.pretrain.kernels import update

            share = 1 - scalars.momentum  # here, where there is fp64: it may be 1e-5
            numbers = torch.stack(
                [*scalars[:3], share, *corrections, clipped.finite, *clipped.factors.values()]
            ).float()
            parts = list(clipped.factors)
            for slot in self.slots.values():
                update(slot, numbers, parts.index(slot.part), self.recipe)
            return
        if not bool(clipped.finite):
            for slot in self.slots.values():
                slot.grad.zero_()
            return
        correction1, correction2 = (float(c) for c in corrections)
        rate, last_layer_rate, decay, momentum = (float(s) for s in scalars)
        for slot in self.slots.values():
            step_rate = (last_layer_rate if slot.group.last_layer else rate) * slot.group.rate
            change = partial(
                _update,
                factor=clipped.factors[slot.part],
                betas=self.recipe.betas,
                epsilon=self.recipe.epsilon,
                kept=1 - step_rate * decay * slot.group.decays,
                step=step_rate / correction1,
                correction=correction2,
                average=1 - momentum,
            )
            arrays = [slot.weight, slot.grad, slot.mean, slot.square, slot.teacher, *(slot.copies or ())]
            for piece in zip(*(torch.split(a.view(-1), PIECE) for a in arrays), strict=True):
                change(*piece)

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps."""
        return {"count": self.count, **self.moments}


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def _one_buffer(network: nn.Module) -> Tensor:
    """Zero gradients for all that learns, side by side, each beginning where a kernel likes to begin."""
    parameters = list(trained(network).values())
    places = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
    buffer = torch.zeros(sum(places), dtype=parameters[0].dtype, device=parameters[0].device)
    for p, piece in zip(parameters, torch.split(buffer, places), strict=True):
        p.grad = piece[: p.numel()].view_as(p)
    return buffer


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded; it shares the memory."""
    shards = getattr(tensor, "to_local", None)  # of a DTensor, whose import takes most of a second
    return tensor if shards is None else shards()


def _update(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    teacher: Tensor,
    *copies: Tensor,
    factor: Tensor,
    betas: tuple[float, float],
    epsilon: float,
    kept: float,
    step: float,
    correction: float,
    average: float,
) -> None:
    """One update of flat arrays in place; the twin of `kernels.update`."""
    grad.mul_(factor)
    mean.lerp_(grad, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = square.sqrt().div_(correction).add_(epsilon)
    weight.mul_(kept).addcdiv_(mean, denominator, value=-step)
    teacher.lerp_(weight, average)
    grad.zero_()
    for copy, source in zip(copies, (weight, teacher), strict=False):
        copy.copy_(source)


class LossScale:
    """Dynamic loss scaling for fp16, on the device: halved when gradients overflow, doubled after 2000 good steps."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(2.0**16 if enabled else 1.0, device=device)
        self.good = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Learn from a step."""
        if not self.enabled:
            return
        self.good.copy_(torch.where(finite, self.good + 1, 0))
        grow = self.good >= 2000
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale.mul_(factor).clamp_(min=1.0)
        self.good.copy_(torch.where(grow, 0, self.good))
