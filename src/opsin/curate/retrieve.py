"""Retrieve the images of the heap that are like those of given sets.

As in the paper (Appendix A.4 and Table 15), every set has a mode. The nearest images of each of a large set's images:
`sample`. Images of the clusters that a small set's images lie in, since few of them would be too near to say what they
stand for: `cluster`. Or nothing, as the set itself goes into the training set: `as-is`. A set can be given twice, to
be used as it is and to retrieve others.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from opsin.curate.cells import EXACT_BELOW, PROBES, Cells, VectorSet, build_cells, cells_for
from opsin.curate.engine import Engine, Task, in_order
from opsin.curate.groups import Rows, passes, smallest
from opsin.curate.kmeans import assign, save_arrays
from opsin.curate.neighbours import Search, edges, found_files, search
from opsin.curate.sample import LEVELS
from opsin.curate.tables import STEP, Step, Table, read, read_step, tasks_of, write_part
from opsin.curate.vectors import Column, read_vectors, width
from opsin.data.decode import shown
from opsin.data.rng import Stream, uniform
from opsin.errors import FINITE, SEEDS, OpsinError, unknown, within
from opsin.output import make_folder, write

Mode = Literal["as-is", "sample", "cluster"]
Numbers = NDArray[np.int64]

_ROWS: Final = 2**22
"""Rows that are counted at a time, or that a task writes."""


@dataclass(frozen=True)
class Retrieve:
    """How images are retrieved."""

    neighbours: int = 4
    """Images of the heap for every image of a set of mode `sample`, unless the set says otherwise."""
    cell_images: int = 10_000
    """Images drawn from every cluster that a set of mode `cluster` hits; all, of a smaller cluster."""
    hits: int = 3
    """A cluster is hit if more than so many images of the set lie in it."""
    cap: int = 1_000_000
    """Images for a set of mode `cluster`, at most: so many of those drawn, at random."""
    exact_below: int = EXACT_BELOW
    """Images of the heap up to which the search for the nearest compares with all."""
    cells: int | None = None
    """Cells of a search that does not; None for √n."""
    probes: int = PROBES
    """Cells that are searched for the vectors of a cell."""
    column: str = "semantic"
    """Of the vectors."""
    seed: int = 0
    """Of what is random."""

    def __post_init__(self) -> None:
        least = {"cell_images": 1, "cap": 1, "probes": 1, "hits": 0, "exact_below": 0}
        if self.cells is not None:
            least["cells"] = 1
        ranges = {name: (low, FINITE) for name, low in least.items()}
        within(self, "retrieve.", neighbours=(1, 4096), seed=SEEDS, **ranges)


@dataclass(frozen=True)
class Query:
    """A set of images by which images are retrieved."""

    name: str
    """As the tables and the manifest show it."""
    vectors: Table
    """Its images, embedded like the heap."""
    mode: Mode
    """See the module."""
    nearest: int | None = None
    """Instead of that of `Retrieve`: the paper took 4 for ImageNet-22k and 32 for ImageNet-1k."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise unknown(f"mode of the set {self.name}", self.mode, get_args(Mode))
        if self.nearest is not None:
            within(self, f"{self.name}: ", nearest=(1, 4096))


