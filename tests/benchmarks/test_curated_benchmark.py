import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import curated


@pytest.fixture
def pools():
    draw = torch.Generator().manual_seed(0)
    return [[torch.randint(0, 256, (3, 64, 64), generator=draw).byte() for _ in range(12)] for _ in range(14)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(curated, "MOST", 12)
    monkeypatch.setattr(curated, "JUNK", 2)


def test_a_heap_holds_what_it_says(tmp_path, pools):
    truth = curated.make_heap(tmp_path / "heap", pools, 3)
    assert sorted(truth) == sorted(path.name for path in (tmp_path / "heap").iterdir())
    counts = Counter(concept for concept, _ in truth.values())
    assert counts[-1] == 2 * len(curated.KINDS)
    # of 12 / r images, those of the first three ranks three times; ranks 13 and 14 have none
    assert sorted(counts[concept] for concept in range(10)) == sorted([36, 18, 12, 3, 2, 2, 1, 1, 1, 1])
    assert sum(counts[concept] for concept in range(10, 14)) == 2
    held = curated.told(list(truth), truth, len(pools))
    assert held["copies"] == 2 * (12 + 6 + 4)
    assert held["distinct"] + held["copies"] + held["junk"] == held["images"] == len(truth)
    for name, (concept, which) in truth.items():
        if which == "broken":
            with pytest.raises(OSError):
                Image.open(tmp_path / "heap" / name).load()
        elif concept >= 0 and name.endswith(".png"):
            assert min(Image.open(tmp_path / "heap" / name).size) >= curated.LOW


def test_a_seed_is_a_heap(tmp_path, pools):
    first, again, other = (
        curated.make_heap(tmp_path / name, pools, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in first)
    assert curated.make_heap(tmp_path / "a", pools, 1) == first


def test_a_copy_is_near_but_not_equal(tmp_path):
    wave = (127 + 120 * np.sin(np.arange(64) / 8)).astype(np.uint8)
    picture = Image.fromarray(np.stack([np.minimum.outer(wave, wave)] * 3, axis=2))
    for seed in range(12):
        path = curated.repost(picture, tmp_path / str(seed), np.random.default_rng(seed))
        found = np.array(Image.open(path).convert("RGB").resize((64, 64)), dtype=float)
        difference = np.abs(found - np.array(picture))
        assert 0 < difference.mean() < 30


def test_divergence_is_that_of_scipy():
    counts = [5, 0, 3, 92]
    assert curated.divergence(counts) == pytest.approx(entropy(counts, [1] * 4))
    assert curated.divergence([7, 7, 7]) == pytest.approx(0)


def test_the_most_even_choice_counts_every_image_once():
    truth = {
        f"{concept}-{which}-{copy}": (concept, str(which)) for concept in (0, 1) for which in (0, 1) for copy in (0, 1)
    }
    truth["alone"] = (2, "0")
    assert curated.possible(list(truth), truth, 3, 3) == pytest.approx(0)
    assert curated.possible(list(truth), truth, 3, 5) == pytest.approx(entropy([2, 2, 1], [1] * 3))


def test_every_query_is_found_by_features_that_know_it():
    right = torch.arange(12).repeat(2)
    perfect = torch.nn.functional.one_hot(right, 12).float()
    found = curated.measure((perfect, perfect), right, right, 12)
    assert {name: one.figures["knn"] for name, one in found.items()} == dict.fromkeys(curated.GROUPS, 1.0)
    assert [len(found[name].items) for name in curated.GROUPS] == [24, 20, 4]
    blind = torch.ones(24, 12)
    assert curated.measure((blind, perfect), right, right, 12)["all"].figures["knn"] < 0.2


def test_a_tree_evens_out_a_mixture(tmp_path, monkeypatch):
    for name, value in (("PLANTED", 2_000), ("MIXED", 8), ("CHOSEN", 160), ("TREE", (64, 16))):
        monkeypatch.setattr(curated, name, value)
    found = curated.planted(tmp_path / "mixture", 0)
    assert found["hierarchical"] < found["plain k-means, 64"] < found["at random"]
    assert found["at random"] == pytest.approx(found["the heap"], abs=0.2)
