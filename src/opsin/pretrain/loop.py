"""Training: the whole story of a run, top to bottom.

    images → batches of crops → teacher's targets → student's losses → clipped gradients → AdamW → student's average

Everything that a step sees is a function of (seed, step), so the state of a run is: both networks, the moments, the
step. The same command goes on where a stopped or killed run left off, bit for bit on a CPU; on any number of processes,
each of which takes its share of every batch.

Several students can be trained on the same batches, by a teacher that looks at them once; each has a run of its own.
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opsin import ranks
from opsin.backbone import weights
from opsin.data.masks import draw_masks
from opsin.data.reader import ImageReader
from opsin.data.sources import Source, Summary, scan, summarise
from opsin.data.stream import Share, Stream
from opsin.errors import OpsinError
from opsin.machine import check_precision, pick_device
from opsin.output import make_folder, only_run, write
from opsin.pretrain import checkpoint, parallel
from opsin.pretrain.anchor import whole
from opsin.pretrain.checkpoint import Checkpoints
from opsin.pretrain.folder import copy, describe, disk_errors
from opsin.pretrain.guard import BEST
from opsin.pretrain.heads import save_heads
from opsin.pretrain.monitor import Terminal
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.schedules import Scheduled, scheduled
from opsin.pretrain.start import Start, Stored
from opsin.pretrain.step import SELF, Method, Outcome, Step, train
from opsin.pretrain.stop import lost_processes, stop_signal
from opsin.pretrain.watch import Watch


@dataclass(frozen=True)
class Job:
    """A student to train, and what it begins with and learns from."""

    recipe: Recipe
    """All settings; has no phases."""
    out: Path
    """Folder of its run; if it holds one already, that run goes on. All processes must see it."""
    method: Method = SELF
    """What it learns from."""
    before: Path | None = None
    """Folder of the run whose networks it goes on with, if it is a later phase."""
    fresh: tuple[str, ...] = ()
    """What of these begins anew, see `Phase`."""


@dataclass(frozen=True)
class Finished:
    """How a run ended."""

    out: Path
    """The run's folder."""
    step: int
    """Finished steps."""
    stopped_by: int | None
    """The signal that ended it, if one did: maybe in its last step, and then nothing else should begin."""

    @property
    def backbone(self) -> Path:
        """The average's backbone, for `opsin.load`."""
        return self.out / BACKBONE


BACKBONE, HEADS = "backbone.safetensors", "heads.safetensors"
"""What a finished run leaves for others."""


@dataclass(frozen=True)
class Beginning:
    """What the first process finds before anything runs."""

    first: int
    """Finished steps of the runs in the folders; 0 if there are none."""
    recipes: list[Recipe]
    """Of the first process, which must be those of all."""
    spreads: list[parallel.Spread]
    """Of each network over the processes."""
    fingerprint: str
    """Of the images."""
    said: str
    """What will run on what."""
    files: list[dict[str, str]]
    """For each run names and contents of what is written when it begins."""


