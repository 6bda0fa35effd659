"""Where a run says how it goes: `metrics.jsonl`, and a line in the terminal.

A record holds:

    step, images, epoch                     finished steps, images seen, passes over the data
    loss                                    the sum of its terms
    loss.dino, .dino_global, .dino_local, .ibot, .koleo     its terms, the second and third parts of the first; KoLeo's
                                            may be negative
    loss.gram                               with Gram anchoring, see `gram`
    loss.cls, loss.patch                    in place of these in a distillation by features, see `distill.matching`
    grad_norm.<part>                        of backbone, dino_head and ibot_head, or projection, before clipping
    teacher.entropy, .prototypes, .agreement, .spread, .rank  of the teacher's assignments, see `measures`
    student.divergence                      KL divergence of the student's assignments, see `measures`
    rate, last_layer_rate, decay, momentum, teacher_temperature     of the step, as the schedule and the doctor have it
    skipped                                 steps left out so far, because their gradients were not finite
    lowered                                 how many times the doctor has lowered the rate, see `diagnosis`
    images_per_second, step_seconds, data_seconds           the last is the part of a step spent waiting for images
    kilowatt_hours                          of all GPUs since the first step, by NVML; only where that is to be had
    probe.drift, probe.kept                 with these, in a run that began with weights, see `guard`
    probe.rank, probe.knn                   every monitor.probe_every steps: of the fixed set of images, see `probe`

What is wrong with a run gets a name in `diagnosis`; `watch` brings all of it together.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opsin.errors import FINITE, within


@dataclass(frozen=True)
class MonitorRecipe:
    """How a run watches itself."""

    policy: Literal["warn", "lower", "stop"] = "warn"
    """When the features collapse or the run diverges: say so, multiply the rate by lower_by for the rest of the run, or
    stop. Gradients that are not finite are left out in any case, see max_skipped."""
    lower_by: float = 0.5
    """Factor of the rate, for policy: lower."""
    lower_most: int = 3
    """How many times the rate may be lowered; if that does not help, the run stops."""
    probe_every: int = 1_000
    """Steps between looks at the probe set through the teacher: rank, kNN and a PCA picture; 0 never looks."""
    probe_images: int = 256
    """Images of the probe set, drawn by the seed; the data is checked for copies and empty images by them too."""
    labelled: str = ""
    """A folder with one sub-folder per class from which the probe set is drawn, for an online kNN; without it the data
    itself, whose kNN is measured if its images lie in sub-folders."""
    guard: float = 0.02
    """In a run that begins with weights: how far probe.knn may fall below that of the start before the run says so."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where records go besides metrics.jsonl, which is always written."""

    def __post_init__(self) -> None:
        within(self, "monitor.", lower_by=(1e-3, 0.99), lower_most=(0, 100), probe_every=(0, FINITE))
        within(self, "monitor.", probe_images=(2, 10_000), guard=(0, 1))


TERMS = ("dino", "ibot", "koleo", "gram", "cls", "patch")
"""Of the loss, as the terminal shows them."""


class Metrics:
    """`metrics.jsonl` of a run; a resumed run drops the records after its checkpoint and goes on."""

    def __init__(self, path: Path, finished_steps: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    keep = json.loads(line)["step"] <= finished_steps
                except (ValueError, KeyError, TypeError):
                    continue  # the last line of a killed run, or no record
                if keep:
                    kept.append(line)
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record, in full on disk before the next step begins."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Terminal:
    """Progress on stderr: a live bar in a terminal, else a line every ten seconds."""

    def __init__(self, steps: int, finished: int, *, quiet: bool) -> None:
        self.steps, self.quiet = steps, quiet
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._last_line = 0.0
        self._bar: Progress | None = None
        if not quiet and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, completed=finished)

    def say(self, text: str) -> None:
        """A sentence above the bar."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def show(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """The state after a step, by the name of the run; names are shown if there are several."""
        losses = []
        for name, record in records.items():
            terms = " ".join(f"{term} {record[f'loss.{term}']:.3f}" for term in TERMS if f"loss.{term}" in record)
            losses.append((f"{name} " if len(records) > 1 else "") + f"loss {record['loss']:.3f} ({terms})")
        record = next(iter(records.values()))
        share = record["data_seconds"] / max(record["step_seconds"], 1e-9)
        text = (
            f"{' · '.join(losses)} · {record['images_per_second']:.0f} img/s · {share:.0%} of the time waiting for data"
        )
        step = record["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif not self.quiet and (time.monotonic() - self._last_line > 10 or step == self.steps):
            self._last_line = time.monotonic()
            left = (self.steps - step) * record["step_seconds"] / 60
            self.console.print(f"step {step}/{self.steps} · {text} · {left:.1f} min left", markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
