"""Common corruptions of images, after ImageNet-C (Hendrycks and Dietterich 2019, 1903.12261), batched on the device.

Each kind has its definition and the published parameters in a module of its group. What is random is drawn for every
image by seed, kind and number, whatever batch it is in, and is the same at every severity: the published generator
draws anew, which says the same on average, but here one image only gets worse.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opsin.errors import OpsinError, unknown
from opsin.evaluate.corruptions import blur, digital, noise, weather
from opsin.evaluate.corruptions.filters import stored

Stored = Literal["png", "jpeg85"]
"""How corrupted images are kept before a model sees them: as they are, or as JPEG of quality 85 like the published."""
QUALITY = 85
"""Of the published files."""
Draws = tuple[Tensor, ...]
"""What was drawn for a batch, each `[B, ...]`: the fields of a kind."""
Draw = Callable[[torch.Generator, int, int], Draws]


def _nothing(_generator: torch.Generator, _height: int, _width: int) -> Draws:
    return ()


@dataclass(frozen=True)
class Kind:
    """A corruption."""

    apply: Callable[..., Tensor]
    """(images float32 `[B, 3, H, W]` from 0 to 255, severity, *drawn) → images, which may lie outside 0 to 255."""
    draw: Draw = _nothing
    """(generator, H, W) → what an image draws."""
    whole: bool = False
    """`apply` takes uint8 images and gives such."""


def _uniform(*shape: int, field: bool = False) -> Draw:
    """Draws uniform numbers of a shape, with the image's height and width behind it if they are a field."""
    return lambda generator, h, w: (torch.rand((*shape, h, w) if field else shape, generator=generator),)


def _normal(channels: int) -> Draw:
    return lambda generator, h, w: (torch.randn(channels, h, w, generator=generator),)


def _both(first: Draw, second: Draw) -> Draw:
    return lambda generator, h, w: (*first(generator, h, w), *second(generator, h, w))


def _fog(generator: torch.Generator, height: int, width: int) -> Draws:
    return (torch.rand(weather.fog_side(height, width) ** 2 - 1, generator=generator),)


_TABLE = {
    "gaussian_noise": Kind(noise.gaussian_noise, _normal(3)),
    "shot_noise": Kind(noise.shot_noise, _uniform(3, field=True)),
    "impulse_noise": Kind(noise.impulse_noise, _uniform(3, field=True)),
    "defocus_blur": Kind(blur.defocus_blur),
    "glass_blur": Kind(blur.glass_blur, _uniform(blur.PASSES, 2, field=True)),
    "motion_blur": Kind(blur.motion_blur, _uniform(1)),
    "zoom_blur": Kind(blur.zoom_blur),
    "snow": Kind(weather.snow, _both(_normal(1), _uniform(1))),
    "frost": Kind(weather.frost, _uniform(3)),
    "fog": Kind(weather.fog, _fog),
    "brightness": Kind(weather.brightness),
    "contrast": Kind(digital.contrast),
    "elastic_transform": Kind(digital.elastic_transform, _both(_uniform(3, 2), _uniform(2, field=True))),
    "pixelate": Kind(digital.pixelate),
    "jpeg_compression": Kind(digital.jpeg_compression, whole=True),
    "speckle_noise": Kind(noise.speckle_noise, _normal(3)),
    "gaussian_blur": Kind(blur.gaussian_blur),
    "spatter": Kind(weather.spatter, _normal(1)),
    "saturate": Kind(digital.saturate),
}
KINDS = tuple(_TABLE)[:15]
"""The 15 by which models are compared."""
EXTRA = tuple(_TABLE)[15:]
"""The 4 that the authors keep for development."""
SEVERITIES = (1, 2, 3, 4, 5)
"""From weak to strong."""


def missing() -> dict[str, str]:
    """Kinds that cannot be made here, with the reason."""
    if weather.textures_folder() is None:
        return {"frost": "its textures are in the package imagecorruptions: pip install --no-deps imagecorruptions"}
    return {}


def drawn(kind: str, seed: int, index: Sequence[int], height: int, width: int) -> Draws:
    """What images draw for a kind, by their numbers `index` in their set, on the CPU, each `[B, ...]`."""
    if kind not in _TABLE:
        raise unknown("corruption", kind, _TABLE)
    images = []
    for number in index:
        digest = hashlib.sha256(f"{seed} {kind} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        images.append(_TABLE[kind].draw(generator, height, width))
    return tuple(torch.stack(field) for field in zip(*images, strict=True))


def applied(images: Tensor, kind: str, severity: int, draws: Draws, stored_as: Stored = "png") -> Tensor:
    """Images uint8 `[B, 3, H, W]` corrupted with what was `drawn`, of their type and on their device.

    Raises:
        OpsinError: no such kind or severity, or images of other bands than RGB.
    """
    if kind not in _TABLE:
        raise unknown("corruption", kind, _TABLE)
    if severity not in SEVERITIES:
        raise OpsinError(f"severity {severity} of {kind} is not there: give 1, 2, 3, 4 or 5.")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise OpsinError(
            f"corruptions take uint8 images [B, 3, H, W], not {images.dtype} {list(images.shape)}: convert them to RGB."
        )
    made = _TABLE[kind]
    found = made.apply(
        images if made.whole else images.float(), severity, *(field.to(images.device) for field in draws)
    )
    found = found if made.whole else stored(found)
    return digital.recompressed(found, QUALITY) if stored_as == "jpeg85" else found


def corrupt(
    images: Tensor, kind: str, severity: int, seed: int, index: Sequence[int], stored_as: Stored = "png"
) -> Tensor:
    """Corrupt a batch: the same image number gets the same corruption in every batch.

    Args:
        images: uint8 `[B, 3, H, W]`; parameters in pixels are meant for 224.
        kind: of `KINDS` or `EXTRA`.
        severity: 1 to 5.
        seed: of what is random.
        index: the images' numbers in their set, `[B]`.
        stored_as: "jpeg85" compresses the result, as the published files are.

    Returns:
        uint8 `[B, 3, H, W]`, on the device of `images`.

    Raises:
        OpsinError: see `applied`; frost's textures are missing.
    """
    return applied(images, kind, severity, drawn(kind, seed, index, *images.shape[-2:]), stored_as)
