"""Weights of one stem in a model of another: the rules alone, against timm, and `weights.adapt` as a whole."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import resample_patch_embed
from timm.models import adapt_input_conv

from opsin.backbone import adapt, registry, weights
from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError

torch.set_num_threads(2)

PLAIN = Architecture(width=64, depth=2, heads=1, patch=14, grid=4)
REGISTERS = replace(PLAIN, registers=4, position_offset=0.0, position_antialias=True)
KERNEL = "patch_embed.proj.weight"


def backbone(arch, seed=0):
    """A backbone none of whose tensors is zero or constant."""
    torch.manual_seed(seed)
    model = VisionTransformer(arch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def kernel(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(model, state, but=()):
    own = model.state_dict()
    for name in own.keys() - set(but):
        assert torch.equal(own[name], state[name]), name


def features(model, images):
    with torch.no_grad():
        found = model([images])[0]
    return torch.cat([found.cls[:, None], found.patches.flatten(1, 2)], dim=1)


@pytest.fixture
def source(tmp_path):
    """Saves a random backbone of the given architecture; returns it and its path."""

    def saved(arch, form="ours"):
        model, path = backbone(arch, seed=1), tmp_path / f"{form}.weights"
        if form == "ours":
            weights.save(model, path)
        else:
            torch.save(model.state_dict(), path)
        return model, path

    return saved


# ---- the rules


@pytest.mark.parametrize("number", [1, 2, 4, 6, 13])
def test_channels_as_timm(number):
    given = kernel(5, 3, 4, 4)
    adapted = adapt.channels(given, number)
    assert adapted.shape == (5, number, 4, 4)
    torch.testing.assert_close(adapted, adapt_input_conv(number, given), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(14, 16), (14, 8), (16, 14), (8, 16), (14, 7)])
def test_patch_as_timm(old, new):
    given = kernel(5, 4, old, old)
    adapted = adapt.patch(given, new)
    assert adapted.dtype == torch.float32
    torch.testing.assert_close(adapted, resample_patch_embed(given, [new, new]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("old", "new"), [(14, 16), (8, 16), (14, 32)])
def test_a_larger_patch_gives_what_the_original_gave(old, new):
    given = kernel(6, 3, old, old).double()
    patches = kernel(10, 3, old, old, seed=1).double()
    resized = F.interpolate(patches, size=(new, new), mode="bicubic", antialias=True)
    there = torch.einsum("dcij,bcij->bd", adapt.patch(given, new), resized)
    torch.testing.assert_close(there, torch.einsum("dcij,bcij->bd", given, patches), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("old", "new"), [(14, 8), (16, 14)])
def test_a_smaller_patch_is_the_least_squares_answer(old, new):
    """Over white noise nothing gives less error: the error is orthogonal to what the new kernel can express."""
    given = kernel(2, 1, old, old).double()
    pixels = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resized = F.interpolate(pixels, size=(new, new), mode="bicubic", antialias=True).flatten(1)  # [old², new²]
    error = resized @ adapt.patch(given, new).flatten(1).T - given.flatten(1).T
    assert (resized.T @ error).abs().max() < 1e-10
    assert error.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rules_promote_half_precision_and_keep_double(dtype):
    wanted = torch.promote_types(dtype, torch.float32)
    assert adapt.channels(kernel(2, 3, 4, 4).to(dtype), 4).dtype == wanted
    assert adapt.patch(kernel(2, 3, 4, 4).to(dtype), 5).dtype == wanted
    assert adapt.positions(kernel(1, 17, 8).to(dtype), 5, PLAIN).dtype == wanted


@pytest.mark.parametrize("arch", [PLAIN, REGISTERS], ids=["plain", "registers"])
def test_positions_are_those_of_a_backbone(arch):
    model = backbone(arch)
    state = torch.random.get_rng_state()
    adapted = adapt.positions(model.pos_embed.detach(), 6, arch)
    assert torch.equal(adapted, model.positions(6, 6))
    assert torch.equal(state, torch.random.get_rng_state()), "drew random numbers"


# ---- into a model


@pytest.mark.parametrize("form", ["ours", "official"])
@pytest.mark.parametrize("arch", [PLAIN, REGISTERS], ids=["plain", "registers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_nothing_to_adapt_it_is_load(arch, form, dtype, source):
    _, path = source(arch, form)
    adapted, loaded = backbone(arch).to(dtype), backbone(arch).to(dtype)
    assert weights.adapt(adapted, path) == weights.load(loaded, path)
    assert adapted.cls_token.dtype == dtype
    assert_same(adapted, loaded.state_dict())


@pytest.mark.parametrize("arch", [PLAIN, REGISTERS], ids=["plain", "registers"])
@pytest.mark.parametrize("form", ["ours", "official"])
def test_another_grid_is_load_resampled(arch, form, source):
    given, path = source(arch, form)
    adapted, loaded = (backbone(replace(arch, grid=6)) for _ in range(2))
    report = weights.adapt(adapted, path)
    assert report == weights.load(loaded, path, resample_positions=True)
    assert report.reshaped == ["pos_embed"]
    assert report.explained == {"pos_embed": "grid 4×4 resampled to 6×6"}
    assert_same(adapted, loaded.state_dict())
    images = torch.randn(1, 3, 84, 84)
    assert torch.equal(features(adapted, images), features(given, images))


def test_a_grey_image_gives_what_its_three_copies_gave(source):
    given, path = source(PLAIN)
    model = backbone(replace(PLAIN, channels=1))
    report = weights.adapt(model, path)
    assert report.reshaped == [KERNEL]
    assert KERNEL not in report.matched
    assert report.explained == {KERNEL: "3 channels summed to 1"}
    assert "1 reshaped" in str(report)
    assert "patch_embed.proj.weight: 3 channels summed to 1" in str(report)
    grey = torch.randn(2, 1, 56, 56)
    torch.testing.assert_close(features(model, grey), features(given, grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [4, 13])
def test_more_channels(number, source):
    given, path = source(PLAIN)
    model = backbone(replace(PLAIN, channels=number))
    report = weights.adapt(model, path)
    rgb = given.patch_embed.proj.weight
    for channel in range(number):
        torch.testing.assert_close(model.patch_embed.proj.weight[:, channel], rgb[:, channel % 3] * 3 / number)
    assert report.explained == {KERNEL: f"3 channels repeated to {number}, scaled by 3/{number}"}
    assert_same(model, given.state_dict(), but=[KERNEL])


@pytest.mark.parametrize(("old", "new"), [(14, 16), (14, 8), (16, 14)])
def test_another_patch(old, new, source):
    given, path = source(replace(PLAIN, patch=old))
    model = backbone(replace(PLAIN, patch=new))
    report = weights.adapt(model, path)
    wanted = resample_patch_embed(given.patch_embed.proj.weight.detach(), [new, new])
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), wanted, rtol=1e-4, atol=1e-4)
    assert report.explained == {KERNEL: f"patch {old} resampled to {new} by the pseudo-inverse of resizing"}
    assert_same(model, given.state_dict(), but=[KERNEL])


def test_resized_images_give_equal_features_at_a_larger_patch(source):
    given, path = source(PLAIN)
    model = backbone(replace(PLAIN, patch=16)).double()
    weights.adapt(model, path)
    patches = torch.randn(16, 3, 14, 14, dtype=torch.float64)
    larger = F.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)

    def assembled(parts):
        return parts.view(4, 4, 3, *parts.shape[-2:]).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)[None]

    torch.testing.assert_close(
        features(model, assembled(larger)), features(given.double(), assembled(patches)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("form", ["ours", "official"])
def test_added_registers_stay_as_they_are(form, source):
    given, path = source(PLAIN, form)
    model = backbone(REGISTERS)
    before = model.register_tokens.detach().clone()
    report = weights.adapt(model, path)
    assert torch.equal(model.register_tokens, before)
    assert_same(model, given.state_dict(), but=["register_tokens"])
    assert report.missing == ["register_tokens"]
    assert not report.reshaped
    assert report.explained == {
        "register_tokens": "the source has none; left as the model has them",
        "position rule": "offset 0.1 without antialiasing in the source, offset 0 with antialiasing in the model",
    }


@pytest.mark.parametrize("form", ["ours", "official"])
def test_a_grid_is_resampled_by_the_rule_of_the_source(form, source):
    given, path = source(PLAIN, form)
    model = backbone(replace(REGISTERS, grid=7))
    weights.adapt(model, path)
    assert torch.equal(model.pos_embed, given.positions(7, 7))


def test_another_rule_alone_is_noted(source):
    given, path = source(PLAIN)
    model = backbone(replace(PLAIN, position_offset=0.0))
    report = weights.adapt(model, path)
    assert_same(model, given.state_dict())
    assert report.explained == {
        "position rule": "offset 0.1 without antialiasing in the source, offset 0 without antialiasing in the model"
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_all_together(dtype, tmp_path):
    given, path = backbone(PLAIN, seed=1).to(dtype), tmp_path / "w.pth"
    torch.save(given.state_dict(), path)
    model = backbone(replace(REGISTERS, channels=4, patch=8, grid=7))
    report = weights.adapt(model, path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact = resample_patch_embed(adapt_input_conv(4, given.patch_embed.proj.weight.detach().float()), [8, 8])
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.pos_embed, given.float().positions(7, 7))
    assert_same(model, given.state_dict(), but=["register_tokens", KERNEL, "pos_embed"])
    assert sorted(report.reshaped) == [KERNEL, "pos_embed"]
    assert report.missing == ["register_tokens"]
    assert not report.unexpected
    assert report.explained[KERNEL] == (
        "3 channels repeated to 4, scaled by 3/4; patch 14 resampled to 8 by the pseudo-inverse of resizing"
    )
    assert len(report.matched) == len(model.state_dict()) - 3
    assert features(model, torch.randn(1, 4, 56, 56)).isfinite().all()


# ---- what no rule covers


def refused(model, path, *parts):
    """Adapting fails in one sentence that says each of `parts`, and leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OpsinError) as error:
        weights.adapt(model, path)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert_same(model, before)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"width": 128, "heads": 2}, "width 64 (model: 128)"),
        ({"depth": 4}, "depth 2 (model: 4)"),
        ({"ffn": "swiglu", "patch": 8}, "ffn mlp (model: swiglu)"),
    ],
)
@pytest.mark.parametrize("form", ["ours", "official"])
def test_another_trunk(form, changes, part, source):
    _, path = source(PLAIN, form)
    refused(
        VisionTransformer(replace(PLAIN, **changes)),
        path,
        "which differ in",
        part,
        "only channels, patch, position grid and registers can be adapted",
        "so give --init the architecture of the weights.",
    )


