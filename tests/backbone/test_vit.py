"""The backbone against slow formulas: one image at a time, one patch at a time, attention written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from opsin.backbone import vit
from opsin.backbone.vit import Architecture, Features, VisionTransformer
from opsin.errors import OpsinError

torch.set_num_threads(2)

PLAIN = Architecture(width=24, depth=3, heads=2, patch=4, grid=5)
REGISTERS = Architecture(
    width=24, depth=2, heads=3, patch=4, grid=5, ffn="swiglu", registers=3, channels=2, position_offset=0.0,
    position_antialias=True,
)  # fmt: skip
BOTH = pytest.mark.parametrize("arch", [PLAIN, REGISTERS], ids=["plain", "registers"])


def backbone(arch, seed=0, dtype=torch.float64):
    """Every parameter random, so that none is invisible in the output."""
    model = VisionTransformer(arch).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def batches(arch, seed=1):
    """Three batches of different sizes, with masks for two and kept samples for all."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(4, 20, 20), (3, 8, 12), (4, 16, 4)]
    crops = [torch.randn(b, arch.channels, h, w, generator=generator, dtype=torch.float64) for b, h, w in sizes]
    masks = [torch.rand(b, h * w // 16, generator=generator) < 0.4 for b, h, w in sizes]
    kept = []
    for (b, _, _), count in zip(sizes, (3, 2, 4), strict=True):
        order = [torch.randperm(b, generator=generator)[:count] for _ in range(2 * arch.depth)]
        kept.append(torch.stack(order).view(arch.depth, 2, count))
    return crops, [masks[0], None, masks[2]], kept


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def slow_forward(model, image, mask, factors):
    """Normalised tokens `[N, D]` of one image; `factors[depth][2]` weighs each residual branch, 0 skips it."""
    arch, p = model.arch, dict(model.named_parameters())
    h, w = image.shape[1] // arch.patch, image.shape[2] // arch.patch
    positions = model.positions(h, w)[0]
    tokens = [p["cls_token"][0, 0] + positions[0]]
    if arch.registers:
        tokens += list(p["register_tokens"][0])
    for i in range(h * w):
        top, left = i // w * arch.patch, i % w * arch.patch
        pixels = image[:, top : top + arch.patch, left : left + arch.patch]
        token = (p["patch_embed.proj.weight"] * pixels).sum((1, 2, 3)) + p["patch_embed.proj.bias"]
        tokens.append((p["mask_token"][0] if mask is not None and mask[i] else token) + positions[1 + i])
    x = torch.stack(tokens)
    for i in range(arch.depth):
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in p.items() if name.startswith(f"blocks.{i}.")}
        if factors[i][0]:
            y = layer_norm(x, b["norm1.weight"], b["norm1.bias"])
            y = y @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]
            q, k, v = (part.view(len(x), arch.heads, -1) for part in y.split(arch.width, dim=1))
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(arch.width // arch.heads)
            y = torch.einsum("hqk,khd->qhd", scores.exp() / scores.exp().sum(-1, keepdim=True), v).reshape(len(x), -1)
            x = x + factors[i][0] * b["ls1.gamma"] * (y @ b["attn.proj.weight"].T + b["attn.proj.bias"])
        if factors[i][1]:
            y = layer_norm(x, b["norm2.weight"], b["norm2.bias"])
            if arch.ffn == "mlp":
                y = y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
                y = (y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
            else:
                gate, value = (y @ b["mlp.w12.weight"].T + b["mlp.w12.bias"]).split(arch.hidden, dim=1)
                y = (gate * torch.sigmoid(gate) * value) @ b["mlp.w3.weight"].T + b["mlp.w3.bias"]
            x = x + factors[i][1] * b["ls2.gamma"] * y
    return layer_norm(x, p["norm.weight"], p["norm.bias"])


def tokens(features: Features) -> Tensor:
    return torch.cat([features.cls[:, None], features.registers, features.patches.flatten(1, 2)], dim=1)


@BOTH
@pytest.mark.parametrize("dropping", [False, True])
def test_forward_and_gradients_match_the_slow_twin(arch, dropping):
    model = backbone(arch)
    crops, masks, kept = batches(arch)
    weights = [torch.randn_like(crop[:, 0, 0, :1]) for crop in crops]  # another gradient for every sample
    parameters = list(model.parameters())

    fast = [tokens(f) for f in model(crops, masks, kept if dropping else None)]
    fast_gradients = torch.autograd.grad(
        sum((f.sin() * w[:, :, None]).sum() for f, w in zip(fast, weights, strict=True)), parameters
    )
    slow = []
    for crop, mask, index in zip(crops, masks, kept, strict=True):
        rows = []
        for b in range(len(crop)):
            factors = [
                [len(crop) / index.shape[2] * bool((index[i, j] == b).any()) if dropping else 1.0 for j in range(2)]
                for i in range(arch.depth)
            ]
            rows.append(slow_forward(model, crop[b], None if mask is None else mask[b], factors))
        slow.append(torch.stack(rows))
    slow_gradients = torch.autograd.grad(
        sum((s.sin() * w[:, :, None]).sum() for s, w in zip(slow, weights, strict=True)), parameters
    )
    for f, s in zip(fast, slow, strict=True):
        torch.testing.assert_close(f, s, rtol=0, atol=1e-10)
    for name, f, s in zip(dict(model.named_parameters()), fast_gradients, slow_gradients, strict=True):
        assert s.abs().max() > 0, name
        torch.testing.assert_close(f, s, rtol=1e-9, atol=1e-9, msg=name)


@BOTH
@pytest.mark.parametrize("dropping", [False, True])
def test_packed_equals_separate(arch, dropping):
    model = backbone(arch)
    crops, masks, kept = batches(arch)
    packed = model(crops, masks, kept if dropping else None)
    for i, features in enumerate(packed):
        (alone,) = model([crops[i]], [masks[i]], [kept[i]] if dropping else None)
        for together, separate in zip(features, alone, strict=True):
            torch.testing.assert_close(together, separate, rtol=0, atol=1e-12)


def test_shapes_and_token_order():
    features = backbone(REGISTERS)([torch.zeros(2, 2, 8, 12, dtype=torch.float64)])[0]
    assert features.cls.shape == (2, 24)
    assert features.registers.shape == (2, 3, 24)
    assert features.patches.shape == (2, 2, 3, 24)


def test_masked_patches_hide_their_pixels():
    model = backbone(PLAIN)
    crop = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    mask = torch.tensor([[False, True, False, False]])
    other = crop.clone()
    other[:, :, :4, 4:] += 1
    (seen,), (changed,) = model([crop], [mask]), model([other], [mask])
    assert torch.equal(seen.cls, changed.cls)
    assert not torch.equal(model([crop])[0].cls, model([other])[0].cls)


@BOTH
def test_layers_are_the_outputs_of_the_blocks_in_the_order_asked(arch):
    model = backbone(arch)
    crop = batches(arch)[0][1]
    seen = []
    handles = [block.register_forward_hook(lambda *call: seen.append(call[-1])) for block in model.blocks]
    (final,) = model([crop])
    for handle in handles:
        handle.remove()
    raw = model.layers(crop, [-1, 0], normalise=False)
    for features, hooked in zip(raw, (seen[-1], seen[0]), strict=True):
        assert torch.equal(tokens(features).flatten(0, 1), hooked)
    last, first = model.layers(crop, [arch.depth - 1, 0])
    assert torch.equal(tokens(last), tokens(final))
    assert torch.equal(tokens(first), model.norm(tokens(raw[1])))


def test_a_layer_that_does_not_exist():
    model, crop = backbone(PLAIN), torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    for call in (lambda: model.layers(crop, [0, 3]), lambda: model.attention(crop, 3)):
        with pytest.raises(OpsinError, match="there is no layer 3: this backbone has layers 0 to 2"):
            call()


@BOTH
@pytest.mark.parametrize("layer", [0, -1])
def test_attention_matches_one_computed_by_hand(arch, layer):
    model = backbone(arch)
    crop = batches(arch)[0][1]
    block = model.blocks[layer]
    seen = []
    with block.attn.register_forward_hook(lambda *call: seen.append((call[1][0], call[2]))):
        model([crop])
    matrix = model.attention(crop, layer)
    count = 1 + arch.registers + 6
    assert matrix.shape == (3, arch.heads, count, count)
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]), rtol=0, atol=1e-12)
    entered, left = (x.view(3, count, arch.width) for x in seen[0])
    d = arch.width // arch.heads
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    for head in range(arch.heads):
        q, k = (
            entered[1] @ weight[part * arch.width + head * d :][:d].T + bias[part * arch.width + head * d :][:d]
            for part in (0, 1)
        )
        torch.testing.assert_close(matrix[1, head], torch.softmax(q @ k.T / d**0.5, dim=1), rtol=0, atol=1e-12)
    values = (entered @ weight[2 * arch.width :].T + bias[2 * arch.width :]).view(3, count, arch.heads, d)
    mixed = torch.einsum("bhqk,bkhd->bqhd", matrix, values).flatten(2)
    torch.testing.assert_close(block.attn.proj(mixed), left, rtol=0, atol=1e-10)