def run(
    jobs: Sequence[Job],
    data: str | Path,
    root: Path,
    *,
    device: str | None = None,
    accept_changes: bool = False,
    quiet: bool = False,
) -> list[Finished]:
    """Train students on the images of `data`, all on the same batches, and leave everything about each in its folder.

    Args:
        jobs: one, or several whose recipes agree on all that decides steps and batches.
        data: see `scan`: a folder of any depth, a list, shards, here or in a bucket.
        root: folder of what the runs share: the listing of the images, and which were unreadable.
        device: "cuda", "mps" or "cpu"; by default the first of these that is there.
        accept_changes: go on although recipe, data or image decoder differ from those the run began with.
        quiet: no progress on stderr.

    Raises:
        OpsinError: for anything the user can mend: bad settings, unreadable data, a full disk, NaN gradients.
    """
    recipe, on = jobs[0].recipe, pick_device(device)
    check_precision(recipe.precision, on)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks.started(on, recipe.parallel.timeout))
        stack.enter_context(disk_errors(jobs[0].out))
        stack.enter_context(lost_processes(jobs[0].out))
        share, quiet = Share(ranks.rank(), ranks.count()), quiet or not ranks.first()

        def begin() -> Beginning:
            for folder in dict.fromkeys([root, *(job.out for job in jobs)]):
                make_folder(folder)
            check_masks(recipe)
            recipe.stream()  # refuses crops that patches do not divide
            spreads = [_spread(job.recipe, on) for job in jobs]
            source = scan(data, root / "cache", not quiet, recipe.data.bad_shards)
            for job in jobs:
                stack.enter_context(only_run(job.out))
            first = _finished_steps(jobs)
            for job in jobs:
                checkpoint.remove_after(job.out, first)
            if first > recipe.steps:
                raise OpsinError(f"{jobs[0].out} holds a run of {first} steps already: give --steps {first} or more.")
            channels = recipe.backbone.channels
            summary = summarise(source, workers=recipe.data.threads(), progress=not quiet, channels=channels)
            check_readable(source, summary, channels)
            check_sizes(recipe, source, summary)
            settings = {"resumed": first > 0, "accept_changes": accept_changes}
            told, files = [str(summary)], []
            for job, spread in zip(jobs, spreads, strict=True):
                sentence, texts = describe(job.recipe, source, job.out, on, spread, origin(job), **settings)
                told.append(sentence)
                files.append(texts)
            recipes = [job.recipe for job in jobs]
            return Beginning(first, recipes, spreads, source.fingerprint, "\n".join(told), files)

        beginning = ranks.by_first(begin)
        first = beginning.first
        source = scan(data, root / "cache", False, recipe.data.bad_shards)
        if source.fingerprint != beginning.fingerprint:
            raise OpsinError(f"{data} holds other images here than for the first process: give one that all can see.")
        if [job.recipe for job in jobs] != beginning.recipes:
            raise OpsinError("the settings of this process are not those of the first: give all of them the same.")
        terminal = Terminal(recipe.steps, first, quiet=quiet)
        stack.callback(terminal.close)
        terminal.say(beginning.said)

        runs = [
            stack.enter_context(_Run(job, on, spread, first, terminal, alone=len(jobs) == 1))
            for job, spread in zip(jobs, beginning.spreads, strict=True)
        ]
        reader = stack.enter_context(
            ImageReader(
                source,
                workers=recipe.data.threads(),
                channels=recipe.backbone.channels,
                max_bad_fraction=recipe.data.max_bad_fraction,
                log=root / "unreadable.jsonl",
            )
        )
        stream = Stream(recipe.stream(), recipe.data, reader, source.order, on, runs[0].step.dtype, share)
        for each, files in zip(runs, beginning.files, strict=True):
            each.begin(source, reader, files)
        stop = stack.enter_context(stop_signal())

        saved, step, ended_by = first, first, stop.agreed(any(each.failed for each in runs))
        clock = time.perf_counter()
        waited, logged = 0.0, first
        batches = stack.enter_context(contextlib.closing(stream.batches(first, recipe.steps)))
        while step < recipe.steps and not ended_by:
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began

            values = [each.values(step) for each in runs]
            outcomes = train([each.step for each in runs], batch, values)
            for each, outcome in zip(runs, outcomes, strict=True):
                each.watch.note(step, outcome)
            step += 1

            if any(each.watch.due(step) for each in runs):
                elapsed = time.perf_counter() - clock
                timings = {
                    "images_per_second": (step - logged) * recipe.batch.size / elapsed,
                    "step_seconds": elapsed / (step - logged),
                    "data_seconds": waited / (step - logged),
                }
                seen = zip(runs, outcomes, values, strict=True)
                terminal.show({each.name: each.record(step, outcome, value, timings) for each, outcome, value in seen})
                waited, logged, clock = 0.0, step, time.perf_counter()
            if step % recipe.checkpoint.every == 0:
                _save(runs, step)
                saved = step
            ended_by = stop.agreed(any(each.failed for each in runs))

        if saved != step:
            _save(runs, step)
        for each in runs:
            each.checkpoints.wait()
        if step == recipe.steps:
            for each in runs:
                each.leave(step)
        if ended_by:
            terminal.say(f"stopped after step {step}, which is saved: the same command goes on from there")
        return [Finished(job.out, step, ended_by) for job in jobs]


