"""Metrics of classification against scikit-learn and slow twins."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, recall_score

from opsin.errors import OpsinError
from opsin.evaluate.metrics import of_predictions, of_scores, voc_average_precision


def eleven_points(scores, labels):
    """The definition, threshold by threshold."""
    scores, labels = zip(*((s, y) for s, y in zip(scores, labels, strict=True) if y >= 0), strict=True)
    total = sum(labels)
    points = []
    for threshold in set(scores):
        taken = [y for s, y in zip(scores, labels, strict=True) if s >= threshold]
        points.append((sum(taken), sum(taken) / len(taken)))
    return sum(max(p for found, p in points if found * 10 >= tenth * total) for tenth in range(11)) / 11


LABELS = st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0, 0, 1, -1])), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(LABELS)
def test_voc_average_precision_is_its_definition(images):
    scores, labels = zip(*images, strict=True)
    found = voc_average_precision(torch.tensor(scores) / 7, torch.tensor(labels))
    if 1 not in labels:
        assert np.isnan(found)
        return
    assert found == pytest.approx(eleven_points(scores, labels))
    rows = np.array(labels) >= 0
    # Interpolation only raises precision, and eleven levels can miss at most one step of recall.
    exact = average_precision_score(np.array(labels)[rows], np.array(scores)[rows])
    assert found >= exact - 1 / 11 - 1e-9
    order = np.random.default_rng(0).permutation(len(scores))
    assert voc_average_precision(torch.tensor(scores)[order] / 7, torch.tensor(labels)[order]) == pytest.approx(found)


def test_voc_average_precision_is_near_the_area_of_many_images():
    rng = np.random.default_rng(0)
    labels = rng.random(20_000) < 0.1
    scores = rng.normal(size=20_000) + labels
    ours = voc_average_precision(torch.from_numpy(scores), torch.from_numpy(labels).long())
    exact = average_precision_score(labels, scores)
    assert exact <= ours <= exact + 1 / 11


def test_voc_average_precision_by_hand():
    # Ranked: right, wrong, right, left out, wrong: precisions 1 up to recall 1/2, then 2/3.
    labels = torch.tensor([1, 0, 1, -1, 0])
    assert voc_average_precision(torch.arange(5, 0, -1), labels) == pytest.approx((6 + 5 * 2 / 3) / 11)
    # With ten images of the class, recall 0.3 is reached by the third: in floating point 0.1 · 3 is above 3 / 10.
    labels = torch.tensor([1, 1, 1, *[0] * 90, *[1] * 7])
    tail = max(10 / 100, 7 / 97)
    assert voc_average_precision(torch.arange(100, 0, -1), labels) == pytest.approx((4 + 7 * tail) / 11)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_accuracy_and_its_mean_over_classes(pairs):
    predicted, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
    plain = of_predictions(predicted, labels, 5)
    right = np.array([a == b for a, b in pairs])
    assert plain.value == pytest.approx(right.mean())
    np.testing.assert_array_equal(plain.outcomes, right)
    mean = of_predictions(predicted, labels, 5, "per_class")
    present = labels.unique()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # predicted classes that no image has
        assert mean.value == pytest.approx(balanced_accuracy_score(labels, predicted))
        recalls = recall_score(labels, predicted, labels=present, average=None, zero_division=0)
    np.testing.assert_allclose(mean.by_class[present], recalls)
    assert mean.by_class.isnan().tolist() == [k not in present for k in range(5)]
    one_hot = torch.nn.functional.one_hot(labels, 5)  # one class each, told as several
    several = of_predictions(predicted, one_hot, 5, "per_class")
    torch.testing.assert_close(several.by_class, mean.by_class, equal_nan=True)
    scores = torch.nn.functional.one_hot(predicted, 5) + torch.rand(len(pairs), 5) / 2
    assert of_scores(scores, labels, "per_class").value == pytest.approx(mean.value)


def test_images_of_several_classes():
    labels = torch.tensor([[1, 1, 0], [0, 1, -1], [0, 0, 0], [0, -1, 0]])
    measured = of_predictions(torch.tensor([0, 2, 1, 1]), labels, 3)
    assert measured.outcomes.tolist() == [1, 0]  # two images have no class
    assert measured.value == 0.5
    assert measured.by_class[:2].tolist() == [1, 0.5]
    assert measured.by_class[2].isnan()


def test_mean_average_precision_over_classes():
    rng = np.random.default_rng(0)
    scores, labels = torch.from_numpy(rng.normal(size=(60, 4))), torch.from_numpy(rng.integers(-1, 2, (60, 4)))
    labels[:, 2] = labels[:, 2].clamp(max=0)  # no image has it
    measured = of_scores(scores, labels, "voc_map")
    wanted = [eleven_points(scores[:, k].tolist(), labels[:, k].tolist()) for k in (0, 1, 3)]
    assert measured.value == pytest.approx(np.mean(wanted))
    assert measured.by_class[[0, 1, 3]].tolist() == pytest.approx(wanted)
    assert measured.outcomes is None
    single = torch.tensor([0, 3, 3, 1])
    told = of_scores(scores[:4], torch.nn.functional.one_hot(single, 4), "voc_map")
    assert of_scores(scores[:4], single, "voc_map").value == pytest.approx(told.value)


def test_nothing_to_count():
    none = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(OpsinError, match="no test image has a label"):
        of_predictions(torch.zeros(3, dtype=torch.int64), none, 2)
    with pytest.raises(OpsinError, match="no class has a test image"):
        of_scores(torch.zeros(3, 2), none, "voc_map")
