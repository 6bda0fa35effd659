import subprocess
import sys
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from opsin.curate import cluster as module
from opsin.curate import splitting, streaming
from opsin.curate.cluster import Cluster, cluster, levels_for
from opsin.curate.engine import Engine
from opsin.curate.groups import imbalance
from opsin.curate.kmeans import assign, lloyd
from opsin.curate.sample import LEVELS, Sample, sample
from opsin.curate.tables import Table, read, write_part
from opsin.curate.vectors import Column, read_vectors, vector_array
from opsin.errors import OpsinError

ENGINE = Engine(threads=1, memory=0.5)
SMALL = Cluster(levels=(30, 6, 2), iterations=8, resample=2)


def mixture(m, d=16, centres=12, seed=0, spread=0.6, weights=None):
    random = torch.Generator().manual_seed(seed)
    where = torch.multinomial(torch.ones(centres) if weights is None else weights, m, True, generator=random)
    mixed = torch.randn(centres, d, generator=random)[where] + spread * torch.randn(m, d, generator=random)
    return torch.nn.functional.normalize(mixed, dim=1), where.numpy()


def write_vectors(folder, vectors, parts=1, there=None):
    """A table of `vectors` at the rows `there`, all others null."""
    folder.mkdir()
    there = np.arange(len(vectors)) if there is None else there
    rows = int(there[-1]) + 1
    for number, some in enumerate(np.array_split(np.arange(rows), parts)):
        inside = np.flatnonzero((there >= some[0]) & (there <= some[-1]))
        column = vector_array(vectors[inside], there[inside] - some[0], len(some)).cast(pa.list_(pa.float16()))
        write_part(folder / f"part-{number:08d}.parquet", pa.table({"semantic": column}))
    return Table(folder)


def clusters(folder):
    table = Table(folder)
    assert table.schema == pa.schema({"cluster": pa.int32(), "distance": pa.float32()})
    read_ = [read(part, ["cluster", "distance"]) for part in table.parts]
    return (
        np.concatenate([part["cluster"].fill_null(-1).to_numpy() for part in read_]),
        np.concatenate([part["distance"].to_numpy() for part in read_]),
    )


def stored(table):
    return torch.cat([read_vectors(part, Column("semantic"), 16)[0] for part in table.parts])


def test_the_tree_fits_together(tmp_path):
    table = write_vectors(tmp_path / "vectors", mixture(900)[0], parts=4)
    facts = cluster(ENGINE, table, tmp_path / "out", SMALL)
    number, distance = clusters(tmp_path / "out")
    tree = load_file(tmp_path / "out" / LEVELS)
    found = assign(stored(table), torch.from_numpy(tree["centroids.1"]))
    assert number.tolist() == found[0].tolist()
    np.testing.assert_allclose(distance, found[1], atol=1e-6)
    images = number
    for level, k in enumerate(SMALL.levels, start=1):
        assert tree[f"centroids.{level}"].shape == (k, 16)
        assert tree[f"centroids.{level}"].dtype == np.float32
        assert tree[f"sizes.{level}"].tolist() == np.bincount(images, minlength=k).tolist()
        if level < 3:
            nearest = assign(*(torch.from_numpy(tree[f"centroids.{t}"]) for t in (level, level + 1)))[0]
            assert tree[f"parents.{level}"].tolist() == nearest.tolist()
            images = tree[f"parents.{level}"][images]
    assert set(tree) == {f"{a}.{t}" for a in ("centroids", "sizes", "parents") for t in (1, 2, 3)} - {"parents.3"}
    assert facts["images"] == 900
    assert [level["clusters"] for level in facts["levels"]] == [30, 6, 2]
    assert facts["cost"] == pytest.approx(float(distance.mean()), rel=1e-5)
    assert cluster(ENGINE, table, tmp_path / "out", SMALL) == facts
    assert not (tmp_path / "out" / "scratch").exists()