def test_other_heads_are_known_from_a_header_alone(source):
    refused(backbone(replace(PLAIN, heads=2)), source(PLAIN)[1], "which differ in heads 1 (model: 2)")


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({}, "architecture of the weights, vit_nano8."),
        ({"channels": 4}, "architecture of the weights, vit_nano8."),
        ({"width": 384, "depth": 12, "heads": 6, "patch": 14}, "of the weights, dinov2_vits14."),
        ({"width": 384, "depth": 12, "heads": 6, "patch": 16, "registers": 4}, "of the weights, dinov2_vits16_reg4."),
    ],
)
def test_the_nearest_architecture_is_named(changes, hint, tmp_path):
    arch = replace(registry.architecture("vit_nano8"), **changes)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VisionTransformer(arch).state_dict().items()}
    seen = {name: torch.zeros(shape) for name, shape in shapes.items() if "blocks" not in name or "norm1" in name}
    torch.save(seen, tmp_path / "w.pth")
    refused(registry.create("vit_micro8"), tmp_path / "w.pth", "the model is vit_micro8", hint)


def test_channels_other_than_three_are_not_changed(source):
    _, path = source(replace(PLAIN, channels=4))
    refused(
        backbone(PLAIN),
        path,
        "is for images of 4 channels and the model for 3",
        "only weights for 3 channels fit another number",
        "channels=4",
    )
    weights.adapt(backbone(replace(PLAIN, channels=4, patch=8)), path)


