import math
import shutil
import subprocess
import sys

import naive
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn

from opsin.pretrain import prototypes as P
from opsin.pretrain.prototypes import Prototypes, sinkhorn_bias

TEMPERATURE = 0.04


def every(z):
    return torch.ones(len(z), dtype=torch.bool)


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    monkeypatch.setattr(P, "CHUNK_SCORES", 2000)  # so that small tests cross chunk borders and pad the last one


def case(norm: float, dtype: torch.dtype, n=37, m=10, t=2, k=97, d=16):
    """Student and teacher features and prototypes, with duplicate rows and rows equal to a prototype."""
    generator = torch.Generator().manual_seed(0)
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def layer():
        made = Prototypes(k, d).to(weights_dtype)
        with torch.no_grad():
            made.weight_v.copy_(torch.randn(k, d, generator=generator))
            made.weight_g.fill_(norm)
        return made

    teacher, student = layer(), layer()
    zt, zs = (F.normalize(torch.randn(n, v, d, generator=generator), dim=-1).to(weights_dtype) for v in (t, m))
    zt[3], zs[3] = zt[4], zs[4]
    zt[5] = F.normalize(teacher.weight_v[7], dim=0).detach()
    zs[6] = F.normalize(student.weight_v[8], dim=0).detach()
    pairs = torch.ones(m, t, dtype=weights_dtype)
    pairs[0, 0] = 0
    pairs[-1, -1] = 0.25
    weights = torch.rand(n, generator=generator).to(weights_dtype)
    return teacher, student, zt, zs.requires_grad_(), pairs, weights


@pytest.mark.parametrize("norm", [1.0, 5.0])
@pytest.mark.parametrize("shape", [{"m": 10, "t": 2}, {"m": 1, "t": 1}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-4), (torch.bfloat16, 2e-3)])
def test_loss_and_gradients_are_the_naive_ones(norm, shape, dtype, tolerance):
    teacher, student, zt, zs, pairs, weights = case(norm, dtype, **shape)
    targets = teacher.balance(zt, every(zt), torch.tensor(TEMPERATURE, dtype=zt.dtype), 3, dtype)
    loss, per_view = student(zs, targets, pairs, weights, 0.1)
    (2 * loss).backward()  # not 1: the backward must use the gradient it is given
    assert per_view.sum().item() == pytest.approx(loss.item())

    # The twin in fp64, on the same numbers: those that the product rounds are rounded, then everything is exact.
    def rounded(x):
        return x.detach().to(dtype).double()

    w = rounded(student.weight()).requires_grad_()
    z = rounded(zs).requires_grad_()
    q = naive.log_sinkhorn((rounded(zt).flatten(0, 1) @ rounded(teacher.weight()).T), TEMPERATURE)
    expected = naive.loss(z, w, q.view(*zt.shape[:2], -1), pairs.double(), weights.double(), 0.1)
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (zs.grad - z.grad).norm() <= tolerance * z.grad.norm()
    # The chain from the prototypes to direction and length is torch's own; run it on the twin's gradient.
    exact = [
        torch.autograd.grad(student.weight(), p, w.grad.to(zs.dtype))[0] for p in (student.weight_v, student.weight_g)
    ]
    for parameter, gradient in zip((student.weight_v, student.weight_g), exact, strict=True):
        assert (parameter.grad - gradient).norm() <= tolerance * gradient.norm()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(2, 50), st.integers(1, 4), st.floats(0.03, 1.0))
