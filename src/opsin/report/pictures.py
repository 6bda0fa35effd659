"""The pictures of a report, as data URIs: curves of a run's metrics, PCA and norms of patches, nearest neighbours."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from opsin.errors import OpsinError
from opsin.report.figures import COLOURS, INK, THUMBNAIL, Pixels, blank, drawn, encode, legend, png, shrunk

PHOTO = 256
"""Longer side in pixels of a photo beside pictures of its patches."""
NORMS = (1 / 3, 10.0)
"""Patch norms in medians that have the darkest and the brightest colour, in every report; between them the logarithm
counts. Outliers of large models lie at about 10."""

GLOW = colormaps["inferno"]  # of norms: even steps to the eye, also in grey
SHADES = LogNorm(*NORMS, clip=True)
SCHEDULES = {"rate": "Rate", "decay": "Weight decay", "momentum": "Momentum", "teacher_temperature": "Temperature"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's JSONL file, in order; a last line that a killed run left unfinished is dropped.

    Raises:
        OpsinError: the file cannot be read, or a line before the last is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise OpsinError(
            f"cannot read the metrics {path}: {error.strerror}; give the metrics file of a run."
        ) from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise OpsinError(f"line {number} of {path} is not a JSON object: mend or delete that line.") from error
        records.append(record)
    return records


def loss_curves(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Charts of a run's records, each `{"title", "png"}`; those whose keys no record has are left out.

    A thin line is every record, the thick one its centred moving mean. Of records with the same step (a resumed run
    repeats some) the last counts; values that are not finite are left out. Keys: step, loss, loss.dino_local,
    loss.dino_global, loss.ibot, loss.koleo, rate, decay, momentum, teacher_temperature, grad_norm.<part>,
    images_per_second, step_seconds, data_seconds, knn.
    """
    norms = sorted({key for record in metrics for key in record if key.startswith("grad_norm.")})
    charts: list[tuple[str, dict[str, str]]] = [
        ("Loss", {"loss": ""}),
        ("DINO and iBOT losses", {"loss.dino_local": "local", "loss.dino_global": "global", "loss.ibot": "iBOT"}),
        ("Distance to the teacher's features", {"loss.cls": "class tokens", "loss.patch": "patches"}),
        ("Gram anchoring", {"loss.gram": "Gram"}),
        ("KoLeo loss", {"loss.koleo": ""}),
        ("kNN accuracy", {"knn": ""}),
        ("Gradient norm", {key: key.removeprefix("grad_norm.") for key in norms}),
        ("Images per second", {"images_per_second": ""}),
        ("Seconds per step", {"step_seconds": "whole step", "data_seconds": "waiting for data"}),
    ]
    pictures = []
    for title, keys in charts:
        series = {name: found for key, name in keys.items() if len((found := _series(metrics, key))[0])}
        if series:
            pictures.append({"title": title, "png": _chart(title, series)})
    schedules = {name: found for key, name in SCHEDULES.items() if len((found := _series(metrics, key))[0])}
    if schedules:
        pictures.append({"title": "Schedules", "png": _small_multiples(schedules)})
    return pictures


def pca_grid(images: Sequence[Pixels], panels: Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]]) -> dict[str, Any]:
    """A table of pictures for the report's `pca`: every image beside its PCA picture in each panel.

    Args:
        images: `[H, W, 3]` uint8, as the backbone saw them.
        panels: column title → for every image what `PcaPicture.apply` gave: rgb `[h, w, 3]` in 0…1 and foreground
            `[h, w]`.

    Returns:
        `{"columns": [title], "rows": [[data URI]]}`; PCA pictures have one pixel per patch, background black.
    """
    rows = [[encode(shrunk(image, PHOTO))] for image in images]
    for panel in panels.values():
        for row, (rgb, foreground) in zip(rows, panel, strict=True):
            shown = np.asarray(rgb, dtype=np.float64) * np.asarray(foreground, dtype=bool)[..., None]
            row.append(png((shown * 255).round().astype(np.uint8)))
    return {"columns": ["Image", *panels], "rows": rows}


def norm_grid(images: Sequence[Pixels], panels: Mapping[str, Sequence[ArrayLike]]) -> dict[str, Any]:
    """A table of pictures for the report's `norms`: every image beside the norms of its patches in each panel.

    All pictures have one colour scale, `NORMS`, whose legend is the strip of `norm_histogram`.

    Args:
        images: `[H, W, 3]` uint8, as the backbones saw them.
        panels: name of a model → for every image the norms of its patches `[h, w]`, in medians of that model.

    Returns:
        `{"columns": [text], "rows": [[data URI]]}`; norm pictures have one pixel per patch.
    """
    rows = [[encode(shrunk(image, PHOTO))] for image in images]
    for panel in panels.values():
        for row, norms in zip(rows, panel, strict=True):
            row.append(png(GLOW(SHADES(np.asarray(norms, dtype=np.float64)), bytes=True)[..., :3]))
    return {"columns": ["Image", *panels], "rows": rows}


