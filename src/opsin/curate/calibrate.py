"""Find the cosine above which two images are copies, for vectors of any network, with copies that are planted for it.

Thresholds belong to a network: the paper's 0.6 joins nearly all images by vectors that were not made to tell copies
apart. So copies of some images of the heap are made (`opsin.curate.copies`), embedded like the heap, and looked for in
all of it. What comes near a copy and is not its original is a false match; the threshold is the lowest above which as
few of the matches are false as was asked for.

Copies that the heap holds already count as false too, so that the true precision is higher than the one that is stated.
On the other hand it is stated for one planted copy of every image: where copies are rare, false matches weigh more.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from opsin.curate.album import rows_of
from opsin.curate.cells import EXACT_BELOW, PROBES, VectorSet, build_cells, cells_for
from opsin.curate.copies import KINDS, copy_of
from opsin.curate.embed import Embed, embed, opened
from opsin.curate.embedders import FINER, NETWORK_SIZE
from opsin.curate.engine import Engine, Task
from opsin.curate.groups import Rows, smallest
from opsin.curate.ingest import Ingest, images_table, ingest
from opsin.curate.looks import eight_bits, picture, reduction_to, shrunk
from opsin.curate.neighbours import Search, edges, found_files, search
from opsin.curate.tables import LISTING, STEP, Step, Table, read, read_step
from opsin.curate.vectors import Column
from opsin.data.decode import DecodeError, decode_reduced, shown
from opsin.data.pipeline import prepared
from opsin.data.rng import Stream, uniform
from opsin.data.sources import Source
from opsin.errors import FINITE, SEEDS, OpsinError, unknown, within
from opsin.output import make_folder, write

Numbers = NDArray[np.int64]

NEIGHBOURS: Final = 16
"""Images of the heap that are looked at for a copy: more are near it only where no threshold could be precise."""
POINTS: Final = 200
"""Thresholds of the curve."""
ALIKE: Final = 10
"""Bits of 64 in which the perceptual hashes of copies differ at most (see benchmarks/RESULTS.md: no two photos did)."""
NOTE: Final = (
    "Copies that the heap held before and that perceptual hashes do not tell count as false matches, so the precision "
    "is a lower bound. It is that of one "
    "planted copy for every image: where copies are rarer, false matches weigh more."
)
"""How the precision is to be read."""

_TOGETHER: Final = 8  # images whose copies a task makes
_PART: Final = 256  # copies that are embedded together


@dataclass(frozen=True)
class Calibrate:
    """How a threshold is found."""

    sample: int = 200
    """Images of the heap, drawn at random, of which copies are made; all, if there are fewer."""
    kinds: tuple[str, ...] = KINDS
    """Kinds of copies (see `opsin.curate.copies`), one of each kind of every image."""
    precision: float = 0.98
    """Share of the matches above the threshold that are true."""
    reference_precision: float = 0.9
    """The same above the lower threshold against evaluation sets, where a false match costs an image and a missed one
    spoils a result."""
    seed: int = 0
    """Of what is random."""

    def __post_init__(self) -> None:
        precise = (0.5, 0.9999)  # one false match of very many cannot be told from none
        within(self, "", sample=(1, 1e6), precision=precise, reference_precision=precise, seed=SEEDS)
        if self.reference_precision > self.precision:
            raise OpsinError(
                f"reference_precision {self.reference_precision:g} is above precision {self.precision:g}: give a lower "
                "one, since the threshold against references is to be the milder."
            )
        if not self.kinds:
            raise OpsinError(f"kinds is empty: give some of {', '.join(KINDS)}.")
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind of copy", kind, KINDS)


@dataclass(frozen=True)
class Matches:
    """What came near planted copies, `[m]` each."""

    copy: Numbers
    """Which of the copies."""
    similarity: NDArray[np.float32]
    """Cosine with an image of the heap."""
    true: NDArray[np.bool_]
    """Whether that image is the copy's original, or a copy of it by content or perceptual hash."""

    def precision(self, above: float) -> float | None:
        """Share of the matches above a cosine that are true; None if there are none."""
        near = self.similarity > above
        return float(self.true[near].mean()) if near.any() else None

    def found(self, above: float) -> Numbers:
        """The copies whose original is found above a cosine."""
        return np.unique(self.copy[self.true & (self.similarity > above)])

    def threshold(self, precision: float) -> float | None:
        """The lowest cosine above which this share of the matches is true; None if there is none.

        It is measured on so many matches that one false one among them does not decide, 1 / (1 - precision) or more.
        So a single copy that the heap held before, which is as near as any match, does not rule all thresholds out.
        """
        cosines, share, enough = self._ranked(precision)
        good = np.flatnonzero((share >= precision) & enough)
        if not len(good):
            return None
        following = good[-1] + 1  # the next one is not above the threshold any more
        return float(cosines[following] if following < len(cosines) else np.nextafter(cosines[-1], np.float32(-2)))

    def best(self, precision: float) -> tuple[float, float] | None:
        """The highest share of true matches and the cosine from which on; of thresholds with enough matches above."""
        cosines, share, enough = self._ranked(precision)
        if not enough.any():
            return None
        at = int(np.flatnonzero(enough)[share[enough].argmax()])
        return float(share[at]), float(cosines[at])

    def _ranked(self, precision: float) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
        """All cosines, the highest first; the share of true matches from each on; and if these are enough matches."""
        order = np.argsort(-self.similarity, kind="stable")
        ranked = self.similarity[order]
        last = np.flatnonzero(np.diff(ranked, append=np.float32(-np.inf)))  # equal ones are above a threshold together
        count = last + 1
        share = np.cumsum(self.true[order])[last] / count
        return ranked[last], share, count * (1 - precision) >= 1 - 1e-9


