import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from opsin.curate.engine import Engine
from opsin.curate.groups import imbalance
from opsin.curate.sample import LEVELS, Sample, balanced, sample, shares
from opsin.curate.tables import Step, Table, read, write_part
from opsin.errors import OpsinError

ENGINE = Engine(threads=1, memory=0.2)


@st.composite
def trees(draw):
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    groups, children = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    sizes = random.integers(0, draw(st.sampled_from([2, 30, 10_000])), children)
    parent = random.integers(0, groups, children)
    totals = np.bincount(parent, weights=sizes, minlength=groups).astype(np.int64)
    return random.integers(0, totals + 1), sizes, parent, random.random(children)


@settings(max_examples=300, deadline=None)
@given(tree=trees())
def test_a_share_is_divided_as_evenly_as_sizes_allow(tree):
    share, sizes, parent, order = tree
    given_ = balanced(share, sizes, parent, order)
    assert (given_ <= sizes).all()
    assert (given_ >= 0).all()
    assert np.bincount(parent, weights=given_, minlength=len(share)).astype(int).tolist() == share.tolist()
    for group in range(len(share)):
        inside = parent == group
        if (given_[inside] < sizes[inside]).any():  # nobody has more than one above a child that could give more
            assert given_[inside].max() <= given_[inside & (given_ < sizes)].min() + 1


@settings(max_examples=150, deadline=None)
@given(tree=trees(), more=st.integers(0, 50))
def test_a_larger_share_takes_from_no_child(tree, more):
    share, sizes, parent, order = tree
    totals = np.bincount(parent, weights=sizes, minlength=len(share)).astype(np.int64)
    larger = np.minimum(share + more, totals)
    assert (balanced(larger, sizes, parent, order) >= balanced(share, sizes, parent, order)).all()


def test_the_top_is_balanced_before_what_lies_below():
    sizes = [np.array([100, 100, 100, 100, 100]), np.array([400, 100])]
    counts = shares(80, sizes, [np.array([0, 0, 0, 0, 1])], 0)
    assert counts.tolist() == [10, 10, 10, 10, 40]
    assert shares(10**6, sizes, [np.array([0, 0, 0, 0, 1])], 0).tolist() == [100] * 5


def test_who_gets_what_is_left_depends_on_the_seed_only():
    sizes, parents = [np.full(100, 9), np.full(10, 90)], [np.repeat(np.arange(10), 10)]
    some = [shares(57, sizes, parents, seed).tolist() for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2]
    assert set(some[0]) == {0, 1}


def write_clusters(folder, sizes, parents, parts=3, seed=0, nulls=7):
    random = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(len(sizes[0])), sizes[0]).astype(np.int32)
    cluster = random.permutation(np.concatenate([cluster, np.full(nulls, -1, dtype=np.int32)]))
    distance = random.random(len(cluster)).astype(np.float32)
    step = Step(folder, "cluster", {"made": seed})
    for number, rows in enumerate(np.array_split(np.arange(len(cluster)), parts)):
        none = cluster[rows] < 0
        columns = {"cluster": pa.array(cluster[rows], mask=none), "distance": pa.array(distance[rows], mask=none)}
        write_part(step.part(number), pa.table(columns))
    tree = {f"sizes.{t + 1}": np.array(size) for t, size in enumerate(sizes)}
    save_file(tree | {f"parents.{t + 1}": np.array(parent) for t, parent in enumerate(parents)}, folder / LEVELS)
    step.finish({})
    return Table(folder), cluster, distance


def chosen(folder):
    table = Table(folder)
    assert table.schema.names == ["chosen"]
    return np.concatenate([read(part, ["chosen"])["chosen"].to_numpy() for part in table.parts])


SIZES = [np.array([300, 20, 5, 60, 0, 9]), np.array([325, 69])]
PARENTS = [np.array([0, 0, 0, 1, 1, 1])]


@pytest.mark.parametrize("within", ["random", "closest"])
def test_a_sample_has_the_shares_and_says_so(tmp_path, within):
    table, cluster, distance = write_clusters(tmp_path / "clusters", SIZES, PARENTS)
    facts = sample(ENGINE, table, tmp_path / "sample", Sample(100, within))
    taken = chosen(tmp_path / "sample")
    expected = shares(100, SIZES, PARENTS, 0)
    assert np.bincount(cluster[taken], minlength=6).tolist() == expected.tolist()
    assert not taken[cluster < 0].any()
    assert (facts["chosen"], facts["wanted"], facts["clustered"]) == (100, 100, 394)
    assert [level["after"]["images"] for level in facts["levels"]] == [100, 100]
    assert facts["levels"][1]["imbalance_after"] == pytest.approx(0)
    assert facts["levels"][1]["imbalance_before"] == pytest.approx(imbalance(SIZES[1]))
    for group in range(6):
        inside = np.sort(distance[cluster == group])
        picked = np.sort(distance[(cluster == group) & taken])
        assert (picked.tolist() == inside[: len(picked)].tolist()) == (
            within == "closest" or len(picked) == len(inside)
        )


def test_more_than_there_are_takes_all(tmp_path):
    table, cluster, _ = write_clusters(tmp_path / "clusters", SIZES, PARENTS)
    facts = sample(ENGINE, table, tmp_path / "sample", Sample(10**6))
    assert (facts["chosen"], facts["wanted"]) == (394, 10**6)
    assert chosen(tmp_path / "sample").tolist() == (cluster >= 0).tolist()


def test_a_sample_depends_on_its_seed_only(tmp_path, monkeypatch):
    table, *_ = write_clusters(tmp_path / "clusters", SIZES, PARENTS)
    sample(ENGINE, table, tmp_path / "a", Sample(100))
    sample(ENGINE, table, tmp_path / "b", Sample(100, seed=1))
    monkeypatch.setattr("opsin.curate.sample.passes", lambda counts, _: [range(1), range(1, 4), range(4, len(counts))])
    sample(ENGINE, table, tmp_path / "c", Sample(100))
    assert chosen(tmp_path / "a").tolist() == chosen(tmp_path / "c").tolist() != chosen(tmp_path / "b").tolist()


def test_a_stopped_sample_goes_on(tmp_path, monkeypatch):
    table, *_ = write_clusters(tmp_path / "clusters", SIZES, PARENTS, parts=6)
    sample(ENGINE, table, tmp_path / "whole", Sample(100))
    written = []

    def stop(path, part):
        if len(written) == 3:
            raise OpsinError("stopped")
        written.append(path)
        write_part(path, part)

    monkeypatch.setattr("opsin.curate.sample.write_part", stop)
    with pytest.raises(OpsinError, match="stopped"):
        sample(ENGINE, table, tmp_path / "sample", Sample(100))
    monkeypatch.setattr("opsin.curate.sample.write_part", write_part)
    before = written[0].stat().st_mtime_ns
    sample(ENGINE, table, tmp_path / "sample", Sample(100))
    assert chosen(tmp_path / "sample").tolist() == chosen(tmp_path / "whole").tolist()
    assert written[0].stat().st_mtime_ns == before
    assert not (tmp_path / "sample" / "scratch").exists()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(OpsinError, match=r"sample\.images is 0"):
        Sample(0)
    with pytest.raises(OpsinError, match="give random or closest"):
        Sample(5, "best")
    table, *_ = write_clusters(tmp_path / "clusters", SIZES, PARENTS)
    (tmp_path / "clusters" / LEVELS).unlink()
    with pytest.raises(OpsinError, match=r"there is no .*levels\.safetensors"):
        sample(ENGINE, table, tmp_path / "sample", Sample(5))
