"""Planted copies: what people and programs do to a picture before it turns up again.

Thresholds are calibrated with them, heads trained and benchmarks made. A copy depends on the picture, its kind, a seed
and a number alone.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from torch import Tensor

from opsin.curate.looks import picture
from opsin.data.rng import Stream, uniform
from opsin.errors import unknown

KINDS: Final = ("recompressed", "resized", "cropped", "flipped", "colour", "text", "format", "strong")
"""The kinds of copies:

- `recompressed`: JPEG of quality 20 to 60.
- `resized`: each side to 25 to 70 % of its length, the aspect kept.
- `cropped`: a rectangle with 60 to 90 % of the area, of the same aspect, anywhere.
- `flipped`: left and right exchanged.
- `colour`: brightness, contrast and saturation times 0.6 to 1.4 each, hue turned by up to 25 degrees.
- `text`: a line of text, 6 to 14 % of the height, somewhere, in a random colour.
- `format`: stored as PNG, lossy WebP (quality 50 to 90) and JPEG (quality 70 to 95) in turn.
- `strong`: a crop of 30 to 90 % of the area with its aspect changed by up to a third, and then each with some chance:
  flip, colour, turn by up to 20 degrees, blur, a rectangle painted over, text, a frame as of a screenshot, resize, and
  JPEG of quality 20 to 90.
