import json
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_tables import ENGINE, concepts, directions, halves, same_neighbours, stored, tiny, write_vectors

from opsin.curate import neighbours as module
from opsin.curate.cells import VectorSet, build_cells
from opsin.curate.neighbours import Search, edges, found_files, rows_between, search
from opsin.curate.vectors import Column
from opsin.errors import OpsinError

COLUMN = Column("semantic")


def build(tmp_path, name, vectors, cells=0, engine=ENGINE, **more):
    table = write_vectors(tmp_path / f"table-{name}", vectors, 70)
    return build_cells(engine, [VectorSet(table, COLUMN)], tmp_path / name, cells=cells, **more)


def found_in(folder):
    """Rows of a search as {number: (neighbours, similarities)}."""
    rows = [row for file in found_files(folder) for row in pq.read_table(file).to_pylist()]
    assert len({row["number"] for row in rows}) == len(rows)
    assert all(row["neighbours"] for row in rows)
    return {row["number"]: (row["neighbours"], row["similarities"]) for row in rows}


def exact_rows(products, k, floor, itself):
    """What a search finds, of products that are exact: the nearest first, equally near ones by number."""
    found = {}
    for number, row in enumerate(products):
        among = [i for i in range(len(row)) if row[i] > floor and not (itself and i == number)]
        best = sorted(among, key=lambda i: (-row[i], i))[:k]
        if best:
            found[number] = (best, row[best].tolist())
    return found


@pytest.mark.parametrize("size", [1, 30_000, 200_000_000])
@pytest.mark.parametrize("k", [1, 3, 64, 1000])
def test_equally_near_neighbours_are_in_the_order_of_their_numbers(tmp_path, size, k):
    vectors = halves(250)
    cells = build(tmp_path, "cells", vectors, engine=tiny(max(size, 4000)))
    for floor in (-1.0, 0.0, 0.25, 0.5, 0.75):
        out = search(tiny(size), cells, cells, tmp_path / f"out{floor}", Search(k, floor, 0))
        assert found_in(out) == exact_rows(vectors @ vectors.T, k, -9 if floor == -1 else floor, True)


@pytest.mark.parametrize("size", [1, 100_000, 200_000_000])
@pytest.mark.parametrize(("k", "floor"), [(5, 0.3), (64, -1.0), (700, 0.1)])
def test_the_search_is_brute_force_where_all_cells_are_probed(tmp_path, size, k, floor):
    vectors, _ = concepts(600)
    products = stored(vectors) @ stored(vectors).T
    kept = {}
    for cells, probes in ((0, 0), (20, 0), (20, 20), (20, 400)):
        base = build(tmp_path, f"{cells}-{probes}", vectors, cells, engine=tiny(max(size, 20_000)))
        found = found_in(search(tiny(size), base, base, tmp_path / f"out-{cells}-{probes}", Search(k, floor, probes)))
        same_neighbours(found, products, k, floor, itself=True)
        kept[cells, probes] = found.keys()
    assert len({tuple(sorted(each)) for each in kept.values()}) == 1


def test_vectors_are_compared_as_they_are_stored(tmp_path):
    """In fp16, of which the products are computed in fp32."""
    vectors = directions(80, 300)
    cells = build(tmp_path, "cells", vectors)
    found = found_in(search(ENGINE, cells, cells, tmp_path / "out", Search(79, -1.0, 0)))
    same_neighbours(found, stored(vectors) @ stored(vectors).T, 79, -1.0, itself=True)
    exact = vectors @ vectors.T
    assert (
        max(abs(exact[i, j] - s) for i, (others, values) in found.items() for j, s in zip(others, values, strict=True))
        > 1e-5
    )


@settings(max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([-1.0, -0.3, 0.0, 0.6]),
    st.integers(0, 9),
)
def test_a_block_of_queries_finds_what_sorting_all_products_finds(rows, columns, k, floor, seed):
    """Pairs of a block, whatever the blocks of the base."""
    queries, base = halves(rows, seed), halves(columns, seed + 100)
    names = np.random.default_rng(seed).permutation(columns) * 3

    class Base:
        def read(self, start, stop):
            return torch.from_numpy(base[start:stop]).float(), names[start:stop]

    cuts = sorted({0, columns, *np.random.default_rng(seed).integers(0, columns, 3).tolist()})
    spans = [[(a, b)] for a, b in pairwise(cuts)]
    row, other, value = module._nearest(
        torch.from_numpy(queries).float(), np.arange(rows) + 500, None, Base(), spans, Search(k, floor, 0)
    )
    ordered = base[np.argsort(names)]
    expected = exact_rows(queries @ ordered.T, k, -9 if floor == -1 else floor, False)
    pairs = [
        (i + 500, int(np.sort(names)[j]), s) for i, (js, ss) in expected.items() for j, s in zip(js, ss, strict=True)
    ]
    assert list(zip(row.tolist(), other.tolist(), value.tolist(), strict=True)) == pairs


def test_queries_of_another_table_may_find_any_vector(tmp_path):
    base, queries = concepts(400)[0], concepts(90, seed=3)[0]
    queries[7] = base[11]
    for cells in (0, 12):
        among = build(tmp_path, f"base-{cells}", base, cells)
        looking = build(tmp_path, f"queries-{cells}", queries, 0, like=among)
        found = found_in(search(ENGINE, looking, among, tmp_path / f"out-{cells}", Search(9, 0.1, 0)))
        same_neighbours(found, stored(queries) @ stored(base).T, 9, 0.1, itself=False)
        assert found[7][0][0] == 11


