import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from opsin.curate import retrieve as module
from opsin.curate.engine import Engine
from opsin.curate.retrieve import Query, Retrieve, retrieve
from opsin.curate.tables import SCRATCH, Step, Table, write_part
from opsin.curate.vectors import vector_array
from opsin.errors import OpsinError

ENGINE = Engine(threads=1, memory=0.2)
D = 8


def points(seed, count, dimensions=D):
    vectors = np.random.default_rng(seed).standard_normal((count, dimensions))
    unit = torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).half()
    return unit.float()


def save_vectors(folder, vectors, part=100, missing=(), column="semantic"):
    """A table of vectors in parts, null at the rows `missing`."""
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, max(1, len(vectors)), part)):
        here = np.arange(start, min(start + part, len(vectors)))
        there = here[~np.isin(here, missing)]
        array = vector_array(vectors[there], there - start, len(here)).cast(pa.list_(pa.float16()))
        write_part(folder / f"part-{number:08d}.parquet", pa.table({column: array}))
    return Table(folder)


def save_column(folder, name, values, kind, part=100):
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, len(values), part)):
        write_part(
            folder / f"part-{number:08d}.parquet", pa.table({name: pa.array(values[start : start + part], kind)})
        )
    return Table(folder)


def save_clusters(folder, vectors, k, missing=()):
    """Clusters around the first k vectors, as the cluster step leaves them; also their numbers."""
    centroids = vectors[:k]
    cluster = torch.cdist(vectors, centroids).argmin(1).tolist()
    cluster = [None if i in missing else c for i, c in enumerate(cluster)]
    table = save_column(folder, "cluster", cluster, pa.int32())
    save_file({"centroids.1": centroids.contiguous()}, folder / "levels.safetensors")
    return Table(table.path), cluster


def sets_of(out):
    return pa.concat_tables(pq.read_table(file) for file in sorted(out.glob("part-*.parquet")))["sets"].to_pylist()


