from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from opsin.backbone import registry
from opsin.backbone.graphs import WARM_UP, Captured, Piece, Replay, form, leaves, mapped

CPU = torch.device("cpu")


class Twin:
    """A recorder whose recordings are plain calls, so that everything around them runs on a CPU."""

    def __init__(self):
        self.recorded = []

    def stream(self):
        return nullcontext()

    def record(self, function, inputs):
        self.recorded.append(tuple(given.shape for given in leaves(inputs)))
        outputs = mapped(torch.zeros_like, function(*mapped(torch.zeros_like, inputs)))

        def replay():
            for out, new in zip(leaves(outputs), leaves(function(*inputs)), strict=True):
                out.copy_(new)

        return Captured(inputs, replay, outputs)


def twin(function, rows, limit=8):
    replay = Replay(function, rows, CPU, limit)
    replay.recorder = Twin()
    return replay


def sums(x, y):
    return x + y, (x * y).sum(1)


def test_results_are_those_of_the_function_and_stay():
    replay, seen = twin(sums, rows=4), []
    for n in (4, 4, 1, 3):
        x, y = torch.randn(2, n, 5)
        found = replay(x, y)
        seen.append((found, sums(x, y)))
    assert replay.recorder.recorded == [((4, 5), (4, 5))]  # one for all numbers of rows
    for found, expected in seen:  # compared at the end: a later call must not change an earlier result
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_every_shape_and_type_has_its_graph_up_to_the_limit():
    calls = []

    def double(x):
        calls.append(len(x))
        return [2 * x]

    replay = twin(double, rows=3, limit=2)
    for x in (torch.ones(2, 4), torch.ones(2, 6), torch.ones(2, 4, dtype=torch.float64), torch.ones(1, 6)):
        (found,) = replay(x)
        assert torch.equal(found, 2 * x)
        assert found.dtype == x.dtype
    assert replay.recorder.recorded == [((3, 4),), ((3, 6),)]
    # three calls to warm up, a capture and a replay each; the third shape plainly, and unpadded; a replay
    assert calls == [3] * 10 + [2, 3]


def test_without_cuda_the_function_is_called_with_what_is_given():
    calls = []
    replay = Replay(lambda x: calls.append(x.shape) or (x + 1,), rows=64, device=CPU)
    (found,) = replay(torch.zeros(2, 3, requires_grad=True))
    assert torch.equal(found, torch.ones(2, 3))
    assert not found.requires_grad
    assert calls == [(2, 3)]


def test_a_piece_computes_every_call_once_with_what_it_is_given():
    total = torch.zeros(3)
    recorder = Twin()

    def add(x, parts, factor):
        if len(recorder.recorded) == 1 and not piece.captured:  # being recorded: computes nothing
            return total, [parts[0]]
        total.add_(x * factor)
        return total, [parts[0] + 1]

    piece = Piece(add, recorder)
    expected, seen = torch.zeros(3), []
    for call in range(WARM_UP + 4):
        x, part = torch.full((3,), float(call)), torch.full((2,), float(call))
        found, (other,) = piece(x, (part, None), 2)
        expected += 2 * call
        assert torch.equal(found, expected)
        assert torch.equal(other, part + 1)
        seen.append((other, part + 1))
    for other, wanted in seen:  # compared at the end: a later call must not change an earlier result
        assert torch.equal(other, wanted)
    assert recorder.recorded == [((3,), (2,))]


def test_a_piece_has_a_recording_for_every_form_of_its_inputs():
    """Counted by itself: what is called seldom is warmed up as often as what is called at every turn."""
    calls = []

    def scaled(x, parts, factor):
        calls.append(form((x, parts, factor)))
        return x * factor + parts[0].sum().to(x.dtype)

    recorder = Twin()
    piece = Piece(scaled, recorder)
    one, two = torch.arange(3.0), torch.arange(4.0)
    forms = [
        (one, (one, None), 2),
        (two, (one, None), 2),  # a shape
        (one, (two, None), 2),  # a shape inside
        (one, (one.double(), None), 2),  # a type
        (one, (one, None), 3),  # a constant
        (one, (one, None), 3.0),
        (one, (one, True), 2),
        (one, [one, None], 2),  # a nesting
    ]
    assert len({form(inputs) for inputs in forms}) == len(forms)
    for call in range(WARM_UP + 3):
        assert len(piece.captured) == (len(forms) if call > WARM_UP else 0)
        for x, parts, factor in forms:
            given = (x + call, type(parts)([parts[0] - call, parts[1]]), factor)
            assert torch.equal(piece(*given), given[0] * factor + given[1][0].sum().to(x.dtype))
    assert len(recorder.recorded) == len(piece.captured) == len(forms)
    # three calls to warm up, one to record and three replays, each by plain calls
    assert set(Counter(calls).values()) == {WARM_UP + 1 + 3}


def test_what_can_be_no_constant_is_refused():
    with pytest.raises(TypeError, match="unhashable"):
        form((torch.ones(2), {"x": torch.ones(2)}))


def test_a_piece_without_a_gpu_is_the_function():
    assert Piece(lambda x, y: x + y)(torch.ones(()), 2) == 3


def test_trees_of_tensors():
    a, b = torch.ones(2), torch.zeros(3)
    tree = (Captured(a, None, 1), [a, None, (b, 4)])
    assert [id(t) for t in leaves(tree)] == [id(a), id(a), id(b)]
    doubled = mapped(lambda t: t * 2, tree)
    assert isinstance(doubled[0], Captured)
    assert doubled[0].outputs == 1
    assert doubled[1][1] is None
    assert doubled[1][2][1] == 4
    assert torch.equal(doubled[1][0], 2 * a)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_graph_gives_what_the_backbone_gives(dtype):
    torch.manual_seed(0)
    device = torch.device("cuda")
    backbone = registry.create("vit_nano8", layerscale=1.0).to(device, dtype).eval()
    replay = Replay(lambda images: tuple(backbone([images])[0]), rows=4, device=device, limit=2)
    seen = []
    for n, side in ((4, 32), (4, 48), (4, 32), (2, 48), (1, 32), (3, 64), (4, 48)):  # 64 is one shape too many
        images = torch.randn(n, 3, side, side, dtype=dtype).pin_memory()
        with torch.no_grad():
            seen.append((replay(images), backbone([images.to(device)])[0]))
    for found, expected in seen:
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_share_one_pool_in_any_order():
    device = torch.device("cuda")
    replay = Replay(lambda x: (torch.sin(x) @ x.mT, x.sum(-1)), rows=2, device=device)
    inputs = [torch.randn(2, side, side, device=device) for side in (8, 64, 16, 8, 16, 64, 64, 8)]
    results = [replay(x) for x in inputs]
    for x, (product, total) in zip(inputs, results, strict=True):
        torch.testing.assert_close(product, torch.sin(x) @ x.mT)
        torch.testing.assert_close(total, x.sum(-1))
