"""Search one's own photos: an index of unit vectors on disk, and the images nearest to others.

An index is a folder: `part-000000.safetensors` (fp16 vectors) with `part-000000.parquet` (names, sizes, times of those
images) and so on, `images.parquet` (which rows count, in the order of the data) and `index.json` (what made them, and
that they are whole). A part is written when its images are done, so an interruption costs one part. When the data
change, only images that are new or have another size or time are computed; images in shards are told apart by their
shards alone, so all are computed again if one changes.
"""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opsin.data.decode import DecodeError, decode, shown
from opsin.data.progress import progress
from opsin.data.sources import ImageFiles, Source, scan
from opsin.errors import OpsinError
from opsin.evaluate.model import Model
from opsin.evaluate.pooled import extract
from opsin.evaluate.ranking import nearest
from opsin.evaluate.sets import ImageSet, of_files, of_source
from opsin.evaluate.strips import thumbnail
from opsin.evaluate.task import Run, Table
from opsin.evaluate.transforms import Transform
from opsin.evaluate.vectors import Feature, Resize, transform_of, unit
from opsin.output import make_folder, only_run, write

VERSION = 1
"""Counts up when the files of an index change their meaning."""
PART = 4096
"""Images in a part: what an interruption can cost."""
FACTS = {"digest", "precision", "transform", "feature", "size", "resize", "data", "whole"}
"""What index.json must say."""

Stamp = tuple[str, int, int]
"""Name, bytes and time of an image; -1 for both in a shard."""


@dataclass(frozen=True)
class Found:
    """A query and what is nearest to it."""

    query: str
    """Its file."""
    nearest: Sequence[tuple[str, float]]
    """Images of the index with their cosine similarity, best first; the query itself too if it is in the index."""


@dataclass(frozen=True)
class Answers:
    """What a search found."""

    found: Sequence[Found]
    """By query, in order."""
    left_out: Sequence[tuple[str, str]]
    """Queries that could not be read, each with the reason."""


def build_index(
    model: Model,
    data: str,
    out: Path,
    run: Run,
    *,
    size: int = 224,
    resize: Resize = "whole",
    feature: Feature = "cls",
) -> dict[str, Any]:
    """Make an index of images, or bring one up to date; one that was interrupted goes on.

    Args:
        model: the frozen backbone.
        data: whatever `opsin pretrain` takes as data; labels are not needed.
        out: folder of the index.
        run: how to compute; its cache is not used.
        size: pixels, see `resize`.
        resize: see `vectors.Resize`.
        feature: see `vectors.Feature`.

    Returns:
        JSON-able: `images` in the index, `computed` of them now, `removed` since the last time, `left_out` (name and
        reason of unreadable images), `bytes` of the vectors, `data`, `out`.

    Raises:
        OpsinError: there are no images or none can be read, the folder holds an index made otherwise or cannot be
            written, or another run is writing into it.
    """
    transform = transform_of(resize, size, model.arch)
    source = scan(data, progress=run.progress)
    make_folder(out)
    with only_run(out):
        how = _how(model, transform, feature) | {"size": size, "resize": resize}
        before = _read_facts(out) if (out / "index.json").exists() else None
        if before is not None:
            _same(out, before, how)
            if before["data"] != source.root:
                raise OpsinError(
                    f"{out} is an index of {shown(before['data'])}, not of {shown(source.root)}: choose another --out."
                )
        facts = how | {"model": model.name, "data": source.root, "fingerprint": source.fingerprint}
        try:
            return _update(model, source, out, transform, feature, run, facts, before)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise OpsinError(f"cannot write into --out {out}: {reason}. Choose another folder.") from None


