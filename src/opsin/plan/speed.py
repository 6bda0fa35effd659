"""How long a step takes: operations and bytes counted on the step, divided by what a device does of each.

A small roofline model. The operations are counted by torch (`opsin.bench.flops`); what share of a device's speed they
reach is calibrated on the only measurements there are, those of a plain torch.compile prototype of this design on one
H100 (`MEASURED`). The fused kernels of this package have never been timed on a GPU, so every result is a `Range`: its
slow end is what the prototype reached, its fast end what the kernels should reach by the bytes that they move.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.bench.flops import flops, step_flops
from opsin.data.masks import masked_bound
from opsin.data.stream import BatchRecipe
from opsin.plan.devices import Device
from opsin.pretrain.parallel import Spread, count_parameters
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.step import DTYPES


class Range(NamedTuple):
    """A number that is known as far as it lies between two."""

    slow: float
    fast: float

    def map(self, function: Callable[[float], float]) -> "Range":
        """Both ends through a function."""
        return Range(function(self.slow), function(self.fast))


PRODUCTS = Range(0.78, 0.94)
"""Of a large product's speed, what the products of a step reach: 0.78 for ViT-S/14, 0.94 for ViT-L/14."""
ATTENTION = 0.11
"""Of a large product's speed, what attention reaches, its recomputed scores not counted: 0.113 and 0.105."""
PASSES = Range(121, 70)
"""Times that a block reads or writes a computed token `[D]` outside products and attention, forward and backward: 122
and 121 in the prototype; about 70 by a count of what the fused kernels and the sums of the biases' gradients touch."""
FORWARD_PASSES = 1 / 3
"""Share of `PASSES` that are in the forward."""
SCORE_BYTES = 5
"""Moved for a score in each of the products that form it or use its gradient, seven in all: what remains of 10.9 ms for
9,856 rows and 65,536 prototypes of 256 dimensions beside the products."""
UPDATE_BYTES = 48
"""Moved by an update for one parameter: weight, gradient, moments and teacher read and written, two copies written."""
MEASURED = "one H100, torch 2.11: ViT-S/14 and ViT-L/14, 224 + 98 pixels, stochastic depth 0.3, bf16"


@dataclass(frozen=True)
class Work:
    """What a step computes for one image, and for the batch."""

    flops: float
    """Matrix products, convolutions and attention of one image, all scores formed once: what a step is compared by."""
    products: float
    """Of them products without attention and without prototypes."""
    attention: float
    """Of them products inside attention."""
    score_flops: float
    """Products that form prototype scores and their gradients, as this package computes them."""
    scores: float
    """Scores formed by them."""
    token_bytes: float
    """Of the tokens that blocks compute, each counted for `PASSES`."""
    backbone: int
    """Parameters of the backbone."""
    heads: int
    """Parameters of the heads."""
    depth: int
    """Blocks."""

    @property
    def parameters(self) -> int:
        """Of the student."""
        return self.backbone + self.heads


def work_of(recipe: Recipe) -> Work:
    """Count what a step computes, on tensors without values."""
    group, arch, crops, heads = recipe.batch.group, recipe.backbone, recipe.crops, recipe.heads
    small = replace(recipe, batch=BatchRecipe(size=group, group=group))
    with FlopCounterMode(display=False) as counter:
        counted = step_flops(small) / group
    by_operation = counter.get_flop_counts()["Global"]
    # Only attention multiplies batches of matrices; on the meta device it is written out.
    attention = sum(n for operation, n in by_operation.items() if "bmm" in str(operation)) / group
    side = crops.global_size // arch.patch
    hidden = masked_bound(recipe.masks, 2 * group, (side, side)) / group
    image, patch = heads.dino_prototypes, heads.ibot_prototypes
    widths = heads.dino_bottleneck, heads.ibot_bottleneck
    if heads.tied:
        patch, widths = image, (widths[0], widths[0])
    textbook = formed = scores = 0.0
    balancing = recipe.loss.sinkhorn_iterations if recipe.loss.centering == "sinkhorn" else 0
    views = 2 + crops.local_count
    for count, width, teacher, student in ((image, widths[0], 2, views), (patch, widths[1], hidden, hidden)):
        products = teacher * (1 + balancing) + 3 * student
        textbook += 2.0 * count * width * (teacher + 3 * student)
        formed += 2.0 * count * width * products
        scores += count * products
    student_tokens, teacher_tokens = _tokens(recipe)
    total = count_parameters(arch, heads)
    with torch.device("meta"):
        backbone = sum(p.numel() for p in VisionTransformer(arch).parameters())
    return Work(
        flops=counted,
        products=counted - attention - textbook,
        attention=attention,
        score_flops=formed,
        scores=scores,
        token_bytes=(student_tokens + teacher_tokens * FORWARD_PASSES)
        * (arch.depth * arch.width * DTYPES[recipe.precision].itemsize),
        backbone=backbone,
        heads=total - backbone,
        depth=arch.depth,
    )


