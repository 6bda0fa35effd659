"""The Triton kernels of a training block against the torch code that says what they compute."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cross_compile import compiles
from opsin.backbone import rows as ops

kernels = pytest.importorskip("opsin.backbone.kernels", reason="Triton is not on this platform")

GPU = pytest.param(
    ("cuda", torch.bfloat16),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)
if torch.cuda.is_available():  # the kernels are compiled there, and refuse a CPU's memory
    ON = [GPU, pytest.param(("cuda", torch.float32), marks=pytest.mark.gpu)]
else:
    ON = [("cpu", torch.float32), ("cpu", torch.float16), GPU]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Case:
    """Random tensors of a branch: T rows of which R are kept, D channels."""

    def __init__(self, on, count=37, width=24, share=0.6, seed=0):
        self.device, self.dtype = torch.device(on[0]), on[1]
        self.random = torch.Generator().manual_seed(seed)
        kept = torch.randperm(count, generator=self.random)[: max(1, int(share * count))].sort()[0]
        place = torch.full((count,), -1)
        place[kept] = torch.arange(len(kept))
        self.rows, self.place = kept.to(self.device), place.to(self.device)
        self.scale = (0.5 + torch.rand(len(kept), generator=self.random)).to(self.device)
        self.count, self.width = count, width

    def tensor(self, *shape, shift=0.0):
        return (torch.randn(*shape, generator=self.random) + shift).to(self.device, self.dtype)

    def close(self, found, expected):
        assert found.dtype == expected.dtype
        error = (found.double() - expected.double()).abs().max()
        assert error <= TOLERANCE[self.dtype] * (1 + expected.double().abs().max()), float(error)

    def twin(self, function, *arguments):
        """The torch code on the CPU in fp32, rounded at the end."""
        high = [
            a.cpu().to(torch.float32) if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a.cpu() if isinstance(a, torch.Tensor) else a
            for a in arguments
        ]  # fmt: skip
        out = function(*high)
        several = out if isinstance(out, tuple) else (out,)
        return [o.to(self.device) for o in several]


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("width", [24, 64, 384])
@pytest.mark.parametrize("gather", [False, True])
def test_layer_norm_of_kept_rows(on, width, gather):
    case = Case(on, width=width)
    rows, place = (case.rows, case.place) if gather else (None, None)
    x, weight, bias = case.tensor(case.count, width, shift=3.0), case.tensor(width), case.tensor(width)
    found = kernels.norm_rows(x, rows, weight, bias, 1e-6)
    expected = case.twin(ops.norm_rows, x, rows, weight, bias, 1e-6)
    case.close(found[0], expected[0].to(case.dtype))
    for f, e in zip(found[1:], expected[1:], strict=True):
        assert f.dtype == torch.float32
        assert torch.allclose(f, e, rtol=1e-4, atol=1e-5)

    grad_out, grad_x = case.tensor(len(found[0]), width), case.tensor(case.count, width)
    arguments = (grad_out, grad_x, x, rows, place, weight, bias, *expected[1:])
    again = kernels.norm_rows_backward(*arguments)
    wanted = case.twin(ops.norm_rows_backward, *arguments)
    for f, e in zip(again, wanted, strict=True):
        case.close(f, e.to(case.dtype))
    case.close(again[0], expected[0].to(case.dtype))  # what the forward gave


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_activations(on, kind):
    case = Case(on)
    x, grad = case.tensor(41, 48), case.tensor(41, 24 if kind == "swiglu" else 48)
    case.close(kernels.activate(x, kind), case.twin(ops.activate, x, kind)[0].to(case.dtype))
    found = kernels.activate_backward(x, grad, kind)
    for f, e in zip(found, case.twin(ops.activate_backward, x, grad, kind), strict=True):
        case.close(f, e.to(case.dtype))


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("width", [24, 384])
def test_rows_are_taken_and_added(on, width):
    case = Case(on, width=width)
    x, branch = case.tensor(case.count, width), case.tensor(len(case.rows), width)
    found = kernels.take_rows(x, case.rows, case.scale)
    case.close(found, case.twin(ops.take_rows, x, case.rows, case.scale)[0].to(case.dtype))
    found = kernels.add_rows(x, branch, case.place, case.scale)
    case.close(found, case.twin(ops.add_rows, x, branch, case.rows, case.place, case.scale)[0].to(case.dtype))
    whole = case.tensor(case.count, width)
    case.close(kernels.add_rows(x, whole, None, None), (x.double() + whole.double()).to(case.dtype))


@given(count=st.integers(1, 300), width=st.integers(1, 70), share=st.floats(0.01, 1), seed=st.integers(0, 9))
def test_any_number_of_rows_and_channels(count, width, share, seed):
    on = ("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    case = Case(on, count, width, share, seed)
    x, branch = case.tensor(count, width), case.tensor(len(case.rows), width)
    found = kernels.add_rows(x, branch, case.place, case.scale)
    case.close(found, case.twin(ops.add_rows, x, branch, case.rows, case.place, case.scale)[0])
    weight, bias = case.tensor(width), case.tensor(width)
    out, mean, inverse = kernels.norm_rows(x, case.rows, weight, bias, 1e-2)
    arguments = (case.tensor(*out.shape), x, x, case.rows, case.place, weight, bias, mean, inverse)
    for f, e in zip(kernels.norm_rows_backward(*arguments), case.twin(ops.norm_rows_backward, *arguments), strict=True):
        case.close(f, e)


def test_they_compile_for_a_gpu():
    module = "opsin.backbone.kernels"
    low, whole = "*bf16", {"WIDTH": 1024, "ROWS": 4, "PADDED": 1024}
    norm = dict.fromkeys(("weight", "bias", "out"), low) | {"mean": "*fp32", "inverse": "*fp32", "count": "i32"}
    jobs = []
    for gather in (False, True):
        index = "*i64" if gather else low
        jobs += [
            (module, "norm_rows_kernel", {"x": low, "rows": index, **norm, "eps": "fp32", "GATHER": gather, **whole}),
            (
                module,
                "norm_rows_backward_kernel",
                dict.fromkeys(("grad_out", "grad_x", "x"), low)
                | {"place": index, **norm, "grad_in": low, "shares": "*fp32", "GATHER": gather, **whole},
            ),
            (
                module,
                "add_rows_kernel",
                {"x": low, "branch": low, "place": index, "scale": "*fp32" if gather else low, "out": low}
                | {"count": "i32", "GATHER": gather, **whole},
            ),
        ]
    jobs.append(
        (module, "take_rows_kernel", {"x": low, "rows": "*i64", "scale": "*fp32", "out": low, "count": "i32", **whole})
    )
    for kind, hidden in (("gelu", {}), ("swiglu", {"HIDDEN": 4096})):
        elementwise = {"count": "i32", **hidden, "BLOCK": 1024}
        jobs.append((module, f"{kind}_kernel", {"x": low, "out": low, **elementwise}))
        pointers = dict.fromkeys(("x", "grad", "out", "grad_x"), low)
        jobs.append((module, f"{kind}_backward_kernel", pointers | elementwise))
    compiles(jobs)
