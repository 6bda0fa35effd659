"""Parquet and Arrow shards with the bytes of image files in a column, as `datasets` and its hub have them.

Such a column holds bytes, or pairs of bytes and path. It is found by its type; among several, the one named `image`
counts. A column of integers named `label` gives labels, and their names if the schema carries those of `datasets`.
"""

import json
import struct
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any, BinaryIO, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opsin.data.decode import shown
from opsin.data.files import File, Store
from opsin.data.pieces import Contents, Damage, pieces
from opsin.errors import OpsinError

_BROKEN: Final = (pa.ArrowException, OSError, EOFError, struct.error, LookupError, ValueError)
"""What a damaged file makes pyarrow raise; a lost connection is an `OpsinError` by then."""
_MAGIC: Final = b"ARROW1\0\0"
"""Begins an Arrow file of random access, which holds a stream; `datasets` writes the stream alone."""
_CONTINUES: Final = 0xFFFFFFFF
_BATCH: Final = 3


def index_parquet(store: Store, file: File) -> Contents:
    """The row groups of a Parquet file.

    Raises:
        Damage: its footer cannot be read.
        OpsinError: it has no column of images.
    """
    try:
        with store.reader(file.name) as opened:
            parquet = pq.ParquetFile(opened.raw)
            groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
            column, classes = _columns(parquet.schema_arrow, store, file.name)
            labels: list[list[int] | None] = [None] * len(groups)
            if _has_labels(parquet.schema_arrow):
                labels = [_labels(parquet.read_row_group(i, ["label"])["label"]) for i in range(len(groups))]
    except _BROKEN as error:
        raise Damage(f"its footer or labels cannot be read: {_line(error)}") from error
    first = [0, *accumulate(groups)]
    if first[-1] > file.size or min(groups, default=0) < 0:  # an image has a byte or more
        raise Damage("its footer is wrong")
    zeros = [0] * len(groups)
    return Contents(pieces(first[:-1], zeros, zeros, [b""] * len(groups), labels), first[-1], column, classes)


def read_parquet(store: Store, name: str, column: str, group: int) -> pa.ChunkedArray:
    """The images of a row group, as bytes; other columns are not read. Raises `Damage`."""
    try:
        with store.reader(name) as opened:
            parquet = pq.ParquetFile(opened.raw)
            nested = pa.types.is_struct(parquet.schema_arrow.field(column).type)
            table = parquet.read_row_group(group, [f"{column}.bytes" if nested else column], use_threads=False)
            return _bytes(table[column])
    except _BROKEN as error:
        raise Damage(f"its row group {group} cannot be read: {_line(error)}") from error


def index_arrow(store: Store, file: File) -> Contents:
    """The record batches of an Arrow file: hops from message to message, and reads no images.

    Raises:
        Damage: it is cut short, or no Arrow.
        OpsinError: it has no column of images.
    """
    samples = 0
    first, offsets, lengths, labels = list[int](), list[int](), list[int](), list[list[int] | None]()
    try:
        schema = _schema(store, file.name)
        column, classes = _columns(schema, store, file.name)
        with store.reader(file.name) as opened:
            for message in _messages(opened, file.size):
                if message.kind == _BATCH:
                    first.append(samples)
                    offsets.append(message.offset)
                    lengths.append(message.length)
                    samples += message.rows
        for offset, length in zip(offsets, lengths, strict=True):
            batch = _read_batch(store, file.name, offset, length) if _has_labels(schema) and store.root.local else None
            labels.append(None if batch is None else _labels(batch["label"]))
    except Damage as damage:
        raise Damage(damage.reason, samples) from None
    except _BROKEN as error:
        raise Damage(f"it cannot be read: {_line(error)}", samples) from error
    return Contents(pieces(first, offsets, lengths, [b""] * len(first), labels), samples, column, classes)


def read_arrow(store: Store, name: str, column: str, offset: int, length: int) -> pa.ChunkedArray:
    """The images of a record batch, as bytes; of a local file a view of the mapped file. Raises `Damage`."""
    try:
        return _bytes(pa.chunked_array([_read_batch(store, name, offset, length)[column]]))
    except _BROKEN as error:
        raise Damage(f"its record batch at byte {offset:,} cannot be read: {_line(error)}") from error


