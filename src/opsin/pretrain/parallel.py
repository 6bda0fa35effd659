"""How one model is spread over the processes of a run; the only file that knows of sharding.

    replicate   every process holds everything; gradients are summed once per step
    shard       weights, moments and gradients are cut up over all processes (FSDP2), and a block's weights are gathered
                when it computes
    hybrid      cut up over the processes of a machine, summed across machines

Models know nothing of it. The batch, the losses and the weights are the same in each, up to the order of sums.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opsin.backbone.fused import FusedBlock
from opsin.backbone.vit import Architecture
from opsin.errors import OpsinError, within
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.objective import Learner, Network
from opsin.pretrain.prototypes import Prototypes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ROOM = 0.4
"""Share of a GPU's memory that weights, gradients, moments and copies may take before the model is sharded: the rest is
for activations and the loss."""


@dataclass(frozen=True)
class ParallelRecipe:
    """How the run is spread over processes; does not change what is computed, beyond the order of sums."""

    mode: Literal["auto", "replicate", "shard", "hybrid"] = "auto"
    """Whole models, shards over all processes, or shards in each machine and whole across machines. auto takes the
    first of replicate, hybrid and shard with which weights and moments take no more than 40 % of a GPU's memory."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Blocks whose activations are computed again in the backward rather than stored: none, every second, all."""
    timeout: float = 600.0
    """Seconds after which a process that does not answer counts as lost."""

    def __post_init__(self) -> None:
        within(self, "parallel.", timeout=(1, 1e6))


class Spread(NamedTuple):
    """Whole copies of the model, and the processes that hold each."""

    replicate: int = 1
    """Copies."""
    shard: int = 1
    """Processes that hold one copy together; 1 if each has its own."""

    def __str__(self) -> str:
        if self.replicate * self.shard == 1:
            return "one process"
        if self.shard == 1:
            return f"{self.replicate} processes, each with a whole model"
        if self.replicate == 1:
            return f"{self.shard} processes that share one model"
        return f"{self.replicate} × {self.shard} processes, each {self.shard} of which share a model"


ALONE = Spread()
"""One process."""


def state_bytes(parameters: int, precision: str, shard: int = 1) -> int:
    """Bytes that a process holds for a student of some parameters and its teacher, beside activations.

    Weights of both, gradients and two moments; whole models also keep copies of both in half precision, while of a
    sharded one only the block at work is whole.
    """
    full = 8 if precision == "fp64" else 4
    copies = 4 if precision in ("bf16", "fp16") and shard == 1 else 0
    return parameters * (5 * full + copies) // shard


def count_parameters(backbone: Architecture, heads: HeadRecipe) -> int:
    """Of a student, without building it."""
    with torch.device("meta"):
        return sum(p.numel() for p in Network(backbone, heads).parameters())


def choose(
    recipe: ParallelRecipe, needed: Callable[[int], int], processes: int, per_node: int, memory: int | None
) -> Spread:
    """The spread over some processes, `per_node` of them on every machine.

    Args:
        recipe: what is asked for.
        needed: function of the number of shards that gives the bytes a process must hold, see `state_bytes`.
        processes: of the run.
        per_node: of them on a machine.
        memory: bytes of a GPU; None on a CPU, where models are replicated unless something else is asked for.

    Raises:
        OpsinError: hybrid is asked for on machines with different numbers of processes.
    """
    nodes, uneven = divmod(processes, per_node)
    spreads = {"replicate": Spread(processes, 1), "shard": Spread(1, processes)}
    if not uneven:
        spreads["hybrid"] = Spread(nodes, per_node)
    if recipe.mode != "auto":
        if recipe.mode not in spreads:
            raise OpsinError(
                f"parallel.mode hybrid needs the same number of processes on every machine, and {processes} are not a "
                f"multiple of {per_node}: start equally many on each, or give --parallel.mode shard."
            )
        return spreads[recipe.mode]
    if memory is None or processes == 1:
        return spreads["replicate"]
    for mode in ("replicate", "hybrid"):
        if mode in spreads and needed(spreads[mode].shard) <= ROOM * memory:
            return spreads[mode]
    return spreads["shard"]