def test_sinkhorn_is_the_textbooks_and_lightlys(n, k, iterations, temperature):
    generator = torch.Generator().manual_seed(n * k)
    z = F.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64), dim=1)
    w = F.normalize(torch.randn(k, 8, generator=generator, dtype=torch.float64), dim=1)
    bias = sinkhorn_bias(z, every(z), w, torch.tensor(temperature, dtype=torch.float64), iterations)
    q = torch.softmax(z @ w.T / temperature + bias, dim=1)
    assert torch.allclose(q, naive.sinkhorn(z @ w.T, temperature, iterations), rtol=1e-8, atol=1e-12)
    theirs = lightly_sinkhorn(z @ w.T, iterations=iterations, epsilon=temperature)
    assert torch.allclose(q, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("stored", [0, 2**26])
def test_a_cpu_that_looks_at_the_norms_first_gets_the_same(monkeypatch, stored):
    teacher, _, zt, *_ = case(1.0, torch.float64, n=150)
    z, counted = zt.flatten(0, 1), torch.arange(300) % 5 > 0
    monkeypatch.setattr(P, "STORED_SCORES", stored)
    exponentials = sinkhorn_bias(z, counted, teacher.weight(), torch.tensor(0.05, dtype=torch.float64), 3)
    monkeypatch.setattr(P, "SAFE_SCORE", 0.0)
    logarithms = sinkhorn_bias(z, counted, teacher.weight(), torch.tensor(0.05, dtype=torch.float64), 3)
    difference = exponentials - logarithms
    assert not torch.equal(exponentials, logarithms)  # two ways indeed
    assert torch.allclose(difference, difference.mean().expand_as(difference), atol=1e-10)  # a constant cancels


@pytest.mark.parametrize("safe", [0.0, 30.0])
def test_rows_that_do_not_count_change_nothing(monkeypatch, safe):
    monkeypatch.setattr(P, "SAFE_SCORE", safe)
    teacher, student, zt, zs, pairs, weights = case(1.0, torch.float64)
    temperature = torch.tensor(0.05, dtype=torch.float64)
    counted = torch.arange(len(zt)) % 3 > 0
    few = teacher.balance(zt[counted], every(zt[counted]), temperature, 3, torch.float64)
    expected, _ = student(zs[counted], few, pairs, weights[counted], 0.1)
    padded = torch.where(counted[:, None, None], zt, 1e3 * zt)  # whatever lies there
    all_rows = teacher.balance(padded, counted, temperature, 3, torch.float64)
    found, _ = student(zs, all_rows, pairs, weights * counted, 0.1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("safe", [0.0, 30.0])
def test_if_no_row_counts_the_loss_is_zero_and_finite(monkeypatch, safe):
    monkeypatch.setattr(P, "SAFE_SCORE", safe)
    teacher, student, zt, zs, pairs, weights = case(1.0, torch.float32)
    targets = teacher.balance(zt, ~every(zt), torch.tensor(0.05), 3, torch.float32)
    loss, _ = student(zs, targets, pairs, 0 * weights, 0.1)
    loss.backward()
    assert loss.item() == 0
    assert not zs.grad.any()
    assert not student.weight_v.grad.any()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile on a CPU needs a C++ compiler: apt install g++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_chunks_are_the_plain_ones(monkeypatch, dtype):
    monkeypatch.setattr(P, "SAFE_SCORE", 0.0)

    def run():
        teacher, student, zt, zs, pairs, weights = case(1.0, dtype)
        targets = teacher.balance(zt, every(zt), torch.tensor(TEMPERATURE), 3, dtype)
        loss, per_view = student(zs, targets, pairs, weights, 0.1)
        loss.backward()
        return loss.detach(), per_view, zs.grad, student.weight_v.grad

    plain = run()
    monkeypatch.setattr(P, "_fused", lambda function, _: P._compiled(function))
    for f, e in zip(run(), plain, strict=True):
        torch.testing.assert_close(f, e, rtol=2e-3, atol=2e-4)


def test_sinkhorn_survives_prototypes_of_norm_five_in_fp32():
    teacher, _, zt, *_ = case(5.0, torch.float32)
    scores = zt.flatten(0, 1) @ teacher.weight().T
    assert not naive.sinkhorn(scores.detach(), TEMPERATURE).isfinite().all()  # the textbook way overflows here
    targets = teacher.balance(zt, every(zt), torch.tensor(TEMPERATURE), 3, torch.float32)
    q = torch.softmax(scores / TEMPERATURE + targets.bias, dim=1)
    exact = naive.log_sinkhorn(scores.detach().double(), TEMPERATURE)
    assert q.isfinite().all()
    assert (q - exact).abs().max() < 1e-4


def test_balancing_balances():
    teacher, _, zt, *_ = case(1.0, torch.float64, n=400, k=20)
    targets = teacher.balance(zt, every(zt), torch.tensor(0.1, dtype=torch.float64), 50, torch.float64)
    q = torch.softmax(zt.flatten(0, 1) @ teacher.weight().T / 0.1 + targets.bias, dim=1)
    use = q.mean(0)
    assert torch.allclose(use, torch.full_like(use, 1 / 20), atol=1e-6)


def test_centering_is_the_softmax_of_centred_scores():
    teacher, _, zt, *_ = case(1.0, torch.float64)
    centre = torch.randn(97, dtype=torch.float64)
    targets = teacher.centre(zt, torch.tensor(0.05, dtype=torch.float64), centre, torch.float64)
    scores = zt.flatten(0, 1) @ teacher.weight().T
    assert torch.allclose(
        torch.softmax(scores / 0.05 + targets.bias, dim=1), torch.softmax((scores - centre) / 0.05, dim=1)
    )
    assert torch.allclose(teacher.mean_scores(zt, every(zt)), scores.mean(0))
    some = torch.arange(len(zt)) % 3 > 0
    assert torch.allclose(teacher.mean_scores(zt, some), scores.view(*zt.shape[:2], -1)[some].mean((0, 1)))


def test_rows_of_the_targets_are_those_of_the_whole():
    teacher, student, zt, zs, pairs, weights = case(1.0, torch.float64)
    targets = teacher.balance(zt, every(zt), torch.tensor(TEMPERATURE, dtype=torch.float64), 3, torch.float64)
    whole, _ = student(zs, targets, pairs, weights, 0.1)
    parts = sum(
        student(zs[a:b], targets.rows(a, b), pairs, weights[a:b], 0.1)[0] for a, b in ((0, 11), (11, 12), (12, 37))
    )
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)


def test_no_rows_is_no_loss():
    teacher, student, zt, zs, pairs, weights = case(1.0, torch.float32)
    targets = teacher.balance(zt[:0], every(zt[:0]), torch.tensor(TEMPERATURE), 3, torch.float32)
    loss, _ = student(zs[:0], targets, pairs, weights[:0], 0.1)
    loss.backward()
    assert loss.item() == 0
    assert student.weight_v.grad.abs().sum() == 0


def test_a_uniform_student_costs_log_k():
    teacher, student, zt, zs, pairs, weights = case(1.0, torch.float64)
    with torch.no_grad():
        student.weight_g.zero_()
    targets = teacher.balance(zt, every(zt), torch.tensor(TEMPERATURE, dtype=torch.float64), 3, torch.float64)
    loss, _ = student(zs, targets, pairs, weights, 0.1)
    assert loss.item() == pytest.approx(math.log(97) * pairs.sum().item() * weights.sum().item())


MEMORY = """
import resource, sys, torch, torch.nn.functional as F
from opsin.pretrain.prototypes import Prototypes
rows, k, d = int(sys.argv[1]), 16384, 32
layer = Prototypes(k, d)
z = F.normalize(torch.randn(rows, 1, d), dim=-1)
def run(z):
    targets = layer.balance(z.detach(), torch.ones(len(z), dtype=torch.bool), torch.tensor(0.05), 3, torch.float32)
    layer(z.requires_grad_(), targets, torch.ones(1, 1), torch.full((len(z),), 1 / len(z)), 0.1)[0].backward()
run(z[:1100].clone())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(z)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_grows_with_rows_times_bottleneck_not_prototypes():
    rows = 16_384
    grown = subprocess.run([sys.executable, "-c", MEMORY, str(rows)], capture_output=True, text=True, check=True)
    unit = 1024 if sys.platform != "darwin" else 1
    grown_bytes = int(grown.stdout) * unit
    one_score_matrix = rows * 16_384 * 4
    assert grown_bytes < one_score_matrix / 8  # measured: some 10 MiB against 1 GiB
