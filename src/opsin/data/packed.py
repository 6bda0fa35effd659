"""The images of a micro-batch and what was drawn for their crops as one run of bytes, and its way to the GPU.

One copy carries everything, and the kernels of `opsin.data.kernels` compute all crops of a kind from it, where plain
torch would launch several operations per crop. Nothing but `PackedCrops` needs CUDA.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from opsin.data.crops import CropPlan, CropRecipe, Kind, finished
from opsin.data.rng import Integers
from opsin.machine import has_triton

COLUMNS = (
    "flip",
    "turns",
    "before_contrast",
    "order_0",
    "order_1",
    "order_2",
    "order_3",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "gray",
    "sigma",
    "solarize",
)
"""What a row of a plan's table holds: flags as 0 or 1; how many of the four jitter operations act on the crop, and how
many of them before contrast; which one acts in each turn, numbered as the factors that follow; the blur's sigma."""
WIDTH = 16
"""Numbers in a row of that table, some unused, so that rows and tables stay aligned to 16 bytes."""
_WINDOW_BYTES, _PLAN_BYTES = 4 * 8, WIDTH * 4


def plan_table(plan: CropPlan) -> Tensor:
    """What was drawn for n crops but the boxes: fp32 `[n, 16]`, see `COLUMNS`."""
    turns = np.where(plan.jitter, 4, 0)
    before_contrast = np.where(plan.jitter, np.argmax(plan.order == 1, axis=1), 0)
    columns = [plan.flip, turns, before_contrast, *plan.order.T, *plan.factors.T, plan.gray, plan.sigma, plan.solarize]
    table = np.zeros((len(plan.flip), WIDTH), dtype=np.float32)
    table[:, : len(COLUMNS)] = np.stack(columns, axis=1)
    return torch.from_numpy(table)


def window_table(plan: CropPlan, starts: Integers, widths: Integers) -> Tensor:
    """Where the windows of n crops are: int64 `[n, 4]` with the byte of the first pixel, the bytes from one row of
    pixels to the next, height and width in pixels.

    Args:
        plan: of these crops, in which crop i belongs to image i mod B.
        starts: the byte at which each image begins `[B]`.
        widths: pixels in a row of each image `[B]`.
    """
    image = np.arange(len(plan.boxes)) % len(starts)
    top, left, height, width = plan.boxes.T
    stride = 3 * widths[image]
    return torch.from_numpy(np.stack([starts[image] + top * stride + 3 * left, stride, height, width], axis=1))


@dataclass(frozen=True)
class Packed:
    """Images and plans of a micro-batch in one buffer; on the CPU, or on the GPU after `on`."""

    buffer: Tensor
    """uint8: for each kind of crop its windows and its plan, then the interleaved pixels of the images."""
    tables: Mapping[Kind, tuple[int, int]]
    """For each kind the byte at which its windows begin, and its number of crops; the plan follows the windows."""
    plans: Mapping[Kind, CropPlan]
    """The plans once more, for what the host must know."""

    def on(self, buffer: Tensor) -> "Packed":
        """The same content, of which `buffer` is a copy."""
        return Packed(buffer, self.tables, self.plans)

    def crops(self, recipe: CropRecipe, kind: Kind, dtype: torch.dtype, scale: int = 1) -> Tensor:
        """What `opsin.data.crops.render` gives of these images and this plan, `[n, 3, S, S]`, by Triton kernels.

        The kernels' blur has 9 taps, too few for a larger `scale`: then what follows the colours is done by torch.
        """
        from opsin.data import kernels  # Triton is needed here only, and comes with torch on Linux only

        start, count = self.tables[kind]
        middle = start + count * _WINDOW_BYTES
        end = middle + count * _PLAN_BYTES
        windows = self.buffer[start:middle].view(torch.int64).view(count, 4)
        plan = self.buffer[middle:end].view(torch.float32).view(count, WIDTH)
        mean, std = recipe.normalisation(3)
        if scale == 1:
            return kernels.crops(self.buffer, windows, plan, recipe.size(kind), mean, std, dtype)
        plan = plan.clone()
        for name in ("sigma", "solarize"):
            plan[:, COLUMNS.index(name)] = 0
        size = scale * recipe.size(kind)
        x = kernels.crops(self.buffer, windows, plan, size, (0.0,) * 3, (1.0,) * 3, torch.float32)
        return finished(x, self.plans[kind], mean, std, scale).to(dtype)


