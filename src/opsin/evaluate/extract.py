"""Features of every image of a source as one Parquet file, resumable.

Columns: `path` (relative to the source, as scanned), `cls` (list of D floats), and when asked for `patches` (h·w·D
floats, row by row of the patch grid) with `rows` and `columns` (h and w). Images that cannot be decoded have no row and
are listed in `OUT.unreadable.jsonl`.

Finished parts lie in `OUT.parts/` until all are there: an interrupted extraction goes on where it stopped.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from opsin.backbone.features import FeatureExtractor
from opsin.backbone.vit import Features
from opsin.data.decode import DECODER, shown
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

    Args:
        extractor: backbone and preprocessing: aspect kept, shorter side `size`, rounded to the patch grid.
        source: the images.
        out: the file to write; a finished one is written anew.
        patches: also write patch features.
        size: shorter side in pixels.
        batch_size: images per forward; they run packed, whatever their shapes.
        workers: decoding threads.
        advance: called with a number of images as they are done.

    Raises:
        OpsinError: the parts at `out` are of another extraction, or the disk is full.
    """
    if out.is_dir() or not out.name:
        raise OpsinError(f"--out {shown(out)} is a folder: give the name of a Parquet file.")
    if batch_size < 1 or workers < 1:
        raise OpsinError("--batch-size and --workers must be 1 or more.")
    settings = {
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
        with ImageReader(source, workers=workers, max_bad_fraction=1, log=log) as reader:
            for start in range(0, len(source), PART):
                stop = min(start + PART, len(source))
                path = parts / f"{start:012d}.parquet"
                if not path.exists():
                    table = _table(extractor, reader, range(start, stop), patches, size, batch_size, advance)
                    pq.write_table(table, path.with_suffix(".partial"))
                    path.with_suffix(".partial").rename(path)
                else:
                    advance(stop - start)
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


def _table(
    extractor: FeatureExtractor,
    reader: ImageReader,
    indices: range,
    patches: bool,
    size: int,
    batch_size: int,
    advance: Callable[[int], object],
) -> pa.Table:
    batches = [list(indices[at : at + batch_size]) for at in range(0, len(indices), batch_size)]
    waiting = [reader.submit(batch) for batch in batches[:2]]  # one batch is decoded while another is computed
    rows: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        images = waiting.pop(0).result()
        if number + 2 < len(batches):
            waiting.append(reader.submit(batches[number + 2]))
        features = extractor.each(images, size)
        for index, found in zip(batch, features, strict=True):
            if index not in reader.bad:  # the reader gave another image in its place
                rows.append({"path": shown(reader.source.paths[index])} | _row(found, patches))
        advance(len(batch))
    return pa.Table.from_pylist(rows, schema=_schema(extractor.backbone.arch.width, patches))


def _row(features: Features, patches: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"cls": features.cls[0].float().cpu().numpy()}
    if patches:
        _, rows, columns, _ = features.patches.shape
        row |= {"patches": features.patches.float().cpu().numpy().reshape(-1), "rows": rows, "columns": columns}
    return row


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
