"""The report of a run: reads what the run left behind, looks through both backbones, hands dictionaries to `report`.

"Before" is the run's own initialisation, made again from its recipe and seed; "after" is the teacher it ended with.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.backbone.features import load
from opsin.backbone.probe import PcaPicture, knn_accuracy, pca_basis, rank_me
from opsin.backbone.vit import VisionTransformer
from opsin.constants import IMAGENET_MEAN, IMAGENET_STD
from opsin.data.reader import ImageReader
from opsin.data.sources import scan
from opsin.evaluate.knn import extract
from opsin.machine import pick_device
from opsin.pretrain.recipe import Recipe, read
from opsin.pretrain.step import build
from opsin.report.page import write_report
from opsin.report.pictures import loss_curves, neighbour_rows, pca_grid, read_metrics

LOOKED_AT = 512
"""Images of the data, evenly spaced, on which a report measures and among which it looks for neighbours."""
NEIGHBOURS = 10


def tell(out: Path, data: str | Path, device: str | None = None) -> Path:
    """Write OUT/report.html for a finished run on `data` and return its path."""
    on = pick_device(device)
    recipe = read(out / "recipe.yaml")
    before, after = backbones(out, recipe, on)
    source = scan(data, cache=out / "cache")
    count = min(LOOKED_AT, len(source))
    chosen = [i * len(source) // count for i in range(count)]
    with ImageReader(source, workers=recipe.data.threads(), max_bad_fraction=1) as reader:
        images = reader.read_many(chosen)
        good = [row for row, index in enumerate(chosen) if index not in reader.bad]
    images = [images[row] for row in good]
    labels = None if source.labels is None else [int(source.labels[chosen[row]]) for row in good]
    size = recipe.crops.global_size
    tokens = {
        name: extract(net, images.__getitem__, len(images), size=size, batch_size=64, device=on)
        for name, net in (("before", before), ("after", after))
    }
    report = facts(out, recipe)
    report["title"] = "A backbone pretrained without labels"
    report["subtitle"] = f"{len(source)} images of {source.root}"
    report["table"] = _measures(tokens, labels)
    report["says"] = _says(labels is not None, len(images))
    names = None if labels is None else [source.classes[label] for label in labels]
    report["neighbours"] = neighbours(images, tokens["after"], _spread(len(images), 5), names)
    report["pca"] = patch_pictures(
        [images[i] for i in _spread(len(images), 4)], before, after, size, out / "pca.safetensors"
    )
    path = out / "report.html"
    write_report(path, report)
    return path


def backbones(out: Path, recipe: Recipe, device: torch.device) -> tuple[VisionTransformer, VisionTransformer]:
    """The run's backbone before and after training, in eval mode."""
    before = build(recipe, device)[0].backbone.eval()
    return before, load(out / "backbone.safetensors", device=device).backbone


def metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return read_metrics(out / "metrics.jsonl")


