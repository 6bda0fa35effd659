"""What a training step sees, as a pure function of (seed, step).

`Stream` decodes ahead in threads and yields one `Batch` per step. A batch keeps decoded 8-bit images; crops are
computed micro-batch by micro-batch on the device that trains, and are recomputed rather than stored when the teacher
and the student each visit all micro-batches. Masks and the samples that stochastic depth keeps are drawn per *group*
of images, so they depend neither on the number of ranks nor on the split into micro-batches.
"""

import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opsin.data.crops import CropRecipe, Kind, draw_crops, render
from opsin.data.masks import MaskRecipe, draw_masks, masked_bound
from opsin.data.reader import ImageReader, PendingImages
from opsin.data.rng import Integers, permutation, shuffled_index
from opsin.data.rng import Stream as RandomStream
from opsin.errors import FINITE, OpsinError, within


@dataclass(frozen=True)
class DataRecipe:
    """How images are read."""

    workers: int = 0
    """Decoding threads; 0 takes one per core."""
    ahead: int = 2
    """Steps whose images are decoded ahead."""
    max_bad_fraction: float = 0.01
    """Share of unreadable images above which the run stops; below it they are logged and replaced."""
    upsample: bool = False
    """Accept images whose shorter side is below the global crop; they are enlarged."""

    def __post_init__(self) -> None:
        within(self, "data.", workers=(0, 4096), ahead=(0, 1000), max_bad_fraction=(0, 1))

    def threads(self) -> int:
        """Decoding threads to start."""
        return self.workers or os.cpu_count() or 1


