"""The report of a run: reads what the run left behind, looks through both backbones, hands dictionaries to `report`.

"Before" is what the run began with: weights of a file or of the phase before, or its own initialisation, made again
from its recipe and seed. "After" is the average it ended with.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.backbone import weights
from opsin.backbone.features import load
from opsin.backbone.probe import OUTLIER, PcaPicture, knn_accuracy, outliers, pca_basis, rank_me
from opsin.backbone.vit import VisionTransformer
from opsin.constants import normalisation
from opsin.data.crops import as_unit
from opsin.data.reader import ImageReader
from opsin.data.sources import scan
from opsin.evaluate.model import wrap
from opsin.evaluate.pooled import extract
from opsin.evaluate.sets import ImageSet
from opsin.evaluate.task import Run
from opsin.evaluate.transforms import Centre
from opsin.machine import pick_device
from opsin.pretrain.recipe import Recipe, read
from opsin.pretrain.step import build
from opsin.report.page import write_report
from opsin.report.pictures import loss_curves, neighbour_rows, norm_grid, norm_histogram, pca_grid, read_metrics

LOOKED_AT = 512
"""Images of the data, evenly spaced, on which a report measures and among which it looks for neighbours."""
NEIGHBOURS = 10
PICTURED = 4
"""Images whose patches are shown."""
NORMS = 32
"""Images of the data, evenly spaced, of whose patches the norms are taken."""


def tell(out: Path, data: str | Path, device: str | None = None) -> Path:
    """Write OUT/report.html for a finished run on `data` and return its path."""
    on = pick_device(device)
    recipe = read(out / "recipe.yaml")
    before, after = backbones(out, recipe, on)
    source = scan(data, cache=out / "cache")
    count = min(LOOKED_AT, len(source))
    chosen = [i * len(source) // count for i in range(count)]
    threads, channels = recipe.data.threads(), recipe.backbone.channels
    with ImageReader(source, workers=threads, channels=channels, max_bad_fraction=1) as reader:
        images = reader.read_many(chosen)
        good = [row for row, index in enumerate(chosen) if index not in reader.bad]
    images = [images[row] for row in good]
    labels = None if source.labels is None else [int(source.labels[chosen[row]]) for row in good]
    size = recipe.crops.global_size
    tokens = {name: class_tokens(images, net, size) for name, net in (("before", before), ("after", after))}
    report = facts(out, recipe)
    report["title"] = "A backbone pretrained without labels"
    report["subtitle"] = f"{len(source)} images of {source.root}"
    report["table"] = _measures(tokens, labels)
    report["says"] = _says(labels is not None, len(images))
    names = None if labels is None else [source.classes[label] for label in labels]
    report["neighbours"] = neighbours(images, tokens["after"], _spread(len(images), 5), names)
    some, side = [images[i] for i in _spread(len(images), NORMS)], _picture_side(size)
    pictured = [some[i] for i in _spread(len(some), PICTURED)]
    report["pca"] = patch_pictures(pictured, before, after, size, out / "pca.safetensors")
    norms = {"Before training": patch_norms(some, before, side), "After training": patch_norms(some, after, side)}
    report["norms"] = norm_pictures(some, norms, side)
    path = out / "report.html"
    write_report(path, report)
    return path


def backbones(out: Path, recipe: Recipe, device: torch.device) -> tuple[VisionTransformer, VisionTransformer]:
    """The run's backbone before and after training, in eval mode."""
    before = build(recipe, device)[0].backbone.eval()
    begin = json.loads((out / "run.json").read_text())["begin"]
    if begin["before"] is not None:
        weights.adapt(before, out / begin["before"] / "backbone.safetensors")
    elif recipe.weights:
        weights.adapt(before, recipe.weights)
    return before, load(out / "backbone.safetensors", device=device).backbone