"""

_WORDS: Final = (
    "photo",
    "copyright",
    "summer",
    "breaking news",
    "look at this",
    "2019",
    "www.example.org",
    "sale",
    "ok",
)
_DRAWS: Final = 128  # of a copy, at most


class _Draws:
    """Random numbers of one copy, one after the other."""

    def __init__(self, kind: str, seed: int, number: int) -> None:
        position = number * len(KINDS) + KINDS.index(kind)
        self._left: Iterator[float] = iter(uniform(seed, Stream.COPIES, position, _DRAWS).tolist())

    def between(self, low: float, high: float) -> float:
        """Uniform from low to high."""
        return low + (high - low) * next(self._left)

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return int(next(self._left) * count)

    def chance(self, share: float) -> bool:
        """True in this share of copies."""
        return bool(next(self._left) < share)


def copy_of(pixels: Tensor, kind: str, seed: int, number: int) -> Tensor:
    """A copy of an image.

    Args:
        pixels: uint8 `[3, H, W]`, each side at most the 16,383 pixels that WebP holds.
        kind: one of `KINDS`.
        seed: of all random choices.
        number: which copy: another number makes other choices.

    Returns:
        uint8 `[3, h, w]`; h and w may be others.

    Raises:
        OpsinError: there is no such kind.
    """
    if kind not in KINDS:
        raise unknown("kind of copy", kind, KINDS)
    copied = _MAKE[kind](picture(pixels), _Draws(kind, seed, number))
    return torch.from_numpy(np.array(copied)).permute(2, 0, 1)


def measure(vectors: Tensor, kinds: Sequence[Sequence[str]], precision: float) -> dict[str, Any]:
    """How well cosines tell copies of images from other images.

    Every copy is compared with every image; a pair above the threshold counts as found. Precision depends on the
    number of images: among ten times as many, ten times as many others come near.

    Args:
        vectors: `[n, 1 + V, D]` of unit length: of every image, and of its copies.
        kinds: `[n][V]`, of the copies.
        precision: share of copies among the found pairs that is wanted.

    Returns:
        `threshold`: the lowest cosine with this precision, 1 if none has it; `recall`: share of the copies found;
        `kinds`: the same for each kind; `first`: share of the copies whose own image is the nearest of all.
    """
    n, views = len(vectors), vectors.shape[1] - 1
    cosines = vectors[:, 1:].flatten(0, 1) @ vectors[:, 0].T
    own = torch.arange(n).repeat_interleave(views)
    right = cosines.gather(1, own[:, None])[:, 0]
    first = (cosines.argmax(1) == own).float().mean().item()
    ordered = right.sort(descending=True).values
    cosines.scatter_(1, own[:, None], -2)
    wrong = cosines.flatten().sort().values
    above = len(wrong) - torch.searchsorted(wrong, ordered)  # others at least as near as this copy
    found = torch.arange(1, len(ordered) + 1)
    enough = (found / (found + above) >= precision).nonzero()
    threshold = ordered[enough[-1, 0]].item() if len(enough) else 1.0
    hit = (right >= threshold) if len(enough) else torch.zeros(len(right), dtype=torch.bool)
    names = np.array([kind for row in kinds for kind in row])
    by_kind = {kind: hit.numpy()[names == kind].mean().item() for kind in KINDS if (names == kind).any()}
    return {"threshold": threshold, "recall": hit.float().mean().item(), "kinds": by_kind, "first": first}


def _recompressed(image: Image.Image, draws: _Draws) -> Image.Image:
    return _stored(image, "JPEG", quality=round(draws.between(20, 60)))


def _resized(image: Image.Image, draws: _Draws) -> Image.Image:
    share = draws.between(0.25, 0.7)
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _cropped(image: Image.Image, draws: _Draws) -> Image.Image:
    return _crop(image, draws, draws.between(0.6, 0.9))


def _flipped(image: Image.Image, _: _Draws) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _coloured(image: Image.Image, draws: _Draws) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turn = round(draws.between(-25, 25) * 256 / 360)
    image = Image.merge("HSV", (hue.point(lambda v: (v + turn) % 256), saturation, value)).convert("RGB")
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(draws.between(0.6, 1.4))
    return image


def _with_text(image: Image.Image, draws: _Draws) -> Image.Image:
    image = image.copy()
    height = max(8.0, image.height * draws.between(0.06, 0.14))
    at = (image.width * draws.between(0, 0.5), (image.height - height) * draws.between(0, 1))
    colour = tuple(draws.below(256) for _ in range(3))
    font = ImageFont.load_default(height)
    ImageDraw.Draw(image).text(at, _WORDS[draws.below(len(_WORDS))], fill=colour, font=font)
    return image


def _in_formats(image: Image.Image, draws: _Draws) -> Image.Image:
    image = _stored(_stored(image, "PNG"), "WEBP", quality=round(draws.between(50, 90)))
    return _stored(image, "JPEG", quality=round(draws.between(70, 95)))


def _strong(image: Image.Image, draws: _Draws) -> Image.Image:
    image = _crop(image, draws, draws.between(0.3, 0.9), aspect=4 / 3)
    # Every draw is taken whether it is used or not, so that one choice does not change the others.
    for share, change in _CHANGES:
        wanted, own = draws.chance(share), _Some(draws, 10)
        if wanted:
            image = change(image, own)
    return image


class _Some(_Draws):
    """The next few of other draws."""

    def __init__(self, draws: _Draws, count: int) -> None:
        self._left = iter([next(draws._left) for _ in range(count)])


def _crop(image: Image.Image, draws: _Draws, area: float, aspect: float = 1.0) -> Image.Image:
    """A rectangle of this share of the area, its aspect up to `aspect` times or divided by that of the image."""
    skew = aspect ** draws.between(-1, 1)
    width = max(1, min(image.width, round(image.width * (area * skew) ** 0.5)))
    height = max(1, min(image.height, round(image.height * (area / skew) ** 0.5)))
    left, top = draws.below(image.width - width + 1), draws.below(image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def _turned(image: Image.Image, draws: _Draws) -> Image.Image:
    return image.rotate(draws.between(-20, 20), Image.Resampling.BILINEAR, fillcolor=_gray(draws))


def _blurred(image: Image.Image, draws: _Draws) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(min(image.size) * draws.between(0.002, 0.012)))


def _cut_out(image: Image.Image, draws: _Draws) -> Image.Image:
    image = image.copy()
    width, height = (max(1, round(side * draws.between(0.1, 0.4))) for side in image.size)
    left, top = draws.below(image.width - width + 1), draws.below(image.height - height + 1)
    image.paste(_gray(draws), (left, top, left + width, top + height))
    return image


def _framed(image: Image.Image, draws: _Draws) -> Image.Image:
    """Bars on all sides, as around a picture in a screenshot."""
    left, top, right, bottom = (round(side * draws.between(0, 0.25)) for side in (*image.size, *image.size))
    page = Image.new("RGB", (image.width + left + right, image.height + top + bottom), _gray(draws))
    page.paste(image, (left, top))
    return page


def _recoded(image: Image.Image, draws: _Draws) -> Image.Image:
    return _stored(image, "JPEG", quality=round(draws.between(20, 90)))


def _gray(draws: _Draws) -> tuple[int, int, int]:
    """White, black or any gray, as bars and pages are."""
    level = (0, 255, draws.below(256))[draws.below(3)]
    return level, level, level


def _stored(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file).convert("RGB")


_MAKE: Final[dict[str, Callable[[Image.Image, _Draws], Image.Image]]] = dict(
    zip(KINDS, (_recompressed, _resized, _cropped, _flipped, _coloured, _with_text, _in_formats, _strong), strict=True)
)
_CHANGES: Final = (
    (0.5, _flipped),
    (0.6, _coloured),
    (0.2, _turned),
    (0.2, _blurred),
    (0.2, _cut_out),
    (0.2, _with_text),
    (0.2, _framed),
    (0.3, _resized),
    (0.5, _recoded),
)