@dataclass(frozen=True)
class BatchRecipe:
    """How many images a step takes, and how they are grouped."""

    size: int = 64
    """Images of one optimiser step. DINO and iBOT are balanced over all of them, however they are split."""
    micro: int = 0
    """Images that go through the student at a time; 0 takes the whole batch. Does not change the result."""
    group: int = 64
    """Images among which mask ratios, KoLeo's neighbours and the samples of stochastic depth are drawn together
    (a GPU's batch in the reference: 32 for ViT-L/14, 12 for ViT-g/14). Changes the result a little."""

    def __post_init__(self) -> None:
        within(self, "batch.", size=(1, FINITE), group=(1, 2**24))
        if self.group < 2 or self.size < self.group or self.size % self.group:
            nearest = max(self.group, 2) * max(1, round(self.size / max(self.group, 2)))
            raise OpsinError(
                f"batch.size {self.size} must be a multiple of batch.group {self.group}, and a group has 2 images or "
                f"more (KoLeo needs neighbours): try batch.size {nearest}, or batch.group {max(2, self.size)}."
            )
        if self.micro < 0 or self.micro % self.group or (self.micro and self.size % self.micro):
            fitting = [m for m in range(self.group, self.size + 1, self.group) if self.size % m == 0]
            raise OpsinError(
                f"batch.micro {self.micro} must be a multiple of batch.group {self.group} that divides batch.size "
                f"{self.size}: try {', '.join(map(str, fitting))}, or a smaller batch.group."
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.size // (self.micro or self.size)


@dataclass(frozen=True)
class StreamRecipe:
    """All that decides the contents of a batch."""

    seed: int
    """Of everything that is drawn."""
    batch: BatchRecipe
    """Sizes of the batch, its parts and its groups."""
    crops: CropRecipe
    """Of the crops."""
    masks: MaskRecipe
    """Of the masks."""
    patch: int
    """Side of a patch in pixels, for the masks' grid."""
    depth: int
    """Blocks of the backbone, for stochastic depth."""
    drop_path: float
    """Share of a group's samples that each branch of each block leaves out."""


@dataclass(frozen=True)
class Masked:
    """The masks of one micro-batch, on the device."""

    mask: Tensor
    """`[2b, N]`, True where the student sees the mask token."""
    index: Tensor
    """`[M]`: the hidden patches, as rows of the flattened `[2b·N]` patches; M is the most that masks can hide, the same
    in every step, and what is over points to row 0."""
    weight: Tensor
    """`[M]`: 1 / (hidden patches of the crop × global crops of the whole batch), the reference's weighting; 0 for what
    is over."""


class Batch:
    """One step's images and everything drawn for them; b is the number of images in a micro-batch."""

    def __init__(self, recipe: StreamRecipe, step: int, images: list[Tensor], device: torch.device) -> None:
        self.recipe, self.step, self.images, self.device = recipe, step, images, device
        self.micro_batches = recipe.batch.micro_batches
        self.micro_size = recipe.batch.size // self.micro_batches
        self._kept_crops: dict[Kind, Tensor] = {}

    def crops(self, kind: Kind, micro: int) -> Tensor:
        """Crops of a micro-batch `[count·b, C, S, S]`, crop by crop: row c·b + i is crop c of image i."""
        if kind in self._kept_crops:
            return self._kept_crops[kind]
        part = slice(micro * self.micro_size, (micro + 1) * self.micro_size)
        images = [image.to(self.device, non_blocking=True) for image in self.images[part]]
        sizes = np.array([image.shape[-2:] for image in images])
        positions = self.step * self.recipe.batch.size + np.arange(part.start, part.stop)
        plan = draw_crops(self.recipe.crops, kind, self.recipe.seed, positions, sizes)
        crops = render(self.recipe.crops, kind, images, plan)
        if self.micro_batches == 1:  # the student sees what the teacher saw: render once
            self._kept_crops[kind] = crops
        return crops

    def masked(self, micro: int) -> Masked:
        """Masks of a micro-batch's global crops."""
        recipe, size = self.recipe, self.recipe.batch.group
        side = recipe.crops.global_size // recipe.patch
        drawn = draw_masks(recipe.masks, recipe.seed, self.step, self._groups(micro), 2 * size, (side, side))
        groups = len(drawn)
        # [groups, 2·size, N] to crop by crop: the first global crops of all groups, then the second.
        mask = drawn.reshape(groups, 2, size, -1).transpose(1, 0, 2, 3).reshape(2 * groups * size, -1)
        found, hidden = np.flatnonzero(mask), np.maximum(mask.sum(1), 1)
        bound = groups * masked_bound(recipe.masks, 2 * size, (side, side))
        index, weight = np.zeros(bound, dtype=np.int64), np.zeros(bound)
        index[: len(found)] = found
        weight[: len(found)] = 1.0 / (hidden[found // mask.shape[1]] * 2 * recipe.batch.size)
        return Masked(*(torch.from_numpy(a).to(self.device, non_blocking=True) for a in (mask, index, weight)))

    def kept(self, micro: int) -> list[Tensor] | None:
        """For the global and the local crops the samples that each branch of each block computes `[depth, 2, K]`."""
        recipe = self.recipe
        if recipe.drop_path == 0:
            return None
        counts = [2, recipe.crops.local_count] if recipe.crops.local_count else [2]
        kept, first_draw = [], 0
        for count in counts:
            samples = count * recipe.batch.group
            kept.append(torch.from_numpy(self._draw_kept(micro, samples, first_draw)).to(self.device))
            first_draw += 2 * recipe.depth * samples
        return kept

    def _draw_kept(self, micro: int, samples: int, first_draw: int) -> Integers:
        recipe, size = self.recipe, self.recipe.batch.group
        groups = self._groups(micro)
        where = self.step * 2**24 + groups
        keep = max(1, int(samples * (1 - recipe.drop_path)))
        layers = []
        for branch in range(2 * recipe.depth):
            offset = first_draw + branch * samples
            chosen = permutation(recipe.seed, RandomStream.STOCHASTIC_DEPTH, where, samples, offset=offset)[:, :keep]
            crop, image = chosen // size, chosen % size
            layers.append((crop * self.micro_size + np.arange(len(groups))[:, None] * size + image).reshape(-1))
        return np.sort(np.stack(layers), axis=-1).reshape(recipe.depth, 2, -1)

    def _groups(self, micro: int) -> Integers:
        per_micro = self.micro_size // self.recipe.batch.group
        return np.arange(micro * per_micro, (micro + 1) * per_micro, dtype=np.int64)


class Stream:
    """Batches of a source in a keyed order: every epoch visits every image once, in an order of its own."""

    def __init__(
        self, recipe: StreamRecipe, data: DataRecipe, reader: ImageReader, images: int, device: torch.device
    ) -> None:
        side, patch = recipe.crops.global_size, recipe.patch
        for name, size in (("global_size", side), ("local_size", recipe.crops.local_size)):
            if size % patch:
                nearest = max(1, size // patch) * patch
                raise OpsinError(f"crops.{name} {size} is not a multiple of backbone.patch {patch}: try {nearest}.")
        self.recipe, self.data, self.reader, self.images, self.device = recipe, data, reader, images, device

    def indices(self, step: int) -> Integers:
        """The images of a step, as indices into the source."""
        size = self.recipe.batch.size
        position = step * size + np.arange(size, dtype=np.int64)
        return shuffled_index(self.recipe.seed, position // self.images, position % self.images, self.images)

    def batches(self, first: int, stop: int) -> Generator[Batch, None, None]:
        """The batches of steps `first` to `stop - 1`, decoded ahead; on a CPU also rendered ahead."""
        waiting: deque[Future[Batch]] = deque()
        torch.get_num_threads()  # fixes this thread's number: torch starts a thread with the number set last anywhere
        # Each renderer computes on one core: its many small operations gain nothing from two, and hold up the training.
        renderer = ThreadPoolExecutor(self.data.threads(), "render", torch.set_num_threads, (1,))
        try:
            for step in range(first, stop):
                images = self.reader.submit(self.indices(step).tolist())
                waiting.append(renderer.submit(self._batch, step, images))
                if len(waiting) > self.data.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            renderer.shutdown(cancel_futures=True)

    def _batch(self, step: int, images: PendingImages) -> Batch:
        batch = Batch(self.recipe, step, images.result(), self.device)
        if self.device.type == "cpu" and batch.micro_batches == 1:
            batch.crops("global", 0)
            if self.recipe.crops.local_count:
                batch.crops("local", 0)
        return batch
