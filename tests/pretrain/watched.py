"""A run as the loop makes it, reduced to what the watch sees: for tests that break something in the middle."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from opsin.backbone.registry import architecture
from opsin.data.crops import CropRecipe
from opsin.data.decode import DECODER
from opsin.data.reader import ImageReader
from opsin.data.sources import scan
from opsin.data.stream import BatchRecipe, Stream
from opsin.pretrain.checkpoint import Checkpoints
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.monitor import MonitorRecipe
from opsin.pretrain.presets import cpu
from opsin.pretrain.recipe import Recipe, to_yaml
from opsin.pretrain.schedules import scheduled
from opsin.pretrain.step import Step
from opsin.pretrain.watch import Watch

CPU = torch.device("cpu")
TIMINGS = {"images_per_second": 100.0, "step_seconds": 1.0, "data_seconds": 0.0}


def tiny(steps: int = 60, batch: int = 32, **monitor) -> Recipe:
    """The cpu recipe with two blocks of width 64 and 256 prototypes: a step of less than a tenth of a second."""
    heads = HeadRecipe(dino_prototypes=256, dino_bottleneck=32, ibot_prototypes=256, ibot_bottleneck=32, hidden=128)
    return replace(
        cpu(),
        backbone=replace(architecture("vit_nano8"), depth=2, width=64, grid=4, layerscale=1.0),
        steps=steps,
        log_every=5,
        batch=BatchRecipe(size=batch, group=min(batch, 32)),
        crops=CropRecipe(global_size=32, local_size=16, local_count=2, local_scale=(0.1, 0.4)),
        heads=heads,
        monitor=MonitorRecipe(**{"policy": "lower", "probe_every": 0, "probe_images": 32, **monitor}),
    )


def varied(folder: Path, count: int = 96, side: int = 48) -> Path:
    """Images whose crops share something: coloured discs and stripes on a shaded ground."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    for i in range(count):
        ground, ink, line = random.integers(0, 256, (3, 3))
        pixels = ground * (0.4 + 0.6 * y[..., None])
        centre, radius = random.random(2), 0.15 + 0.3 * random.random()
        pixels[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = ink
        pixels[np.sin((x * random.normal() + y * random.normal()) * 40) > 0.7] = line
        write(folder, i, pixels)
    return folder


def write(folder: Path, number: int, pixels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels).clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.png")


FACTS = {
    "decoder": DECODER,
    "data": {"fingerprint": "", "images": 0},
    "begin": {"method": "self", "before": None, "fresh": []},
}


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    before: Callable[[int, Step], None] = lambda *_: None,
    first: int = 0,
    save: tuple[int, ...] = (),
) -> tuple[list[dict], list[str], Step]:
    """Records, what was said, and the networks; `before` is called before every step and may break something."""
    said: list[str] = []
    records = []
    out.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        step_, watch = Step(recipe, CPU), stack.enter_context(Watch(recipe, out, CPU, said.append))
        state = step_.state() | watch.state()
        checkpoints = stack.enter_context(Checkpoints(out, state, recipe.backbone, 10))
        if first:
            checkpoints.load(first)
            step_.loaded()
        (out / "recipe.yaml").write_text(to_yaml(recipe))
        (out / "run.json").write_text(json.dumps(FACTS))
        source = scan(data, progress=False)
        reader = stack.enter_context(ImageReader(source, workers=1))
        stream = Stream(recipe.stream(), recipe.data, reader, source.order, CPU, step_.dtype)
        watch.begin(first, source, reader, step_.average.backbone)
        batches = stack.enter_context(contextlib.closing(stream.batches(first, recipe.steps)))
        step = first
        try:
            while step < recipe.steps:
                before(step, step_)
                values = watch.treated(scheduled(recipe.schedule, step, recipe.steps, recipe.batch.size))
                outcome = step_(next(batches), values)
                watch.note(step, outcome)
                step += 1
                if watch.due(step):
                    records.append(watch.record(step, outcome, values, TIMINGS, step_.average.backbone))
                if step in save:
                    checkpoints.save(step, {})
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return records, said, step_