def _tokens(recipe: Recipe) -> tuple[float, float]:
    """Tokens of an image that a block of the student computes, and of the teacher."""
    arch, crops = recipe.backbone, recipe.crops
    shown, local = (1 + arch.registers + (size // arch.patch) ** 2 for size in (crops.global_size, crops.local_size))
    return (2 * shown + crops.local_count * local) * (1 - recipe.drop_path), 2.0 * shown


@dataclass(frozen=True)
class Parts:
    """Seconds of a step, by what bounds them."""

    products: Range
    attention: Range
    bandwidth: Range
    """LayerNorm, activations, stochastic depth, residuals, and the update of the weights."""
    loss: Range
    communication: Range
    """What lies beside computing in the fast case, and after it in the slow one."""

    @property
    def seconds(self) -> Range:
        """Of the step: communication hidden behind computing at best, and not at all at worst."""
        computing = (self.products, self.attention, self.bandwidth, self.loss)
        slow, fast = (sum(part[end] for part in computing) for end in (0, 1))
        return Range(slow + self.communication.slow, max(fast, self.communication.fast))


def step_time(recipe: Recipe, work: Work, device: Device, spread: Spread, per_node: int, network: float) -> Parts:
    """Seconds of a step by part.

    Args:
        recipe: of the run.
        work: of the recipe.
        device: each of `spread`'s processes has one.
        spread: of the model over the processes.
        per_node: GPUs of a machine.
        network: bytes per second that a GPU sends to another machine.
    """
    processes = spread.replicate * spread.shard
    share, micro = recipe.batch.split(processes)
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[recipe.parallel.recompute]
    student, teacher = _tokens(recipe)
    repeated = 1 + again * student / (3 * student + teacher)  # a backward costs two forwards
    products = PRODUCTS.map(lambda reached: share * repeated * work.products / (reached * device.product))
    attention = share * repeated * work.attention / (ATTENTION * device.product)
    update = work.parameters / spread.shard * UPDATE_BYTES / device.bandwidth
    bandwidth = PASSES.map(lambda passes: share * repeated * passes * work.token_bytes / device.bandwidth + update)
    moved = share * work.scores * SCORE_BYTES / device.bandwidth
    loss = PRODUCTS.map(lambda reached: share * work.score_flops / (reached * device.score_product) + moved)
    sent = communication(recipe, work, spread, per_node, device.link, network, share // micro)
    return Parts(products, Range(attention, attention), bandwidth, loss, Range(sent, sent))


def communication(
    recipe: Recipe, work: Work, spread: Spread, per_node: int, link: float, network: float, micro_batches: int
) -> float:
    """Seconds in which a GPU sends its part of weights and gradients round rings.

    Replicated: gradients in fp32, once per step. Sharded: the backbone's weights are gathered for the teacher's forward
    and for the student's forward and backward, and its gradients summed, in the products' precision, for every
    micro-batch; prototypes and their gradients in fp32 once. Hybrid: also the shards' gradients across machines, which
    every GPU sends for itself. A ring over all GPUs of several machines leaves each through the ports of all its GPUs.
    """
    half = DTYPES[recipe.precision].itemsize
    together = min(link, network * per_node)

    def ring(members: int, speed: float) -> float:
        return (members - 1) / members / speed

    seconds = 0.0
    if spread.shard > 1:
        sent = 4.0 * half * work.backbone * micro_batches + 4.0 * 3 * work.heads
        seconds += ring(spread.shard, link if spread.shard <= per_node else together) * sent
    if spread.replicate > 1:
        alone = network if spread.shard > 1 else together
        speed = link if spread.shard * spread.replicate <= per_node else alone
        seconds += ring(spread.replicate, speed) * 2 * 4.0 * work.parameters / spread.shard
    return seconds


def forward_time(arch: Architecture, size: int, precision: str, device: Device) -> tuple[float, Range]:
    """Operations of one image's forward through a backbone at `size` pixels, and its seconds."""
    with torch.device("meta"):
        backbone = VisionTransformer(arch)
    image = torch.empty((1, arch.channels, size, size), device="meta")
    counted = flops(lambda: backbone([image]))
    tokens = 1 + arch.registers + (size // arch.patch) ** 2
    attention = 4.0 * tokens**2 * arch.width * arch.depth
    token_bytes = tokens * arch.depth * arch.width * DTYPES[precision].itemsize * FORWARD_PASSES
    slow, fast = (
        (counted - attention) / (reached * device.product) + passes * token_bytes / device.bandwidth
        for reached, passes in zip(PRODUCTS, PASSES, strict=True)
    )
    fixed = attention / (ATTENTION * device.product)
    return counted, Range(slow + fixed, fast + fixed)
