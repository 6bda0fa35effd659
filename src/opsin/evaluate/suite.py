"""Many evaluations of several models from one file, and what two models differ by.

Every result is written as soon as it is there, so that a suite that was stopped goes on where it was. Tasks on the same
images share one pass over them (see `pooled`). A task that cannot run, because its data are missing for instance, is
told at the end and does not stop the others.
"""

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from opsin.backbone.probe import paired_bootstrap
from opsin.errors import OpsinError, unknown
from opsin.evaluate.model import Model, open_model
from opsin.evaluate.published import beside
from opsin.evaluate.task import Result, Run, Task
from opsin.machine import joules
from opsin.output import write
from opsin.settings import parsed, structured, text_of, tree_of

RESULTS = "results.json"
"""File in the suite's folder with all that was found."""


@dataclass(frozen=True)
class Candidate:
    """A model of a suite."""

    name: str
    """How tables call it."""
    weights: Path
    """A file of ours, an official .pth, a Hugging Face folder or a timm file."""
    architecture: str | None = None
    """Name of the architecture, where the file does not tell it."""


@dataclass(frozen=True)
class Suite:
    """What a suite's file holds: `models` and `tasks`."""

    models: tuple[Candidate, ...]
    """The models, each measured by every task; differences are taken between the first and each other."""
    tasks: tuple[dict[str, Any], ...]
    """Entries with `task`, the options of that task by name (`data`, …), and a `name` where one task occurs twice."""


class Entry(NamedTuple):
    """A task of a suite with its settings."""

    name: str
    """Distinguishes it from others."""
    task: str
    """The name of the task."""
    settings: Any
    """Its settings."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A result in the suite's folder."""

    model: str
    """Name of the model."""
    entry: str
    """Name of the entry."""
    facts: Mapping[str, Any]
    """What the file says: see `facts_of`."""
    outcomes: NDArray[np.float64] | None
    """The first metric by test sample, if the task has it."""
    pictures: Sequence[tuple[str, Path]] = ()
    """Titles and files of pictures."""


@dataclass(frozen=True)
class Difference:
    """How much better a model is than the suite's first one, by test samples paired."""

    entry: str
    """Name of the entry."""
    first: str
    """The suite's first model."""
    second: str
    """The other."""
    metric: str
    """The metric whose value by sample is compared."""
    samples: int
    """Number of pairs."""
    mean: float
    """Mean of second − first over the samples."""
    low: float
    """Lower end of its 95 % bootstrap interval."""
    high: float
    """Upper end."""


@dataclass(frozen=True, eq=False)
class Report:
    """All that a suite found."""

    entries: Sequence[Entry]
    """Its tasks."""
    models: Sequence[str]
    """Names of its models."""
    measured: Sequence[Measured]
    """Results, in the order of models and tasks."""
    differences: Sequence[Difference]
    """Between the first model and each other, where a task has outcomes by sample."""
    failed: Sequence[tuple[str, str, str]] = field(default=())
    """Model, entry and reason of what could not be measured."""


def read(path: Path, tasks: Mapping[str, Task]) -> tuple[Suite, list[Entry]]:
    """A suite's YAML file, with the settings of every entry checked.

    Raises:
        OpsinError: it is no such file, a task or option is unknown, or two models or entries have one name.
    """
    suite = parsed(text_of(path, "See docs/evaluate.md.", "suite"), str(path), Suite, "suite")
    entries = [_entry(dict(tree), f"{path}, task {number}", tasks) for number, tree in enumerate(suite.tasks, start=1)]
    for names, what in (([model.name for model in suite.models], "models"), ([e.name for e in entries], "tasks")):
        if not names:
            raise OpsinError(f"{path} has no {what}: list at least one.")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise OpsinError(f"{path} has two {what} of the name '{twice[0]}': give each a name of its own.")
        if strange := [name for name in names if not re.fullmatch(r"[\w.,+ -]{1,100}", name) or not name.strip(".")]:
            raise OpsinError(
                f"{path}: '{strange[0][:100]}' cannot name a file: use up to 100 letters, digits, spaces and - _ . , +"
            )
    return suite, entries


def _entry(tree: dict[str, Any], where: str, tasks: Mapping[str, Task]) -> Entry:
    task = tree.pop("task", None)
    if not isinstance(task, str) or task not in tasks:
        raise OpsinError(f"{where}: {unknown('task', str(task), tasks)}")
    if tree.get("data", "") is None:
        del tree["data"]  # a key without a value
    name = str(tree.pop("name", task))
    settings = structured(tree, where, tasks[task].settings, f"{task} task")
    if not settings.data:
        raise OpsinError(f"{where} ({name}) has no data: give data: FOLDER.")
    return Entry(name, task, settings)