def _read_batch(store: Store, name: str, offset: int, length: int) -> pa.RecordBatch:
    schema = _schema(store, name)
    message = pa.ipc.read_message(pa.BufferReader(store.view(name, offset, length)))
    return pa.ipc.read_record_batch(message, schema)


@lru_cache(maxsize=256)
def _schema(store: Store, name: str) -> pa.Schema:
    with store.reader(name) as opened:
        opened.seek(_start(opened))
        return pa.ipc.open_stream(opened).schema


class _Message(NamedTuple):
    kind: int
    offset: int
    length: int
    rows: int


def _messages(file: BinaryIO, size: int) -> Iterator[_Message]:
    """The messages of an Arrow stream (columnar format, "Encapsulated message format")."""
    at = _start(file)
    while True:
        file.seek(at)
        start = file.read(8)
        if len(start) < 8:
            raise Damage(f"it is cut short: it ends at byte {size:,} without the mark of an end")
        mark, length = struct.unpack("<Ii", start)
        if mark != _CONTINUES or not 0 <= length <= size:
            raise Damage(f"there is no Arrow message at byte {at:,}")
        if length == 0:
            return
        kind, body, rows = _parse(file.read(length))
        whole = 8 + length + body
        if rows > size:  # an image has a byte or more
            raise Damage(f"there is no Arrow message at byte {at:,}")
        if at + whole > size:
            raise Damage(f"it is cut short: {size:,} of at least {at + whole:,} bytes are there")
        yield _Message(kind, at, whole, rows)
        at += whole


def _parse(message: bytes) -> tuple[int, int, int]:
    """Kind, bytes of the body and rows of a message, whose header is a flatbuffer (Message.fbs of Arrow)."""

    def field(table: int, slot: int) -> int | None:
        directory = table - struct.unpack_from("<i", message, table)[0]
        size = struct.unpack_from("<H", message, directory)[0]
        at = 4 + 2 * slot
        offset = struct.unpack_from("<H", message, directory + at)[0] if at < size else 0
        return table + offset if offset else None

    def number(form: str, at: int | None) -> int:
        return 0 if at is None else int(struct.unpack_from(form, message, at)[0])

    root = number("<I", 0)
    kind, body = number("<B", field(root, 1)), number("<q", field(root, 3))
    at = field(root, 2)
    rows = 0 if at is None or kind != _BATCH else number("<q", field(at + number("<I", at), 0))
    if body < 0 or rows < 0:
        raise Damage("a message of less than nothing")
    return kind, body, rows


def _start(file: BinaryIO) -> int:
    file.seek(0)
    return len(_MAGIC) if file.read(len(_MAGIC)) == _MAGIC else 0


def _columns(schema: pa.Schema, store: Store, name: str) -> tuple[str, list[str]]:
    """The column of images, and the names of the labels."""
    found = [field.name for field in schema if _is_image(field.type)]
    where = shown(f"{store.root.shown}/{name}")
    if not found:
        raise OpsinError(
            f"{where} has no column with the bytes of image files (columns: {', '.join(schema.names) or 'none'}): give "
            "files with one, of bytes or of pairs of bytes and path."
        )
    if len(found) > 1 and "image" not in found:
        raise OpsinError(f"{where} has several columns of bytes, {', '.join(found)}: name the one with images 'image'.")
    about = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        classes = json.loads(about)["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        classes = []
    return "image" if "image" in found else found[0], [str(name) for name in classes]


def _is_image(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        position = kind.get_field_index("bytes")
        kind = kind.field(position).type if position >= 0 else kind
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _has_labels(schema: pa.Schema) -> bool:
    return "label" in schema.names and bool(pa.types.is_integer(schema.field("label").type))


def _labels(column: Any) -> list[int] | None:
    """None if one is missing: `datasets` writes -1 for it, others null."""
    numbers: list[int | None] = column.to_pylist()
    known = [number for number in numbers if number is not None and 0 <= number < 2**31]
    return known if len(known) == len(numbers) else None


def _bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    found = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
    found.validate(full=True)  # Arrow has no checksums: a wrong offset would be followed anywhere
    return found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