def _update(
    model: Model,
    source: Source,
    out: Path,
    transform: Transform,
    feature: Feature,
    run: Run,
    facts: Mapping[str, Any],
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    stamps = [_stamp(source, i) for i in range(len(source))]
    same_shards = before is not None and before["fingerprint"] == source.fingerprint
    kept: dict[Stamp, tuple[int, int, str]] = {}
    numbers = sorted(int(path.stem.partition("-")[2]) for path in out.glob("part-[0-9]*.parquet"))
    if numbers and before is None:
        raise OpsinError(
            f"{out} holds parts of an index, but not its index.json, which says what made them: delete the folder, or "
            "choose another --out."
        )
    for number in [number for number in numbers if _is_whole(out, number)]:  # a damaged one is computed again
        for row, (name, size, time, reason) in enumerate(_read_part(out, number)):
            if size >= 0 or same_shards:
                kept[name, size, time] = (number, row, reason)
    missing = [i for i, stamp in enumerate(stamps) if stamp not in kept]
    write(out / "index.json", json.dumps({**facts, "whole": False}, indent=1))
    images, next_number = of_source(source, model.arch.channels), (numbers[-1] + 1 if numbers else 0)
    with progress("index", len(missing), "images", run.progress) as advance:
        for start in range(0, len(missing), PART):
            chosen = missing[start : start + PART]
            pooled, bad = extract(model, images.part(np.array(chosen)), range(len(chosen)), transform, run, advance)
            found = unit(pooled, feature)
            if not found.isfinite().all():
                raise OpsinError(
                    "the backbone's features are not finite: its weights are damaged, or training diverged."
                )
            rows = [(*stamps[i], bad.get(row, "")) for row, i in enumerate(chosen)]
            _write_part(out, next_number, found, rows)
            kept |= {stamps[i]: (next_number, row, bad.get(row, "")) for row, i in enumerate(chosen)}
            next_number += 1
    old = _places(out) if before is not None and before["whole"] else set()
    live = [(shown(source.place(i)), *kept[stamp]) for i, stamp in enumerate(stamps)]
    good = [(place, number, row) for place, number, row, reason in live if not reason]
    left_out = [(place, reason) for place, _, _, reason in live if reason]
    if not good:
        raise OpsinError(f"no image of {shown(source.root)} can be decoded: replace the damaged files.")
    columns = dict(zip(("place", "part", "row"), (list(column) for column in zip(*good, strict=True)), strict=True))
    _write_table(out / "images.parquet", columns)
    used = {number for _, number, _, _ in live}
    for number in set(range(next_number)) - used:  # all of whose images are gone
        for ending in ("parquet", "safetensors"):
            _part(out, number, ending).unlink(missing_ok=True)
    whole = {**facts, "images": len(good), "left_out": left_out, "whole": True}
    write(out / "index.json", json.dumps(whole, indent=1))
    return {
        "images": len(good),
        "computed": len(missing),
        "removed": len(old - {place for place, *_ in live}),
        "left_out": left_out,
        "bytes": sum(_part(out, number, "safetensors").stat().st_size for number in used),
        "data": shown(source.root),
        "out": str(out),
    }


def query(model: Model, index: Path, queries: Sequence[Path], run: Run, k: int = 10) -> Answers:
    """The images of an index nearest to each query by cosine similarity: exact, with one part in memory at a time.

    Args:
        model: the backbone that made the index.
        index: its folder.
        queries: image files, or folders of them; they are prepared as the index's images were.
        run: how to compute.
        k: neighbours of each, or all images of an index that has fewer.

    Raises:
        OpsinError: the index is missing, unfinished, damaged or another model's; a query is not there, or none can be
            read; k is below 1.
    """
    if k < 1:
        raise OpsinError(f"--k {k} is too small: give 1 or more.")
    facts = _read_facts(index)
    if not facts["whole"]:
        raise OpsinError(f"the index {shown(index)} is not finished: make it again with the same options, it goes on.")
    transform = transform_of(facts["resize"], facts["size"], model.arch)
    _same(index, facts, _how(model, transform, facts["feature"]))
    paths = [path for given in queries for path in _files(given)]
    if not paths:
        raise OpsinError("there are no queries: give image files, or folders of them.")
    images: ImageSet = of_files("the queries", paths, None, ())
    with progress("queries", len(images), "images", run.progress) as advance:
        pooled, bad = extract(model, images, range(len(images)), transform, run, advance)
    if len(bad) == len(images):
        raise OpsinError(f"no query can be read, such as {images.name(0)}: {bad[0]}.")
    good = [i for i in range(len(images)) if i not in bad]
    asked = unit(pooled, facts["feature"])[good]

    table = _read_table(index / "images.parquet")
    part, row = np.asarray(table["part"]), np.asarray(table["row"])
    values, where = torch.empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.int64)
    for number in np.unique(part).tolist():
        here = np.flatnonzero(part == number)
        similarity, found = nearest(asked, _read_vectors(index, number)[row[here]], k, model.device)
        values, where = torch.cat([values, similarity], 1), torch.cat([where, torch.from_numpy(here)[found]], 1)
        values, best = values.topk(min(k, values.shape[1]), dim=1)
        where = where.gather(1, best)
    found_by = [
        Found(shown(paths[i]), [(table["place"][j], s) for j, s in zip(places, scores, strict=True)])
        for i, places, scores in zip(good, where.tolist(), values.tolist(), strict=True)
    ]
    return Answers(found_by, [(images.name(i), reason) for i, reason in sorted(bad.items())])


def table_of(answers: Answers) -> Table:
    """A row per query and neighbour: query, place, similarity, file."""
    rows = [
        (found.query if place == 1 else "", str(place), f"{similarity:.3f}", name)
        for found in answers.found
        for place, (name, similarity) in enumerate(found.nearest, 1)
    ]
    return Table(("query", "place", "similarity", "image"), rows)


