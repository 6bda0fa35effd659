"""Neighbours and components, k-means and the hierarchy on made-up vectors, against Faiss and scikit-learn alone.

    python benchmarks/curation.py [--rows 100000 300000 1000000] [--clusters 1000 10000] [--iterations 5]

Every measurement is a process of its own, one after the other, with as many threads as the machine has cores. The
vectors are 384 numbers: points around centres of 32 inner dimensions with noise in all, and one in twenty is a near
copy of another. Ours reads Parquet and writes Parquet, with 1 GB of memory for a task; Faiss and scikit-learn are given
the vectors in memory. Faiss's inverted file has the same number of lists, and the fewest probes (a power of two) with
which its recall reaches ours on the queries that are looked at. Prints Markdown tables.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import finish, last_line
from torch import Tensor

from opsin.curate.cells import PROBES, VectorSet, build_cells
from opsin.curate.cluster import Cluster, cluster
from opsin.curate.components import Components
from opsin.curate.engine import Engine
from opsin.curate.neighbours import Search, edges, found_files, search
from opsin.curate.sample import LEVELS
from opsin.curate.tables import Table, write_part
from opsin.curate.vectors import Column, read_vectors, vector_array

D, PART, INNER = 384, 16_384, 32
K, FLOOR = 64, -1.0
SEEN = 500
"""Queries whose neighbours are compared with the exact ones."""
ENGINE = Engine(memory=1.0)


def make(folder: Path, rows: int) -> Table:
    """The vectors, written once."""
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        random = torch.Generator().manual_seed(0)
        centres = torch.randn(max(4, rows // 500), INNER, generator=random)
        into = torch.randn(INNER, D, generator=random) / INNER**0.5
        for number, start in enumerate(range(0, rows, PART)):
            count = min(PART, rows - start)
            inner = centres[torch.randint(len(centres), (count,), generator=random)]
            inner = inner + 0.5 * torch.randn(count, INNER, generator=random)
            vectors = inner @ into + 0.1 * torch.randn(count, D, generator=random)
            copies = torch.arange(0, count - 1, 20)
            vectors[copies + 1] = vectors[copies] + 0.05 * torch.randn(len(copies), D, generator=random)
            table = pa.table({"semantic": vector_array(vectors, np.arange(count), count)})
            write_part(partial / f"part-{number:08d}.parquet", table)
        partial.rename(folder)
    return Table(folder)


def in_memory(table: Table) -> Tensor:
    """All vectors `[n, D]`, as Faiss and scikit-learn want them."""
    return torch.cat([read_vectors(part, Column("semantic"), D)[0] for part in table.parts])


def exact(vectors: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Some queries, and their nearest neighbours by comparing with all."""
    queries = np.random.default_rng(1).choice(len(vectors), SEEN, replace=False)
    products = vectors[queries] @ vectors.T
    products[torch.arange(SEEN), torch.from_numpy(queries)] = -2
    return queries, products.topk(K, dim=1).indices.numpy()


def recall(found: dict[int, set[int]], queries: Any, nearest: Any) -> float:
    """Share of the exact neighbours that were found."""
    shares = [len(found.get(int(q), set()) & set(map(int, row))) / K for q, row in zip(queries, nearest, strict=True)]
    return float(np.mean(shares))


def lists_of(rows: int) -> int:
    """Cells of the search, ours and Faiss's."""
    return int(rows**0.5)


