"""Depth heads: the reference's arithmetic, the DPT decoder of another implementation, files of ours and released."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTDepthEstimationHead, DPTNeck

from opsin.backbone.vit import Features
from opsin.errors import OpsinError
from opsin.evaluate.depth_heads import LinearHead, blocks_of, load_head, make_head, save_head


def features_of(blocks, width=16, batch=2, grid=(3, 5), seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        Features(
            torch.randn(batch, width, generator=rng),
            torch.zeros(batch, 0, width),
            torch.randn(batch, *grid, width, generator=rng),
        )
        for _ in range(blocks)
    ]


def test_the_four_blocks_are_those_of_the_paper():
    assert blocks_of(12, "linear4") == [2, 5, 8, 11]
    assert blocks_of(24, "dpt") == [4, 11, 17, 23]
    assert blocks_of(40, "dpt") == [9, 19, 29, 39]
    assert blocks_of(4, "linear4") == [0, 1, 2, 3]
    assert blocks_of(24, "linear1") == [23]
    with pytest.raises(OpsinError, match="takes four blocks, and this backbone has 3: give --head-kind linear1"):
        blocks_of(3, "dpt")


@given(st.integers(4, 100))
def test_four_blocks_are_different_and_end_with_the_last(depth):
    blocks = blocks_of(depth, "linear4")
    assert sorted(set(blocks)) == blocks
    assert blocks[0] >= 0
    assert blocks[-1] == depth - 1


def in_the_order_of_the_reference(head, features):
    """Features and class token joined, enlarged four times, then the layer, then the mean of bins: in numpy's words."""
    joined = []
    for block in features:
        cls = block.cls[:, None, None].expand_as(block.patches)
        joined.append(torch.cat([block.patches, cls], dim=-1).permute(0, 3, 1, 2))
    large = [F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False) for x in joined]
    x = torch.cat(large, dim=1).detach().numpy()
    weight, bias = head.scores.weight.detach().numpy(), head.scores.bias.detach().numpy()
    scores = np.maximum(np.einsum("kc,bchw->bkhw", weight, x) + bias[:, None, None], 0) + 0.1
    shares = scores / scores.sum(1, keepdims=True)
    return np.einsum("bkhw,k->bhw", shares, np.linspace(head.min_depth, head.max_depth, 256))


@settings(max_examples=8)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(["linear1", "linear4"]), st.integers(0, 99))
def test_a_linear_head_equals_the_order_of_the_reference(height, width, kind, seed):
    head = make_head(kind, 16, 0.5, 7.0, seed)
    features = features_of(head.blocks, grid=(height, width), seed=seed)
    wanted = in_the_order_of_the_reference(head, features)
    found = head(features).detach()
    assert found.shape == (2, 4 * height, 4 * width)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)


def test_a_linear_heads_depth_by_hand():
    head = LinearHead(2, 1, 1.0, 256.0)  # bins at 1, 2, …, 256 m
    with torch.no_grad():
        head.scores.weight.zero_()
        head.scores.bias.fill_(-5.0)
        head.scores.weight[9] = torch.tensor([1.0, 0.0, 0.0, 2.0])  # first of the patch, second of the class token
    one = [Features(torch.tensor([[7.0, 3.0]]), torch.zeros(1, 0, 2), torch.full((1, 1, 1, 2), 4.0))]
    # Bin 10 has 4 + 6 - 5 = 5, plus 0.1; all others 0.1: (0.1 · 32896 + 5 · 10) / (25.6 + 5)
    torch.testing.assert_close(head(one), torch.full((1, 4, 4), (3289.6 + 50) / 30.6))


def test_a_fresh_head_of_bins_starts_in_the_middle_and_stays_in_its_range():
    head = make_head("linear4", 16, 0.001, 10.0)
    depth = head.predict(features_of(4), (20, 30))
    assert depth.shape == (2, 20, 30)
    assert depth.min() >= 0.001
    assert depth.max() <= 10
    with torch.no_grad():
        head.scores.weight.zero_()
        head.scores.bias.zero_()
    torch.testing.assert_close(head.predict(features_of(4), (2, 3)), torch.full((2, 2, 3), 10.001 / 2))


