"""Object discovery without labels: one box per image from patch features alone, and how often it is right (CorLoc)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from opsin.data.decode import DecodeError
from opsin.data.progress import progress
from opsin.errors import OpsinError, within
from opsin.evaluate.datasets.boxes import fingerprint_of, read_boxes
from opsin.evaluate.model import Model
from opsin.evaluate.sets import ImageSet
from opsin.evaluate.store import place, recalled, save
from opsin.evaluate.task import Picture, Result, Run, Table

FAINT = 1e-5
"""Weight of an edge between patches that are not alike: the graph stays connected (TokenCut)."""
MOST = 4096
"""Patches of an image at most: their similarities are a matrix, whose eigenvectors are sought."""
RIGHT = 0.5
"""A box is right if its intersection over union with that of an object is at least this."""
PART = 64
"""Images between two savings."""
SHOWN = 6
"""Images that are pictured."""


@dataclass(frozen=True)
class Discovery:
    """Settings of object discovery."""

    data: str = ""
    """voc2007:PATH, voc2012:PATH, or a folder of images with --boxes."""
    boxes: Path | None = None
    """COCO-style JSON file with the boxes of a folder of images."""
    method: Literal["cut", "kmeans"] = "cut"
    """How patches are parted in two: by a normalised cut of their similarities (TokenCut, Wang et al., 2202.11539), or
    by 2-means of their features."""
    size: int = 448
    """Shorter side of an image in pixels; its aspect is kept. Less for long ones, which have 4,096 patches at most."""
    threshold: float = 0.2
    """Cosine similarity above which two patches are alike, for the cut."""

    def __post_init__(self) -> None:
        within(self, "--", size=(14, 4096), threshold=(-1, 1))


def discovery(model: Model, settings: Discovery, run: Run) -> Result:
    """Object discovery: the share of images in which one box, found without labels, is right (CorLoc)."""
    images, truth = read_boxes(settings.data, settings.boxes)
    folder = place(
        run.cache, "discovery", weights=model.digest, images=images.fingerprint, method=settings.method,
        size=settings.size, threshold=settings.threshold, boxes=fingerprint_of(truth), part=PART,
    )  # fmt: skip
    boxes: dict[int, list[float]] = {}
    bad: list[tuple[str, str]] = []
    with progress("discovery", len(images), "images", run.progress) as advance:
        for start in range(0, len(images), PART):
            part, kept = range(start, min(start + PART, len(images))), folder / f"{start}.json"
            answers = recalled(kept)
            if answers is None or len(answers) != len(part):
                answers = [_box(model, images, index, settings) for index in part]
                save(kept, answers)
            for index, answer in zip(part, answers, strict=True):
                if isinstance(answer, str):
                    bad.append((images.name(index), answer))
                else:
                    boxes[index] = answer
            advance(len(part))
    if not boxes:
        raise OpsinError(f"no image of {images.where} can be decoded: replace the damaged files.")
    best = np.array([overlap(torch.tensor([boxes[i]]), truth[i]).max().item() for i in boxes])
    right = (best >= RIGHT).astype(np.float64)
    metrics = {"corloc": float(right.mean()), "overlap": float(best.mean())}
    pictures = [_picture(images.read(i), boxes[i], truth[i], Path(images.name(i)).name) for i in list(boxes)[:SHOWN]]
    return Result(
        images.where,
        metrics,
        Table(
            ["method", "images", "CorLoc", "mean overlap"],
            [[settings.method, f"{len(boxes):,}", f"{metrics['corloc']:.4f}", f"{metrics['overlap']:.4f}"]],
            f"CorLoc: share of images whose box overlaps that of an object by {RIGHT:g} or more. Objects marked as "
            "difficult count too.",
        ),
        {"images": len(boxes)},
        bad,
        right,
        pictures,
    )


def find(patches: Tensor, method: str, threshold: float) -> Tensor:
    """The patches of the main object, booleans `[h, w]`, from patch features `[h, w, D]`.

    Patches are parted in two; the object is the part that holds the patch which stands out most, and of it the patches
    connected with that one.
    """
    h, w, _ = patches.shape
    unit = F.normalize(patches.flatten(0, 1).double(), dim=1)
    score = _cut(unit, threshold) if method == "cut" else _two_means(unit, h, w)
    inside = score > (score.mean() if method == "cut" else 0)
    seed = int(score.abs().argmax()) if method == "cut" else int(score.argmax())
    if not inside[seed]:
        inside = ~inside
    return _connected(inside.reshape(h, w).cpu(), (seed // w, seed % w))


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes `[N, 4]` and `[M, 4]`, `[N, M]`."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def _cut(unit: Tensor, threshold: float) -> Tensor:
    """The second smallest generalised eigenvector of (D − A, D), which parts a graph at its normalised cut."""
    weights = torch.where(unit @ unit.T > threshold, 1.0, FAINT).to(unit.dtype)
    scale = weights.sum(1).rsqrt()
    # The same vector is the second largest of D^-1/2 A D^-1/2, scaled.
    vectors = torch.linalg.eigh(scale[:, None] * weights * scale).eigenvectors
    second: Tensor = vectors[:, -2] * scale
    return second


def _two_means(unit: Tensor, h: int, w: int) -> Tensor:
    """2-means: how much nearer each patch is to the mean of the part that has the smaller share of border patches."""
    axis = torch.linalg.svd(unit - unit.mean(0), full_matrices=False).Vh[0]
    side = (unit - unit.mean(0)) @ axis > 0
    distance = unit.new_zeros(len(unit), 2)
    for _ in range(100):
        if side.all() or not side.any():
            return distance[:, 0]
        distance = torch.cdist(unit, torch.stack([unit[~side].mean(0), unit[side].mean(0)]))
        moved = distance.argmin(1).bool()
        if torch.equal(moved, side):
            break
        side = moved
    border = torch.ones(h, w, dtype=torch.bool, device=unit.device)
    border[1:-1, 1:-1] = False
    outer = [(border.flatten() & part).sum() / part.sum() for part in (~side, side)]
    return (distance[:, 0] - distance[:, 1]) * (1 if outer[1] <= outer[0] else -1)


def _connected(inside: Tensor, seed: tuple[int, int]) -> Tensor:
    """The patches of `inside` that are connected with `seed` by sides."""
    found = torch.zeros_like(inside)
    found[seed] = True
    while True:
        near = F.max_pool2d(found[None, None].float(), (3, 1), 1, (1, 0))[0, 0].bool()
        near |= F.max_pool2d(found[None, None].float(), (1, 3), 1, (0, 1))[0, 0].bool()
        grown = (near & inside) | found
        if torch.equal(grown, found):
            return found
        found = grown


def _box(model: Model, images: ImageSet, index: int, settings: Discovery) -> list[float] | str:
    """Left, top, right and bottom of what was found, in pixels of the file, or why it cannot be read."""
    try:
        pixels = images.read(index)
    except DecodeError as error:
        return error.reason
    batch = model.extractor.preprocess(pixels, _size(pixels, settings.size, model.arch.patch))[None]
    if batch.shape[-2] * batch.shape[-1] <= model.arch.patch**2:
        raise OpsinError(f"--size {settings.size} is one patch of {model.arch.patch} pixels: give a larger one.")
    inside = find(model.extractor.features(batch).patches[0], settings.method, settings.threshold)
    rows, columns = (inside.any(axis).nonzero()[:, 0] for axis in (1, 0))
    h, w = inside.shape
    height, width = pixels.shape[1:]
    x, y = width / w, height / h
    return [columns[0].item() * x, rows[0].item() * y, (columns[-1].item() + 1) * x, (rows[-1].item() + 1) * y]


def _size(pixels: Tensor, size: int, patch: int) -> int:
    """The shorter side that is asked for, or a smaller one with which a long image has no more than `MOST` patches."""
    height, width = pixels.shape[-2:]
    most = patch * (MOST * min(height, width) / max(height, width)) ** 0.5
    return max(min(size, int(most)), patch)


def _picture(pixels: Tensor, box: list[float], truth: Tensor, name: str) -> Picture:
    image = Image.fromarray(pixels[:3].permute(1, 2, 0).numpy())
    draw, line = ImageDraw.Draw(image), max(2, max(image.size) // 200)
    for one in truth.tolist():
        draw.rectangle(one, outline="white", width=line)
    draw.rectangle(box, outline="red", width=line)
    array: NDArray[np.uint8] = np.asarray(image)
    return Picture(f"{name} (red: found, white: objects)", array)
