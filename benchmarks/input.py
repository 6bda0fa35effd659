"""The input pipeline against torchvision's own transforms in a DataLoader, on the same JPEGs in the same run.

    python benchmarks/input.py [--images 128] [--seconds 20]

Both decode 500×375 JPEGs and make 2 × 224 + 8 × 98 crops with the reference's operations and probabilities. The peer
is the usual recipe: Pillow images, torchvision's v1 transforms, one worker process per core. Alternated, medians of
three rounds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms as T
from common import device, finish
from PIL import Image

from opsin.bench.input import make_photos, stream_rate
from opsin.bench.timing import cores, rate
from opsin.data.reader import ImageReader
from opsin.data.sources import scan
from opsin.data.stream import DataRecipe

BATCH = 16


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
    loader = torch.utils.data.DataLoader(Peer(paths), BATCH, num_workers=cores())
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    return rate(lambda: next(batches), BATCH, torch.device("cpu"), duration).median


def our_rate(folder: Path, duration: float) -> float:
    """Images per second of `Stream`, decoding in threads and computing the crops here."""
    recipe = DataRecipe()
    with ImageReader(scan(folder, progress=False), workers=recipe.threads()) as reader:
        return stream_rate(reader, recipe, BATCH, duration, device()).median


def main() -> None:
    """Alternate both and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of six rounds")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photos"
        make_photos(folder, a.images)
        ours, theirs = [], []
        for _ in range(3):
            theirs.append(peer_rate(folder, a.seconds))
            ours.append(our_rate(folder, a.seconds))
    finish(
        "input",
        {
            "opsin_images_per_second": ours,
            "torchvision_images_per_second": theirs,
            "opsin_per_core": statistics.median(ours) / cores(),
            "torchvision_per_core": statistics.median(theirs) / cores(),
            "ratio": statistics.median([o / t for o, t in zip(ours, theirs, strict=True)]),
        },
    )


if __name__ == "__main__":
    main()
