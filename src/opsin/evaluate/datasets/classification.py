"""Published sets for classification, read as they are distributed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opsin.errors import OpsinError, unknown
from opsin.evaluate.sets import ImageSet

Metric = Literal["accuracy", "per_class", "voc_map"]
"""Share of right images; mean of that over classes; mean average precision by the 11-point rule of VOC 2007."""


@dataclass(frozen=True)
class Published:
    """A published set."""

    title: str
    """How tables call it."""
    read: Callable[[Path, str], ImageSet]
    """Folder and part → images; an OpsinError says exactly which file is missing and where it comes from."""
    train: str
    """The part that trains; "" for a set that only tests."""
    test: str
    """The part that tests."""
    metric: Metric
    """What the published tables count."""
    source: str
    """Where its files come from."""


SETS: dict[str, Published] = {}
"""By the name that `--data NAME:PATH` gives."""


def read_set(name: str, path: Path, part: str) -> ImageSet:
    """A part of a published set whose files lie at `path`.

    Raises:
        OpsinError: the set has no such part, or a file is missing.
    """
    if name not in SETS:
        raise unknown("published set", name, SETS)
    if not part:
        raise OpsinError(f"{name} has images to test on only: train on another set, such as imagenet:PATH.")
    return SETS[name].read(path, part)
