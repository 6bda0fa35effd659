"""Corruptions batched on the device against the package's way, an image at a time with numpy and scipy.

    python benchmarks/corruptions.py [--images 16] [--rounds 5] [--severity 3]

The package imagecorruptions does not run with current libraries; its noise and blur are calls of numpy, scikit-image
and scipy, and those calls are made here, with the same parameters. JPEG and pixelate are one library in both and
are left out, and so are kinds that OpenCV computes. Rounds alternate, with the order turned in each; images per
second as medians, and the ratio as the median of the ratios within a round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import device
from numpy.typing import NDArray
from scipy import ndimage
from skimage import color, filters

from opsin.evaluate.corruptions import blur, corrupt, digital, noise

Image = NDArray[np.float64]
"""`[H, W, 3]`, 0 to 1."""


def glass(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Pixels are copied one after the other, in Python."""
    sigma, far, passes = blur.GLASS[severity - 1]
    pixels = np.floor(filters.gaussian(image, sigma, channel_axis=-1) * 255)
    height, width = pixels.shape[:2]
    for _ in range(passes):
        for row in range(height - far, far, -1):
            for column in range(width - far, far, -1):
                across, down = rng.integers(-far, far, 2)
                pixels[row, column] = pixels[row + down, column + across]
    return filters.gaussian(pixels / 255, sigma, channel_axis=-1)


def elastic(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Without the affine part."""
    strength, sigma, _ = digital.ELASTIC[severity - 1]
    fields = [
        filters.gaussian(rng.uniform(-1, 1, image.shape[:2]), sigma, mode="reflect", truncate=3) * strength
        for _ in range(2)
    ]
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    places = [rows + fields[0], columns + fields[1]]
    return np.stack([ndimage.map_coordinates(image[..., i], places, order=1, mode="reflect") for i in range(3)], -1)


def saturate(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """Through HSV."""
    factor, added = digital.SATURATE[severity - 1]
    hsv = color.rgb2hsv(image)
    hsv[..., 1] = np.clip(hsv[..., 1] * factor + added, 0, 1)
    return color.hsv2rgb(hsv)


ONE_BY_ONE: dict[str, Callable[[Image, int, np.random.Generator], Image]] = {
    "gaussian_noise": lambda x, s, rng: x + rng.normal(size=x.shape, scale=noise.GAUSSIAN[s - 1]),
    "shot_noise": lambda x, s, rng: rng.poisson(x * noise.SHOT[s - 1]) / noise.SHOT[s - 1],
    "speckle_noise": lambda x, s, rng: x + x * rng.normal(size=x.shape, scale=noise.SPECKLE[s - 1]),
    "gaussian_blur": lambda x, s, _: filters.gaussian(x, blur.GAUSSIAN[s - 1], channel_axis=-1),
    "glass_blur": glass,
    "elastic_transform": elastic,
    "saturate": saturate,
}
"""Kinds in the package's way."""


def one_by_one(images: NDArray[np.uint8], kind: str, severity: int) -> None:
    """All images `[N, H, W, 3]`, each by itself, to uint8."""
    rng = np.random.default_rng(0)
    for image in images:
        np.clip(ONE_BY_ONE[kind](image / 255, severity, rng) * 255, 0, 255).astype(np.uint8)


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--severity", type=int, default=3)
    args = parser.parse_args()
    pixels = np.random.default_rng(0).integers(0, 256, (args.images, 224, 224, 3), dtype=np.uint8)
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device())
    found: dict[str, Any] = {}
    for kind in ONE_BY_ONE:

        def batched(kind: str = kind) -> None:
            corrupt(batch, kind, args.severity, 0, range(args.images)).cpu()

        ways = {"batched": batched, "one_by_one": lambda kind=kind: one_by_one(pixels, kind, args.severity)}
        for way in ways.values():
            way()
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.rounds):
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                start = time.perf_counter()
                ways[name]()
                rates[name].append(args.images / (time.perf_counter() - start))
        ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
        medians = {f"{name}_per_s": round(statistics.median(values), 1) for name, values in rates.items()}
        found[kind] = medians | {"ratio": round(statistics.median(ratios), 2)}
    print(json.dumps({"device": str(device()), "images": args.images, "rounds": args.rounds, "kinds": found}, indent=1))


if __name__ == "__main__":
    main()
