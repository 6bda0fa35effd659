"""Multi-crop augmentation: drawn per image on the CPU, computed for the whole batch on the device that trains.

`draw_crops` turns (seed, sample position) into a plan of plain numbers: boxes, flips, jitter factors. `render` makes
pixels of a plan in plain torch; on a CUDA device `opsin.data.packed` makes the same pixels in three kernels. The
distributions, their order and the resize are torchvision's (RandomResizedCrop, ColorJitter, RandomGrayscale,
GaussianBlur, RandomSolarize), which is what the reference uses; unlike there, nothing is rounded to 8 bits on the way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from opsin.constants import IMAGENET_MEAN, IMAGENET_STD
from opsin.data.rng import Floats, Integers, Stream, uniform
from opsin.errors import FINITE, OpsinError, within

Kind = Literal["global", "local"]
KINDS: tuple[Kind, ...] = ("global", "local")

_SHARES = 2e-3
"""By how much the shares of a mixture may miss 1: thirds may be written 0.333."""


@dataclass(frozen=True)
class CropRecipe:
    """Sizes, counts and distributions of the crops of one image."""

    global_size: int = 224
    """Side of the two global crops in pixels; a multiple of the patch."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Share of the image's area that a global crop covers."""
    local_size: int = 98
    """Side of a local crop in pixels; a multiple of the patch (98 for patch 14, 96 for patch 16)."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Share of the image's area that a local crop covers."""
    local_count: int = 8
    """Local crops of an image."""
    mixture: tuple[tuple[int, int, float], ...] = ()
    """Sides of the global and of the local crops, and the share of the steps that have them; each step draws one of
    these entries. Empty: all steps have `global_size` and `local_size`."""
    repeat: int = 0
    """0: crops are new in every epoch; n: those of an image repeat after n epochs, so that a teacher's features of them
    can be stored."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop before it is resized to a square, log-uniform."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of the colour jitter."""
    brightness: float = 0.4
    """Factor drawn from 1 ± this."""
    contrast: float = 0.4
    """Factor drawn from 1 ± this."""
    saturation: float = 0.2
    """Factor drawn from 1 ± this."""
    hue: float = 0.1
    """Shift drawn from ± this, in turns of the colour circle."""
    gray: float = 0.2
    """Probability of dropping the colours."""
    blur: tuple[float, float, float] = (0.0, 0.9, 0.5)
    """Probability of blur for the first global, the second global and the local crops. The paper's text intends
    (1.0, 0.1, 0.5); the reference hands 1-p to the operator that applies it, and the released weights were trained
    so: these are the default."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the 9-tap Gaussian in pixels of the crop."""
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of inverting the values above one half, for the first global, second global and local crops."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted per channel from values in 0 … 1; one entry per channel, or one for all."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divided by, likewise."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise OpsinError(
                f"crops.mean has {len(self.mean)} entries and crops.std {len(self.std)}: give both one per channel, or "
                "both one for all."
            )
        share = (0.0, 1.0)
        within(self, "crops.", flip=share, jitter=share, gray=share, blur=share, solarize=share)
        within(self, "crops.", global_size=(1, 1e5), local_size=(1, 1e5), local_count=(0, 1e3), aspect=(1e-2, 1e2))
        within(self, "crops.", repeat=(0, 1e6))
        within(self, "crops.", brightness=share, contrast=share, saturation=share, hue=(0, 0.5))
        within(self, "crops.", blur_sigma=(1e-3, 1e3), mean=(-FINITE, FINITE), std=(1e-6, FINITE))
        for name in ("aspect", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise OpsinError(f"crops.{name} is ({low}, {high}): give the smaller number first.")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise OpsinError(f"crops.{name} is ({low}, {high}): give two shares of the area, 0 < low ≤ high ≤ 1.")
        for entry in self.mixture:
            if not (1 <= entry[0] <= 1e5 and 1 <= entry[1] <= 1e5 and 0 < entry[2] <= 1):
                raise OpsinError(
                    f"crops.mixture has an entry {entry}: give the side of the global crops and of the local crops, "
                    "each from 1 to 100000, and a share of the steps, above 0 and up to 1."
                )
        shares = sum(share for _, _, share in self.mixture)
        if self.mixture and abs(shares - 1) > _SHARES:
            raise OpsinError(f"the shares of crops.mixture sum to {shares:g}: give shares that sum to 1.")
        if self.mixture and self.repeat:
            raise OpsinError(
                f"crops.repeat is {self.repeat} but crops.mixture changes the sizes of the crops from step to step, so "
                "that they do not repeat: leave one of them out."
            )

    def count(self, kind: Kind) -> int:
        """Crops of this kind per image."""
        return 2 if kind == "global" else self.local_count

    def size(self, kind: Kind) -> int:
        """Side of a crop of this kind in pixels."""
        return self.global_size if kind == "global" else self.local_size

    def at(self, seed: int, step: int) -> "CropRecipe":
        """The recipe of one step, which has no mixture."""
        if not self.mixture:
            return self
        ends = np.cumsum([share for _, _, share in self.mixture])
        drawn = uniform(seed, Stream.MIXTURE, step, 1)[0] * ends[-1]
        side, local_side, _ = self.mixture[int(np.searchsorted(ends[:-1], drawn, side="right"))]
        return replace(self, global_size=side, local_size=local_side, mixture=())

    def normalisation(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation for every channel.

        Raises:
            OpsinError: there are as many for another number of channels.
        """
        if len(self.mean) not in (1, channels):
            raise OpsinError(
                f"crops.mean and crops.std have {len(self.mean)} entries but the images {channels} channels: "
                "give one entry per channel, or one for all."
            )
        times = channels // len(self.mean)
        return self.mean * times, self.std * times


@dataclass(frozen=True)
class CropPlan:
    """What was drawn for n crops, ordered crop by crop: row c*B + b is crop c of image b."""

    boxes: Integers
    """`[n, 4]`: top, left, height, width in pixels of the image as it is decoded."""
    flip: NDArray[np.bool_]
    """`[n]`"""
    jitter: NDArray[np.bool_]
    """`[n]`: whether brightness, contrast, saturation and hue change."""
    order: Integers
    """`[n, 4]`: the order in which these four are applied."""
    factors: Floats
    """`[n, 4]`: brightness, contrast and saturation factor, hue shift."""
    gray: NDArray[np.bool_]
    """`[n]`"""
    sigma: Floats
    """`[n]`: of the blur in pixels; 0 is no blur."""
    solarize: NDArray[np.bool_]
    """`[n]`"""

    def rows(self, index: Integers | slice) -> "CropPlan":
        """The plan of some of the crops."""
        return CropPlan(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


_TRIES = 10
_DRAWS = 4 * _TRIES + 14


def draw_crops(
    recipe: CropRecipe,
    kind: Kind,
    seed: int,
    positions: Integers,
    sizes: Integers,
    reductions: Integers | None = None,
) -> CropPlan:
    """Draw the crops of B images.

    Args:
        recipe: what is drawn.
        kind: global or local.
        seed: the run's.
        positions: the samples' numbers in the run `[B]`, or in a table of the crops that repeat.
        sizes: heights and widths `[B, 2]`.
        reductions: by how much the pixels of each image are reduced `[B]`, see `reduction`; boxes are then rounded
            down to whole reduced pixels. None is 1 for all.
    """
    first, count = (0, 2) if kind == "global" else (2, recipe.local_count)
    u = np.concatenate(
        [uniform(seed, Stream.CROPS, positions, _DRAWS, offset=(first + crop) * _DRAWS) for crop in range(count)]
        or [np.zeros((0, _DRAWS))]
    )
    scale = recipe.global_scale if kind == "global" else recipe.local_scale
    boxes = _draw_boxes(u[:, : 4 * _TRIES], np.tile(np.asarray(sizes), (count, 1)), scale, recipe.aspect)
    if reductions is not None:
        boxes //= np.tile(reductions, count)[:, None]
    rest = u[:, 4 * _TRIES :].T
    strengths = np.array([recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    which = np.repeat([0, 1] if kind == "global" else [2] * count, len(positions)).astype(np.int64)
    low, high = recipe.blur_sigma
    return CropPlan(
        boxes=boxes,
        flip=rest[0] < recipe.flip,
        jitter=rest[1] < recipe.jitter,
        order=np.argsort(rest[2:6].T, axis=1, kind="stable"),
        factors=centre + (2 * rest[6:10].T - 1) * strengths,
        gray=rest[10] < recipe.gray,
        sigma=np.where(rest[11] < np.asarray(recipe.blur)[which], low + rest[12] * (high - low), 0.0),
        solarize=rest[13] < np.asarray(recipe.solarize)[which],
    )


_ROOM = 4
"""Windows of a reduced photo keep at least so many times the side of their crop. With 4, crops of sharp 12-megapixel
JPEGs differed by at most 1.9/255, and 0.17/255 in the mean, from those of the whole photo; with 3 by 3.3 and 0.23, with
2 by 7.7 and 0.40."""


def reduction(recipe: CropRecipe, seed: int, position: int, height: int, width: int) -> int:
    """By how much a photo may be reduced before it is cropped: the largest of 1, 2, 4 and 8 that leaves every window
    which its crops have at this position of the run at least four times as high and as wide as the crop.

    What a reduction saves is most of the crops' time on a CPU, half of the decoding, and memory.
    """
    kinds = [kind for kind in KINDS if recipe.count(kind)]
    room = min(height, width) // (_ROOM * max(recipe.size(kind) for kind in kinds))
    if room > 1:  # else nothing needs to be drawn: no window is larger than the image
        one, size = np.array([position]), np.array([[height, width]])
        windows = [draw_crops(recipe, kind, seed, one, size).boxes[:, 2:] for kind in kinds]
        room = min(int(sides.min()) // (_ROOM * recipe.size(kind)) for kind, sides in zip(kinds, windows, strict=True))
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, room))


def _draw_boxes(u: Floats, sizes: Integers, scale: tuple[float, float], aspect: tuple[float, float]) -> Integers:
    """Boxes `[n, 4]` as RandomResizedCrop draws them: the first of ten tries that fits, else a central crop."""
    height, width = sizes[:, 0, None].astype(np.float64), sizes[:, 1, None].astype(np.float64)
    area_u, aspect_u, top_u, left_u = u.reshape(len(u), 4, _TRIES).transpose(1, 0, 2)
    area = height * width * (scale[0] + area_u * (scale[1] - scale[0]))
    ratio = np.exp(np.log(aspect[0]) + aspect_u * (np.log(aspect[1]) - np.log(aspect[0])))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = np.floor(top_u * (height - h + 1)), np.floor(left_u * (width - w + 1))
    tries = np.stack([top, left, h, w], axis=-1)
    pick = np.argmax(fits, axis=1)
    boxes = np.take_along_axis(tries, pick[:, None, None], axis=1)[:, 0]
    # No try fitted: the largest central crop whose aspect is allowed.
    image_ratio = (width / height)[:, 0]
    central_w = np.where(image_ratio > aspect[1], np.rint(height[:, 0] * aspect[1]), width[:, 0])
    central_h = np.where(image_ratio < aspect[0], np.rint(width[:, 0] / aspect[0]), height[:, 0])
    central_w, central_h = np.minimum(central_w, width[:, 0]), np.minimum(central_h, height[:, 0])
    central = np.stack([(height[:, 0] - central_h) // 2, (width[:, 0] - central_w) // 2, central_h, central_w], axis=-1)
    return np.where(fits.any(axis=1)[:, None], boxes, central).astype(np.int64)


_CACHE_ROWS = 8
"""Crops that a CPU works on at a time, so that the temporaries of the photometric operations stay in its cache."""


def render(
    recipe: CropRecipe,
    kind: Kind,
    images: Sequence[Tensor],
    plan: CropPlan,
    dtype: torch.dtype = torch.float32,
    scale: int = 1,
) -> Tensor:
    """Normalised crops `[n, C, S, S]`, ordered as the plan; resized in fp32, and then computed in at least fp32.

    Crops at a larger `scale` show the same: the same boxes and colours, and a blur as wide in the picture. Reduced to
    S they are nearly, not exactly, the crops at scale 1, which clip, blur and solarize values that were reduced before.

    Args:
        recipe: for the size, the mean and the standard deviation.
        kind: global or local.
        images: `[C, H, W]` uint8, or uint16 or floats in 0 … 1 for other sensors, each of its own size. With C other
            than 3, brightness and contrast act per channel and hue, saturation and gray are left out.
        plan: for these images, of `draw_crops`.
        dtype: of the result.
        scale: S is so many times the size that the recipe gives.
    """
    channels, device = images[0].shape[0], images[0].device
    mean, std = recipe.normalisation(channels)
    count, size = len(plan.boxes), scale * recipe.size(kind)
    sources = [images[row % len(images)] for row in range(count)]
    rows = _CACHE_ROWS if device.type == "cpu" else max(1, count)
    crops = torch.empty((count, channels, size, size), dtype=dtype, device=device)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        x = _coloured(sources[part], plan.rows(part), size, dtype)
        crops[part] = finished(x, plan.rows(part), mean, std, scale)
    return crops


def _coloured(images: Sequence[Tensor], plan: CropPlan, size: int, dtype: torch.dtype) -> Tensor:
    """Crops `[n, C, size, size]` in 0 … 1 of n images, in the reference's order of operations up to the blur."""
    resize = resize_by_kernel if images[0].device.type == "cpu" else resize_by_products
    # Rounding in what follows can depend on which crops are computed together: fp64 is for those who compare runs.
    x = resize(images, plan.boxes, size).to(torch.promote_types(dtype, torch.float32))
    x = _on(x, plan.flip, lambda part, _: part.flip(-1))
    colour = x.shape[1] == 3
    operations = [brightness, contrast, saturation, hue] if colour else [brightness, contrast]
    for turn in range(4):
        for number, operation in enumerate(operations):
            x = _on(x, plan.jitter & (plan.order[:, turn] == number), operation, plan.factors[:, number])
    if colour:
        x = _on(x, plan.gray, lambda part, _: grayscale(part).repeat(1, 3, 1, 1))
    return x


def finished(x: Tensor, plan: CropPlan, mean: Sequence[float], std: Sequence[float], scale: int = 1) -> Tensor:
    """Crops `[n, C, S, S]` in 0 … 1, which it may overwrite, blurred, solarized and normalised, in at least fp32.

    At a larger `scale` the Gaussian has as many times more taps on either side of its centre, so that it ends at the
    same distance in the picture (but for half a pixel, as taps stand for pixels).
    """
    x = _on(x, plan.sigma > 0, partial(blur, radius=_RADIUS * scale), plan.sigma * scale)
    x = _on(x, plan.solarize, lambda part, _: solarize(part))
    for channel, shift, width in zip(x.unbind(1), mean, std, strict=True):
        channel.sub_(shift).div_(width)
    return x


def _on(
    x: Tensor, where: NDArray[np.bool_], operation: Callable[[Tensor, Tensor], Tensor], values: Floats | None = None
) -> Tensor:
    """Apply `operation` to the crops chosen by `where`, with their `values`; which ones is known without a sync."""
    rows = np.flatnonzero(where)
    if len(rows) == 0:
        return x
    index, chosen = torch.from_numpy(rows), torch.zeros(1) if values is None else torch.from_numpy(values[rows])
    chosen = chosen.to(x.dtype)
    if x.device.type == "cuda":  # from memory that is not pinned, a copy would wait for the device
        index, chosen = index.pin_memory(), chosen.pin_memory()
    index, chosen = (tensor.to(x.device, non_blocking=True) for tensor in (index, chosen))
    if len(rows) == len(x):
        return operation(x, chosen)
    return x.index_copy_(0, index, operation(x[index], chosen))


def as_unit(image: Tensor) -> Tensor:
    """Integers scaled to 0 … 1 by the range of their type, floats as they are; at least fp32."""
    scale = 1.0 if image.dtype.is_floating_point else 1.0 / torch.iinfo(image.dtype).max
    return image.to(torch.promote_types(image.dtype, torch.float32)) * scale


def resize_by_kernel(images: Sequence[Tensor], boxes: Integers, size: int) -> Tensor:
    """Cut box i `[n, 4]` out of image i and resize it with torch's antialiased bicubic kernel: fastest on a CPU.

    Returns `[n, C, size, size]` in 0 … 1.
    """
    crops = []
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        window = images[row][None, :, top : top + height, left : left + width]
        crops.append(F.interpolate(as_unit(window), size=(size, size), mode="bicubic", antialias=True))
    return torch.cat(crops).clamp_(0, 1)


_BUCKET = 64
"""Windows are padded to multiples of this, so that crops of similar size share one batched product."""


def resize_by_products(images: Sequence[Tensor], boxes: Integers, size: int) -> Tensor:
    """The same pixels as `resize_by_kernel` by two batched matrix products per bucket of windows.

    For devices that are neither CPU nor CUDA (MPS), and on CUDA for images that are not 8-bit RGB: 8-bit RGB has a
    kernel of its own there, `opsin.data.kernels.resize`.
    """
    out: Tensor | None = None
    padded = np.stack([-(-boxes[:, 2] // _BUCKET) * _BUCKET, -(-boxes[:, 3] // _BUCKET) * _BUCKET], axis=1)
    for bucket_height, bucket_width in np.unique(padded, axis=0).tolist():
        rows = np.flatnonzero((padded == (bucket_height, bucket_width)).all(axis=1))
        first = as_unit(images[0][:, :1, :1])
        windows = first.new_zeros((len(rows), first.shape[0], bucket_height, bucket_width))
        for window, row in zip(windows, rows.tolist(), strict=True):
            top, left, height, width = boxes[row].tolist()
            window[:, :height, :width] = as_unit(images[row][:, top : top + height, left : left + width])
        rows_matrix = _bicubic_matrices(boxes[rows, 2], size, bucket_height, first.device)
        columns_matrix = _bicubic_matrices(boxes[rows, 3], size, bucket_width, first.device)
        part = rows_matrix[:, None] @ windows @ columns_matrix[:, None].transpose(-1, -2)
        if out is None:
            out = part.new_empty((len(boxes), *part.shape[1:]))
        out.index_copy_(0, torch.from_numpy(rows).to(out.device), part)
    assert out is not None
    return out.clamp_(0, 1)


def _bicubic_matrices(lengths: Integers, size: int, padded: int, device: torch.device) -> Tensor:
    """`[n, size, padded]`: row o holds the weights with which pixel o of the output sees the first `length` inputs.

    Bicubic with a = -0.5, widened by the reduction factor (antialias) and normalised at the borders, as Pillow does.
    """
    length = torch.from_numpy(lengths).to(device, torch.float32)[:, None, None]
    ratio = length / size
    stretch = ratio.clamp(min=1)
    centre = (torch.arange(size, device=device)[:, None] + 0.5) * ratio
    pixel = torch.arange(padded, device=device)
    x = ((pixel + 0.5 - centre) / stretch).abs()
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weight = torch.where((x < 2) & (pixel < length), weight, 0)
    return weight / weight.sum(-1, keepdim=True)


# Photometric operations on [n, C, S, S] in 0 … 1 with one factor per crop; each result is clamped, as torchvision's.


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    f = factor[:, None, None, None]
    return (f * x + (1 - f) * other).clamp_(0, 1)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by `factor` `[n]`."""
    return (x * factor[:, None, None, None]).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the crop's mean gray, or per channel with its mean where there is no gray."""
    gray = grayscale(x) if x.shape[1] == 3 else x
    return _blend(x, gray.mean(dim=(-2, -1), keepdim=True), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray of every pixel."""
    return _blend(x, grayscale(x), factor)


def grayscale(x: Tensor) -> Tensor:
    """`[n, 1, S, S]`: luma with the weights of ITU-R BT.601."""
    red, green, blue = x.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by `shift` `[n]` turns, in HSV."""
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, 1, chroma)
    sextant = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sextant = (sextant + 6 * shift[:, None, None]) % 6
    # Each channel is the value less a share of the chroma that depends on its distance around the circle.
    channels = []
    for start in (5, 3, 1):
        k = (start + sextant) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def solarize(x: Tensor) -> Tensor:
    """Invert the values from 128/255 up."""
    return torch.where(x >= 128 / 255, 1 - x, x)


_RADIUS = 4
"""Taps of the blur on either side of its centre."""


def blur(x: Tensor, sigma: Tensor, radius: int = _RADIUS) -> Tensor:
    """Gaussian blur with 2 · `radius` + 1 taps and reflected borders, as two products with one band matrix per crop."""
    size = x.shape[-1]
    reach = torch.arange(-radius, radius + 1, device=x.device)
    taps = torch.exp(-0.5 * (reach.to(x.dtype) / sigma[:, None]) ** 2)
    taps = taps / taps.sum(-1, keepdim=True)
    source = torch.arange(size, device=x.device)[:, None] + reach
    source = source.abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)  # reflection without repeating the border
    band = x.new_zeros((len(x), size, size))
    band.scatter_add_(2, source.expand(len(x), -1, -1), taps[:, None, :].expand(-1, size, -1).contiguous())
    return band[:, None] @ x @ band[:, None].transpose(-1, -2)