def calibrate(
    engine: Engine,
    images: Table,
    vectors: Table,
    out: Path,
    settings: Calibrate,
    *,
    column: Column,
    modules: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """Find thresholds for the vectors of a heap.

    Args:
        engine: where it runs.
        images: the folder that ingest wrote.
        vectors: the folder that embedding wrote of these images.
        out: folder of the step; what is there of the same calibration is not done again.
        settings: see `Calibrate`.
        column: which vectors, and how they are whitened.
        modules: as `embed` had them.

    Returns:
        `threshold` and `reference_threshold`; `precision`, `recall` and `recall_by_kind` above the first (the recall is
        the share of copies whose original is found); `false_matches` per copy above it; `curve` (lists `threshold`,
        `precision`, `recall`; a precision is None where there are no matches); `images`, `copies`, `lost` (images that
        could not be read any more), `column`, `whitened`, `note` and `seconds`.

    Raises:
        OpsinError: no threshold is as precise as asked for, the tables are not of ingest and embedding or not of the
            same images, the network has changed, or all images have.
    """
    said = _embedding(vectors, column)
    images.aligned(vectors)
    whitened = column.whitening is not None
    made = {**asdict(settings), "column": column.name, "whitened": whitened}
    step = Step(out, "calibrate", made, {"images": images, "vectors": vectors})
    if step.done:
        return step.facts
    began, scratch = monotonic(), step.scratch
    lost = _plant(engine, images, vectors, said, settings, scratch)
    ingest(
        engine,
        [str(scratch / "copies")],
        scratch / "images",
        Ingest(part=_PART, min_side=1, max_aspect=FINITE, min_spread=0),
    )
    copies = images_table(scratch / "images")
    like_heap = Embed(**{field.name: said[field.name] for field in fields(Embed)})
    told = embed(engine, copies, scratch / "vectors", like_heap, modules)
    if told["fingerprints"] != said["fingerprints"]:
        raise OpsinError(
            f"the network of {shown(vectors.path)} is not what it was when the heap was embedded: put it back, or "
            f"remove that folder and {shown(out)} and embed anew."
        )
    kinds, matches = _matches(engine, images, vectors, copies, column, scratch)
    threshold, reference = (_threshold(matches, share) for share in (settings.precision, settings.reference_precision))
    found = matches.found(threshold)
    false = int((~matches.true & (matches.similarity > threshold)).sum())
    facts = {
        "threshold": threshold,
        "reference_threshold": reference,
        "precision": matches.precision(threshold),
        "recall": len(found) / len(kinds),
        "recall_by_kind": {
            kind: float((kinds[found] == kind).sum() / (kinds == kind).sum()) for kind in settings.kinds
        },
        "false_matches": false / len(kinds),
        "curve": _curve(matches, len(kinds)),
        "images": len(kinds) // len(settings.kinds),
        "copies": len(kinds),
        "lost": lost,
        "column": column.name,
        "whitened": whitened,
        "note": NOTE,
    }
    return step.finish(facts | {"seconds": round(monotonic() - began, 1)})


def _embedding(vectors: Table, column: Column) -> dict[str, Any]:
    """The settings that the heap was embedded with."""
    made = read_step(vectors.path) if (vectors.path / STEP).exists() else {}
    if made.get("step") != "embed":
        raise OpsinError(
            f"{shown(vectors.path)} does not say which network its vectors are of, so copies cannot be embedded alike: "
            "give the folder that `opsin curate embed` wrote."
        )
    vectors.require(column.name)
    settings: dict[str, Any] = made["settings"]
    return settings


def _plant(
    engine: Engine, images: Table, vectors: Table, said: Mapping[str, Any], settings: Calibrate, scratch: Path
) -> int:
    """Write copies into `scratch/copies`, named by the number of their original and their kind; how many are lost."""

    def drawn() -> Iterator[Rows]:
        for part, seen in zip(images.parts, vectors.parts, strict=True):
            dropped = (read(some, ["reason"])["reason"].is_valid().to_numpy() for some in (part, seen))
            numbers = part.first + np.flatnonzero(~np.logical_or(*dropped))
            keys = uniform(settings.seed, Stream.CURATION, numbers, 1)[:, 0]
            yield np.zeros(len(numbers), np.int64), keys, numbers

    folder, done = make_folder(scratch / "copies"), make_folder(scratch / "planted")
    numbers = smallest(drawn, np.array([settings.sample]), engine.bytes // 2).tolist()
    groups = [numbers[start : start + _TOGETHER] for start in range(0, len(numbers), _TOGETHER)]
    tasks = [{"numbers": group, "file": str(done / f"{group[0]}.json")} for group in groups]
    # Large enough that a copy of a part of the image has the pixels that the networks take.
    side = FINER * max(NETWORK_SIZE, said["size"] or 0, said["copies_size"] or 0)
    work = _Plant(images, folder, settings, side)
    left = [task for task in tasks if not Path(task["file"]).exists()]
    _sources(images)  # before tasks of this process open them at once
    for _ in engine.run("planting copies", work, left, total=sum(len(task["numbers"]) for task in left)):
        pass
    lost = sum(int(json.loads(Path(task["file"]).read_text())["lost"]) for task in tasks)
    if lost == len(numbers):
        raise OpsinError(
            f"none of {lost:,} images of {shown(images.path)} can be read any more, or they have changed: put them "
            f"back, remove {shown(scratch.parent)}, and give the command again."
        )
    return lost


def _sources(images: Table) -> list[tuple[Source, dict[str, int] | None]]:
    """Where the heap's images are now, see `opened`."""
    told = read_step(images.path)["facts"]["sources"]
    return [opened(one["spec"], one["fingerprint"], images.path.absolute() / LISTING) for one in told]


@dataclass(frozen=True)
class _Plant:
    """Task: write copies of some images, without loss, and then how many images are lost."""

    images: Table
    folder: Path
    settings: Calibrate
    side: int

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        rows = rows_of(self.images, task["numbers"], ["source", "index", "path", "hash", "width", "height"])
        sources = _sources(self.images)

        def planted(number: int) -> bool:
            return self._planted(number, rows[number], *sources[rows[number]["source"]])

        with closing(prepared(planted, [list(rows)], workers=engine.threads, ahead=1)) as ready:
            lost = sum(not there for some in ready for there in some)
        write(Path(task["file"]), json.dumps({"lost": lost}))
        return {"done": len(rows)}

    def _planted(self, number: int, row: Mapping[str, Any], source: Source, moved: Mapping[str, int] | None) -> bool:
        """Write the copies of an image, and say if it was there as it was ingested."""
        index = row["index"] if moved is None else moved.get(row["path"])
        if index is None:
            return False
        try:
            found = source.open(index)
            content = found if isinstance(found, bytes) else found.read_bytes()
            if hashlib.sha256(content).digest() != row["hash"]:
                return False
            reduction: Callable[[int, int], int] = partial(reduction_to, self.side)
            pixels, _ = decode_reduced(content, reduction, max_pixels=row["width"] * row["height"])
        except (DecodeError, OSError):
            return False
        original = shrunk(eight_bits(pixels), self.side)
        for kind in self.settings.kinds:
            file = self.folder / f"{number:012d}-{kind}.png"
            partial_file = file.with_suffix(".partial")
            copy = picture(copy_of(original, kind, self.settings.seed, number))
            copy.save(partial_file, "PNG", compress_level=1)
            partial_file.replace(file)
        return True


def _matches(
    engine: Engine, images: Table, vectors: Table, copies: Table, column: Column, scratch: Path
) -> tuple[NDArray[np.str_], Matches]:
    """The kinds of all copies, `[copies]`, and what came near them."""
    cells = cells_for(vectors.rows, EXACT_BELOW, None)
    heap = build_cells(engine, [VectorSet(vectors, column)], scratch / "heap", cells=cells)
    of_copies = [VectorSet(Table(scratch / "vectors"), column)]
    queries = build_cells(engine, of_copies, scratch / "queries", cells=0, like=heap)
    search(engine, queries, heap, scratch / "found", Search(NEIGHBOURS, -1.0, PROBES if cells else 0))
    pairs = [edges(file, -math.inf) for file in found_files(scratch / "found")]
    copy, near, similarity = (np.concatenate(some) for some in zip(*pairs, strict=True))
    names = [Path(name).stem for part in copies.parts for name in read(part, ["path"])["path"].to_pylist()]
    originals = np.array([int(name.partition("-")[0]) for name in names])
    looks = _looks(images, {*near.tolist(), *originals.tolist()})
    pairs_of = zip(originals[copy].tolist(), near.tolist(), strict=True)
    true = np.fromiter((_same(looks[a], looks[b]) for a, b in pairs_of), np.bool_)
    return np.array([name.partition("-")[2] for name in names]), Matches(copy, similarity, true)


def _same(a: tuple[bytes, int], b: tuple[bytes, int]) -> bool:
    """Whether two images, told by `_looks`, are one: a heap holds copies, and meeting one is no mistake."""
    return a[0] == b[0] or (a[1] ^ b[1]).bit_count() <= ALIKE


def _looks(images: Table, numbers: Iterable[int]) -> dict[int, tuple[bytes, int]]:
    """Hash of the content and perceptual hash of each image."""
    rows = rows_of(images, numbers, ["hash", "phash"])
    return {number: (row["hash"], row["phash"]) for number, row in rows.items()}


def _threshold(matches: Matches, precision: float) -> float:
    found = matches.threshold(precision)
    if found is not None:
        return found
    best = matches.best(precision)
    if best is None:
        raise OpsinError(
            f"{len(matches.true):,} matches of copies are too few to tell a precision of {precision:g}: give more "
            "images, or ask for less precision."
        )
    raise OpsinError(
        f"no threshold has a precision of {precision:g}: the best is {best[0]:.3f}, at {best[1]:.3f}: ask for less, "
        "or embed with a network for copy detection (`opsin curate fit-copies` trains one)."
    )


def _curve(matches: Matches, copies: int) -> dict[str, list[float | None]]:
    """Precision and recall above thresholds from the lowest to the highest cosine."""
    cosines = np.linspace(matches.similarity.min(), matches.similarity.max(), POINTS).tolist()
    return {
        "threshold": cosines,
        "precision": [matches.precision(above) for above in cosines],
        "recall": [len(matches.found(above)) / copies for above in cosines],
    }
