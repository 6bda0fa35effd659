"""Images that lie in shards: an index of all samples, and reading by byte range.

The index is built once, kept as an Arrow file in the run's folder and mapped into memory: a record batch per shard (see
`PIECES`). So a process holds some hundred bytes per shard and none per sample, and the processes of a machine share one
copy: a billion samples are a file of some 50 GB, of which a window of blocks is in use at a time. A shard whose size
and time are those in the index is not read again.
"""

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opsin.data import columns, tars
from opsin.data.decode import DecodeError, shown, why
from opsin.data.files import File, Store
from opsin.data.order import Order
from opsin.data.pieces import PIECES, Damage, pieces
from opsin.data.progress import progress as shown_progress
from opsin.errors import OpsinError

log = logging.getLogger(__name__)

BLOCK_BYTES: Final = 16_000_000
"""Bytes of successive samples that stay together in the order."""
WINDOW: Final = 64
"""Blocks that are shuffled together, at most."""
CACHE_BYTES: Final = 1 << 30
"""Bytes of row groups and record batches that are kept, and always one of them."""
_FORM: Final = b"1"
"""Of the index file: another is not read."""

Policy = Literal["skip", "stop"]
"""What to do with a damaged shard: leave it out, or stop."""


class Unreadable(DecodeError):
    """A sample that its shard does not give, together with others."""

    def __init__(self, place: str, reason: str, end: int) -> None:
        super().__init__(place, reason)
        self.end = end
        """Index of the first sample behind those that the damage concerns."""


class Shard(NamedTuple):
    """A shard in the index."""

    file: File
    """Name, size and time."""
    samples: int
    """Images in it; of a damaged one those that were found, or -1 if that cannot be known."""
    damage: str
    """What is wrong with it; empty for a sound one."""
    column: str
    """See `Contents`."""
    classes: list[str]
    """See `Contents`."""
    digest: str
    """See `Contents.digest`."""
    pieces: pa.RecordBatch
    """As `PIECES`, mapped."""