def _save(runs: Sequence["_Run"], step: int) -> None:
    """Begin to write the checkpoints of a step, once all runs have those of the step before."""
    for each in runs:
        each.checkpoints.wait()
    for each in runs:
        each.save(step)


class _Run:
    """One student's part of `run`: its step, its watch and its checkpoints. As a context, it closes them."""

    def __init__(
        self, job: Job, device: torch.device, spread: parallel.Spread, first: int, terminal: Terminal, *, alone: bool
    ) -> None:
        def say(text: str) -> None:
            terminal.say(text if alone else f"{job.out.name}: {text}")

        self.job, self.name, self.recipe, self.first = job, job.out.name, job.recipe, first
        with contextlib.ExitStack() as stack:
            self._prepare(device, spread, stack, say, alone=alone)
            self._open = stack.pop_all()

    def _prepare(
        self,
        device: torch.device,
        spread: parallel.Spread,
        stack: contextlib.ExitStack,
        say: Callable[[str], None],
        *,
        alone: bool,
    ) -> None:
        """Networks, watch and checkpoints, with what the run begins or goes on with."""
        job, first = self.job, self.first
        start = Start(job.recipe, job.before, job.fresh)
        self.step = Step(job.recipe, device, spread, None if first else start.networks, job.method)
        self.watch = stack.enter_context(Watch(job.recipe, job.out, device, say, replay=job.method is SELF))
        own = self.step.state()
        state = own | self.watch.state()
        # Of several runs one may be killed before the others have saved a step: two steps back, all have.
        keep = job.recipe.checkpoint.keep if alone else max(2, job.recipe.checkpoint.keep)
        self.checkpoints = stack.enter_context(Checkpoints(job.out, state, job.recipe.backbone, keep))
        if first:
            self.checkpoints.load(first)
            start.said.append(f"going on from the checkpoint of step {first}")
        else:
            start.rest(own)
        for sentence in start.said:
            say(sentence)
        say(self.checkpoints.self_test())
        self.step.loaded()  # all processes have read what one of them wrote: they begin with the same bits

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def begin(self, source: Source, reader: ImageReader, files: dict[str, str]) -> None:
        """Write what says what the run is, and look at the data."""
        if ranks.first():
            for name, text in files.items():  # only now: the checkpoint fits, a refused run stays as it was
                write(self.job.out / name, text)
        begun = self.job.before is not None or bool(self.recipe.weights)
        self.watch.begin(self.first, source, reader, self.step.working.backbone, begun=begun)
        self._keep_best(self.first)

    def values(self, step: int) -> Scheduled:
        """The scheduled values of a step, as the doctor lets them be."""
        recipe = self.recipe
        return self.watch.treated(scheduled(recipe.schedule, step, recipe.steps, recipe.batch.size))

    def record(self, step: int, outcome: Outcome, values: Scheduled, timings: dict[str, float]) -> dict[str, Any]:
        """Measure and write what there is to say after `step` steps."""
        record = self.watch.record(step, outcome, values, timings, self.step.working.backbone)
        self._keep_best(step)
        return record

    def _keep_best(self, step: int) -> None:
        """In a run that began with weights, keep those of the best kNN so far."""
        if not self.watch.best:
            return
        self.watch.best = False
        state = {name: whole(tensor) for name, tensor in self.step.average.backbone.state_dict().items()}
        if ranks.first():
            backbone = weights.empty(self.recipe.backbone)
            backbone.load_state_dict(state, assign=True)
            weights.save(backbone, self.job.out / BEST, {"step": str(step)})

    @property
    def failed(self) -> bool:
        """Whether something in the background has failed in this process."""
        return self.checkpoints.failed

    def save(self, step: int) -> None:
        """Begin to write a checkpoint."""
        self.checkpoints.save(step, {"recipe": asdict(self.recipe)})

    def leave(self, step: int) -> None:
        """Put what others can use beside the finished run: the backbone, and the heads if it has prototypes."""
        out = self.job.out
        if not ranks.first():
            return
        copy(checkpoint.folder(out) / f"step-{step:08d}" / BACKBONE, out / BACKBONE)
        stored = Stored(out)
        names = [name for name in stored.forms if name.startswith("average.") and "_head." in name]
        if names:
            heads = {name.removeprefix("average."): stored.tensor(name) for name in names}
            save_heads(out / HEADS, heads, self.recipe.heads, self.recipe.backbone.width)


