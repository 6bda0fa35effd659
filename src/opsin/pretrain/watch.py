"""What looks after a run, as the loop uses it: measures, diagnoses, the probe set, and where all of it is written.

OUT/metrics.jsonl    every record
OUT/findings.jsonl   every finding of the doctor: name, step, sentence, action
OUT/probe/           pictures of the probe set
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsin import ranks
from opsin.backbone.vit import VisionTransformer
from opsin.data.reader import ImageReader
from opsin.data.sources import Source
from opsin.errors import OpsinError
from opsin.machine import joules
from opsin.pretrain import measures
from opsin.pretrain.diagnosis import Doctor, Finding, Skips
from opsin.pretrain.guard import Drift, Guard
from opsin.pretrain.monitor import Metrics
from opsin.pretrain.probe import Probe, Sample, labelled_sample
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.schedules import Scheduled
from opsin.pretrain.step import Outcome
from opsin.pretrain.trackers import Trackers


class Meter:
    """Energy that all GPUs of a run have used, from its first step on, also over restarts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = torch.zeros((), dtype=torch.float64)
        """Joules."""
        self._last = joules(device)

    def read(self) -> dict[str, float]:
        """The number of a record; none if there is no meter. All processes call it together."""
        now = joules(self.device)
        if now is None or self._last is None:
            return {}
        self.total += ranks.sum_(torch.tensor(now - self._last, dtype=torch.float64))
        self._last = now
        return {"kilowatt_hours": float(self.total) / 3.6e6}


class Watch:
    """Measures a run, names what is wrong with it, and acts on that within the bounds of `monitor.policy`.

    All processes of a run make it and call its methods together; the first one writes. As a context, it closes what it
    writes into.

    Args:
        recipe: of the run.
        out: its folder.
        device: that trains.
        say: tells the user a sentence.
        replay: whether a step of the run can be run again.
    """

    def __init__(
        self, recipe: Recipe, out: Path, device: torch.device, say: Callable[[str], None], *, replay: bool = True
    ) -> None:
        self.recipe, self.out, self._say = recipe, out, say
        self.doctor, self.skips, self.meter = Doctor(recipe, device, replay=replay), Skips(device), Meter(device)
        self._open = ExitStack()
        self._metrics: Metrics | None = None
        self._trackers: Trackers | None = None
        self._probe: Probe | None = None
        self._images = 0
        self.guard = Guard(recipe.monitor.guard, out)
        self.best = False
        """Whether the last look at the probe set was the best one of a run that began with weights."""
        self._begun = False

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps beside those of `Step`, by name."""
        parts = {
            "doctor": self.doctor.state(),
            "skips": self.skips.state(),
            "meter": {"joules": self.meter.total},
            "guard": self.guard.state(),
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def begin(
        self, first: int, source: Source, reader: ImageReader, backbone: VisionTransformer, *, begun: bool = False
    ) -> None:
        """Open the files, look at the data and, before the first step, through the untrained teacher.

        Args:
            first: finished steps.
            source: the training data, which `reader` reads.
            reader: of `source`.
            backbone: the teacher's.
            begun: whether the run began with weights, and not at random.

        Raises:
            OpsinError: the packages of a tracker are missing, or `monitor.labelled` has no labels.
        """
        monitor = self.recipe.monitor
        self._images = len(source)
        sample = Sample(source, reader, self.recipe)
        findings = self.doctor.before(sample.images)
        if monitor.probe_every:
            sample = labelled_sample(self.recipe, self.out) if monitor.labelled else sample
            self._probe = Probe(sample, self.recipe, self.out, Drift(self.out) if begun else None)
            self._begun = begun
            if self.recipe.weights and sample.labels is None:
                self._say(
                    "whether the features get worse than they were is not measured, since no image has a label: give "
                    "--monitor.labelled a folder with one sub-folder per class"
                )
        if ranks.first():
            self._metrics = Metrics(self.out / "metrics.jsonl", first)
            self._open.callback(self._metrics.close)
            self._trackers = Trackers(monitor.trackers, self.out, asdict(self.recipe), first, self._say)
            self._open.callback(self._trackers.close)
        self._tell(findings)
        if self._probe and first == 0:
            self._tell(self._look(0, backbone)[1])

    def treated(self, values: Scheduled) -> Scheduled:
        """The scheduled values of a step, with the rates as low as the doctor has made them."""
        return self.doctor.treated(values)

    def note(self, step: int, outcome: Outcome) -> None:
        """Look at the outcome of a step, counted from 0, without waiting for it."""
        self.skips.note(step, outcome)

    def due(self, step: int) -> bool:
        """Whether there is a record after `step` finished steps."""
        return step % self.recipe.log_every == 0 or step == self.recipe.steps or self._probe_due(step)

    def record(
        self, step: int, outcome: Outcome, values: Scheduled, timings: Mapping[str, float], backbone: VisionTransformer
    ) -> dict[str, Any]:
        """Measure, write and judge the state after `step` finished steps; returns the record.

        Args:
            step: finished steps.
            outcome: of the last of them.
            values: with which it was made.
            timings: images_per_second, step_seconds, data_seconds.
            backbone: the teacher's.

        Raises:
            OpsinError: the run is to stop, for the reason given.
        """
        record, findings = self.examine(step, outcome, values, timings)
        if self._probe_due(step):
            found, worse = self._look(step, backbone)
            record |= found
            findings += worse
        if self._metrics and self._trackers:
            self._metrics.write(record)
            self._trackers.log(record)
        self._tell(findings)
        return record

    def examine(
        self, step: int, outcome: Outcome, values: Scheduled, timings: Mapping[str, float]
    ) -> tuple[dict[str, Any], list[Finding]]:
        """The record after `step` finished steps and what it shows, neither written nor told."""
        skipped, size = self.skips.check(), self.recipe.batch.size
        record = {
            "step": step,
            "images": step * size,
            "epoch": step * size / max(self._images, 1),
            **measures.describe(outcome, self.recipe.loss, 2 + self.recipe.crops.local_count),
            **asdict(values),
            "skipped": skipped.total,
            "lowered": int(self.doctor.lowered),
            **timings,
            **self.meter.read(),
        }
        return record, self.doctor.examine(record, skipped)

    def _probe_due(self, step: int) -> bool:
        every = self.recipe.monitor.probe_every
        return every > 0 and step % every == 0

    def _look(self, step: int, backbone: VisionTransformer) -> tuple[dict[str, float], list[Finding]]:
        assert self._probe is not None
        found = self._probe.look(step, backbone)
        self._say(f"probe after step {step}: {', '.join(f'{name} {value:.3g}' for name, value in found.items())}")
        self.best = False
        # What follows decides about the run, so all processes take the first one's number.
        knn = ranks.by_first(lambda: found.get("probe.knn"))
        if not self._begun or knn is None:
            return found, []
        verdict = self.guard.examine(step, knn)
        self.best = verdict.best
        if verdict.worse is None:
            return found, []
        stop = self.recipe.monitor.policy == "stop"
        sentence = verdict.worse + (" The run stops (monitor.policy is stop)." if stop else "")
        return found, [Finding("worse-than-start", step, sentence, "stop" if stop else "warn")]

    def _tell(self, findings: Sequence[Finding]) -> None:
        """Say and write what was found; a finding that stops the run is raised last."""
        if findings and ranks.first():
            with (self.out / "findings.jsonl").open("a") as file:
                file.writelines(json.dumps(asdict(finding)) + "\n" for finding in findings)
        for finding in findings:
            if finding.action == "stop":
                raise OpsinError(str(finding))
            self._say(str(finding))
