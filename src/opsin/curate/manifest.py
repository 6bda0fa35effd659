"""The manifest: a Parquet file that says of every image where it lies, what was found of it, and whether it is kept.

`opsin pretrain --data manifest.parquet` trains on the kept images (see `opsin.data.manifest`).
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

import opsin
from opsin.curate.heap import kind_of
from opsin.curate.tables import Table, read, read_step
from opsin.data.decode import shown, why
from opsin.data.manifest import METADATA
from opsin.errors import OpsinError

SCHEMA: Final = pa.schema(
    [
        ("path", pa.string()),
        ("source", pa.int32()),
        ("index", pa.int64()),
        ("hash", pa.binary(32)),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("cluster", pa.list_(pa.int32())),
        ("neighbours", pa.list_(pa.int64())),
        ("similarities", pa.list_(pa.float32())),
        ("duplicate_of", pa.int64()),
        ("sets", pa.list_(pa.string())),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
    ]
)
"""Columns of a manifest. `cluster` is the path from the top level to the leaf. `neighbours` and `duplicate_of` are row
numbers of this file. `reason` is null for kept images, and only for them."""
_TAKEN: Final = ("path", "source", "index", "hash", "bytes", "width", "height")


def write_manifest(
    out: Path,
    images: Table,
    *,
    vectors: Table | None,
    duplicates: Table | None,
    clusters: Table | None,
    retrieved: Table | None,
    sample: Table | None,
    steps: Mapping[str, Any],
    as_is: Mapping[str, Table] | None = None,
) -> dict[str, Any]:
    """Write the manifest, a part at a time, whole or not at all.

    An image is kept if no step gave a reason against it and it was sampled or retrieved, where these steps ran.

    Args:
        out: the file.
        images: what `ingest` wrote.
        vectors: what embedding wrote, of the same images; this and the other steps may be None.
        duplicates: what de-duplication wrote.
        clusters: what clustering wrote, with `levels.safetensors` beside it.
        retrieved: what retrieval wrote.
        sample: what sampling wrote.
        steps: settings of every step, for the metadata.
        as_is: images tables of sets that go in whole: their rows follow with the set's name in `sets`, kept unless they
            have a reason, and their sources follow the others.

    Returns:
        `images`, `kept`, `reasons` (number of images by reason), and `sets` (kept images of each set).

    Raises:
        OpsinError: the tables are not of the same images, a column or the levels are missing, a file is damaged, or
            the manifest cannot be written.
    """
    wanted = {
        "vectors": (vectors, ["reason"]),
        "duplicates": (duplicates, ["reason", "duplicate_of", "neighbours", "similarities"]),
        "clusters": (clusters, ["cluster"]),
        "retrieved": (retrieved, ["sets"]),
        "sample": (sample, ["chosen"]),
    }
    tables = {name: (table, columns) for name, (table, columns) in wanted.items() if table is not None}
    for table, columns in tables.values():
        images.aligned(table)
        table.require(*columns)
    parents = [] if clusters is None else _parents(clusters.path)
    as_is = as_is or {}
    shifts = [0, *accumulate(len(_sources(table)) for table in (images, *as_is.values()))]

    def pieces() -> Iterator[pa.Table]:
        for number, part in enumerate(images.parts):
            found = {
                f"{name}.{column}": values
                for name, (table, columns) in tables.items()
                for column, values in zip(columns, read(table.parts[number], columns).columns, strict=True)
            }
            yield _of_heap(read(part, [*_TAKEN, "reason"]), found, parents)
        for (name, table), shift in zip(as_is.items(), shifts[1:], strict=False):
            for part in table.parts:
                yield _of_set(read(part, [*_TAKEN, "reason"]), name, shift)

    sources = [
        {key: one[key] for key in ("spec", "fingerprint")} for t in (images, *as_is.values()) for one in _sources(t)
    ]
    about = {"opsin": opsin.__version__, "sources": sources, "steps": dict(steps)}
    kept, total, reasons, sets = 0, 0, Counter[str](), Counter[str]()
    partial = out.with_name(out.name + ".partial")
    try:
        with pq.ParquetWriter(
            partial, SCHEMA.with_metadata({METADATA: json.dumps(about)}), compression="zstd"
        ) as writer:
            for piece in pieces():
                writer.write_table(piece, row_group_size=max(1, piece.num_rows))
                total += piece.num_rows
                kept += pc.sum(piece["kept"]).as_py() or 0
                reasons.update(kind_of(reason) for reason in piece["reason"].to_pylist() if reason is not None)
                sets.update(name for names in piece["sets"].filter(piece["kept"]).to_pylist() for name in names)
        partial.replace(out)
    except OSError as error:
        raise OpsinError(
            f"cannot write {shown(out)} ({why(error)}): free some space and give the same command again."
        ) from error
    return {"images": total, "kept": kept, "reasons": dict(reasons.most_common()), "sets": dict(sorted(sets.items()))}


def _of_heap(images: pa.Table, found: Mapping[str, pa.ChunkedArray], parents: list[NDArray[np.int64]]) -> pa.Table:
    """Rows of the heap: `images`, and what the other steps say of the same rows."""
    rows = images.num_rows
    reason = pc.coalesce(
        images["reason"], *(found[name] for name in ("vectors.reason", "duplicates.reason") if name in found)
    )
    empty = pa.array([[]] * rows, SCHEMA.field("sets").type)
    sets = pc.coalesce(found["retrieved.sets"], empty) if "retrieved.sets" in found else empty
    if "sample.chosen" in found or "retrieved.sets" in found:
        wanted = pc.greater(pc.list_value_length(sets), 0)
        left = "not retrieved"
        if "sample.chosen" in found:
            wanted = pc.or_(wanted, pc.fill_null(found["sample.chosen"], False))
            left = "neither sampled nor retrieved" if "retrieved.sets" in found else "not sampled"
        reason = pc.coalesce(reason, pc.if_else(wanted, pa.scalar(None, pa.string()), left))
    columns = {
        "cluster": _paths(found["clusters.cluster"], parents) if "clusters.cluster" in found else None,
        **{name: found.get(f"duplicates.{name}") for name in ("neighbours", "similarities", "duplicate_of")},
        "sets": sets,
    }
    return _piece(images, reason, columns)


def _of_set(images: pa.Table, name: str, shift: int) -> pa.Table:
    """Rows of a set that goes in as it is, whose sources are numbered from `shift` on."""
    moved = images.set_column(
        images.schema.get_field_index("source"), "source", pc.add(images["source"], pa.scalar(shift, pa.int32()))
    )
    sets = pa.array([[name]] * images.num_rows, SCHEMA.field("sets").type)
    return _piece(moved, images["reason"], {"sets": sets})


def _piece(images: pa.Table, reason: Any, columns: Mapping[str, Any]) -> pa.Table:
    """The manifest's columns of some rows; those that are not given, or None, are null."""
    given = {name: images[name] for name in _TAKEN} | dict(columns) | {"kept": pc.is_null(reason), "reason": reason}
    arrays = [
        pa.nulls(images.num_rows, field.type) if given.get(field.name) is None else given[field.name].cast(field.type)
        for field in SCHEMA
    ]
    return pa.table(arrays, schema=SCHEMA)