def neighbours_of(answers: Answers, side: int = 160) -> list[dict[str, Any]]:
    """Pictures of what was found, as the report's `neighbours` takes them; images without a file of their own, such as
    those in shards, appear without a picture's content (a gray square).

    Args:
        answers: of `query`.
        side: pixels of the longer side of a picture.
    """

    def shot(path: str, label: str) -> dict[str, Any]:
        try:
            pixels = decode(Path(path))
        except DecodeError:
            pixels = torch.full((3, side, side), 200, dtype=torch.uint8)
        buffer = io.BytesIO()
        thumbnail(pixels, side).save(buffer, "jpeg", quality=85)
        return {"image": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), "label": label}

    return [
        {
            "query": shot(found.query, Path(found.query).name),
            "nearest": [
                shot(name, f"{similarity:.2f} {Path(name).name}") | {"match": None}
                for name, similarity in found.nearest
            ],
        }
        for found in answers.found
    ]


def _files(given: Path) -> list[Path]:
    if given.is_dir():
        source = scan(given, progress=False)
        files = [Path(source.place(i)) for i in range(len(source))]
        if not all(path.is_file() for path in files[:1]):
            raise OpsinError(f"{shown(given)} holds shards: give a folder of image files as queries.")
        return files
    if not given.exists():
        raise OpsinError(f"there is no query {shown(given)}: give an image file, or a folder of them.")
    return [given]


def _how(model: Model, transform: Transform, feature: Feature) -> dict[str, Any]:
    """What vectors depend on."""
    precision = str(model.extractor.dtype).removeprefix("torch.")
    return {
        "version": VERSION,
        "digest": model.digest,
        "precision": precision,
        "transform": transform.name,
        "feature": feature,
    }


def _same(index: Path, facts: Mapping[str, Any], how: Mapping[str, Any]) -> None:
    """Refuse vectors that cannot be compared."""
    if facts["digest"] != how["digest"]:
        raise OpsinError(
            f"the index {shown(index)} was made by other weights or in another precision ({facts['model']}, "
            f"{facts['precision']}; these are {how['precision']}): give those, or make another index."
        )
    for key in ("version", "transform", "feature"):
        if facts[key] != how[key]:
            raise OpsinError(
                f"the index {shown(index)} was made with {key} {facts[key]}, not {how[key]}: give the same options, or "
                "another --out."
            )


def _stamp(source: Source, index: int) -> Stamp:
    name = shown(source.name(index))
    place = source.place(index)
    if not isinstance(source.images, ImageFiles) or "://" in place:
        return name, -1, -1
    try:
        facts = Path(place).stat()
    except OSError:  # gone since the listing: decoding will say so
        return name, -1, -1
    return name, facts.st_size, facts.st_mtime_ns


def _part(out: Path, number: int, ending: str) -> Path:
    return out / f"part-{number:06}.{ending}"


def _write_part(out: Path, number: int, found: Tensor, rows: Sequence[tuple[str, int, int, str]]) -> None:
    vectors = _part(out, number, "safetensors")
    partial = vectors.with_suffix(".partial")
    save_file({"vectors": found.half().contiguous()}, partial)
    partial.replace(vectors)
    names = ("name", "bytes", "time", "reason")
    _write_table(_part(out, number, "parquet"), dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def _write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Written last of a part: it says that the part is whole."""
    partial = path.with_suffix(".partial")
    parquet.write_table(pa.table(dict(columns)), partial)
    partial.replace(path)


def _read_table(path: Path) -> dict[str, list[Any]]:
    try:
        columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None
    return columns


def _read_part(out: Path, number: int) -> Iterator[tuple[str, int, int, str]]:
    table = _read_table(_part(out, number, "parquet"))
    return zip(table["name"], table["bytes"], table["time"], table["reason"], strict=True)


def _read_vectors(out: Path, number: int) -> Tensor:
    path = _part(out, number, "safetensors")
    try:
        return load_file(path)["vectors"]
    except (OSError, SafetensorError, KeyError) as error:
        raise _damaged(path, error) from None


def _places(out: Path) -> set[str]:
    """The images that an index had; none if the file is damaged, which is made anew."""
    try:
        return set(parquet.read_table(out / "images.parquet")["place"].to_pylist())
    except (OSError, KeyError, pa.ArrowException):
        return set()


def _is_whole(out: Path, number: int) -> bool:
    """Whether a part has a vector for each of its rows."""
    try:
        with safe_open(_part(out, number, "safetensors"), "pt") as file:
            vectors = file.get_slice("vectors").get_shape()[0]
        return bool(parquet.read_metadata(_part(out, number, "parquet")).num_rows == vectors)
    except (OSError, SafetensorError, pa.ArrowException):
        return False


def _read_facts(index: Path) -> dict[str, Any]:
    path = index / "index.json"
    if not path.is_file():
        raise OpsinError(f"{shown(index)} is no index: make one with opsin index.")
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(facts, dict) or not facts.keys() >= FACTS:
            raise ValueError("entries are missing")
    except ValueError as error:
        raise _damaged(path, error) from None
    return facts


def _damaged(path: Path, error: Exception) -> OpsinError:
    return OpsinError(f"{shown(path)} of the index is damaged ({error}): delete the folder and make the index again.")
