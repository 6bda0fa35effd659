"""Image files to pixels: one function, one result, whatever the format.

JPEG goes through torchvision, which is faster than Pillow, lets other threads run meanwhile, and gives bit for bit the
same pixels. Everything else goes through Pillow. torchvision reads PNG too, but a damaged PNG makes it end the process
with a segmentation fault (seen with 0.29 on 40 altered bytes), and it gains nothing on PNG and WebP. A JPEG that is
wanted at a fraction of its size goes through Pillow, which has libjpeg compute that fraction only. The JPEG engine of a
GPU is left out: 16 threads decode five times what a training step needs, and its pixels would be others.

Images of other bands than RGB keep their samples as they are, 16 bits and floats too: see `decode`. Those that Pillow
does not know are read by `opsin.data.bands`.

What is read is the file's content: its name and extension decide nothing.
"""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from opsin.data.bands import TIFF, Stored, open_bands
from opsin.errors import OpsinError
from opsin.pixels import bands, check_bands, luma

# The part after "+" tells CPU from CUDA builds, which carry the same libjpeg.
DECODER: Final = f"torchvision {torchvision.__version__.split('+')[0]}, Pillow {PIL.__version__}" + "".join(
    f", {name} {features.version(name)}" for name in ("libjpeg_turbo", "webp", "libtiff")
)
"""The libraries that turn files into pixels. Other versions may differ in the last bit, so this is part of a recipe."""

# `max_pixels` replaces this warning; Pillow's hard limit for TIFF, WebP and GIF stays and becomes a DecodeError.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Damaged metadata, which does no harm, or a damaged TIFF, which becomes a DecodeError.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

_SIGNATURES: Final[tuple[tuple[bytes, type[ImageFile.ImageFile]], ...]] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"GIF87a", GifImagePlugin.GifImageFile),
    (b"GIF89a", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    *((start, TiffImagePlugin.TiffImageFile) for start in TIFF),
)


class DecodeError(OpsinError):
    """A file that gives no pixels."""

    def __init__(self, path: Path | str | None, reason: str) -> None:
        self.path = path
        """The file, its URI, or None if the image was given as bytes."""
        self.reason = reason
        """What is wrong with it, without the path."""
        super().__init__(f"cannot decode {'the image' if path is None else shown(path)}: {reason}.")


class Header(NamedTuple):
    """What a file says of itself before any pixel is decoded."""

    format: str
    """`jpeg`, `png`, `webp`, `gif`, `bmp`, `tiff` or `npy`."""
    width: int
    """Pixels from left to right of the upright image."""
    height: int
    """Pixels from top to bottom of the upright image."""


class Scale(NamedTuple):
    """What decoded pixels are a fraction of."""

    height: int
    """Pixels from top to bottom of the whole image, upright."""
    width: int
    """Pixels from left to right of the whole image, upright."""
    reduction: int
    """1, 2, 4 or 8: each side was divided by it and rounded up."""


Reduction = Callable[[int, int], int]
"""Chooses by how much an image of this height and width is reduced: 1, 2, 4 or 8."""


def whole(_height: int, _width: int) -> int:
    """The `Reduction` that reduces nothing."""
    return 1


def shown(path: str | Path) -> str:
    """`path` for a message; bytes of a name that are not UTF-8 appear escaped, so that it can always be printed."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def why(error: OSError) -> str:
    """The system's reason for `error`, to be put in brackets."""
    if isinstance(error, FileExistsError):
        return "a file is in the way"
    if isinstance(error, FileNotFoundError):  # pyarrow's has a text of its own
        return "no such file or directory"
    return (error.strerror or str(error)).lower()


def header(path: Path | bytes, channels: int = 3) -> Header:
    """Format and upright size of an image file (or of its bytes), read without decoding it.

    Raises:
        DecodeError: the file cannot be opened, is empty, does not begin like an image, or has other bands.
        OpsinError: a package that reads it is missing.
    """
    source = None if isinstance(path, bytes) else path
    try:
        with _file(path) as file:
            stored = open_bands(file, channels)
            if stored is not None:
                return Header(stored.format, *_upright_size(stored.width, stored.height, stored.orientation))
            image = _open(file)
            _check(image, channels)
            return _header(image)
    except (MemoryError, OpsinError):
        raise
    except Exception as error:  # a damaged header makes Pillow raise almost anything
        raise DecodeError(source, _reason(error)) from error


