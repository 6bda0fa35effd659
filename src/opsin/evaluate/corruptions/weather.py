"""Weather of ImageNet-C: snow, frost, fog, brightness, and spatter (extra). Severities 1 to 5 index the tuples.

Images are float32 `[B, 3, H, W]` from 0 to 255, what was drawn lies on the same device.
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.data.decode import decode
from opsin.errors import OpsinError
from opsin.evaluate.corruptions.edges import distance_to, edges, equalised
from opsin.evaluate.corruptions.filters import enlarged, gaussian, motion

SNOW = (
    (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
"""Mean and standard deviation of the noise, its magnification, what of it is a flake, radius and standard deviation of
the trail in pixels, share of the image that stays."""
FROST = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
"""Weights of the image and of the texture."""
FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))
"""Thickness, and by what roughness falls from one scale to the next finer."""
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Added to the value (HSV)."""
SPATTER = (
    (0.65, 0.3, 4, 0.69, 0.6),
    (0.65, 0.3, 3, 0.68, 0.6),
    (0.65, 0.3, 2, 0.68, 0.5),
    (0.65, 0.3, 1, 0.65, 1.5),
    (0.67, 0.4, 1, 0.65, 1.5),
)
"""Mean and standard deviation of the noise, its blur in pixels, what of it is wet, and strength of water (severities 1
to 3) or blur of mud in pixels (4 and 5)."""
WATER, MUD = (175.0, 238.0, 238.0), (63.0, 42.0, 20.0)
"""Their colours."""
DISTANCE = 20
"""Pixels from the edge of a drop at which its shading ends."""
TEXTURES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
"""Of the six published ones those that are used: the generator never draws the sixth."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey."""
SCALE = 100.0
"""Roughness of fog at the coarsest scale."""


def snow(images: Tensor, severity: int, normal: Tensor, chance: Tensor) -> Tensor:
    """Whitens, and adds flakes of `normal` `[B, 1, H, W]`, which fall as `chance` says (uniform, `[B, 1]`)."""
    mean, deviation, factor, least, radius, sigma, keeps = SNOW[severity - 1]
    layer = enlarged(normal * deviation + mean, factor)
    layer = (layer.where(layer >= least, 0).clamp(0, 1) * 255).floor()
    layer = motion(layer, int(radius), sigma, chance[:, 0] * 90 - 135).add(0.5).floor()
    grey = (images * torch.tensor(LUMA, device=images.device)[:, None, None]).sum(1, keepdim=True)
    whiter = keeps * images + (1 - keeps) * torch.maximum(images, grey * 1.5 + 127.5)
    return whiter + layer + layer.rot90(2, (2, 3))


def frost(images: Tensor, severity: int, chance: Tensor) -> Tensor:
    """Adds a part of a texture: which, and its top and left, by `chance` (uniform, `[B, 3]`)."""
    keeps, added = FROST[severity - 1]
    height, width = images.shape[-2:]
    parts = []
    for which, top, left in chance.tolist():
        texture = textures()[int(which * len(TEXTURES))]
        rows, columns = texture.shape[1] - height, texture.shape[2] - width
        if min(rows, columns) < 1:
            raise OpsinError(
                f"frost covers images below {min(texture.shape[1:])} pixels, and these have {height} by {width}: "
                "choose a smaller size, or leave out frost."
            )
        parts.append(texture[:, int(top * rows) :, int(left * columns) :][:, :height, :width])
    return keeps * images + added * torch.stack(parts).to(images)


def textures_folder() -> Path | None:
    """Where the installed package imagecorruptions keeps the textures of frost; None without it."""
    found = find_spec("imagecorruptions")
    folders = (Path(place) / "frost" for place in (found.submodule_search_locations or ()) if found) if found else ()
    return next((folder for folder in folders if all((folder / name).is_file() for name in TEXTURES)), None)


@lru_cache(maxsize=1)
def textures() -> list[Tensor]:
    """The textures of frost, uint8 `[3, H, W]`.

    Raises:
        OpsinError: they are not installed.
    """
    folder = textures_folder()
    if folder is None:
        raise OpsinError(
            "frost needs the textures of the package imagecorruptions, which is missing: pip install --no-deps "
            "imagecorruptions, or leave out frost."
        )
    return [decode(folder / name, channels=3) for name in TEXTURES]


