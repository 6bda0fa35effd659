"""Real images and two measures, for the experiments with phases, continued pretraining and distillation.

    python benchmarks/evidence.py [--folder DIR]     # cut once, then print what trivial features reach

The images are the quickstart's: photos that ship with scikit-image and scikit-learn, cut like a chessboard into tiles
of 128 pixels. Those of one colour are seen (trained on without labels, and shown as examples), those of the other are
asked. No asked pixel was trained on.

kNN: which photo does a quarter of an asked tile come from, cropped, in gray and in another light? It is the
quickstart's measure on a coarser chessboard.

Dense: mosaics of pieces of several photos. Patch features vote by nearest neighbours among the patches of mosaics of
seen tiles; asked mosaics are in gray and another light. The votes are brought to the size of the mask bilinearly, so
backbones of any patch and input of any size are compared on the same pixels.

The tasks, the change of colour and the recipe were chosen in trials of training from scratch (said in RESULTS.md).
"""

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import t as student  # comes with the quickstart's packages
from torch import Tensor

from opsin import quickstart
from opsin.backbone.probe import knn_classify
from opsin.backbone.vit import VisionTransformer
from opsin.backbone.weights import restore
from opsin.constants import IMAGENET_MEAN, IMAGENET_STD
from opsin.pretrain.monitor import MonitorRecipe
from opsin.pretrain.recipe import CheckpointRecipe, Recipe

FOLDER = Path("runs/evidence-data")
SIDE = 128
"""Side of a large tile and of a mosaic in pixels."""
REGIONS = 5
"""Photos in one mosaic, as cells of random points."""
MOSAICS = (96, 64)
"""Mosaics of seen tiles and of asked tiles."""
NEIGHBOURS = {"knn": quickstart.NEIGHBOURS, "dense": 10}
"""Votes."""
PATCHES = 6_000
"""Patches of the seen mosaics that are kept, whatever the size, so that a larger input has no larger gallery."""
SEEDS = (0, 1, 2)
LOW = quickstart.SIDE
"""Side of a global crop in pixels."""
DENSE = 2 * LOW
"""Side at which mosaics are looked at, unless resolutions are compared: their photos have the scale of tiles then."""
STEPS = 300


@dataclass(frozen=True)
class Paths:
    """What `prepare` made."""

    train: Path
    """Seen tiles of 64 pixels, one folder per photo."""
    large: Path
    """Seen tiles of 128 pixels, likewise."""
    mosaics: Path
    """`seen-000.png` with `seen-000-mask.png` (one value per photo), and `asked-…`."""


Look = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images in 0 … 1 `[N, 3, S, S]` to global features `[N, D]` and patch features `[N, h, w, D]`."""


@dataclass(frozen=True)
class Measured:
    """What a measure says of a backbone."""

    figures: dict[str, float]
    """By name: `knn`, or `dense` (share of right pixels) and `miou`."""
    items: Tensor
    """Share that is right of each query or mosaic `[N]`, for paired comparisons."""


def prepare(folder: Path = FOLDER) -> Paths:
    """Cut the photos, once; a second call finds the files there."""
    paths = Paths(*(folder / name for name in ("train", "large", "mosaics")))
    done = folder / "done"
    if done.exists():
        return paths
    photos = quickstart.shipped_photos()
    large = quickstart.cut(photos, SIDE)
    quickstart.save(paths.train, _quarters(large[0]), list(photos))
    quickstart.save(paths.large, large[0], list(photos))
    draw = np.random.default_rng(0)
    shutil.rmtree(paths.mosaics, ignore_errors=True)
    paths.mosaics.mkdir(parents=True)
    for kind, tiles, count in zip(("seen", "asked"), large, MOSAICS, strict=True):
        pieces = [tile.permute(1, 2, 0).numpy() for tile in tiles.images]
        for number in range(count):
            picture, mask = _mosaic(pieces, tiles.labels.numpy(), kind == "asked", draw)
            _save(picture, paths.mosaics / f"{kind}-{number:03d}.png")
            _save(mask, paths.mosaics / f"{kind}-{number:03d}-mask.png")
    done.touch()
    return paths


def _quarters(tiles: quickstart.Tiles) -> quickstart.Tiles:
    half = SIDE // 2
    corners = [(top, left) for top in (0, half) for left in (0, half)]
    images = [tile[:, y : y + half, x : x + half].contiguous() for tile in tiles.images for y, x in corners]
    return quickstart.Tiles(images, tiles.labels.repeat_interleave(4))


def _changed(piece: NDArray[np.uint8], draw: np.random.Generator) -> NDArray[np.uint8]:
    """In gray, in another brightness and contrast."""
    gray = piece @ np.array([0.299, 0.587, 0.114]) * draw.uniform(0.6, 1.4)
    gray = (gray - gray.mean()) * draw.uniform(0.6, 1.4) + gray.mean()
    return np.repeat(gray.clip(0, 255).round().astype(np.uint8)[..., None], 3, axis=2)


def _mosaic(
    tiles: Sequence[NDArray[np.uint8]], labels: NDArray[np.int64], changed: bool, draw: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A picture `[SIDE, SIDE, 3]` of tiles of `REGIONS` photos, and its mask `[SIDE, SIDE]` of their numbers."""
    points = draw.uniform(0, SIDE, (REGIONS, 2))
    pixels = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), -1)
    cells = ((pixels[:, :, None] - points) ** 2).sum(-1).argmin(-1)
    chosen = draw.choice(np.unique(labels), REGIONS, replace=False)
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    for number, photo in enumerate(chosen):
        piece = tiles[draw.choice(np.flatnonzero(labels == photo))]
        picture[cells == number] = (_changed(piece, draw) if changed else piece)[cells == number]
    return picture, chosen[cells].astype(np.uint8)


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(pixels).save(path)