def can_pack(images: Sequence[Tensor]) -> bool:
    """Whether the kernels are there and read such images: 8-bit, three channels. Else plain torch makes the crops."""
    return has_triton() and all(image.dtype == torch.uint8 and len(image) == 3 for image in images)


def pack(images: Sequence[Tensor], plans: Mapping[Kind, CropPlan], *, pinned: bool = False) -> Packed:
    """Copy images `[3, H, W]` uint8 of B sizes, and the plans of their crops, into one new buffer.

    Args:
        images: as decoded, interleaved: then each is one contiguous copy.
        plans: for these images, of `draw_crops`.
        pinned: in page-locked memory, from which a GPU copies while the CPU goes on. torch keeps such memory for reuse
            and hands it out again only after the copies that read it are done.
    """
    tables: dict[Kind, tuple[int, int]] = {}
    start = 0
    for kind, plan in plans.items():
        tables[kind] = start, len(plan.boxes)
        start += len(plan.boxes) * (_WINDOW_BYTES + _PLAN_BYTES)
    heights, widths = np.array([image.shape[1:] for image in images], dtype=np.int64).T
    ends = start + np.cumsum(3 * heights * widths)
    starts = ends - 3 * heights * widths
    buffer = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=pinned)
    for kind, plan in plans.items():
        both = window_table(plan, starts, widths), plan_table(plan)
        content = torch.cat([table.view(-1).view(torch.uint8) for table in both])
        first, _ = tables[kind]
        buffer[first : first + len(content)] = content
    for image, first, end in zip(images, starts.tolist(), ends.tolist(), strict=True):
        buffer[first:end].view(*image.shape[1:], 3).copy_(image.permute(1, 2, 0))
    return Packed(buffer, tables, plans)


class PackedCrops:
    """Crops of one micro-batch on a CUDA device. The images stay in pinned memory and may be uploaded several times.

    What keeps this free of races: an upload runs on a stream of its own, and the stream that computes waits for its
    event. Its device memory belongs to the upload stream, so `record_stream` tells the allocator about each other
    stream that reads it; the pinned memory is torch's, which records the copies that read it. All calls but the
    constructor come from the thread that trains.
    """

    def __init__(
        self, recipe: CropRecipe, images: Sequence[Tensor], plans: Mapping[Kind, CropPlan], device: torch.device
    ) -> None:
        self._recipe, self._device = recipe, device
        with torch.cuda.device(device):  # a new thread would pin memory through the first GPU
            self._packed = pack(images, plans, pinned=True)
        self._upload: tuple[Tensor, torch.cuda.Event] | None = None

    def upload(self) -> None:
        """Begin the copy to the device, unless it is there or on its way; does not wait."""
        if self._upload is None:
            stream = _upload_stream(self._device)
            with torch.cuda.stream(stream):
                buffer = self._packed.buffer.to(self._device, non_blocking=True)
                self._upload = buffer, stream.record_event()

    def drop(self) -> None:
        """Give the device memory back once what was computed from it is done; does not wait."""
        self._upload = None

    def crops(self, kind: Kind, dtype: torch.dtype, scale: int = 1) -> Tensor:
        """Normalised crops `[n, 3, S, S]`, computed on the current stream."""
        self.upload()
        assert self._upload is not None
        buffer, uploaded = self._upload
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(uploaded)
        buffer.record_stream(stream)
        return self._packed.on(buffer).crops(self._recipe, kind, dtype, scale)


@cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