@pytest.mark.parametrize("registers", [0, 2, 8])
def test_registers_are_neither_dropped_nor_added_to_others(registers, source):
    model = backbone(replace(REGISTERS, registers=registers))
    refused(model, source(REGISTERS)[1], f"has 4 registers and the model {registers}:", "registers=4")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda s: s.pop("blocks.1.norm1.weight"), "1 missing: blocks.1.norm1.weight"),
        (lambda s: s.update({"neck.weight": torch.zeros(2)}), "1 unexpected: neck.weight"),
        (lambda s: s.update({"blocks.0.mlp.fc1.weight": torch.zeros(99, 64)}), "of another shape: blocks.0.mlp.fc1"),
        (lambda s: s[KERNEL].view(-1)[0].fill_(torch.nan), f"NaN or infinite values in {KERNEL}"),
        (lambda s: s.update({KERNEL: torch.zeros(64, 3, 14, 16)}), "no vision transformer in any known form"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 12, 64)), "shape [1, 12, 64]"),
        (lambda s: s.update(pos_embed=torch.zeros(2, 17, 64)), "shape [2, 17, 64]"),
        (lambda s: s.update(register_tokens=torch.zeros(4, 64)), "of another shape: register_tokens [4, 64]"),
    ],
)
def test_it_is_as_strict_as_load(change, part, tmp_path):
    state = backbone(PLAIN, seed=1).state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pth")
    refused(backbone(replace(REGISTERS, patch=8, channels=4, grid=5)), tmp_path / "w.pth", part)


def test_a_header_that_lies_of_its_stem_changes_nothing(source):
    """What is adapted is read off the tensors."""
    given, path = source(PLAIN)
    lying = {"opsin.format": "1", "opsin.architecture": json.dumps(vars(replace(PLAIN, patch=16, channels=1, grid=9)))}
    save_file(load_file(path), path, lying)
    model = backbone(PLAIN)
    weights.adapt(model, path)
    assert_same(model, given.state_dict())


def test_load_adapts_nothing(source):
    _, path = source(PLAIN)
    for changes in ({"channels": 1}, {"patch": 8}, {"registers": 4}, {"grid": 5}):
        with pytest.raises(OpsinError, match="create the model"):
            weights.load(VisionTransformer(replace(PLAIN, **changes)), path)
