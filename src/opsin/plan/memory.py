"""The memory of a training step, found by running it on tensors without values.

The step of `opsin.pretrain.step` runs up to the student's loss on torch's meta device, where a tensor has a shape and
a type but no memory. A `Ledger` watches: every new storage is written down with its size, and struck out when its last
tensor is gone. So what autograd keeps, the chunks of the loss, the copies in half precision and what recomputing saves
come from the code that trains and not from a formula. Where the code asks on which device a tensor is, the ledger says
that of the plan, so that a GPU's path is followed without one.

The backward is not run: it frees more than it makes. What it needs beyond what was kept is added by two formulas.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from opsin.backbone.graphs import leaves
from opsin.backbone.vit import WRITTEN_OUT, Architecture
from opsin.data.crops import CropPlan, Kind
from opsin.data.stream import Batch, Share
from opsin.pretrain.parallel import ALONE, Spread, state_bytes
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.step import DTYPES, Step

META = torch.device("meta")
IMAGE_BYTES = 3 * 500 * 375
"""Of a decoded image, as the planner assumes: the usual one of ImageNet's files."""
UPLOADED = 3
"""Micro-batches of images on a GPU at a time: the one at work, the next, and the first of the next step."""
ALLOCATOR = {"cpu": 0.25, "cuda": 0.1}
"""What allocators hold beyond the tensors that come and go, as a share of these. That of a processor is fitted to peaks
of resident memory (`benchmarks/plan.py`), and has scratch memory of the libraries in it; that of a GPU is assumed."""
GATHERED_BLOCKS = 2
"""Blocks of a sharded model that are whole at a time: the one at work, and the next on its way."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs at the fullest moment of a step, by part."""

    weights: int
    """Student and teacher, and the copies in half precision that compute."""
    gradients: int
    """Of all parameters."""
    optimiser: int
    """Two moments of AdamW."""
    gathered: int
    """Blocks and prototypes of a sharded model that are whole for a moment, with their gradients."""
    activations: int
    """What the student keeps for its backward, and what the backward of a block needs beyond that."""
    loss: int
    """Scores and gradients of the prototypes."""
    inputs: int
    """Images, crops, masks, and the teacher's features of the whole batch."""
    allocator: int
    """Freed blocks that fit no request, and scratch memory of libraries: see `ALLOCATOR`."""

    @property
    def state(self) -> int:
        """What is there between steps too."""
        return self.weights + self.gradients + self.optimiser

    @property
    def total(self) -> int:
        """All parts."""
        return sum(getattr(self, part.name) for part in fields(self))


@functools.lru_cache(maxsize=256)
def step_memory(recipe: Recipe, device: Literal["cpu", "cuda"], spread: Spread = ALONE) -> Memory:
    """The memory of one process of a run, without what Python, torch and a GPU's context take before there is a model.

    Args:
        recipe: of the run; its batch is shared by all processes of `spread`.
        device: where it runs.
        spread: how the model is spread over the processes.

    Raises:
        OpsinError: the processes cannot share the batch.
    """
    processes = spread.replicate * spread.shard
    share, micro = recipe.batch.split(processes)
    run = _Traced(recipe, device, processes)
    weights, gradients, optimiser = run.state
    if spread.shard > 1:
        # Without copies: only what is gathered is in half precision.
        held = state_bytes(run.parameters, recipe.precision, spread.shard)
        weights, gradients, optimiser = 2 * held // 5, held // 5, held - 3 * held // 5
    images = UPLOADED * micro if device == "cuda" else (recipe.data.ahead + 2) * share
    extra = images * IMAGE_BYTES + run.other_crops()
    fullest = max(run.moments(), key=lambda moment: sum(moment.values()))
    gathered = _gathered(recipe, run) if spread.shard > 1 else 0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimiser=optimiser,
        gathered=gathered,
        activations=fullest["activations"],
        loss=fullest["loss"],
        inputs=fullest["inputs"] + extra,
        allocator=round(ALLOCATOR[device] * (gathered + fullest.total() + extra)),
    )