def nearest(vectors, queries, k, allowed):
    """By brute force: for each query the k nearest of the allowed rows."""
    similar = (queries.double() @ vectors.double().T).numpy()
    similar[:, ~allowed] = -9
    return np.argsort(-similar, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("exact_below", [100_000, 10])
def test_the_nearest_of_every_image_are_retrieved(tmp_path, exact_below):
    heap, a, b = points(0, 950), points(1, 70), points(2, 33)
    kept = np.random.default_rng(3).random(950) < 0.7
    table = save_vectors(tmp_path / "heap", heap, missing=[5, 940])
    queries = [
        Query("a", save_vectors(tmp_path / "a", a, part=30, missing=[2]), "sample"),
        Query("b & <b>", save_vectors(tmp_path / "b", b), "sample", nearest=7),
    ]
    # Exact where there are no cells, whatever the probes; and where all cells are searched.
    what = Retrieve(neighbours=3, exact_below=exact_below, cells=20, probes=1 if exact_below > 950 else 20)
    facts = retrieve(
        ENGINE, table, queries, tmp_path / "out", what, kept=save_column(tmp_path / "kept", "kept", kept, pa.bool_())
    )
    allowed = kept & ~np.isin(np.arange(950), [5, 940])
    found_a = nearest(heap, np.delete(a, 2, axis=0), 3, allowed)
    found_b = nearest(heap, b, 7, allowed)
    expected = [[n for n, f in (("a", found_a), ("b & <b>", found_b)) if i in f] for i in range(950)]
    assert sets_of(tmp_path / "out") == expected
    table.aligned(Table(tmp_path / "out"))
    assert Table(tmp_path / "out").schema.field("sets").type == pa.list_(pa.string())
    distinct_a, distinct_b = len(np.unique(found_a)), len(np.unique(found_b))
    both = len(np.union1d(found_a, found_b))
    assert facts["composition"] == [
        {
            "set": "a", "mode": "sample", "queries": 69, "retrieved": 3 * 69,
            "collisions": 3 * 69 - distinct_a, "chosen": distinct_a,
        },
        {
            "set": "b & <b>", "mode": "sample", "queries": 33, "retrieved": 7 * 33,
            "collisions": 7 * 33 - distinct_b, "chosen": distinct_b,
        },
    ]  # fmt: skip
    assert distinct_a < 3 * 69
    assert facts["images"] == both
    assert facts["shared"] == distinct_a + distinct_b - both > 0
    assert not (tmp_path / "out" / SCRATCH).exists()


def test_few_probes_find_most(tmp_path):
    heap, queries = points(0, 3000), points(1, 200)
    table = save_vectors(tmp_path / "heap", heap)
    what = Retrieve(exact_below=100, cells=50, probes=12)
    retrieve(ENGINE, table, [Query("q", save_vectors(tmp_path / "q", queries), "sample")], tmp_path / "out", what)
    found = {i for i, sets in enumerate(sets_of(tmp_path / "out")) if sets}
    expected = set(nearest(heap, queries, 4, np.ones(3000, bool)).flatten().tolist())
    assert 0.8 < len(found & expected) / len(expected) < 1


def near(vectors, rows, seed):
    """Points close to some of the vectors."""
    noise = 0.01 * torch.from_numpy(np.random.default_rng(seed).standard_normal((len(rows), D))).float()
    return torch.nn.functional.normalize(vectors[list(rows)] + noise, dim=1)


def clustered(tmp_path, kept=None):
    heap = points(0, 600)
    clusters, cluster = save_clusters(tmp_path / "clusters", heap, 12, missing=[7])
    # Four images in cluster 0, three in cluster 1, five in cluster 2: more than three are needed.
    query = near(heap, [0] * 4 + [1] * 3 + [2] * 5, 1)
    return save_vectors(tmp_path / "heap", heap), clusters, cluster, save_vectors(tmp_path / "query", query, part=5)


def test_images_of_clusters_that_are_hit_are_retrieved(tmp_path):
    heap, clusters, cluster, query = clustered(tmp_path)
    kept = [i % 3 != 0 for i in range(600)]
    table = save_column(tmp_path / "kept", "kept", kept, pa.bool_())
    out = tmp_path / "out"
    facts = retrieve(ENGINE, heap, [Query("q", query, "cluster")], out, Retrieve(), clusters=clusters, kept=table)
    members = [i for i in range(600) if cluster[i] in (0, 2) and kept[i]]
    assert [i for i, sets in enumerate(sets_of(out)) if sets] == members
    count = len(members)
    row = {"set": "q", "mode": "cluster", "queries": 12, "retrieved": count, "collisions": 0, "chosen": count}
    assert facts["composition"] == [row]
    assert (facts["images"], facts["shared"]) == (count, 0)


def test_one_hit_less_is_enough_when_asked(tmp_path):
    heap, clusters, cluster, query = clustered(tmp_path)
    retrieve(ENGINE, heap, [Query("q", query, "cluster")], tmp_path / "out", Retrieve(hits=2), clusters=clusters)
    found = {cluster[i] for i, sets in enumerate(sets_of(tmp_path / "out")) if sets}
    assert found == {0, 1, 2}


def test_so_many_are_drawn_of_each_cluster_and_then_capped(tmp_path):
    heap, clusters, cluster, query = clustered(tmp_path)
    sizes = {c: cluster.count(c) for c in (0, 2)}
    most = min(sizes.values()) - 5
    queries = [Query("q", query, "cluster"), Query("again", query, "cluster")]
    what = Retrieve(cell_images=most)
    facts = retrieve(ENGINE, heap, queries, tmp_path / "out", what, clusters=clusters)
    for name in ("q", "again"):
        drawn = [i for i, sets in enumerate(sets_of(tmp_path / "out")) if name in sets]
        assert [sum(cluster[i] == c for i in drawn) for c in (0, 2)] == [most, most]
    assert [row["retrieved"] for row in facts["composition"]] == [2 * most, 2 * most]
    assert facts["images"] > 2 * most  # each set draws by itself
    assert facts["shared"] == 4 * most - facts["images"]

    capped = Retrieve(cell_images=most, cap=most + 1)
    facts = retrieve(ENGINE, heap, queries[:1], tmp_path / "capped", capped, clusters=clusters)
    some = [i for i, sets in enumerate(sets_of(tmp_path / "capped")) if sets]
    all_of_it = [i for i, sets in enumerate(sets_of(tmp_path / "out")) if "q" in sets]
    assert len(some) == facts["composition"][0]["chosen"] == most + 1
    assert set(some) < set(all_of_it)
    assert facts["composition"][0]["retrieved"] == 2 * most

    other = Retrieve(cell_images=most, seed=1)
    retrieve(ENGINE, heap, queries[:1], tmp_path / "other", other, clusters=clusters)
    assert [i for i, sets in enumerate(sets_of(tmp_path / "other")) if sets] != all_of_it


def test_the_cap_is_fair_to_small_and_large_clusters(tmp_path):
    """Of two clusters of which as many were drawn, as many stay: keys that drew them would favour the larger one."""
    cluster = [0] * 1900 + [1] * 100
    clusters = save_column(tmp_path / "clusters", "cluster", cluster, pa.int32())
    centroids = torch.eye(D)[:2]
    save_file({"centroids.1": centroids}, tmp_path / "clusters" / "levels.safetensors")
    heap = save_vectors(tmp_path / "heap", centroids[cluster])
    query = Query("q", save_vectors(tmp_path / "q", centroids.repeat(4, 1)), "cluster")
    what = Retrieve(cell_images=100, cap=100)
    retrieve(ENGINE, heap, [query], tmp_path / "out", what, clusters=Table(clusters.path))
    chosen = [cluster[i] for i, sets in enumerate(sets_of(tmp_path / "out")) if sets]
    assert 30 <= chosen.count(1) <= 70


def test_table_15_in_small(tmp_path):
    """A set as it is and by sample with N = 4, one with N = 32, and one by cluster: nominal counts as in the paper."""
    heap = points(0, 4000)
    big, train = points(1, 300), points(2, 41)
    clusters, _ = save_clusters(tmp_path / "clusters", heap, 10)
    small = near(heap, [3] * 30, 5)
    sets = {"big": big, "train": train, "small": small}
    tables = {name: save_vectors(tmp_path / name, vectors) for name, vectors in sets.items()}
    queries = [
        Query("big", tables["big"], "as-is"),
        Query("big", tables["big"], "sample"),
        Query("train", tables["train"], "sample", nearest=32),
        Query("small", tables["small"], "cluster"),
    ]
    what = Retrieve(cell_images=60, cap=50)
    facts = retrieve(ENGINE, save_vectors(tmp_path / "heap", heap), queries, tmp_path / "out", what, clusters=clusters)
    as_is, sample, more, by_cluster = facts["composition"]
    assert as_is == {
        "set": "big", "mode": "as-is", "queries": 300, "retrieved": None, "collisions": 0, "chosen": 300,
    }  # fmt: skip
    assert (sample["queries"], sample["retrieved"]) == (300, 1200)
    assert (more["queries"], more["retrieved"]) == (41, 32 * 41)
    assert (by_cluster["queries"], by_cluster["retrieved"], by_cluster["chosen"]) == (30, 60, 50)
    found = sets_of(tmp_path / "out")
    for row in facts["composition"][1:]:
        assert row["chosen"] == sum(row["set"] in names for names in found)
        assert row["mode"] == "cluster" or row["collisions"] == row["retrieved"] - row["chosen"]
    assert facts["images"] == sum(bool(names) for names in found)
    assert facts["images"] + facts["shared"] == sum(row["chosen"] for row in facts["composition"][1:])


def test_only_sets_as_they_are(tmp_path):
    heap = save_vectors(tmp_path / "heap", points(0, 250))
    facts = retrieve(ENGINE, heap, [Query("q", heap, "as-is")], tmp_path / "out", Retrieve())
    assert sets_of(tmp_path / "out") == [[]] * 250
    assert facts["images"] == facts["shared"] == 0


def test_fewer_images_than_asked_for_are_all_retrieved(tmp_path):
    heap = save_vectors(tmp_path / "heap", points(0, 3))
    queries = [Query("q", save_vectors(tmp_path / "q", points(1, 5)), "sample")]
    (row,) = retrieve(ENGINE, heap, queries, tmp_path / "out", Retrieve())["composition"]
    assert row == {"set": "q", "mode": "sample", "queries": 5, "retrieved": 15, "collisions": 12, "chosen": 3}


def test_a_set_too_small_for_its_clusters_retrieves_nothing(tmp_path):
    heap, clusters, _, _ = clustered(tmp_path)
    query = Query("few", save_vectors(tmp_path / "few", points(1, 3)), "cluster")
    (row,) = retrieve(ENGINE, heap, [query], tmp_path / "out", Retrieve(), clusters=clusters)["composition"]
    assert (row["queries"], row["retrieved"], row["chosen"]) == (3, 0, 0)


@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4))
@settings(max_examples=12)
def test_counts_add_up(tmp_path_factory, seed, sizes):
    folder = tmp_path_factory.mktemp("any")
    heap = points(seed, 130)
    clusters, _ = save_clusters(folder / "clusters", heap, 5)
    queries = [
        Query(f"set{i}", save_vectors(folder / f"q{i}", points(seed + 1 + i, n), part=11), ("sample", "cluster")[i % 2])
        for i, n in enumerate(sizes)
    ]
    what = Retrieve(neighbours=2, cell_images=9, cap=15, seed=seed)
    facts = retrieve(
        ENGINE, save_vectors(folder / "heap", heap, part=37), queries, folder / "out", what,
        clusters=_repart(clusters, folder / "same", 37),
    )  # fmt: skip
    found = sets_of(folder / "out")
    for row, query, n in zip(facts["composition"], queries, sizes, strict=True):
        assert row["queries"] == n
        assert row["chosen"] == sum(query.name in names for names in found)
        if query.mode == "sample":
            assert row["retrieved"] == 2 * n == row["chosen"] + row["collisions"]
        else:
            assert (row["chosen"], row["collisions"]) == (min(15, row["retrieved"]), 0)
    assert facts["images"] == sum(bool(names) for names in found)