def _paths(leaves: pa.ChunkedArray, parents: list[NDArray[np.int64]]) -> pa.Array:
    """The clusters of every image from the top level to the leaf; null for those without."""
    there = leaves.is_valid().to_numpy(zero_copy_only=False)
    levels = [leaves.drop_null().to_numpy().astype(np.int64)]
    for above in parents:
        levels.insert(0, above[levels[0]])
    ends = np.concatenate([[0], np.cumsum(there * len(levels))]).astype(np.int32)
    values = np.stack(levels, axis=1).astype(np.int32).reshape(-1)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values), mask=pa.array(~there))


def _parents(folder: Path) -> list[NDArray[np.int64]]:
    """Of every level but the top one, the cluster above each of its clusters."""
    file = folder / "levels.safetensors"
    try:
        with safe_open(file, "numpy") as opened:
            levels = sum(key.startswith("parents.") for key in list(opened.keys()))
            names = [f"parents.{level}" for level in range(1, levels + 1)]
            return [opened.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise OpsinError(
            f"{shown(file)} is missing or damaged ({error}): remove {shown(folder)} and cluster again."
        ) from error


def _sources(images: Table) -> list[dict[str, Any]]:
    """The sources of an images table."""
    found: list[dict[str, Any]] = read_step(images.path)["facts"]["sources"]
    return found