def theirs(width):
    torch.manual_seed(1)
    config = DPTConfig(
        hidden_size=width,
        neck_hidden_sizes=[width // 8, width // 4, width // 2, width],
        reassemble_factors=[4, 2, 1, 0.5],
        readout_type="project",
        fusion_hidden_size=256,
        use_bias_in_fusion_residual=False,
        use_batch_norm_in_fusion_residual=False,
        add_projection=True,
        is_hybrid=False,
        head_in_index=-1,
        neck_ignore_stages=[],
        hidden_act="gelu",
    )
    return DPTNeck(config), DPTDepthEstimationHead(config)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_dpt_head_equals_that_of_transformers(grid):
    neck, top = theirs(16)
    with torch.no_grad():
        top.head[4].bias.fill_(1.0)  # most outputs are above 0
    head = make_head("dpt", 16, 0.25, 10.0)
    stage = neck.reassemble_stage
    state = {}
    for i in range(4):
        pairs = {
            f"readout.{i}": stage.readout_projects[i][0],
            f"project.{i}": stage.layers[i].projection,
            f"resize.{i}": stage.layers[i].resize,
            f"lateral.{i}": neck.convs[i],
            f"fusion.{i}.project": neck.fusion_stage.layers[i].projection,
            f"fusion.{i}.refine.conv1": neck.fusion_stage.layers[i].residual_layer2.convolution1,
            f"fusion.{i}.refine.conv2": neck.fusion_stage.layers[i].residual_layer2.convolution2,
        }
        if i:
            pairs[f"fusion.{i}.skip.conv1"] = neck.fusion_stage.layers[i].residual_layer1.convolution1
            pairs[f"fusion.{i}.skip.conv2"] = neck.fusion_stage.layers[i].residual_layer1.convolution2
        for name, module in pairs.items():
            state |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    state |= {f"mix.{key}": tensor for key, tensor in top.projection.state_dict().items()}
    state |= {f"output.{key}": tensor for key, tensor in top.head.state_dict().items()}
    head.load_state_dict(state)
    features = features_of(4, grid=grid)
    tokens = [torch.cat([block.cls[:, None], block.patches.flatten(1, 2)], dim=1) for block in features]
    wanted = top(neck(tokens, *grid)) + 0.25
    assert wanted.min() > 0.25
    assert wanted.std() > 1e-3
    torch.testing.assert_close(head(features), wanted, atol=1e-5, rtol=1e-4)


def test_a_prediction_is_clamped_and_then_resized():
    head = make_head("dpt", 16, 0.5, 1.0)
    with torch.no_grad():
        head.output[4].weight.mul_(1e4)
    raw = head(features_of(4))
    assert raw.max() > 1.5
    clamped = raw.clamp(0.5, 1.0)
    wanted = F.interpolate(clamped[:, None], (10, 12), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(head.predict(features_of(4), (10, 12)), wanted)


def test_a_fresh_dpt_head_starts_where_it_has_a_gradient():
    for seed in range(4):
        head = make_head("dpt", 16, 0.5, 40.5, seed)
        depth = head(features_of(4))
        assert (depth > 0.5).float().mean() > 0.99
        assert 5 < depth.mean() < 16


def test_the_same_seed_gives_the_same_head():
    first, again, other = (make_head("dpt", 16, 0.1, 1.0, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["readout.0.weight"], other["readout.0.weight"])


@pytest.mark.parametrize("kind", ["linear1", "linear4", "dpt"])
def test_our_files_keep_head_and_range(kind, tmp_path):
    head = make_head(kind, 16, 0.002, 33.0, seed=5)
    save_head(head, tmp_path / "new" / "head.safetensors")
    again = load_head(tmp_path / "new" / "head.safetensors", 16, 1.0, 2.0)
    assert (again.kind, again.min_depth, again.max_depth) == (kind, 0.002, 33.0)
    features = features_of(1 if kind == "linear1" else 4)
    assert torch.equal(head(features), again(features))


def released_dpt(width):
    """The names and shapes of a released DPT head, from the reference's modules."""
    sizes = [width // 8, width // 4, width // 2, width]
    shapes = {}
    for i, size in enumerate(sizes):
        shapes[f"reassemble_blocks.projects.{i}.conv.weight"] = (size, width, 1, 1)
        shapes[f"reassemble_blocks.projects.{i}.conv.bias"] = (size,)
        shapes[f"reassemble_blocks.readout_projects.{i}.0.weight"] = (width, 2 * width)
        shapes[f"reassemble_blocks.readout_projects.{i}.0.bias"] = (width,)
        shapes[f"convs.{i}.conv.weight"] = (256, size, 3, 3)
        shapes[f"fusion_blocks.{i}.project.conv.weight"] = (256, 256, 1, 1)
        shapes[f"fusion_blocks.{i}.project.conv.bias"] = (256,)
        for unit in (1, 2) if i else (2,):
            for conv in (1, 2):
                shapes[f"fusion_blocks.{i}.res_conv_unit{unit}.conv{conv}.conv.weight"] = (256, 256, 3, 3)
    for i, kernel in ((0, 4), (1, 2), (3, 3)):
        shapes[f"reassemble_blocks.resize_layers.{i}.weight"] = (sizes[i], sizes[i], kernel, kernel)
        shapes[f"reassemble_blocks.resize_layers.{i}.bias"] = (sizes[i],)
    shapes |= {"project.conv.weight": (256, 256, 3, 3), "project.conv.bias": (256,)}
    for i, out, into, kernel in ((0, 128, 256, 3), (2, 32, 128, 3), (4, 1, 32, 1)):
        shapes[f"conv_depth.head.{i}.weight"] = (out, into, kernel, kernel)
        shapes[f"conv_depth.head.{i}.bias"] = (out,)
    rng = torch.Generator().manual_seed(0)
    return {f"decode_head.{name}": 0.05 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def test_a_released_dpt_head_loads(tmp_path):
    state = released_dpt(16)
    # mmcv's checkpoints have more in them than the head
    torch.save(
        {"state_dict": state | {"backbone.mask_token": torch.zeros(1, 16)}, "meta": {}}, tmp_path / "a_dpt_head.pth"
    )
    head = load_head(tmp_path / "a_dpt_head.pth", 16, 0.001, 80.0)
    assert (head.kind, head.max_depth) == ("dpt", 80.0)
    assert torch.equal(
        head.fusion[2].skip.conv1.weight, state["decode_head.fusion_blocks.2.res_conv_unit1.conv1.conv.weight"]
    )
    assert torch.equal(
        head.fusion[0].refine.conv2.weight, state["decode_head.fusion_blocks.0.res_conv_unit2.conv2.conv.weight"]
    )
    assert torch.equal(head.output[2].bias, state["decode_head.conv_depth.head.2.bias"])
    assert torch.equal(head.mix.bias, state["decode_head.project.conv.bias"])
    with torch.no_grad():  # with nothing but a last bias, depth is that plus the least depth
        head.output[4].weight.zero_()
        head.output[4].bias.fill_(2.0)
    torch.testing.assert_close(head(features_of(4)), torch.full((2, 64, 96), 2.001))


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_released_linear_head_loads_and_computes_what_a_hand_does(blocks, tmp_path):
    width = 4
    weight, bias = torch.zeros(256, 2 * width * blocks, 1, 1), torch.zeros(256)
    weight[255, -1] = 25.6  # the last input is the last of the last block's class token
    path = tmp_path / f"dinov2_vits14_nyu_linear{'4' if blocks == 4 else ''}_head.pth"
    torch.save({"state_dict": {"decode_head.conv_depth.weight": weight, "decode_head.conv_depth.bias": bias}}, path)
    head = load_head(path, width, 0.0, 10.0)
    features = features_of(blocks, width)
    features[-1].cls[:, -1] = torch.tensor([1.0, -1.0])
    # Image 0: (25.6 · 5 + 25.6 · 10) / (25.6 + 25.6) = 7.5; image 1: the mean of all depths, 5
    torch.testing.assert_close(head(features).mean((1, 2)), torch.tensor([7.5, 5.0]))


def one_layer(path, inputs):
    torch.save(
        {"state_dict": {"decode_head.conv_depth.weight": torch.zeros(256, inputs, 1, 1),
                        "decode_head.conv_depth.bias": torch.zeros(256)}}, path
    )  # fmt: skip
    return path


def test_wrong_files_are_one_sentence(tmp_path):
    with pytest.raises(OpsinError, match="there is no file"):
        load_head(tmp_path / "none.pth", 16, 0.1, 1.0)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(OpsinError, match=r"text\.pth cannot be read as a head of the official release"):
        load_head(tmp_path / "text.pth", 16, 0.1, 1.0)
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(OpsinError, match=r"text\.safetensors is damaged"):
        load_head(tmp_path / "text.safetensors", 16, 0.1, 1.0)
    torch.save({"state_dict": {"decode_head.other": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(OpsinError, match=r"other\.pth holds no depth head"):
        load_head(tmp_path / "other.pth", 16, 0.1, 1.0)
    state = released_dpt(16)
    del state["decode_head.convs.2.conv.weight"]
    torch.save({"state_dict": state}, tmp_path / "part.pth")
    with pytest.raises(OpsinError, match=r"part\.pth is no whole dpt head: 1 tensors .* such as lateral\.2\.weight"):
        load_head(tmp_path / "part.pth", 16, 0.1, 1.0)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "backbone.safetensors")
    with pytest.raises(OpsinError, match="holds no depth head: give a file that --save-head wrote"):
        load_head(tmp_path / "backbone.safetensors", 16, 0.1, 1.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OpsinError, match="cannot write the head"):
        save_head(make_head("linear1", 4, 0.1, 1.0), tmp_path / "file" / "head.safetensors")


def test_a_head_for_another_backbone_is_one_sentence(tmp_path):
    with pytest.raises(OpsinError, match="is for features of width 24, and this backbone has 16"):
        load_head(one_layer(tmp_path / "head.pth", 48), 16, 0.1, 1.0)
    # ViT-g's one block has as many inputs as ViT-S's four: the released name tells
    with pytest.raises(OpsinError, match="is for features of width 1536, and this backbone has 384"):
        load_head(one_layer(tmp_path / "dinov2_vitg14_nyu_linear_head.pth", 3072), 384, 0.1, 1.0)
    with pytest.raises(OpsinError, match="is for features of width 384, and this backbone has 1536"):
        load_head(one_layer(tmp_path / "dinov2_vits14_nyu_linear4_head.pth", 3072), 1536, 0.1, 1.0)
