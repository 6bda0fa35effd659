"""How images and their depth become what a head is trained on and measured on.

The steps are those of the toolbox that the released heads were trained with: crop away borders, rotate, flip, crop,
change colours.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from opsin.constants import normalisation
from opsin.errors import OpsinError
from opsin.evaluate.dense import normalised
from opsin.evaluate.depth_loss import Area, known

Border = Literal["none", "nyu", "kb"]
"""What is cut off before all else: nothing, the white border of NYU (training only), or all of KITTI but the lower
352×1216 in the middle, which the depth benchmark has (training and test)."""
ANGLE = 2.5
"""Degrees by which training images are rotated at most, half of them."""
COLOURED = 0.5
"""Share of training images whose colours are changed."""
HEIGHT = 320
"""Of pictures of predictions, in pixels, at most."""


@dataclass(frozen=True)
class Protocol:
    """What a set's images go through, and what of them is measured."""

    max_depth: float
    """Metres; depths at or above it are not measured."""
    size: tuple[int, int] | None = None
    """Height and width to which images are stretched at first; None leaves them."""
    border: Border = "none"
    """What is cut off then."""
    crop: tuple[int, int] | None = None
    """Height and width of the crop, at a random place, on which a head is trained; None trains on the whole."""
    area: Area = "all"
    """What is measured."""
    cap: float | None = None
    """Metres to which known and predicted depths above are lowered before they are compared; None leaves them."""
    brightness: float = 0.25
    """Training images become darker or brighter by this share at most."""


