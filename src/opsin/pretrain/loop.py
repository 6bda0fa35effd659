"""Pretraining: the whole story of a run, top to bottom.

    images → batches of crops → teacher's targets → student's losses → clipped gradients → AdamW → teacher's average

Everything that a step sees is a function of (seed, step), so the state of a run is: both networks, the moments, the
step. The same command goes on where a stopped or killed run left off, bit for bit on a CPU; on any number of processes,
each of which takes its share of every batch.
"""

import contextlib
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from opsin import ranks
from opsin.data.masks import draw_masks
from opsin.data.reader import ImageReader
from opsin.data.sources import Source, Summary, scan, summarise
from opsin.data.stream import Share, Stream
from opsin.errors import OpsinError
from opsin.machine import check_precision, pick_device
from opsin.pretrain import checkpoint, parallel
from opsin.pretrain.checkpoint import Checkpoints
from opsin.pretrain.folder import copy, describe, disk_errors, make_folder, only_run, write
from opsin.pretrain.monitor import Terminal
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.schedules import scheduled
from opsin.pretrain.step import Step
from opsin.pretrain.stop import lost_processes, stop_signal
from opsin.pretrain.watch import Watch


@dataclass(frozen=True)
class Finished:
    """How a run ended."""

    out: Path
    """The run's folder."""
    step: int
    """Finished steps."""
    stopped_by: int | None
    """The signal that stopped it before its last step, if one did."""

    @property
    def backbone(self) -> Path:
        """The teacher's backbone, for `opsin.load`."""
        return self.out / "backbone.safetensors"


@dataclass(frozen=True)
class Beginning:
    """What the first process finds before anything runs."""

    first: int
    """Finished steps of the run in the folder; 0 if there is none."""
    recipe: Recipe
    """Of the first process, which must be that of all."""
    spread: parallel.Spread
    """Of the model over the processes."""
    fingerprint: str
    """Of the images."""
    said: str
    """What will run on what."""
    files: dict[str, str]
    """Names and contents of what is written when the run begins."""


