"""What evaluations with an answer per pixel share: images with targets, and patch features of images of any size."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.backbone.vit import Features
from opsin.constants import normalisation
from opsin.data.decode import shown
from opsin.errors import OpsinError
from opsin.evaluate.model import Model
from opsin.evaluate.sets import ImageSet

EXAMPLES = 3
"""Names that a message lists."""


@dataclass(frozen=True, eq=False)
class PairSet:
    """Images, each with a target of its own height and width."""

    images: ImageSet
    """The images."""
    target: Callable[[int], Tensor]
    """The target of an image: classes int64 `[H, W]`, or metres float32 `[H, W]`. Raises an OpsinError if it is not
    what the set promises."""
    classes: Sequence[str] = ()
    """Names of the classes, if the targets are classes."""

    def __len__(self) -> int:
        return len(self.images)


def normalised(pixels: Tensor) -> Tensor:
    """Pixels `[..., C, H, W]` from 0 to 255 (of any type) to what the backbone takes, float32."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in normalisation(pixels.shape[-3]))
    return (pixels.float() / 255 - mean) / std


def centred(images: Tensor, multiple: int) -> Tensor:
    """Images `[B, C, H, W]` padded with zeros on all sides to multiples, an odd row or column below or to the right."""
    pads = [(-side) % multiple for side in images.shape[-2:]]
    (top, bottom), (left, right) = ((pad // 2, pad - pad // 2) for pad in pads)
    return F.pad(images, (left, right, top, bottom))


def patch_features(model: Model, images: Tensor, layers: Sequence[int], *, normalise: bool) -> list[Features]:
    """Features of blocks for normalised images `[B, C, H, W]` of any size, which are padded to the patch (`centred`).

    As in the reference, the features of the padding are part of the grid and are never cut off.

    Args:
        model: the frozen backbone.
        images: on any device.
        layers: blocks, 0 the first, -1 the last.
        normalise: apply the final norm to each.
    """
    batch = centred(images.to(model.device), model.arch.patch)
    return model.extractor.features(batch, layers=layers, normalise=normalise)


def matched(
    images: Path, targets: Path, image_endings: Sequence[str], target_endings: Sequence[str]
) -> tuple[list[Path], list[Path]]:
    """Files of two folders whose paths are equal but for the ending, in order.

    Raises:
        OpsinError: a folder is missing or empty, or a file has no partner; examples are listed.
    """
    found: list[dict[str, Path]] = []
    for folder, endings, what in ((images, image_endings, "images"), (targets, target_endings, "targets")):
        if not folder.is_dir():
            raise OpsinError(f"there is no folder {shown(folder)}: give the one that holds the {what}.")
        files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() in endings)
        stems: dict[str, Path] = {}
        for path in files:
            stem = os.fspath(path.relative_to(folder).with_suffix(""))
            if (first := stems.setdefault(stem, path)) != path:
                raise OpsinError(
                    f"{shown(folder)} has {shown(first.name)} and {shown(path.name)}, alike but for the ending: keep "
                    "the one that is meant."
                )
        if not stems:
            raise OpsinError(f"{shown(folder)} holds no {what} ({', '.join(endings)}): give the folder of the {what}.")
        found.append(stems)
    pictures, answers = found
    for folder, own, other, what in ((images, pictures, answers, "target"), (targets, answers, pictures, "image")):
        lonely = sorted(own.keys() - other.keys())
        if lonely:
            named = ", ".join(shown(stem) for stem in lonely[:EXAMPLES])
            raise OpsinError(
                f"{len(lonely)} of {len(own)} files in {shown(folder)} have no {what} of the same name, such as "
                f"{named}: name images and targets alike but for the ending."
            )
    return list(pictures.values()), [answers[stem] for stem in pictures]
