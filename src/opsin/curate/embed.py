"""Vectors of every kept image: one decode, one or two networks, part by part."""

import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from opsin.backbone.features import PRECISIONS
from opsin.curate.embedders import BackboneEmbedder, Embedder, HeadEmbedder, load_embedder
from opsin.curate.engine import Engine, Task
from opsin.curate.heap import kind_of
from opsin.curate.looks import eight_bits
from opsin.curate.tables import LISTING, Part, Step, Table, read, read_step, write_part
from opsin.curate.vectors import vector_array
from opsin.data.decode import DecodeError, decode_reduced, shown, why
from opsin.data.pipeline import prepared
from opsin.data.sources import Source, scan
from opsin.errors import OpsinError, unknown, within

VANISHED: Final = "vanished"
"""Reason of an image whose file is gone since it was ingested."""
UNREADABLE: Final = "not readable any more"
"""Reason, followed by the system's or the decoder's, of an image that was readable when it was ingested."""
CHANGED: Final = "changed since it was ingested"
"""Reason of an image whose file has another content than the one that was ingested."""

_READ: Final = ("source", "index", "path", "hash", "width", "height", "reason")  # of the images table


@dataclass(frozen=True)
class Embed:
    """How vectors are computed."""

    weights: str
    """The network whose vectors say what an image shows: a backbone, or another network (see `curate.embedders`)."""
    model: str | None = None
    """Architecture of the backbone, where its file does not name it."""
    size: int | None = None
    """Side of the square that images are resized to; None for 224, or 288 for networks of others."""
    copies: str | None = None
    """A network for copy detection: a head of fit-copies, or another network; None for none."""
    copies_size: int | None = None
    """The same as `size` for `copies`; None for the size that a head was trained at, or 288."""
    copy_detector: bool = False
    """Whether a network of others given as `copies` is one for copy detection, so that the paper's thresholds hold;
    otherwise they are calibrated, as they are for a head of fit-copies."""
    batch: int = 64
    """Images per forward."""
    precision: str | None = None
    """Of backbones: `fp32`, `bf16` or `fp16`; None for bf16 on CUDA and fp32 elsewhere."""

    def __post_init__(self) -> None:
        sizes = {name: (8, 8192) for name in ("size", "copies_size") if getattr(self, name) is not None}
        within(self, "", batch=(1, 65536), **sizes)
        if self.precision is not None and self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.copies is None and (self.copies_size is not None or self.copy_detector):
            raise OpsinError("copies_size and copy_detector say more about the network in copies: give that too.")


class Networks:
    """The one or two networks of a step, and their vectors of an image that is decoded once."""

    def __init__(self, settings: Embed, device: str, modules: Mapping[str, nn.Module]) -> None:
        """Load them.

        Raises:
            OpsinError: see `load_embedder`.
        """
        self.semantic = load_embedder(
            modules.get(settings.weights, settings.weights),
            settings.model,
            device,
            size=settings.size,
            precision=settings.precision,
        )
        self.copies: Embedder | None = None
        if settings.copies is not None:
            self.copies = load_embedder(
                modules.get(settings.copies, settings.copies),
                settings.model,
                device,
                size=settings.copies_size,
                precision=settings.precision,
                copy_detector=settings.copy_detector,
                backbone=self.semantic if isinstance(self.semantic, BackboneEmbedder) else None,
            )

    @property
    def all(self) -> list[Embedder]:
        """The networks, for the columns `semantic` and, if there is one, `copies`."""
        return [self.semantic] if self.copies is None else [self.semantic, self.copies]

    def reduction(self, height: int, width: int) -> int:
        """See `Embedder.reduction`: what suits all."""
        return min(network.reduction(height, width) for network in self.all)

    def prepare(self, pixels: Tensor) -> list[Tensor]:
        """The squares that the networks take: one for each size."""
        return [network.prepare(pixels) for network in {network.size: network for network in self.all}.values()]

    @torch.no_grad()
    def __call__(self, images: list[list[Tensor]]) -> list[Tensor]:
        """Vectors `[B, D]` of prepared images for every network, on the host; a shared backbone runs once."""
        squares = (torch.stack(batch) for batch in zip(*images, strict=True))
        batches = {batch.shape[-1]: batch for batch in squares}
        batch = batches[self.semantic.size]
        head = self.copies
        if isinstance(head, HeadEmbedder) and head.backbone is self.semantic:
            layers = head.about.layers
            *features, last = head.backbone.features(batch, (*layers, -1))
            vectors = [last.cls.float(), head.of(features)]
        else:
            vectors = [network(batches[network.size]) for network in self.all]
        return [found.cpu() for found in vectors]


