"""Train a head for copy detection over a frozen backbone, on the user's own images.

Copies of every image are made and the backbone looks at them once; the head is then trained on what it said, which
takes minutes on a processor. As in SSCD (Pizzi et al. 2022) the loss is contrastive across the batch plus an entropy
term that spreads different images apart; unlike there, the backbone is frozen: it is a weaker copy detector than a
network trained as a whole, and costs a head.

Features lie in `OUT.features/` until the head is written: an interrupted fit goes on with the missing parts.
"""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from opsin.backbone.koleo import koleo
from opsin.curate.copies import KINDS, copy_of, measure
from opsin.curate.embedders import FINER, BackboneEmbedder, load_embedder
from opsin.curate.heads import About, CopyHead, save_head, tokens
from opsin.curate.looks import eight_bits, reduction_to, shrunk
from opsin.data.decode import DecodeError, decode_reduced, shown
from opsin.data.pipeline import prepared
from opsin.data.rng import Integers, Stream, permutation
from opsin.data.sources import Source, scan
from opsin.errors import FINITE, OpsinError, within
from opsin.output import make_folder, write

PART: Final = 128
"""Images in a part of the features: what an interruption can cost."""
FEWEST: Final = 64
"""Readable images below which no head is trained."""
MEASURED: Final = 2000
"""Held-out images that are measured with, at most: their pairs fit into memory."""
SMALLEST: Final = 1e-4
"""Directions whose variance is below this share of the largest are left out: whitened, they would be noise."""
SHRINKAGE: Final = 0.1
"""Share of an even spread in how copies differ: so few images do not show all that copies can do."""


