"""Remove copies: of the same bytes, of the same look, and near ones; and whatever is near an evaluation set.

As in the paper (Appendix A.3): cosine of copy-detection vectors, the k = 64 nearest neighbours of every image, edges
above a threshold, connected components, one image of each stays. Against reference sets the survivors and the
references are searched once more with a lower threshold, and a component that a reference belongs to is dropped whole.
Equal bytes and equal perceptual hashes, which need no vectors, are dropped first.

The paper's thresholds 0.6 and 0.45 are those of a copy-detection network. For other vectors a threshold is found with
planted copies (see `calibrate`) or given; their features are whitened first, because otherwise every photo is near
every other (with those of DINOv2 the graph above 0.6 was one component in every set tried).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opsin.curate.cells import EXACT_BELOW, PROBES, VectorSet, build_cells, cells_for
from opsin.curate.components import Components
from opsin.curate.engine import Engine
from opsin.curate.examples import groups_of, pairs_around
from opsin.curate.hashes import Keys, equal_pairs, words
from opsin.curate.neighbours import Search, edges, found_files, rows_between, search
from opsin.curate.recall import recall
from opsin.curate.representatives import Representatives
from opsin.curate.tables import STEP, Step, Table, read, read_step, tasks_of, write_part
from opsin.curate.vectors import Column
from opsin.curate.whiten import whitening
from opsin.data.decode import shown
from opsin.errors import OpsinError, within
from opsin.output import make_folder

Numbers = NDArray[np.int64]

FEW: Final = 20
"""A component of so many images, or so many dropped ones, never stops the step: of a small heap 1 % is one image."""
THRESHOLDS: Final = (0.6, 0.45)
"""Of the paper, for copy-detection networks: among the heap, and against references."""
REASONS: Final = ("exact duplicate", "same perceptual hash", "near-duplicate")
"""Why an image is dropped as a copy within the heap, in the order in which they are looked for."""


class TooManyError(OpsinError):
    """The step would drop more than is credible; what it found is in the folder all the same."""


@dataclass(frozen=True)
class Dedup:
    """How copies are found."""

    threshold: float | None = None
    """Cosine above which two images are copies; None: 0.6 for a copy-detection network, else it must be found out."""
    reference_threshold: float | None = None
    """The same against reference sets; None: 0.45, or as found out."""
    column: str | None = None
    """Of the vectors; None: `copies` if there is one, else `semantic`."""
    whiten: bool | None = None
    """PCA-whiten the vectors; None: unless they are of a copy-detection network."""
    nearest: int = 64
    """Nearest neighbours of an image that are looked at."""
    floor: float = 0.3
    """Cosine above which neighbours are kept for the manifest and for pictures, so that another threshold can be tried
    without searching again."""
    perceptual: bool = True
    """Drop images with equal perceptual hashes before."""
    exact_below: int = EXACT_BELOW
    """Vectors up to which the search compares all with all."""
    cells: int | None = None
    """Cells of a search that does not; None for √n."""
    probes: int = PROBES
    """Cells that are searched for the vectors of a cell. The share of the neighbours that this finds is measured."""
    largest: float = 0.01
    """Share of the images that may be in one component, before the step stops and asks."""
    dropped: float = 0.3
    """Share of the images that may be dropped as near-duplicates, before the step stops and asks."""

    def __post_init__(self) -> None:
        within(self, "", nearest=(1, 4096), floor=(-1, 1), exact_below=(1, 10**12), probes=(1, 10**6))
        within(self, "", largest=(0, 1), dropped=(0, 1))
        for name in ("threshold", "reference_threshold"):
            value = getattr(self, name)
            if value is not None and not -1 <= value <= 1:
                raise OpsinError(f"{name} is {value}: a cosine lies from -1 to 1; 0.6 is usual among copies.")


def dedup(
    engine: Engine,
    vectors: Table,
    out: Path,
    settings: Dedup,
    *,
    graph: Path,
    images: Table | None = None,
    references: Mapping[str, Table] | None = None,
    accept: bool = False,
) -> dict[str, Any]:
    """Write which images stay, one row per image.

    Columns: `kept`; `component`, the smallest number in it; `duplicate_of`, the number of the image that stays in place
    of one that was dropped here as a copy; `reason`, null for what is kept or was dropped before; `neighbours` and
    `similarities`, those above the floor, the nearest first.

    Args:
        engine: where it runs.
        vectors: one per image, null for those dropped before.
        out: the folder to write.
        settings: how.
        graph: folder for the neighbours, which a later run with other thresholds uses again.
        images: hashes, sizes and paths of the images; without it only vectors decide, and the first image stays.
        references: vectors of evaluation sets, by name.
        accept: go on although a component or the number of dropped images is larger than `settings` allows.

    Returns:
        What was found: `threshold`, counts, examples.

    Raises:
        OpsinError: no threshold is known for these vectors, or they cannot be used.
        TooManyError: more is dropped than `settings` allows.
    """
    references = references or {}
    if images is not None:
        images.aligned(vectors)
        images.require("hash", "phash", "width", "height", "sharpness", "path")
    inputs = {"vectors": vectors, **({"images": images} if images else {})}
    step = Step(out, "dedup", asdict(settings), inputs | {f"reference {name}": t for name, t in references.items()})
    if step.done:
        return step.facts
    began = monotonic()
    threshold, reference_threshold = _thresholds(vectors, settings)
    fates = _Fates(step.scratch, vectors, images)
    considered = int((fates.why == KEPT).sum())
    facts: dict[str, Any] = {
        "images": considered,
        "threshold": threshold,
        "reference_threshold": reference_threshold if references else None,
        "column": _name(vectors, settings),
    }
    components = Components(step.scratch / "parents.npy", vectors.rows)
    if images is not None:
        for reason, name in enumerate(("hash", "phash")[: 1 + settings.perceptual]):
            for a, b in equal_pairs(partial(fates.hashes, images, name), considered, engine.bytes):
                components.join(a, b)
            fates.drop_copies(Representatives(step.scratch, components, fates.seen, images), reason)

    which = _kept(fates, vectors, step.scratch / "kept")
    read_as = column_of(engine, vectors, settings, graph)
    what = Search(settings.nearest, min(settings.floor, threshold), settings.probes)
    found = _graph(engine, [VectorSet(vectors, read_as, which)], graph, what, settings, images)
    for file in found:
        components.join(*edges(file, threshold)[:2])
    representatives = Representatives(step.scratch, components, fates.seen, images)
    fates.drop_copies(representatives, REASONS.index("near-duplicate"))
    facts["recall"] = read_step(graph)["facts"]["recall"]
    facts["pairs"] = pairs_around(found, threshold)
    facts["groups"] = groups_of(components, representatives, fates.seen, found)
    facts["largest"] = max([1, *(group["size"] for group in facts["groups"])])

    if references:
        which = _kept(fates, vectors, step.scratch / "kept-apart")
        heaps = [VectorSet(vectors, read_as, which), *(VectorSet(table, read_as) for table in references.values())]
        what = Search(settings.nearest, reference_threshold, settings.probes)
        near = _graph(engine, heaps, step.scratch / "references", what, settings, images)
        _drop_near(fates, near, reference_threshold, vectors.rows, references, step.scratch)
    facts["dropped"] = fates.counts(references)
    facts["kept"] = int((fates.why == KEPT).sum())
    _check_credible(facts, settings, step, accept)
    _write(step, fates, components, representatives, found, vectors, references, engine.bytes)
    return step.finish(facts | {"seconds": round(monotonic() - began, 1)})


DROPPED_BEFORE, KEPT = 255, 254


class _Fates:
    """What becomes of every image: one byte each, on disk. Below 200 a reason's number, from 3 on a reference set's."""

    def __init__(self, scratch: Path, vectors: Table, images: Table | None) -> None:
        file = scratch / "why.npy"
        self.why: NDArray[np.uint8] = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(vectors.rows,))
        for i, part in enumerate(vectors.parts):
            here = np.full(part.rows, KEPT, np.uint8)
            for table in (vectors, images):
                if table is not None and "reason" in table.schema.names:
                    reasons = read(table.parts[i], ["reason"])["reason"]
                    here[reasons.is_valid().to_numpy()] = DROPPED_BEFORE
            self.why[part.first : part.first + part.rows] = here

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Which images were not dropped before."""
        seen: NDArray[np.bool_] = self.why != DROPPED_BEFORE
        return seen

    def hashes(self, images: Table, name: str) -> Iterator[tuple[Keys, Numbers]]:
        """Hashes and numbers of the images that are kept so far, part by part."""
        for part in images.parts:
            rows = np.flatnonzero(self.why[part.first : part.first + part.rows] == KEPT)
            column = read(part, [name])[name].combine_chunks().take(pa.array(rows))
            if pa.types.is_fixed_size_binary(column.type):
                buffer = column.buffers()[1]
                width = column.type.byte_width
                raw = np.frombuffer(buffer, np.uint8)[column.offset * width :][: len(rows) * width]
                yield words(raw.reshape(len(rows), width)), part.first + rows
            else:
                yield words(column.to_numpy(zero_copy_only=False)), part.first + rows

    def drop_copies(self, representatives: Representatives, reason: int) -> None:
        """Drop what is kept and not the representative of its component."""
        for start in range(0, len(self.why), 1 << 20):
            numbers = start + np.flatnonzero(self.why[start : start + (1 << 20)] == KEPT)
            copies = numbers[representatives.of(numbers) != numbers]
            self.why[copies] = reason

    def counts(self, references: Mapping[str, Table]) -> dict[str, int]:
        """Dropped images by reason."""
        held = np.bincount(self.why, minlength=256)
        return {text: int(held[i]) for i, text in enumerate(_texts(references)) if held[i]}


