"""AdamW, parameter groups, clipping by part, and the teacher's moving average, without a host synchronisation.

Rates, decay and momentum enter as scalars on the device, and so does `finite`: in a step whose gradients are not finite
weights, moments, step count and teacher stay as they are, and the host learns of it when it next reads the losses.
torch's AdamW takes the weight decay as a Python float, which is why this one is ours; a test holds them equal.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opsin.errors import FINITE, within


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
    """Largest gradient norm of each part (backbone, DINO head, iBOT head); 0 does not clip."""

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


class AdamW:
    """AdamW (Loshchilov & Hutter, 1711.05101) on named parameters, each with its group."""

    def __init__(self, network: nn.Module, depth: int, recipe: OptimRecipe) -> None:
        self.recipe = recipe
        self.parameters = dict(network.named_parameters())
        self.groups = {name: group_of(name, depth, recipe) for name in self.parameters}
        self.mean = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.square = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        device = next(iter(self.parameters.values())).device
        self.count = torch.zeros((), dtype=scalar_dtype(device), device=device)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def clip(self, unscale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Multiply gradients by `unscale` and clip each part; returns the norms before, and whether all are finite."""
        norms: dict[str, Tensor] = {}
        for part in dict.fromkeys(name.partition(".")[0] for name in self.parameters):
            grads = [p.grad for n, p in self.parameters.items() if n.startswith(part + ".") and p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])) * unscale
            factor = unscale
            if self.recipe.clip:
                factor = unscale * (self.recipe.clip / (norm + 1e-6)).clamp(max=1)
            for g in grads:
                g.mul_(factor)
            norms[part] = norm
        finite = torch.isfinite(torch.stack(list(norms.values()))).all()
        return norms, finite

    @torch.no_grad()
    def step(self, rate: Tensor, last_layer_rate: Tensor, decay: Tensor, finite: Tensor) -> None:
        """Update every parameter that has a gradient; nothing changes where `finite` is False."""
        beta1, beta2 = self.recipe.betas
        self.count += finite
        count = self.count.clamp(min=1)  # 0 when the very first step is not finite
        correction1, correction2 = 1 - beta1**count, (1 - beta2**count).sqrt()
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            group = self.groups[name]
            grad = torch.where(finite, p.grad, 0)
            step_rate = (last_layer_rate if group.last_layer else rate) * group.rate * finite
            mean, square = self.mean[name], self.square[name]
            mean.lerp_(grad, (1 - beta1) * finite.to(mean.dtype))
            square.lerp_(grad.square(), (1 - beta2) * finite.to(square.dtype))
            if group.decays:
                p.mul_(1 - step_rate * decay)
            denominator = (square.sqrt() / correction2).add_(self.recipe.epsilon)
            p.sub_(mean / denominator * (step_rate / correction1))

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps."""
        kept = {"count": self.count}
        kept.update({f"mean.{name}": t for name, t in self.mean.items()})
        kept.update({f"square.{name}": t for name, t in self.square.items()})
        return kept


@torch.no_grad()
def update_teacher(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: Tensor, finite: Tensor) -> None:
    """teacher ← momentum · teacher + (1 - momentum) · student, backbone and heads, after every step (paper §4)."""
    weight = (1 - momentum) * finite
    for t, s in zip(teacher, student, strict=True):
        t.lerp_(s, weight.to(t.dtype))


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
