import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from vector_tables import ENGINE, concepts, directions, stored, tiny, write_vectors

from opsin.curate import cells as module
from opsin.curate.cells import Cells, VectorSet, build_cells, open_cells
from opsin.curate.tables import Table, write_part
from opsin.curate.vectors import Column, save_whitening
from opsin.errors import OpsinError

COLUMN = Column("semantic")


def contents(cells):
    """The number and the vector at every position."""
    vectors, numbers = cells.read(0, cells.count)
    return numbers, vectors.numpy()


def check(cells, vectors, numbers):
    """Every vector is there once, in its nearest centroid's cell, and cells keep the order of the numbers."""
    found, read = contents(cells)
    assert sorted(found.tolist()) == sorted(numbers)
    np.testing.assert_array_equal(read, stored(vectors)[np.searchsorted(numbers, found)])
    assert cells.offsets[0] == 0
    assert cells.offsets[-1] == cells.count == len(numbers)
    assert cells.buckets[0] == 0
    assert cells.buckets[-1] == cells.count
    assert (np.diff(cells.buckets) > 0).all()
    if cells.centroids is None:
        return
    distance = np.square(read[:, None] - cells.centroids.numpy()[None]).sum(2)
    for cell, (start, stop) in enumerate(zip(cells.offsets, cells.offsets[1:], strict=False)):
        assert (np.diff(found[start:stop]) > 0).all()
        np.testing.assert_allclose(distance[start:stop, cell], distance[start:stop].min(1), atol=4e-3)  # of fp16


def build(engine, tmp_path, vectors, cells, part=100, name="cells", **more):
    table = write_vectors(tmp_path / f"table-{name}", vectors, part)
    return build_cells(engine, [VectorSet(table, COLUMN)], tmp_path / name, cells=cells, **more)


@pytest.mark.parametrize("size", [8000, 30_000, 200_000_000])
@pytest.mark.parametrize("cells", [0, 1, 30])
def test_every_vector_is_once_in_the_cell_of_its_nearest_centroid(tmp_path, size, cells):
    vectors, _ = concepts(900)
    found = build(tiny(size), tmp_path, vectors, cells, part=70)
    check(found, vectors, list(range(len(vectors))))
    assert (found.centroids is None) == (cells == 0)
    if cells:
        assert found.centroids.shape == (cells, 16)
    else:  # successive vectors
        assert contents(found)[0].tolist() == list(range(len(vectors)))
    if size < 1e6:
        assert len(found.buckets) > 4
    assert not [path for path in found.folder.iterdir() if path.name.startswith(("sorted", "rows", "counts"))]


def test_vectors_may_be_read_from_any_position_to_any_other(tmp_path):
    cells = build(tiny(20_000), tmp_path, concepts(400)[0], 9)
    numbers, vectors = contents(cells)
    random = np.random.default_rng(0)
    for start in random.integers(0, 399, 50):
        stop = int(random.integers(start + 1, 401))
        some, which = cells.read(int(start), stop)
        assert which.tolist() == numbers[start:stop].tolist()
        np.testing.assert_array_equal(some.numpy(), vectors[start:stop])


def test_a_cell_larger_than_a_bucket_and_empty_cells(tmp_path):
    """Most vectors are in one cell, and some centroids have none."""
    vectors = concepts(800, centres=2, spread=0.01)[0]
    like = build(ENGINE, tmp_path, concepts(300, seed=7)[0], 12, name="like")
    found = build(tiny(8000), tmp_path, vectors, 0, like=like, name="found")
    check(found, vectors, list(range(800)))
    sizes = np.diff(found.offsets)
    assert (sizes == 0).any()
    assert sizes.max() > 3 * np.diff(found.buckets).max()


