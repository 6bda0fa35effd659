"""How much a search finds: some vectors are compared with all others, and their neighbours with those that it found."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from opsin.curate.cells import Cells, open_cells
from opsin.curate.engine import Engine, Task
from opsin.curate.neighbours import Search
from opsin.data.rng import Stream, shuffled_index

SAMPLE: Final = 256
"""Vectors that are compared with all others."""


def recall(engine: Engine, cells: Cells, found: Sequence[Path], what: Search, scratch: Path) -> float | None:
    """Share of the true neighbours of a sample of the vectors that `search` found among the same cells.

    Args:
        engine: where it runs.
        cells: that were searched for their own neighbours.
        found: the files of the search.
        what: what was looked for.
        scratch: folder for intermediate files.

    Returns:
        The share, or None if the sample has no neighbours above the floor.
    """
    count = min(SAMPLE, cells.count)
    chosen = np.sort(shuffled_index(0, np.array(0), np.arange(count), cells.count, stream=Stream.CURATION))
    block = max(1024, engine.bytes // (16 * (cells.dimensions + count)))
    tasks = [
        {"start": start, "stop": min(start + block, cells.count), "file": str(scratch / f"exact-{start:015d}.npz")}
        for start in range(0, cells.count, block)
    ]
    work = _CompareAll(cells.folder, chosen.tolist(), what)
    for _ in engine.run("measuring recall", work, tasks, total=cells.count, unit="vectors"):
        pass
    pieces = [np.load(str(task["file"])) for task in tasks]
    rows, others, values = (np.concatenate([piece[name] for piece in pieces]) for name in ("rows", "others", "values"))
    order = np.lexsort((others, -values, rows))
    rows, others = rows[order], others[order]
    near = np.arange(len(rows)) - np.searchsorted(rows, rows) < what.k
    true = set(zip(rows[near].tolist(), others[near].tolist(), strict=True))
    if not true:
        return None
    names = np.unique(rows)
    seen: set[tuple[int, int]] = set()
    for file in found:
        table = pq.read_table(file, columns=["number", "neighbours"])
        for row in table.filter(pc.is_in(table["number"], pa.array(names))).to_pylist():
            seen |= {(row["number"], other) for other in row["neighbours"]}
    return len(true & seen) / len(true)


@dataclass(frozen=True)
class _CompareAll:
    """The nearest of some vectors among those at successive positions."""

    cells: Path
    chosen: list[int]
    what: Search

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        cells = open_cells(self.cells)
        queries = [cells.read(position, position + 1) for position in self.chosen]
        own = np.concatenate([numbers for _, numbers in queries])
        vectors, numbers = cells.read(task["start"], task["stop"])
        products = torch.cat([vector for vector, _ in queries]).to(engine.device) @ vectors.to(engine.device).T
        values, index = products.topk(min(self.what.k + 1, len(numbers)), dim=1)
        others, similar = numbers[index.cpu().numpy()], values.cpu().numpy()
        kept = (others != own[:, None]) & (similar >= self.what.floor)
        rows = np.broadcast_to(own[:, None], others.shape)
        np.savez(task["file"], rows=rows[kept], others=others[kept], values=similar[kept])
        return {"done": len(numbers)}
