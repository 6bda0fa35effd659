"""A training step: how fast it is, where its time goes, what it needs, and how near it comes to what the device can do.

The work is the reference's: 2 global and 8 local crops, stochastic depth 0.3, a DINO and an iBOT head, Sinkhorn–Knopp,
clipping, AdamW and the teacher's moving average, on synthetic 8-bit images that lie in memory.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from opsin.backbone import graphs
from opsin.backbone.graphs import Piece
from opsin.backbone.registry import architecture
from opsin.bench.flops import step_flops
from opsin.bench.timing import (
    Clock,
    Machine,
    PeakMemory,
    Spread,
    elapsed,
    machine,
    matrix_product_peak,
    spread,
    synchronise,
)
from opsin.data.crops import CropRecipe
from opsin.data.stream import Batch, BatchRecipe
from opsin.errors import OpsinError
from opsin.machine import check_precision
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.objective import total
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.schedules import Scheduled
from opsin.pretrain.step import DTYPES, Step

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
WARM_UP = {"cuda": graphs.WARM_UP + 2, "mps": 2, "cpu": 2}
"""Steps before those that are measured: by then kernels are compiled, and on CUDA the step is recorded."""
IMAGE = (3, 375, 500)
"""Shape of a synthetic image: the usual one of ImageNet's files."""
VALUES = Scheduled(rate=1e-4, last_layer_rate=1e-4, decay=0.04, momentum=0.996, teacher_temperature=0.05)
"""What a schedule would give; the time does not depend on it."""


@dataclass(frozen=True)
class Parts:
    """Milliseconds by part, from steps that wait for the device between parts: a little more in all than a free step.

    `student`, `prototype_loss` and `backward` lie within `learning`, the others are all of a step. These three are of
    steps in which learning is not recorded as a CUDA graph: on a GPU they show proportions, and can be more in all than
    learning is.
    """

    crops: Spread
    """Rendering the global and local crops from decoded images that are on the device."""
    teacher: Spread
    """The teacher's backbone and heads."""
    balancing: Spread
    """Sinkhorn–Knopp over both heads' prototypes."""
    learning: Spread
    """The student's forward, loss and backward."""
    student: Spread
    """Forward of the student's backbone and heads."""
    prototype_loss: Spread
    """Cross-entropy over both heads' prototypes, with those of its gradients that are formed on the way."""
    backward: Spread
    """Backward of the student."""
    optimiser: Spread
    """Clipping, AdamW and the teacher's moving average."""
    rest: Spread
    """Between the parts: schedules, masks and the samples of stochastic depth on their way to the device."""


@dataclass(frozen=True)
class StepResult:
    """What `opsin bench step` writes as JSON."""

    machine: Machine
    """Where and when."""
    backbone: str
    """Name of the architecture."""
    batch: int
    """Images of a step."""
    precision: Precision
    """Of the matrix products."""
    prototypes: int
    """Prototypes of each of the two heads."""
    global_size: int
    """Side of a global crop in pixels."""
    local_size: int
    """Side of a local crop in pixels."""
    images_per_second: float
    """Images of a step over the median of `step`."""
    images_per_second_without_crops: float
    """The same over the median of `without_crops`: what trainers reach that are given ready crops."""
    step: Spread
    """Milliseconds of a whole step."""
    without_crops: Spread
    """Milliseconds of a step whose crops are there."""
    parts: Parts
    """Milliseconds by part."""
    tera_flop_per_step: float
    """10^12 operations of matrix products and attention that the step needs, nothing counted twice that a step may
    compute twice to save memory."""
    tera_flop_per_second: float
    """Those operations over the median of `without_crops`."""
    matrix_product_tera_flop_per_second: float
    """What a large square product reaches on this device in this precision."""
    share_of_matrix_product: float
    """The former over the latter: model FLOP utilisation against the measured peak."""
    peak_bytes: int
    """The most memory in use after the first step: on CUDA what torch allocated, graphs included, on a processor what
    became resident since before the networks were built."""
    first_step_seconds: float
    """From before the networks are built to the end of the first step: kernels are compiled."""
    ready_seconds: float
    """From before the networks are built to the end of the warm-up: on CUDA the step is recorded as well."""