def test_numbers_go_on_from_one_table_to_the_next_and_count_missing_vectors(tmp_path):
    first, second = concepts(250)[0], concepts(130, seed=1)[0]
    gone = {3, 100, 249}
    heaps = [
        VectorSet(write_vectors(tmp_path / "first", first, 60, missing=gone), COLUMN),
        VectorSet(write_vectors(tmp_path / "second", second, 50), COLUMN),
    ]
    numbers = [i for i in range(250) if i not in gone] + list(range(250, 380))
    vectors = np.concatenate([first, second])[numbers]
    for cells, size in ((0, 10_000), (11, 10_000), (11, 200_000_000)):
        check(build_cells(tiny(size), heaps, tmp_path / f"{cells}-{size}", cells=cells), vectors, numbers)


def test_only_what_is_kept_counts(tmp_path):
    vectors = concepts(300)[0]
    table = write_vectors(tmp_path / "table", vectors, 64, missing={5, 6})
    kept = np.random.default_rng(0).random(300) < 0.4
    kept[64:128] = False  # a part of which nothing is kept
    (tmp_path / "kept").mkdir()
    for i, part in enumerate(table.parts):
        write_part(tmp_path / "kept" / f"{i}.parquet", pa.table({"kept": kept[part.first : part.first + part.rows]}))
    cells = build_cells(ENGINE, [VectorSet(table, COLUMN, Table(tmp_path / "kept"))], tmp_path / "cells", cells=8)
    numbers = [i for i in np.flatnonzero(kept).tolist() if i not in (5, 6)]
    check(cells, vectors[numbers], numbers)


def test_cells_have_the_centroids_of_others(tmp_path):
    base = build(ENGINE, tmp_path, concepts(500)[0], 14, name="base")
    queries = concepts(90, seed=4)[0]
    found = build(ENGINE, tmp_path, queries, 0, like=base, name="queries")
    check(found, queries, list(range(90)))
    assert torch.equal(found.centroids, base.centroids)
    exact = build(ENGINE, tmp_path, concepts(500)[0], 0, name="exact")
    assert build(ENGINE, tmp_path, queries, 0, like=exact, name="without").centroids is None


def test_successive_centroids_tend_to_be_near(tmp_path):
    centroids = build(ENGINE, tmp_path, concepts(2000, centres=40)[0], 120).centroids
    apart = torch.cdist(centroids, centroids)
    assert apart.diagonal(1).mean() < 0.8 * apart.mean()


def test_more_cells_than_vectors_are_as_many(tmp_path):
    vectors = directions(20)
    cells = build(ENGINE, tmp_path, vectors, 50)
    check(cells, vectors, list(range(20)))
    assert len(cells.centroids) == 20


def test_vectors_of_different_widths_are_refused(tmp_path):
    heaps = [VectorSet(write_vectors(tmp_path / str(d), directions(30, d)), COLUMN) for d in (16, 8)]
    with pytest.raises(OpsinError, match="vectors of 16 and 8 numbers cannot be compared: embed all sets with one"):
        build_cells(ENGINE, heaps, tmp_path / "cells", cells=0)
    base = build_cells(ENGINE, heaps[:1], tmp_path / "base", cells=4)
    with pytest.raises(OpsinError, match="vectors of 16 and 8 numbers cannot be compared"):
        build_cells(ENGINE, heaps[1:], tmp_path / "queries", cells=0, like=base)


def test_whitened_vectors_of_different_widths_are_refused(tmp_path):
    save_whitening(tmp_path / "w.safetensors", torch.zeros(16), torch.diag(torch.linspace(1, 2, 16)), most=8)
    column = Column("semantic", tmp_path / "w.safetensors")
    heaps = [VectorSet(write_vectors(tmp_path / str(d), directions(30, d)), column) for d in (16, 8)]
    assert build_cells(ENGINE, heaps[:1], tmp_path / "cells", cells=0).dimensions == 8
    with pytest.raises(OpsinError, match="vectors of 16 and 8 numbers cannot be compared"):
        build_cells(ENGINE, heaps, tmp_path / "both", cells=0)
    heaps = [heaps[0], VectorSet(write_vectors(tmp_path / "nameless", directions(30), column="other"), column)]
    with pytest.raises(OpsinError, match=r"nameless has no column 'semantic' \(it has other\)"):
        build_cells(ENGINE, heaps, tmp_path / "both", cells=0)