class Ledger(TorchFunctionMode):
    """Adds up the memory of meta tensors while it is entered, by part, and remembers the fullest moment.

    Only what Python sees is counted: results of torch's functions, and what autograd keeps.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.part = "activations"
        self.live: Counter[str] = Counter()
        """Bytes that are there, by part."""
        self.fullest: Counter[str] = Counter()
        """What `live` was when its sum was largest."""
        self._known: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and count what it gives."""
        if func == torch.Tensor.device.__get__:
            return self.device
        if func == torch.Tensor.__bool__:  # only balancing asks: whether scores are small, as they are at the start
            return True
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        given = _Attention.apply if func is F.scaled_dot_product_attention else func
        results = given(*args, **kwargs)
        for tensor in leaves(results):
            self.record(tensor)
        return results

    def record(self, tensor: Tensor) -> Tensor:
        """Write down the storage of a meta tensor, unless it is known."""
        if tensor.is_meta:
            storage = tensor.untyped_storage()
            key, part, size = id(storage), self.part, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.live[part] += size
                weakref.finalize(storage, self._strike, key, part, size).atexit = False
                if self.live.total() > self.fullest.total():
                    self.fullest = self.live.copy()
        return tensor

    def _strike(self, key: int, part: str, size: int) -> None:
        self._known.discard(key)
        self.live[part] -= size

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """What is made in the block belongs to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count in the block, with what autograd keeps of functions that are written in C++."""
        # Detached, for a result that its own function keeps would hold itself alive.
        with self, saved_tensors_hooks(lambda tensor: self.record(tensor).detach(), lambda tensor: tensor):
            yield


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: its inputs, its output, and the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, heads, n, d = q.shape
        out = q.new_empty((b, n, heads, d)).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty((b, heads, n), dtype=torch.float32))
        return out


class _Shapes(Batch):
    """A share of a batch of which only the shapes matter."""

    def _draw_crops(self, first: int, sizes: Any) -> dict[Kind, CropPlan]:  # noqa: ARG002
        return {}

    def crops(self, kind: Kind, micro: int, scale: int = 1) -> Tensor:  # noqa: ARG002
        """Crops without pixels; those of a single micro-batch are kept, as by `Batch`."""
        recipe = self.recipe.crops
        if kind not in self._kept_crops:
            size = recipe.size(kind)
            made = torch.empty((recipe.count(kind) * self.micro_size, 3, size, size), dtype=self.dtype, device=META)
            if self.micro_batches > 1:
                return made
            self._kept_crops[kind] = made
        return self._kept_crops[kind]