def decode(path: Path | bytes, *, channels: int = 3, max_pixels: int = 200_000_000) -> Tensor:
    """The pixels of an image file (or of its bytes): uint8 `[3, H, W]`, RGB, upright. Safe to call from many threads.

    Rules:
        - Orientation in EXIF (or, without EXIF, XMP) is applied; a PNG's only if it precedes the pixels. An unreadable
          entry counts as none.
        - Of an animation the first frame counts.
        - 16 bits become 8 by keeping the high byte, `v >> 8`: what libpng, Pillow and torchvision do, and exact for
          8-bit images that were widened by ×256 or ×257. 32-bit samples have no stated range and are refused.
        - Transparency is composited on white, `round((a v + (255 - a) 255) / 255)`. Dropping alpha would show whatever
          colour an editor left under the transparent part; white is the page that most such images were drawn for, and
          what a browser shows.
        - Palette and grey become RGB; CMYK becomes RGB as Pillow converts it (no colour profile is applied, to any
          format).

    With other `channels` C the result is `[C, H, W]`, of uint8, uint16, or float32 from 0 to 1:
        - One: 16-bit gray and gray in floats as they are, everything else as the luma (ITU-R BT.601) of the RGB above.
          Of a TIFF file of several pages the first counts.
        - Others: TIFF files with C samples per pixel or C pages of one, of every layout, and for four RGBA of 8 bits
          with the fourth band like the others.
        - For any C: NumPy arrays `[C, H, W]` or `[H, W, C]`, the side that is C decides; for one also `[H, W]`.
        - Samples are as in the file, see `opsin.pixels.samples`; nothing of 16 bits is cut to 8, but colours of 16 bits
          that become RGB or luma.

    What is detected: a truncated file (unless all pixels are there), damage to the structure, and damaged pixels where
    the format has a checksum (PNG). JPEG has none: 40 altered bytes inside its data usually decode without an error
    into a picture that is wrong from there on (libjpeg may write "Corrupt JPEG data" to stderr), and so may those of
    the other formats.

    Args:
        path: a file, or its content.
        channels: bands of the result.
        max_pixels: images that declare more are refused before anything is decoded. Pillow's own limit of 179 million
            holds besides for TIFF, WebP and GIF. Of files of bands it stands for 3 bytes per pixel: they may have as
            many bytes as RGB images.

    Returns:
        A view of interleaved pixels `[H, W, 3]`, the layout in which they were decoded: not contiguous.

    Raises:
        DecodeError: with the path and the reason.
        OpsinError: a package that reads the file is missing.
    """
    return decode_reduced(path, whole, channels=channels, max_pixels=max_pixels)[0]


