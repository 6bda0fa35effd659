"""Features of every image of a source as one Parquet file, resumable.

Columns: `path` (relative to the source, as scanned), `cls` (list of D floats), and when asked for `patches` (h·w·D
floats, row by row of the patch grid) with `rows` and `columns` (h and w). Images that cannot be decoded have no row and
are listed in `OUT.unreadable.jsonl`.

Finished parts lie in `OUT.parts/` until all are there: an interrupted extraction goes on where it stopped.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from opsin.backbone.features import FeatureExtractor, by_shape
from opsin.backbone.graphs import Replay
from opsin.data.decode import DECODER, shown
from opsin.data.pipeline import prepared
from opsin.data.reader import ImageReader
from opsin.data.sources import Source
from opsin.errors import OpsinError

PART = 1024
"""Images in a part: what an interruption can cost."""


def write_features(
    extractor: FeatureExtractor,
    source: Source,
    out: Path,
    *,
    patches: bool = False,
    size: int = 224,
    batch_size: int = 64,
    workers: int = 4,
    advance: Callable[[int], object] = lambda _: None,
) -> int:
    """Write the features of `source` to `out` (Parquet) and return the number of rows.

    Threads decode, resize and normalise a few batches ahead, and another one writes; this one computes. A batch whose
    images come out at one shape is, on CUDA, a replayed graph; one of several shapes runs packed.

    Args:
        extractor: backbone, precision and preprocessing: aspect kept, shorter side `size`, rounded to the patch grid.
        source: the images.
        out: the file to write; a finished one is written anew.
        patches: also write patch features.
        size: shorter side in pixels.
        batch_size: images per forward; they run packed, whatever their shapes.
        workers: threads that decode and prepare images.
        advance: called with a number of images as they are done.

    Raises:
        OpsinError: the parts at `out` are of another extraction, features are not finite, or the disk is full.
    """
    if out.is_dir() or not out.name:
        raise OpsinError(f"--out {shown(out)} is a folder: give the name of a Parquet file.")
    if batch_size < 1 or workers < 1:
        raise OpsinError("--batch-size and --workers must be 1 or more.")
    settings = {
        "precision": str(extractor.dtype),
        "weights": _fingerprint(extractor),
        "source": source.fingerprint,
        "decoder": DECODER,
        "patches": patches,
        "size": size,
    }
    parts = out.with_name(out.name + ".parts")
    try:
        log = out.with_name(out.name + ".unreadable.jsonl")
        _begin(parts, settings, log)
        channels = extractor.backbone.arch.channels
        with ImageReader(source, workers=1, channels=channels, max_bad_fraction=1, log=log) as reader:
            _write_missing(extractor, reader, parts, patches, size, batch_size, workers, advance)
        rows = _join(parts, out)
        if log.exists():  # an interrupted part met its bad files twice
            log.write_text("".join(dict.fromkeys(log.read_text().splitlines(keepends=True))))
    except (OSError, pa.ArrowInvalid) as error:
        raise OpsinError(
            f"cannot write {shown(out)}: {getattr(error, 'strerror', None) or error}; free some space or choose "
            f"another --out: finished parts stay in {shown(parts)}, and the same command goes on from them."
        ) from None
    shutil.rmtree(parts)
    return rows


def _write_missing(
    extractor: FeatureExtractor,
    reader: ImageReader,
    parts: Path,
    patches: bool,
    size: int,
    batch_size: int,
    workers: int,
    advance: Callable[[int], object],
) -> None:
    """Write the parts that are not there yet."""
    count = len(reader.source)
    batches = []
    for start in range(0, count, PART):
        stop = min(start + PART, count)
        if _part(parts, start).exists():
            advance(stop - start)
        else:
            batches += [range(at, min(at + batch_size, stop)) for at in range(start, stop, batch_size)]

    def prepare(index: int) -> Tensor | None:
        pixels = reader.read(index)
        if index in reader.bad:  # the reader gave another image in its place
            return None
        return extractor.preprocess(pixels, size).to(extractor.dtype)

    schema = _schema(extractor.backbone.arch.width, patches)
    ahead = 1 + -(-2 * workers // batch_size)  # no thread waits for this one, however small the batches
    done: list[pa.RecordBatch] = []
    writing: Future[None] | None = None
    with (
        ThreadPoolExecutor(1, "write") as writer,
        closing(prepared(prepare, batches, workers=workers, ahead=ahead)) as ready,
    ):
        for batch, rows in _computed(extractor, reader, zip(batches, ready, strict=True), batch_size, schema):
            done.append(rows)
            advance(len(batch))
            if batch.stop % PART == 0 or batch.stop == count:
                if writing is not None:
                    writing.result()  # at most two parts are in memory
                path = _part(parts, (batch.stop - 1) // PART * PART)
                writing = writer.submit(_write, path, pa.Table.from_batches(done, schema))
                done = []
        if writing is not None:
            writing.result()


class _Batch(NamedTuple):
    """Features of a batch on their way to the host."""

    indices: range
    paths: list[str]
    groups: list[list[int]]
    """Positions in `paths`, by shape."""
    features: list[tuple[Tensor, ...]]
    """For every group, class tokens `[n, D]` and, when asked for, patches `[n, h, w, D]`."""
    arrived: Callable[[], object]
    """Waits until `features` can be read."""


def _computed(
    extractor: FeatureExtractor,
    reader: ImageReader,
    batches: Iterator[tuple[range, list[Tensor | None]]],
    batch_size: int,
    schema: pa.Schema,
) -> Iterator[tuple[range, pa.RecordBatch]]:
    """The rows of every batch, in order, fetched from the device while it computes the next."""
    patches, on_gpu = "patches" in schema.names, extractor.device.type == "cuda"

    def outputs(images: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        return [(f.cls.float(), *([f.patches.float()] if patches else [])) for f in extractor.backbone(images)]

    replay = Replay(lambda images: outputs([images])[0], batch_size, extractor.device)

    @torch.no_grad()
    def start(indices: range, given: list[Tensor | None]) -> _Batch:
        readable = [(index, image) for index, image in zip(indices, given, strict=True) if image is not None]
        images = [image for _, image in readable]
        groups = by_shape(images)
        stacked = [_stacked([images[i] for i in group], pinned=on_gpu) for group in groups]
        if len(stacked) == 1:
            features = [replay(stacked[0])]
        else:
            features = (
                outputs([batch.to(extractor.device, non_blocking=on_gpu) for batch in stacked]) if stacked else []
            )
        features = [tuple(tensor.to("cpu", non_blocking=on_gpu) for tensor in group) for group in features]
        arrived = torch.cuda.current_stream(extractor.device).record_event().synchronize if on_gpu else lambda: None
        return _Batch(indices, [shown(reader.source.name(i)) for i, _ in readable], groups, features, arrived)

    before: _Batch | None = None
    for indices, images in batches:
        batch = start(indices, images)
        if before is not None:
            yield before.indices, _rows(before, schema)
        before = batch
    if before is not None:
        yield before.indices, _rows(before, schema)


def _stacked(images: list[Tensor], pinned: bool) -> Tensor:
    out = torch.empty((len(images), *images[0].shape), dtype=images[0].dtype, pin_memory=pinned)
    return torch.stack(images, out=out)


def _rows(batch: _Batch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of a batch, in the order of its images, whatever their shapes."""
    batch.arrived()
    width = schema.field("cls").type.list_size
    cls = np.empty((len(batch.paths), width), dtype=np.float32)
    patches: list[Any] = [None] * len(batch.paths)
    grids = np.empty((len(batch.paths), 2), dtype=np.int32)
    for group, (tokens, *rest) in zip(batch.groups, batch.features, strict=True):
        if not all(tensor.isfinite().all() for tensor in (tokens, *rest)):
            raise OpsinError(
                f"the features of {batch.paths[group[0]]} or an image near it are not finite: the weights are damaged, "
                "or their activations overflow fp16: choose another precision."
            )
        cls[group] = tokens.numpy()
        for grid in rest:
            grids[group] = grid.shape[1:3]
            for i, values in zip(group, grid.flatten(1).numpy(), strict=True):
                patches[i] = values
    columns = [pa.array(batch.paths, pa.string()), pa.FixedSizeListArray.from_arrays(pa.array(cls.reshape(-1)), width)]
    if "patches" in schema.names:
        ends = np.cumsum([0, *grids.prod(1) * width])
        values = np.concatenate(patches) if patches else np.empty(0, np.float32)
        columns += [pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values)), *map(pa.array, grids.T)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:012d}.parquet"