def retrieve(
    engine: Engine,
    vectors: Table,
    queries: Sequence[Query],
    out: Path,
    settings: Retrieve,
    *,
    clusters: Table | None = None,
    kept: Table | None = None,
) -> dict[str, Any]:
    """Write by which sets every image is retrieved: column `sets`, a list of their names, one row per image.

    Args:
        engine: where it runs.
        vectors: of the heap.
        queries: the sets.
        out: folder to write; what is there of the same retrieval is not done again.
        settings: see `Retrieve`.
        clusters: the folder of `opsin.curate.cluster`, for sets of mode `cluster`.
        kept: a table of the same images whose column `kept` says which can be retrieved; None: all with a vector.

    Returns:
        `composition`, for each set: `set`, `mode`, `queries` (images with a vector), `retrieved` (images found, as
        often as they were found and before the cap; None for `as-is`), `collisions` (those found before by the same
        set) and `chosen` (different images that the set brings; its own for `as-is`). `images` of the heap that any set
        retrieves, `shared`: how many more they are counted set by set, and `seconds`.

    Raises:
        OpsinError: a set is empty or named twice, its vectors cannot be compared with those of the heap, there are no
            clusters where a set needs them, tables are not of the same images, or `out` is of another retrieval.
    """
    dimensions = _checked(vectors, queries, settings.column)
    inputs = {"vectors": vectors, **{f"{query.mode} {query.name}": query.vectors for query in queries}}
    if kept is not None:
        kept.require("kept")
        vectors.aligned(kept)
        inputs["kept"] = kept
    by_cluster = [query.name for query in queries if query.mode == "cluster"]
    if by_cluster:
        inputs["clusters"] = clusters = _clusters(clusters, by_cluster[0], vectors, dimensions)
    sets = [[query.name, query.mode, query.nearest or settings.neighbours] for query in queries]
    step = Step(out, "retrieve", {**asdict(settings), "sets": sets}, inputs)
    if step.done:
        return step.facts
    began = monotonic()
    finder = _Finder(engine, vectors, clusters, kept, settings, dimensions, step.scratch)
    composition = [finder.composed(i, query) for i, query in enumerate(queries)]
    marks = {query.name: finder.marks(i) for i, query in enumerate(queries) if query.mode != "as-is"}
    missing, rows = step.missing(len(vectors.parts)), [part.rows for part in vectors.parts]
    work = _Write(vectors, marks, step.folder)
    tasks = [{"parts": parts} for parts in tasks_of(missing, rows, _ROWS)]
    for _ in engine.run("writing what is retrieved", work, tasks, total=sum(rows[i] for i in missing)):
        pass
    images = _marked(list(marks.values()), vectors.rows)
    chosen = sum(row["chosen"] for row in composition if row["mode"] != "as-is")
    facts = {"composition": composition, "images": images, "shared": chosen - images}
    return step.finish(facts | {"seconds": round(monotonic() - began, 1)})


def _checked(vectors: Table, queries: Sequence[Query], column: str) -> int:
    """D of the heap's vectors, once all sets can be compared with them."""
    if not queries:
        raise OpsinError("no sets are given to retrieve by: name one or more.")
    names = [(query.name, query.mode == "as-is") for query in queries]
    for name in names:
        if names.count(name) > 1:
            raise OpsinError(f"two sets are named '{name[0]}': name each differently.")
    dimensions, network = width(vectors, column), _network(vectors, column)
    for query in queries:
        query.vectors.require(column)
        if not any(len(read(part, [column])[column].drop_null()) for part in query.vectors.parts):
            raise OpsinError(
                f"the set '{query.name}' is empty, {shown(query.vectors.path)} holds no vectors in '{column}': give "
                "images that can be read, or leave the set out."
            )
        own = width(query.vectors, column)
        if own != dimensions:
            raise OpsinError(
                f"the set '{query.name}' has vectors of {own} numbers and the heap of {dimensions}: embed both with "
                "one network."
            )
        if None not in (network, told := _network(query.vectors, column)) and told != network:
            raise OpsinError(
                f"the set '{query.name}' was embedded with another network than the heap, or at another size: embed "
                "both alike."
            )
    return dimensions


def _network(vectors: Table, column: str) -> tuple[Any, ...] | None:
    """The network, by its content, and the size of the images that a table was embedded with, if it says so."""
    made = read_step(vectors.path) if (vectors.path / STEP).exists() else {}
    if made.get("step") != "embed" or column not in ("semantic", "copies"):
        return None
    copies, settings = column == "copies", made["settings"]
    return settings["fingerprints"][int(copies)], settings["copies_size" if copies else "size"]


def _clusters(clusters: Table | None, name: str, vectors: Table, dimensions: int) -> Table:
    """The clusters, once they are known to be of these images and to have centroids."""
    if clusters is None:
        raise OpsinError(
            f"the set '{name}' is to be retrieved by clusters, and there are none: give the folder that `opsin curate "
            "cluster` writes, or the set the mode sample."
        )
    clusters.require("cluster")
    vectors.aligned(clusters)
    try:
        with safe_open(clusters.path / LEVELS, "pt") as levels:
            own = levels.get_slice("centroids.1").get_shape()[1]
    except (OSError, SafetensorError) as error:
        raise OpsinError(
            f"{shown(clusters.path / LEVELS)} is missing or damaged ({error}): give the folder that `opsin curate "
            "cluster` wrote, or remove it and cluster again."
        ) from None
    if own != dimensions:
        raise OpsinError(
            f"the clusters in {shown(clusters.path)} are of vectors of {own} numbers, the heap's have {dimensions}: "
            "cluster the column that is retrieved by."
        )
    return clusters