def cubic_matrix(out: int, given: int, step: float) -> np.ndarray:
    """Resampling matrix of cubic convolution (Keys, a = -0.75), sampled every `step` cells, edges repeated."""

    def kernel(x, a=-0.75):
        x = abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        return near if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrix = np.zeros((out, given))
    for i in range(out):
        centre = (i + 0.5) * step - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), given - 1)] += kernel(centre - j)
    return matrix


def test_plain_positions_follow_the_official_rule():
    """The reference passes torch the scale (h + 0.1) / grid, and torch then samples every grid / (h + 0.1) cells."""
    model = backbone(Architecture(width=8, depth=1, heads=1, grid=37))
    table = model.pos_embed[0].detach().numpy()
    for h, w in ((16, 16), (16, 24), (45, 34), (37, 36), (1, 2)):
        rows, columns = cubic_matrix(h, 37, 37 / (h + 0.1)), cubic_matrix(w, 37, 37 / (w + 0.1))
        expected = np.einsum("ya,xb,abd->yxd", rows, columns, table[1:].reshape(37, 37, 8)).reshape(h * w, 8)
        positions = model.positions(h, w)[0].detach().numpy()
        np.testing.assert_allclose(positions[1:], expected, atol=1e-9)
        np.testing.assert_array_equal(positions[0], table[0])


