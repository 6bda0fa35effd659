"""Losses and metrics of depth against slow twins, torchmetrics and values by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MeanAbsolutePercentageError, MeanSquaredError

from opsin.errors import OpsinError
from opsin.evaluate.depth_loss import (
    averages,
    gradient_loss,
    grouped,
    measured_area,
    measures,
    sig_loss,
    to_measure,
)


def maps(seed, shape=(2, 9, 12), holes=0.3):
    rng = np.random.default_rng(seed)
    prediction, target = rng.uniform(0.1, 10, (2, *shape))
    target[rng.random(shape) < holes] = 0
    return torch.from_numpy(prediction), torch.from_numpy(target)


def slow_sig(prediction, target, mean_only):
    errors = [
        math.log(p + 1e-3) - math.log(t + 1e-3)
        for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True)
        if t > 0
    ]
    mean = sum(errors) / len(errors)
    variance = sum((error - mean) ** 2 for error in errors) / (len(errors) - 1)
    return math.sqrt((0 if mean_only else variance) + 0.15 * mean**2)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.booleans())
def test_sig_loss_equals_a_slow_twin(seed, mean_only):
    prediction, target = maps(seed)
    found = sig_loss(prediction, target, mean_only=mean_only)
    assert found.item() == pytest.approx(slow_sig(prediction, target, mean_only), rel=1e-9)


def test_sig_loss_by_hand():
    target = torch.tensor([[[1.0, 1.0, 0.0, -1.0, torch.nan, torch.inf]]], dtype=torch.float64) - 1e-3 * torch.tensor(
        [1, 1, 0, 0, 0, 0]
    )
    prediction = torch.tensor([[[math.e, math.e**3, 5, 5, 5, 5]]], dtype=torch.float64) - 1e-3
    # g = 1, 3: mean 2, unbiased variance 2
    assert sig_loss(prediction, target).item() == pytest.approx(math.sqrt(2 + 0.15 * 4))
    assert sig_loss(prediction, target, mean_only=True).item() == pytest.approx(math.sqrt(0.15) * 2)


@pytest.mark.parametrize("known", [0, 1, 2])
def test_few_known_pixels_and_a_perfect_fit_give_finite_gradients(known):
    for shift in (0.0, 1.0):
        target = torch.zeros(1, 3, 4)
        target.view(-1)[:known] = 2.0
        prediction = (torch.full((1, 3, 4), 2.0) + shift).requires_grad_()
        (sig_loss(prediction, target) + gradient_loss(prediction, target)).backward()
        assert prediction.grad.isfinite().all()


def slow_gradient(prediction, target):
    prediction, target = prediction.numpy(), target.numpy()
    total = 0.0
    for step in (1, 2, 4, 8):
        p, t = prediction[:, ::step, ::step], target[:, ::step, ::step]
        known = t > 0
        if not known.any():
            continue
        error = np.log(p + 1e-3) - np.log(np.where(known, t, 1) + 1e-3)
        part = 0.0
        for b in range(p.shape[0]):
            for i in range(p.shape[1]):
                for j in range(p.shape[2]):
                    for k, m in ((i + 1, j), (i, j + 1)):
                        if k < p.shape[1] and m < p.shape[2] and known[b, i, j] and known[b, k, m]:
                            part += abs(error[b, k, m] - error[b, i, j])
        total += part / known.sum()
    return total


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_the_gradient_loss_equals_a_slow_twin_and_does_not_see_scale(seed):
    prediction, target = maps(seed)
    assert gradient_loss(prediction, target).item() == pytest.approx(slow_gradient(prediction, target), rel=1e-9)
    scaled = (prediction + 1e-3) * 3 - 1e-3
    assert gradient_loss(scaled, target).item() == pytest.approx(gradient_loss(prediction, target).item())


def test_losses_are_means_over_groups_of_two():
    prediction, target = maps(3, (5, 4, 6))
    wanted = [sig_loss(prediction[a:b], target[a:b]) for a, b in ((0, 2), (2, 4), (4, 5))]
    torch.testing.assert_close(grouped(sig_loss, prediction, target), sum(wanted) / 3)


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_measures_equal_torchmetrics_and_a_slow_twin(seed):
    prediction, target = maps(seed, (1, 7, 9))
    valid = to_measure(target[0], "all", 1e-3, 10.0)
    p, t = prediction[0][valid], target[0][valid]
    found = measures(p, t)
    assert found["rmse"] == pytest.approx(MeanSquaredError(squared=False).double()(p, t).item(), rel=1e-6)
    assert found["abs_rel"] == pytest.approx(MeanAbsolutePercentageError().double()(p, t).item(), rel=1e-6)
    pairs = list(zip(p.tolist(), t.tolist(), strict=True))
    for k in (1, 2, 3):
        share = sum(max(a / b, b / a) < 1.25**k for a, b in pairs) / len(pairs)
        assert found[f"delta{k}"] == pytest.approx(share)
    logs = np.array([math.log(a) - math.log(b) for a, b in pairs])
    assert found["log10"] == pytest.approx(np.mean([abs(math.log10(a) - math.log10(b)) for a, b in pairs]))
    assert found["rmse_log"] == pytest.approx(math.sqrt((logs**2).mean()))
    assert found["silog"] == pytest.approx(100 * math.sqrt((logs**2).mean() - logs.mean() ** 2), abs=1e-4)


def test_an_image_counts_once_however_many_pixels_are_known():
    far, near = measures(torch.full((1,), 3.0), torch.full((1,), 1.0)), measures(torch.ones(99), torch.ones(99))
    assert averages([far, near])["rmse"] == pytest.approx(1.0)
    assert averages([far, near])["delta1"] == pytest.approx(0.5)


def box(mask):
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    return rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1


def test_crops_are_the_fields_boxes():
    assert box(to_measure(torch.ones(480, 640), "eigen", 1e-3, 10)) == (45, 471, 41, 601)
    assert box(to_measure(torch.ones(441, 591), "sun", 1e-3, 10)) == (45, 441, 41, 591)
    # 352 × 0.40810811 = 143.65, 352 × 0.99189189 = 349.15, 1216 × 0.03594771 = 43.71, 1216 × 0.96405229 = 1172.29
    assert box(to_measure(torch.ones(352, 1216), "garg", 1e-3, 80)) == (143, 349, 43, 1172)
    assert box(to_measure(torch.ones(5, 6), "all", 1e-3, 80)) == (0, 5, 0, 6)
    with pytest.raises(OpsinError, match="Eigen's crop is of depth maps of 480×640, and here is one of 100×200"):
        measured_area("eigen", 100, 200)


def test_what_is_measured_lies_strictly_within_the_range():
    target = torch.tensor([[0.0, 1e-3, 0.5, 9.999, 10.0, 11.0, -1.0, torch.nan, torch.inf]])
    assert to_measure(target, "all", 1e-3, 10.0).tolist() == [[False, False, True, True] + [False] * 5]
