"""A frozen teacher's features on disk: with fixed crops they are computed once, however often the student comes back.

A cache is a folder of three files: `features.bin`, one record of raw bytes per row; `present.bin`, one byte per row, 1
where the record is there; and `cache.json`, which says what the records are.

What is guaranteed: a row is reported only if its record was written whole. When a process is killed, the kernel still
holds what was written before, so it is enough that a row's byte is written after its record, and never over a record
that is there. When the power fails, the kernel may have written the byte and not yet the record, so records are handed
to the disk (fsync) before their bytes are written at all; then a row may be forgotten, but not half there, on a disk
that keeps what it has acknowledged. Damage to the disk is not noticed: there are no checksums.

Files are read through memory maps and written by plain writes: a full disk would end a process that writes to a map.
Several processes of one machine may share a cache; machines may not, since a network drive shows each its own past.
"""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.data.rng import Integers
from opsin.errors import OpsinError

FORMAT = 1
"""Version of the files."""


def bytes_needed(rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes on disk of a full cache."""
    return rows * (_record(shape, dtype) + 1)


def _record(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


class TeacherCache:
    """`rows` tensors of one shape and type, kept in a folder; see the module for what holds after a crash."""

    def __init__(self, path: Path, rows: int, shape: tuple[int, ...], dtype: torch.dtype, key: str) -> None:
        """Open the cache in the folder `path`, or make one; processes may do so at the same time.

        Args:
            path: the folder.
            rows: how many tensors there can be.
            shape: of one of them.
            dtype: of their elements.
            key: what decides their contents (weights, sizes, images, crops).

        Raises:
            OpsinError: the folder holds other features or is damaged, cannot be written, or its disk has no room for
                the rows that are not there yet.
        """
        self.path, self.rows, self.shape, self.dtype = Path(path), rows, tuple(shape), dtype
        self._bytes = _record(shape, dtype)
        self._features, self._present = self.path / "features.bin", self.path / "present.bin"
        facts = {"format": FORMAT, "key": key, "rows": rows, "shape": list(shape), "dtype": str(dtype)}
        with self._disk_errors():
            if not (self.path / "cache.json").exists():
                self._make(facts)
            self._check(facts)
            self._records = self._map(self._features, (rows, self._bytes))
            self._flags = self._map(self._present, (rows,))
            self._check_room()

    def get(self, rows: Integers) -> Tensor | None:
        """The tensors `[len(rows), *shape]` of some rows, bit for bit as they were put; None if any is not there."""
        self._check_rows(rows)
        if not self._flags[rows].all():
            return None
        return torch.from_numpy(self._records[rows]).view(self.dtype).view(len(rows), *self.shape)

    def put(self, rows: Integers, tensor: Tensor) -> None:
        """Keep the tensors `[len(rows), *shape]` of some rows, on any device; rows that are there are left as they are.

        Waits for the disk. Processes that do so at the same time must put different rows.

        Raises:
            OpsinError: another shape or type, no such row, or the disk is full; the rows are then not there.
        """
        self._check_rows(rows)
        if tensor.shape != (len(rows), *self.shape) or tensor.dtype != self.dtype:
            raise OpsinError(
                f"the cache {self.path} takes {len(rows)} rows of {list(self.shape)} in {self.dtype}, not a tensor "
                f"{list(tensor.shape)} in {tensor.dtype}: give the features as the cache was made for."
            )
        absent = np.flatnonzero(self._flags[rows] == 0)
        flat = tensor.detach().cpu().contiguous().view(len(rows), self._bytes // self.dtype.itemsize)
        records = flat.view(torch.uint8).numpy()
        with self._disk_errors():
            with open(self._features, "rb+", buffering=0) as file:
                for i in absent:
                    _write(file.fileno(), records[i].data, int(rows[i]) * self._bytes)
                os.fsync(file.fileno())
            with open(self._present, "rb+", buffering=0) as file:
                for row in rows[absent]:
                    _write(file.fileno(), b"\1", int(row))

    def _make(self, facts: dict[str, Any]) -> None:
        """Make the files; the one that says what they are comes last."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (self.path / "cache.json").exists():  # another process was quicker
                return
            partial = self.path / "cache.json.partial"
            with open(self._features, "wb") as file:
                file.truncate(self.rows * self._bytes)
                os.fsync(file.fileno())
            for made, contents in ((self._present, bytes(self.rows)), (partial, json.dumps(facts).encode())):
                with open(made, "wb") as file:
                    file.write(contents)
                    file.flush()
                    os.fsync(file.fileno())
            partial.replace(self.path / "cache.json")
            folder = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _check(self, facts: dict[str, Any]) -> None:
        """Refuse a cache of something else."""
        otherwise = "remove the folder, or choose another."
        try:
            found = json.loads((self.path / "cache.json").read_text())
            other = [f"{name} {found[name]} (now {value})" for name, value in facts.items() if found[name] != value]
            sizes = [path.stat().st_size for path in (self._features, self._present)]
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            raise OpsinError(f"{self.path} holds a damaged cache of teacher features: {otherwise}") from None
        if found["key"] != facts["key"]:
            raise OpsinError(
                f"{self.path} holds features of another teacher, of other images or of other crops, and which of them "
                f"differs is not recorded: {otherwise}"
            )
        if other:
            raise OpsinError(f"{self.path} holds teacher features with {', '.join(other)}: {otherwise}")
        if sizes != [self.rows * self._bytes, self.rows]:
            raise OpsinError(f"{self.path} holds a damaged cache of teacher features: {otherwise}")

    def _check_room(self) -> None:
        """Refuse a disk that absent rows would fill: the file is sparse, so they take no room yet."""
        needed = int((self._flags == 0).sum()) * self._bytes
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OpsinError(
                f"the teacher features in {self.path} need {needed / 1e9:.1f} GB more and its disk has "
                f"{free / 1e9:.1f} GB free: free some space, choose another folder, or do without the cache."
            )

    def _check_rows(self, rows: Integers) -> None:
        if not 0 <= rows.min() <= rows.max() < self.rows:
            raise OpsinError(
                f"the cache {self.path} has rows 0 to {self.rows - 1}, not {rows.min()} to {rows.max()}: make one "
                "with as many rows as there are crops."
            )

    @staticmethod
    def _map(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return np.asarray(np.memmap(path, np.uint8, "r", shape=shape))

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """A full or failing disk as one sentence."""
        try:
            yield
        except OSError as error:
            whole = bytes_needed(self.rows, self.shape, self.dtype)
            raise OpsinError(
                f"cannot keep teacher features in {self.path} ({error.strerror}): they take {whole / 1e9:.1f} GB in "
                "all; free some space or choose another folder."
            ) from None


def _write(file: int, contents: bytes | memoryview, offset: int) -> None:
    """All of it: on a disk that is nearly full, a write may do a part and only the next one fail."""
    left = memoryview(contents)
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