class _Traced:
    """One process's step, run to the student's loss."""

    def __init__(self, recipe: Recipe, device: Literal["cpu", "cuda"], processes: int) -> None:
        self.recipe, self.device = recipe, device
        self.ledger = ledger = Ledger(device)
        with ledger.counting("state"), ledger, META:
            step = Step(recipe, META)
        self.parameters = sum(p.numel() for p in step.student.parameters())
        self.state = _state(step)
        ledger.live.clear()
        ledger.fullest.clear()
        share, _ = recipe.batch.split(processes)
        image = torch.empty((3, 1, 1), dtype=torch.uint8)
        batch = _Shapes(recipe.stream(), 0, [image] * share, META, step.dtype, share=Share(0, processes))
        objective = step.objective

        def balance(*inputs: Tensor) -> Any:
            with ledger.counting("loss"):
                return objective.balance(*inputs)

        for head in dict.fromkeys((objective.student.dino_head, objective.student.patch_head)):
            head.last_layer.register_forward_pre_hook(lambda *_: setattr(ledger, "part", "loss"))
            head.last_layer.register_forward_hook(lambda *_: setattr(ledger, "part", "activations"))
        with ledger.watching():
            temperature = torch.empty((), device=META)
            with ledger.counting("inputs"):
                targets = objective.targets(batch, temperature, objective.look, balance)
            self.teacher = ledger.fullest.copy()
            with ledger.counting("inputs"):
                inputs = objective.inputs(batch, 0, targets)
            ledger.fullest.clear()
            terms = objective.losses(*inputs)
            self.forward, self.kept = ledger.fullest.copy(), ledger.live.copy()
            self.tokens, self.rows = _rows(recipe, batch)
            self.crops = inputs[2]
            self.rendered_ahead = batch.micro_batches == 1
            del terms
        self.itemsize = step.dtype.itemsize

    def moments(self) -> list[Counter[str]]:
        """The candidates for the fullest moment, by part."""
        prototypes, block = self.kept.copy(), self.kept.copy()
        prototypes["loss"] += self._prototypes_backward()
        block["loss"] = 0  # the loss comes before the blocks in a backward, and is freed by then
        block["activations"] += self._block_backward()
        return [self.teacher, self.forward, prototypes, block]

    def other_crops(self) -> int:
        """Bytes of crops beside those at work.

        On a GPU the copies that recorded CUDA graphs read, one for the teacher and one for the student; on a processor
        those that are rendered ahead.
        """
        shown, *local = [crops.numel() * crops.itemsize for crops in self.crops]
        if self.device == "cuda":
            return 2 * shown + sum(local) if self.recipe.graphs else 0
        return self.recipe.data.ahead * (shown + sum(local)) if self.rendered_ahead else 0

    def _prototypes_backward(self) -> int:
        """Gradients on their way from the loss to `weight_v`, through product, division and norm.

        Four arrays of the prototypes' size, two of which take the place of what the loss had kept.
        """
        heads = self.recipe.heads
        count, width = heads.ibot_prototypes, heads.ibot_bottleneck
        if heads.tied:
            count, width = heads.dino_prototypes, heads.dino_bottleneck
        return 2 * count * width * torch.promote_types(DTYPES[self.recipe.precision], torch.float32).itemsize

    def _block_backward(self) -> int:
        """What the fullest backward of a block makes, at its feed-forward part or its attention.

        Letters as in `vit`: T tokens in all, R of them computed. A gradient of the tokens arrives `[T, D]`, its rows
        are taken `[R, D]`. Feed-forward: the gradient of the activation, the activation again, and the gradient of its
        input (for SwiGLU twice as wide; the plain torch code makes more of it). Attention: gradients of queries, keys
        and values by torch, stacked, put in order, and joined over the crops. A recomputed block comes on top.
        """
        arch, tokens, rows = self.recipe.backbone, self.tokens, sum(self.rows)
        wide = {"mlp": 3, "swiglu": 8 if self.device == "cpu" else 4}[arch.ffn] * arch.hidden
        made = tokens * arch.width + rows * (arch.width + max(wide, 12 * arch.width))
        if self.recipe.parallel.recompute != "none":
            made += block_elements(arch, tokens, rows)
        full = torch.promote_types(DTYPES[self.recipe.precision], torch.float32).itemsize
        weights = 3 * full * arch.width * max(4 * arch.width, 2 * arch.hidden)  # gradients of a matrix, in the making
        return made * self.itemsize + weights + self._attention_matrices()

    def _attention_matrices(self) -> int:
        """Gradients of attention weights, where a processor writes them out (see `vit.Attention.attend`)."""
        if self.device != "cpu" or self.itemsize != 2:
            return 0
        crops, arch = self.recipe.crops, self.recipe.backbone
        total = 0
        for size, rows in zip((crops.global_size, crops.local_size), self.rows, strict=False):
            tokens = 1 + arch.registers + (size // arch.patch) ** 2
            total += 2 * rows * tokens * arch.heads if tokens <= WRITTEN_OUT else 0
        return total * self.itemsize


def block_elements(arch: Architecture, tokens: int, rows: int) -> int:
    """Numbers that a fused block keeps for its backward, of T `tokens` of which it computes `rows`.

    The tokens twice; queries, keys, values, attention's output and the feed-forward's input of the computed rows: 10 D
    for each token of an MLP block that computes all.
    """
    into = arch.hidden if arch.ffn == "mlp" else 2 * arch.hidden
    return 2 * tokens * arch.width + rows * (4 * arch.width + into)


def _rows(recipe: Recipe, batch: Batch) -> tuple[int, list[int]]:
    """Tokens of the student's crops in a micro-batch, and those that a branch of a block computes, by kind of crop."""
    arch, crops = recipe.backbone, recipe.crops
    kinds: Sequence[Kind] = ("global", "local") if crops.local_count else ("global",)
    tokens = [1 + arch.registers + (crops.size(kind) // arch.patch) ** 2 for kind in kinds]
    images = [crops.count(kind) * batch.micro_size for kind in kinds]
    kept = batch.kept(0)
    computed = images if kept is None else [part.shape[-1] for part in kept]
    return (
        sum(t * n for t, n in zip(tokens, images, strict=True)),
        [t * n for t, n in zip(tokens, computed, strict=True)],
    )


def _state(step: Step) -> tuple[int, int, int]:
    """Bytes of weights with their copies, gradients, and moments, each storage once."""
    networks = (step.student, step.average, step.objective.student, step.objective.teacher)
    weights = [p for network in networks for p in network.parameters()]
    gradients = [p.grad for p in step.student.parameters() if p.grad is not None]
    sizes = []
    for tensors in (weights, gradients, list(step.optimiser.moments.values())):
        storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        sizes.append(sum(storage.nbytes() for storage in storages.values()))
    return sizes[0], sizes[1], sizes[2]


def _gathered(recipe: Recipe, run: _Traced) -> int:
    """Whole blocks with their gradients, in the type of the products, and whole prototypes with theirs, in full."""
    arch, heads = recipe.backbone, recipe.heads
    into = arch.hidden if arch.ffn == "mlp" else 2 * arch.hidden
    block = arch.width * (4 * arch.width + into + arch.hidden)
    prototypes = heads.dino_prototypes * heads.dino_bottleneck
    prototypes += 0 if heads.tied else heads.ibot_prototypes * heads.ibot_bottleneck
    full = torch.promote_types(DTYPES[recipe.precision], torch.float32).itemsize
    return 2 * GATHERED_BLOCKS * block * run.itemsize + 2 * prototypes * full
