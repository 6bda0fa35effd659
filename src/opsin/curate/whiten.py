"""PCA whitening of a table's vectors: directions that all images share no longer make all of them alike."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from opsin.curate.engine import Engine, Task, in_order
from opsin.curate.tables import Table, tasks_of
from opsin.curate.vectors import Column, read_vectors, save_whitening, width
from opsin.data.decode import shown
from opsin.errors import OpsinError
from opsin.output import make_folder

FEWEST: Final = 16
"""Vectors from which a whitening can be found."""
ALIKE: Final = 1e-5
"""Variance of vectors of unit length that is little more than the rounding to fp16, some 1e-7."""
PER_DIRECTION: Final = 4
"""Vectors for each direction that is kept: the variances of more could not be told from noise."""


def whitening(engine: Engine, vectors: Table, column: str, file: Path) -> Column:
    """The column with its whitening, which is computed over all vectors of the table unless `file` is there.

    Raises:
        OpsinError: there are fewer than `FEWEST` vectors, or they are all alike.
    """
    if file.exists():
        return Column(column, file)
    dimensions = width(vectors, column)
    scratch = make_folder(file.parent / "moments")
    count, mean = 0, np.zeros(dimensions)
    square = np.zeros((dimensions, dimensions))

    def add(result: dict[str, Any]) -> None:
        nonlocal count, mean, square
        sums = np.load(result["file"])
        count, mean, square = count + result["count"], mean + sums[0], square + sums[1:]
        Path(result["file"]).unlink()

    rows = [part.rows for part in vectors.parts]
    tasks = [{"parts": parts} for parts in tasks_of(range(len(rows)), rows, 1 << 16)]
    in_order(engine.run("whitening", _Moments(vectors, column, dimensions, scratch), tasks, total=vectors.rows), add)
    shutil.rmtree(scratch)  # with sums of a run that was stopped
    if count < FEWEST:
        raise OpsinError(
            f"{count:,} vectors are too few to whiten them (at least {FEWEST}): give --whiten False and a "
            "--threshold, or a copy-detection network."
        )
    mean = mean / count
    covariance = square / count - np.outer(mean, mean)
    if np.trace(covariance) < ALIKE:
        raise OpsinError(
            f"the vectors in '{column}' of {shown(vectors.path)} are all alike but for rounding (variance "
            f"{np.trace(covariance):.1g}): the network has learned nothing, embed with another."
        )
    save_whitening(file, torch.from_numpy(mean), torch.from_numpy(covariance), most=count // PER_DIRECTION)
    return Column(column, file)


@dataclass(frozen=True)
class _Moments:
    """Count, sum and products of the vectors of some parts."""

    vectors: Table
    column: str
    dimensions: int
    scratch: Path

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:  # noqa: ARG002
        count, sums = 0, np.zeros((1 + self.dimensions, self.dimensions))
        for number in task["parts"]:
            found, _ = read_vectors(self.vectors.parts[number], Column(self.column), self.dimensions)
            exact = found.double()
            count += len(found)
            sums[0] += exact.sum(0).numpy()
            sums[1:] += (exact.T @ exact).numpy()
        file = self.scratch / f"{task['parts'][0]:08d}.npy"
        np.save(file, sums)
        return {"file": str(file), "count": count, "done": sum(self.vectors.parts[i].rows for i in task["parts"])}