def test_streaming_finds_what_kmeans_in_memory_finds(tmp_path, monkeypatch):
    vectors = mixture(1500)[0]
    one = write_vectors(tmp_path / "one", vectors)
    settings = Cluster(levels=(40,), iterations=12)
    memory = lloyd(stored(one), 40, 12, 0).centroids
    monkeypatch.setattr(module, "_ROWS", 400)  # so there are several tasks
    found = {}
    for parts in (1, 7):
        table = one if parts == 1 else write_vectors(tmp_path / "seven", vectors, parts)
        cluster(ENGINE, table, tmp_path / f"out-{parts}", settings)
        found[parts] = load_file(tmp_path / f"out-{parts}" / LEVELS)["centroids.1"]
    assert np.array_equal(found[1], memory)
    np.testing.assert_allclose(found[7], memory, atol=1e-6)
    cluster(ENGINE, table, tmp_path / "again", settings)
    assert np.array_equal(load_file(tmp_path / "again" / LEVELS)["centroids.1"], found[7])


def test_a_level_is_made_again_from_the_closest_of_its_clusters(tmp_path):
    table = write_vectors(tmp_path / "vectors", mixture(900)[0])
    cluster(ENGINE, table, tmp_path / "out", Cluster(levels=(90, 9), iterations=8, resample=2, closest=(4,)))
    tree = load_file(tmp_path / "out" / LEVELS)
    points = some = torch.from_numpy(tree["centroids.1"])
    for turn in range(3):
        centroids = torch.from_numpy(lloyd(some, 9, 8, (2 << 40) + turn).centroids)
        parents, distance = assign(points, centroids)
        near = [
            row
            for k in range(9)
            for row in sorted((parents == k).nonzero()[:, 0].tolist(), key=lambda i: distance[i])[:4]
        ]
        some = points[sorted(near)]
    assert len(some) < 37
    assert np.array_equal(tree["centroids.2"], centroids.numpy())
    assert tree["parents.1"].tolist() == parents.tolist()


def test_images_without_a_vector_or_not_kept_have_no_cluster(tmp_path):
    vectors = mixture(400)[0]
    there = np.sort(np.random.default_rng(0).permutation(500)[:400])
    table = write_vectors(tmp_path / "vectors", vectors, parts=3, there=there)
    keep = np.random.default_rng(1).random(table.rows) < 0.7
    (tmp_path / "kept").mkdir()
    for i, part in enumerate(table.parts):
        here = pa.table({"kept": pa.array(keep[part.first : part.first + part.rows])})
        write_part(tmp_path / "kept" / f"{i}.parquet", here)
    facts = cluster(ENGINE, table, tmp_path / "out", Cluster(levels=(9, 3), resample=1), Table(tmp_path / "kept"))
    number, distance = clusters(tmp_path / "out")
    expected = np.zeros(table.rows, dtype=bool)
    expected[there] = True
    expected &= keep
    assert ((number >= 0) == expected).all()
    assert (np.isnan(distance) == ~expected).all()
    assert facts["images"] == expected.sum()
    alone = write_vectors(tmp_path / "alone", vectors[torch.from_numpy(keep[there])])
    cluster(ENGINE, alone, tmp_path / "alone-out", Cluster(levels=(9, 3), resample=1))
    levels = [load_file(tmp_path / name / LEVELS)["centroids.1"] for name in ("out", "alone-out")]
    np.testing.assert_allclose(*levels, atol=1e-6)