def fog(images: Tensor, severity: int, chance: Tensor) -> Tensor:
    """Adds a fractal of `chance` (uniform, `[B, side² - 1]`, side as `fog_side` says), and scales back."""
    thickness, decay = FOG[severity - 1]
    height, width = images.shape[-2:]
    highest = images.amax((1, 2, 3), keepdim=True)
    clouds = plasma(chance * 2 - 1, decay)[:, None, :height, :width]
    return (images + thickness * 255 * clouds) * highest / (highest + thickness * 255)


def fog_side(height: int, width: int) -> int:
    """Side of the fractal: the power of two that covers the image."""
    return 1 << (max(height, width) - 1).bit_length()


def plasma(noise: Tensor, decay: float) -> Tensor:
    """Clouds `[B, side, side]` from 0 to 1 by the diamond-square method on a torus.

    Args:
        noise: `[B, side² - 1]`, from -1 to 1, in the order of use: from coarse to fine the centres of squares, then
            the middles of their horizontal sides, then of their vertical ones.
        decay: by what the scale falls at each halving; the noise is scaled by its square.
    """
    batch = len(noise)
    side = int((noise.shape[1] + 1) ** 0.5)
    clouds = noise.new_zeros(batch, 1, 1)  # a coarser grid is every second row and column of the next finer
    used, scale = 0, SCALE
    while len(clouds[0]) < side:
        count = len(clouds[0])
        fresh = noise[:, used : used + 3 * count**2].view(batch, 3, count, count) * scale**2
        used, scale = used + 3 * count**2, scale / decay
        beside, below = clouds.roll(-1, 2), clouds.roll(-1, 1)
        centres = (clouds + beside + below + beside.roll(-1, 1)) / 4 + fresh[:, 0]
        rows = (clouds + beside + centres + centres.roll(1, 1)) / 4 + fresh[:, 1]
        columns = (clouds + below + centres + centres.roll(1, 2)) / 4 + fresh[:, 2]
        even, odd = torch.stack([clouds, rows], 3).flatten(2), torch.stack([columns, centres], 3).flatten(2)
        clouds = torch.stack([even, odd], 2).flatten(1, 2)
    clouds = clouds - clouds.amin((1, 2), keepdim=True)
    return clouds / clouds.amax((1, 2), keepdim=True)


def brightness(images: Tensor, severity: int) -> Tensor:
    """Raises the value (HSV), hue and saturation staying."""
    value = images.amax(1, keepdim=True)
    brighter = (value + BRIGHTNESS[severity - 1] * 255).clamp_max(255)
    return torch.where(value > 0, images * (brighter / value.clamp_min(1)), brighter)


def _embossed(images: Tensor) -> Tensor:
    """Images filtered by ((-2, -1, 0), (-1, 1, 1), (0, 1, 2)), mirrored at the border."""
    around = F.pad(images, [1] * 4, mode="reflect")
    height, width = images.shape[-2:]
    weights = {(0, 0): -2, (0, 1): -1, (1, 0): -1, (1, 1): 1, (1, 2): 1, (2, 1): 1, (2, 2): 2}
    found = torch.zeros_like(images)
    for (down, right), weight in weights.items():
        found.add_(around[..., down : down + height, right : right + width], alpha=weight)
    return found


def spatter(images: Tensor, severity: int, normal: Tensor) -> Tensor:
    """Drops of water, shaded at their edges, or spots of mud, where `normal` `[B, 1, H, W]` is high once blurred."""
    mean, deviation, blur, least, last = SPATTER[severity - 1]
    wet = gaussian(normal * deviation + mean, blur)
    colour = torch.tensor(WATER if severity <= 3 else MUD, device=images.device)[:, None, None]
    if severity > 3:
        mud = gaussian((wet > least).float(), last)
        mud = mud.where(mud >= 0.8, 0)
        return images * (1 - mud) + colour * mud
    drops = (wet.where(wet >= least, 0) * 255).floor()
    distance = distance_to(edges(drops, 50, 150), DISTANCE)
    shade = equalised(_box(distance).floor())
    shade = _embossed(shade).clamp(0, 255)
    light = drops * _box(shade).add(0.5).floor()
    light = light / light.amax((1, 2, 3), keepdim=True).clamp_min(1) * last
    return images + light * colour


def _box(images: Tensor) -> Tensor:
    """Means over 3 by 3 pixels."""
    return F.avg_pool2d(F.pad(images, [1] * 4, mode="reflect"), 3, 1)
