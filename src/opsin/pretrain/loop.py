"""Pretraining: the whole story of a run, top to bottom.

    images → batches of crops → teacher's targets → student's losses → clipped gradients → AdamW → teacher's average

Everything that a step sees is a function of (seed, step), so the state of a run is: both networks, the moments, the
step. The same command goes on where a stopped or killed run left off, bit for bit on a CPU.
"""

import contextlib
import fcntl
import json
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

import opsin
from opsin.backbone import weights
from opsin.data.decode import DECODER
from opsin.data.masks import draw_masks
from opsin.data.reader import ImageReader
from opsin.data.sources import Source, Summary, scan, summarise
from opsin.data.stream import Stream
from opsin.errors import OpsinError
from opsin.machine import check_precision, commit, pick_device
from opsin.pretrain import checkpoint
from opsin.pretrain.monitor import Metrics, Skips, Terminal
from opsin.pretrain.objective import total
from opsin.pretrain.recipe import Recipe, read, to_yaml
from opsin.pretrain.schedules import scheduled
from opsin.pretrain.step import Step

FREE_TO_CHANGE = ("data.workers", "data.ahead", "batch.micro", "checkpoint", "log_every", "max_skipped", "graphs")
"""Fields that a resumed run may change: they do not change what is computed, beyond the order of sums."""


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
        data: a folder of any depth, or a text file that lists images.
        out: folder of the run; if it holds one already, that run goes on.
        device: "cuda", "mps" or "cpu"; by default the first of these that is there.
        accept_changes: go on although recipe, data or image decoder differ from those the run began with.
        quiet: no progress on stderr.

    Raises:
        OpsinError: for anything the user can mend: bad settings, unreadable data, a full disk, NaN gradients.
    """
    out, on = _folder(Path(out)), pick_device(device)
    check_precision(recipe.precision, on)
    _check_masks(recipe)
    source = scan(data, cache=out / "cache", progress=not quiet)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disk_errors(out))
        stack.enter_context(_only_run(out))
        done = checkpoint.steps(out)
        first = done[-1] if done else 0
        if first > recipe.steps:
            raise OpsinError(f"{out} holds a run of {first} steps already: give --steps {first} or more.")
        terminal = Terminal(recipe.steps, first, quiet=quiet)
        stack.callback(terminal.close)
        description = _describe(recipe, source, out, on, terminal, resumed=bool(done), accept_changes=accept_changes)

        train = Step(recipe, on)
        skips = Skips(on, recipe.max_skipped)
        state = train.state()
        checkpoint.clean(out)
        if first:
            checkpoint.load(out, first, state)
            train.loaded()
            terminal.say(f"going on from the checkpoint of step {first}")

        reader = stack.enter_context(
            ImageReader(
                source,
                workers=recipe.data.threads(),
                max_bad_fraction=recipe.data.max_bad_fraction,
                log=out / "unreadable.jsonl",
            )
        )
        stream = Stream(recipe.stream(), recipe.data, reader, len(source), on, train.dtype)
        for name, text in description.items():  # only now: the checkpoint fits, and a refused run stays as it was
            _write(out / name, text)
        metrics = Metrics(out / "metrics.jsonl", first)
        stack.callback(metrics.close)
        stop = stack.enter_context(_stop_signal())

        def save(step: int) -> None:
            _check_finite(state, step)
            checkpoint.save(
                out, step, state, train.teacher.backbone, {"recipe": asdict(recipe)}, recipe.checkpoint.keep
            )

        saved, step = first, first
        clock = time.perf_counter()
        waited, logged = 0.0, first
        batches = stack.enter_context(contextlib.closing(stream.batches(first, recipe.steps)))
        while step < recipe.steps and not stop.signal:
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began

            values = scheduled(recipe.schedule, step, recipe.steps, recipe.batch.size)
            outcome = train(batch, values)
            skips.update(step, outcome.finite)
            step += 1

            if step % recipe.log_every == 0 or step == recipe.steps:
                skipped = skips.check(outcome.norms, terminal.say)
                terms = {name: float(term) for name, term in outcome.terms.items()}
                elapsed, clock = time.perf_counter() - clock, time.perf_counter()
                record = {
                    "step": step,
                    "images": step * recipe.batch.size,
                    "epoch": step * recipe.batch.size / len(source),
                    "loss": total(terms),
                    **{f"loss.{name}": term for name, term in terms.items()},
                    **{f"grad_norm.{name}": float(norm) for name, norm in outcome.norms.items()},
                    **asdict(values),
                    "skipped": skipped,
                    "images_per_second": (step - logged) * recipe.batch.size / elapsed,
                    "step_seconds": elapsed / (step - logged),
                    "data_seconds": waited / (step - logged),
                }
                metrics.write(record)
                terminal.show(record)
                waited, logged = 0.0, step
            if step % recipe.checkpoint.every == 0:
                save(step)
                saved = step

        if saved != step:
            save(step)
        if step == recipe.steps:
            weights.save(train.teacher.backbone, out / "backbone.safetensors", {"step": str(step)})
        else:
            terminal.say(f"stopped after step {step}, which is saved: the same command goes on from there")
        return Finished(out, step, None if step == recipe.steps else stop.signal)


@contextlib.contextmanager
def _only_run(out: Path) -> Iterator[None]:
    """Hold the run's folder: two runs would write into each other's checkpoints."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OpsinError(
                f"another run is writing into {out}: wait for it, stop it, or choose another --out."
            ) from None
        yield