class Shards:
    """The samples of shards of one kind, one after the other."""

    def __init__(self, store: Store, ending: str, shards: list[Shard], bad: Policy) -> None:
        """Leave out damaged shards.

        Raises:
            OpsinError: there is a damaged shard and `bad` is "stop", or nothing is left.
        """
        damaged = [shard for shard in shards if shard.damage]
        self.left_out = [(shard.file.name, _loss(shard)) for shard in damaged]
        """Names of damaged shards, each with the reason and what is lost."""
        self._store, self._ending, self._bad = store, ending, bad
        self._shards = [shard for shard in shards if not shard.damage and shard.samples]
        if damaged and (bad == "stop" or not self._shards):
            name, reason = self.left_out[0]
            more = f" and {len(damaged) - 1} more shards are damaged" if len(damaged) > 1 else ""
            raise OpsinError(
                f"{_place(store, name)} is damaged ({reason}){more}: fetch or write it again"
                + (", or leave such shards out with --data.bad-shards skip." if bad == "stop" else ".")
            )
        if not self._shards:
            raise OpsinError(f"the {len(shards)} {ending} shards of {shown(store.root.shown)} hold no images.")
        for name, reason in self.left_out:
            log.warning("left out the damaged shard %s (%s)", _place(store, name), reason)
        self._starts = [0, *accumulate(shard.samples for shard in self._shards)]
        self._groups = _Groups(CACHE_BYTES)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def kind(self) -> str:
        """How many of what."""
        return f"{len(self._shards):,} {self._ending} shard" + "s" * (len(self._shards) != 1)

    @property
    def total_bytes(self) -> int:
        """Of the shards in use."""
        return sum(shard.file.size for shard in self._shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and members of the shards in use."""
        digest = hashlib.sha256()
        for shard in self._shards:
            digest.update(b"%b\0%d\0%b\n" % (os.fsencode(shard.file.name), shard.file.size, shard.digest.encode()))
        return digest.hexdigest()

    @property
    def order(self) -> Order:
        """Blocks of `BLOCK_BYTES`, and at least of what is read at once; fewer in a window if that is much."""
        mean = max(1, self.total_bytes // len(self))
        block = max(1, min(round(BLOCK_BYTES / mean), len(self)))
        if self._ending == ".tar":
            return Order(len(self), block, WINDOW)
        largest = max(int(np.diff(shard.pieces["first"], append=shard.samples).max()) for shard in self._shards)
        block = max(block, largest)
        # A block lies in two groups at most, and the groups of a window must stay in the cache.
        return Order(len(self), block, max(1, min(WINDOW, CACHE_BYTES // (2 * block * mean))))

    def labels(self) -> tuple[NDArray[np.int64] | None, list[str]]:
        """Index into the class names for every sample, or None if one has no label; and the names."""
        if any(shard.pieces["labels"].null_count for shard in self._shards):
            return None, []
        numbers = np.concatenate([shard.pieces["labels"].flatten().to_numpy() for shard in self._shards])
        known, labels = np.unique(numbers, return_inverse=True)
        names = self._shards[0].classes
        classes = [names[number] if number < len(names) else str(number) for number in known.tolist()]
        return labels.astype(np.int64), classes

    def name(self, index: int) -> str:
        """The shard, and the sample in it: the member of a tar, or the number of the row."""
        number, row = self._at(index)
        shard = self._shards[number]
        key = os.fsdecode(shard.pieces["key"][row].as_py()) if self._ending == ".tar" else f"row {row}"
        return f"{shard.file.name}/{key}"

    def open(self, index: int) -> bytes:
        """The image file of a sample.

        Raises:
            DecodeError: the sample holds no bytes.
            Unreadable: the shard, or a part of it, cannot be read, and damaged shards are to be left out.
            OpsinError: they are not, or the connection is lost.
        """
        number, row = self._at(index)
        shard = self._shards[number]
        first = shard.pieces["first"].to_numpy()
        piece = int(np.searchsorted(first, row, side="right")) - 1
        end = self._starts[number + 1]
        try:
            if self._ending == ".tar":
                return tars.read(self._store, shard.file.name, *_range(shard, piece))
            if self._ending == ".parquet" and piece + 1 < len(first):  # the damage may be to this row group alone
                end = self._starts[number] + int(first[piece + 1])
            group = self._groups.get((number, piece), lambda: self._read_group(shard, piece))
            image: bytes | None = group[row - int(first[piece])].as_py()
        except (Damage, OSError, IndexError) as error:
            raise self._damaged(shard, _reason(error), end) from error
        if image is None:
            raise DecodeError(_place(self._store, self.name(index)), "the row holds no bytes of an image")
        return image

    def _at(self, index: int) -> tuple[int, int]:
        """The shard, and the sample's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source with {len(self)}")
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def _read_group(self, shard: Shard, piece: int) -> pa.ChunkedArray:
        if self._ending == ".parquet":
            return columns.read_parquet(self._store, shard.file.name, shard.column, piece)
        return columns.read_arrow(self._store, shard.file.name, shard.column, *_range(shard, piece))

    def _damaged(self, shard: Shard, reason: str, end: int) -> OpsinError:
        where = _place(self._store, shard.file.name)
        if self._bad == "skip":
            return Unreadable(where, reason, end)
        return OpsinError(
            f"{where} cannot be read ({reason}): fetch or write it again, or pass over such parts with "
            "--data.bad-shards skip."
        )


class _Groups:
    """Row groups and record batches that were read last; one that several threads want is read once."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[tuple[int, int], Future[pa.ChunkedArray]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[int, int], read: Callable[[], pa.ChunkedArray]) -> pa.ChunkedArray:
        """What was kept under `key`, or else what `read` returns."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                mine = None
            else:
                mine = kept = self._kept[key] = Future()
        if mine is not None:
            try:
                group = read()
            except BaseException as error:
                with self._lock:
                    del self._kept[key]
                mine.set_exception(error)
                raise
            mine.set_result(group)
            with self._lock:
                self._bytes += group.nbytes
                self._drop(key)
        return kept.result()

    def _drop(self, last: tuple[int, int]) -> None:
        """Forget what was not used for longest, but nothing that is being read, and not `last`."""
        for key in [key for key, group in self._kept.items() if key != last and group.done()]:
            if self._bytes <= self._limit:
                return
            self._bytes -= self._kept.pop(key).result().nbytes


def index_shards(
    store: Store, ending: str, files: list[File], kept: Path | None, bad: Policy, progress: bool = True
) -> Shards:
    """Index `files`, or take from `kept` what was indexed before.

    Args:
        store: where the shards are.
        ending: `.tar`, `.parquet` or `.arrow`, that of all of them.
        files: the shards, in order.
        kept: file of the index, which is written if anything in it changes; None keeps nothing.
        bad: what to do with damaged shards.
        progress: show a bar if stderr is a terminal.

    Raises:
        OpsinError: see `Shards`; or the index cannot be written, a shard holds no column of images, or the connection
            is lost.
    """
    before = {shard.file: shard for shard in _recall(kept) if not shard.damage}  # which may be mended unnoticed
    if list(before) == files:
        return Shards(store, ending, list(before.values()), bad)
    indexed = _indexed(store, ending, files, before)
    with shown_progress("indexing", len(files), "shards", progress) as advance:
        if kept is None:
            memory = pa.BufferOutputStream()
            _write(memory, indexed, advance)
            return Shards(store, ending, _read_index(memory.getvalue()), bad)
        partial = kept.with_suffix(f".{os.getpid()}-{get_ident()}")  # threads open sources, too
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(partial), "wb") as sink:
                _write(sink, indexed, advance)
            partial.replace(kept)
        except OSError as error:
            raise OpsinError(
                f"cannot keep the index of shards in {shown(kept.parent)} ({why(error)}): choose another output folder "
                "or free some space."
            ) from error
        finally:
            with suppress(OSError):
                partial.unlink()
    return Shards(store, ending, _recall(kept), bad)


