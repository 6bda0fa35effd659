"""The images that a curation kept, read from where they lie: its manifest as a source like any other.

A manifest is a Parquet file with a row per image of several sources. What is needed of it to train, source and index of
the rows with `kept`, lies in an Arrow file that is mapped into memory: 12 bytes per kept image on disk and none in a
process, however many there are.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opsin.data.decode import shown, why
from opsin.data.files import File, Place, Store
from opsin.data.order import Order
from opsin.data.shards import Unreadable
from opsin.errors import OpsinError

if TYPE_CHECKING:  # sources reads manifests
    from opsin.data.sources import Source

METADATA: Final = b"opsin.manifest"
"""In the metadata of a manifest's schema: JSON with `opsin` (version), `sources` (`spec` and `fingerprint` of each) and
`steps` (settings of every step)."""
ROWS: Final = 1 << 20
"""Kept images in a record batch."""
_COLUMNS: Final = pa.schema([("source", pa.int32()), ("index", pa.int64())])
_FORM: Final = 1


class Manifest:
    """The kept rows of a manifest, in its order: where image i lies, for every i."""

    def __init__(self, where: str, batches: list[pa.RecordBatch], about: dict[str, Any]) -> None:
        self.where = where
        """Path or URI of the manifest."""
        self.sources: list[dict[str, Any]] = about["sources"]
        """`spec` and `fingerprint` of every source."""
        self.counts: list[int] = about["counts"]
        """Kept images of each source."""
        self.highest: list[int] = about["highest"]
        """Largest index of each source; -1 without kept images."""
        self.digest: str = about["digest"]
        """SHA-256 over source and index of the kept rows."""
        self.total_bytes: int = about["bytes"]
        """Sum of the sizes of the kept images."""
        self._starts = [0, *accumulate(batch.num_rows for batch in batches)]
        self._sources: list[NDArray[np.int32]] = [batch["source"].to_numpy() for batch in batches]
        self._indices: list[NDArray[np.int64]] = [batch["index"].to_numpy() for batch in batches]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def at(self, position: int) -> tuple[int, int]:
        """Source of a kept image, and its index there."""
        if not 0 <= position < len(self):
            raise IndexError(f"image {position} of a manifest that keeps {len(self)}")
        batch = bisect_right(self._starts, position) - 1
        row = position - self._starts[batch]
        return int(self._sources[batch][row]), int(self._indices[batch][row])


class Kept:
    """The images of a manifest, opened where they lie."""

    def __init__(self, manifest: Manifest, sources: "Sequence[Source]") -> None:
        """Take sources that were scanned.

        Raises:
            OpsinError: a source is not what it was when the manifest was written.
        """
        for source, told, highest in zip(sources, manifest.sources, manifest.highest, strict=True):
            if source.fingerprint != told["fingerprint"] or highest >= len(source):
                raise OpsinError(
                    f"{shown(told['spec'])} is not what it was when {shown(manifest.where)} was made from it (files "
                    "were added, removed or changed in size): restore it, or curate it anew into another folder."
                )
        self._manifest, self._sources = manifest, sources

    @property
    def kind(self) -> str:
        """What the images that a curation kept are stored in."""
        kinds = dict.fromkeys(source.images.kind for source in self._sources)
        return f"{', '.join(kinds)}, of which a manifest names {len(self._manifest):,} images"

    @property
    def order(self) -> Order:
        """Blocks that stand for as much of the shards as the shards' own; any order if there are none."""
        block, window = 1, None
        for source, kept in zip(self._sources, self._manifest.counts, strict=True):
            if kept and source.order.block > 1:
                block = max(block, round(source.order.block * kept / len(source)))
                window = min(window or source.order.window, source.order.window)
        return Order(len(self._manifest), block, window or 1)

    def name(self, index: int) -> str:
        """The whole path or URI, since the sources may lie anywhere."""
        number, at = self._manifest.at(index)
        return self._sources[number].place(at)

    def open(self, index: int) -> Path | bytes:
        """What the image's source gives.

        Raises:
            DecodeError, OpsinError: as the source; `Unreadable.end` counts the manifest's images.
        """
        number, at = self._manifest.at(index)
        try:
            return self._sources[number].open(at)
        except Unreadable as error:
            behind = index + 1
            while behind < len(self._manifest):
                other, there = self._manifest.at(behind)
                if other != number or not at < there < error.end:
                    break
                behind += 1
            raise Unreadable(self.name(index), error.reason, behind) from error