@dataclass(frozen=True)
class _Finder:
    """Finds the images of one set after the other, and keeps what is found in files."""

    engine: Engine
    vectors: Table
    clusters: Table | None
    kept: Table | None
    settings: Retrieve
    dimensions: int
    scratch: Path

    def marks(self, number: int) -> Path:
        """The file of which images of the heap a set chose: booleans, one per image."""
        return self.scratch / f"set-{number:04d}.npy"

    def composed(self, number: int, query: Query) -> dict[str, Any]:
        """A set's row of the composition, whose marks are written."""
        file = self.marks(number).with_suffix(".json")
        if not file.exists():
            folder = make_folder(self.scratch / f"set-{number:04d}")
            find = {"as-is": self._as_it_is, "sample": self._nearest, "cluster": self._in_clusters}[query.mode]
            write(file, json.dumps({"set": query.name, "mode": query.mode, **find(query, folder, self.marks(number))}))
        row: dict[str, Any] = json.loads(file.read_text())
        return row

    def _as_it_is(self, query: Query, folder: Path, marks: Path) -> dict[str, Any]:  # noqa: ARG002 (nothing is found)
        own, _ = self._hits(query, folder, None)
        return {"queries": own, "retrieved": None, "collisions": 0, "chosen": own}

    def _nearest(self, query: Query, folder: Path, marks: Path) -> dict[str, Any]:
        settings, pool = self.settings, self._pool()
        cells = build_cells(
            self.engine, [VectorSet(query.vectors, Column(settings.column))], folder, cells=0, like=pool
        )
        probes = 0 if pool.centroids is None else settings.probes
        what = Search(query.nearest or settings.neighbours, -1.0, probes)
        files = found_files(search(self.engine, cells, pool, folder / "found", what))
        retrieved, chosen = _mark(marks, self.vectors.rows, (edges(file, -np.inf)[1] for file in files))
        return _row(cells.count, retrieved, retrieved - chosen, chosen)

    def _pool(self) -> Cells:
        """The images that can be retrieved, sorted by cell; made for the first set."""
        settings, rows = self.settings, self.vectors.rows
        cells = cells_for(rows, settings.exact_below, settings.cells)
        heap = VectorSet(self.vectors, Column(settings.column), self.kept)
        return build_cells(self.engine, [heap], self.scratch / "pool", cells=cells, seed=settings.seed)

    def _in_clusters(self, query: Query, folder: Path, marks: Path) -> dict[str, Any]:
        assert self.clusters is not None  # see _clusters
        settings = self.settings
        queries, hits = self._hits(query, folder, self.clusters.path / LEVELS)
        counts = np.where(hits > settings.hits, settings.cell_images, 0)
        name = hashlib.sha256(f"{settings.seed} {query.name}".encode()).digest()  # sets draw apart from one another
        draw = _Draw(self.clusters, self.kept, counts, int.from_bytes(name[:8], "big"), folder)
        tasks = [{"first": some.start, "stop": some.stop} for some in passes(counts, self.engine.bytes // 2)]
        files: list[str] = []
        total = self.vectors.rows * len(tasks)
        results = self.engine.run(f"drawing images for {query.name}", draw, tasks, total=total)
        in_order(results, lambda result: files.append(result["file"]))
        drawn = sum(len(np.load(file)["numbers"]) for file in files)
        one_group = np.array([min(settings.cap, drawn)])
        _, chosen = _mark(marks, self.vectors.rows, [smallest(lambda: draw.drawn(files), one_group, self.engine.bytes)])
        return _row(queries, drawn, 0, chosen)

    def _hits(self, query: Query, folder: Path, levels: Path | None) -> tuple[int, Numbers]:
        """How many images a set has, and of these in every cluster, `[k]`."""
        rows = [part.rows for part in query.vectors.parts]
        most = self.engine.bytes // (16 * self.dimensions)
        tasks = [{"parts": parts} for parts in tasks_of(range(len(rows)), rows, most)]
        queries, hits = 0, np.zeros(0, np.int64)

        def add(result: dict[str, Any]) -> None:
            nonlocal queries, hits
            queries += result["queries"]
            if levels is not None:
                held = np.load(result["file"])
                hits = held if not len(hits) else hits + held

        work = _Hits(query.vectors, self.settings.column, self.dimensions, levels, folder)
        in_order(self.engine.run(f"reading {query.name}", work, tasks, total=sum(rows)), add)
        return queries, hits


def _row(queries: int, retrieved: int, collisions: int, chosen: int) -> dict[str, Any]:
    return {"queries": queries, "retrieved": retrieved, "collisions": collisions, "chosen": chosen}


def _mark(file: Path, rows: int, found: Iterable[Numbers]) -> tuple[int, int]:
    """Write which of `rows` images were found; returns how often one was, and how many different ones were."""
    partial = file.with_suffix(".partial")
    marks = np.lib.format.open_memmap(partial, mode="w+", dtype=np.bool_, shape=(rows,))
    total = 0
    for numbers in found:
        marks[numbers] = True
        total += len(numbers)
    marks.flush()
    partial.replace(file)
    return total, _marked([file], rows)


def _marked(files: Sequence[Path], rows: int) -> int:
    """How many images are marked in any of the files."""
    marks = [np.load(file, mmap_mode="r") for file in files]
    starts = range(0, rows, _ROWS) if marks else ()
    return sum(int(np.logical_or.reduce([some[at : at + _ROWS] for some in marks]).sum()) for at in starts)


@dataclass(frozen=True)
class _Hits:
    """Task: count the vectors of some parts, and with `levels` those nearest to each centroid of the finest level."""

    vectors: Table
    column: str
    dimensions: int
    levels: Path | None
    folder: Path

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        parts = [self.vectors.parts[i] for i in task["parts"]]
        found = torch.cat([read_vectors(part, Column(self.column), self.dimensions)[0] for part in parts])
        file = self.folder / f"hits-{task['parts'][0]:08d}.npy"
        if self.levels is not None:
            with safe_open(self.levels, "pt", device=engine.device) as levels:
                centroids = levels.get_tensor("centroids.1").float()
            nearest = assign(found.to(engine.device), centroids, engine.bytes // 4)[0].cpu().numpy()
            np.save(file, np.bincount(nearest, minlength=len(centroids)))
        return {"queries": len(found), "file": str(file), "done": sum(part.rows for part in parts)}


@dataclass(frozen=True)
class _Draw:
    """Task: draw images of the clusters `first` … `stop` - 1 and write their numbers."""

    clusters: Table
    kept: Table | None
    counts: Numbers
    seed: int
    folder: Path

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        groups = range(task["first"], task["stop"])
        file = self.folder / f"drawn-{groups.start}-{groups.stop}.npz"
        if not file.exists():
            save_arrays(file, numbers=smallest(self._members, self.counts, engine.bytes // 2, groups))
        return {"file": str(file), "done": self.clusters.rows}

    def drawn(self, files: Sequence[str]) -> Iterator[Rows]:
        """What the tasks drew, in one group, with keys of its own: the others are smaller in large clusters."""
        for file in files:
            with np.load(file) as held:
                numbers = held["numbers"]
            yield np.zeros(len(numbers), np.int64), self._keys(numbers, 1), numbers

    def _members(self) -> Iterator[Rows]:
        for i, part in enumerate(self.clusters.parts):
            cluster = read(part, ["cluster"])["cluster"].fill_null(-1).to_numpy()
            wanted = (cluster >= 0) & (self.counts[cluster] > 0)
            if self.kept is not None:
                wanted &= read(self.kept.parts[i], ["kept"])["kept"].to_numpy()
            rows = np.flatnonzero(wanted)
            yield cluster[rows], self._keys(part.first + rows, 0), part.first + rows

    def _keys(self, numbers: Numbers, draw: int) -> NDArray[np.float64]:
        return uniform(self.seed, Stream.CURATION, numbers, 1, offset=draw)[:, 0]


@dataclass(frozen=True)
class _Write:
    """Task: write some parts of the table."""

    vectors: Table
    marks: dict[str, Path]
    folder: Path

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:  # noqa: ARG002 (it takes little memory)
        names = pa.array(list(self.marks), pa.string())
        marks = [np.load(file, mmap_mode="r") for file in self.marks.values()]
        for i in task["parts"]:
            part = self.vectors.parts[i]
            here = [some[part.first : part.first + part.rows] for some in marks]
            held = np.stack(here, axis=1) if here else np.zeros((part.rows, 0), np.bool_)
            ends = np.concatenate([[0], np.cumsum(held.sum(axis=1))]).astype(np.int32)
            sets = pa.ListArray.from_arrays(pa.array(ends), names.take(pa.array(held.nonzero()[1])))
            write_part(self.folder / f"part-{i:08d}.parquet", pa.table({"sets": sets}))
        return {"done": sum(self.vectors.parts[i].rows for i in task["parts"])}
