"""The input pipeline: decoding alone, crops alone, and both through the stream that feeds a training."""

import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from opsin.bench.timing import Machine, Spread, machine, rate
from opsin.data.crops import CropRecipe
from opsin.data.decode import Reduction, Scale
from opsin.data.masks import MaskRecipe
from opsin.data.reader import ImageReader
from opsin.data.sources import Source, scan
from opsin.data.stream import BatchRecipe, DataRecipe, Stream, StreamRecipe
from opsin.errors import OpsinError

DISTINCT = 64
"""Different synthetic photos; further files are copies."""
FILES = 256
"""Synthetic files, when there is no --data: what is decoded twice comes from the same cached file either way."""


@dataclass(frozen=True)
class InputResult:
    """What `opsin bench input` writes as JSON; rates are images per second by round."""

    machine: Machine
    """Where and when."""
    data: str
    """The folder or list of images, or what stands for it."""
    images: int
    """Images there."""
    batch: int
    """Images of a batch."""
    workers: int
    """Threads that decode, and on a processor as many that render crops."""
    decoding: Spread
    """Files to 8-bit pixels in memory, nothing else."""
    crops: Spread
    """Decoded images to 2 × 224 and 8 × 98 pixel crops, on the device that trains; large photos whole, although a
    training decodes them at a fraction of their size where no crop needs more."""
    both: Spread
    """Files to crops through `Stream`, as a training reads them."""
    decoding_per_core: float
    """Median of `decoding` over the cores that this process may use."""
    crops_per_core: float
    """Median of `crops` over these cores; on a GPU, where the crops are rendered there, it says little."""
    both_per_core: float
    """Median of `both` over these cores."""


def make_photos(folder: Path, count: int) -> None:
    """JPEGs of 500×375 with the statistics of photos, blurred noise at several scales, in a new `folder`."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(min(count, DISTINCT)):
        scales = [
            np.asarray(
                Image.fromarray(random.integers(0, 256, (375 // s + 1, 500 // s + 1, 3), dtype=np.uint8))
                .resize((500, 375), Image.Resampling.BICUBIC)
                .filter(ImageFilter.GaussianBlur(1)),
                dtype=np.float64,
            )
            for s in (4, 16, 64)
        ]
        Image.fromarray(np.mean(scales, axis=0).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=90)
    for number in range(DISTINCT, count):
        (folder / f"{number:06d}.jpg").write_bytes((folder / f"{number % DISTINCT:06d}.jpg").read_bytes())


def time_input(data: str | Path | None, workers: int, batch: int, seconds: float, device: torch.device) -> InputResult:
    """Time decoding, crops, and both, for `seconds` each.

    Args:
        data: images; None makes synthetic photos.
        workers: decoding threads; 0 takes one per core.
        batch: images of a batch.
        seconds: of each of the three.
        device: where crops are rendered.

    Raises:
        OpsinError: no images, or a number that does not fit.
    """
    if batch < 2:
        raise OpsinError(f"--batch is {batch}: give 2 or more, as a training needs.")
    if not 0 < seconds < 1e6:
        raise OpsinError(f"--seconds is {seconds:g}: give more than 0.")
    if workers < 0:
        raise OpsinError(f"--workers is {workers}: give 1 or more, or 0 for one per core.")
    where, recipe = machine(device), DataRecipe(workers=workers, upsample=True)
    with ExitStack() as stack:
        folder = data
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="opsin-bench-"))) / "photos"
            make_photos(folder, FILES)
        source = scan(folder, progress=False)
        reader = stack.enter_context(ImageReader(source, workers=recipe.threads()))
        decoding = decode_rate(reader, batch, seconds)
        both = stream_rate(reader, recipe, batch, seconds, device)
        kept = stack.enter_context(_Decoded(source, reader, min(batch, len(source))))
        crops = stream_rate(kept, recipe, batch, seconds, device)
    return InputResult(
        machine=where,
        data="synthetic 500×375 JPEGs" if data is None else str(data),
        images=len(source),
        batch=batch,
        workers=recipe.threads(),
        decoding=decoding,
        crops=crops,
        both=both,
        decoding_per_core=decoding.median / where.cores,
        crops_per_core=crops.median / where.cores,
        both_per_core=both.median / where.cores,
    )


class _Decoded(ImageReader):
    """A reader whose images are decoded already."""

    def __init__(self, source: Source, reader: ImageReader, count: int) -> None:
        super().__init__(source, workers=1)
        self._images = reader.submit(range(count)).scaled()

    def read_reduced(self, index: int, reduction: Reduction) -> tuple[Tensor, Scale]:  # noqa: ARG002
        """One of the images, whole."""
        return self._images[index % len(self._images)]


def decode_rate(reader: ImageReader, batch: int, seconds: float) -> Spread:
    """Images per second of decoding batches, each asked for before the one before it is taken."""
    images, at = len(reader.source), 0

    def ask() -> list[int]:
        nonlocal at
        at += batch
        return [index % images for index in range(at, at + batch)]

    waiting = [reader.submit(ask())]

    def step() -> None:
        waiting.append(reader.submit(ask()))
        waiting.pop(0).result()

    step()
    return rate(step, batch, torch.device("cpu"), seconds)


def stream_rate(reader: ImageReader, recipe: DataRecipe, batch: int, seconds: float, device: torch.device) -> Spread:
    """Images per second of the batches of a `Stream`, their crops rendered on `device`."""
    draws = StreamRecipe(0, BatchRecipe(batch, 0, batch), CropRecipe(), MaskRecipe(), patch=14, depth=12, drop_path=0.3)
    with closing(Stream(draws, recipe, reader, reader.source.order, device).batches(0, 2**27)) as batches:

        def step() -> None:
            crops = next(batches)
            crops.crops("global", 0)
            crops.crops("local", 0)

        for _ in range(recipe.ahead + 2):  # what was made ahead while nobody took it would count for free
            step()
        return rate(step, batch, device, seconds)
