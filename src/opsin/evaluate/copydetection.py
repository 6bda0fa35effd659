"""Copy detection: does similarity tell copies of an image (cropped, compressed, edited) from other images?"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.data.decode import shown
from opsin.data.sources import scan
from opsin.errors import OpsinError, within
from opsin.evaluate.model import Model
from opsin.evaluate.ranking import Decisions, blocks, decisions, orders, ranks_of, trapezoidal_precision
from opsin.evaluate.sets import ImageSet, named, of_files, of_source
from opsin.evaluate.task import Result, Run, Table
from opsin.evaluate.transforms import Transform
from opsin.evaluate.vectors import Feature, Resize, transform_of, vectors

PRECISION = 0.9
"""At which recall is told."""
EXAMPLES = 3
"""Names that a message lists."""
COPYDAYS = "lear.inrialpes.fr/~jegou/data.php (INRIA Copydays)"
FAMILIES = ("strong", "crops", "jpegqual")
"""Copydays' folders of copies; crops and jpegqual have one per level."""
SETS = ("copydays",)
"""Published sets, by the name that `--data NAME:PATH` gives."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Copies:
    """Images, which pairs of them are copies, and how they are compared."""

    data: str = ""
    """A folder of images; without `pairs` with a sub-folder per image and its copies, or copydays:PATH."""
    pairs: Path | None = None
    """A .csv, .txt or .parquet file with the columns first, second and copy (1 or 0): files relative to the data."""
    size: int = 224
    """Pixels, see `resize`."""
    resize: Resize = "whole"
    """whole (shorter side to the size, nothing cropped), centre (crop), padded (longer side to it, in a black square)
    or longer (longer side to it, nothing cropped)."""
    feature: Feature = "cls"
    """The class token, the mean patch token, or both."""

    def __post_init__(self) -> None:
        within(self, "--", size=(1, 16384))


def copies(model: Model, settings: Copies, run: Run) -> Result:
    """Copy detection: micro average precision of cosine similarity over pairs of images.

    Metrics are `micro_ap`, `recall_at_precision_90` and `roc_auc`; on Copydays `map_strong`, `map_crops` and
    `map_jpegqual` come first, by its own rule. The similarity from which precision is 0.9 is among the details.

    Raises:
        OpsinError: files are missing, the list is none, or there is no copy or nothing but copies.
    """
    name, path = named(settings.data, SETS)
    transform = transform_of(settings.resize, settings.size, model.arch)
    facts: dict[str, Any] = {"transform": transform.name, "feature": settings.feature}
    if name is not None and settings.pairs is not None:
        raise OpsinError(f"{name} says itself what is a copy of what: leave out --pairs.")
    if name is not None:
        return _copydays(model, Path(path), transform, settings, run)
    if settings.pairs is not None:
        images, index, copy = read_pairs(Path(settings.data), settings.pairs, model.arch.channels)
        found, bad = vectors(model, images, transform, settings.feature, run)
        usable = ~np.isin(index, list(bad)).any(1)
        parts = torch.from_numpy(index[usable]).split(65536)
        scores = torch.cat([torch.linalg.vecdot(found[part[:, 0]], found[part[:, 1]]) for part in parts])
        similarity = scores.double().numpy()
        decided = _decided(similarity[copy[usable]], iter([similarity[~copy[usable]]]), images.where)
    else:
        source = scan(settings.data)
        if source.labels is None:
            raise OpsinError(
                f"{shown(settings.data)} does not say what is a copy of what: give --pairs FILE, or put the copies of "
                "one image into a folder of their own."
            )
        images = of_source(source, model.arch.channels)
        found, bad = vectors(model, images, transform, settings.feature, run)
        good = np.setdiff1d(np.arange(len(images)), list(bad))
        assert images.labels is not None
        decided = _groups(found[good], images.labels[good], model, images.where)
    metrics = _metrics(decided)
    left_out = [(images.name(i), reason) for i, reason in sorted(bad.items())]
    return Result(
        data=images.where,
        metrics=metrics,
        table=_table(metrics, decided),
        details=facts | _details(decided),
        left_out=left_out,
        outcomes=decided.precision,
    )


def read_pairs(data: Path, pairs: Path, channels: int = 3) -> tuple[ImageSet, NDArray[np.int64], NDArray[np.bool_]]:
    """A list of pairs: the images that it names, the pairs as indices into them `[P, 2]`, and which are copies `[P]`.

    Args:
        data: folder that names are relative to.
        pairs: .csv, .txt (separated by commas, tabs or semicolons, with a header) or .parquet.
        channels: bands of the images.

    Raises:
        OpsinError: the file is missing or no such list, names files that are not there, or has one kind of pairs only.
    """
    if not pairs.is_file():
        raise OpsinError(f"there is no file {shown(pairs)}: give --pairs the list of pairs.")
    if not data.is_dir():
        raise OpsinError(
            f"there is no folder {shown(data)}: give --data the one that the pairs' names are relative to."
        )
    first, second, marks = _columns(pairs)
    wrong = [i for i, mark in enumerate(marks) if mark not in ("0", "1")]
    if wrong:
        raise OpsinError(
            f"row {wrong[0] + 1} of {shown(pairs)} says '{marks[wrong[0]]}' in the column copy: say 1 for a copy, 0 "
            "for none."
        )
    known: dict[frozenset[str], str] = {}
    for one, other, mark in zip(first, second, marks, strict=True):
        if known.setdefault(frozenset((one, other)), mark) != mark:
            raise OpsinError(f"{shown(pairs)} says of {one} and {other} that they are copies and that they are none.")
    names = sorted(dict.fromkeys(first + second))
    missing = [one for one in names if not (data / one).is_file()]
    if missing:
        told = ", ".join(missing[:EXAMPLES]) + (", …" if len(missing) > EXAMPLES else "")
        raise OpsinError(
            f"{shown(pairs)} names {len(missing)} files that are not in {shown(data)} ({told}): names are relative to "
            "--data."
        )
    copy = np.array([mark == "1" for mark in marks])
    if copy.all() or not copy.any():
        lacking = "pair that is no copy (0)" if copy.all() else "copy (1)"
        raise OpsinError(f"{shown(pairs)} has no {lacking}: precision and recall need both kinds.")
    number = {one: i for i, one in enumerate(names)}
    index = np.array([[number[a], number[b]] for a, b in zip(first, second, strict=True)], dtype=np.int64)
    images = of_files(shown(data), [data / one for one in names], None, ())
    return replace(images, channels=channels), index, copy


def _columns(pairs: Path) -> tuple[list[str], list[str], list[str]]:
    """The columns first, second and copy as text."""
    wanted = ("first", "second", "copy")
    try:
        if pairs.suffix.lower() == ".parquet":
            import pyarrow.parquet as parquet

            table = parquet.read_table(pairs)
            held: Sequence[str] = table.column_names
            columns = {key: table[key].to_pylist() for key in wanted if key in held}
        else:
            text = pairs.read_text(encoding="utf-8-sig").splitlines()
            separator = max(",;\t", key=(text or [""])[0].count)
            head, *rows = [row for row in csv.reader(text, delimiter=separator) if row] or [[]]
            held = [part.strip() for part in head]
            places = {key: held.index(key) for key in wanted if key in held}
            columns = {key: [row[place] if place < len(row) else None for row in rows] for key, place in places.items()}
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's are of the first two; no text is a ValueError
        raise OpsinError(f"{shown(pairs)} cannot be read as a list of pairs: {error}.") from None
    if twice := [key for key in wanted if list(held).count(key) > 1]:
        raise OpsinError(f"{shown(pairs)} has several columns '{twice[0]}': keep one.")
    lacking = [key for key in wanted if key not in held]
    if lacking:
        raise OpsinError(
            f"{shown(pairs)} has no column {lacking[0]}: head its columns first, second and copy; it has "
            f"{', '.join(held[:5]) or 'none'}."
        )
    if not columns or not columns["copy"]:
        raise OpsinError(f"{shown(pairs)} lists no pair: add rows below its header.")
    for key, values in columns.items():
        if None in values:
            raise OpsinError(f"row {values.index(None) + 1} of {shown(pairs)} has no {key}: complete it.")
    first, second, marks = ([str(value).strip() for value in columns[key]] for key in wanted)
    return first, second, [{"True": "1", "False": "0", "1.0": "1", "0.0": "0"}.get(mark, mark) for mark in marks]


def _groups(found: Tensor, labels: NDArray[np.int64], model: Model, where: str) -> Decisions:
    """All pairs of images: those of a group are copies of each other."""
    groups = torch.from_numpy(labels).to(model.device)

    def scores(copy: bool) -> Iterator[Floats]:
        for asked, similarity in blocks(found, found, model.device):
            rows = torch.arange(asked.start, asked.stop, device=model.device)[:, None]
            later = torch.arange(len(found), device=model.device) > rows
            same = groups[rows] == groups
            yield similarity[later & (same == copy)].double().cpu().numpy()

    return _decided(np.concatenate([np.empty(0), *scores(True)]), scores(False), where)


def _decided(positives: Floats, negatives: Iterator[Floats], where: str) -> Decisions:
    if not len(positives):
        raise OpsinError(
            f"no two readable images of {where} are copies of each other: put an image and its copies into one folder, "
            "or list a pair that is a copy."
        )
    decided = decisions(positives, negatives)
    if not decided.negatives:
        raise OpsinError(f"all readable images of {where} are copies of each other: add other images.")
    return decided


def _metrics(decided: Decisions) -> dict[str, float]:
    return {
        "micro_ap": decided.average_precision,
        "recall_at_precision_90": decided.recall_at_precision(PRECISION)[0],
        "roc_auc": decided.roc_auc,
    }


def _details(decided: Decisions) -> dict[str, Any]:
    return {
        "copies": len(decided.positives),
        "others": decided.negatives,
        "threshold_at_precision_90": decided.recall_at_precision(PRECISION)[1],
    }


def _table(metrics: dict[str, float], decided: Decisions) -> Table:
    threshold = decided.recall_at_precision(PRECISION)[1]
    note = f"{len(decided.positives):,} pairs of copies, {decided.negatives:,} of other images; "
    note += "precision 0.9 is never reached" if threshold is None else f"precision 0.9 from similarity {threshold:.3f}"
    return Table(("metric", "value"), [(metric, f"{value:.3f}") for metric, value in metrics.items()], note)


def _copydays(model: Model, path: Path, transform: Transform, settings: Copies, run: Run) -> Result:
    """Every copy ranks all originals; the right one's name begins with the same four characters."""
    originals, altered, families = read_copydays(path)
    database, bad = vectors(model, originals, transform, settings.feature, run)
    queries, bad_queries = vectors(model, altered, transform, settings.feature, run)
    keys = np.array([Path(originals.name(i)).name[:4] for i in range(len(originals))])
    asked = np.array([Path(altered.name(i)).name[:4] for i in range(len(altered))])
    lost = np.array(sorted(bad), dtype=np.int64)
    precision = np.full(len(altered), np.nan)
    for query, order in orders(queries, database, model.device):
        right = np.setdiff1d(np.flatnonzero(keys == asked[query]), lost)
        if query not in bad_queries and len(right):
            precision[query] = trapezoidal_precision(ranks_of(order, right, lost), len(right))
    usable, good = ~np.isnan(precision), np.setdiff1d(np.arange(len(originals)), lost)

    def scores(copy: bool) -> Iterator[Floats]:
        for block, similarity in blocks(queries[torch.from_numpy(usable)], database[good], model.device):
            same = asked[usable][block.start : block.stop, None] == keys[good]
            yield similarity.double().cpu().numpy()[same == copy]

    decided = _decided(np.concatenate([np.empty(0), *scores(True)]), scores(False), originals.where)
    family = np.array([one.partition("/")[0] for one in families])
    present = [one for one in FAMILIES if (usable & (family == one)).any()]
    metrics = {f"map_{one}": float(precision[usable & (family == one)].mean()) for one in present} | _metrics(decided)
    levels = {
        level: float(precision[usable & (np.array(families) == level)].mean())
        for level in dict.fromkeys(families)
        if (usable & (np.array(families) == level)).any()
    }
    left_out = [(originals.name(i), reason) for i, reason in sorted(bad.items())]
    left_out += [(altered.name(i), reason) for i, reason in sorted(bad_queries.items())]
    facts = {"transform": transform.name, "feature": settings.feature, "map_by_folder": levels}
    return Result(
        data="copydays",
        metrics=metrics,
        table=_table(metrics, decided),
        details=facts | _details(decided),
        left_out=left_out,
        outcomes=precision[usable & (family == present[0])],
    )