def recipe_of(backbone: str, batch: int, precision: Precision, prototypes: int, global_size: int) -> Recipe:
    """The recipe that is timed; local crops are as near below 98 pixels as the patch allows.

    Raises:
        OpsinError: an unknown backbone, or a number that does not fit.
    """
    arch = architecture(backbone)
    if batch < 2:
        raise OpsinError(f"--batch is {batch}: give 2 or more, for KoLeo needs neighbours.")
    if prototypes < 1:
        raise OpsinError(f"--prototypes is {prototypes}: give 1 or more.")
    if global_size < 1 or global_size % arch.patch:
        nearest = max(1, round(global_size / arch.patch)) * arch.patch
        raise OpsinError(
            f"--global-size {global_size} is not a multiple of the patch of {backbone}, {arch.patch}: try {nearest}."
        )
    return Recipe(
        backbone=replace(arch, grid=global_size // arch.patch),
        precision=precision,
        batch=BatchRecipe(size=batch, group=batch),
        crops=CropRecipe(global_size=global_size, local_size=max(1, 98 // arch.patch) * arch.patch),
        heads=HeadRecipe(dino_prototypes=prototypes, ibot_prototypes=prototypes),
    )


def time_step(
    backbone: str,
    batch: int,
    precision: Precision,
    prototypes: int,
    global_size: int,
    steps: int,
    device: torch.device,
) -> StepResult:
    """Time `steps` whole steps, and as many again part by part.

    Raises:
        OpsinError: settings that do not fit, or that need more memory than the GPU has.
    """
    recipe = recipe_of(backbone, batch, precision, prototypes, global_size)
    if steps < 1:
        raise OpsinError(f"--steps is {steps}: give 1 or more.")
    check_precision(precision, device)
    where = machine(device)
    try:
        memory = PeakMemory(device)
        began = time.perf_counter()
        work = _Work(recipe, device)
        work.whole(1)
        first = time.perf_counter() - began
        memory.reset()
        work.whole(WARM_UP[device.type] - 1)
        ready = time.perf_counter() - began
        crops, without_crops = work.whole(steps)
        peak_bytes = memory.read()
        parts = work.parts(steps)
        del work
        peak = matrix_product_peak(device, DTYPES[precision])
    except torch.OutOfMemoryError:
        raise OpsinError(
            f"a step of {batch} images with {backbone} does not fit into the memory of {where.device}: give a smaller "
            "--batch, --prototypes or --global-size."
        ) from None
    whole = spread([1e3 * (c + w) for c, w in zip(crops, without_crops, strict=True)])
    given = spread([1e3 * w for w in without_crops])
    needed = step_flops(recipe)
    achieved = needed / given.median * 1e3
    return StepResult(
        machine=where,
        backbone=backbone,
        batch=batch,
        precision=precision,
        prototypes=prototypes,
        global_size=global_size,
        local_size=recipe.crops.local_size,
        images_per_second=batch / whole.median * 1e3,
        images_per_second_without_crops=batch / given.median * 1e3,
        step=whole,
        without_crops=given,
        parts=parts,
        tera_flop_per_step=needed / 1e12,
        tera_flop_per_second=achieved / 1e12,
        matrix_product_tera_flop_per_second=peak / 1e12,
        share_of_matrix_product=achieved / peak,
        peak_bytes=peak_bytes,
        first_step_seconds=first,
        ready_seconds=ready,
    )


class _Work:
    """Steps of a training on synthetic images."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.step = Step(recipe, device)
        self.images = [torch.randint(0, 256, IMAGE, dtype=torch.uint8) for _ in range(recipe.batch.size)]
        self.number = 0

    def batch(self) -> Batch:
        """What the next step sees, its images on the device: a training has them put there ahead of the step."""
        batch = Batch(self.recipe.stream(), self.number, self.images, self.device, self.step.dtype)
        self.number += 1
        batch.upload(0)
        return batch

    def whole(self, steps: int) -> tuple[list[float], list[float]]:
        """Seconds of the crops of some steps, and of all that follows them."""
        crops, rest = [], []
        for _ in range(steps):
            batch = self.batch()
            crops.append(elapsed(partial(render, batch), self.device))
            rest.append(elapsed(partial(self.step, batch, VALUES), self.device))
        return crops, rest

    def parts(self, steps: int) -> Parts:
        """Milliseconds by part. Afterwards the step is no longer that of a training."""
        clock, step = Clock(self.device), self.step

        def counted(piece: Piece, name: str) -> Piece:
            def call(*inputs: Any) -> Any:
                with clock.part(name):
                    return piece(*inputs)

            return Piece(call)

        step.look, step.balance = counted(step.look, "teacher"), counted(step.balance, "balancing")
        step.learn, step.update = counted(step.learn, "learning"), counted(step.update, "optimiser")
        times = self._counted(clock, steps)

        def learn(scale: Tensor, *inputs: Any) -> dict[str, Tensor]:
            terms = step.objective.losses(*inputs)
            with clock.part("backward"):
                (total(terms) * scale).backward()
            return {name: term.detach() for name, term in terms.items()}

        step.learn = Piece(learn)
        student = step.objective.student
        for module in student.children():
            clock.watch(module, "student")
        for head in (student.dino_head, student.patch_head):
            clock.watch(head.last_layer, "prototype_loss")
        inside = self._counted(clock, steps)
        for name in ("student", "prototype_loss", "backward"):
            times[name] = inside[name]
        return Parts(**{name: spread(values) for name, values in times.items()})

    def _counted(self, clock: Clock, steps: int) -> dict[str, list[float]]:
        """Milliseconds of each of some steps by what `clock` counts."""
        times: dict[str, list[float]] = {}
        for _ in range(steps):
            batch = self.batch()
            synchronise(self.device)
            clock.seconds.clear()
            with clock.part("crops"):
                render(batch)
            with clock.part("rest"):
                self.step(batch, VALUES)
            for name, seconds in clock.seconds.items():
                times.setdefault(name, []).append(seconds * 1e3)
        return times


def render(batch: Batch) -> None:
    """Make the crops, which the batch keeps."""
    batch.crops("global", 0)
    batch.crops("local", 0)
