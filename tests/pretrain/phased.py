"""A recipe with every kind of phase, and runs of it that are stopped or watched: in this process, in seconds."""

import contextlib
import io
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from group import tensors_of
from opsin.pretrain import checkpoint, loop, phases
from opsin.pretrain.recipe import Recipe, from_yaml

TIMINGS = ("images_per_second", "step_seconds", "data_seconds")
ONE_PHASE = """
backbone: {width: 16, depth: 2, heads: 2, patch: 8, grid: 2, layerscale: 1.0}
steps: 3
drop_path: 0.2
precision: fp32
log_every: 1
batch: {size: 8, group: 4}
crops: {global_size: 16, local_size: 8, local_count: 2}
heads: {dino_prototypes: 32, ibot_prototypes: 32, dino_bottleneck: 8, ibot_bottleneck: 8, hidden: 16}
loss: {centering: average}
schedule: {rate: 1e-3, warmup_steps: 1, teacher_temperature_steps: 2, freeze_last_layer_steps: 0, momentum: [0.9, 1.0]}
data: {workers: 1}
checkpoint: {every: 1000}
monitor: {probe_every: 0, probe_images: 24}
"""
PHASES = """
phases:
- {name: pretrain}
- name: anchor
  length: 32 images
  change: {gram.weight: 2.0, gram.scale: 2, gram.refresh_every: 2, monitor.probe_every: 2}
- name: high-res
  length: 1 epoch
  change:
    gram.weight: 0.0
    backbone.grid: 4
    crops.global_size: 32
    crops.mixture: [[32, 16, 0.5], [16, 8, 0.5]]
    parallel.recompute: full
    schedule.rate: 1e-4
- {name: heads, length: 2 steps, change: {train: heads, crops.mixture: []}}
- {name: new-heads, length: 2 steps, change: {train: all}, fresh: [heads]}
- {name: new-moments, length: 2 steps, fresh: [optimiser]}
"""
LENGTHS = [3, 4, 3, 2, 2, 2]
"""Steps of each, on 24 images."""


def one_phase(**changes: Any) -> Recipe:
    """A run of a second."""
    return replace(from_yaml(ONE_PHASE, "one"), **changes)


def six_phases(text: str = ONE_PHASE + PHASES) -> Recipe:
    """Every kind of phase."""
    return from_yaml(text, "six")


def pretrain(recipe: Recipe, photos: Path, out: Path, **options: Any) -> tuple[loop.Finished, str]:
    """How the run ended, and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        finished = phases.pretrain(recipe, photos, out, device="cpu", **options)
    return finished, said.getvalue()


def state(out: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint."""
    return tensors_of(checkpoint.folder(out) / f"step-{checkpoint.steps(out)[-1]:08d}")


def records(out: Path) -> list[dict[str, Any]]:
    """The metrics, without timings."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS} for line in lines]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether all tensors are the same bits; names a difference."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    return True


@contextlib.contextmanager
def signalled(phase: int, after: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """In here, a signal arrives in a phase, counted from 0, in the step after which so many steps are finished."""
    train = loop.train

    def stopped(steps: Any, batch: Any, values: Any) -> Any:
        if (batch.recipe.seed, batch.step + 1) == (phase, after):
            os.kill(os.getpid(), number)
        return train(steps, batch, values)

    loop.train = stopped
    try:
        yield
    finally:
        loop.train = train


@contextlib.contextmanager
def first_states() -> Iterator[list[dict[str, Tensor]]]:
    """In here, the state of every run before its first step is kept."""
    train, kept = loop.train, []

    def watched(steps: Any, batch: Any, values: Any) -> Any:
        if batch.step == 0:
            kept.append({name: tensor.clone() for name, tensor in steps[0].state().items()})
        return train(steps, batch, values)

    loop.train = watched
    try:
        yield kept
    finally:
        loop.train = train