@pytest.mark.parametrize("split", [1, 5])
@pytest.mark.parametrize("broken", ["streaming", "writing", "levels"])
def test_a_stopped_step_goes_on_with_the_same_result(tmp_path, monkeypatch, split, broken):
    table = write_vectors(tmp_path / "vectors", mixture(900)[0], parts=4)
    settings = Cluster(levels=(30, 6, 2), iterations=5, resample=2, split=split)
    cluster(ENGINE, table, tmp_path / "whole", settings)
    where, name = {
        "streaming": (streaming, "statistics_of"),
        "writing": (module, "write_part"),
        "levels": (module, "lloyd"),
    }[broken]
    real, calls = getattr(where, name), []

    def stop(*given, **named):
        calls.append(given)
        if len(calls) == (11 if broken == "streaming" else 3):
            raise OpsinError("stopped")
        return real(*given, **named)

    monkeypatch.setattr(where, name, stop)
    with pytest.raises(OpsinError, match="stopped"):
        cluster(ENGINE, table, tmp_path / "out", settings)
    stopped = len(calls)
    cluster(ENGINE, table, tmp_path / "out", settings)
    if broken == "streaming":  # two iterations of four parts are kept
        assert len(calls) - stopped == 4 * 3
    if broken == "writing":
        assert len(calls) == 4 + 1
    for one, two in zip(clusters(tmp_path / "whole"), clusters(tmp_path / "out"), strict=True):
        assert np.array_equal(one, two)
    assert (tmp_path / "whole" / LEVELS).read_bytes() == (tmp_path / "out" / LEVELS).read_bytes()


def test_a_split_level_costs_little_more_than_a_whole_one(tmp_path):
    vectors = mixture(3000)[0]
    table = write_vectors(tmp_path / "vectors", vectors, parts=5)
    whole = cluster(ENGINE, table, tmp_path / "whole", Cluster(levels=(80, 8), resample=1))
    split = cluster(ENGINE, table, tmp_path / "split", Cluster(levels=(80, 8), resample=1, split=8))
    assert split["levels"][0]["clusters"] == 80
    assert split["cost"] < 1.1 * whole["cost"]
    nearest = assign(stored(table), torch.from_numpy(load_file(tmp_path / "split" / LEVELS)["centroids.1"]))[0]
    elsewhere = (nearest.numpy() != clusters(tmp_path / "split")[0]).mean()
    assert 0 < elsewhere < 0.2  # images stay in the cluster that was split
    little = Engine(threads=1, memory=0.05)  # hardly more than one bucket: the same clusters all the same
    cluster(little, table, tmp_path / "little", Cluster(levels=(80, 8), resample=1, split=8, sample=1000))
    cluster(ENGINE, table, tmp_path / "much", Cluster(levels=(80, 8), resample=1, split=8, sample=1000))
    assert np.array_equal(clusters(tmp_path / "little")[0], clusters(tmp_path / "much")[0])


def test_a_cluster_is_split_by_all_its_images_or_by_about_as_many_as_are_drawn(tmp_path, monkeypatch):
    table = write_vectors(tmp_path / "vectors", mixture(3000)[0], parts=5)
    seen = []
    monkeypatch.setattr(
        splitting, "lloyd", lambda *given, **named: seen.append(len(given[0])) or lloyd(*given, **named)
    )
    cluster(ENGINE, table, tmp_path / "all", Cluster(levels=(12,), split=3))
    assert (len(seen), sum(seen)) == (4, 3000)
    seen.clear()
    cluster(ENGINE, table, tmp_path / "some", Cluster(levels=(12,), split=3, sample=1))
    assert all(15 <= count <= 50 for count in seen)  # ten per piece


def test_pieces_are_only_as_many_as_images_differ(tmp_path):
    few = mixture(12)[0].repeat(40, 1)
    table = write_vectors(tmp_path / "vectors", few, parts=3)
    facts = cluster(ENGINE, table, tmp_path / "out", Cluster(levels=(40, 4), resample=1, split=10))
    assert facts["levels"][0]["clusters"] == 12
    assert facts["cost"] < 1e-6