def origin(job: Job) -> dict[str, Any]:
    """What run.json says of how a run began."""
    before = None if job.before is None else os.path.relpath(job.before, job.out)
    return {"method": job.method.name, "before": before, "fresh": list(job.fresh)}


def _finished_steps(jobs: Sequence[Job]) -> int:
    """The last step that all of the runs have a checkpoint of; 0 if there is none.

    Raises:
        OpsinError: some of the runs have begun without the others.
    """
    new = [job.out.name for job in jobs if not (job.out / "run.json").exists()]
    old = [job.out.name for job in jobs if checkpoint.steps(job.out) and job.out.name not in new]
    if new and old:
        raise OpsinError(
            f"{jobs[0].out.parent} holds runs of {', '.join(old)} and none of {', '.join(new)}, and students who share "
            "their teacher begin together: train the new ones in another --out."
        )
    common = set.intersection(*(set(checkpoint.steps(job.out)) for job in jobs))
    return max(common, default=0)


def _spread(recipe: Recipe, device: torch.device) -> parallel.Spread:
    """How this run's model is spread over its processes, by the memory of the GPU if it has one."""
    recipe.batch.split(ranks.count())  # refuses a batch that cannot be shared out before anything begins
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    needed = partial(parallel.state_bytes, parallel.count_parameters(recipe.backbone, recipe.heads), recipe.precision)
    return parallel.choose(recipe.parallel, needed, ranks.count(), ranks.on_this_node(), memory)


def check_masks(recipe: Recipe) -> None:
    """Refuse settings with which the patch loss would silently be zero."""
    masks = recipe.masks
    if recipe.loss.ibot == 0 or masks.probability == 0 or masks.ratio[1] == 0 or masks.predicted == "all":
        return
    for side in (side // recipe.backbone.patch for side in _global_sides(recipe)):
        if not draw_masks(masks, recipe.seed, 0, np.arange(8), 2 * recipe.batch.group, (side, side)).any():
            raise OpsinError(
                f"no mask fits the {side}×{side} patches of a global crop, so the patch loss would be nothing: enlarge "
                "crops.global_size, lower masks.min_block, or set loss.ibot to 0."
            )


def _global_sides(recipe: Recipe) -> list[int]:
    """Sides of the global crops that steps may have, in pixels."""
    return [side for side, _, _ in recipe.crops.mixture] or [recipe.crops.global_size]


def check_readable(source: Source, summary: Summary, channels: int) -> None:
    """Refuse images none of which can be read, before anything is made for them."""
    if summary.read and len(summary.unreadable) == summary.read:
        name, reason = summary.unreadable[0]
        raise OpsinError(
            f"none of the {summary.read} images of {source.root} that were looked at can be read with {channels} "
            f"channel(s), for example {name}: {reason}. Give other --data, or --backbone.channels as files have them."
        )


def check_sizes(recipe: Recipe, source: Source, summary: Summary) -> None:
    """Refuse images that a global crop would enlarge, unless the recipe accepts this."""
    side, smallest = max(_global_sides(recipe)), min(summary.width[0], summary.height[0])
    if not recipe.data.upsample and 0 < smallest < side:
        raise OpsinError(
            f"the smallest image of {source.root} has a side of {smallest} pixels, below the global crop of {side}: "
            "give a smaller --crops.global-size, remove such images, or accept enlarged ones with --data.upsample."
        )
