import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.errors import OpsinError
from opsin.pretrain.gram import GramRecipe, gram_loss, reduced


def naive(student: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """The formula with both Gram matrices, image by image: the readable twin."""
    values = []
    for x, y in zip(F.normalize(student, dim=-1), F.normalize(anchor, dim=-1), strict=True):
        values.append(F.mse_loss(x @ x.T, y @ y.T))
    return torch.stack(values)


def with_gradient(function, student, anchor, dtype=torch.float64):
    student, anchor = (features.detach().to(dtype).requires_grad_() for features in (student, anchor))
    value = function(student, anchor)
    gradients = torch.autograd.grad((value * torch.arange(1, len(value) + 1)).sum(), (student, anchor))
    return value.detach().double(), *(gradient.double() for gradient in gradients)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31), st.floats(1e-6, 10))
def test_it_is_the_formula_at_every_size(images, patches, width, seed, apart):
    generator = torch.Generator().manual_seed(seed)
    student, noise = torch.randn(2, images, patches, width, dtype=torch.float64, generator=generator)
    found = with_gradient(gram_loss, student, student + apart * noise)
    expected = with_gradient(naive, student, student + apart * noise)
    for mine, twin in zip(found, expected, strict=True):
        assert mine.shape == twin.shape
        torch.testing.assert_close(mine, twin, rtol=1e-7, atol=1e-13 * max(1.0, float(twin.abs().max())))


@pytest.mark.parametrize(("patches", "width"), [(3, 5), (4, 4), (6, 3), (5, 1)])
def test_its_gradient_is_that_of_its_value(patches, width):
    inputs = [torch.randn(2, patches, width, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(gram_loss, inputs)


@pytest.mark.parametrize(("patches", "width"), [(300, 40), (60, 200)])
@pytest.mark.parametrize("apart", [1.0, 1e-1, 1e-2, 1e-3])
def test_nearly_equal_features_keep_their_digits_in_fp32(patches, width, apart):
    """The same squared differences, as a difference of squares, would have no digit left at 1e-3."""
    generator = torch.Generator().manual_seed(0)
    anchor, noise = torch.randn(2, 2, patches, width, generator=generator)
    anchor = anchor + 2 * torch.randn(1, width, generator=generator)  # patches of an image are alike
    found = with_gradient(gram_loss, anchor + apart * noise, anchor, torch.float32)
    expected = with_gradient(naive, anchor + apart * noise, anchor)
    for mine, exact in zip(found, expected, strict=True):
        # what normalised features lose by rounding to fp32 remains, relative to how far they are apart
        assert (mine - exact).norm() <= 1e-5 / apart * exact.norm()


@pytest.mark.parametrize("shape", [(2, 300, 40), (2, 40, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_features_cost_exactly_nothing(shape, dtype):
    features = torch.randn(shape).to(dtype)
    value, *gradients = with_gradient(gram_loss, features, features, dtype)
    assert not value.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("patches", "width"), [(300, 40), (40, 300)])
def test_a_rotation_costs_nothing(patches, width):
    features = torch.randn(2, patches, width)
    rotation = torch.linalg.qr(torch.randn(width, width)).Q
    assert (gram_loss(features @ rotation, features).abs() < torch.finfo(torch.float32).eps).all()
    assert gram_loss(features[:, torch.randperm(patches)], features).min() > 1e-3


@pytest.mark.parametrize(("patches", "width"), [(400, 10), (10, 400)])
def test_nothing_larger_than_the_features_is_stored(patches, width):
    stored = []
    student = torch.randn(3, patches, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: stored.append(tensor.numel()) or tensor, lambda t: t):
        gram_loss(student, torch.randn(3, patches, width))
    assert stored
    assert max(stored) == student.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_promoted_also_inside_autocast(dtype):
    student, anchor = torch.randn(2, 2, 30, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gram_loss(student, anchor)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, gram_loss(student.float(), anchor.float()))


def test_a_patch_without_features_is_harmless():
    student = torch.randn(1, 6, 4)
    student[0, 2] = 0
    student.requires_grad_()
    value = gram_loss(student, torch.randn(1, 6, 4))
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


def test_half_the_side_is_a_bicubic_mean_of_four_by_four():
    features = torch.randn(2, 8, 12, 5, dtype=torch.float64)
    found = reduced(features, (4, 6))
    assert found.shape == (2, 4, 6, 5)
    taps = torch.tensor([-3.0, 19.0, 19.0, -3.0], dtype=torch.float64) / 32  # the cubic with a = -0.75 at ½ and 1½
    expected = torch.einsum("bijd,i,j->bd", features[:, 1:5, 3:7], taps, taps)
    torch.testing.assert_close(found[:, 1, 2], expected)
    assert reduced(features.to(torch.bfloat16), (4, 6)).dtype == torch.float32


def test_the_same_grid_is_left_alone():
    features = torch.randn(1, 5, 7, 3)
    torch.testing.assert_close(reduced(features, (5, 7)), features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, r"gram.weight is -1.0: give from 0 to 10000"),
        ({"scale": 3}, r"gram.scale is 3: give from 1 to 2"),
        ({"refresh_every": -1}, r"gram.refresh_every is -1: give 0 or more"),
        ({"refresh_most": 0}, r"gram.refresh_most is 0: give 1 or more"),
        ({"anchor": ""}, r'gram.anchor is empty: give "start" or the path'),
    ],
)
def test_bad_recipes(arguments, message):
    with pytest.raises(OpsinError, match=message):
        GramRecipe(**arguments)