def _check_finite(state: Mapping[str, Tensor], step: int) -> None:
    bad = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise OpsinError(
            f"{len(bad)} tensors of the run, such as {bad[0]}, hold NaN or infinity after step {step}: nothing was "
            "saved, and the last checkpoint is intact. Start again with a lower --schedule.rate in another --out."
        )


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


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OpsinError(f"cannot write into --out {out}: {error.strerror}. Choose another folder.") from None
    return out


def _describe(
    recipe: Recipe,
    source: Source,
    out: Path,
    device: torch.device,
    terminal: Terminal,
    *,
    resumed: bool,
    accept_changes: bool,
) -> dict[str, str]:
    """Say what will run on what, refuse to go on with another recipe or data; returns recipe.yaml and run.json."""
    summary = summarise(source, workers=recipe.data.threads())
    terminal.say(str(summary))
    _check_sizes(recipe, source, summary)
    facts = {
        "opsin": opsin.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "decoder": DECODER,
        "seed": recipe.seed,
        "git": commit(),
        "data": {"root": str(source.root), "images": len(source), "fingerprint": source.fingerprint},
    }
    recipe_path, facts_path = out / "recipe.yaml", out / "run.json"
    if resumed and not accept_changes:
        before = _facts(facts_path)
        changed = _differences(asdict(read(recipe_path)), asdict(recipe))
        if before["data"]["fingerprint"] != source.fingerprint:
            changed.append(f"the images ({before['data']['images']} then, {len(source)} now)")
        if before["decoder"] != DECODER:
            changed.append(f"the image decoder ({before['decoder']} then, {DECODER} now)")
        if changed:
            raise OpsinError(
                f"{out} holds a run that differs in {'; '.join(changed)}: give the settings it began with, another "
                "--out, or --accept-changes."
            )
    batch = recipe.batch
    terminal.say(
        f"{recipe.steps} steps of {batch.size} images ({batch.micro_batches} × {batch.size // batch.micro_batches}) on "
        f"{facts['device']} in {recipe.precision}: {recipe.steps * batch.size / len(source):.1f} epochs; run in {out}"
    )
    return {recipe_path.name: to_yaml(recipe), facts_path.name: json.dumps(facts, indent=1)}


def _facts(path: Path) -> dict[str, Any]:
    """What run.json says of the run that began in this folder."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        facts["decoder"], facts["data"]["fingerprint"], facts["data"]["images"]
    except (OSError, ValueError, KeyError, TypeError):
        raise OpsinError(
            f"{path} is missing or damaged, so nothing says what the run beside it was made with: give "
            "--accept-changes to go on regardless, or another --out."
        ) from None
    return facts


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """A full or failing disk, in whichever file of the run it is met, as one sentence."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        done = checkpoint.steps(out)
        left = f"the checkpoint of step {done[-1]} is intact" if done else "there is no checkpoint yet"
        raise OpsinError(
            f"cannot read or write the files of the run {out}: {error.strerror}; {left}. Free some space or choose "
            "another --out, then give the same command again."
        ) from None


def _check_sizes(recipe: Recipe, source: Source, summary: Summary) -> None:
    side, smallest = recipe.crops.global_size, min(summary.width[0], summary.height[0])
    if not recipe.data.upsample and 0 < smallest < side:
        raise OpsinError(
            f"the smallest image of {source.root} has a side of {smallest} pixels, below the global crop of {side}: "
            "give a smaller --crops.global-size, remove such images, or accept enlarged ones with --data.upsample."
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of fields that differ and are not free to change, with both values."""
    found = []
    for name, value in now.items():
        dotted = prefix + name
        if dotted in FREE_TO_CHANGE or before.get(name) == value:
            continue
        if isinstance(value, Mapping) and isinstance(before.get(name), Mapping):
            found += _differences(before[name], value, dotted + ".")
        else:
            found.append(f"{dotted} ({before.get(name)} then, {value} now)")
    return found


class _Stop:
    signal: int | None = None


@contextlib.contextmanager
def _stop_signal() -> Iterator[_Stop]:
    """Ctrl-C, SIGTERM and a lost terminal end the run after the step in progress; a second Ctrl-C ends it at once."""
    stop = _Stop()

    def handle(number: int, _: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not in the main thread: the caller's signals stay the caller's
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
