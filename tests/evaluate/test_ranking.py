"""Rankings are judged as published: against twins that follow each rule step by step, and against other libraries."""

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as oracle

from opsin.evaluate import ranking
from opsin.evaluate.ranking import (
    average_precision,
    average_precision_at,
    blocks,
    decisions,
    global_average_precision,
    nearest,
    orders,
    precision_at,
    ranks_of,
    recall_at,
    trapezoidal_precision,
)


@st.composite
def judged(draw):
    """A ranking of some images, of which some are right and others junk."""
    kinds = draw(st.lists(st.sampled_from(["right", "wrong", "junk"]), min_size=1, max_size=30))
    order = draw(st.permutations(range(len(kinds))))
    of = {kind: np.array([i for i, k in enumerate(kinds) if k == kind], dtype=np.int64) for kind in ("right", "junk")}
    return np.array(order), of["right"], of["junk"]


def trapezoids(order, right, junk):
    """Oxford's rule as its authors describe it: strike junk from the list, walk down, add trapezoids."""
    walked = [image for image in order if image not in junk]
    area, precision, found = 0.0, 1.0, 0
    for place, image in enumerate(walked, 1):
        if image in right:
            found += 1
            area += (precision + found / place) / 2 / len(right)
        precision = found / place
    return area


@given(judged())
def test_average_precision_by_trapezoids_is_that_of_the_published_rule(case):
    order, right, junk = case
    if len(right):
        found = trapezoidal_precision(ranks_of(order, right, junk), len(right))
        assert found == pytest.approx(trapezoids(order.tolist(), set(right.tolist()), set(junk.tolist())))
        assert 0 < found <= 1


@given(judged(), st.integers(1, 35))
def test_ordinary_figures_are_those_of_scikit_learn(case, k):
    order, right, junk = case
    walked = [image for image in order.tolist() if image not in junk]
    relevant = np.isin(walked, right)
    ranks = ranks_of(order, right, junk)
    assert ranks.tolist() == np.flatnonzero(relevant).tolist()
    if not len(right):
        return
    assert average_precision(ranks, len(right)) == pytest.approx(
        oracle.average_precision_score(relevant, -np.arange(len(walked)))
    )
    assert recall_at(ranks, k) == relevant[:k].any()
    assert precision_at(ranks, k) == pytest.approx(relevant[:k].sum() / k)
    wanted = sum(relevant[: i + 1].mean() for i in range(min(k, len(walked))) if relevant[i]) / min(k, len(right))
    assert average_precision_at(ranks, len(right), k) == pytest.approx(wanted)


def test_average_precisions_by_hand():
    ranks = ranks_of(np.array([5, 0, 1, 2, 3]), np.array([0, 2]), np.array([5]))
    assert ranks.tolist() == [0, 2]  # the junk image 5 leaves the first place to 0
    assert average_precision(ranks, 2) == pytest.approx((1 + 2 / 3) / 2)
    assert trapezoidal_precision(ranks, 2) == pytest.approx(((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    assert average_precision(ranks, 4) == pytest.approx((1 + 2 / 3) / 4)  # two are not in the list at all


def gap_twin(right, confidence, count):
    """GAP, its sum written out: over queries by falling confidence, wrong before right where equal."""
    listed = sorted(zip(confidence, right, strict=True), key=lambda one: (-one[0], one[1]))
    total, hits = 0.0, 0
    for place, (_, hit) in enumerate(listed, 1):
        hits += hit
        total += hit * hits / place
    return total / count


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=25))
def test_global_average_precision_is_its_sum(cases):
    right, confidence = (np.array(one) for one in zip(*cases, strict=True))
    found = global_average_precision(right.astype(bool), confidence.astype(float), len(cases))
    assert found.sum() == pytest.approx(gap_twin(right, confidence, len(cases)))
    assert (found[~right.astype(bool)] == 0).all()


def test_global_average_precision_by_hand():
    # Right at 0.9, a distractor at 0.8, right at 0.7, wrong at 0.1; three queries have an answer.
    found = global_average_precision(np.array([True, False, False, True]), np.array([0.9, 0.1, 0.8, 0.7]), 3)
    assert found == pytest.approx([1 / 3, 0, 0, (2 / 3) / 3])


scores = st.lists(st.integers(-4, 4).map(lambda value: value / 4), min_size=1, max_size=20)


@given(scores, scores, st.integers(1, 5), st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_decisions_are_those_of_scikit_learn_however_negatives_arrive(positives, negatives, parts, wanted):
    decided = decisions(np.array(positives), iter(np.array_split(np.array(negatives), parts)))
    truth = [1] * len(positives) + [0] * len(negatives)
    value = positives + negatives
    assert decided.average_precision == pytest.approx(oracle.average_precision_score(truth, value))
    assert decided.roc_auc == pytest.approx(oracle.roc_auc_score(truth, value))
    precision, recall, thresholds = oracle.precision_recall_curve(truth, value)
    enough = precision[:-1] >= wanted
    found, threshold = decided.recall_at_precision(wanted)
    assert found == pytest.approx(max(recall[:-1][enough], default=0))
    if threshold is not None:
        at = list(thresholds).index(threshold)
        assert precision[at] >= wanted
        assert recall[at] == pytest.approx(found)


def test_precision_of_each_positive_is_in_the_order_given():
    decided = decisions(np.array([0.2, 0.9]), iter([np.array([0.5])]))
    assert decided.precision == pytest.approx([2 / 3, 1])


@pytest.mark.parametrize("entries", [1, 50, 2**25])
def test_blocked_products_find_what_faiss_finds(monkeypatch, entries):
    monkeypatch.setattr(ranking, "ENTRIES", entries)
    rng = np.random.default_rng(0)
    database = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(83, 7)).astype(np.float32)), dim=1)
    queries = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(19, 7)).astype(np.float32)), dim=1)
    index = faiss.IndexFlatIP(7)
    index.add(database.numpy())
    for k in (1, 6, 83, 100):
        wanted, where = index.search(queries.numpy(), min(k, 83))
        similarity, found = nearest(queries, database, k, torch.device("cpu"))
        assert similarity.numpy() == pytest.approx(wanted, abs=1e-5)
        assert (found.numpy() == where).all()
    whole = torch.cat([part for _, part in blocks(queries, database, torch.device("cpu"))])
    torch.testing.assert_close(whole, queries @ database.T)
    listed = dict(orders(queries, database, torch.device("cpu")))
    assert (np.stack([listed[i] for i in range(19)]) == where).all()


def test_of_equal_similarities_the_first_in_the_database_comes_first():
    database = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]])
    _, order = next(orders(torch.tensor([[1.0, 0]]), database, torch.device("cpu")))
    assert order.tolist() == [0, 2, 3, 1]


def test_right_and_junk_at_once_is_junk():
    assert ranks_of(np.array([3, 1, 0, 2]), np.array([1, 2]), np.array([1, 3])).tolist() == [1]
