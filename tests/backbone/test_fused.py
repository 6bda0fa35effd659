"""The training form of a backbone against its plain form."""

import copy
from dataclasses import replace

import pytest
import torch

from opsin.backbone import rows as ops
from opsin.backbone.fused import FusedBlock, fuse
from opsin.backbone.registry import architecture
from opsin.backbone.vit import VisionTransformer


def backbones(ffn="mlp", dtype=torch.float64, registers=2):
    """A plain backbone and the same in training form; LayerScale is large enough for errors to show."""
    torch.manual_seed(0)
    plain = VisionTransformer(replace(architecture("vit_nano8"), ffn=ffn, registers=registers, layerscale=0.3))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim == 1 else None
    plain = plain.to(dtype)
    fused = copy.deepcopy(plain)
    fuse(fused)
    return plain, fused


def inputs(depth, dtype=torch.float64):
    random = torch.Generator().manual_seed(1)
    crops = [torch.randn(n, 3, side, side, generator=random).to(dtype) for n, side in ((6, 64), (8, 32))]
    masks = [torch.rand(6, 64, generator=random) < 0.3, None]

    def kept(images, keep):
        drawn = [torch.randperm(images, generator=random)[:keep].sort()[0] for _ in range(2 * depth)]
        return torch.stack(drawn).view(depth, 2, keep)

    return crops, masks, [kept(6, 4), kept(8, 5)]


def gradients(backbone, crops, masks, kept):
    backbone.zero_grad()
    features = backbone(crops, masks, kept)
    loss = sum((3 * torch.cat([t.flatten() for t in f])).sin().sum() for f in features)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in backbone.named_parameters()}


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_forward_and_gradients_are_those_of_the_plain_form(ffn, drop):
    plain, fused = backbones(ffn)
    assert all(isinstance(block, FusedBlock) for block in fused.blocks)
    crops, masks, kept = inputs(len(plain.blocks))
    loss, expected = gradients(plain, crops, masks, kept if drop else None)
    found_loss, found = gradients(fused, crops, masks, kept if drop else None)
    assert torch.allclose(found_loss, loss, rtol=1e-12)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)


def norm(tensors):
    return float(
        torch.stack([t.square().sum() for name, t in tensors.items() if name.startswith("blocks.")]).sum().sqrt()
    )


def test_half_precision_is_as_near_to_the_truth_as_the_plain_form():
    plain, fused = (b.to(torch.bfloat16) for b in backbones())
    exact = copy.deepcopy(plain).double()
    crops, masks, kept = inputs(len(plain.blocks), torch.bfloat16)
    _, truth = gradients(exact, [c.double() for c in crops], masks, kept)
    errors = []
    for backbone in (plain, fused):
        _, found = gradients(backbone, crops, masks, kept)
        assert all(g.dtype == torch.bfloat16 for g in found.values())
        errors.append(norm({name: found[name].double() - truth[name] for name in truth}))
    assert errors[1] <= 1.2 * errors[0]
    assert errors[0] <= 0.1 * norm(truth)  # else the comparison says nothing


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_the_kernels_give_the_same_block(monkeypatch, ffn):
    kernels = pytest.importorskip("opsin.backbone.kernels", reason="Triton is not on this platform")
    if torch.cuda.is_available():
        pytest.skip("the GPU test below covers it")
    plain, fused = (b.float() for b in backbones(ffn))
    crops, masks, kept = inputs(len(plain.blocks), torch.float32)
    for selection in (None, kept):
        loss, expected = gradients(plain, crops, masks, selection)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_kernels", lambda _: kernels)
            found_loss, found = gradients(fused, crops, masks, selection)
        assert torch.allclose(found_loss, loss, rtol=1e-5)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-3, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_the_kernels_give_the_same_block_on_a_gpu(ffn):
    plain, fused = (b.float().cuda() for b in backbones(ffn))
    crops, masks, kept = inputs(len(plain.blocks), torch.float32)
    crops, kept = [c.cuda() for c in crops], [k.cuda() for k in kept]
    masks = [None if m is None else m.cuda() for m in masks]
    _, expected = gradients(plain, crops, masks, kept)
    _, found = gradients(fused, crops, masks, kept)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-2, msg=name)


def stored(backbone, crops, masks, kept):
    """Bytes that autograd keeps for the backward, each storage once, without the parameters."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = backbone(crops, masks, kept)
    parameters = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    del features
    return sum(size for at, (size, _) in storages.items() if at not in parameters)


def test_it_stores_less_for_the_backward():
    plain, fused = (b.float() for b in backbones(registers=0))
    crops, masks, kept = inputs(len(plain.blocks), torch.float32)
    assert stored(fused, crops, masks, kept) < 0.7 * stored(plain, crops, masks, kept)
