"""Semantic segmentation with a linear head on frozen patch features: mean intersection over union."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.data.decode import DecodeError
from opsin.data.pipeline import prepared
from opsin.data.progress import progress
from opsin.errors import FINITE, SEEDS, OpsinError, within
from opsin.evaluate.datasets.segmentation import SETS, Folders, look_through, read_set
from opsin.evaluate.dense import PairSet
from opsin.evaluate.model import Model
from opsin.evaluate.segmentation_head import SegmentationHead, load_head, pixel_loss, save_head
from opsin.evaluate.segmentation_scores import confused, scored, side_by_side
from opsin.evaluate.segmentation_views import Views
from opsin.evaluate.sets import named
from opsin.evaluate.sliding import probabilities
from opsin.evaluate.store import place
from opsin.evaluate.task import Picture, Result, Run, Table
from opsin.evaluate.training import train

BETAS = (0.9, 0.999)
"""Of AdamW."""
WARMUP_FROM = 1e-6
"""Factor of the rate before the first step."""
LISTED = 30
"""Classes whose figures the table shows; all are in the details."""
PICTURES = 6
"""Predictions to look at."""


class Protocol(NamedTuple):
    """What the two protocols of the paper differ in."""

    blocks: int
    size: int
    stride: int
    ratios: tuple[float, float]
    scales: tuple[float, ...]
    flips: bool


PROTOCOLS = {
    "linear": Protocol(1, 512, 341, (0.5, 2.0), (1.0,), False),
    "multiscale": Protocol(4, 640, 320, (1.0, 3.0), (1.0, 1.32, 1.73, 2.28, 3.0), True),
}
"""The columns "lin." and "+ms" of the paper's Table 10."""