def ours_neighbours(table: Table, scratch: Path, _: dict[str, Any]) -> dict[str, Any]:
    """Cells, the 64 nearest of every vector, and components above 0.9."""
    began = perf_counter()
    cells = build_cells(ENGINE, [VectorSet(table, Column("semantic"))], scratch / "cells", cells=lists_of(table.rows))
    sorted_ = perf_counter()
    out = search(ENGINE, cells, cells, scratch / "found", Search(K, FLOOR, PROBES))
    searched = perf_counter()
    components = Components(scratch / "parents.npy", table.rows)
    for file in found_files(out):
        components.join(*edges(file, 0.9)[:2])
    count = sum(
        int((components.labels(a, min(a + 65536, table.rows)) == np.arange(a, min(a + 65536, table.rows))).sum())
        for a in range(0, table.rows, 65536)
    )
    ended = perf_counter()
    peak = memory()
    queries, nearest = exact(in_memory(table))
    found: dict[int, set[int]] = {}
    for file in found_files(out):
        read = pq.read_table(file)
        here = np.flatnonzero(np.isin(read["number"].to_numpy(), queries))
        found |= {row["number"]: set(row["neighbours"]) for row in read.take(here).to_pylist()}
    return {
        "seconds": ended - began,
        "cells": sorted_ - began,
        "search": searched - sorted_,
        "components": ended - searched,
        "found components": count,
        "recall": recall(found, queries, nearest),
        "peak": peak,
    }


