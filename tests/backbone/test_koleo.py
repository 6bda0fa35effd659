import pytest
import torch
from lightly.loss import KoLeoLoss

from opsin.backbone.koleo import CLOSEST, koleo


def slow(x: torch.Tensor) -> torch.Tensor:
    x = torch.nn.functional.normalize(x, dim=-1)
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") + 10 * torch.eye(len(x), dtype=x.dtype)
    return -distances.min(1).values.log().mean()


def test_it_is_the_formula_group_by_group_and_lightlys():
    x = torch.randn(3, 20, 8, dtype=torch.float64)
    values = koleo(x)
    for value, group in zip(values, x, strict=True):
        assert value.item() == pytest.approx(slow(group).item(), rel=1e-9)
        assert value.item() == pytest.approx(KoLeoLoss()(group).item(), rel=1e-5)


def test_its_gradient_is_the_formulas():
    x = torch.randn(1, 12, 6, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    koleo(x).sum().backward()
    slow(y[0]).backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_an_image_are_harmless(dtype):
    x = torch.randn(1, 6, 16).to(dtype)
    x[0, 1] = x[0, 0]
    x[0, 2] = x[0, 0] * 2  # the same direction
    x = x.requires_grad_()
    value = koleo(x)
    value.sum().backward()
    assert value.isfinite().all()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() < 100
    assert koleo(x[:, [0, 0]].float()).item() == pytest.approx(-torch.tensor(CLOSEST).log().item())


def test_it_stays_exact_inside_autocast():
    x = torch.randn(1, 10, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = koleo(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, koleo(x))


def test_spread_points_cost_less_than_crowded_ones():
    crowded = torch.ones(1, 8, 4) + 0.01 * torch.randn(1, 8, 4)
    assert koleo(torch.randn(1, 8, 4)) < koleo(crowded)


def test_a_sample_is_never_its_own_neighbour():
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert koleo(opposite).item() == pytest.approx(-torch.tensor(2.0).log().item())