def read_copydays(path: Path) -> tuple[ImageSet, ImageSet, list[str]]:
    """INRIA Copydays: originals, copies, and each copy's folder (strong, crops/50, jpegqual/3, …).

    Raises:
        OpsinError: a folder is missing or empty, or a copy has no original.
    """
    sets: dict[str, list[Path]] = {}
    for folder in ("original", *FAMILIES):
        sets[folder] = sorted((path / folder).rglob("*.jpg"))
        if not sets[folder]:
            raise OpsinError(f"{shown(path)} has no images in {folder}/: unpack Copydays there, from {COPYDAYS}.")
    known = {file.name[:4] for file in sets["original"]}
    altered = [file for family in FAMILIES for file in sets[family]]
    lonely = [shown(file.relative_to(path)) for file in altered if file.name[:4] not in known]
    if lonely:
        told = ", ".join(lonely[:EXAMPLES]) + (", …" if len(lonely) > EXAMPLES else "")
        raise OpsinError(
            f"{len(lonely)} copies in {shown(path)} have no original whose name begins with the same four characters "
            f"({told}): unpack all originals, from {COPYDAYS}."
        )
    where = shown(path)
    return (
        of_files(where, sets["original"], None, ()),
        of_files(where, altered, None, ()),
        [file.parent.relative_to(path).as_posix() for file in altered],
    )
