"""Nearest neighbours by cosine, cell by cell.

The vectors of a cell are compared with those of the cells whose centroids are nearest to its own, as one product of
matrices per pair of blocks: an inverted file turned around, so that a processor's or GPU's matrix units do the work and
every vector is read for many queries at once. With all cells probed the search is exact; below a stated size it always
is. Only what may be among the k nearest and above a floor is looked at again after the product.

Nothing is quantised: cells are read from disk when they are needed, so compressed vectors would save reading, not
memory.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.curate.cells import Cells, open_cells
from opsin.curate.engine import Engine, Task
from opsin.curate.tables import write_part
from opsin.output import make_folder, write

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Search:
    """What is looked for."""

    k: int
    """Neighbours per vector, at most."""
    floor: float
    """Cosine above which they count; -1 for any."""
    probes: int
    """Cells that are looked into; 0 for all, which is exact."""


def search(engine: Engine, queries: Cells, base: Cells, out: Path, what: Search) -> Path:
    """Write the neighbours of `queries` among `base` to Parquet files in `out`; those there are not computed again.

    Columns: `number` (of the query), `neighbours` (numbers, the nearest first, equally near ones by number) and
    `similarities`. Queries without a neighbour above the floor have no row. If both are the same cells, a vector is no
    neighbour of itself.

    Args:
        engine: where it runs.
        queries: vectors for which neighbours are wanted, sorted by the same centroids as `base`.
        base: vectors among which they are looked for.
        out: folder of the files.
        what: how many, how near, how thoroughly.
    """
    make_folder(out)
    if (out / "done.json").exists():
        return out
    rows = max(1, min(65536, -(-queries.count // 16)))  # of a task: some for every worker, and small to lose
    cells = _cells_of_tasks(queries.offsets, rows)
    tasks: list[Task] = [
        {"first": first, "last": last, "out": i, "rows": int(queries.offsets[last] - queries.offsets[first])}
        for i, (first, last) in enumerate(cells)
        if not (out / f"found-{i:06d}.parquet").exists()
    ]
    work = _SearchCells(queries.folder, base.folder, out, what)
    for _ in engine.run("searching neighbours", work, tasks, total=queries.count, unit="vectors"):
        pass
    write(out / "done.json", json.dumps({"k": what.k, "floor": what.floor, "probes": what.probes}))
    return out


def found_files(out: Path) -> list[Path]:
    """The files of a finished search, in the order of its tasks."""
    return sorted(out.glob("found-*.parquet"))


def edges(file: Path, above: float) -> tuple[Numbers, Numbers, NDArray[np.float32]]:
    """Pairs (number, neighbour, similarity) of a file of `search` whose similarity is above a threshold."""
    table = pq.read_table(file)
    similar = _flat(table, "similarities")
    lengths = np.diff(table["neighbours"].combine_chunks().offsets.to_numpy()) if table.num_rows else np.empty(0, int)
    numbers = np.repeat(table["number"].to_numpy(), lengths)
    kept = similar > above
    return numbers[kept], _flat(table, "neighbours")[kept], similar[kept]


def rows_between(files: Sequence[Path], first: int, stop: int) -> pa.Table:
    """The columns `neighbours` and `similarities` of the numbers `first` … `stop` - 1, with empty lists for many."""
    found = []
    for file in files:
        table = pq.read_table(file)
        numbers = table["number"].to_numpy()
        found.append(table.take(np.flatnonzero((numbers >= first) & (numbers < stop))))
    table = pa.concat_tables(found).combine_chunks()
    numbers = table["number"].to_numpy()
    order = np.argsort(numbers)
    lengths = np.zeros(stop - first, np.int64)
    lengths[numbers[order] - first] = pc.list_value_length(table["neighbours"]).to_numpy()[order]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
    table = table.take(order)
    return pa.table(
        {
            name: pa.LargeListArray.from_arrays(offsets, _flat(table, name)).cast(pa.list_(kind))
            for name, kind in (("neighbours", pa.int64()), ("similarities", pa.float32()))
        }
    )


def _flat(table: pa.Table, column: str) -> Any:
    return table[column].combine_chunks().flatten().to_numpy()


def _cells_of_tasks(offsets: Numbers, rows: int) -> list[tuple[int, int]]:
    """Successive cells with about so many rows together."""
    cuts = [0]
    for cell in range(1, len(offsets)):
        if offsets[cell] - offsets[cuts[-1]] >= rows or cell == len(offsets) - 1:
            cuts.append(cell)
    return [(a, b) for a, b in pairwise(cuts) if offsets[b] > offsets[a]]


@dataclass(frozen=True)
class _SearchCells:
    queries: Path
    base: Path
    out: Path
    what: Search

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        queries, base = open_cells(self.queries), open_cells(self.base)
        device = torch.device(engine.device)
        # a block of products, and what of it passes, takes a third of the memory; a block of vectors a sixth
        block = max(256, min(1 << 16, engine.bytes // (24 * base.dimensions)))
        most = max(64, min(4096, engine.bytes // (12 * block)))
        found: list[tuple[Numbers, Numbers, NDArray[np.float32]]] = []
        inside = queries.offsets[task["first"] : task["last"] + 1]
        for first, last in _cells_of_tasks(inside, TOGETHER):
            cells = np.arange(task["first"] + first, task["first"] + last)
            spans = _spans(_probed(queries, base, cells, self.what.probes), base.offsets, block)
            for start in range(int(inside[first]), int(inside[last]), most):
                stop = min(start + most, int(inside[last]))
                vectors, numbers = queries.read(start, stop)
                itself = numbers if self.queries == self.base else None
                found.append(_nearest(vectors.to(device), numbers, itself, base, spans, self.what))
        write_part(self.out / f"found-{task['out']:06d}.parquet", _as_table(found))
        return {"done": task["rows"]}


TOGETHER = 256
"""Queries, about, that are looked for together: those of successive cells, which lie near each other. Fewer would keep
the products of matrices from their speed."""


def _probed(queries: Cells, base: Cells, cells: Numbers, probes: int) -> Numbers:
    """Cells of `base` to look into for some cells of `queries`: the nearest of each."""
    number = len(base.offsets) - 1
    if base.centroids is None or queries.centroids is None or not 0 < probes < number:
        return np.arange(number)
    nearness = queries.centroids[torch.from_numpy(cells)] @ base.centroids.T - base.centroids.square().sum(1) / 2
    order = nearness.argsort(dim=1, descending=True, stable=True).numpy()[:, :probes]
    return np.array(list(dict.fromkeys([*order[:, :FIRST].T.flat, *np.unique(order[:, FIRST:])])))


FIRST = 4
"""Cells that are looked into before the others, the nearest: their neighbours set the bar. The others are read in the
order in which they lie."""


def _spans(cells: Numbers, offsets: Numbers, block: int) -> list[list[tuple[int, int]]]:
    """Positions of these cells, in blocks of at most `block`, the first of them small."""
    blocks: list[list[tuple[int, int]]] = [[]]
    held, room = 0, max(1, block // 16)
    for cell in cells:
        start, stop = int(offsets[cell]), int(offsets[cell + 1])
        while start < stop:
            if held == room:
                blocks.append([])
                held, room = 0, block
            end = min(stop, start + room - held)
            if blocks[-1] and blocks[-1][-1][1] == start:
                blocks[-1][-1] = (blocks[-1][-1][0], end)
            else:
                blocks[-1].append((start, end))
            held += end - start
            start = end
    return [spans for spans in blocks if spans]


def _nearest(
    vectors: Tensor,
    numbers: Numbers,
    itself: Numbers | None,
    base: Cells,
    spans: list[list[tuple[int, int]]],
    what: Search,
) -> tuple[Numbers, Numbers, NDArray[np.float32]]:
    """Pairs (query, neighbour, similarity) of a block of queries `[q, D]`, by query and then the nearest first."""
    bar = torch.full((len(vectors), 1), what.floor if what.floor > -1 else -2.0, device=vectors.device)
    bar = bar.nextafter(torch.full_like(bar, torch.inf))  # what reaches it is above the floor
    rows, others = np.empty(0, np.int64), np.empty(0, np.int64)
    values = np.empty(0, np.float32)
    for block in spans:
        read = [base.read(*span) for span in block]
        among, names = torch.cat([v for v, _ in read]).to(vectors.device), np.concatenate([n for _, n in read])
        products = vectors @ among.T
        reach = _above(products, bar, what.k, names)
        row, column = (index.cpu().numpy() for index in reach)
        similar, other = products[reach].cpu().numpy(), names[column]
        if itself is not None:
            apart = other != itself[row]
            row, other, similar = row[apart], other[apart], similar[apart]
        if not len(row):
            continue
        rows, others, values = (np.concatenate(pair) for pair in ((rows, row), (others, other), (values, similar)))
        rows, others, values = _best(rows, others, values, what.k)
        count = np.bincount(rows, minlength=len(vectors))
        full = np.flatnonzero(count >= what.k)
        last = np.cumsum(count)[full] - 1
        bar[torch.from_numpy(full)] = torch.from_numpy(values[last])[:, None].to(bar.device)
    return numbers[rows], others, values


def _above(products: Tensor, bar: Tensor, k: int, names: Numbers) -> tuple[Tensor, Tensor]:
    """Rows and columns of products that reach their row's bar; of rows where most do, few more than the k + 1 largest.

    One more than k, because a vector can find itself. Where copies abound, many more are equally near: of these the
    k + 1 with the smallest names stay.
    """
    reach = products >= bar
    if int(torch.count_nonzero(reach)) > len(reach) * (2 * k + 64):
        crowded = reach.sum(1) > 4 * k + 64
        here = products[crowded]
        low = here.topk(min(k + 1, here.shape[1]), dim=1).values[:, -1:]
        reach[crowded] &= here >= low
        for row in (reach.sum(1) > 4 * k + 64).nonzero()[:, 0].tolist():
            tied = (products[row] == products[row][reach[row]].min()).nonzero()[:, 0]
            order = np.argpartition(names[tied.cpu().numpy()], k + 1)
            reach[row, tied[torch.from_numpy(order[k + 1 :]).to(tied.device)]] = False
    if reach.device.type == "cpu":  # numpy's search is three times as fast
        flat = torch.from_numpy(np.flatnonzero(reach.numpy()))
        return flat // reach.shape[1], flat % reach.shape[1]
    row, column = reach.nonzero(as_tuple=True)
    return row, column


def _best(
    rows: Numbers, others: Numbers, values: NDArray[np.float32], k: int
) -> tuple[Numbers, Numbers, NDArray[np.float32]]:
    """The k most similar of every row, sorted by row, falling similarity and number."""
    order = np.lexsort((others, -values, rows))
    rows, others, values = rows[order], others[order], values[order]
    first = np.searchsorted(rows, rows, side="left")
    kept = np.arange(len(rows)) - first < k
    return rows[kept], others[kept], values[kept]


def _as_table(found: list[tuple[Numbers, Numbers, NDArray[np.float32]]]) -> pa.Table:
    queries = np.concatenate([queries for queries, _, _ in found]) if found else np.empty(0, np.int64)
    others = np.concatenate([others for _, others, _ in found]) if found else np.empty(0, np.int64)
    values = np.concatenate([values for _, _, values in found]) if found else np.empty(0, np.float32)
    change = np.flatnonzero(np.diff(queries, prepend=-1))
    offsets = pa.array(np.append(change, len(queries)), pa.int64())
    return pa.table(
        {
            "number": pa.array(queries[change]),
            "neighbours": pa.LargeListArray.from_arrays(offsets, pa.array(others)),
            "similarities": pa.LargeListArray.from_arrays(offsets, pa.array(values)),
        }
    )