def _texts(references: Iterable[str]) -> list[str]:
    return [*REASONS, *(f"near-duplicate of {name}" for name in references)]


def column_of(engine: Engine, vectors: Table, settings: Dedup, graph: Path) -> Column:
    """How the vectors are read in which copies are looked for; their whitening is found once, in the folder `graph`."""
    name = _name(vectors, settings)
    made_for_copies = name == "copies" and bool(_made(vectors).get("facts", {}).get("copy_detector"))
    if settings.whiten if settings.whiten is not None else not made_for_copies:
        return whitening(engine, vectors, name, make_folder(graph) / "whitening.safetensors")
    return Column(name)


def _name(vectors: Table, settings: Dedup) -> str:
    name = settings.column or next((name for name in ("copies", "semantic") if name in vectors.schema.names), None)
    if name is None:
        raise OpsinError(
            f"{shown(vectors.path)} has neither a column 'copies' nor 'semantic' (it has "
            f"{', '.join(vectors.schema.names)}): name one with --column."
        )
    vectors.require(name)
    return name


def threshold_known(vectors: Table, settings: Dedup) -> bool:
    """Whether the paper's thresholds hold: for a network that was declared to be one for copy detection."""
    declared = bool(_made(vectors).get("settings", {}).get("copy_detector"))
    return declared and _name(vectors, settings) == "copies"