def _repart(clusters, folder, part):
    values = pa.concat_tables(pq.read_table(file) for file in sorted(clusters.path.glob("*.parquet")))["cluster"]
    save_column(folder, "cluster", values.to_pylist(), pa.int32(), part)
    (folder / "levels.safetensors").write_bytes((clusters.path / "levels.safetensors").read_bytes())
    return Table(folder)


def test_memory_does_not_change_what_is_drawn(tmp_path, monkeypatch):
    heap, clusters, _, query = clustered(tmp_path)
    queries = [Query("q", query, "cluster"), Query("s", query, "sample")]
    what = Retrieve(cell_images=20, cap=31)
    one = retrieve(ENGINE, heap, queries, tmp_path / "one", what, clusters=clusters)
    with monkeypatch.context() as patch:
        patch.setattr(module, "passes", lambda counts, _: [range(i, i + 1) for i in range(len(counts))])
        patch.setattr(module, "tasks_of", lambda parts, *_: [[i] for i in parts])
        patch.setattr(module, "_ROWS", 128)
        many = retrieve(Engine(threads=2, memory=0.06), heap, queries, tmp_path / "many", what, clusters=clusters)
    assert sets_of(tmp_path / "one") == sets_of(tmp_path / "many")
    assert [one[key] for key in ("composition", "images")] == [many[key] for key in ("composition", "images")]