def _write(sink: Any, shards: Iterator[Shard], advance: Callable[[int], None]) -> None:
    with pa.ipc.new_file(sink, PIECES.with_metadata({b"form": _FORM})) as writer:
        for shard in shards:
            about = {name: value for name, value in shard._asdict().items() if name != "pieces"}
            writer.write_batch(shard.pieces, {"shard": json.dumps(about)})
            advance(1)


def _indexed(store: Store, ending: str, files: list[File], before: dict[File, Shard]) -> Iterator[Shard]:
    index = {".tar": tars.index, ".parquet": columns.index_parquet, ".arrow": columns.index_arrow}[ending]

    def one(file: File) -> Shard:
        if file in before:
            return before[file]
        try:
            try:
                contents = index(store, file)
            except OSError as error:
                raise Damage(_reason(error)) from error
        except Damage as damage:
            lost = -1 if damage.samples is None else damage.samples
            return Shard(file, lost, damage.reason, "", [], "", pieces([], [], [], [], []))
        return Shard(file, contents.samples, "", contents.column, contents.classes, contents.digest(), contents.pieces)

    threads = min(8, os.cpu_count() or 1) if store.root.local else 32
    pool = ThreadPoolExecutor(threads, "index")
    try:
        yield from pool.map(one, files)
    finally:
        pool.shutdown(cancel_futures=True)


def _recall(kept: Path | None) -> list[Shard]:
    """The shards in `kept`, mapped; none if there is no such file, or it is damaged."""
    if kept is None or not kept.exists():
        return []
    try:
        with pa.memory_map(str(kept)) as mapped:
            return _read_index(mapped.read_buffer())
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return []


def _read_index(buffer: pa.Buffer) -> list[Shard]:
    reader = pa.ipc.open_file(buffer)
    if (reader.schema.metadata or {}).get(b"form") != _FORM:
        raise ValueError("an index of another form")
    shards = []
    for number in range(reader.num_record_batches):
        batch, about = reader.get_batch_with_custom_metadata(number)
        facts = json.loads(about["shard"])
        shards.append(Shard(**{**facts, "file": File(*facts["file"])}, pieces=batch))
    return shards


def _range(shard: Shard, piece: int) -> tuple[int, int]:
    return shard.pieces["offset"][piece].as_py(), shard.pieces["length"][piece].as_py()


def _loss(shard: Shard) -> str:
    lost = "its images" if shard.samples < 0 else f"{shard.samples:,} images and what is behind them"
    return f"{shard.damage}; {lost} are lost"


def _place(store: Store, name: str) -> str:
    return shown(f"{store.root.shown}/{name}")


def _reason(error: Exception) -> str:
    if isinstance(error, Damage):
        return error.reason
    return why(error) if isinstance(error, OSError) else "it has changed since it was indexed"