def test_register_positions_are_antialiased_to_the_exact_size():
    """Pillow's bicubic resize of a float image is the independent form of torch's antialiased one."""
    arch = Architecture(width=4, depth=1, heads=1, grid=37, registers=4, position_offset=0.0, position_antialias=True)
    model = backbone(arch, dtype=torch.float32)
    table = model.pos_embed[0, 1:].detach().view(37, 37, 4).numpy()
    for h, w in ((16, 16), (16, 24), (45, 34), (37, 36)):
        channels = [
            np.asarray(Image.fromarray(table[:, :, d].copy()).resize((w, h), Image.Resampling.BICUBIC))
            for d in range(4)
        ]
        positions = model.positions(h, w)[0, 1:].detach().view(h, w, 4).numpy()
        np.testing.assert_allclose(positions, np.stack(channels, axis=-1), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), offset=st.sampled_from([0.0, 0.1]), grid=st.integers(2, 40))
def test_positions_have_the_size_asked_for(h, w, offset, grid):
    arch = Architecture(width=2, depth=1, heads=1, grid=grid, position_offset=offset, position_antialias=not offset)
    assert VisionTransformer(arch).positions(h, w).shape == (1, 1 + h * w, 2)


def test_positions_at_the_stored_grid_are_the_table():
    model = backbone(PLAIN)
    assert model.positions(5, 5) is model.pos_embed


def test_initialisation_is_that_of_the_reference():
    model = VisionTransformer(Architecture(width=256, depth=2, heads=4, registers=4, grid=16, layerscale=0.25))
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            assert (value == 0.25).all(), name
        elif name in ("cls_token", "register_tokens"):
            assert 3e-7 < value.std() < 3e-6, name
        elif name == "pos_embed" or (name.startswith("blocks") and name.endswith("weight") and value.ndim == 2):
            assert 0.019 < value.std() < 0.021, name
        elif name == "mask_token" or (name.endswith("bias") and "patch_embed" not in name):
            assert (value == 0).all(), name
    bound = 1 / math.sqrt(3 * 14 * 14)
    weight = model.patch_embed.proj.weight
    assert 0.99 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 8, 8), r"takes images \[B, 3, H, W\], not \[1, 4, 8, 8\]"),
        ((3, 8, 8), r"takes images \[B, 3, H, W\], not \[3, 8, 8\]"),
        ((1, 3, 8, 10), "height 8 and width 10 must be multiples of the patch 4: resize, for example to 8×8"),
    ],
)
def test_images_that_do_not_fit(shape, message):
    with pytest.raises(OpsinError, match=message):
        backbone(PLAIN)([torch.zeros(shape, dtype=torch.float64)])


def test_attention_written_out_is_the_fused_one(monkeypatch):
    torch.manual_seed(0)
    attention = vit.Attention(Architecture(32, 1, 4)).to(torch.bfloat16)
    x = torch.randn(5 * 9 + 3 * 20, 32, dtype=torch.bfloat16)
    layouts = [vit.Layout(5, 9), vit.Layout(3, 20)]
    results = []
    for longest in (0, 64):
        monkeypatch.setattr(vit, "WRITTEN_OUT", longest)
        inputs = x.clone().requires_grad_()
        out = attention(inputs, layouts)
        out.square().sum().backward()
        results.append((out, inputs.grad))
    assert not torch.equal(*(out for out, _ in results))  # two ways indeed
    for written, fused in zip(*results, strict=True):
        assert (written - fused).abs().max() <= 2e-2 * fused.abs().max()
