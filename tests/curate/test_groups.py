import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.curate.groups import imbalance, passes, size_histogram, smallest


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 300),
    groups=st.integers(1, 12),
    parts=st.integers(1, 5),
    memory=st.sampled_from([1, 2000, 10**9]),
    ties=st.booleans(),
)
def test_the_smallest_of_each_group_are_those_of_sorting_everything(seed, rows, groups, parts, memory, ties):
    random = np.random.default_rng(seed)
    group = random.integers(-1, groups, rows)
    key = random.integers(0, 4, rows).astype(float) if ties else random.random(rows)
    counts = random.integers(0, 9, groups)
    cuts = np.sort(random.integers(0, rows + 1, parts - 1))
    pieces = list(zip(*(np.split(array, cuts) for array in (group, key, np.arange(rows))), strict=True))
    expected = []
    for g in range(groups):
        inside = np.flatnonzero(group == g)
        expected += sorted(inside, key=lambda row: (key[row], row))[: counts[g]]
    assert smallest(lambda: pieces[::-1], counts, memory).tolist() == sorted(expected)


@pytest.mark.parametrize("order", ["falling", "rising", "random"])
def test_what_is_held_is_pruned_and_stays_right(monkeypatch, order):
    random = np.random.default_rng(0)
    rows, counts = 400_000, np.array([5, 0, 70])
    rising = np.arange(rows, dtype=float)
    key = {"falling": -rising, "rising": rising, "random": random.random(rows)}[order]
    group = random.integers(0, 3, rows)
    pieces = [(group[i : i + 9000], key[i : i + 9000], np.arange(i, min(i + 9000, rows))) for i in range(0, rows, 9000)]
    sorted_ = []
    real = np.lexsort
    monkeypatch.setattr(np, "lexsort", lambda keys: sorted_.append(len(keys[0])) or real(keys))
    found = smallest(lambda: pieces, counts, 10**9)
    expected = []
    for g in (0, 2):
        inside = np.flatnonzero(group == g)
        expected += inside[np.argsort(key[inside])[: counts[g]]].tolist()
    assert found.tolist() == sorted(expected)
    assert max(sorted_) < 2**16 + 9000
    if order != "falling":  # where every row beats those before it
        assert sum(sorted_) < 2**17


@given(counts=st.lists(st.integers(0, 50), max_size=30), memory=st.integers(1, 2000))
def test_passes_cover_all_groups_once_within_memory(counts, memory):
    ranges = passes(np.array(counts, dtype=np.int64), memory, 10)
    assert [group for some in ranges for group in some] == list(range(len(counts)))
    for some in ranges:
        held = counts[some.start : some.stop]
        assert sum(count > 0 for count in held) <= 1 or sum(held) * 10 <= memory  # a group is never cut


def test_histogram_counts_every_cluster_once():
    sizes = np.array([0, 1, 1, 5, 1000, 37])
    about = size_histogram(sizes)
    assert (about["clusters"], about["empty"], about["images"]) == (6, 1, 1044)
    assert sum(about["bins"]) == 5
    assert about["sorted"] == [1000, 37, 5, 1, 1]
    assert (about["smallest"], about["median"], about["largest"]) == (1, 5.0, 1000)
    many = size_histogram(np.arange(100_000))
    assert len(many["sorted"]) == len(many["ranks"]) <= 512
    assert sum(many["bins"]) == 99_999
    assert size_histogram(np.zeros(3, dtype=np.int64)) == {"clusters": 3, "empty": 3, "images": 0}


def test_imbalance_is_zero_for_equal_sizes_and_log_k_for_one_cluster():
    assert imbalance(np.array([7, 7, 7])) == pytest.approx(0)
    assert imbalance(np.array([9, 0, 0, 0])) == pytest.approx(np.log(4))
    assert imbalance(np.zeros(3, dtype=np.int64)) == 0