@pytest.mark.parametrize("cells", [0, 4])
def test_nothing_to_compare_is_told(tmp_path, cells):
    table = write_vectors(tmp_path / "table", directions(20), 10)
    (tmp_path / "kept").mkdir()
    for i in range(2):
        write_part(tmp_path / "kept" / f"{i}.parquet", pa.table({"kept": np.zeros(10, bool)}))
    with pytest.raises(OpsinError, match="there are no vectors to compare: all images were dropped before, or have"):
        build_cells(ENGINE, [VectorSet(table, COLUMN, Table(tmp_path / "kept"))], tmp_path / "cells", cells=cells)


class Stopped(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("cells", [0, 13])
def test_stopped_after_any_file_it_goes_on_to_the_same_cells(tmp_path, monkeypatch, cells):
    vectors = concepts(500)[0]
    heap = VectorSet(write_vectors(tmp_path / "table", vectors, 60), COLUMN)
    engine, save = tiny(15_000), module._save
    whole = build_cells(engine, [heap], tmp_path / "whole", cells=cells)
    written = []

    def counting(file, array):
        if len(written) >= most:
            raise Stopped
        written.append(file.name)
        save(file, array)

    monkeypatch.setattr(module, "_save", counting)
    most, stops = 0, 0
    while True:
        folder = tmp_path / f"stopped-{most}"
        written.clear()
        try:
            build_cells(engine, [heap], folder, cells=cells)
            break
        except Exception as error:  # Daft wraps it
            assert "Stopped" in repr(error)  # noqa: PT017
            stops += 1
        before = set(written)
        written.clear()
        most, limit = 10**6, most
        resumed = build_cells(engine, [heap], folder, cells=cells)
        finished = {name for name in before if name.startswith("counts")}
        finished |= {f"vectors-{name[8:14]}.npy" for name in before if name.startswith("numbers")}
        assert not finished & set(written)  # what was done was not done again
        assert resumed.buckets == whole.buckets
        for one, other in zip(contents(resumed), contents(whole), strict=True):
            np.testing.assert_array_equal(one, other)
        shutil.rmtree(folder)
        most = limit + 3
    assert stops > 8


def test_with_other_memory_a_stopped_run_begins_anew(tmp_path, monkeypatch):
    """Its tasks are others: files of the same names would hold other vectors."""
    vectors = concepts(500)[0]
    heap = VectorSet(write_vectors(tmp_path / "table", vectors, 60), COLUMN)

    def stop(*_):
        raise Stopped("Stopped")

    monkeypatch.setattr(module._Gather, "__call__", stop)
    with pytest.raises(Exception, match="Stopped"):
        build_cells(tiny(15_000), [heap], tmp_path / "cells", cells=7)
    monkeypatch.undo()
    assert len(list((tmp_path / "cells").glob("counts-*"))) > 3
    check(build_cells(tiny(60_000), [heap], tmp_path / "cells", cells=7), vectors, list(range(500)))


def test_cells_are_opened_once_and_anew_when_others_take_their_place(tmp_path):
    one, two = concepts(200)[0], concepts(150, seed=8)[0]
    first = build(ENGINE, tmp_path, one, 5, name="cells")
    assert open_cells(tmp_path / "cells") is first
    contents(first)
    shutil.rmtree(tmp_path / "cells")
    shutil.rmtree(tmp_path / "table-cells")
    check(build(ENGINE, tmp_path, two, 5, name="cells"), two, list(range(150)))
    assert isinstance(open_cells(tmp_path / "cells"), Cells)