def refused(tmp_path, said, queries=None, heap=None, **others):
    heap = heap or save_vectors(tmp_path / "heap", points(0, 150))
    given = queries or [Query("q", save_vectors(tmp_path / "q", points(1, 5)), "sample")]
    with pytest.raises(OpsinError, match=said) as caught:
        retrieve(ENGINE, heap, given, tmp_path / "out", Retrieve(), **others)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [0, 4])
def test_an_empty_set_is_named(tmp_path, rows):
    table = save_vectors(tmp_path / "birds", points(0, rows), missing=range(rows))
    queries = [Query("q", save_vectors(tmp_path / "q", points(1, 5)), "sample"), Query("birds", table, "sample")]
    refused(tmp_path, "the set 'birds' is empty", queries)
    assert not (tmp_path / "out").exists()


def test_other_dimensions_are_told(tmp_path):
    queries = [Query("birds", save_vectors(tmp_path / "q", points(1, 5, 6)), "sample")]
    refused(
        tmp_path, "the set 'birds' has vectors of 6 numbers and the heap of 8: embed both with one network", queries
    )


def embedded(folder, name, size, rows):
    step = Step(folder, "embed", {"fingerprints": [name], "size": size})
    write_part(step.part(0), pa.table({"semantic": vector_array(points(0, rows), np.arange(rows), rows)}))
    step.finish({})
    return Table(folder)


