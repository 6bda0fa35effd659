"""What every evaluation has in common: how it computes, and what it answers."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.errors import FINITE, within
from opsin.evaluate.model import Model

LOWER_IS_BETTER = frozenset(
    {"rmse", "abs_rel", "log10", "mce", "corruption_error", "degradation", "gap_between_groups"}
)
"""Metrics of which less is better."""


@dataclass(frozen=True)
class Run:
    """How evaluations compute; none of it changes what they measure beyond rounding."""

    batch_size: int = 64
    """Images per forward of the frozen backbone."""
    workers: int = os.cpu_count() or 1
    """Threads that read and prepare images."""
    cache: Path = Path("runs/features")
    """Folder that keeps features and trained heads, by the content of weights, names, sizes and times of images, and
    settings; it may be deleted at any time."""
    progress: bool = True
    """Show counters on the terminal."""

    def __post_init__(self) -> None:
        within(self, "--", batch_size=(1, FINITE), workers=(1, 4096))


@dataclass(frozen=True)
class Table:
    """Rows of text under headers, for the terminal and the page; the first cell names a row."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """An image `[H, W, 3]` (uint8) with a title, for the page."""

    title: str
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Result:
    """What an evaluation found."""

    data: str
    """What was measured on: the published set's name, or where one's own images lie."""
    metrics: Mapping[str, float]
    """Figures by name, shares from 0 to 1; the first is the one that tables of many tasks show."""
    table: Table
    """The same for a reader."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else is worth keeping, JSON-able: figures by class, chosen settings, numbers of images."""
    left_out: Sequence[tuple[str, str]] = ()
    """Images that could not be read, each with the reason: they count nowhere."""
    outcomes: NDArray[np.float64] | None = None
    """The first metric by test sample `[N]` (1 or 0 for right or wrong, a query's average precision, an image's RMSE):
    by these two models are compared sample by sample."""
    pictures: Sequence[Picture] = ()
    """Some predictions to look at."""


Evaluation = Callable[[Model, Any, Run], Result]


@dataclass(frozen=True)
class Task:
    """An evaluation by its name: `opsin evaluate NAME`, an entry of a suite."""

    run: Evaluation
    """Measures a model: `run(model, settings, run)`; its docstring is the help of the command."""
    settings: type[Any]
    """A frozen dataclass whose fields are the options; `data` is one of them and has no default but ""."""
