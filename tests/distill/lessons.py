"""Small teachers, students and distillations, for the tests of this folder."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from group import tensors_of
from opsin.backbone import weights
from opsin.backbone.vit import Architecture
from opsin.data.crops import CropRecipe
from opsin.data.stream import BatchRecipe, DataRecipe
from opsin.distill import run as module
from opsin.distill.run import Lesson, distill
from opsin.pretrain import checkpoint
from opsin.pretrain.heads import HeadRecipe, save_heads
from opsin.pretrain.loop import Finished
from opsin.pretrain.monitor import MonitorRecipe
from opsin.pretrain.objective import Network
from opsin.pretrain.presets import distill_cpu
from opsin.pretrain.recipe import CheckpointRecipe, Recipe, to_yaml

TEACHER = Architecture(24, 2, 2, patch=8, grid=4, layerscale=0.5, registers=1)
HEADS = HeadRecipe(dino_prototypes=40, dino_bottleneck=12, ibot_prototypes=30, ibot_bottleneck=8, hidden=20)
TIMINGS = ("images_per_second", "step_seconds", "data_seconds")


def network(architecture: Architecture = TEACHER, heads: HeadRecipe = HEADS) -> Network:
    """A teacher, always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Network(architecture, heads).eval()


def save(teacher: Network, folder: Path, heads: HeadRecipe | None = HEADS) -> Path:
    """Leave in `folder` what a finished run leaves; without heads if these are None."""
    weights.save(teacher.backbone, folder / "backbone.safetensors")
    if heads is not None:
        state = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith("backbone.")}
        save_heads(folder / "heads.safetensors", state, heads, teacher.backbone.arch.width)
    return folder


def recipe(width: int = 16, depth: int = 1, **changes: Any) -> Recipe:
    """Of a student: four steps of eight images."""
    small = distill_cpu()
    settings: dict[str, Any] = {
        "backbone": Architecture(width, depth, 2, patch=8, grid=2, layerscale=1.0),
        "steps": 4,
        "precision": "fp64",
        "batch": BatchRecipe(size=8, group=4),
        "crops": CropRecipe(global_size=16, local_size=8, local_count=2),
        "heads": HeadRecipe(dino_bottleneck=40, ibot_bottleneck=36, hidden=16, dino_prototypes=5, ibot_prototypes=5),
        "schedule": replace(small.schedule, warmup_steps=2, momentum=(0.9, 1.0)),
        "data": DataRecipe(workers=1, upsample=True),
        "checkpoint": CheckpointRecipe(every=2),
        "monitor": MonitorRecipe(probe_every=0),
    }
    return replace(small, **(settings | changes))


def student(folder: Path, name: str, settings: Recipe) -> str:
    """Write a student's recipe; for --students."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(settings))
    return str(path)


def taught(
    teacher: Path, students: Sequence[str], data: Path, out: Path, lesson: Lesson | None = None, **how: Any
) -> list[Finished]:
    """A distillation on this CPU."""
    settings = {"device": "cpu", "quiet": True} | how
    return distill(teacher, lesson or Lesson(), students, recipe(), data, out, **settings)


def records(out: Path) -> list[dict[str, Any]]:
    """Of a run, without what a clock said."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def state(out: Path, step: int = 4) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return tensors_of(checkpoint.folder(out) / f"step-{step:08d}")


def assert_same_run(a: Path, b: Path, step: int = 4) -> None:
    """Losses, weights and moments, bit for bit."""
    assert records(a) == records(b)
    ours, theirs = state(a, step), state(b, step)
    assert ours.keys() == theirs.keys()
    other = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert not other
    left = [load_file(out / "backbone.safetensors") for out in (a, b)]
    assert all(torch.equal(tensor, left[1][name]) for name, tensor in left[0].items())


def remember_teachers(monkeypatch: Any) -> list[Any]:
    """The `Teacher` of every distillation from now on."""
    found: list[Any] = []

    class Remembered(module.Teacher):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            found.append(self)

    monkeypatch.setattr(module, "Teacher", Remembered)
    return found
