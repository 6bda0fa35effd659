"""Instance retrieval: every query ranks a database by cosine similarity, and what it should find should come first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from opsin.data.decode import DecodeError
from opsin.errors import FINITE, OpsinError, within
from opsin.evaluate.datasets.layout import understood
from opsin.evaluate.datasets.retrieval import SETS, MetSet, RetrievalSet, groups
from opsin.evaluate.met import recognise
from opsin.evaluate.model import Model
from opsin.evaluate.ranking import average_precision_at, orders, precision_at, ranks_of, recall_at
from opsin.evaluate.sets import ImageSet, named
from opsin.evaluate.strips import strip
from opsin.evaluate.task import Picture, Result, Run, Table
from opsin.evaluate.transforms import Transform
from opsin.evaluate.vectors import Feature, Resize, learn_whitening, transform_of, vectors

RECALLS = {"recall_at_1": 1, "recall_at_5": 5, "recall_at_10": 10}
"""Places for which recall is told, by metric."""
PICTURES, NEIGHBOURS = 6, 6
"""Queries that are shown, and the neighbours of each."""


@dataclass(frozen=True)
class Retrieval:
    """What is searched, and by which vectors."""

    data: str = ""
    """A folder with a sub-folder per group of images that are to find each other, shards with labels, or a published
    set: roxford:PATH, rparis:PATH, met:PATH, met-mini:PATH or amstertime:PATH."""
    queries: str | None = None
    """Queries of one's own, in folders named as the groups of the data; without, every image is a query against all
    others."""
    size: int | None = None
    """Pixels, see `resize`; by default 224, and 508 for Met."""
    resize: Resize | None = None
    """whole (shorter side to the size, nothing cropped), centre (crop), padded (longer side to it, in a black square)
    or longer (longer side to it, nothing cropped); by default that of the published set, and whole for one's own."""
    feature: Feature = "cls"
    """The class token, as in the paper, the mean patch token, or both."""
    whitening: Literal["none", "pca"] | None = None
    """PCA whitening learned on the database; by default pca for Met and none for everything else."""
    dimensions: int = 512
    """Largest number of dimensions that whitening keeps, as in the code of Met."""

    def __post_init__(self) -> None:
        within(self, "--", dimensions=(1, FINITE))
        if self.size is not None:
            within(self, "--", size=(1, 16384))


def retrieval(model: Model, settings: Retrieval, run: Run) -> Result:
    """Instance retrieval: mean average precision of cosine similarity, on landmark sets or folders of groups.

    On Revisited Oxford and Paris `map_medium`, `map_hard` and `map_easy`, by their rule; on AmsterTime `map` of both
    directions; on Met `gap`, `gap_minus` and `accuracy` (see `opsin.evaluate.met`); on one's own `map` and
    `recall_at_1`, `_5` and `_10`. Queries without anything to find do not count.

    Raises:
        OpsinError: files are missing, groups are empty or do not line up, or nothing is left to measure.
    """
    name, path = named(settings.data, SETS)
    if name is not None and settings.queries is not None:
        raise OpsinError(f"{name} brings its own queries: leave out --queries.")
    published = None if name is None else SETS[name]
    channels = model.arch.channels
    if published:
        with understood(Path(path), published.source):
            found = published.read(Path(path))
    else:
        found = groups(settings.data, settings.queries, channels)
    resize = settings.resize or (published.resize if published else "whole")
    transform = transform_of(resize, settings.size or (published.size if published else 224), model.arch)
    whiten = published is not None and published.whiten if settings.whitening is None else settings.whitening == "pca"
    dimensions = settings.dimensions if whiten else None
    if isinstance(found, MetSet):
        return recognise(model, found, name or "", transform, settings.feature, dimensions, run)
    return _ranked(model, found, name, transform, settings.feature, dimensions, run)