def read_manifest(place: Place, cache: Path | None) -> Manifest | None:
    """The kept rows of the manifest at `place`, or None if no manifest lies there.

    Args:
        place: where the file may be.
        cache: folder that keeps source and index of the kept rows, mapped; without one they are held in memory.

    Raises:
        OpsinError: it is damaged or names sources that it does not list, keeps nothing, or the cache cannot be written.
    """
    store = Store(place.folder())
    file = store.find(place.base)
    if file is None:
        return None
    with store.reader(file.name) as opened:
        try:
            parquet = pq.ParquetFile(opened.raw)
        except (pa.ArrowException, OSError):
            return None  # a damaged file; that is said where shards are read
        told = (parquet.schema_arrow.metadata or {}).get(METADATA)
        if told is None:
            return None
        try:
            sources = [{key: str(one[key]) for key in ("spec", "fingerprint")} for one in json.loads(told)["sources"]]
            manifest = _kept(parquet, place, file, sources, cache)
        except (pa.ArrowException, ValueError, LookupError, TypeError) as error:
            raise OpsinError(
                f"the manifest {shown(place.shown)} is damaged or was changed ({' '.join(str(error).split())[:160]}): "
                "write it again with opsin curate."
            ) from error
    if not len(manifest):
        raise OpsinError(f"the manifest {shown(place.shown)} keeps no image: curate with milder settings.")
    return manifest


def _kept(
    parquet: pq.ParquetFile, place: Place, file: File, sources: list[dict[str, Any]], cache: Path | None
) -> Manifest:
    """The kept rows, from the cache or else from the file."""
    stamp = {"form": _FORM, "size": file.size, "time": file.mtime_ns, "sources": sources}
    if cache is None:
        memory = pa.BufferOutputStream()
        about = _write(memory, parquet, len(sources))
        return Manifest(place.shown, _batches(memory.getvalue()), stamp | about)
    name = hashlib.sha256(os.fsencode(place.shown)).hexdigest()[:16]
    kept, note = cache / f"manifest-{name}.arrow", cache / f"manifest-{name}.json"
    with suppress(OSError, ValueError, pa.ArrowException):
        about = json.loads(note.read_text())
        if all(about.get(key) == value for key, value in stamp.items()):
            return Manifest(place.shown, _batches(pa.memory_map(str(kept)).read_buffer()), about)
    mine = f"{os.getpid()}-{get_ident()}"
    partial, partial_note = kept.with_suffix(f".arrow.{mine}"), note.with_suffix(f".json.{mine}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(partial), "wb") as sink:
            about = stamp | _write(sink, parquet, len(sources))
        partial_note.write_text(json.dumps(about))
        note.unlink(missing_ok=True)  # so that it never speaks of other rows
        partial.replace(kept)
        partial_note.replace(note)
    except OSError as error:
        raise OpsinError(
            f"cannot keep the rows of {shown(place.shown)} in {shown(cache)} ({why(error)}): choose another output "
            "folder or free some space."
        ) from error
    finally:
        for left in (partial, partial_note):
            with suppress(OSError):
                left.unlink()
    return Manifest(place.shown, _batches(pa.memory_map(str(kept)).read_buffer()), about)


def _write(sink: Any, parquet: pq.ParquetFile, sources: int) -> dict[str, Any]:
    """Write source and index of the kept rows in batches of `ROWS`; returns what `Manifest` is told of them."""
    counts, highest, total = np.zeros(sources, np.int64), np.full(sources, -1), 0
    digests = [hashlib.sha256(), hashlib.sha256()]  # one per column, so that the parts of the file do not matter
    waiting, rows = list[pa.Table](), 0
    with pa.ipc.new_file(sink, _COLUMNS) as writer:
        for group in range(parquet.metadata.num_row_groups):
            try:
                table = parquet.read_row_group(group, ["source", "index", "bytes", "kept"], use_threads=False)
            except OSError as error:  # as pyarrow calls damage, too
                raise ValueError(str(error)) from error
            table = table.filter(table["kept"])
            total += pa.compute.sum(table["bytes"]).as_py() or 0
            table = table.select(["source", "index"]).cast(_COLUMNS)
            number, index = (table[name].to_numpy() for name in _COLUMNS.names)
            if table.num_rows:
                if number.min() < 0 or number.max() >= sources or index.min() < 0:
                    raise ValueError("a row names a source that is not listed, or an index below 0")
                counts += np.bincount(number, minlength=sources)
                np.maximum.at(highest, number, index)
            for digest, column in zip(digests, (number, index), strict=True):
                digest.update(np.ascontiguousarray(column).tobytes())
            waiting.append(table)
            rows += table.num_rows
            if rows >= ROWS:
                _flush(writer, waiting)
                waiting, rows = [], 0
        if rows:
            _flush(writer, waiting)
    whole = hashlib.sha256("".join(digest.hexdigest() for digest in digests).encode()).hexdigest()
    return {"counts": counts.tolist(), "highest": highest.tolist(), "digest": whole, "bytes": total}


def _flush(writer: Any, tables: list[pa.Table]) -> None:
    writer.write_table(pa.concat_tables(tables).combine_chunks(), max_chunksize=2 * ROWS)


def _batches(buffer: pa.Buffer) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(buffer)
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]