def _made(vectors: Table) -> dict[str, Any]:
    return read_step(vectors.path) if (vectors.path / STEP).exists() else {}


def _thresholds(vectors: Table, settings: Dedup) -> tuple[float, float]:
    low, high = settings.reference_threshold, settings.threshold
    if high is None and not threshold_known(vectors, settings):
        raise OpsinError(
            f"no threshold is known for the vectors of {shown(vectors.path)}: find one with opsin curate calibrate, "
            "and give --threshold; only of a network declared as --copy-detector the paper's 0.6 is taken."
        )
    high = THRESHOLDS[0] if high is None else high
    return high, (min(high, THRESHOLDS[1]) if low is None else low)


def _kept(fates: _Fates, vectors: Table, folder: Path) -> Table:
    """A table aligned with the vectors that says which images are kept so far."""
    make_folder(folder)
    for i, part in enumerate(vectors.parts):
        kept = fates.why[part.first : part.first + part.rows] == KEPT
        write_part(folder / f"part-{i:08d}.parquet", pa.table({"kept": kept}))
    return Table(folder)


def _graph(
    engine: Engine, heaps: list[VectorSet], folder: Path, what: Search, settings: Dedup, images: Table | None
) -> list[Path]:
    """The neighbours in the folder, if they were found for the same vectors and images that count, or new ones."""
    rows = sum(heap.vectors.rows for heap in heaps)
    cells = cells_for(rows, settings.exact_below, settings.cells)
    what = what if cells else replace(what, probes=0)
    inputs = {str(i): heap.vectors for i, heap in enumerate(heaps)} | ({"images": images} if images else {})
    column = heaps[0].column
    made = {**asdict(what), "cells": cells, "column": column.name, "whiten": column.whitening is not None}
    made["perceptual"] = settings.perceptual and images is not None
    step = Step(folder, "neighbours", made, inputs)
    if not step.done:
        sorted_ = build_cells(engine, heaps, step.scratch / "cells", cells=cells)
        search(engine, sorted_, sorted_, folder, what)
        found = recall(engine, sorted_, found_files(folder), what, step.scratch) if cells else 1.0
        step.finish({"vectors": sorted_.count, "recall": found})
    return found_files(folder)


