"""Feature extraction: the model alone, and all the way from JPEG files to a Parquet file."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from opsin.backbone.features import PRECISIONS, FeatureExtractor
from opsin.backbone.graphs import Replay
from opsin.backbone.registry import architecture, create
from opsin.backbone.vit import VisionTransformer
from opsin.bench.flops import flops
from opsin.bench.input import make_photos
from opsin.bench.timing import (
    Machine,
    PeakMemory,
    Spread,
    machine,
    matrix_product_peak,
    rate,
    spread,
    synchronise,
    timed,
)
from opsin.data.sources import scan
from opsin.errors import OpsinError
from opsin.evaluate.extract import write_features

Precision = Literal["fp32", "bf16", "fp16"]
REPEATS = 20
"""Batches of the model alone that are timed."""
ROUNDS = 3
"""Times that all files are gone through."""


@dataclass(frozen=True)
class FeaturesResult:
    """What `opsin bench features` writes as JSON."""

    machine: Machine
    """Where and when."""
    backbone: str
    """Name of the architecture."""
    batch: int
    """Images of a forward."""
    size: int
    """Side of an input of the model alone, and the shorter side to which files are resized, in pixels."""
    precision: Precision
    """Of weights and activations."""
    images: int
    """JPEG files of 500×375 pixels."""
    workers: int
    """Decoding threads."""
    model: Spread
    """Milliseconds of a forward of the model alone, on CUDA a replayed graph, on a batch that lies on the device."""
    model_images_per_second: float
    """Images of a batch over the median of `model`."""
    files: Spread
    """Images per second from JPEG files to a Parquet file of class tokens, by round."""
    tera_flop_per_second: float
    """10^12 operations of matrix products and attention per second, of the model alone."""
    matrix_product_tera_flop_per_second: float
    """What a large square product reaches on this device in this precision."""
    share_of_matrix_product: float
    """The former over the latter."""
    peak_bytes: int
    """The most memory in use by the model alone: on CUDA what torch allocated, on a processor what became resident
    since before the network was built."""
    first_batch_seconds: float
    """From before the network is built to the end of its first forward, which captures what is captured."""


def time_features(
    backbone: str, batch: int, size: int, precision: Precision, images: int, workers: int, device: torch.device
) -> FeaturesResult:
    """Time the model alone on random pixels, then the extraction of `images` synthetic JPEG files.

    Raises:
        OpsinError: an unknown backbone, a number that does not fit, fp16 on a processor, or a batch too large for the
            GPU's memory.
    """
    arch = architecture(backbone)
    for name, value in (("batch", batch), ("images", images), ("workers", workers)):
        if value < 1:
            raise OpsinError(f"--{name} is {value}: give 1 or more.")
    if size < 1 or size % arch.patch:
        nearest = max(1, round(size / arch.patch)) * arch.patch
        raise OpsinError(f"--size {size} is not a multiple of the patch of {backbone}, {arch.patch}: try {nearest}.")
    where, dtype = machine(device), PRECISIONS[precision]
    try:
        memory = PeakMemory(device)
        pixels = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
        began = time.perf_counter()
        extractor = FeatureExtractor(create(backbone).to(device), precision=precision)
        model = Replay(extractor.features, batch, device)
        model(pixels)
        synchronise(device)
        first = time.perf_counter() - began
        memory.reset()
        times = timed(lambda: model(pixels), device, REPEATS, warm_up=2)
        peak_bytes = memory.read()
        peak = matrix_product_peak(device, dtype)
        files = _files(extractor, batch, size, images, workers)
    except torch.OutOfMemoryError:
        raise OpsinError(
            f"a batch of {batch} images of {size} pixels with {backbone} does not fit into the memory of "
            f"{where.device}: give a smaller --batch or --size."
        ) from None
    with torch.device("meta"):
        outline = VisionTransformer(arch)
        needed = flops(lambda: outline([torch.empty(batch, 3, size, size)]))
    median = spread(times).median
    achieved = needed / median
    return FeaturesResult(
        machine=where,
        backbone=backbone,
        batch=batch,
        size=size,
        precision=precision,
        images=images,
        workers=workers,
        model=spread([1e3 * seconds for seconds in times]),
        model_images_per_second=batch / median,
        files=files,
        tera_flop_per_second=achieved / 1e12,
        matrix_product_tera_flop_per_second=peak / 1e12,
        share_of_matrix_product=achieved / peak,
        peak_bytes=peak_bytes,
        first_batch_seconds=first,
    )


def _files(extractor: FeatureExtractor, batch: int, size: int, images: int, workers: int) -> Spread:
    with tempfile.TemporaryDirectory(prefix="opsin-bench-") as name:
        photos = Path(name) / "photos"
        make_photos(photos, images)
        source = scan(photos, progress=False)

        def extract() -> None:
            write_features(
                extractor, source, Path(name) / "features.parquet", size=size, batch_size=batch, workers=workers
            )

        extract()  # warms up
        return rate(extract, images, extractor.device, seconds=0, rounds=ROUNDS)
