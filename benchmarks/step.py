"""A training step by parts: images per second, peak memory, and the share of time of each part.

    python benchmarks/step.py [--backbone dinov2_vits14] [--batch 8] [--precision bf16] [--steps 5]

Two 224 and eight 98 pixel crops of synthetic images, 65,536 prototypes in each of two heads, Sinkhorn–Knopp,
stochastic depth 0.3: the work of the reference's step.
"""

import argparse
import resource
import statistics
import time
from dataclasses import replace

import torch
from common import finish

from opsin.backbone.registry import architecture
from opsin.data.stream import Batch, BatchRecipe
from opsin.pretrain.loop import DTYPES, build, pick_device
from opsin.pretrain.objective import Objective, total
from opsin.pretrain.optim import AdamW, scalar_dtype, update_teacher
from opsin.pretrain.recipe import Recipe


def main() -> None:
    """Time some steps part by part and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dinov2_vits14")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--steps", type=int, default=5)
    a = parser.parse_args()
    device = pick_device(None)
    recipe = Recipe(
        backbone=replace(architecture(a.backbone), grid=16),
        precision=a.precision,
        batch=BatchRecipe(size=a.batch, group=a.batch),
    )
    student, teacher = build(recipe, device)
    objective = Objective(recipe.loss, student, teacher, DTYPES[a.precision])
    optimiser = AdamW(student, recipe.backbone.depth, recipe.optim)
    rate, momentum, temperature = (
        torch.tensor(v, dtype=scalar_dtype(device), device=device) for v in (1e-4, 0.996, 0.05)
    )
    images = [torch.randint(0, 256, (3, 375, 500), dtype=torch.uint8) for _ in range(a.batch)]
    parts: dict[str, list[float]] = {}

    def timed(name: str, start: float) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        parts.setdefault(name, []).append(now - start)
        return now

    for step in range(a.steps + 1):
        if step == 1:
            parts.clear()  # the first step warms up
        began = at = time.perf_counter()
        batch = Batch(recipe.stream(), step, images, device)
        batch.crops("global", 0)
        batch.crops("local", 0)
        at = timed("crops", at)
        targets = objective.targets(batch, temperature)
        at = timed("teacher and balancing", at)
        optimiser.zero_grad()
        loss = total(objective.terms(batch, 0, targets))
        at = timed("student forward and loss", at)
        loss.backward()
        at = timed("backward", at)
        _, finite = optimiser.clip(torch.ones((), device=device))
        optimiser.step(rate, rate, rate, finite)
        at = timed("clipping and AdamW", at)
        update_teacher(teacher.parameters(), student.parameters(), momentum, finite)
        timed("moving average", at)
        timed("step", began)
    medians = {name: statistics.median(times) for name, times in parts.items()}
    whole = medians.pop("step")
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    finish(
        f"step-{a.backbone}-{a.precision}",
        {
            "backbone": a.backbone,
            "batch": a.batch,
            "precision": a.precision,
            "images_per_second": a.batch / whole,
            "seconds_per_step": whole,
            "fastest_and_slowest": [min(parts["step"]), max(parts["step"])],
            "share": {name: value / whole for name, value in medians.items()},
            "peak_gib": peak / 2**30,
        },
    )


if __name__ == "__main__":
    main()