@dataclass(frozen=True)
class FitCopies:
    """How a head for copy detection is trained."""

    images: int = 20_000
    """Images that are used, evenly spread over the data; all if there are fewer."""
    views: int = 8
    """Copies of every image, beside the image itself: every second one is strong, the others are of all kinds."""
    held_out: float = 0.1
    """Share of the images that are not trained on but measured with."""
    precision: float = 0.98
    """Share of copies among held-out pairs above the threshold that is written into the head."""
    size: int = 224
    """Side of the square that images are resized to; the head works at this size."""
    layers: tuple[int, ...] | None = None
    """Blocks whose tokens are read, counted from the end, -1 is the last; None for that one and those at five and eight
    twelfths of the depth: copies are told by what earlier blocks still know of texture and place."""
    width: int = 256
    """Dimensions of the head's vectors."""
    hidden: int = 512
    """Width of the head's hidden layer."""
    steps: int = 1000
    """Steps of the training."""
    batch: int = 256
    """Images of a step, each with two of its views."""
    rate: float = 1e-4
    """Peak learning rate of AdamW; it rises over the first twentieth and falls to zero as a cosine."""
    decay: float = 0.05
    """Weight decay."""
    temperature: float = 0.05
    """Cosines are divided by it in the contrastive loss."""
    koleo: float = 0.1
    """Weight of the term that spreads images apart (`opsin.backbone.koleo`)."""
    seed: int = 0
    """Of all random choices."""

    def __post_init__(self) -> None:
        within(
            self,
            "",
            images=(FEWEST, FINITE),
            views=(1, 64),
            held_out=(0.01, 0.9),
            precision=(0.01, 1),
            size=(8, 8192),
            width=(2, 65536),
            hidden=(1, 65536),
            steps=(1, FINITE),
            batch=(2, 65536),
            rate=(1e-9, 10),
            decay=(0, 10),
            temperature=(1e-3, 10),
            koleo=(0, 100),
        )
        layers = self.layers
        if layers is not None and (not layers or max(layers) >= 0 or len({*layers}) != len(layers)):
            raise OpsinError(f"layers is {layers}: give different blocks, counted from the end: -1 is the last.")

    def blocks(self, depth: int) -> tuple[int, ...]:
        """The layers of a backbone with so many blocks, the first of them first."""
        layers = self.layers or {-max(1, depth * 7 // 12), -max(1, depth // 3), -1}
        return tuple(sorted(layers))


Advance = Callable[[int], object]


def fit_copies(
    data: str,
    weights: str,
    model: str | None,
    out: Path,
    settings: FitCopies,
    *,
    device: str = "cpu",
    workers: int = 2,
    advance: Advance = lambda _: None,
) -> dict[str, Any]:
    """Train a head over the backbone in `weights` and write it to `out`.

    Args:
        data: images, as `opsin.data.sources.scan` takes them.
        weights: the backbone.
        model: its architecture, where the file does not name it.
        out: the head's file, safetensors.
        settings: see `FitCopies`.
        device: where the backbone and the head compute.
        workers: threads that decode images and make copies.
        advance: called with a number of images as their features are done.

    Returns:
        `images`, `held_out` (numbers of them), `loss` (first and last, averaged over a twentieth of the steps), and
        what `measure` gives on held-out images for: `class_token`, the backbone's own vectors; `whitened`, the same
        PCA whitened; `untrained`, the head before its first step; `head`.

    Raises:
        OpsinError: too few images, no backbone, other settings than those that `out` was begun with, or the disk is
            full.
    """
    out = Path(out)
    if out.is_dir() or not out.name:
        raise OpsinError(f"--out {shown(out)} is a folder: give the name of a .safetensors file.")
    backbone = load_embedder(weights, model, device, size=settings.size)
    if not isinstance(backbone, BackboneEmbedder):
        raise OpsinError(f"{shown(weights)} is no backbone: a head is trained over one; give its weights.")
    parts = make_folder(out.with_name(out.name + ".features"))
    layers = settings.blocks(backbone.extractor.backbone.arch.depth)
    source = scan(data, parts / "listing", progress=False)
    count = min(settings.images, len(source))
    chosen = [number * len(source) // count for number in range(count)]
    _begin(parts, settings, layers, backbone, source)
    for start in range(0, count, PART):
        if not (parts / f"{start:08d}.npy").exists():
            _write_features(parts, start, chosen[start : start + PART], source, backbone, layers, settings, workers)
        advance(min(PART, count - start))
    features = _Features(parts, settings, backbone.width)
    if len(features.rows) < FEWEST:
        raise OpsinError(
            f"only {len(features.rows)} of {count:,} images in {shown(data)} are readable, and a head needs {FEWEST} "
            "or more: give more images."
        )
    torch.manual_seed(settings.seed)
    head = _untrained(features, settings).to(device)
    found = {
        "class_token": _measured(features, features.class_token, settings),
        "whitened": _measured(features, _whitened(features), settings),
        "untrained": _measured(features, head, settings),
    }
    loss = _train(head, features, settings)
    found["head"] = _measured(features, head, settings)
    about = About(
        backbone=backbone.fingerprint,
        weights=str(Path(weights).absolute()),
        model=model,
        size=settings.size,
        layers=layers,
        inputs=features.width,
        kept=len(head.whiten[0]),
        hidden=settings.hidden,
        width=settings.width,
        threshold=found["head"]["threshold"],
    )
    save_head(out, head, about)
    shutil.rmtree(parts)
    return {"images": len(features.rows), "held_out": len(features.held), "loss": loss, **found}


def kind_of_view(number: int, view: int) -> str:
    """The kind of copy that is view 1, 2, … of image `number`."""
    return "strong" if view % 2 else KINDS[(number + view // 2) % len(KINDS)]


class _Features:
    """What the backbone said of all views, on disk, and which images are trained on and which held out."""

    def __init__(self, parts: Path, settings: FitCopies, token: int) -> None:
        files = sorted(parts.glob("*.npy"))
        self._parts = [np.load(file, mmap_mode="r") for file in files]
        self._firsts = [int(file.stem) for file in files]
        self.width = self._parts[0].shape[2]
        there = [np.isfinite(part[:, 0, 0]).nonzero()[0] for part in self._parts]
        self.rows = np.concatenate([rows + first for rows, first in zip(there, self._firsts, strict=True)])
        order = self.rows[permutation(settings.seed, Stream.COPIES, 0, len(self.rows))]
        held = max(2, round(settings.held_out * len(order)))
        self.held, self.trained = np.sort(order[:held]), np.sort(order[held:])
        self._class_token = slice(self.width - 2 * token, self.width - token)

    def of(self, numbers: Integers, views: Integers | None = None) -> Tensor:
        """`[n, 1 + V, F]` of these images in fp32; with `views` `[n, v]` only those."""
        places = np.searchsorted(self._firsts, numbers, side="right") - 1
        read = [
            self._parts[place][number - self._firsts[place]] if views is None
            else self._parts[place][number - self._firsts[place], views[i]]
            for i, (place, number) in enumerate(zip(places, numbers, strict=True))
        ]  # fmt: skip
        return torch.from_numpy(np.stack(read).astype(np.float32))

    def class_token(self, inputs: Tensor) -> Tensor:
        """The backbone's own vectors: the class token of the last layer that is read."""
        return F.normalize(inputs[..., self._class_token], dim=-1)


def _measured(features: _Features, head: Callable[[Tensor], Tensor], settings: FitCopies) -> dict[str, Any]:
    numbers = features.held[:MEASURED]
    device = head.mean.device if isinstance(head, CopyHead) else torch.device("cpu")
    with torch.no_grad():
        vectors = torch.cat([head(features.of(some).to(device)).cpu() for some in _chunks(numbers)])
    kinds = [[kind_of_view(int(number), view + 1) for view in range(settings.views)] for number in numbers]
    return measure(vectors, kinds, settings.precision)


def _chunks(numbers: Integers, size: int = 256) -> list[Integers]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _untrained(features: _Features, settings: FitCopies) -> CopyHead:
    """A head whose linear map is the closed form of the same aim, and whose network adds nothing yet.

    Inputs are whitened by how copies of one image differ, so that what compression or a crop changes counts little;
    then the directions in which images vary most are kept. (Linear discriminant analysis with images as classes; for
    retrieval: Mikolajczyk and Matas 2007.)
    """
    width = features.width
    total, products, within = torch.zeros(width).double(), torch.zeros(width, width).double(), torch.zeros(width, width)
    within, images, views = within.double(), 0, 1 + settings.views
    for numbers in _chunks(features.trained):
        x = features.of(numbers).double()
        apart = (x - x.mean(1, keepdim=True)).flatten(0, 1)
        total, products, within = total + x.sum((0, 1)), products + _square(x.flatten(0, 1)), within + _square(apart)
        images += len(x)
    mean = total / (images * views)
    between = products / (images * views) - mean[:, None] * mean
    within = within / (images * settings.views)
    within = (1 - SHRINKAGE) * within + SHRINKAGE * within.diagonal().mean() * torch.eye(width)
    values, directions = torch.linalg.eigh(within)
    even = directions / values.sqrt()
    values, directions = torch.linalg.eigh(even.T @ between @ even)
    kept = min(width, 2 * settings.width)
    whiten = (even @ directions).flip(1)[:, :kept] / values.flip(0)[:kept].mean().sqrt()
    head = CopyHead(width, kept, settings.hidden, settings.width)
    with torch.no_grad():
        head.mean.copy_(mean)
        head.whiten.copy_(whiten)
        head.direct.weight.copy_(torch.eye(settings.width, kept))
        head.second.weight.zero_()
        head.second.bias.zero_()
    return head


def _square(x: Tensor) -> Tensor:
    return x.T @ x


def _whitened(features: _Features) -> Callable[[Tensor], Tensor]:
    """The class token, PCA whitened: what is done to vectors where no head is."""
    x = torch.cat([features.class_token(features.of(some)[:, 0]) for some in _chunks(features.trained)]).double()
    mean = x.mean(0)
    values, directions = torch.linalg.eigh((x - mean).T @ (x - mean))
    kept = values > SMALLEST * values[-1]
    matrix = (directions[:, kept] / values[kept].sqrt()).float()
    return lambda inputs: F.normalize((features.class_token(inputs) - mean.float()) @ matrix, dim=-1)


def _train(head: CopyHead, features: _Features, settings: FitCopies) -> list[float]:
    """Train in place; returns the losses at the beginning and at the end."""
    device, batch = head.mean.device, min(settings.batch, len(features.trained))
    random = np.random.default_rng(settings.seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.rate, weight_decay=settings.decay)
    warm = max(1, settings.steps // 20)
    losses: list[float] = []
    order = np.empty(0, dtype=np.int64)
    for step in range(settings.steps):
        risen = (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * risen
        if len(order) < batch:
            order = random.permutation(features.trained)
        numbers, order = order[:batch], order[batch:]
        views = random.random((batch, 1 + settings.views)).argsort(1)[:, :2]
        vectors = head(features.of(numbers, views).to(device)).transpose(0, 1)  # [2, batch, width]
        loss = contrast(vectors, settings.temperature) + settings.koleo * koleo(vectors).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not math.isfinite(sum(losses)):
        raise OpsinError("the head's loss is not finite: give a lower rate.")
    return [float(np.mean(losses[:warm])), float(np.mean(losses[-warm:]))]


def contrast(vectors: Tensor, temperature: float) -> Tensor:
    """InfoNCE: how hard the other view of an image is to find among all views of all images of the batch.

    Args:
        vectors: `[2, B, D]` of unit length.
        temperature: cosines are divided by it.
    """
    both = vectors.flatten(0, 1)
    cosines = both @ both.T / temperature
    cosines = cosines.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), -torch.inf)
    other = torch.arange(len(both), device=both.device).roll(vectors.shape[1])
    return F.cross_entropy(cosines, other)


def _begin(
    parts: Path, settings: FitCopies, layers: tuple[int, ...], backbone: BackboneEmbedder, source: Source
) -> None:
    """Start the folder of features, or check that those there are of the same images, views and backbone."""
    names = ("images", "views", "size", "seed")
    made = {name: asdict(settings)[name] for name in names}
    made = json.loads(
        json.dumps(made | {"layers": layers, "weights": backbone.fingerprint, "data": source.fingerprint})
    )
    file = parts / "made.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = [name for name in made if before.get(name) != made[name]]
        if changed:
            raise OpsinError(
                f"{shown(parts)} holds features made with other {', '.join(changed)}: give those again, remove it, or "
                "choose another --out."
            )
    write(file, json.dumps(made))


def _write_features(
    parts: Path, start: int, indices: list[int], source: Source, backbone: BackboneEmbedder,
    layers: tuple[int, ...], settings: FitCopies, workers: int,
) -> None:  # fmt: skip
    """Write one part: fp16 `[n, 1 + views, F]`, NaN where an image cannot be read."""

    def views_of(place: int) -> Tensor | None:
        try:
            reduction = partial(reduction_to, FINER * settings.size)
            pixels, _ = decode_reduced(source.open(indices[place]), reduction)
        except DecodeError:
            return None
        pixels, number = shrunk(eight_bits(pixels), FINER * settings.size), start + place
        copies = [
            copy_of(pixels, kind_of_view(number, view), settings.seed, number * settings.views + view - 1)
            for view in range(1, settings.views + 1)
        ]
        return torch.stack([backbone.prepare(image) for image in (pixels, *copies)])

    batch = max(1, 64 // (1 + settings.views))
    batches = [range(at, min(at + batch, len(indices))) for at in range(0, len(indices), batch)]
    found: list[NDArray[np.float16] | None] = []
    with closing(prepared(views_of, batches, workers=workers, ahead=1 + workers // batch)) as ready:
        for images in ready:
            readable = [image for image in images if image is not None]
            inputs = tokens(backbone.features(torch.cat(readable), layers)).cpu() if readable else None
            rows = iter(() if inputs is None else inputs.half().unflatten(0, (len(readable), -1)).numpy())
            found += [None if image is None else next(rows) for image in images]
    width = 2 * len(layers) * backbone.width
    nothing = np.full((1 + settings.views, width), np.nan, dtype=np.float16)
    part = parts / f"{start:08d}.npy"
    with part.with_suffix(".partial").open("wb") as file:
        np.save(file, np.stack([nothing if row is None else row for row in found]))
    part.with_suffix(".partial").replace(part)