def embed(
    engine: Engine, images: Table, out: Path, settings: Embed, modules: Mapping[str, nn.Module] | None = None
) -> dict[str, Any]:
    """Write the vectors of the images that ingest kept: a table with one row per image.

    Columns: `semantic` and, with `settings.copies`, `copies` (lists of fp16, null without a vector), and `reason`:
    null, or why an image that was kept has no vector.

    Args:
        engine: where it runs.
        images: the table of ingest.
        out: folder of the table; a stopped step goes on, a finished one is left as it is.
        settings: see `Embed`.
        modules: networks from Python, by the names that `settings` gives in place of paths.

    Returns:
        Facts: `images`, `embedded`, `width`, `copies_width` (None without), `copy_detector`,
        `copies_threshold` (the cosine that fit-copies measured for its head, or None), `fingerprints` of the networks,
        `seconds` (since the last start) and `reasons` (number of images by reason).

    Raises:
        OpsinError: a network cannot be loaded or gives what are no vectors, a source is gone, `images` is no table of
            ingest, or `out` was made with other settings or networks.
    """
    images.require(*_READ)
    loader = _Loader(settings, engine.device, dict(modules or {}))
    networks = loader.networks
    made = {**asdict(settings), "fingerprints": [network.fingerprint for network in networks.all]}
    step = Step(out, "embed", made, {"images": images})
    if step.done:
        return step.facts
    began = time.perf_counter()
    missing = [images.parts[number] for number in step.missing(len(images.parts))]
    tasks = [
        {"file": str(part.file.absolute()), "group": part.group, "first": part.first, "rows": part.rows}
        | {"out": str(step.part(images.parts.index(part)).absolute())}
        for part in missing
    ]
    sources = tuple((about["spec"], about["fingerprint"]) for about in read_step(images.path)["facts"]["sources"])
    work = _Work(loader, sources, images.path.absolute() / LISTING)
    for _ in engine.run("embedding", work, tasks, total=sum(part.rows for part in missing)):
        pass
    embedded, reasons = 0, Counter[str]()
    for number, part in enumerate(images.parts):
        table = read(Part(step.part(number), 0, part.first, part.rows), ["semantic", "reason"])
        embedded += part.rows - table["semantic"].null_count
        reasons.update(kind_of(reason) for reason in table["reason"].drop_null().to_pylist())
    if not embedded:
        raise OpsinError(
            f"none of the {images.rows:,} images of {shown(images.path)} could be embedded ({dict(reasons)}): put the "
            f"files back, remove {shown(step.folder)}, and give the command again."
        )
    return step.finish(
        {
            "images": images.rows,
            "embedded": embedded,
            "width": networks.semantic.width,
            "copies_width": None if networks.copies is None else networks.copies.width,
            "copy_detector": networks.copies is not None and networks.copies.copy_detector,
            "copies_threshold": networks.copies.about.threshold if isinstance(networks.copies, HeadEmbedder) else None,
            "fingerprints": made["fingerprints"],
            "seconds": round(time.perf_counter() - began, 3),
            "reasons": dict(reasons.most_common()),
        }
    )


class _Loader:
    """Networks, loaded once in a process; only what they are loaded from is sent to workers."""

    def __init__(self, settings: Embed, device: str, modules: dict[str, nn.Module]) -> None:
        self.settings, self.device, self.modules = settings, device, modules

    @cached_property
    def networks(self) -> Networks:
        return _loaded(self.settings, self.device) if not self.modules else self._new()

    def _new(self) -> Networks:
        return Networks(self.settings, self.device, self.modules)

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "device": self.device, "modules": self.modules}