def measure(
    suite: Suite,
    entries: Sequence[Entry],
    tasks: Mapping[str, Task],
    out: Path,
    run: Run,
    *,
    device: str | None = None,
    precision: str | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Report:
    """Measure every model by every task, one model after the other, and write OUT/results.json.

    A result that lies in OUT of the same weights and settings is not measured again.
    """
    measured: list[Measured] = []
    failed: list[tuple[str, str, str]] = []
    for candidate in suite.models:
        try:
            model = open_model(candidate.weights, candidate.architecture, device, precision)
        except OpsinError as error:
            failed += [(candidate.name, entry.name, str(error)) for entry in entries]
            say(f"{candidate.name}: not measured: {error}")
            continue
        for entry in entries:
            key = _key(model, entry)
            folder = out / "results" / candidate.name / entry.name
            known = recall(folder, candidate.name, entry.name, key)
            if known is not None:
                say(f"{candidate.name}, {entry.name}: measured before; remove {folder} to measure it again")
            else:
                say(f"{candidate.name}, {entry.name}:")
                try:
                    facts, result = timed(model, entry, tasks, run)
                except OpsinError as error:
                    failed.append((candidate.name, entry.name, str(error)))
                    say(f"  not measured: {error}")
                    continue
                keep(folder, key, facts, result)
                known = recall(folder, candidate.name, entry.name, key)
                assert known is not None
            measured.append(known)
        del model
    report = Report(
        entries, [model.name for model in suite.models], measured, differences(suite.models[0].name, measured), failed
    )
    write(out / RESULTS, json.dumps(_tree(suite, report), indent=1))
    return report


def timed(model: Model, entry: Entry, tasks: Mapping[str, Task], run: Run) -> tuple[dict[str, Any], Result]:
    """A task's result, and the same as JSON with what it cost."""
    energy, start = joules(model.device), time.monotonic()
    result = tasks[entry.task].run(model, entry.settings, run)
    used = joules(model.device)
    seconds = time.monotonic() - start
    return facts_of(entry, result, model, seconds, None if used is None or energy is None else used - energy), result


def facts_of(
    entry: Entry, result: Result, model: Model, seconds: float, joules_used: float | None = None
) -> dict[str, Any]:
    """A result as JSON.

    Keys: task, data, metrics (by name, the first is the main one), paper (lines, if the set is one of the paper's),
    table (headers, rows, note), details, left_out (path, reason), settings, model (name, SHA-256 of the weights,
    precision), seconds, joules (of a GPU, or null).
    """
    return {
        "task": entry.task,
        "data": result.data,
        "metrics": dict(result.metrics),
        "paper": beside(entry.task, entry.settings.data, model.arch),
        "table": asdict(result.table),
        "details": result.details,
        "left_out": [{"path": path, "reason": reason} for path, reason in result.left_out],
        "settings": tree_of(entry.settings),
        "model": {"name": model.name, "weights": model.digest, "precision": str(model.extractor.dtype)[6:]},
        "seconds": round(seconds, 3),
        "joules": joules_used,
    }


def keep(folder: Path, key: str, facts: Mapping[str, Any], result: Result) -> None:
    """Write a result: outcomes and pictures first, the facts last, since they say that it is whole."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if result.outcomes is not None:
            np.save(folder / "outcomes.npy", result.outcomes)
        titles = []
        for number, picture in enumerate(result.pictures):
            Image.fromarray(picture.pixels).save(folder / f"{number}.png")
            titles.append(picture.title)
        told = {"key": key, "pictures": titles, "outcomes": result.outcomes is not None}
        write(folder / "result.json", json.dumps({**told, **facts}, indent=1))
    except OSError as error:
        raise OpsinError(f"cannot write {folder}: {error.strerror}. Choose another --out.") from None


def recall(folder: Path, model: str, entry: str, key: str) -> Measured | None:
    """A result that `keep` wrote, if it is whole, and of the same weights and settings."""
    try:
        facts = json.loads((folder / "result.json").read_text())
        if facts.pop("key") != key:
            return None
        titles, told = facts.pop("pictures"), facts.pop("outcomes")
        outcomes = np.load(folder / "outcomes.npy") if told else None
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError):
        return None
    return Measured(
        model, entry, facts, outcomes, [(title, folder / f"{number}.png") for number, title in enumerate(titles)]
    )


def differences(first: str, measured: Sequence[Measured]) -> list[Difference]:
    """Paired differences of every other model to `first`, where both have outcomes of equally many samples."""
    base = {one.entry: one for one in measured if one.model == first}
    found = []
    for one in measured:
        other = base.get(one.entry)
        if one.model == first or other is None or one.outcomes is None or other.outcomes is None:
            continue
        if len(one.outcomes) == len(other.outcomes):
            interval = paired_bootstrap(torch.from_numpy(one.outcomes), torch.from_numpy(other.outcomes))
            metric = next(iter(one.facts["metrics"]))
            found.append(Difference(one.entry, first, one.model, metric, len(one.outcomes), *interval))
    return found


def _key(model: Model, entry: Entry) -> str:
    facts = {"weights": model.digest, "task": entry.task, "settings": tree_of(entry.settings)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tree(suite: Suite, report: Report) -> dict[str, Any]:
    return {
        "suite": tree_of(suite),
        "results": {
            model: {one.entry: one.facts for one in group}
            for model, group in itertools.groupby(report.measured, key=lambda one: one.model)
        },
        "differences": [asdict(one) for one in report.differences],
        "failed": [{"model": model, "task": entry, "reason": reason} for model, entry, reason in report.failed],
    }