def facts(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Curves, recipe, timings and versions, from the files of a run."""
    records = metrics(out)
    run = json.loads((out / "run.json").read_text())
    last = records[-1]
    speeds = sorted(record["images_per_second"] for record in records)
    step_seconds = [record["step_seconds"] for record in records]
    waiting = sum(record["data_seconds"] for record in records) / max(sum(step_seconds), 1e-9)
    arch = recipe.backbone
    return {
        "summary": [
            {"label": "Steps", "value": f"{last['step']:,}"},
            {"label": "Images seen", "value": f"{last['images']:,}"},
            {"label": "Images per second", "value": f"{speeds[len(speeds) // 2]:.0f}"},
            {"label": "Final loss", "value": f"{last['loss']:.3f}"},
        ],
        "curves": loss_curves(records),
        "timings": [
            {"label": "Median step", "value": f"{sorted(step_seconds)[len(step_seconds) // 2]:.3f} s"},
            {"label": "Waiting for images", "value": f"{waiting:.1%} of the time"},
            {"label": "Device", "value": f"{run['device']}, {recipe.precision}, {run['threads']} threads"},
            {"label": "Backbone", "value": f"{arch.depth} blocks, width {arch.width}, patch {arch.patch}"},
        ],
        "versions": [
            {"label": name, "value": str(run[name])}
            for name in ("opsin", "torch", "torchvision", "python", "decoder", "git", "seed")
        ],
        "recipe": (out / "recipe.yaml").read_text(),
    }


def neighbours(
    images: Sequence[Tensor], tokens: Tensor, queries: Sequence[int], names: Sequence[str] | None, shown: int = 6
) -> list[dict[str, Any]]:
    """Rows of the report's neighbours: for every query the images with the nearest class tokens, itself left out."""
    unit = F.normalize(tokens, dim=1)
    similarity = unit[list(queries)] @ unit.T
    similarity[torch.arange(len(queries)), torch.tensor(list(queries))] = -torch.inf
    nearest = similarity.topk(min(shown, len(images) - 1), dim=1).indices.tolist()
    pixels = {i: _pixels(images[i]) for row in [*nearest, list(queries)] for i in row}
    return neighbour_rows(
        [pixels[i] for i in queries],
        [names[i] if names else "" for i in queries],
        pixels,
        {i: names[i] if names else "" for i in pixels},
        nearest,
    )


def patch_pictures(
    images: Sequence[Tensor], before: VisionTransformer, after: VisionTransformer, size: int, basis: Path
) -> dict[str, Any]:
    """Joint-PCA pictures of the images' patch features before and after; the basis of "after" is saved to `basis`."""
    patch = after.arch.patch
    # Twice the training size gives four times the patches: pictures in which something can be seen.
    prepared = [_square(image, 2 * size // patch * patch) for image in images]
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    batch = torch.stack([(image - mean) / std for image in prepared])
    panels = {}
    for name, backbone in (("Before training", before), ("After training", after)):
        with torch.no_grad():
            patches = backbone([batch.to(backbone.cls_token.device, backbone.cls_token.dtype)])[0].patches.cpu()
        picture: PcaPicture = pca_basis(list(patches))
        panels[name] = [picture.apply(p) for p in patches]
        if backbone is after:
            picture.save(basis)
    return pca_grid([_pixels((image * 255).round().to(torch.uint8)) for image in prepared], panels)


def _square(image: Tensor, side: int) -> Tensor:
    """The central square of a uint8 image `[3, H, W]`, resized, in 0 … 1."""
    h, w = image.shape[-2:]
    short = min(h, w)
    top, left = (h - short) // 2, (w - short) // 2
    window = image[None, :, top : top + short, left : left + short].float() / 255
    return F.interpolate(window, size=(side, side), mode="bicubic", antialias=True)[0].clamp(0, 1)


def _measures(tokens: dict[str, Tensor], labels: list[int] | None) -> dict[str, Any]:
    rows = [["Effective rank (RankMe)", *(f"{rank_me(t):.1f}" for t in tokens.values())]]
    if labels is not None:
        asked = torch.tensor(labels)
        accuracy = [
            knn_accuracy(t, t, asked, asked, (NEIGHBOURS,), num_classes=int(asked.max()) + 1, exclude_self=True)
            for t in tokens.values()
        ]
        rows.insert(
            0, [f"kNN, {NEIGHBOURS} neighbours, leave one out", *(f"{next(iter(a.values())):.3f}" for a in accuracy)]
        )
    note = f"On {len(next(iter(tokens.values())))} images of the training data."
    return {"headers": ["", "Before training", "After training"], "rows": rows, "note": note}


def _says(labelled: bool, images: int) -> dict[str, list[str]]:
    shows = ["Whether the features of these images changed, spread out, and group what looks alike."]
    if labelled:
        shows.append(f"How often images of one folder are neighbours, over {images} images the backbone trained on.")
    return {
        "shows": shows,
        "shows_not": [
            "How the features do on images the backbone has not seen: evaluate those with opsin evaluate knn.",
        ],
    }


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` different rows of `count`, evenly spaced."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def _pixels(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return image.permute(1, 2, 0).contiguous().numpy()
