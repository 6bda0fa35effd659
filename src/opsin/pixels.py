"""One rule by which an image of any Pillow mode becomes 8-bit RGB, for files and for images handed over in memory."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image


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
