"""`opsin quickstart`: a small backbone trained from scratch on a processor in minutes, measured and shown.

The task: photos are cut into tiles like a chessboard. The backbone trains on the tiles of one colour, without labels.
Then every tile of the other colour, cropped, turned to gray and changed in brightness and contrast, is assigned by its
nearest neighbours to one of the photos. What is left to tell by is structure, and no query shows a pixel that was
trained on. The same nearest-neighbour vote is taken with the untrained backbone, raw pixels and colour histograms.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from opsin import story
from opsin.backbone.probe import knn_classify, paired_bootstrap
from opsin.backbone.registry import architecture
from opsin.backbone.vit import VisionTransformer
from opsin.constants import IMAGENET_MEAN, IMAGENET_STD
from opsin.data.crops import CropRecipe, draw_crops, render
from opsin.data.decode import DecodeError, decode
from opsin.data.sources import scan
from opsin.data.stream import BatchRecipe
from opsin.errors import OpsinError
from opsin.machine import pick_device
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.phases import pretrain
from opsin.pretrain.presets import cpu
from opsin.pretrain.recipe import CheckpointRecipe, Recipe
from opsin.pretrain.schedules import ScheduleRecipe
from opsin.report.page import write_report

TILE = 64
"""Side of a tile in pixels."""
SIDE = 48
"""Side at which the backbone sees a tile."""
NEIGHBOURS = 10
"""Votes per query; chosen before any result was seen."""
QUERIES = 4
"""Random changes of every held-out tile, an even number."""
MOST_PHOTOS = 24
LONGEST = 512
"""Photos are reduced to this shorter side, so that a tile shows more than a few blades of grass."""
CHANGED = CropRecipe(
    global_size=SIDE,
    global_scale=(0.5, 1.0),
    jitter=1.0,
    brightness=0.4,
    contrast=0.6,
    saturation=0.0,
    hue=0.0,
    gray=1.0,
    blur=(0.0, 0.0, 0.0),
    solarize=(0.0, 0.0, 0.0),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
"""How queries are changed; values in 0 … 1, not normalised."""


def recipe(seed: int) -> Recipe:
    """A run of minutes on two cores: small crops, few prototypes, a young teacher, a high rate."""
    return replace(
        cpu(),
        backbone=replace(architecture("vit_nano8"), grid=SIDE // 8, layerscale=1.0, position_offset=0.0),
        seed=seed,
        steps=700,
        precision="bf16",
        log_every=5,
        batch=BatchRecipe(size=32, group=32),
        crops=CropRecipe(
            global_size=SIDE,
            local_size=24,
            local_count=4,
            local_scale=(0.1, 0.4),
            brightness=0.4,
            contrast=0.6,
            saturation=0.4,
            hue=0.3,
            gray=0.5,
        ),
        heads=HeadRecipe(
            dino_prototypes=1024, dino_bottleneck=128, ibot_prototypes=1024, ibot_bottleneck=128, hidden=512
        ),
        schedule=ScheduleRecipe(
            rate=8e-3,
            warmup_steps=30,
            decay=(0.04, 0.04),
            momentum=(0.9, 1.0),
            teacher_temperature=(0.04, 0.04),
            freeze_last_layer_steps=0,
        ),
        checkpoint=CheckpointRecipe(every=100, keep=1),
    )


@dataclass(frozen=True)
class Tiles:
    """Tiles of photos, each with the number of its photo."""

    images: list[Tensor]
    """uint8 `[3, S, S]`."""
    labels: Tensor
    """`[N]`"""


def run(out: Path, data: str | Path | None, *, seed: int, device: str | None) -> int:
    """Everything that `opsin quickstart` does; returns the exit status."""
    began = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    on = pick_device(device)
    if data is not None and out.resolve().is_relative_to(Path(data).resolve()):
        raise OpsinError(
            f"--out {out} lies inside --data {data}, where its tiles would count as photos: choose another."
        )
    photos = shipped_photos() if data is None else own_photos(data)
    trained_on, held_out = cut(photos)
    console.print(
        f"{len(photos)} photos: training on {len(trained_on.images)} tiles without labels, "
        f"testing on {len(held_out.images)} others"
    )
    tiles = out / "tiles"
    save(tiles, trained_on, list(photos))
    settings = recipe(seed)
    finished = pretrain(settings, tiles, out, device=device)
    if finished.stopped_by is not None:
        return 128 + finished.stopped_by

    before, after = story.backbones(out, settings, on)
    gallery = torch.stack([resized(tile) for tile in trained_on.images])
    queries, asked = changed(held_out, seed)
    representations: dict[str, Callable[[Tensor], Tensor]] = {
        "trained": lambda x: _tokens(after, x),
        "random_init": lambda x: _tokens(before, x),
        "raw_pixels": lambda x: F.avg_pool2d(x, 4).flatten(1) - 0.5,
        "colour_histogram": histogram,
    }
    correct = {}
    for name, represent in representations.items():
        votes = knn_classify(
            represent(queries), represent(gallery), trained_on.labels, (NEIGHBOURS,), num_classes=len(photos)
        )
        correct[name] = next(iter(votes.values())).argmax(1) == asked
    results = summary(correct, out, photos, began)
    try:
        (out / "results.json").write_text(json.dumps(results, indent=1))
    except OSError as error:
        raise OpsinError(f"cannot write {out / 'results.json'}: {error.strerror}.") from None
    report(out, settings, results, trained_on, held_out, list(photos), list(photos.values()), before, after)
    show(console, results, out)
    return 0


def shipped_photos() -> dict[str, Tensor]:
    """Photos inside scikit-image and scikit-learn that each show much of one material, by name, `[3, H, W]` uint8."""
    try:
        import skimage
        import sklearn
    except ImportError as error:
        raise OpsinError(
            f"the quickstart's photos come with a package that is missing ({error.name}): "
            "pip install 'opsin[quickstart]', or give a folder of your own photos with --data."
        ) from None
    skimage_data = Path(skimage.__file__).parent / "data"
    sklearn_data = Path(sklearn.__file__).parent / "datasets" / "images"
    names = ["brick", "cell", "coins", "grass", "gravel", "hubble_deep_field", "ihc", "moon", "page", "retina"]
    files = [path for name in names for path in skimage_data.glob(f"{name}.*")]
    files += [sklearn_data / "china.jpg", sklearn_data / "flower.jpg"]
    return {path.stem: _reduced(decode(path)) for path in files}


def own_photos(data: str | Path) -> dict[str, Tensor]:
    """The photos of a folder, at most `MOST_PHOTOS` of them, evenly spaced."""
    source = scan(data)
    count = min(len(source), MOST_PHOTOS)
    large = {}
    for number in range(count):
        index = number * len(source) // count
        with contextlib.suppress(DecodeError):  # a broken photo is left out
            photo = _reduced(decode(source.open(index)))
            if min(photo.shape[-2:]) >= 2 * TILE:
                large[f"{number:02d}-{Path(source.name(index)).stem}"] = photo
    if len(large) < 2:
        raise OpsinError(
            f"{data} has {len(large)} photo(s) of {2 * TILE} × {2 * TILE} pixels or more, and the quickstart needs two "
            "or more: give larger photos."
        )
    return large


def _reduced(photo: Tensor) -> Tensor:
    short = min(photo.shape[-2:])
    if short <= LONGEST:
        return photo.contiguous()
    size = [round(side * LONGEST / short) for side in photo.shape[-2:]]
    reduced = F.interpolate(photo[None].float(), size=size, mode="bicubic", antialias=True)[0]
    return reduced.clamp(0, 255).round().to(torch.uint8)


def cut(photos: dict[str, Tensor], side: int = TILE) -> tuple[Tiles, Tiles]:
    """Tiles of both colours of the chessboard, of `side` pixels: those to train on, and those held out."""
    parts: tuple[tuple[list[Tensor], list[int]], ...] = (([], []), ([], []))
    for number, photo in enumerate(photos.values()):
        for row in range(photo.shape[1] // side):
            for column in range(photo.shape[2] // side):
                images, labels = parts[(row + column) % 2]
                images.append(photo[:, row * side : (row + 1) * side, column * side : (column + 1) * side].contiguous())
                labels.append(number)
    (train, train_labels), (test, test_labels) = parts
    return Tiles(train, torch.tensor(train_labels)), Tiles(test, torch.tensor(test_labels))


def save(target: Path, tiles: Tiles, names: Sequence[str]) -> None:
    """Write tiles as PNG files, one folder per photo; what an earlier call wrote goes."""
    shutil.rmtree(target, ignore_errors=True)
    try:
        for number, (image, label) in enumerate(zip(tiles.images, tiles.labels.tolist(), strict=True)):
            path = target / names[label] / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    except OSError as error:
        raise OpsinError(f"cannot write tiles into {target}: {error}. Choose another --out.") from None


def changed(tiles: Tiles, seed: int) -> tuple[Tensor, Tensor]:
    """Random crops of tiles in random colours `[N, 3, SIDE, SIDE]`, and the photos they come from `[N]`."""
    images, labels = tiles.images * (QUERIES // 2), tiles.labels.repeat(QUERIES // 2)
    sizes = np.array([image.shape[-2:] for image in images])
    # The two "global" crops of every tile, drawn far from the positions that training uses.
    plan = draw_crops(CHANGED, "global", seed, 2**40 + np.arange(len(images)), sizes)
    return render(CHANGED, "global", images, plan), labels.repeat(2)


def histogram(x: Tensor) -> Tensor:
    """Square roots of counts in 8 × 8 × 8 colours `[N, 512]`: their cosine is the Bhattacharyya coefficient."""
    red, green, blue = (x * 7.999).long().unbind(1)
    return torch.stack([torch.bincount(c.flatten(), minlength=512) for c in red * 64 + green * 8 + blue]).float().sqrt()


def resized(tile: Tensor) -> Tensor:
    """A tile `[3, S, S]` as the backbone sees it, in 0 … 1."""
    x = F.interpolate(tile[None].float() / 255, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return x[0].clamp(0, 1)


@torch.no_grad()
def _tokens(backbone: VisionTransformer, x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    device = backbone.cls_token.device
    return torch.cat([backbone([part.to(device)])[0].cls.cpu() for part in torch.split((x - mean) / std, 256)])


def summary(correct: dict[str, Tensor], out: Path, photos: dict[str, Tensor], began: float) -> dict[str, Any]:
    """What results.json holds.

    `knn` (accuracy of trained, random_init, raw_pixels, colour_histogram), `chance`, `queries`, `best_baseline`,
    `margin` (trained less that one) with its 95 % interval `margin_95` by paired bootstrap, `images_per_second`
    (median of training), `seconds` (of everything).
    """
    accuracy = {name: hits.float().mean().item() for name, hits in correct.items()}
    best = max((name for name in accuracy if name != "trained"), key=lambda name: accuracy[name])
    margin, low, high = paired_bootstrap(correct["trained"], correct[best])
    speeds = sorted(record["images_per_second"] for record in story.metrics(out))
    return {
        "knn": accuracy,
        "chance": 1 / len(photos),
        "queries": len(correct["trained"]),
        "best_baseline": best,
        "margin": margin,
        "margin_95": [low, high],
        "images_per_second": speeds[len(speeds) // 2],
        "seconds": time.perf_counter() - began,
    }


NAMES = {
    "trained": "Trained backbone",
    "random_init": "Same backbone, untrained",
    "raw_pixels": "Raw pixels",
    "colour_histogram": "Colour histogram",
}


def report(
    out: Path,
    settings: Recipe,
    results: dict[str, Any],
    trained_on: Tiles,
    held_out: Tiles,
    names: list[str],
    photos: list[Tensor],
    before: VisionTransformer,
    after: VisionTransformer,
) -> None:
    """Write report.html."""
    low, high = results["margin_95"]
    page = story.facts(out, settings)
    page["title"] = "Quickstart: features learned in minutes, without labels"
    page["subtitle"] = (
        f"From {len(trained_on.images)} tiles of {len(names)} photos; tested on {len(held_out.images)} others."
    )
    page["table"] = {
        "headers": ["Features", f"kNN accuracy ({NEIGHBOURS} neighbours)"],
        "rows": [[NAMES[name], f"{value:.3f}"] for name, value in results["knn"].items()],
        "note": (
            "Which photo does an unseen tile come from, cropped, in gray and changed in brightness and contrast? "
            f"Chance is {results['chance']:.3f}. The trained backbone is {results['margin']:+.3f} from the best of the "
            f"others, 95 % interval {low:+.3f} to {high:+.3f} over {results['queries']} queries (paired bootstrap)."
        ),
    }
    page["says"] = {
        "shows": [
            "That training taught the backbone structure that survives a change of light and the loss of colour: it "
            "knows the photo an unseen tile comes from better than the same backbone untrained, raw pixels or "
            "histograms do, as far as the interval above says.",
            "That reading, cropping, training, checkpoints, measuring and this page work on this machine.",
        ],
        "shows_not": [
            "General features: a few hundred tiles and minutes of a processor cannot give them, and features for other "
            "photos need a run on many more.",
            "A benchmark: the photos that ship, the changes to the queries and the recipe were chosen in trials "
            "on this task, so that colour alone does not solve it and minutes suffice.",
            "Independent test images: held-out tiles are neighbours of the trained ones in the same photos.",
        ],
    }
    tokens = _tokens(after, torch.stack([resized(tile) for tile in held_out.images]))
    labels = held_out.labels.tolist()
    firsts = [labels.index(number) for number in range(0, len(names), max(1, len(names) // 5)) if number in labels]
    page["neighbours"] = story.neighbours(held_out.images, tokens, firsts[:6], [names[label] for label in labels])
    shown = photos[len(photos) // 6 :: max(1, len(photos) // 4)][:4]
    page["pca"] = story.patch_pictures(shown, before, after, 4 * SIDE, out / "pca.safetensors")
    write_report(out / "report.html", page)


def show(console: Console, results: dict[str, Any], out: Path) -> None:
    """Print the table and where the report is."""
    table = Table("features", "kNN accuracy", title="unseen tiles, in gray: which photo?")
    for name, value in results["knn"].items():
        table.add_row(NAMES[name], f"{value:.3f}")
    table.add_row("chance", f"{results['chance']:.3f}")
    console.print(table)
    low, high = results["margin_95"]
    console.print(
        f"trained {results['margin']:+.3f} against {NAMES[results['best_baseline']].lower()} "
        f"(95 % interval {low:+.3f} to {high:+.3f}) · {results['images_per_second']:.0f} images/s · "
        f"{results['seconds']:.0f} s in all"
    )
    console.print(f"report: {out / 'report.html'}")