@lru_cache(maxsize=1)
def _loaded(settings: Embed, device: str) -> Networks:
    return Networks(settings, device, {})


@dataclass(frozen=True)
class _Work:
    """Embeds the images of one part."""

    loader: _Loader
    sources: tuple[tuple[str, str], ...]
    listing: Path

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        part = Part(Path(task["file"]), task["group"], task["first"], task["rows"])
        rows = read(part, _READ).to_pylist()
        networks, batch = self.loader.networks, self.loader.settings.batch
        kept = [i for i, row in enumerate(rows) if row["reason"] is None]
        batches = [kept[start : start + batch] for start in range(0, len(kept), batch)]
        reasons: list[str | None] = [None] * len(rows)
        found: list[list[Tensor]] = [[torch.empty(0, network.width)] for network in networks.all]
        there: list[int] = []

        def prepare(i: int) -> list[Tensor] | str:
            return self._prepare(networks, rows[i])

        ahead = 1 + engine.threads // batch
        with closing(prepared(prepare, batches, workers=engine.threads, ahead=ahead)) as ready:
            for numbers, images in zip(batches, ready, strict=True):
                good = [(i, image) for i, image in zip(numbers, images, strict=True) if not isinstance(image, str)]
                for i, image in zip(numbers, images, strict=True):
                    reasons[i] = image if isinstance(image, str) else None
                if not good:
                    continue
                for column, vectors in zip(found, networks([image for _, image in good]), strict=True):
                    column.append(_checked(vectors, [rows[i]["path"] for i, _ in good]))
                there += [i for i, _ in good]
        at = np.array(there, dtype=np.int64)
        columns = [vector_array(torch.cat(column), at, len(rows)) for column in found]
        names = ["semantic", "copies"][: len(columns)]
        write_part(Path(task["out"]), pa.table([*columns, pa.array(reasons, pa.string())], [*names, "reason"]))
        return {"done": len(rows)}

    def _prepare(self, networks: Networks, row: dict[str, Any]) -> list[Tensor] | str:
        """What the networks take of an image, or why it cannot be had."""
        spec, fingerprint = self.sources[row["source"]]
        source, moved = opened(spec, fingerprint, self.listing)
        index = row["index"] if moved is None else moved.get(row["path"])
        if index is None:
            return VANISHED
        try:
            found = source.open(index)
            content = found if isinstance(found, bytes) else found.read_bytes()
            if hashlib.sha256(content).digest() != row["hash"]:
                return CHANGED
            pixels, _ = decode_reduced(content, networks.reduction, max_pixels=row["width"] * row["height"])
        except (DecodeError, OSError) as error:
            reason = error.reason if isinstance(error, DecodeError) else why(error)
            return VANISHED if reason == why(FileNotFoundError()) else f"{UNREADABLE}: {reason}"
        return networks.prepare(eight_bits(pixels))


def _checked(vectors: Tensor, paths: list[str]) -> Tensor:
    """The vectors, in fp16 and finite there."""
    halves = vectors.half()
    bad = ~halves.isfinite().all(1)
    if bad.any():
        raise OpsinError(
            f"the vector of {paths[int(bad.nonzero()[0])]} is not finite in fp16: the weights are damaged, or the "
            "activations overflow: give other weights, or precision fp32."
        )
    return halves


@lru_cache(maxsize=64)
def opened(spec: str, fingerprint: str, listing: Path) -> tuple[Source, dict[str, int] | None]:
    """A source and, if files were added, removed or changed since it was ingested, where its images are now.

    Args:
        spec: of the source.
        fingerprint: that it had.
        listing: folder that keeps its listing.

    Returns:
        The source, and None if it is as it was; otherwise the index of every image by its path as the table of images
        has it.

    Raises:
        OpsinError: see `scan`.
    """
    source = scan(spec, listing, progress=False)
    if source.fingerprint == fingerprint:
        return source, None
    return source, {shown(source.place(index)): index for index in range(len(source))}