def _write(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)


def _schema(width: int, patches: bool) -> pa.Schema:
    fields = [("path", pa.string()), ("cls", pa.list_(pa.float32(), width))]
    if patches:
        fields += [("patches", pa.list_(pa.float32())), ("rows", pa.int32()), ("columns", pa.int32())]
    return pa.schema(fields)


def _begin(parts: Path, settings: dict[str, Any], log: Path) -> None:
    """Start a folder of parts and a log, or check that the parts there were made with the same settings."""
    file = parts / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise OpsinError(
                f"{shown(parts)} holds parts made with other {', '.join(changed)}: remove it, or choose another --out."
            )
        return
    parts.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    file.with_suffix(".partial").write_text(json.dumps(settings))
    file.with_suffix(".partial").rename(file)


def _join(parts: Path, out: Path) -> int:
    files = sorted(parts.glob("*.parquet"))
    partial = out.with_name(out.name + ".partial")
    rows = 0
    with pq.ParquetWriter(partial, pq.read_schema(files[0])) as writer:
        for file in files:
            table = pq.read_table(file)
            writer.write_table(table)
            rows += table.num_rows
    partial.rename(out)
    return rows


def _fingerprint(extractor: FeatureExtractor) -> str:
    digest = hashlib.sha256(repr(extractor.backbone.arch).encode())
    for name, tensor in extractor.backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
