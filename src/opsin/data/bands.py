"""Files of any number of bands: NumPy arrays, and TIFF files beyond gray and RGB.

`opsin.data.decode` opens files, guards their size and turns what goes wrong into a DecodeError; here are the two
formats that keep bands of satellites and microscopes as they were measured.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from opsin.errors import OpsinError
from opsin.pixels import counted, samples

NPY: Final = b"\x93NUMPY"
"""How a NumPy array begins."""
TIFF: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFF and BigTIFF begin."""


class Stored(NamedTuple):
    """What a file says of itself, and how its samples are had."""

    format: str
    """`npy` or `tiff`."""
    height: int
    """Rows, as stored."""
    width: int
    """Columns, as stored."""
    orientation: int
    """By which the stored image is made upright: 1 to 8, as in EXIF."""
    bytes: int
    """That decoding takes: all samples, and what pads tiles."""
    read: Callable[[], NDArray[Any]]
    """Gives them: uint8, uint16 or float32 `[H, W, C]`, see `opsin.pixels.samples`."""


def open_bands(file: BinaryIO, channels: int) -> Stored | None:
    """Parse the header of a file whose bands are kept as they are; None if it is of another kind.

    Args:
        file: at its beginning, where it is again if the answer is None.
        channels: bands that are asked for. TIFF files count for other numbers than 1 and 3, which Pillow reads.

    Raises:
        OpsinError: a package is missing.
        Exception: of any kind, the header is damaged or of another number of bands.
    """
    start = file.read(len(NPY))
    file.seek(0)
    if start == NPY:
        return _open_npy(file, channels)
    if start.startswith(TIFF) and channels not in (1, 3):
        return _open_tiff(file, channels)
    return None


def _open_npy(file: BinaryIO, channels: int) -> Stored:
    shape, fortran, dtype = _npy_header(file)
    if dtype.hasobject or dtype.kind not in "uif":
        raise ValueError(f"an array of type {dtype} is no image")
    if len(shape) == 2:
        if channels != 1:
            raise ValueError(f"an array of shape {list(shape)} has 1 band, and {channels} are asked for")
        shape, last = (*shape, 1), True
    elif len(shape) == 3 and channels in (shape[0], shape[2]):
        if shape[0] == shape[2]:
            raise ValueError(
                f"the bands of an array of shape {list(shape)} may be its first or its last side, both are {channels}: "
                "crop the image"
            )
        last = shape[2] == channels
    else:
        raise ValueError(
            f"an array of shape {list(shape)} is neither [{channels}, H, W] nor [H, W, {channels}], and "
            f"{counted(channels)} {'is' if channels == 1 else 'are'} asked for"
        )
    start, declared = file.tell(), prod(shape) * dtype.itemsize
    found = file.seek(0, 2) - start
    if min(shape) < 1 or found != declared:
        raise ValueError(f"it declares {list(shape)} of {dtype}, {declared} bytes, and holds {found} (cut short?)")

    def read() -> NDArray[Any]:
        file.seek(start)
        content = bytearray(declared)
        if file.readinto(content) != declared:  # type: ignore[attr-defined]
            raise ValueError("the file changed while it was read")
        values = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
        return samples(values if last else values.transpose(1, 2, 0))

    height, width = shape[:2] if last else shape[1:]
    return Stored("npy", height, width, 1, declared, read)


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of .npy is not for numbers")
    try:
        return (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    except (MemoryError, RecursionError):  # of the parser, whose input is 10 kB at most
        raise ValueError("its header is damaged") from None


def _open_tiff(file: BinaryIO, channels: int) -> Stored:
    tiff = _tifffile().TiffFile(file)
    tiff.pages.useframes = False  # each page is to be read by its own tags
    pages = [page for page in tiff.pages if not page.is_reduced and not page.is_mask]
    if not pages:
        raise ValueError("it has no page with an image")
    first = pages[0]
    if first.samplesperpixel == channels:
        pages = [first]
    elif first.samplesperpixel != 1 or len(pages) != channels:
        held = f"{len(pages)} pages of " * (len(pages) > 1) + counted(first.samplesperpixel)
        raise ValueError(f"it has {held}, and {channels} are asked for")
    height, width = first.imagelength, first.imagewidth
    for number, page in enumerate(pages):
        if (page.imagelength, page.imagewidth, page.dtype) != (height, width, first.dtype) or page.imagedepth != 1:
            raise ValueError(f"page {number + 1} differs from the first in size or type")
        if page.photometric in (0, 3):  # white is zero; palette
            raise ValueError(f"its samples are {page.photometric.name}, not what was measured")
    if first.dtype is None:
        raise ValueError(f"samples of {first.bitspersample} bits are not read")
    tag = first.tags.get("Orientation")
    orientation = tag.value if tag is not None and tag.value in range(1, 9) else 1

    def read() -> NDArray[Any]:
        found = [_page(page) for page in pages]
        return samples(found[0] if len(found) == 1 else np.stack([page[..., 0] for page in found]).transpose(1, 2, 0))

    return Stored("tiff", height, width, orientation, sum(map(_decoded, pages)), read)


def _decoded(page: Any) -> int:
    """Bytes of one page with whole tiles."""
    height, width = page.imagelength, page.imagewidth
    if page.is_tiled:
        height, width = -(-height // page.tilelength) * page.tilelength, -(-width // page.tilewidth) * page.tilewidth
    return int(height * width * page.samplesperpixel * page.dtype.itemsize)


def _page(page: Any) -> NDArray[Any]:
    """`[H, W, samples]` of one page."""
    segments = prod(page.chunked)
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if len(ends) != segments or max(ends) > page.parent.filehandle.size:
        raise ValueError("its table of strips or tiles is damaged, or it is cut short")
    values: NDArray[Any] = page.asarray(maxworkers=1)  # this is one of many threads
    height, width, count = page.imagelength, page.imagewidth, page.samplesperpixel
    if count > 1 and page.planarconfig == 2:
        return values.reshape(count, height, width).transpose(1, 2, 0)
    return values.reshape(height, width, count)


@cache
def _tifffile() -> ModuleType:
    if missing := [name for name in ("tifffile", "imagecodecs") if find_spec(name) is None]:
        raise OpsinError(
            f"TIFF files of other bands than gray and RGB need {' and '.join(missing)}: pip install 'opsin[bands]'."
        )
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says of damaged files, a DecodeError says
    return tifffile