def _ranked(
    model: Model,
    data: RetrievalSet,
    name: str | None,
    transform: Transform,
    feature: Feature,
    dimensions: int | None,
    run: Run,
) -> Result:
    asked = data.queries or data.database
    database, bad = vectors(model, data.database, transform, feature, run)
    queries, bad_queries = vectors(model, asked, transform, feature, run) if data.queries else (database, bad)
    readable = torch.ones(len(database), dtype=torch.bool)
    readable[list(bad)] = False
    if dimensions is not None:
        whitening = learn_whitening(database[readable], dimensions)
        database, queries = whitening(database), whitening(queries)

    precisions: dict[str, list[float]] = {metric: [] for metric in data.judges}
    nothing = dict.fromkeys(data.judges, 0)
    at: dict[str, list[float]] = {figure: [] for figure in (*RECALLS, "precision_at_10", "map_at_10")}
    first = next(iter(data.judges))
    shown = _Shown(data.database, asked)
    lost = np.array(sorted(bad), dtype=np.int64)
    for query, order in orders(queries, database, model.device):
        if query in bad_queries:
            continue
        for metric, judge in data.judges.items():
            judged = judge(query)
            if judged is None:
                continue
            right = judged.right[readable.numpy()[judged.right]]
            if not len(right):
                nothing[metric] += 1
                continue
            junk = np.union1d(judged.junk, lost)
            ranks = ranks_of(order, right, junk)
            precisions[metric].append(data.rule(ranks, len(right)))
            if metric == first:
                for recall, k in RECALLS.items():
                    at[recall].append(recall_at(ranks, k))
                at["precision_at_10"].append(precision_at(ranks, 10))
                at["map_at_10"].append(average_precision_at(ranks, len(right), 10))
                shown.offer(query, order, right, junk)
    if not precisions[first]:
        raise OpsinError(
            f"no query of {asked.where} has anything to find that can be read: give two readable images of a group."
        )
    metrics = {metric: float(np.mean(values)) for metric, values in precisions.items() if values}
    extra = {metric: float(np.mean(values)) for metric, values in at.items()}
    if name is None:
        metrics |= {recall: extra[recall] for recall in RECALLS}
    left_out = [(data.database.name(i), reason) for i, reason in sorted(bad.items())]
    if data.queries:
        left_out += [(asked.name(i), reason) for i, reason in sorted(bad_queries.items())]
    details: dict[str, Any] = extra | {
        "database": int(readable.sum()),
        "queries": {metric: len(values) for metric, values in precisions.items()},
        "queries_without_anything_to_find": nothing,
        "transform": transform.name,
        "feature": feature,
        "whitened_to": None if dimensions is None else int(database.shape[1]),
    }
    note = f"{len(precisions[first]):,} queries, {int(readable.sum()):,} images searched"
    if nothing[first]:
        note += f"; {nothing[first]:,} queries have nothing to find and do not count"
    return Result(
        data=name or data.database.where,
        metrics=metrics,
        table=Table(("metric", "value"), [(metric, f"{v:.3f}") for metric, v in (metrics | extra).items()], note),
        details=details,
        left_out=left_out,
        outcomes=np.array(precisions[first]),
        pictures=shown.pictures(),
    )


class _Shown:
    """Remembers what some queries, evenly spread, found."""

    def __init__(self, database: ImageSet, queries: ImageSet) -> None:
        self._database, self._queries = database, queries
        self._step = max(1, len(queries) // PICTURES)
        self._rows: list[tuple[int, list[tuple[int, bool]]]] = []

    def offer(self, query: int, order: NDArray[np.int64], right: NDArray[np.int64], junk: NDArray[np.int64]) -> None:
        """Keep a query if there is none yet from its stretch of the set."""
        if len(self._rows) == PICTURES or (self._rows and query < self._rows[-1][0] + self._step):
            return
        head = order[: NEIGHBOURS + len(junk)]
        best = head[~np.isin(head, junk)][:NEIGHBOURS]
        self._rows.append((query, [(int(i), bool(np.isin(i, right))) for i in best]))

    def pictures(self) -> list[Picture]:
        """A strip of each; images that cannot be decoded any more are left out."""
        made = []
        for query, neighbours in self._rows:
            try:
                pixels = self._queries.read(query)
                found = [(self._database.read(index), right) for index, right in neighbours]
            except DecodeError:
                continue
            title = f"{self._queries.name(query)}: {sum(right for _, right in found)} of the first {len(found)} right"
            made.append(Picture(title, strip(pixels, found)))
        return made