def mesh(spread: Spread, device: torch.device) -> "DeviceMesh | None":
    """The processes as a (replicate, shard) grid, or as a row if there is one copy; None if models are whole.

    Shards are of processes with neighbouring numbers, which torchrun and Slurm put on one machine.
    """
    if spread.shard == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    if spread.replicate == 1:
        return init_device_mesh(device.type, (spread.shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, tuple(spread), mesh_dim_names=("replicate", "shard"))


def shard_group(grid: "DeviceMesh | None") -> dist.ProcessGroup | None:
    """The processes that hold a model together with this one."""
    return None if grid is None else grid.get_group("shard")


def shard(network: Learner, grid: "DeviceMesh", dtype: torch.dtype) -> None:
    """Cut up the weights of student or teacher in place: every block, every head's MLP and prototypes by themselves.

    Products are in `dtype`. Gradients of the backbone are summed in it too, those of the heads in full precision, as in
    the reference (paper §5); prototypes stay in full precision, since their products choose their own type.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Backbone and heads return views, and nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    full = network.backbone.cls_token.dtype
    low = None if dtype == full else dtype
    backbone = MixedPrecisionPolicy(param_dtype=low, cast_forward_inputs=False)
    head = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=full, cast_forward_inputs=False)
    prototypes = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in network.backbone.blocks:
        fully_shard(block, mesh=grid, mp_policy=backbone)
    # The update works on shards, so nothing may be whole by then. A teacher has no backward that would end it; of a
    # student, what the backward needs soonest stays, and so its prototypes are gathered once.
    again = not network.backbone.cls_token.requires_grad
    fully_shard(network.backbone, mesh=grid, mp_policy=backbone, reshard_after_forward=again)
    assert isinstance(network, Network)
    for part in dict.fromkeys((network.dino_head, network.patch_head)):
        fully_shard(part.mlp, mesh=grid, mp_policy=head, reshard_after_forward=again)
        fully_shard(part.last_layer, mesh=grid, mp_policy=prototypes, reshard_after_forward=again)
        for method in ("balance", "centre", "mean_scores"):
            register_fsdp_forward_method(part.last_layer, method)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # Losses are shares of the whole batch's, so gradients add up; gloo knows no sum with a factor.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def last_micro_batch(student: Learner, last: bool) -> None:
    """Before a student's forward: prototypes are gathered once per step, and their gradients summed once."""
    for module in student.modules():
        layer: Any = module
        if isinstance(module, Prototypes) and hasattr(module, "set_requires_gradient_sync"):
            layer.set_requires_gradient_sync(last)
            layer.set_reshard_after_backward(last)


def forget_forwards(network: Learner) -> None:
    """After the forwards of a step: FSDP keeps a list of them, which only a backward would end. A teacher has none, nor
    has a student's backbone that does not learn.

    torch 2.11 has no way to do so: there a sharded run's host memory grows by some 50 bytes per block and forward.
    """
    if not hasattr(network.backbone, "reset_iter_state"):
        return
    assert isinstance(network, Network)
    heads = (network.dino_head, network.patch_head)
    units: list[Any] = [network.backbone, *(part for head in heads for part in (head.mlp, head.last_layer))]
    for unit in units:
        if not any(p.requires_grad for p in unit.parameters()):
            unit.reset_iter_state()


class RecomputedBlock(FusedBlock):
    """A block of which only the input is stored: its activations are computed again in the backward."""

    def forward(self, *inputs: Any) -> Tensor:
        """As `FusedBlock.forward`."""
        out: Tensor = checkpoint(super().forward, *inputs, use_reentrant=False, preserve_rng_state=False)
        return out


def recompute(network: Learner, which: Literal["none", "selective", "full"]) -> None:
    """Turn some of a student's blocks into `RecomputedBlock`s: the same parameters, the same function."""
    every = {"none": 0, "selective": 2, "full": 1}[which]
    for number, block in enumerate(network.backbone.blocks):
        if every and number % every == 0:
            block.__class__ = RecomputedBlock
