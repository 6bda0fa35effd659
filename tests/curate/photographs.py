"""Heaps of real photos and of junk, for tests of curation."""

import io

import numpy as np
import skimage.data
from PIL import Image

from opsin.curate.engine import Engine

ENGINE = Engine(threads=2, memory=0.5)
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def photo(name, side=None):
    """A photo that ships with scikit-image, its longer side reduced to `side`."""
    image = Image.fromarray(np.asarray(getattr(skimage.data, name)())).convert("RGB")
    if side is not None:
        image.thumbnail((side, side))
    return image


def photos(folder, names=PHOTOS, side=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        photo(name, side).save(folder / f"{name}.jpg", quality=92)
    return folder


def tile(i, size=(48, 40)):
    """Image i as PNG, told by its first pixel, and not constant."""
    pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[0, 0] = (i % 256, i // 256, 7)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def told(image):
    """Which tile this is, decoded."""
    assert image[2, 0, 0] == 7
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def tiles(folder, indices):
    folder.mkdir(parents=True, exist_ok=True)
    for i in indices:
        (folder / f"{i:04}.png").write_bytes(tile(i))
    return folder