@pytest.mark.parametrize(("name", "size"), [("b", 224), ("a", 112)])
def test_another_network_of_equal_width_is_told(tmp_path, name, size):
    heap = embedded(tmp_path / "heap", "a", 224, 100)
    refused(
        tmp_path, "'q' was embedded with another", [Query("q", embedded(tmp_path / "q", name, size, 9), "as-is")], heap
    )
    retrieve(
        ENGINE, heap, [Query("q", embedded(tmp_path / "same", "a", 224, 9), "as-is")], tmp_path / "out", Retrieve()
    )


def test_an_unknown_mode_is_told(tmp_path):
    with pytest.raises(OpsinError, match="unknown mode of the set birds 'samples': did you mean 'sample'"):
        Query("birds", save_vectors(tmp_path / "q", points(1, 5)), "samples")


def test_clusters_are_asked_for(tmp_path):
    queries = [Query("birds", save_vectors(tmp_path / "q", points(1, 5)), "cluster")]
    refused(tmp_path, "'birds' is to be retrieved by clusters, .* `opsin curate cluster`", queries)


def test_clusters_without_centroids_or_of_other_vectors_are_told(tmp_path):
    heap, clusters, _, query = clustered(tmp_path)
    save_file({"centroids.1": torch.eye(3)}, clusters.path / "levels.safetensors")
    queries = [Query("birds", query, "cluster")]
    refused(tmp_path, "are of vectors of 3 numbers, the heap's have 8", queries, heap, clusters=clusters)
    (clusters.path / "levels.safetensors").write_bytes(b"broken")
    refused(tmp_path, "levels.safetensors is missing or damaged", queries, heap, clusters=clusters)
    (clusters.path / "levels.safetensors").unlink()
    refused(tmp_path, "levels.safetensors is missing or damaged", queries, heap, clusters=clusters)


def test_names_are_different_and_there_is_one(tmp_path):
    query = Query("birds", save_vectors(tmp_path / "q", points(1, 5)), "sample")
    refused(tmp_path, "two sets are named 'birds'", [query, Query("birds", query.vectors, "cluster")])
    refused(tmp_path, "two sets are named 'birds'", [Query("birds", query.vectors, "as-is")] * 2, query.vectors)
    with pytest.raises(OpsinError, match="no sets are given"):
        retrieve(ENGINE, query.vectors, [], tmp_path / "out", Retrieve())


def test_tables_are_of_the_same_images(tmp_path):
    kept = save_column(tmp_path / "kept", "kept", [True] * 120, pa.bool_())
    refused(tmp_path, "are not of the same images", kept=kept)


def test_nothing_kept_is_told(tmp_path):
    kept = save_column(tmp_path / "kept", "kept", [False] * 150, pa.bool_())
    refused(tmp_path, "there are no vectors to compare", kept=kept)