def knn(backbone: VisionTransformer | Path, size: int) -> Measured:
    """Share of asked tiles whose photo is found, by the class tokens of the tiles at `size` pixels."""
    return _knn(_look(backbone, size))


def dense(backbone: VisionTransformer | Path, size: int, paths: Paths) -> Measured:
    """Share of right pixels of the asked mosaics and mean intersection over union, by patch tokens at `size` pixels."""
    return _dense(_look(backbone, size), paths)


def trivial(paths: Paths) -> dict[str, dict[str, float]]:
    """What raw pixels and colour histograms reach in both measures."""
    looks = {"raw pixels": _raw_pixels, "colour histogram": _colours}
    return {name: {**_knn(look).figures, **_dense(look, paths).figures} for name, look in looks.items()}


def untrained(recipe: Recipe) -> VisionTransformer:
    """A fresh backbone of a recipe's architecture, with its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return VisionTransformer(recipe.backbone)


def _look(backbone: VisionTransformer | Path, size: int) -> Look:
    model = (restore(backbone)[0] if isinstance(backbone, Path) else backbone).eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))

    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        cls, patches = [], []
        with torch.inference_mode():
            for part in torch.split(images, 32):
                resized = F.interpolate(part, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
                features = model([(resized - mean) / std])[0]
                cls.append(features.cls)
                patches.append(features.patches)
        return torch.cat(cls), torch.cat(patches)

    return look


def _raw_pixels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Means of 4 × 4 pixels of an image; for patches all pixels of each of 8 × 8."""
    patches = F.unfold(images - 0.5, 8, stride=8).transpose(1, 2)
    side = images.shape[-1] // 8
    return F.avg_pool2d(images - 0.5, 4).flatten(1), patches.unflatten(1, (side, side))


def _colours(images: Tensor) -> tuple[Tensor, Tensor]:
    """Histograms in 8 × 8 × 8 colours, of an image and of each patch of 16 × 16."""
    pieces, side = F.unfold(images, 16, stride=16).transpose(1, 2), images.shape[-1] // 16
    patches = quickstart.histogram(pieces.reshape(-1, 3, 16, 16))
    return quickstart.histogram(images), patches.view(len(images), side, side, -1)


def _knn(look: Look) -> Measured:
    trained_on, held_out = map(_quarters, quickstart.cut(quickstart.shipped_photos(), SIDE))
    gallery = torch.stack([quickstart.resized(tile) for tile in trained_on.images])
    queries, right = quickstart.changed(held_out, 0)
    votes = _votes(look(queries)[0], look(gallery)[0], trained_on.labels, "knn", int(trained_on.labels.max()) + 1)
    correct = (votes.argmax(1) == right).double()
    return Measured({"knn": correct.mean().item()}, correct)