def decode_reduced(
    path: Path | bytes, reduction: Reduction, *, channels: int = 3, max_pixels: int = 200_000_000
) -> tuple[Tensor, Scale]:
    """As `decode`, but a JPEG comes at the fraction of its size that `reduction` chooses once the size is known.

    Pixels of the fraction average squares of whole pixels, counted from the top left corner of the upright image. Where
    that is not so because the image is stored turned and its sides are no multiples, a smaller reduction is taken.

    Args:
        path: see `decode`.
        reduction: from the upright height and width to 1, 2, 4 or 8; asked for JPEGs only.
        channels: see `decode`.
        max_pixels: see `decode`.

    Returns:
        The pixels, and what they are a fraction of.

    Raises:
        DecodeError: with the path and the reason.
        OpsinError: a package that reads the file is missing.
    """
    source = None if isinstance(path, bytes) else path
    try:
        with _file(path) as file:
            stored = open_bands(file, channels)
            if stored is not None:
                pixels, factor = _stored(stored, max_pixels), 1
                height, width = pixels.shape[:2]
            else:
                image = _open(file)
                _check(image, channels)
                kind, width, height = _header(image)
                if width * height > max_pixels:
                    raise ValueError(
                        f"it declares {width}×{height} pixels, more than max_pixels {max_pixels} (a decompression "
                        "bomb?)"
                    )
                factor = 1
                if isinstance(image, TiffImagePlugin.TiffImageFile):
                    pixels = _pillow(image, channels)  # already upright: Pillow turns TIFF itself, and only TIFF
                else:
                    turn = _orientation(image)
                    if kind == "jpeg":
                        factor = _reduce(image, turn, reduction(height, width))
                    if kind == "jpeg" and factor == 1:
                        file.seek(0)
                        pixels = _torchvision(file.read(), image.mode, channels)
                    else:
                        pixels = _pillow(image, channels)
                    pixels = _upright(pixels, turn)
    except (MemoryError, OpsinError):
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise DecodeError(source, _reason(error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1), Scale(height, width, factor)


def _file(path: Path | bytes) -> BinaryIO:
    return io.BytesIO(path) if isinstance(path, bytes) else path.open("rb")


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    """Parse the header only.

    The classes are called directly because `Image.open` would also try formats that run other programs, and would warn
    or fail by a limit that is global to the process.
    """
    start = file.read(16)
    file.seek(0)
    if not start:
        raise ValueError("the file is empty")
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(file)
    for signature, plugin in _SIGNATURES:
        if start.startswith(signature):
            return plugin(file)
    raise ValueError(f"not a JPEG, PNG, WebP, GIF, BMP or TIFF file, it begins with {start!r}")


def _header(image: ImageFile.ImageFile) -> Header:
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose `size` is upright or not, by Pillow's version
        width, height = (int(image.tag_v2[tag]) for tag in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
    return Header(str(image.format).lower(), *_upright_size(width, height, _orientation(image)))


def _upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if orientation >= 5 else (width, height)


def _check(image: ImageFile.ImageFile, channels: int) -> None:
    """Raise a ValueError unless the file has what `channels` asks for, in all its bits."""
    check_bands(image, channels)
    if channels not in (1, 3) and ";16" in str(image.tile):
        raise ValueError("RGBA of 16 bits would lose half of them: store it as TIFF or .npy")


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation 1 to 8."""
    try:
        # The base class's method: the one of PNG decodes the whole image to look for EXIF behind the pixels.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF does not make the picture unusable
        return 1
    return value if value in range(1, 9) else 1


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an EXIF orientation on `[H, W, C]`."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _reduce(image: ImageFile.ImageFile, orientation: int, factor: int) -> int:
    """Make Pillow decode this JPEG at 1/factor of its size, or at the fraction that is returned instead."""
    width, height = image.size
    while orientation != 1 and (width % factor or height % factor):
        factor //= 2
    if factor > 1:
        image.draft(None, (width // factor, height // factor))
    return factor


def _stored(stored: Stored, max_pixels: int) -> NDArray[Any]:
    """Read a file of bands into `[H, W, C]`, upright."""
    if stored.bytes > 3 * max_pixels:
        raise ValueError(
            f"it declares {stored.width}×{stored.height} pixels of {stored.bytes} bytes, more than the 3 per pixel of "
            f"max_pixels {max_pixels} (a decompression bomb?)"
        )
    return _upright(stored.read(), stored.orientation)


def _torchvision(jpeg: bytes, mode: str, channels: int) -> NDArray[np.uint8]:
    """Decode a JPEG, whose mode is Pillow's, into `[H, W, C]` of gray or RGB."""
    encoded = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
    wanted = ImageReadMode.GRAY if (mode, channels) == ("L", 1) else ImageReadMode.RGB
    pixels: NDArray[np.uint8] = decode_jpeg(encoded, mode=wanted).permute(1, 2, 0).numpy()
    return luma(pixels)[..., None] if pixels.shape[2] != channels else pixels


def _pillow(image: ImageFile.ImageFile, channels: int) -> NDArray[Any]:
    """Decode with Pillow into `[H, W, C]`."""
    image.load()
    return bands(image, channels)


def _reason(error: Exception) -> str:
    """One line without the name of a C++ source file or of a stream object."""
    if isinstance(error, OSError) and error.strerror:
        return why(error)
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition("decode_jpeg.cpp:")[2].partition(", ")[2] or text
