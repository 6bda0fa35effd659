"""What a shard holds: the form in which all kinds of shards are indexed."""

import hashlib
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

PIECES: Final = pa.schema(
    [
        ("first", pa.int64()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("key", pa.binary()),
        ("labels", pa.list_(pa.int32())),
    ]
)
"""A row for every part of a shard that is read at once: an image of a tar, a row group of Parquet, a batch of Arrow.

`first` counts the shard's samples before it, `offset` and `length` are its bytes (zero for Parquet, whose own footer
says it), `key` is a tar member's name, `labels` has one number per sample, or is null where they are not known."""


class Damage(Exception):
    """A shard, or a part of one, that cannot be read."""

    def __init__(self, reason: str, samples: int | None = None) -> None:
        self.reason = reason
        """What is wrong, without the shard's name."""
        self.samples = samples
        """Images found in it nevertheless; None if that cannot be known."""
        super().__init__(reason)


class Contents(NamedTuple):
    """The index of one shard."""

    pieces: pa.RecordBatch
    """As `PIECES`, in the order of the shard."""
    samples: int
    """Images in it."""
    column: str
    """The column with the image bytes; empty for tar."""
    classes: list[str]
    """Names of the labels, where the shard gives them."""

    def digest(self) -> str:
        """SHA-256 over the members."""
        found = hashlib.sha256()
        for name in ("first", "offset", "length"):
            found.update(self.pieces[name].to_numpy(zero_copy_only=False).tobytes())
        found.update(b"\0".join(key.as_py() for key in self.pieces["key"]))
        return found.hexdigest()


def pieces(
    first: list[int], offset: list[int], length: list[int], key: list[bytes], labels: list[list[int] | None]
) -> pa.RecordBatch:
    """The columns of `PIECES` as a record batch."""
    columns: list[Any] = [np.asarray(numbers, dtype=np.int64) for numbers in (first, offset, length)]
    arrays = [pa.array(column) for column in columns]
    return pa.record_batch([*arrays, pa.array(key, pa.binary()), pa.array(labels, PIECES.field("labels").type)], PIECES)