def _drop_near(
    fates: _Fates, near: list[Path], threshold: float, images: int, references: Mapping[str, Table], scratch: Path
) -> None:
    """Drop every component of images and references that holds a reference."""
    ends = np.cumsum([images, *(table.rows for table in references.values())])
    components = Components(scratch / "apart.npy", int(ends[-1]))
    for file in near:
        components.join(*edges(file, threshold)[:2])
    holds = np.full(int(ends[-1]), 0, np.uint8)  # of a component's first image: 1 + number of the set
    for start in range(images, int(ends[-1]), 1 << 20):
        numbers = np.arange(start, min(start + (1 << 20), int(ends[-1])))
        roots, first = np.unique(components.of(numbers), return_index=True)
        new = holds[roots] == 0
        holds[roots[new]] = np.searchsorted(ends, numbers[first[new]], side="right")
    for start in range(0, images, 1 << 20):
        numbers = start + np.flatnonzero(fates.why[start : start + (1 << 20)] == KEPT)
        held = holds[components.of(numbers)]
        fates.why[numbers[held > 0]] = len(REASONS) - 1 + held[held > 0]


def _check_credible(facts: dict[str, Any], settings: Dedup, step: Step, accept: bool) -> None:
    """Stop if the threshold joins what is not alike."""
    near = facts["dropped"].get("near-duplicate", 0)
    most, many = settings.largest * facts["images"], settings.dropped * facts["images"]
    wrong = []
    if facts["largest"] > max(FEW, most):
        wrong.append(f"one component holds {facts['largest']:,} of {facts['images']:,} images")
    if near > max(FEW, many):
        wrong.append(f"{near:,} of {facts['images']:,} images would be dropped as near-duplicates")
    if wrong and not accept:
        step.note(facts)
        raise TooManyError(
            f"with threshold {facts['threshold']:g} {' and '.join(wrong)}: look at the pairs around the threshold, and "
            "give a higher --threshold, or --accept if they are copies."
        )


def _write(
    step: Step,
    fates: _Fates,
    components: Components,
    representatives: Representatives,
    found: list[Path],
    vectors: Table,
    references: Mapping[str, Table],
    memory: int,
) -> None:
    """The parts that are missing, as many at a time as memory holds the neighbours of."""
    texts = np.array([*_texts(references), *[None] * (256 - len(_texts(references)))], object)
    missing = step.missing(len(vectors.parts))
    rows = [part.rows for part in vectors.parts]
    held = sum(file.stat().st_size for file in found) * 4 / max(1, vectors.rows)  # bytes of a row, unpacked
    for numbers in tasks_of(missing, rows, max(1, int(memory / (held + 256)))):
        first, last = vectors.parts[numbers[0]], vectors.parts[numbers[-1]]
        lists = rows_between(found, first.first, last.first + last.rows)
        for number in numbers:
            part = vectors.parts[number]
            images = np.arange(part.first, part.first + part.rows)
            why = fates.why[part.first : part.first + part.rows]
            near = lists.slice(part.first - first.first, part.rows)
            table = pa.table(
                {
                    "kept": why == KEPT,
                    "component": pa.array(components.of(images), mask=why == DROPPED_BEFORE),
                    "duplicate_of": pa.array(representatives.of(images), mask=why >= len(REASONS)),
                    "reason": pa.array(texts[why], pa.string()),
                    "neighbours": near["neighbours"],
                    "similarities": near["similarities"],
                }
            )
            write_part(step.part(number), table)
