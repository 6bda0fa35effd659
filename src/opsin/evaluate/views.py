"""Random-resized crops of training images: a fresh view of an image at every visit, as probes and fine-tuning see it.

Which image comes at which place of which batch, its box and its flip follow from the seed and that place alone, so that
a training that was interrupted goes on with the very views it would have seen.
"""

import math
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.constants import normalisation
from opsin.data.order import Order
from opsin.data.pipeline import prepared
from opsin.evaluate.sets import ImageSet

SCALE = (0.08, 1.0)
"""Share of the image's area that a crop covers, from the least to the most."""
RATIO = (3 / 4, 4 / 3)
"""Width by height of a crop; its logarithm is uniform."""
TRIES = 10
"""Boxes that are drawn before a central one is taken."""


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_box(height: int, width: int, rng: np.random.Generator) -> Box:
    """A random part of an image of `height` × `width` pixels, by torchvision's rule for random-resized crops.

    Area and shape are drawn until the box fits, ten times at most; then the largest central one of an allowed shape.
    """
    for _ in range(TRIES):
        area = height * width * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def cropped(pixels: Tensor, box: Box, size: int) -> Tensor:
    """A part of an image `[C, H, W]` at `size` × `size` pixels, antialiased bicubic: float32, 0 to the full scale."""
    part = pixels[:, box.top : box.top + box.height, box.left : box.left + box.width]
    resized = F.interpolate(part[None].float(), (size, size), mode="bicubic", antialias=True)[0]
    return resized.clamp_(0, _full_scale(pixels))


@dataclass(frozen=True)
class Views:
    """Batches of random views of labelled images, without end; every epoch is shuffled anew."""

    images: ImageSet
    """With labels `[N]`."""
    size: int
    """Side of a view in pixels."""
    batch: int
    """Views in a batch; a small set comes several times."""
    seed: int

    def view(self, position: int) -> tuple[Tensor, int]:
        """View `position % batch` of batch `position // batch`, normalised float32 `[C, size, size]`, and its label."""
        assert self.images.labels is not None
        index = int(Order(len(self.images)).indices(self.seed, np.array([position]))[0])
        at, pixels = self.images.readable(index)
        rng = np.random.default_rng([self.seed, *divmod(position, self.batch)])
        height, width = pixels.shape[-2:]
        view = cropped(pixels, draw_box(height, width, rng), self.size)
        if rng.random() < 0.5:
            view = view.flip(-1)
        mean, std = (torch.tensor(value)[:, None, None] for value in normalisation(len(view)))
        return (view / _full_scale(pixels) - mean) / std, int(self.images.labels[at])

    def batches(self, first: int, steps: int, workers: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Views `[batch, C, size, size]` and labels `[batch]` of the steps from `first` up to `steps`.

        They are prepared in `workers` threads, two batches ahead.
        """
        places = (range(step * self.batch, (step + 1) * self.batch) for step in range(first, steps))
        with closing(prepared(self.view, places, workers=workers, ahead=2)) as ready:
            for items in ready:
                yield torch.stack([view for view, _ in items]), torch.tensor([label for _, label in items])


def order(count: int, batch: int, seed: int, first: int, steps: int) -> Iterator[Tensor]:
    """Indices `[batch]` into `count` samples for the steps from `first` up to `steps`, in the same order as `Views`."""
    for step in range(first, steps):
        yield torch.from_numpy(Order(count).indices(seed, np.arange(step * batch, (step + 1) * batch)))


def _full_scale(pixels: Tensor) -> float:
    return 1.0 if pixels.is_floating_point() else torch.iinfo(pixels.dtype).max