def class_tokens(images: Sequence[Tensor], backbone: VisionTransformer, size: int) -> Tensor:
    """Class tokens of the central crops of images `[C, H, W]`, not of unit length: `[B, D]`, fp32 on the CPU."""
    model = wrap(backbone, precision="bf16" if backbone.cls_token.is_cuda else None)
    read = ImageSet("", len(images), images.__getitem__, str, "", channels=backbone.arch.channels)
    return extract(model, read, range(len(images)), Centre(size), Run(workers=1), lambda _: None)[0].cls[:, -1]


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
    pixels = {i: _shown(as_unit(images[i])) for row in [*nearest, list(queries)] for i in row}
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
    prepared = [_square(image, _picture_side(size) // patch * patch) for image in images]
    batch = _normalised(prepared)
    panels = {}
    for name, backbone in (("Before training", before), ("After training", after)):
        with torch.no_grad():
            patches = backbone([batch.to(backbone.cls_token.device, backbone.cls_token.dtype)])[0].patches.cpu()
        picture: PcaPicture = pca_basis(list(patches))
        panels[name] = [picture.apply(p) for p in patches]
        if backbone is after:
            picture.save(basis)
    return pca_grid([_shown(image) for image in prepared], panels)


def _picture_side(size: int) -> int:
    """Twice the training size has four times the patches: pictures in which something can be seen; 518 has enough."""
    return 2 * size if size <= 256 else size


@torch.no_grad()
def patch_norms(images: Sequence[Tensor], backbone: VisionTransformer, side: int) -> Tensor:
    """Lengths of the patch features before the final LayerNorm, `[B, h, w]`, fp32 on the CPU.

    Of the central squares of images `[C, H, W]`, at `side` pixels rounded down to a multiple of the patch.
    """
    side = max(1, side // backbone.arch.patch) * backbone.arch.patch
    norms = []
    for start in range(0, len(images), 8):  # at high resolution a few images are a full batch
        batch = _normalised([_square(image, side) for image in images[start : start + 8]])
        batch = batch.to(backbone.cls_token.device, backbone.cls_token.dtype)
        patches = backbone.layers(batch, [-1], normalise=False)[0].patches
        norms.append(patches.float().norm(dim=-1).cpu())
    return torch.cat(norms)


def norm_pictures(images: Sequence[Tensor], norms: Mapping[str, Tensor], side: int) -> dict[str, Any]:
    """The report's `norms`: how long the patch features of each model are, and how many are outliers.

    Args:
        images: `[C, H, W]`.
        norms: name of a model → what `patch_norms` gave for `images` at `side`.
        side: of an image in pixels.
    """
    found = {name: outliers(values) for name, values in norms.items()}
    relative = {name: (values / found[name].median).numpy() for name, values in norms.items()}
    rows = _spread(len(images), PICTURED)
    grid = norm_grid(
        [_shown(_square(images[row], side)) for row in rows],
        {name: list(values[rows]) for name, values in relative.items()},
    )
    return grid | {
        "histogram": norm_histogram(relative, OUTLIER),
        "limit": f"{OUTLIER:g}",
        "table": {
            "headers": ["", "Outliers", "Largest / median", "Median"],
            "rows": [
                [name, f"{o.share:.2%}" if o.share else "none", f"{o.peak:.2f}", f"{o.median:.3g}"]
                for name, o in found.items()
            ],
            "note": f"Over all patches of {len(images)} images at {side} × {side} pixels.",
        },
    }


def _square(image: Tensor, side: int) -> Tensor:
    """The central square of an image `[C, H, W]`, resized, in 0 … 1."""
    h, w = image.shape[-2:]
    short = min(h, w)
    top, left = (h - short) // 2, (w - short) // 2
    window = as_unit(image[None, :, top : top + short, left : left + short])
    return F.interpolate(window, size=(side, side), mode="bicubic", antialias=True)[0].clamp(0, 1)


def _normalised(images: Sequence[Tensor]) -> Tensor:
    """Images in 0 … 1 as the batch `[B, C, H, W]` that a backbone takes."""
    mean, std = (torch.tensor(v)[:, None, None] for v in normalisation(len(images[0])))
    return (torch.stack(list(images)) - mean) / std


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


def _shown(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels `[H, W, 3]` of an image `[C, H, W]` in 0 … 1: of more than three channels the first three, else gray."""
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
