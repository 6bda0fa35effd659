"""What all pictures of a report are made with: figures of one style, images as data URIs."""

import base64
import io
from collections.abc import Collection

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
"""An image `[H, W, 3]`."""

THUMBNAIL = 112
"""Longer side in pixels of a small picture of an image."""
INK = "#7a808a"
"""One grey that reads on white and on near-black: the figures are transparent."""
COLOURS = ("#d9663b", "#2f8fb5", "#4f9d69", "#a06cc5", "#b8912f", "#cf5f86", "#6b7fd1", "#7d8a5a")
"""Of what is drawn, in this order."""


def png(array: Pixels) -> str:
    """An image `[H, W, 3]` (uint8) as a `data:image/png` URI."""
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3], not {array.dtype} {list(array.shape)}.")
    return encode(Image.fromarray(array))


def encode(image: Image.Image, kind: str = "png") -> str:
    """An image as a data URI: `png`, without loss, or `jpeg`, for photos of which there are many."""
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def shrunk(array: Pixels, side: int) -> Image.Image:
    """An image `[H, W, 3]` whose longer side is at most `side` pixels."""
    image = Image.fromarray(np.asarray(array))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def blank(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """An empty figure with `rows` × `columns` axes, row by row."""
    # 840 × 560 pixels with 9-point type: about 10 CSS pixels on a phone of 360, 15 in half a desktop page.
    figure = Figure(figsize=(4.2, 2.8), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axes in all_axes:
        axes.patch.set_visible(False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(which="both", colors=INK, labelsize=9)
        axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    return figure, all_axes


def legend(figure: Figure, names: Collection[str]) -> None:
    """Name what is drawn, above the axes."""
    columns = min(3, len(names), 50 // (max(map(len, names)) + 4))  # about what fits the width
    figure.legend(
        loc="outside upper left", frameon=False, fontsize=9, labelcolor=INK, handlelength=1.2, ncols=max(1, columns)
    )


def drawn(figure: Figure, few_colours: bool = True) -> str:
    """The figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    image = Image.open(buffer)
    # A palette of 128 colours keeps the antialiasing and a third of the bytes; colours that run it would tear in bands.
    return encode(image.quantize(128, Image.Quantize.FASTOCTREE) if few_colours else image)
