"""What a training step sees, as a pure function of (seed, step).

`Stream` decodes ahead in threads and yields one `Batch` per step. A batch keeps decoded 8-bit images; crops are
computed micro-batch by micro-batch on the device that trains, and are recomputed rather than stored when the teacher
and the student each visit all micro-batches. For a CUDA device the images are packed into pinned memory ahead too, and
uploaded while the GPU computes. Masks and the samples that stochastic depth keeps are drawn per *group* of images, so
they depend neither on the number of ranks nor on the split into micro-batches.
"""

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin import ranks
from opsin.data.crops import KINDS, CropPlan, CropRecipe, Kind, draw_crops, reduction, render
from opsin.data.decode import Reduction, Scale
from opsin.data.masks import MaskRecipe, draw_masks, masked_bound
from opsin.data.order import Order
from opsin.data.packed import PackedCrops, can_pack
from opsin.data.reader import ImageReader, PendingImages
from opsin.data.rng import Integers, permutation
from opsin.data.rng import Stream as RandomStream
from opsin.errors import FINITE, OpsinError, within


@dataclass(frozen=True)
class DataRecipe:
    """How images are read."""

    workers: int = 0
    """Decoding threads of a process; 0 takes its share of the cores."""
    ahead: int = 2
    """Steps whose images are decoded ahead."""
    max_bad_fraction: float = 0.01
    """Share of unreadable images above which the run stops; below it they are logged and replaced."""
    upsample: bool = False
    """Accept images whose shorter side is below the global crop; they are enlarged."""
    bad_shards: Literal["skip", "stop"] = "skip"
    """Leave out shards that are cut short or damaged, naming them, or stop the run."""

    def __post_init__(self) -> None:
        within(self, "data.", workers=(0, 4096), ahead=(0, 1000), max_bad_fraction=(0, 1))

    def threads(self) -> int:
        """Decoding threads to start."""
        return self.workers or max(1, (os.cpu_count() or 1) // ranks.on_this_node())


@dataclass(frozen=True)
class BatchRecipe:
    """How many images a step takes, and how they are grouped."""

    size: int = 64
    """Images of one optimiser step. DINO and iBOT are balanced over all of them, however they are split."""
    micro: int = 0
    """Images that go through a process's student at a time; 0 takes its whole share of the batch. Fewer are taken if
    the share asks for it. Does not change the result."""
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

    def split(self, processes: int) -> tuple[int, int]:
        """Images of a step that each of some processes takes, and how many of these go through the student at a time.

        Raises:
            OpsinError: the groups cannot be shared out equally.
        """
        if self.size % (processes * self.group):
            unit, smaller = processes * self.group, self.size // processes
            sizes = sorted({max(unit, self.size // unit * unit), (self.size // unit + 1) * unit})
            instead = f", or batch.group {smaller}" if self.size % processes == 0 and smaller >= 2 else ""
            raise OpsinError(
                f"batch.size {self.size} is {self.size // self.group} × batch.group {self.group}, which "
                f"{processes} processes cannot share equally: try batch.size {' or '.join(map(str, sizes))}{instead}."
            )
        share = self.size // processes
        most = min(self.micro or share, share)
        return share, next(m for m in range(most // self.group * self.group, 0, -self.group) if share % m == 0)


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

    def __post_init__(self) -> None:
        crops, patch = self.crops, self.patch
        sides = [("global_size", crops.global_size), ("local_size", crops.local_size)]
        for name, side in sides + [("mixture: a side of", side) for entry in crops.mixture for side in entry[:2]]:
            if side % patch:
                nearest = max(1, side // patch) * patch
                raise OpsinError(f"crops.{name} {side} is not a multiple of backbone.patch {patch}: try {nearest}.")

    def at(self, step: int) -> "StreamRecipe":
        """The recipe of one step: where resolutions are mixed, with the sizes of its crops."""
        return replace(self, crops=self.crops.at(self.seed, step)) if self.crops.mixture else self


class Share(NamedTuple):
    """The part of every step's batch that one process of a run takes: the images of `rank`, of `ranks` equal parts."""

    rank: int = 0
    """From 0."""
    ranks: int = 1
    """Processes that share the batch."""


ALONE = Share()
"""All of it."""


class Masked(NamedTuple):
    """The masks of one micro-batch, on the device."""

    mask: Tensor
    """`[2b, N]`, True where the student sees the mask token."""
    hidden: Tensor
    """`[M]`: the patches that are predicted, as rows of the flattened `[2b·N]` patches. These are the hidden ones: M is
    the most that masks can hide, the same in every step with crops of this size, and what is over points to row 0. Or,
    where all are predicted, every row once."""
    weight: Tensor
    """`[M]`: 1 / (predicted patches of the crop × global crops of the whole batch), the reference's weighting; 0 for
    what is over."""


class Batch:
    """One step's images and everything drawn for them; b is the number of images in a micro-batch."""

    def __init__(
        self,
        recipe: StreamRecipe,
        step: int,
        images: Sequence[Tensor],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        scales: Sequence[Scale] | None = None,
        share: Share = ALONE,
        rows: Integers | None = None,
    ) -> None:
        """Draw everything, and for a CUDA device copy images and plans into pinned memory.

        Args:
            recipe: what is drawn; `self.recipe` is what it is at this step.
            step: the training step.
            images: `[C, H, W]` in host memory, those of this share of the step. For a CUDA device best 8-bit RGB: other
                images are cropped by plain torch operations there.
            device: where the crops are computed.
            dtype: of the crops.
            scales: what each image is a fraction of; None if all are whole.
            share: the part of the step's images that these are.
            rows: where crops repeat, the row of each image in the table of them, see `Stream.rows`.
        """
        self.recipe = recipe = recipe.at(step)
        self.step, self.device, self.dtype = step, device, dtype
        self.rows = rows
        """For every image of this share its row in a table of images × `crops.repeat`: what is computed of an image's
        crops can be stored there and found again. None if no crops repeat."""
        size, self.micro_size = recipe.batch.split(share.ranks)
        self.micro_batches, b = size // self.micro_size, self.micro_size
        self._first = share.rank * size
        """Of these images, in the step's batch."""
        self._kept_crops: dict[Kind, Tensor] = {}
        self._images = [images[start : start + b] for start in range(0, len(images), b)]
        sizes = np.array([tuple(scale) for scale in scales] if scales else [(*image.shape[-2:], 1) for image in images])
        self._plans = [self._draw_crops(start, sizes[start : start + b]) for start in range(0, len(images), b)]
        self._masks = [self._draw_masks(micro) for micro in range(self.micro_batches)]
        self._kept = [self._draw_kept(micro) for micro in range(self.micro_batches)]
        self._packed: list[PackedCrops] = []
        if device.type == "cuda" and can_pack(images):
            parts = zip(self._images, self._plans, strict=True)
            self._packed = [PackedCrops(recipe.crops, part, plans, device) for part, plans in parts]
            self._images = []

    def _draw_crops(self, first: int, sizes: Integers) -> dict[Kind, CropPlan]:
        """Of the images from `first` on, whose height, width and reduction are `sizes` `[b, 3]`."""
        crops, seed = self.recipe.crops, self.recipe.seed
        keys = self.step * self.recipe.batch.size + self._first + first + np.arange(len(sizes))
        if self.rows is not None:
            keys = self.rows[first : first + len(sizes)]
        return {kind: draw_crops(crops, kind, seed, keys, sizes[:, :2], sizes[:, 2]) for kind in KINDS}

    def crops(self, kind: Kind, micro: int, scale: int = 1) -> Tensor:
        """Crops of a micro-batch `[count·b, C, S, S]`, crop by crop: row c·b + i is crop c of image i.

        At a larger `scale` they are the same crops at so many times the resolution. A photo was decoded at a fraction
        of its size that suits scale 1: at scale 2 its windows are at least twice as large as the crops, which then
        differ from those of the whole photo as `crops._ROOM` says.
        """
        if scale == 1 and kind in self._kept_crops:
            return self._kept_crops[kind]
        if self._packed:
            self.upload(micro)
            crops = self._packed[micro].crops(kind, self.dtype, scale)
        else:
            images = [image.to(self.device, non_blocking=True) for image in self._images[micro]]
            crops = render(self.recipe.crops, kind, images, self._plans[micro][kind], self.dtype, scale)
        if scale == 1 and self.micro_batches == 1:  # the student sees what the teacher saw: render once
            self._kept_crops[kind] = crops
            if len(self._kept_crops) == 2 and self._packed:  # another scale may be wanted, but seldom is
                self._packed[0].drop()
        return crops

    def upload(self, micro: int) -> None:
        """Begin to copy a micro-batch and the one visited next to a CUDA device; the others give their memory back."""
        for number, part in enumerate(self._packed):
            if number in (micro, (micro + 1) % self.micro_batches):
                part.upload()
            else:
                part.drop()

    def masked(self, micro: int) -> Masked:
        """Masks of a micro-batch's global crops."""
        return Masked(*(self._on_device(part) for part in self._masks[micro]))

    def kept(self, micro: int) -> list[Tensor] | None:
        """For the global and the local crops the samples that each branch of each block computes `[depth, 2, K]`."""
        return [self._on_device(part) for part in self._kept[micro]] if self.recipe.drop_path else None

    def _on_host(self, array: NDArray[Any]) -> Tensor:
        """In memory from which a GPU copies while the CPU goes on: from any other, the copy would wait for the GPU."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def _draw_masks(self, micro: int) -> Masked:
        recipe, size = self.recipe, self.recipe.batch.group
        side = recipe.crops.global_size // recipe.patch
        drawn = draw_masks(recipe.masks, recipe.seed, self.step, self._groups(micro), 2 * size, (side, side))
        groups = len(drawn)
        # [groups, 2·size, N] to crop by crop: the first global crops of all groups, then the second.
        mask = drawn.reshape(groups, 2, size, -1).transpose(1, 0, 2, 3).reshape(2 * groups * size, -1)
        chosen = mask if recipe.masks.predicted == "hidden" else np.ones_like(mask)
        found, count = np.flatnonzero(chosen), np.maximum(chosen.sum(1), 1)
        bound = groups * masked_bound(recipe.masks, 2 * size, (side, side))
        hidden, weight = np.zeros(bound, dtype=np.int64), np.zeros(bound)
        hidden[: len(found)] = found
        weight[: len(found)] = 1.0 / (count[found // mask.shape[1]] * 2 * recipe.batch.size)
        return Masked(*(self._on_host(array) for array in (mask, hidden, weight)))

    def _draw_kept(self, micro: int) -> list[Tensor]:
        recipe, size = self.recipe, self.recipe.batch.group
        groups = self._groups(micro)
        where = self.step * 2**24 + groups
        kept, offset = [], 0
        for crops in (2, recipe.crops.local_count) if recipe.drop_path else ():
            if crops == 0:
                continue
            samples = crops * size
            keep = max(1, int(samples * (1 - recipe.drop_path)))
            layers = []
            for _ in range(2 * recipe.depth):
                order = permutation(recipe.seed, RandomStream.STOCHASTIC_DEPTH, where, samples, offset=offset)
                crop, image = np.divmod(order[:, :keep], size)
                layers.append((crop * self.micro_size + np.arange(len(groups))[:, None] * size + image).reshape(-1))
                offset += samples
            kept.append(self._on_host(np.sort(np.stack(layers), axis=-1).reshape(recipe.depth, 2, -1)))
        return kept

    def _groups(self, micro: int) -> Integers:
        first = (self._first + micro * self.micro_size) // self.recipe.batch.group
        return np.arange(first, first + self.micro_size // self.recipe.batch.group, dtype=np.int64)


class Stream:
    """Batches of a source in a keyed order: every epoch visits every image once, in an order of its own."""

    def __init__(
        self,
        recipe: StreamRecipe,
        data: DataRecipe,
        reader: ImageReader,
        order: Order,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        share: Share = ALONE,
    ) -> None:
        """Nothing is read yet.

        Args:
            recipe: what the batches contain.
            data: how images are read.
            reader: of the source.
            order: of the source's images.
            device: where crops, masks and kept samples are wanted.
            dtype: of the crops.
            share: the part of every step that this process takes.
        """
        self.recipe, self.data, self.reader, self.order = recipe, data, reader, order
        self.device, self.dtype, self.share = device, dtype, share

    def _positions(self, step: int) -> Integers:
        """Of this share of a step, counted from the run's first image."""
        size, _ = self.recipe.batch.split(self.share.ranks)
        return step * self.recipe.batch.size + self.share.rank * size + np.arange(size, dtype=np.int64)

    def indices(self, step: int) -> Integers:
        """The images of this share of a step, as indices into the source."""
        return self.order.indices(self.recipe.seed, self._positions(step))

    def rows(self, step: int) -> Integers | None:
        """Where crops repeat after n epochs, the rows of this share's images in a table of images × n; else None.

        Row index · n + (epoch mod n) stands for the crops of an image, which then do not depend on the step.
        """
        repeat = self.recipe.crops.repeat
        epochs = self._positions(step) // self.order.samples
        return self.indices(step) * repeat + epochs % repeat if repeat else None

    def batches(self, first: int, stop: int) -> Generator[Batch, None, None]:
        """The batches of steps `first` to `stop - 1`, decoded ahead.

        Crops for a CPU are rendered ahead too. Images for a CUDA device are packed ahead, and a batch that is ready
        when the one before it is asked for is uploaded while that one is trained on: not more, to bound the memory.
        """
        waiting: deque[Future[Batch]] = deque()
        torch.get_num_threads()  # fixes this thread's number: torch starts a thread with the number set last anywhere
        # Each renderer computes on one core: its many small operations gain nothing from two, and hold up the training.
        renderer = ThreadPoolExecutor(self.data.threads(), "render", torch.set_num_threads, (1,))
        try:
            for step in range(first, stop):
                images = self.reader.submit(self.indices(step).tolist(), self._reductions(step))
                waiting.append(renderer.submit(self._batch, step, images))
                if len(waiting) > self.data.ahead:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            renderer.shutdown(cancel_futures=True)

    @staticmethod
    def _next(waiting: deque[Future[Batch]]) -> Batch:
        batch = waiting.popleft().result()
        batch.upload(0)
        if waiting and waiting[0].done() and not waiting[0].exception():
            waiting[0].result().upload(0)
        return batch

    def _reductions(self, step: int) -> list[Reduction]:
        recipe, rows = self.recipe.at(step), self.rows(step)
        keys = self._positions(step) if rows is None else rows
        return [partial(reduction, recipe.crops, recipe.seed, key) for key in keys.tolist()]

    def _batch(self, step: int, images: PendingImages) -> Batch:
        decoded, scales = zip(*images.scaled(), strict=True)
        batch = Batch(self.recipe, step, decoded, self.device, self.dtype, scales, self.share, self.rows(step))
        if self.device.type == "cpu" and batch.micro_batches == 1:
            batch.crops("global", 0)
            if self.recipe.crops.local_count:
                batch.crops("local", 0)
        return batch