def norm_histogram(panels: Mapping[str, ArrayLike], limit: float) -> str:
    """How many patches have which norm, as a data URI: one line per model, above the colours of `norm_grid`.

    Args:
        panels: name of a model → norms of its patches, of any shape, in medians of that model; what lies beyond a
            hundredth and a hundred medians is counted at the ends.
        limit: where outliers begin, in medians: marked.
    """
    norms = {name: np.asarray(values, dtype=np.float64).clip(0.01, 100).ravel() for name, values in panels.items()}
    low = min(NORMS[0], *(values.min() for values in norms.values()))
    high = max(NORMS[1], *(values.max() for values in norms.values()))
    bins = np.geomspace(low, high, 61)
    figure, (axes,) = blank(1, 1)
    for colour, (name, values) in zip(itertools.cycle(COLOURS), norms.items()):
        axes.stairs(np.histogram(values, bins)[0], bins, color=colour, linewidth=1.6, label=name)
    axes.axvline(limit, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "outliers", (limit, 1), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
        color=INK, fontsize=9,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=0.7)
    axes.set_ylabel("patches", color=INK, fontsize=9)
    axes.tick_params(which="both", labelbottom=False, length=0)
    legend(figure, norms)

    strip = axes.inset_axes((0, -0.11, 1, 0.06))
    edges = np.geomspace(low, high, 257)
    strip.pcolormesh(edges, [0, 1], np.sqrt(edges[:-1] * edges[1:])[None], cmap=GLOW, norm=SHADES, rasterized=True)
    strip.set_xscale("log")
    strip.set_xlim(low, high)
    strip.set_yticks([])
    strip.spines[:].set_visible(False)
    strip.set_xticks([tick for tick in (0.01, 0.1, 1 / 3, 1, 3, 10, 30, 100) if low <= tick <= high])
    strip.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: "1/3" if 0.3 < tick < 0.4 else f"{tick:g}"))
    strip.xaxis.set_minor_locator(NullLocator())
    strip.tick_params(colors=INK, labelsize=9)
    strip.set_xlabel("norm / median", color=INK, fontsize=9)
    return drawn(figure, few_colours=False)


def neighbour_rows(
    queries: Sequence[Pixels],
    query_labels: Sequence[str],
    gallery: Sequence[Pixels] | Mapping[int, Pixels],
    gallery_labels: Sequence[str] | Mapping[int, str],
    nearest: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:
    """Rows for the report's `neighbours`: every query with its nearest gallery images, best first.

    Args:
        queries: images `[H, W, 3]` uint8.
        query_labels: their classes; a neighbour of the same class is marked as a match, and nothing is marked where
            the class is empty, that is unknown.
        gallery: gallery index → image; only the indices in `nearest` are looked up.
        gallery_labels: gallery index → class.
        nearest: for every query its neighbours' gallery indices.
    """
    return [
        {
            "query": {"image": encode(shrunk(query, THUMBNAIL)), "label": label},
            "nearest": [
                {
                    "image": encode(shrunk(gallery[index], THUMBNAIL)),
                    "label": gallery_labels[index],
                    "match": gallery_labels[index] == label if label else None,
                }
                for index in map(int, indices)
            ],
        }
        for query, label, indices in zip(queries, query_labels, nearest, strict=True)
    ]


Series = tuple[NDArray[np.float64], NDArray[np.float64]]


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> Series:
    """Steps and values of `key`, in order of the step."""
    found = {r["step"]: r[key] for r in metrics if "step" in r and isinstance(r.get(key), int | float)}
    points = sorted((step, value) for step, value in found.items() if math.isfinite(value))
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving mean over a twenty-fifth of the records; at the ends over what lies inside."""
    n, half = len(values), len(values) // 50
    total = np.concatenate([[0], np.cumsum(values)])
    begin, end = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    smooth: NDArray[np.float64] = (total[end] - total[begin]) / (end - begin)
    return smooth


def _envelope(steps: NDArray[np.float64], values: NDArray[np.float64], bins: int = 300) -> Series:
    """At most two points per bin, its lowest and highest: a spike in a long run stays visible and the file small."""
    if len(values) <= 2 * bins:
        return steps, values
    keep = sorted(
        {
            index
            for part in np.array_split(np.arange(len(values)), bins)
            for index in (part[values[part].argmin()], part[values[part].argmax()])
        }
    )
    return steps[keep], values[keep]


def _chart(title: str, series: Mapping[str, Series]) -> str:
    figure, (axes,) = blank(1, 1)
    for colour, (name, (steps, values)) in zip(COLOURS, series.items(), strict=False):
        if title == "kNN accuracy":
            axes.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=5, label=name)
            continue
        axes.plot(*_envelope(steps, values), color=colour, linewidth=0.6, alpha=0.45)
        axes.plot(steps, _smooth(values), color=colour, linewidth=2, label=name)
    if title == "Gradient norm":
        axes.set_yscale("log")
    axes.set_xlabel("step", color=INK, fontsize=9)
    if len(series) > 1:
        legend(figure, series)
    return drawn(figure)


def _small_multiples(series: Mapping[str, Series]) -> str:
    figure, panels = blank(2, 2)
    for axes, (name, (steps, values)) in zip(panels, series.items(), strict=False):
        axes.plot(steps, values, color=COLOURS[0], linewidth=1.8)
        axes.set_title(name, color=INK, fontsize=9, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    for axes in panels[len(series) :]:
        axes.remove()
    return drawn(figure)
