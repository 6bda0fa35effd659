"""The input pipeline against torchvision's own transforms in a DataLoader, on the same JPEGs in the same run.

    python benchmarks/input.py [--images 128] [--seconds 20]

Both decode 500×375 JPEGs and make 2 × 224 + 8 × 98 crops with the reference's operations and probabilities. The peer
is the usual recipe: Pillow images, torchvision's v1 transforms, one worker process per core. Alternated, medians of
three rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as T
from common import finish
from PIL import Image, ImageFilter

from opsin.data.crops import CropRecipe
from opsin.data.masks import MaskRecipe
from opsin.data.reader import ImageReader
from opsin.data.sources import scan
from opsin.data.stream import BatchRecipe, DataRecipe, Stream, StreamRecipe

BATCH = 16


def make_photos(folder: Path, count: int) -> None:
    """JPEGs of 500×375 with the statistics of photos: blurred noise at several scales."""
    random = np.random.default_rng(0)
    for number in range(count):
        scales = [
            np.asarray(
                Image.fromarray(random.integers(0, 256, (375 // s + 1, 500 // s + 1, 3), dtype=np.uint8))
                .resize((500, 375), Image.Resampling.BICUBIC)
                .filter(ImageFilter.GaussianBlur(1)),
                dtype=np.float64,
            )
            for s in (4, 16, 64)
        ]
        Image.fromarray(np.mean(scales, axis=0).astype(np.uint8)).save(folder / f"{number:04d}.jpg", quality=90)


class Peer(torch.utils.data.Dataset[list[torch.Tensor]]):
    """Ten crops of an image by torchvision's transforms, as DINOv2's augmentation composes them."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        finish_ = [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]

        def crop(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Callable[..., Any]:
            composed: Callable[..., Any] = T.Compose(
                [
                    T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
                    T.RandomHorizontalFlip(),
                    jitter,
                    T.RandomGrayscale(0.2),
                    T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=blur),
                    T.RandomSolarize(128, p=solarize),
                    *finish_,
                ]
            )
            return composed

        self.crops = [crop(224, (0.32, 1.0), 0.0, 0.0), crop(224, (0.32, 1.0), 0.9, 0.2)]
        self.crops += [crop(98, (0.05, 0.32), 0.5, 0.0)] * 8

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        with Image.open(self.paths[index % len(self.paths)]) as image:
            rgb = image.convert("RGB")
        return [crop(rgb) for crop in self.crops]


def peer_rate(folder: Path, duration: float) -> float:
    """Images per second of the peer, its workers warm."""
    paths = sorted(folder.glob("*.jpg"))
    loader = torch.utils.data.DataLoader(Peer(paths), BATCH, num_workers=os.cpu_count() or 1)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    return _rate(lambda: next(batches), duration)


def our_rate(folder: Path, duration: float) -> float:
    """Images per second of `Stream`, decoding in threads and computing the crops here."""
    source = scan(folder, progress=False)
    recipe = StreamRecipe(0, BatchRecipe(BATCH, 0, BATCH), CropRecipe(), MaskRecipe(), 14, 12, 0.3)
    data = DataRecipe()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ImageReader(source, workers=data.threads()) as reader:
        batches = Stream(recipe, data, reader, len(source), device).batches(0, 1_000_000)

        def step() -> None:
            batch = next(batches)
            batch.crops("global", 0)
            batch.crops("local", 0)
            if device.type == "cuda":
                torch.cuda.synchronize()

        for _ in range(2):
            step()
        return _rate(step, duration)


def _rate(step: Callable[[], object], duration: float) -> float:
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < duration:
        step()
        done += BATCH
    return done / (time.perf_counter() - start)


def main() -> None:
    """Alternate both and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of six rounds")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photos(folder, a.images)
        ours, theirs = [], []
        for _ in range(3):
            theirs.append(peer_rate(folder, a.seconds))
            ours.append(our_rate(folder, a.seconds))
    cores = os.cpu_count() or 1
    finish(
        "input",
        {
            "opsin_images_per_second": ours,
            "torchvision_images_per_second": theirs,
            "opsin_per_core": statistics.median(ours) / cores,
            "torchvision_per_core": statistics.median(theirs) / cores,
            "ratio": statistics.median([o / t for o, t in zip(ours, theirs, strict=True)]),
        },
    )


if __name__ == "__main__":
    main()
