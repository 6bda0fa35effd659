"""Pooled features of images by a frozen backbone, computed once and kept on disk: what most evaluations start from.

One forward gives the class tokens of the last four blocks and the mean patch token of the last, all after the final
norm: enough for nearest neighbours, linear and logistic probes, retrieval and every other task without a patch grid.
"""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opsin.backbone.features import by_shape
from opsin.data.decode import DecodeError
from opsin.data.pipeline import prepared
from opsin.data.progress import progress
from opsin.errors import OpsinError
from opsin.evaluate.model import Model
from opsin.evaluate.sets import ImageSet
from opsin.evaluate.store import place, recalled
from opsin.evaluate.task import Run
from opsin.evaluate.transforms import Centre, Transform
from opsin.output import write

BLOCKS = 4
"""Last blocks whose class tokens are kept (or all of a shallower backbone)."""
PART = 4096
"""Images in a file of kept features: what an interruption can cost."""


class Pooled(NamedTuple):
    """Features of N images of a backbone of width D, on the CPU."""

    cls: Tensor
    """Class tokens `[N, blocks, D]` of the last blocks, the last block last; not of unit length."""
    mean: Tensor
    """Mean patch token `[N, D]` of the last block."""

    def rows(self, index: Tensor) -> "Pooled":
        """Those of some images (numbers or booleans)."""
        return Pooled(self.cls[index], self.mean[index])


class Known(NamedTuple):
    """The features of a set, and what could not be read."""

    pooled: Pooled
    """Of all images; rows of unreadable ones are 0."""
    bad: dict[int, str]
    """Index and reason of images that do not decode: their rows must not be used."""

    @property
    def good(self) -> Tensor:
        """Booleans `[N]`: images with features."""
        good = torch.ones(len(self.pooled.mean), dtype=torch.bool)
        good[list(self.bad)] = False
        return good


@torch.no_grad()
def pool(model: Model, images: Tensor) -> Pooled:
    """Pooled features, on the device, of prepared images `[B, C, H, W]`."""
    depth = model.arch.depth
    layers = model.extractor.features(images, layers=list(range(max(0, depth - BLOCKS), depth)))
    return Pooled(torch.stack([layer.cls for layer in layers], dim=1), layers[-1].patches.flatten(1, 2).mean(1))


def features(model: Model, images: ImageSet, transform: Transform, run: Run) -> Known:
    """Pooled features of a set, from the store or computed and kept there; an interrupted computation goes on.

    Kept in fp16 if they were computed in half precision, in fp32 otherwise.

    Raises:
        OpsinError: features are not finite, no image can be read, or the store cannot be written.
    """
    check_crop(model, transform)
    folder = place(
        run.cache, "features", weights=model.digest, images=images.fingerprint, transform=transform.name, part=PART
    )
    parts = [range(start, min(start + PART, len(images))) for start in range(0, len(images), PART)]
    missing = [part for part in parts if not is_kept(folder, part.start)]
    if missing:
        with progress("features", sum(map(len, missing)), "images", run.progress) as advance:
            for part in missing:
                pooled, bad = extract(model, images, part, transform, run, advance)
                if not (pooled.cls.isfinite().all() and pooled.mean.isfinite().all()):
                    raise OpsinError(
                        "the backbone's features are not finite: its weights are damaged, or training diverged."
                    )
                keep(folder, part.start, pooled, bad, model)
    kept = [load_file(folder / f"{part.start}.safetensors") for part in parts]
    bad = {}
    for part in parts:
        bad |= {int(i): why for i, why in json.loads((folder / f"{part.start}.json").read_text()).items()}
    if len(bad) == len(images):
        raise OpsinError(f"no image of {images.where} can be decoded: replace the damaged files.")
    return Known(Pooled(*(torch.cat([one[name] for one in kept]).float() for name in ("cls", "mean"))), bad)


def check_crop(model: Model, transform: Transform) -> None:
    """An OpsinError unless the backbone's patches fill the crop."""
    patch = model.arch.patch
    if isinstance(transform, Centre) and transform.size % patch:
        near = max(1, round(transform.size / patch)) * patch
        raise OpsinError(
            f"crops of {transform.size} pixels are no multiple of the backbone's patch {patch}: give a size of {near}."
        )


def extract(
    model: Model, images: ImageSet, indices: range, transform: Transform, run: Run, advance: Callable[[int], object]
) -> tuple[Pooled, dict[int, str]]:
    """Compute the features of some images, in order, without the store; rows of unreadable images are 0."""
    # On a CPU the transform shares the cores with the backbone anyway, and MPS lacks antialiased bicubic.
    on = model.device if model.device.type == "cuda" else torch.device("cpu")
    blocks, width = min(BLOCKS, model.arch.depth), model.arch.width
    found = Pooled(torch.zeros(len(indices), blocks, width), torch.zeros(len(indices), width))
    bad: dict[int, str] = {}

    def prepare(index: int) -> Tensor | str:
        try:
            return transform(images.read(index).to(on))
        except DecodeError as error:
            return error.reason

    size = run.batch_size
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    with closing(prepared(prepare, batches, workers=run.workers, ahead=1)) as ready:
        for batch, items in zip(batches, ready, strict=True):
            bad |= {index: item for index, item in zip(batch, items, strict=True) if isinstance(item, str)}
            good = [
                (index - indices.start, item)
                for index, item in zip(batch, items, strict=True)
                if isinstance(item, Tensor)
            ]
            for group in by_shape([item for _, item in good]):
                rows = [good[i][0] for i in group]
                pooled = pool(model, torch.stack([good[i][1] for i in group]))
                found.cls[rows], found.mean[rows] = pooled.cls.float().cpu(), pooled.mean.float().cpu()
            advance(len(batch))
    return found, bad


def is_kept(folder: Path, start: int) -> bool:
    """Whether the part that starts with image `start` lies in the store whole; a damaged one is computed again."""
    if recalled(folder / f"{start}.json") is None:
        return False
    try:
        with safe_open(folder / f"{start}.safetensors", "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def keep(folder: Path, start: int, pooled: Pooled, bad: dict[int, str], model: Model) -> None:
    """Write the features of a part, which starts with image `start`, to the store: fp32 or fp16 as `features` says.

    Raises:
        OpsinError: nothing can be written there.
    """
    dtype = torch.float32 if model.extractor.dtype == torch.float32 else torch.float16
    whole, partial = folder / f"{start}.safetensors", folder / f"{start}.partial"
    try:
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in pooled._asdict().items()}, partial)
        partial.replace(whole)
        write(folder / f"{start}.json", json.dumps(bad))  # last: it says that the part is whole
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OpsinError(f"cannot keep features in {folder}: {reason}. Choose another --cache.") from None