def test_few_probes_find_most_neighbours(tmp_path):
    vectors, _ = concepts(4000, 32, centres=60, spread=0.5)
    cells = build(tmp_path, "cells", vectors, 64)
    products = stored(vectors) @ stored(vectors).T
    np.fill_diagonal(products, -2)
    best = np.argsort(-products, axis=1)[:, :10]
    recalls = []
    for probes in (1, 4, 16):
        found = found_in(search(ENGINE, cells, cells, tmp_path / f"out-{probes}", Search(10, -1.0, probes)))
        recalls.append(np.mean([len({*found[i][0]} & {*best[i].tolist()}) / 10 for i in range(4000)]))
    assert recalls[0] <= recalls[1] <= recalls[2]
    assert recalls[1] > 0.9
    assert recalls[2] > 0.98


def test_few_probes_read_few_cells(tmp_path, monkeypatch):
    vectors, _ = concepts(3000, centres=60)
    cells = build(tmp_path, "cells", vectors, 200)
    read = []
    real = module._spans
    monkeypatch.setattr(module, "_spans", lambda which, *rest: read.append(len(which)) or real(which, *rest))
    monkeypatch.setattr(module, "TOGETHER", 1)
    search(ENGINE, cells, cells, tmp_path / "out", Search(5, 0.5, 3))
    assert set(read) == {3}


def test_a_cell_of_most_vectors_is_cut(tmp_path):
    vectors = np.concatenate([concepts(700, centres=1, spread=0.05)[0], directions(60, seed=9)])
    like = build(tmp_path, "like", concepts(300, seed=7)[0], 12)
    cells = build(tmp_path, "cells", vectors, like=like, engine=tiny(20_000))
    assert np.diff(cells.offsets).max() > 600
    found = found_in(search(tiny(1), cells, cells, tmp_path / "out", Search(8, 0.2, 0)))
    same_neighbours(found, stored(vectors) @ stored(vectors).T, 8, 0.2, itself=True)


def test_equal_vectors_have_those_of_the_smallest_numbers(tmp_path):
    cells = build(tmp_path, "cells", np.tile(halves(1), (1500, 1)), 4)
    found = found_in(search(ENGINE, cells, cells, tmp_path / "out", Search(5, 0.5, 0)))
    assert len(found) == 1500
    for number, (neighbours, similarities) in found.items():
        assert neighbours == [i for i in range(6) if i != number][:5]
        assert similarities == [1.0] * 5


def test_equal_vectors_do_not_fill_the_memory():
    products = torch.ones(40, 5000)
    products[3, 4000:4003] = 2
    names = np.random.default_rng(0).permutation(5000)
    row, column = module._above(products, torch.zeros(40, 1), 6, names)
    assert len(row) <= 40 * (4 * 6 + 64)
    for i in range(40):
        here = column[row == i].tolist()
        smallest = set(np.argsort(names)[:7].tolist())
        assert smallest <= set(here) or i == 3
    assert {4000, 4001, 4002} | set(np.argsort(names)[:4].tolist()) <= set(column[row == 3].tolist())


def test_queries_without_neighbours_have_no_row(tmp_path):
    cells = build(tmp_path, "cells", np.eye(8)[[0, 1, 2, 2]])
    out = search(ENGINE, cells, cells, tmp_path / "out", Search(3, 0.5, 0))
    assert found_in(out) == {2: ([3], [1.0]), 3: ([2], [1.0])}
    lonely = build(tmp_path, "lonely", np.eye(8)[:1])
    assert found_in(search(ENGINE, lonely, lonely, tmp_path / "lone", Search(3, -1.0, 0))) == {}


def test_only_missing_files_are_searched_again(tmp_path):
    vectors, _ = concepts(800)
    cells = build(tmp_path, "cells", vectors, 40)
    what = Search(4, 0.2, 5)
    out = search(ENGINE, cells, cells, tmp_path / "out", what)
    files = found_files(out)
    assert len(files) > 8
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    search(ENGINE, cells, cells, out, what)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files} == before
    gone = files[2:4]
    for file in [*gone, out / "done.json"]:
        file.unlink()
    (out / f"{gone[0].name}.partial").write_bytes(b"half")
    search(ENGINE, cells, cells, out, what)
    assert found_files(out) == files
    for file, (content, written) in before.items():
        assert file.read_bytes() == content
        assert (file.stat().st_mtime_ns != written) == (file in gone)
    assert json.loads((out / "done.json").read_text()) == {"k": 4, "floor": 0.2, "probes": 5}


def test_edges_are_above_a_threshold_and_rows_are_by_number(tmp_path):
    vectors = halves(150)
    cells = build(tmp_path, "cells", vectors, 6)
    files = found_files(search(ENGINE, cells, cells, tmp_path / "out", Search(20, 0.0, 0)))
    expected = exact_rows(vectors @ vectors.T, 20, 0.0, True)
    pairs = [edges(file, 0.5) for file in files]
    a, b, s = (np.concatenate(each) for each in zip(*pairs, strict=True))
    assert a.dtype == b.dtype == np.int64
    assert sorted(zip(a.tolist(), b.tolist(), s.tolist(), strict=True)) == sorted(
        (i, j, v) for i, row in expected.items() for j, v in zip(*row, strict=True) if v > 0.5
    )
    for first, stop in ((0, 150), (30, 31), (149, 150), (10, 77)):
        table = rows_between(files, first, stop)
        assert table["neighbours"].to_pylist() == [expected.get(i, ([], []))[0] for i in range(first, stop)]
        assert table["similarities"].to_pylist() == [expected.get(i, ([], []))[1] for i in range(first, stop)]


def test_cells_that_vanish_are_an_error_of_one_sentence_or_more(tmp_path):
    cells = build(tmp_path, "cells", concepts(100)[0], 3)
    (tmp_path / "out").write_text("")
    with pytest.raises(OpsinError, match="cannot write into --out"):
        search(ENGINE, cells, cells, tmp_path / "out", Search(4, 0.2, 0))
