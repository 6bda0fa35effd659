"""The rules by which images become numbers, for files and for images handed over in memory."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FLOATS: Final = ("f2", "f4", "f8")


def bands(image: Image.Image, channels: int) -> NDArray[Any]:
    """`[H, W, C]` of a Pillow image: RGB for three channels (`rgb`), gray for one (`gray`), all of RGBA for four.

    Raises:
        ValueError: the image has other bands, or samples without a stated range.
    """
    if channels == 3:
        return rgb(image)
    if channels == 1:
        return gray(image)[..., None]
    check_bands(image, channels)
    return np.array(image)


def check_bands(image: Image.Image, channels: int) -> None:
    """Raise a ValueError unless a Pillow image can have so many channels."""
    if channels in (1, 3) or (channels, image.mode) == (4, "RGBA"):
        return
    found = len(image.getbands())
    if found == channels:
        raise ValueError(f"it is {image.mode}, and {channels} bands are read of RGBA, TIFF and .npy only")
    raise ValueError(f"it has {counted(found)} ({image.mode}), and {channels} are asked for")


def counted(bands: int) -> str:
    """So many bands, for a message."""
    return f"{bands} band" + "s" * (bands != 1)


def rgb(image: Image.Image) -> NDArray[np.uint8]:
    """`[H, W, 3]`: 16 bits lose their low byte, transparency is composited on white, palettes and CMYK are converted.

    Raises:
        ValueError: 32-bit samples, whose range nothing states.
    """
    if image.mode in ("I", "F"):
        raise ValueError("32-bit samples have no stated range, convert the file to 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return np.array(Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB"))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        page = Image.new("RGB", image.size, "white")
        page.paste(rgba, mask=rgba.getchannel("A"))
        return np.array(page)
    return np.array(image.convert("RGB"))


def gray(image: Image.Image) -> NDArray[Any]:
    """`[H, W]`: 16-bit gray in uint16, floats by the rule of `samples`; all else is uint8, colours as their luma.

    Luma is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), of what `rgb` gives.

    Raises:
        ValueError: 32-bit integers, or floats outside of 0 … 1.
    """
    if image.mode.startswith("I;16") or image.mode == "F":
        return samples(np.array(image))
    if image.mode == "L" and "transparency" not in image.info:
        return np.array(image)
    return luma(rgb(image))


def luma(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`[H, W]` of `[H, W, 3]`, rounded as Pillow does."""
    return np.array(Image.fromarray(pixels).convert("L"))


def samples(values: NDArray[Any]) -> NDArray[Any]:
    """The same numbers as uint8, uint16 or float32 in this machine's byte order; never fewer bits than were given.

    Signed 16-bit integers without a negative one count as unsigned. Floats (of 16, 32 or 64 bits) are shares of full
    scale, from 0 to 1.

    Raises:
        ValueError: another type, a negative integer, or a float outside of 0 … 1.
    """
    kind = values.dtype.str[1:]
    if kind in ("u1", "u2"):
        return values.astype(kind, copy=False)
    if kind == "i2":
        if values.min() < 0:
            raise ValueError(
                f"it has negative values (the lowest is {values.min()}), whose range nothing states: shift or clip "
                "them, and store uint16"
            )
        return values.astype("u2")
    if kind in _FLOATS:
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # nor with a NaN
            raise ValueError(
                f"its values go from {low:g} to {high:g}, and floats must be from 0 to 1: divide them by the highest "
                "that the sensor gives"
            )
        return values.astype("f4", copy=False)
    raise ValueError(f"samples of type {values.dtype} have no stated range: store uint8, uint16 or floats from 0 to 1")