def _dense(look: Look, paths: Paths) -> Measured:
    (seen, known), (asked, right) = _mosaics(paths, "seen"), _mosaics(paths, "asked")
    gallery, queries, photos = look(seen)[1], look(asked)[1], int(known.max()) + 1
    h, w = gallery.shape[1:3]
    # A patch has the class that covers most of it.
    cover = F.interpolate(F.one_hot(known, photos).permute(0, 3, 1, 2).float(), (h, w), mode="area")
    classes, gallery = cover.argmax(1).flatten(), gallery.flatten(0, 2)
    kept = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(0))[:PATCHES]
    votes = _votes(queries.flatten(0, 2), gallery[kept], classes[kept], "dense", photos)
    votes = votes.view(len(asked), h, w, photos).permute(0, 3, 1, 2)
    found = F.interpolate(votes, right.shape[1:], mode="bilinear").argmax(1)
    joint = torch.bincount((right * photos + found).flatten(), minlength=photos**2).view(photos, photos).double()
    shared = joint.diagonal()
    overlap = shared / (joint.sum(0) + joint.sum(1) - shared)
    correct = (found == right).double().mean((1, 2))
    return Measured({"dense": correct.mean().item(), "miou": overlap.mean().item()}, correct)


def _votes(queries: Tensor, gallery: Tensor, labels: Tensor, measure: str, classes: int) -> Tensor:
    k = NEIGHBOURS[measure]
    return knn_classify(queries, gallery, labels, (k,), num_classes=classes)[k]


def _mosaics(paths: Paths, kind: str) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, SIDE, SIDE]` in 0 … 1 and masks `[N, SIDE, SIDE]`."""
    masks = sorted(paths.mosaics.glob(f"{kind}-*-mask.png"))
    pictures = [mask.with_name(mask.name.replace("-mask", "")) for mask in masks]
    return _images(pictures), torch.stack([torch.from_numpy(np.array(Image.open(mask))).long() for mask in masks])


def _images(files: Sequence[Path]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]).float() / 255


@dataclass(frozen=True)
class Paired:
    """The difference of two ways, measured on the same items with the same seeds."""

    mean: float
    by_seed: tuple[float, ...]
    over_seeds: tuple[float, float]
    """95 % interval of the mean by Student's t over the seeds: would other seeds agree?"""
    over_items: tuple[float, float]
    """95 % interval by bootstrap over queries or mosaics, seeds as they are: would other images agree?"""

    def __str__(self) -> str:
        seeds, items = ("{:+.3f} to {:+.3f}".format(*interval) for interval in (self.over_seeds, self.over_items))
        return f"{self.mean:+.3f} (seeds {seeds}; images {items})"


def paired(ours: Sequence[Measured], theirs: Sequence[Measured], repeats: int = 10_000) -> Paired:
    """Compare two ways of training, each given by what was measured with every seed, two seeds or more."""
    difference = torch.stack([a.items - b.items for a, b in zip(ours, theirs, strict=True)]).numpy()
    by_seed, by_item = difference.mean(1), difference.mean(0)
    half = float(student.ppf(0.975, len(by_seed) - 1) * by_seed.std(ddof=1) / len(by_seed) ** 0.5)
    draws = np.random.default_rng(0).integers(0, len(by_item), (repeats, len(by_item)))
    low, high = np.quantile(by_item[draws].mean(1), [0.025, 0.975]).tolist()
    mean = float(by_seed.mean())
    return Paired(mean, tuple(by_seed.tolist()), (mean - half, mean + half), (low, high))


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds, then the values."""
    return f"{fmean(values):.3f} ± {stdev(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def recipe(seed: int, steps: int = STEPS) -> Recipe:
    """The run from scratch that the experiments share: the quickstart's, shorter."""
    return replace(
        quickstart.recipe(seed),
        steps=steps,
        checkpoint=CheckpointRecipe(every=100, keep=1),
        monitor=MonitorRecipe(probe_every=0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the images go")
    a = parser.parse_args()
    paths = prepare(a.folder)
    figures = trivial(paths)
    fresh = [untrained(recipe(seed)) for seed in SEEDS]
    both = [knn(b, LOW).figures | dense(b, DENSE, paths).figures for b in fresh]
    rows = [(name, *(f"{value:.3f}" for value in found.values())) for name, found in figures.items()]
    rows.append(("untrained", *(spread([found[name] for found in both]) for name in both[0])))
    print(table(("features", "kNN", "right pixels", "mIoU"), rows))


if __name__ == "__main__":
    main()
