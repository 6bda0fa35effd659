"""Vectors in columns of Parquet tables, read part by part: never all at once.

A column holds lists of D numbers, of fixed size or not, in fp16, fp32 or fp64; images without a vector have null. What
is read is normalised to unit length, so a product of two is their cosine.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from opsin.curate.tables import Part, Table, read
from opsin.data.decode import shown
from opsin.errors import OpsinError

_NUMBERS: Final = {pa.float16(): np.float16, pa.float32(): np.float32, pa.float64(): np.float64}


@dataclass(frozen=True)
class Column:
    """A column of vectors, as a step reads it."""

    name: str
    """Of the column."""
    whitening: Path | None = None
    """A file of `save_whitening`, which is applied before normalising; None for none."""


def width(table: Table, column: str) -> int:
    """D of a column of vectors.

    Raises:
        OpsinError: the column is missing, holds no lists of floating-point numbers, or none but nulls.
    """
    table.require(column)
    kind = table.schema.field(column).type
    if not (_is_list(kind) and kind.value_type in _NUMBERS):
        raise OpsinError(f"column '{column}' of {shown(table.path)} holds {kind}, not lists of floats: name another.")
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    for part in table.parts:
        values = read(part, [column])[column].drop_null()
        if len(values) and len(values[0]):
            return len(values[0])
    raise OpsinError(f"column '{column}' of {shown(table.path)} holds no vectors.")


def read_vectors(part: Part, column: Column, dimensions: int) -> tuple[Tensor, NDArray[np.int64]]:
    """The vectors of a part in fp32, `[m, D]`, of unit length, and the rows in the part that have them, `[m]`.

    Raises:
        OpsinError: one is not finite, zero, or not of `dimensions`; or the file is gone or damaged.
    """
    return unit_vectors(read(part, [column.name])[column.name], part, column, dimensions)


def unit_vectors(
    values: pa.ChunkedArray, part: Part, column: Column, dimensions: int
) -> tuple[Tensor, NDArray[np.int64]]:
    """As `read_vectors`, of a column that has been read."""
    array: Any = values.chunk(0) if values.num_chunks == 1 else pa.concat_arrays(values.chunks)
    there = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
    array = array.drop_null()
    flat = array.flatten()
    if len(flat) != len(array) * dimensions or (
        not pa.types.is_fixed_size_list(array.type)
        and len(array)
        and (np.diff(array.offsets.to_numpy()) != dimensions).any()
    ):
        lengths = pc.list_value_length(array).to_numpy()
        wrong = int(np.flatnonzero(lengths != dimensions)[0])
        raise OpsinError(
            f"{_row(part, there[wrong])} has a vector of {lengths[wrong]} numbers in '{column.name}', others "
            f"{dimensions}: vectors of different networks cannot be compared, embed all with one."
        )
    numbers = flat.to_numpy(zero_copy_only=False)
    if flat.null_count:
        numbers = numbers.astype(np.float32)  # with NaN in place of nulls
    vectors = torch.from_numpy(np.array(numbers)).view(len(array), dimensions).float()
    lengths = vectors.norm(dim=1)
    bad = ~lengths.isfinite() | (lengths == 0)
    if bad.any():
        at = int(bad.nonzero()[0])
        what = "zeros only" if lengths[at] == 0 else "a NaN or infinity"
        raise OpsinError(
            f"{_row(part, there[at])} has a vector with {what} in '{column.name}' ({int(bad.sum())} such in this "
            "part): embed these images anew, or set them to null."
        )
    vectors /= lengths[:, None]
    if column.whitening is not None:
        mean, matrix = read_whitening(column.whitening)
        vectors = (vectors - mean) @ matrix
        vectors /= vectors.norm(dim=1).clamp(min=1e-12)[:, None]
    return vectors, there


def vector_array(vectors: Tensor, there: NDArray[np.int64], rows: int) -> pa.Array:
    """A column of `rows` rows with `vectors` `[m, D]` in fp16 at the rows `there`, and null elsewhere."""
    dimensions = vectors.shape[1]
    lengths = np.zeros(rows, np.int32)
    lengths[there] = dimensions
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    # Not a list of fixed size: pyarrow 25 cannot read these back from Parquet where some are null.
    values = pa.array(vectors.half().numpy().reshape(-1))
    return pa.ListArray.from_arrays(offsets, values, mask=pa.array(lengths == 0))


def save_whitening(path: Path, mean: Tensor, covariance: Tensor, most: int, keep: float = 1e-4) -> int:
    """Write the PCA whitening of vectors with this mean `[D]` and covariance `[D, D]`; returns the dimensions kept.

    Of the directions, the `most` with the largest variance are kept; those with less than `keep` of the largest are
    left out, since whitened they would be noise.
    """
    values, directions = torch.linalg.eigh(covariance.double())
    kept = (values > keep * values[-1]) & (torch.arange(len(values)) >= len(values) - most)
    matrix = directions[:, kept] / values[kept].sqrt()
    partial = path.with_name(path.name + ".partial")
    save_file({"mean": mean.float().contiguous(), "matrix": matrix.float().contiguous()}, partial)
    partial.replace(path)
    return int(kept.sum())


@lru_cache(maxsize=4)
def read_whitening(path: Path) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and matrix `[D, D']` of `save_whitening`."""
    tensors = load_file(path)
    return tensors["mean"], tensors["matrix"]


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _row(part: Part, row: Any) -> str:
    return f"row {part.first + int(row):,} of {shown(part.file)}"