@dataclass(frozen=True)
class Segmentation:
    """What segmentation measures, and how its head is trained."""

    data: str = ""
    """Folder of images (with --masks), or NAME:PATH of a published set: ade20k, cityscapes, voc2012, voc2012-aug."""
    masks: Path | None = None
    """Folder of masks of one's own: PNG files of the names of the images, gray or with a palette, whose values are
    classes."""
    test_data: str | None = None
    """Folder of images to test on; by default a share of --data. Published sets bring their own."""
    test_masks: Path | None = None
    """Folder of their masks."""
    test_fraction: float = 0.2
    """Share of the images of --data that is tested, if there is no --test-data."""
    classes: int | None = None
    """Number of classes of one's own masks; by default the largest value in the masks that train, and one."""
    ignore: int = 255
    """Value of one's own masks that says that a pixel counts nowhere."""
    protocol: Literal["linear", "multiscale"] = "linear"
    """linear: last block, windows of 512 pixels, one scale. multiscale: last four blocks, windows of 640 pixels, five
    scales and flips when tested. The settings below that are not given are those of the protocol."""
    blocks: int | None = None
    """Last blocks whose patch features the head takes: 1 or 4 by the protocol."""
    crop: int | None = None
    """Side of training views and of test windows in pixels: 512 or 640 by the protocol."""
    shorter: int | None = None
    """Shorter side that images are resized to, in pixels: 512 or 640 by the protocol."""
    stride: int | None = None
    """Pixels from one test window to the next: 341 or 320 by the protocol."""
    ratios: tuple[float, float] | None = None
    """Range of the random scale in training: 0.5 to 2 or 1 to 3 by the protocol."""
    scales: tuple[float, ...] | None = None
    """Scales whose probabilities are averaged when tested: 1, or 1, 1.32, 1.73, 2.28 and 3 by the protocol."""
    flips: bool | None = None
    """Also average mirrored images when tested; by default in the multiscale protocol."""
    most: float = 0.75
    """Largest share of a training view that one class may fill, if another view can be had."""
    steps: int = 40_000
    """Steps of training. The default is the paper's, for 20,000 images at 16 per step: 32 times each. For a small set
    lower it to as many passes, such as 2,000 steps for 1,000 images."""
    train_batch: int = 16
    """Images per step of training."""
    rate: float = 1e-3
    """Learning rate, which falls to 0 on a line."""
    decay: float = 1e-4
    """Weight decay."""
    warmup: int = 1500
    """Steps in which the rate rises, but at most a tenth of all."""
    seed: int = 0
    """Of the split, of the head's first weights, and of order and views in training."""
    head: Path | None = None
    """A trained head to test, of the official release or written by --save-head, so that none is trained."""
    save_head: Path | None = None
    """Write the head to this file, .safetensors."""

    def __post_init__(self) -> None:
        within(
            self, "--", ignore=(0, 65535), steps=(1, FINITE), train_batch=(1, FINITE), rate=(0, FINITE),
            decay=(0, FINITE), warmup=(0, FINITE), most=(0, 1), seed=SEEDS, test_fraction=(0, 1),
        )  # fmt: skip
        for name in ("blocks", "crop", "shorter", "stride", "scales", "ratios", "classes"):
            if getattr(self, name) is not None:
                low = {"classes": 2, "scales": 0.01, "ratios": 0.01}.get(name, 1)
                high = {"classes": 65536, "scales": 16, "ratios": 16}.get(name, FINITE)
                within(self, "--", **{name: (low, high)})
        if self.ratios is not None and self.ratios[0] > self.ratios[1]:
            raise OpsinError(f"--ratios {self.ratios[0]:g} {self.ratios[1]:g} go down: give the smaller one first.")
        if self.scales == ():
            raise OpsinError("--scales names no scale: give one or more, such as 1.")
        full = self.settled()
        if full.stride > full.crop:
            raise OpsinError(
                f"--stride {full.stride} is larger than --crop {full.crop}, so pixels between windows would be missed: "
                f"give {full.crop * 2 // 3}, for example."
            )
        if self.save_head is not None and self.save_head.suffix != ".safetensors":
            raise OpsinError(f"--save-head {self.save_head} does not end in .safetensors: the head is written so.")

    def settled(self) -> "Settled":
        """What is not given taken from the protocol; the shorter side goes with the crop, the stride with both."""
        protocol = PROTOCOLS[self.protocol]
        crop = protocol.size if self.crop is None else self.crop
        return Settled(
            protocol.blocks if self.blocks is None else self.blocks,
            crop,
            crop if self.shorter is None else self.shorter,
            max(crop * protocol.stride // protocol.size, 1) if self.stride is None else self.stride,
            protocol.ratios if self.ratios is None else self.ratios,
            protocol.scales if self.scales is None else self.scales,
            protocol.flips if self.flips is None else self.flips,
        )


class Settled(NamedTuple):
    """The settings that a protocol decides where they are not given."""

    blocks: int
    crop: int
    shorter: int
    stride: int
    ratios: tuple[float, float]
    scales: tuple[float, ...]
    flips: bool


def segmentation(model: Model, settings: Segmentation, run: Run) -> Result:
    """Semantic segmentation: a linear head on patch features, measured by mean intersection over union."""
    settled = settings.settled()
    head = None if settings.head is None else load_head(settings.head, model.arch.width, model.arch.depth)
    if head is None and settled.blocks > model.arch.depth:
        raise OpsinError(f"--blocks {settled.blocks}: the backbone has {model.arch.depth}, give as many at most.")
    trains, tests, where = _pairs(settings, model.arch.channels, None if head is None else head.classes, run)
    if head is None:
        head = train_head(model, trains, settings, run)
    elif head.classes != len(tests.classes):
        raise OpsinError(
            f"{settings.head} tells {head.classes} classes apart, and {where} has {len(tests.classes)}: give the head "
            "that was trained on this set."
        )
    head.to(model.device)
    if settings.save_head is not None:
        save_head(head, settings.save_head)
    found = measure(model, head, tests, settled, run)
    scores = scored(found.confusion)
    known = [(name, value) for name, value in zip(tests.classes, scores.iou, strict=True) if not np.isnan(value)]
    rows = [["mean IoU", f"{scores.miou:.4f}"], ["pixel accuracy", f"{scores.accuracy:.4f}"]]
    rows += [[name, f"{value:.4f}"] for name, value in known[:LISTED]]
    note = f"{len(found.outcomes)} images, {len(known)} classes of {len(tests.classes)} there"
    note += f"; IoU of the first {LISTED}." if known[LISTED:] else "."
    details = {
        "classes": list(tests.classes),
        "iou": [None if np.isnan(value) else float(value) for value in scores.iou],
        "trained_on": None if settings.head else len(trains),
        "tested_on": len(found.outcomes),
        "steps": None if settings.head else settings.steps,
        **settled._asdict(),
        "blocks": head.blocks,
    }
    return Result(
        data=where,
        metrics={"miou": scores.miou, "pixel_accuracy": scores.accuracy},
        table=Table(["segmentation", "IoU"], rows, note),
        details=details,
        left_out=found.left_out,
        outcomes=found.outcomes,
        pictures=found.pictures,
    )


def _pairs(settings: Segmentation, channels: int, head_classes: int | None, run: Run) -> tuple[PairSet, PairSet, str]:
    """The pairs that train, those that test, and how the set is called."""
    name, path = named(settings.data, SETS)
    if name is not None:
        if settings.masks or settings.test_data or settings.test_masks:
            raise OpsinError(f"{settings.data} brings its masks and its test images: leave out the other folders.")
        published = SETS[name]
        trains, tests = (read_set(name, Path(path), part, channels) for part in (published.train, published.test))
        return trains, tests, published.title
    for images, masks, option in (
        (settings.data, settings.masks, "--masks"), (settings.test_data, settings.test_masks, "--test-masks")
    ):  # fmt: skip
        if (images is None) != (masks is None):
            raise OpsinError(
                f"{option} is to be the folder of masks of the images in {images}: give it."
                if masks is None
                else f"{option} {masks} has no images: give --test-data too."
            )
    return *_own(settings, channels, head_classes, run), path


def _own(settings: Segmentation, channels: int, head_classes: int | None, run: Run) -> tuple[PairSet, PairSet]:
    assert settings.masks is not None
    held = look_through(Path(settings.data), settings.masks, settings.ignore, channels, run)
    other: Folders | None = None
    if settings.test_data is not None and settings.test_masks is not None:
        other = look_through(Path(settings.test_data), settings.test_masks, settings.ignore, channels, run)
        if head_classes is None and other.images.fingerprint == held.images.fingerprint:
            raise OpsinError(
                f"{other.images.where} is given to train and to test on, which measures memory: leave out --test-data "
                "to have the images split."
            )
    if head_classes is None and len(held.present) < 2:
        only = f"only the class {held.present[0]}" if held.present else "no class"
        raise OpsinError(
            f"the masks of {held.masks.where} hold {only}, and a head tells two or more apart: give masks with the "
            "number of a class in each pixel, 0 for the background for example."
        )
    count = settings.classes or head_classes or max(held.largest) + 1
    if other is not None:
        pairs = [one.pairs(count, settings.ignore, channels) for one in (held, other)]
        return pairs[0], pairs[1]
    number = len(held.images)
    if number < 2:
        raise OpsinError(f"{held.images.where} holds a single image, so none is left to test: give --test-data.")
    mixed = np.random.default_rng(settings.seed).permutation(number)
    tested = min(max(round(number * settings.test_fraction), 1), number - 1)
    trains, tests = sorted(mixed[tested:].tolist()), sorted(mixed[:tested].tolist())
    return (
        held.pairs(count, settings.ignore, channels, trains),
        held.pairs(count, settings.ignore, channels, tests),
    )


def pair(pairs: PairSet, index: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels `[C, H, W]`, from 0 to 255 in float32, and the target of an image that was read.

    Raises:
        OpsinError: they are of different sizes, or the mask is none of the set.
    """
    target = pairs.target(index)
    if target.shape != pixels.shape[-2:]:
        height, width = pixels.shape[-2:]
        raise OpsinError(
            f"{pairs.images.name(index)} of {pairs.images.where} has {width}×{height} pixels, and its mask has "
            f"{target.shape[1]}×{target.shape[0]}: they must be of one size."
        )
    scale = {torch.uint8: 1.0, torch.uint16: 255 / 65535}.get(pixels.dtype, 255.0)
    return pixels.float() * scale, target


def factor(step: int, steps: int, warmup: int) -> float:
    """Factor of the rate: falls on a line from 1 to 0 over all steps, times a rise over the first `warmup`."""
    warm = min(warmup, steps // 10)
    rise = 1 - (1 - step / warm) * (1 - WARMUP_FROM) if step < warm else 1.0
    return (1 - step / steps) * rise


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, 0, 1]).permutation(count)


def train_head(model: Model, pairs: PairSet, settings: Segmentation, run: Run) -> SegmentationHead:
    """Train a head on random views, every image once per pass; it is kept, and goes on after a stop.

    What a step sees is a function of the seed and its number alone.
    """
    settled = settings.settled()
    head = SegmentationHead(model.arch.width, settled.blocks, len(pairs.classes), settings.seed).to(model.device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.rate, betas=BETAS, weight_decay=settings.decay)
    views = Views(settled.crop, settled.shorter, settled.ratios, settings.most)
    size, steps = settings.train_batch, settings.steps

    def prepare(position: int) -> tuple[Tensor, Tensor]:
        epoch, at = divmod(position, len(pairs))
        index, pixels = pairs.images.readable(int(_order(len(pairs), settings.seed, epoch)[at]))
        return views.draw(*pair(pairs, index, pixels), np.random.default_rng([settings.seed, *divmod(position, size)]))

    def batches(start: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        positions = (range(step * size, (step + 1) * size) for step in range(start, steps))
        with closing(prepared(prepare, positions, workers=run.workers, ahead=2)) as ready:
            for items in ready:
                images, masks = zip(*items, strict=True)
                yield torch.stack(images), torch.stack(masks)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, masks = batch
        return pixel_loss(head.score(model, images, run.batch_size), masks.to(model.device))

    names = ("most", "train_batch", "rate", "decay", "warmup", "seed", "steps")
    facts = {name: getattr(settings, name) for name in names} | settled._asdict()
    for name in ("stride", "scales", "flips"):  # of the test
        del facts[name]
    folder = place(run.cache, "segmentation", weights=model.digest, pairs=pairs.images.fingerprint, **facts)
    rate = partial(factor, steps=steps, warmup=settings.warmup)
    train(head, optimiser, rate, batches, loss, steps, folder, what="segmentation head", show=run.progress)
    return head


class Measured(NamedTuple):
    """What a head predicts on a set."""

    confusion: NDArray[np.int64]
    """Pixels by true and predicted class, `[K, K]`."""
    outcomes: NDArray[np.float64]
    """Mean IoU of each image over the classes there or predicted; without images of which no pixel counts."""
    left_out: list[tuple[str, str]]
    """Images that do not decode."""
    pictures: list[Picture]
    """Photo, truth and prediction side by side."""


@torch.no_grad()
def measure(model: Model, head: SegmentationHead, pairs: PairSet, settled: Settled, run: Run) -> Measured:
    """Predict every image at its own size and count.

    Raises:
        OpsinError: no pixel of the set counts, or a mask is damaged.
    """
    head.eval()
    classes = head.classes
    total = torch.zeros(classes, classes, dtype=torch.int64, device=model.device)
    outcomes: list[float] = []
    left_out: list[tuple[str, str]] = []
    pictures: list[Picture] = []
    shown_at = set(np.linspace(0, len(pairs) - 1, min(PICTURES, len(pairs))).round().astype(int).tolist())

    def prepare(index: int) -> tuple[Tensor, Tensor] | str:
        try:
            pixels = pairs.images.read(index)
        except DecodeError as error:
            return error.reason
        return pair(pairs, index, pixels)

    single = [[index] for index in range(len(pairs))]

    def score(views: Tensor) -> Tensor:
        return head.score(model, views, run.batch_size)

    with (
        closing(prepared(prepare, single, workers=run.workers, ahead=run.workers)) as ready,
        progress("segmentation", len(pairs), "images", run.progress) as advance,
    ):
        for index, (item,) in enumerate(ready):
            advance(1)
            if isinstance(item, str):
                left_out.append((pairs.images.name(index), item))
                continue
            pixels, truth = item[0].to(model.device), item[1].to(model.device)
            shares = probabilities(
                score, pixels, settled.shorter, settled.scales, settled.flips, settled.crop, settled.stride,
                run.batch_size,
            )  # fmt: skip
            predicted = shares.argmax(0)
            counts = confused(truth, predicted, classes)
            total += counts
            if counts.any():
                outcomes.append(scored(counts.cpu().numpy()).miou)
            if index in shown_at:
                pictures.append(side_by_side(pairs.images.name(index), *item, predicted.cpu()))
    confusion = total.cpu().numpy()
    if not confusion.any():
        raise OpsinError(f"no image of {pairs.images.where} can be read, or no pixel of their masks counts.")
    return Measured(confusion, np.array(outcomes), left_out, pictures)