def pretrain(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    device: str | None = None,
    accept_changes: bool = False,
    quiet: bool = False,
) -> Finished:
    """Train a backbone on the images of `data` and leave everything about the run in `out`.

    Args:
        recipe: all settings; `opsin.pretrain.recipe.preset(name)` gives the named ones.
        data: see `scan`: a folder of any depth, a list, shards, here or in a bucket.
        out: folder of the run; if it holds one already, that run goes on. All processes must see it.
        device: "cuda", "mps" or "cpu"; by default the first of these that is there.
        accept_changes: go on although recipe, data or image decoder differ from those the run began with.
        quiet: no progress on stderr.

    Raises:
        OpsinError: for anything the user can mend: bad settings, unreadable data, a full disk, NaN gradients.
    """
    out, on = Path(out), pick_device(device)
    check_precision(recipe.precision, on)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks.started(on, recipe.parallel.timeout))
        stack.enter_context(disk_errors(out))
        stack.enter_context(lost_processes(out))
        share, quiet = Share(ranks.rank(), ranks.count()), quiet or not ranks.first()

        def begin() -> Beginning:
            make_folder(out)
            _check_masks(recipe)
            spread = _spread(recipe, on)
            source = scan(data, out / "cache", not quiet, recipe.data.bad_shards)
            stack.enter_context(only_run(out))
            done = checkpoint.steps(out)
            first = done[-1] if done else 0
            if first > recipe.steps:
                raise OpsinError(f"{out} holds a run of {first} steps already: give --steps {first} or more.")
            summary = summarise(source, workers=recipe.data.threads(), progress=not quiet)
            _check_sizes(recipe, source, summary)
            settings = {"resumed": bool(done), "accept_changes": accept_changes}
            said, files = describe(recipe, source, summary, out, on, spread, **settings)
            return Beginning(first, recipe, spread, source.fingerprint, said, files)

        beginning = ranks.by_first(begin)
        first = beginning.first
        source = scan(data, out / "cache", False, recipe.data.bad_shards)
        if source.fingerprint != beginning.fingerprint:
            raise OpsinError(f"{data} holds other images here than for the first process: give one that all can see.")
        if recipe != beginning.recipe:
            raise OpsinError("the settings of this process are not those of the first: give all of them the same.")
        terminal = Terminal(recipe.steps, first, quiet=quiet)
        stack.callback(terminal.close)
        terminal.say(beginning.said)

        train = Step(recipe, on, beginning.spread)
        watch = stack.enter_context(Watch(recipe, out, on, terminal.say))
        state = train.state() | watch.state()
        checkpoints = stack.enter_context(Checkpoints(out, state, recipe.backbone, recipe.checkpoint.keep))
        if first:
            checkpoints.load(first)
            terminal.say(f"going on from the checkpoint of step {first}")
        terminal.say(checkpoints.self_test())
        train.loaded()  # all processes have read what one of them wrote: they begin with the same bits

        reader = stack.enter_context(
            ImageReader(
                source,
                workers=recipe.data.threads(),
                max_bad_fraction=recipe.data.max_bad_fraction,
                log=out / "unreadable.jsonl",
            )
        )
        stream = Stream(recipe.stream(), recipe.data, reader, source.order, on, train.dtype, share)
        if ranks.first():
            for name, text in beginning.files.items():  # only now: the checkpoint fits, a refused run stays as it was
                write(out / name, text)
        watch.begin(first, source, reader, train.objective.teacher.backbone)
        stop = stack.enter_context(stop_signal())

        meta = {"recipe": asdict(recipe)}
        saved, step, ended_by = first, first, stop.agreed(checkpoints.failed)
        clock = time.perf_counter()
        waited, logged = 0.0, first
        batches = stack.enter_context(contextlib.closing(stream.batches(first, recipe.steps)))
        while step < recipe.steps and not ended_by:
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began

            values = watch.treated(scheduled(recipe.schedule, step, recipe.steps, recipe.batch.size))
            outcome = train(batch, values)
            watch.note(step, outcome)
            step += 1

            if watch.due(step):
                elapsed = time.perf_counter() - clock
                timings = {
                    "images_per_second": (step - logged) * recipe.batch.size / elapsed,
                    "step_seconds": elapsed / (step - logged),
                    "data_seconds": waited / (step - logged),
                }
                terminal.show(watch.record(step, outcome, values, timings, train.objective.teacher.backbone))
                waited, logged, clock = 0.0, step, time.perf_counter()
            if step % recipe.checkpoint.every == 0:
                checkpoints.save(step, meta)
                saved = step
            ended_by = stop.agreed(checkpoints.failed)

        if saved != step:
            checkpoints.save(step, meta)
        checkpoints.wait()
        finished = Finished(out, step, None if step == recipe.steps else ended_by)
        if step == recipe.steps:
            if ranks.first():
                copy(checkpoint.folder(out) / f"step-{step:08d}" / finished.backbone.name, finished.backbone)
        else:
            terminal.say(f"stopped after step {step}, which is saved: the same command goes on from there")
        return finished


def _spread(recipe: Recipe, device: torch.device) -> parallel.Spread:
    """How this run's model is spread over its processes, by the memory of the GPU if it has one."""
    recipe.batch.split(ranks.count())  # refuses a batch that cannot be shared out before anything begins
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    needed = partial(parallel.state_bytes, parallel.count_parameters(recipe.backbone, recipe.heads), recipe.precision)
    return parallel.choose(recipe.parallel, needed, ranks.count(), ranks.on_this_node(), memory)


def _check_masks(recipe: Recipe) -> None:
    """Refuse settings with which the patch loss would silently be zero."""
    masks, side = recipe.masks, recipe.crops.global_size // recipe.backbone.patch
    if recipe.loss.ibot == 0 or masks.probability == 0 or masks.ratio[1] == 0:
        return
    if not draw_masks(masks, recipe.seed, 0, np.arange(8), 2 * recipe.batch.group, (side, side)).any():
        raise OpsinError(
            f"no mask fits the {side}×{side} patches of a global crop, so the patch loss would be nothing: enlarge "
            "crops.global_size, lower masks.min_block, or set loss.ibot to 0."
        )


def _check_sizes(recipe: Recipe, source: Source, summary: Summary) -> None:
    side, smallest = recipe.crops.global_size, min(summary.width[0], summary.height[0])
    if not recipe.data.upsample and 0 < smallest < side:
        raise OpsinError(
            f"the smallest image of {source.root} has a side of {smallest} pixels, below the global crop of {side}: "
            "give a smaller --crops.global-size, remove such images, or accept enlarged ones with --data.upsample."
        )