def stretched(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels `[C, H, W]` of any type in float32 at another size, bilinear and antialiased."""
    return F.interpolate(pixels[None].float(), size=size, mode="bilinear", antialias=True)[0]


def nearest(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth `[H, W]` at another size without blending, which would make up depths at edges and holes."""
    return F.interpolate(depth[None, None], size=size, mode="nearest-exact")[0, 0]


def in_bytes(pixels: Tensor) -> Tensor:
    """Pixels as float32 from 0 to 255, whatever their type: 16 bits and floats are scaled to that."""
    scale = 1.0 if pixels.is_floating_point() else torch.iinfo(pixels.dtype).max
    return pixels.float() * (255 / scale)


def inner(border: Border, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns that are left of an image of this size.

    Raises:
        OpsinError: the image is too small for that.
    """
    if border == "none":
        return slice(None), slice(None)
    least = (472, 608) if border == "nyu" else (352, 1216)
    if height < least[0] or width < least[1]:
        raise OpsinError(
            f"an image has {height}×{width} pixels, and {'NYU' if border == 'nyu' else 'KITTI'}'s have at least "
            f"{least[0]}×{least[1]}: give the set's own images."
        )
    if border == "nyu":
        return slice(45, 472), slice(43, 608)
    left = (width - 1216) // 2
    return slice(height - 352, height), slice(left, left + 1216)


def check_shapes(pixels: Tensor, depth: Tensor, name: str) -> None:
    """An OpsinError unless an image `[C, H, W]` and its depth `[h, w]` have one aspect, to a pixel."""
    (height, width), (rows, columns) = pixels.shape[-2:], depth.shape
    if abs(height * columns / width - rows) > 1 and abs(width * rows / height - columns) > 1:
        raise OpsinError(
            f"the image {name} has {height}×{width} pixels and its depth {rows}×{columns}, which is another aspect: "
            "give depth maps of the images as they are, neither cropped nor turned."
        )


def training_view(pixels: Tensor, depth: Tensor, protocol: Protocol, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """An image and its depth as a training step takes them.

    Stretched, border cut off, rotated by up to 2.5 degrees (half of the images; what comes in from outside is black and
    of unknown depth), flipped (half), cropped at a random place, colours changed (half): to the power of 0.9 to 1.1
    (of values from 0 to 255, as the toolbox has it), times a brightness, times 0.9 to 1.1 per channel.

    Args:
        pixels: `[C, H, W]` as read.
        depth: metres `[H', W']` of the same aspect.
        protocol: of the set.
        rng: for this sample alone.

    Returns:
        The normalised image `[C, h, w]` and its depth `[h, w]`.

    Raises:
        OpsinError: the image is smaller than the crop.
    """
    image = in_bytes(pixels)
    size = protocol.size or (image.shape[-2], image.shape[-1])
    if image.shape[-2:] != size:
        image = stretched(image, size)
    if depth.shape != size:
        depth = nearest(depth, size)
    rows, columns = inner(protocol.border, *size)
    image, depth = image[:, rows, columns], depth[rows, columns]
    if rng.random() < 0.5:
        angle = rng.uniform(-ANGLE, ANGLE)
        image = rotate(image, angle, InterpolationMode.BILINEAR)
        depth = rotate(depth[None], angle, InterpolationMode.NEAREST)[0]
    if rng.random() < 0.5:
        image, depth = image.flip(-1), depth.flip(-1)
    if protocol.crop is not None:
        spare = [side - wanted for side, wanted in zip(depth.shape, protocol.crop, strict=True)]
        if min(spare) < 0:
            raise OpsinError(
                f"an image has {depth.shape[0]}×{depth.shape[1]} pixels where the crop has "
                f"{protocol.crop[0]}×{protocol.crop[1]}: give a smaller --crop or a larger --size."
            )
        top, left = (int(rng.integers(room + 1)) for room in spare)
        image = image[:, top : top + protocol.crop[0], left : left + protocol.crop[1]]
        depth = depth[top : top + protocol.crop[0], left : left + protocol.crop[1]]
    if rng.random() < COLOURED:
        image = recoloured(image, protocol.brightness, rng)
    return normalised(image), depth


def recoloured(image: Tensor, brightness: float, rng: np.random.Generator) -> Tensor:
    """Pixels `[C, H, W]` from 0 to 255 with other gamma, brightness and balance of channels, clipped to that range."""
    power = rng.uniform(0.9, 1.1)
    balance = rng.uniform(1 - brightness, 1 + brightness) * rng.uniform(0.9, 1.1, size=len(image))
    return (image**power * torch.from_numpy(balance).float()[:, None, None]).clamp(0, 255)


def measured_view(pixels: Tensor, depth: Tensor, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """An image and its depth as they are measured: the normalised image `[C, h, w]`, and the depth at its own size.

    Only KITTI's border is cut off here, of both.
    """
    image = in_bytes(pixels)
    if protocol.size is not None:
        image = stretched(image, protocol.size)
    if protocol.border == "kb":
        image = image[:, *inner("kb", *image.shape[-2:])]
        depth = depth[inner("kb", *depth.shape)]
    return normalised(image), depth


def _photo(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A normalised image `[C, h, w]` as uint8 `[3, H, W]`: its first three channels, or its first as gray."""
    mean, std = (torch.tensor(v)[:, None, None] for v in normalisation(len(image)))
    shown = (image.cpu() * std + mean).clamp(0, 1)
    shown = shown[:3] if len(shown) >= 3 else shown[:1].expand(3, -1, -1)
    return (stretched(shown, size) * 255).round().to(torch.uint8)


def side_by_side(image: Tensor, target: Tensor, prediction: Tensor) -> NDArray[np.uint8]:
    """Photo, truth and prediction beside each other, `[H, 3W, 3]`, at most 320 pixels high.

    Both depths `[h, w]` have one colour map, from near (dark) to far (light); what is unknown is black.
    """
    from matplotlib import colormaps  # here: it takes a tenth of a second, and the command line must start

    height = min(HEIGHT, target.shape[0])
    size = height, max(round(target.shape[1] * height / target.shape[0]), 1)
    target, prediction = nearest(target, size), stretched(prediction[None], size)[0]
    there = known(target)
    # Not the extremes: single wrong pixels would squeeze all others into one colour.
    low, high = np.percentile((target[there] if there.any() else prediction).numpy(), (2, 98))
    colours = [
        torch.from_numpy(colormaps["viridis"]((depth.numpy() - low) / max(high - low, 1e-6))[..., :3])
        for depth in (target, prediction)
    ]
    colours[0][~there] = 0
    parts = [_photo(image, size).permute(1, 2, 0), *((one * 255).round().to(torch.uint8) for one in colours)]
    return torch.cat(parts, dim=1).numpy()