def faiss_neighbours(table: Table, _: Path, given: dict[str, Any]) -> dict[str, Any]:
    """An IndexIVFFlat trained, filled and asked for the 65 nearest of every vector (one is the vector itself)."""
    import faiss

    vectors = in_memory(table).numpy()
    queries, nearest = exact(torch.from_numpy(vectors))
    began = perf_counter()
    quantiser = faiss.IndexFlatIP(D)
    index = faiss.IndexIVFFlat(quantiser, D, lists_of(len(vectors)), faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid = 8, 48
    index.train(vectors)
    index.add(vectors)
    built = perf_counter()
    probes, reached = 8, 0.0
    while True:
        index.nprobe = probes
        found = index.search(vectors[queries], K + 1)[1]
        reached = recall(
            {int(q): set(map(int, row)) - {int(q)} for q, row in zip(queries, found, strict=True)}, queries, nearest
        )
        if reached >= given["recall"] or probes >= 512:
            break
        probes *= 2
    again = perf_counter()
    for start in range(0, len(vectors), 65536):
        index.search(vectors[start : start + 65536], K + 1)
    ended = perf_counter()
    return {
        "seconds": built - began + ended - again,
        "search": ended - again,
        "probes": probes,
        "recall": reached,
        "peak": memory(),
    }


def ours_kmeans(table: Table, scratch: Path, given: dict[str, Any]) -> dict[str, Any]:
    """One level, streaming, as `opsin curate cluster` does it: iterations and the assignment of all."""
    settings = Cluster(levels=(given["clusters"],), iterations=given["iterations"], precision=given["precision"])
    began = perf_counter()
    facts = cluster(ENGINE, table, scratch / "clusters", settings)
    return {"seconds": perf_counter() - began, "cost": facts["cost"], "peak": memory()}


def faiss_kmeans(table: Table, _: Path, given: dict[str, Any]) -> dict[str, Any]:
    """faiss.Kmeans on all vectors, and the assignment of all."""
    import faiss

    vectors = in_memory(table).numpy()
    began = perf_counter()
    kmeans = faiss.Kmeans(D, given["clusters"], niter=given["iterations"], seed=0, max_points_per_centroid=10**9)
    kmeans.train(vectors)
    distances, _found = kmeans.index.search(vectors, 1)
    return {"seconds": perf_counter() - began, "cost": float(distances.astype(np.float64).mean()), "peak": memory()}


def sklearn_kmeans(table: Table, _: Path, given: dict[str, Any]) -> dict[str, Any]:
    """MiniBatchKMeans with batches of 10,000 and as many passes as the others have iterations."""
    from sklearn.cluster import MiniBatchKMeans

    vectors = in_memory(table).numpy()
    began = perf_counter()
    kmeans = MiniBatchKMeans(
        given["clusters"], max_iter=given["iterations"], batch_size=max(10_000, 2 * given["clusters"]), random_state=0,
        n_init=1, compute_labels=False,
    )  # fmt: skip
    kmeans.fit(vectors)
    cost = 0.0
    for start in range(0, len(vectors), 16384):
        cost += float((kmeans.transform(vectors[start : start + 16384]).min(1).astype(np.float64) ** 2).sum())
    return {"seconds": perf_counter() - began, "cost": cost / len(vectors), "peak": memory()}


def ours_hierarchy(table: Table, scratch: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Three levels, the upper two with ten rounds of resampling."""
    from safetensors.torch import load_file

    settings = Cluster(levels=tuple(given["levels"]), iterations=given["iterations"], precision=given["precision"])
    began = perf_counter()
    cluster(ENGINE, table, scratch / "clusters", settings)
    seconds = perf_counter() - began
    levels = load_file(scratch / "clusters" / LEVELS)
    return {"seconds": seconds, "peak": memory(), "largest of the finest": int(levels["sizes.1"].max())}


MEASUREMENTS: dict[str, Callable[[Table, Path, dict[str, Any]], dict[str, Any]]] = {
    "ours neighbours": ours_neighbours,
    "faiss neighbours": faiss_neighbours,
    "ours k-means": ours_kmeans,
    "faiss k-means": faiss_kmeans,
    "sklearn k-means": sklearn_kmeans,
    "ours hierarchy": ours_hierarchy,
}


def memory() -> float:
    """Peak resident memory of this process in GB, libraries and vectors given in memory included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def measured(name: str, folder: Path, rows: int, **given: Any) -> dict[str, Any]:
    """A measurement, in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--rows", str(rows)]
    done = subprocess.run([*command, "--given", json.dumps(given)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} with {rows:,} rows ended with status {done.returncode}: {last_line(done.stderr)}")
    result: dict[str, Any] = json.loads(last_line(done.stdout))
    print(f"{name} {rows:,} {given}: {result}", file=sys.stderr, flush=True)
    return {"measurement": name, "rows": rows, **given, **result}


def table_of(results: list[dict[str, Any]]) -> str:
    """A Markdown table with a row for each measurement."""
    lines = ["| | vectors | settings | seconds | peak GB | result |", "| --- " * 6 + "|"]
    for r in results:
        given = ", ".join(f"{k} {r[k]}" for k in ("clusters", "levels", "iterations", "precision", "probes") if k in r)
        told = ", ".join(f"{k} {r[k]:,.4g}" for k in ("recall", "cost", "cells", "search", "components") if k in r)
        lines.append(
            f"| {r['measurement']} | {r['rows']:,} | {given} | {r['seconds']:,.1f} | {r['peak']:.2f} | {told} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read options, run everything, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--clusters", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "opsin-curation")
    parser.add_argument("--one", choices=list(MEASUREMENTS))
    parser.add_argument("--given", default="{}")
    a = parser.parse_args()
    if a.one:
        table = make(a.folder / f"vectors-{a.rows[0]}", a.rows[0])
        torch.set_num_threads(os.cpu_count() or 1)
        with tempfile.TemporaryDirectory(dir=a.folder) as scratch:
            print(json.dumps(MEASUREMENTS[a.one](table, Path(scratch), json.loads(a.given))))
        return
    a.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for rows in a.rows:
        make(a.folder / f"vectors-{rows}", rows)
        ours = measured("ours neighbours", a.folder, rows)
        results.append(ours)
        results.append(measured("faiss neighbours", a.folder, rows, recall=ours["recall"]))
    rows = max(a.rows)
    for clusters in a.clusters:
        settings = {"clusters": clusters, "iterations": a.iterations}
        results += [measured("ours k-means", a.folder, rows, precision=p, **settings) for p in ("fp32", "bf16")]
        results += [measured(f"{peer} k-means", a.folder, rows, **settings) for peer in ("faiss", "sklearn")]
    levels = [max(a.clusters), max(a.clusters) // 10, max(a.clusters) // 100]
    results.append(measured("ours hierarchy", a.folder, rows, levels=levels, iterations=a.iterations, precision="bf16"))
    finish("curation", {"dimensions": D, "neighbours": K, "results": results})
    print("", table_of(results), sep="\n\n")


if __name__ == "__main__":
    main()