def test_a_balanced_sample_is_nearer_to_equal_concepts_than_others(tmp_path):
    weights = 1 / torch.arange(1, 41).float() ** 1.5
    vectors, concept = mixture(12_000, centres=40, spread=0.25, weights=weights)
    table = write_vectors(tmp_path / "vectors", vectors, parts=3)

    def unevenness(levels):
        out = tmp_path / f"clusters-{len(levels)}"
        cluster(ENGINE, table, out, Cluster(levels=levels, resample=5))
        sample(ENGINE, Table(out), out.with_name(f"sample-{len(levels)}"), Sample(1000))
        parts = Table(out.with_name(f"sample-{len(levels)}")).parts
        taken = np.concatenate([read(part, ["chosen"])["chosen"].to_numpy() for part in parts])
        assert taken.sum() == 1000
        return imbalance(np.bincount(concept[taken], minlength=40))

    flat, tree = unevenness((400,)), unevenness((400, 100, 40))
    at_random = imbalance(np.bincount(np.random.default_rng(0).choice(concept, 1000, replace=False), minlength=40))
    assert tree < 0.7 * flat < 0.7 * at_random


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (10, 10)}, "fewer clusters at each level"),
        ({"levels": (10, 0)}, r"levels is \(10, 0\): give from 1"),
        ({"levels": (10, 2), "split": 3}, "a number that divides 10"),
        ({"levels": (10, 2), "closest": (3, 2)}, "closest has 2 numbers: give 1"),
        ({"precision": "fp8"}, "give fp32 or bf16"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(OpsinError, match=message):
        Cluster(**change)


def test_mistakes_are_named(tmp_path):
    table = write_vectors(tmp_path / "vectors", mixture(50)[0])
    with pytest.raises(OpsinError, match=r"has 50 images to cluster, fewer than the 60 clusters"):
        cluster(ENGINE, table, tmp_path / "a", Cluster(levels=(60, 3)))
    with pytest.raises(OpsinError, match=r"more than the 0\.05 GB of a task: give more --memory"):
        cluster(Engine(threads=1, memory=0.05), table, tmp_path / "b", Cluster(levels=(10**6, 3)))
    same = write_vectors(tmp_path / "same", mixture(5)[0].repeat(9, 1))
    with pytest.raises(OpsinError, match=r"of which only 5 are different, cannot make 6 clusters"):
        cluster(ENGINE, same, tmp_path / "c", Cluster(levels=(6, 2)))
    cluster(ENGINE, table, tmp_path / "d", Cluster(levels=(6, 2), resample=1))
    with pytest.raises(OpsinError, match="made with other levels"):
        cluster(ENGINE, table, tmp_path / "d", Cluster(levels=(7, 2), resample=1))


MEASURED = """
import sys
from pathlib import Path
from opsin.curate.cluster import Cluster, cluster
from opsin.curate.engine import Engine
from opsin.curate.tables import Table

def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

few, many, out = map(Path, sys.argv[1:])
engine = Engine(threads=1, memory=0.05)
settings = Cluster(levels=(20, 4), iterations=2, resample=1, sample=2000)
cluster(engine, Table(few), out / "few", settings)  # libraries and their buffers
before = held("VmHWM")
cluster(engine, Table(many), out / "many", settings)
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_table(tmp_path):
    vectors = torch.nn.functional.normalize(torch.randn(70_000, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    write_vectors(tmp_path / "few", vectors[:4000], parts=2)
    write_vectors(tmp_path / "many", vectors, parts=35)  # 72 MB in fp32, more than the 50 MB allowed
    paths = [str(tmp_path / name) for name in ("few", "many", "out")]
    done = subprocess.run([sys.executable, "-c", MEASURED, *paths], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 50e6


@given(st.integers(2, 2 * 10**9))
def test_levels_that_are_not_given_fit_the_heap(images):
    levels = levels_for(images)
    assert levels[0] <= max(2, images // 2)
    assert all(upper * 10 <= lower for lower, upper in pairwise(levels))
    assert levels[-1] < 40
    assert len(levels) == 1 or levels[-1] >= 4