@pytest.mark.parametrize(
    "wrong",
    [{"neighbours": 0}, {"cell_images": 0}, {"hits": -1}, {"cap": 0}, {"cells": 0}, {"probes": 0}, {"seed": -1}],
)
def test_settings_out_of_range_are_told(wrong):
    with pytest.raises(OpsinError, match=f"retrieve.{next(iter(wrong))} is"):
        Retrieve(**wrong)


def test_what_is_done_is_left_and_other_settings_refused(tmp_path):
    heap, clusters, _, query = clustered(tmp_path)
    queries = [Query("s", query, "sample"), Query("q", query, "cluster")]
    facts = retrieve(ENGINE, heap, queries, tmp_path / "out", Retrieve(), clusters=clusters)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert retrieve(ENGINE, heap, queries, tmp_path / "out", Retrieve(), clusters=clusters) == facts
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    with pytest.raises(OpsinError, match="made with other neighbours"):
        retrieve(ENGINE, heap, queries, tmp_path / "out", Retrieve(neighbours=5), clusters=clusters)
    with pytest.raises(OpsinError, match=r"made with other .*sets"):
        retrieve(ENGINE, heap, queries[:1], tmp_path / "out", Retrieve(), clusters=clusters)


def test_sets_that_are_done_are_not_searched_again(tmp_path, monkeypatch):
    clustered(tmp_path)
    whole, out = _retrieve_all(tmp_path, tmp_path / "whole"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module._Write, "__call__", lambda *_: pytest.fail("stopped"))
        patch.setattr(Engine, "run", _here)
        with pytest.raises(pytest.fail.Exception, match="stopped"):
            _retrieve_all(tmp_path, out)
    for name in ("search", "build_cells", "smallest"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("searched again"))
    assert _retrieve_all(tmp_path, out)["composition"] == whole["composition"]
    assert sets_of(out) == sets_of(tmp_path / "whole")


def _retrieve_all(folder, out):
    """What the killed process runs, and the one after it."""
    queries = [Query("s", Table(folder / "query"), "sample"), Query("q", Table(folder / "query"), "cluster")]
    what = Retrieve(exact_below=10, cells=8, probes=8, cell_images=20, cap=31)
    return retrieve(ENGINE, Table(folder / "heap"), queries, out, what, clusters=Table(folder / "clusters"))


def test_stopped_after_every_file_it_goes_on_to_the_same(tmp_path, monkeypatch):
    clustered(tmp_path)
    whole = _retrieve_all(tmp_path, tmp_path / "whole")
    replace, stops = Path.replace, 0
    for after in range(200):
        left = [after]

        def stops_here(self, target, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stops_here)
            patch.setattr(Engine, "run", _here)
            try:
                facts = _retrieve_all(tmp_path, tmp_path / f"out{after % 7}")  # gone on with by a later turn
            except KeyboardInterrupt:
                stops += 1
                continue
        assert [facts[key] for key in ("composition", "images")] == [whole[key] for key in ("composition", "images")]
        assert sets_of(tmp_path / f"out{after % 7}") == sets_of(tmp_path / "whole")
        if all((tmp_path / f"out{i}" / "part-00000005.parquet").exists() for i in range(7)):
            break
    assert stops > 7


def _here(self, what, work, tasks, *, total=None, unit="images"):
    """As `Engine.run`, in this thread, so that a stop leaves nothing running."""
    for number, task in enumerate(tasks):
        yield number, work(json.loads(json.dumps(task)), self)


def test_killed_it_goes_on_to_the_same(tmp_path):
    clustered(tmp_path)
    whole = _retrieve_all(tmp_path, tmp_path / "whole")
    out = tmp_path / "out"
    run = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_retrieve as t; from pathlib "
    run += f"import Path; t._retrieve_all(Path({str(tmp_path)!r}), Path({str(out)!r}))"
    process = subprocess.Popen([sys.executable, "-c", run])
    while not (out / SCRATCH / "pool" / "cells.json").exists() and process.poll() is None:
        time.sleep(0.002)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert _retrieve_all(tmp_path, out)["composition"] == whole["composition"]
    assert sets_of(out) == sets_of(tmp_path / "whole")
