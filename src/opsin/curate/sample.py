"""Balanced sampling from a tree of clusters: so many images, spread as evenly as the clusters' sizes allow.

From the top down, a cluster's share is divided among the clusters in it: each gives the same number, or all that it has
(Vo et al., "Automatic data curation for self-supervised learning", 2405.15613).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors.numpy import load_file

from opsin.curate.engine import Engine, Task
from opsin.curate.groups import Rows, imbalance, passes, size_histogram, smallest
from opsin.curate.kmeans import save_arrays
from opsin.curate.tables import Part, Step, Table, read, tasks_of, write_part
from opsin.data.decode import shown
from opsin.data.rng import Stream, uniform
from opsin.errors import FINITE, OpsinError, within

Integers = NDArray[np.int64]

LEVELS: Final = "levels.safetensors"
"""In the folder of clusters: for level t = 1 … L, from the finest, `centroids.t` `[k, D]`, `sizes.t` `[k]` (images)
and, but for the last, `parents.t` `[k]` (numbers of clusters of level t + 1)."""

_ROWS: Final = 2**22
"""Rows whose choice a task writes."""


@dataclass(frozen=True)
class Sample:
    """What to sample."""

    images: int | None = None
    """How many images to choose; all, if there are fewer. In the recipe of a curation, None is for no sample."""
    within: Literal["random", "closest"] = "random"
    """How images of a cluster of the finest level are chosen: at random, or those closest to its centroid."""
    seed: int = 0
    """Of what is random."""

    def __post_init__(self) -> None:
        within(self, "sample.", seed=(0, 2**63 - 1), **({} if self.images is None else {"images": (1, FINITE)}))
        if self.within not in ("random", "closest"):
            raise OpsinError(f"sample.within is '{self.within}': give random or closest.")


def sample(engine: Engine, clusters: Table, out: Path, settings: Sample) -> dict[str, Any]:
    """Write which images are chosen: column `chosen`, one row per image.

    Args:
        engine: runs it.
        clusters: the folder that `opsin.curate.cluster.cluster` wrote.
        out: folder to write.
        settings: see `Sample`.

    Returns:
        `chosen`, `wanted` and `clustered` images; `levels`, from the finest: `before` and `after` (see
        `opsin.curate.groups.size_histogram`) and `imbalance_before` and `imbalance_after` (in nats, see `imbalance`).

    Raises:
        OpsinError: the clusters are not such a folder, or `out` is of another sample.
    """
    clusters.require("cluster", "distance")
    step = Step(out, "sample", asdict(settings), {"clusters": clusters})
    if step.done:
        return step.facts
    sizes, parents = _tree(clusters)
    if settings.images is None:
        raise OpsinError("opsin curate sample needs --images: how many to choose.")
    counts = shares(settings.images, sizes, parents, settings.seed)
    rows = [part.rows for part in clusters.parts]
    missing = step.missing(len(rows))
    if missing:
        ranges = passes(counts, engine.bytes // 2)
        wanted = step.scratch / "counts.npz"
        save_arrays(wanted, counts=counts)
        choose = _Choose(tuple(clusters.parts), wanted, settings)
        tasks: list[Task] = [{"first": some.start, "stop": some.stop} for some in ranges]
        names = [
            result["file"] for _, result in sorted(engine.run("choose", choose, tasks, total=sum(rows) * len(tasks)))
        ]
        write = _Write(tuple(clusters.parts), tuple(names), tuple(str(step.part(i)) for i in range(len(rows))))
        tasks = [{"parts": parts} for parts in tasks_of(missing, rows, _ROWS)]
        for _ in engine.run("write the sample", write, tasks, total=sum(rows[i] for i in missing)):
            pass
    after = [counts]
    for level, parent in enumerate(parents):
        after.append(_gathered(after[level], parent, len(sizes[level + 1])))
    return step.finish(
        {
            "chosen": int(counts.sum()),
            "wanted": settings.images,
            "clustered": int(sizes[0].sum()),
            "levels": [
                {
                    "before": size_histogram(old),
                    "after": size_histogram(new),
                    "imbalance_before": imbalance(old),
                    "imbalance_after": imbalance(new),
                }
                for old, new in zip(sizes, after, strict=True)
            ],
        }
    )


def shares(images: int, sizes: list[Integers], parents: list[Integers], seed: int) -> Integers:
    """How many images to choose in each cluster of the finest level.

    Args:
        images: to choose in all; at most as many as there are.
        sizes: images of the clusters of each level, `[k]`, from the finest.
        parents: for each level but the last, the cluster of the next level that each of its clusters is in.
        seed: of the order in which clusters get what is left after an equal share.
    """
    share = np.array([min(images, int(sizes[-1].sum()))], dtype=np.int64)
    for level in range(len(sizes) - 1, -1, -1):
        top = level == len(sizes) - 1
        parent = np.zeros(len(sizes[level]), dtype=np.int64) if top else parents[level]
        # Draw 0 at a position is an image's; a level's clusters have one of their own.
        order = uniform(seed, Stream.CURATION, np.arange(len(sizes[level])), 1, offset=level + 1)[:, 0]
        share = balanced(share, sizes[level], parent, order)
    return share


def balanced(share: Integers, sizes: Integers, parent: Integers, order: NDArray[np.float64]) -> Integers:
    """Divide the shares of groups among their children: each child gets the same number, or all that it has.

    What is left, less than one for each child that has more, goes to such children one by one.

    Args:
        share: of each group, `[G]`: at most the sum of its children's sizes.
        sizes: of the children, `[n]`.
        parent: group of each child, `[n]`.
        order: children with lower numbers get what is left first, `[n]`.

    Returns:
        Share of each child, `[n]`; those of a group add up to its share.
    """
    low = np.zeros(len(share), dtype=np.int64)  # a cut that fits
    high = np.full(len(share), int(sizes.max(initial=0)) + 1)  # one that does not, or that cuts nothing
    while (high - low > 1).any():
        cut = (low + high) // 2
        fits = _gathered(np.minimum(cut[parent], sizes), parent, len(share)) <= share
        low, high = np.where(fits, cut, low), np.where(fits, high, cut)
    given = np.minimum(low[parent], sizes)
    left = share - _gathered(given, parent, len(share))
    more = np.flatnonzero(sizes > given)
    more = more[np.lexsort((order[more], parent[more]))]
    rank = np.arange(len(more)) - np.searchsorted(parent[more], parent[more])
    given[more[rank < left[parent[more]]]] += 1
    return given


def _gathered(values: Integers, parent: Integers, groups: int) -> Integers:
    """Sums of values by group, exact up to 2⁵³."""
    return np.bincount(parent, weights=values, minlength=groups).astype(np.int64)


def _tree(clusters: Table) -> tuple[list[Integers], list[Integers]]:
    """Sizes of every level from the finest, and parents of every level but the last."""
    path = clusters.path / LEVELS
    if not path.exists():
        raise OpsinError(f"there is no {shown(path)}: give the folder that `opsin curate cluster` wrote.")
    found = load_file(path)
    levels = sum(name.startswith("sizes.") for name in found)
    sizes = [found[f"sizes.{level}"] for level in range(1, levels + 1)]
    return sizes, [found[f"parents.{level}"] for level in range(1, levels)]


@dataclass(frozen=True)
class _Choose:
    """Task: choose the images of the clusters `first` … `stop` - 1; writes their numbers."""

    parts: tuple[Part, ...]
    counts: Path
    settings: Sample

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        groups = range(task["first"], task["stop"])
        file = self.counts.with_name(f"chosen-{groups.start}-{groups.stop}.npz")
        if not file.exists():
            with np.load(self.counts) as kept:
                counts = kept["counts"]
            save_arrays(file, numbers=smallest(self._rows, counts, engine.bytes // 2, groups))
        return {"file": str(file), "done": sum(part.rows for part in self.parts)}

    def _rows(self) -> Iterator[Rows]:
        closest = self.settings.within == "closest"
        for part in self.parts:
            table = read(part, ["cluster", "distance"] if closest else ["cluster"])
            cluster = table["cluster"].fill_null(-1).to_numpy()
            number = np.arange(part.first, part.first + part.rows)
            if closest:
                key = table["distance"].fill_null(0).to_numpy()
            else:
                key = uniform(self.settings.seed, Stream.CURATION, number, 1)[:, 0]
            yield cluster, key, number


@dataclass(frozen=True)
class _Write:
    """Task: write `chosen` of some parts, from files of chosen numbers."""

    parts: tuple[Part, ...]
    chosen: tuple[str, ...]
    files: tuple[str, ...]

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:  # noqa: ARG002 (it takes little memory)
        done = 0
        chosen = []
        for file in self.chosen:
            with np.load(file) as kept:
                chosen.append(kept["numbers"])
        for i in task["parts"]:
            part = self.parts[i]
            here = np.zeros(part.rows, dtype=bool)
            for numbers in chosen:
                among = slice(*np.searchsorted(numbers, [part.first, part.first + part.rows]))
                here[numbers[among] - part.first] = True
            write_part(Path(self.files[i]), pa.table({"chosen": pa.array(here)}))
            done += part.rows
        return {"done": done}
