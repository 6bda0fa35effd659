"""Ingest: one row for every image of the heap, with its hash, size and looks, and a reason if it is dropped.

Every image is opened once. What is decided here needs the image alone; duplicates are found later.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from torch import Tensor

from opsin.curate.engine import Engine, Task
from opsin.curate.fetch import is_urls
from opsin.curate.heap import Heap, kind_of
from opsin.curate.hooks import call_hook, load_hook
from opsin.curate.looks import CANONICAL, eight_bits, looks, reduction_to, shrunk
from opsin.curate.tables import LISTING, Part, Step, Table, read, write_part
from opsin.data.decode import DecodeError, Header, decode_reduced, header, shown, why
from opsin.data.pipeline import prepared
from opsin.errors import FINITE, OpsinError, within

HOOK_SIDE: Final = 256
"""Shorter side in pixels of what a drop hook is given; smaller images stay as they are."""
BATCH: Final = 64
"""Images that a drop hook is given at once."""

SCHEMA: Final = pa.schema(
    [
        ("source", pa.int32()),
        ("index", pa.int64()),
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("hash", pa.binary(32)),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sharpness", pa.float32()),
        ("phash", pa.uint64()),
        ("reason", pa.string()),
    ]
)
"""Columns of the images table; what could not be measured of a dropped image is null."""


@dataclass(frozen=True)
class Ingest:
    """Which images of the heap are worth keeping, each judged alone."""

    part: int = 4096
    """Images in a part of every table: what an interruption can cost, and the piece that a worker takes."""
    min_side: int = 32
    """Shorter side in pixels below which an image is dropped."""
    max_aspect: float = 4.0
    """Longer side over shorter side above which an image is dropped."""
    min_spread: float = 4.0
    """Standard deviation of the luma, of 0 … 255, below which an image is dropped as near-constant."""
    min_sharpness: float = 0.0
    """Variance of the Laplacian (see `Looks.sharpness`) below which an image is dropped as blurred; 0 drops none."""
    drop_hook: str | None = None
    """`module:function`, a filter of your own, called as `function(images: list[Tensor]) -> list[str | None]`: images
    in uint8 `[3, H, W]`, shorter side 256 or less; returns for each a reason to drop it, or None. What follows a colon
    in a reason is not counted apart."""
    max_pixels: int = 200_000_000
    """Images that declare more count as unreadable, and are not decoded."""

    def __post_init__(self) -> None:
        within(self, "", part=(1, 1e7))
        within(
            self,
            "",
            min_side=(1, 1e6),
            max_aspect=(1, FINITE),
            min_spread=(0, 127.5),
            min_sharpness=(0, FINITE),
            max_pixels=(1, FINITE),
        )


_Row = dict[str, Any]  # by column


def ingest(engine: Engine, data: Sequence[str], out: Path, settings: Ingest) -> dict[str, Any]:
    """Write the images table of all images of `data`, part by part.

    Args:
        engine: where it runs.
        data: sources as `opsin.data.sources.scan` takes them, one after the other.
        out: folder of the table.
        settings: see `Ingest`.

    Returns:
        `sources` (spec, fingerprint, images of each), `images`, `kept`, `reasons` (number of images by reason) and
        `left_out` (folders and shards that could not be read at all, each with the reason).

    Raises:
        OpsinError: there are no images, none is kept, a source changed meanwhile, the hook is no such function, or the
            folder holds another ingest.
    """
    for spec in data:
        if is_urls(spec):
            raise OpsinError(f"{shown(spec)} lists URLs: fetch the images first, and give the folder they come into.")
    if settings.drop_hook is not None:
        load_hook(settings.drop_hook)
    heap, sources = Heap.scanned(data, Path(out).absolute() / LISTING)
    step = Step(out, "ingest", asdict(settings) | {"sources": heap.facts()})
    if step.done:
        return step.facts
    parts = range(-(-len(heap) // settings.part))
    missing = step.missing(len(parts))
    tasks = [{"part": number, "file": str(step.part(number).absolute())} for number in missing]
    todo = sum(min(settings.part, len(heap) - number * settings.part) for number in missing)
    for _ in engine.run("reading images", _Look(heap, settings), tasks, total=todo):
        pass
    reasons = Counter(
        reason
        for number, path in enumerate(map(step.part, parts))
        for reason in read(Part(path, 0, number * settings.part, 0), ["reason"])["reason"].to_pylist()
    )
    kept = reasons.pop(None, 0)
    counts = Counter[str]()
    for reason, count in reasons.items():
        counts[kind_of(reason)] += count
    if not kept:
        reason, count = counts.most_common(1)[0]
        raise OpsinError(
            f"all {len(heap):,} images are dropped, {count:,} of them as '{reason}' ({shown(step.folder)} lists all): "
            "give other images, or milder limits and another --out."
        )
    left_out = [[shown(f"{source.root}/{place}"), reason] for source in sources for place, reason in source.unreadable]
    facts = {"sources": heap.facts(), "images": len(heap), "kept": kept, "reasons": dict(counts.most_common())}
    return step.finish(facts | {"left_out": left_out})


def images_table(out: Path) -> Table:
    """The images table that `ingest` finished in `out`.

    Raises:
        OpsinError: there is none, or it is not finished.
    """
    table = Table(out)
    table.require(*SCHEMA.names)
    return table


@dataclass(frozen=True)
class _Look:
    """Writes one part."""

    heap: Heap
    settings: Ingest

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        first = task["part"] * self.settings.part
        numbers = range(first, min(first + self.settings.part, len(self.heap)))
        batches = [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]
        rows: list[_Row] = []
        ahead = 1 + engine.threads // BATCH
        with closing(prepared(self._look, batches, workers=engine.threads, ahead=ahead)) as ready:
            for found in ready:
                self._ask([(row, image) for row, image in found if image is not None])
                rows += [row for row, _ in found]
        write_part(Path(task["file"]), pa.Table.from_pylist(rows, SCHEMA))
        return {"done": len(rows)}

    def _look(self, number: int) -> tuple[_Row, Tensor | None]:
        """The row of an image, and the image for the hook, if it is to judge it."""
        settings, (place, index) = self.settings, self.heap.at(number)
        source = self.heap.source(place)
        row = dict.fromkeys(SCHEMA.names) | {"source": place, "index": index, "path": shown(source.place(index))}
        side = CANONICAL if settings.drop_hook is None else HOOK_SIDE
        try:
            found = source.open(index)
            content = found if isinstance(found, bytes) else found.read_bytes()
            row |= {"bytes": len(content), "hash": hashlib.sha256(content).digest()}
            about = header(content)
            if about.width * about.height > settings.max_pixels:
                raise DecodeError(None, f"it declares {about.width}×{about.height} pixels, more than max_pixels")
            row |= about._asdict() | {"reason": self._shape(about)}
            if row["reason"] is not None:
                return row, None
            pixels, _ = decode_reduced(content, partial(reduction_to, side), max_pixels=settings.max_pixels)
        except (DecodeError, OSError) as error:
            reason = error.reason if isinstance(error, DecodeError) else why(error)
            return row | {"reason": f"unreadable: {reason}"}, None
        pixels = eight_bits(pixels)
        seen = looks(pixels)
        row |= {"sharpness": seen.sharpness, "phash": seen.hash}
        if seen.spread < settings.min_spread:
            row["reason"] = "near-constant"
        elif seen.sharpness < settings.min_sharpness:
            row["reason"] = "blurred"
        asked = settings.drop_hook is not None and row["reason"] is None
        return row, shrunk(pixels, HOOK_SIDE) if asked else None

    def _shape(self, about: Header) -> str | None:
        short, long = sorted((about.width, about.height))
        if short < self.settings.min_side:
            return f"smaller than {self.settings.min_side} pixels"
        if long > self.settings.max_aspect * short:
            return f"longer side more than {self.settings.max_aspect:g} times the shorter"
        return None

    def _ask(self, asked: list[tuple[_Row, Tensor]]) -> None:
        """Set the reasons that the hook gives."""
        name = self.settings.drop_hook
        if name is None or not asked:
            return
        answers = call_hook(name, [image for _, image in asked], f"{len(asked)} images from {asked[0][0]['path']} on")
        if not isinstance(answers, list | tuple) or len(answers) != len(asked):
            length = f" of {len(answers)}" if isinstance(answers, list | tuple) else ""
            raise OpsinError(
                f"the hook '{name}' was given {len(asked)} images and returned a {type(answers).__name__}{length}: "
                "return a list with a reason or None for each."
            )
        for (row, _), answer in zip(asked, answers, strict=True):
            if answer is not None and (not isinstance(answer, str) or not answer.strip()):
                raise OpsinError(
                    f"the hook '{name}' returned {answer!r} for {row['path']}: return a reason as text, or None."
                )
            row["reason"] = answer
