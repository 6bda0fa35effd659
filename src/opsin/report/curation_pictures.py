"""The pictures of a curation's report, as data URIs: small pictures of images, and how large clusters are."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from opsin.report.figures import COLOURS, INK, THUMBNAIL, Pixels, blank, drawn, encode, legend, shrunk


def thumbnail(image: Pixels) -> str:
    """An image `[H, W, 3]` (uint8) as a `data:image/jpeg` URI of some kilobytes."""
    return encode(shrunk(image, THUMBNAIL), "jpeg")


def cluster_sizes(histograms: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """How many clusters have how many images, as a data URI: one outline per histogram.

    Args:
        histograms: name → edges of its bins, images in a cluster, ascending from 1 on, and clusters in each bin.
    """
    figure, (axes,) = blank(1, 1)
    for colour, (name, (edges, counts)) in zip(COLOURS, histograms.items(), strict=False):
        axes.stairs(np.asarray(counts, float), np.asarray(edges, float), color=colour, linewidth=1.6, label=name)
        axes.stairs(np.asarray(counts, float), np.asarray(edges, float), color=colour, fill=True, alpha=0.12)
    axes.set_xscale("log")
    low, high = (bound(edges[i] for edges, _ in histograms.values()) for bound, i in ((min, 0), (max, -1)))
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5) if high < 100 * low else (1,), numticks=7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images in a cluster", color=INK, fontsize=9)
    axes.set_ylabel("clusters", color=INK, fontsize=9)
    if len(histograms) > 1:
        legend(figure, histograms)
    return drawn(figure)
