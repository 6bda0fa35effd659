"""Our backbone against transformers and timm on the same random weights, read through our own readers.

Register models are compared as they are. Plain models agree with the peers only at the stored grid: the official code
shifts the sampling of positions by an offset of 0.1, transformers resamples to the exact size, timm also antialiases.
There the peers are handed the official table, already resampled for that size.
"""

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from opsin.backbone import registry, weights

torch.set_num_threads(2)

DEPTH = {"s": 2, "b": 1, "l": 1, "g": 1}
SIZES = [(224, 224), (518, 518), (224, 336)]
TIMM = {"s": "small", "b": "base", "l": "large", "g": "giant"}


def randomise(model) -> None:
    """Weights of a plausible scale, none of them trivial; the positions are rough, which is the hard case."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim == 2 and "token" not in name:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.5 * noise)


def official_positions(table: Tensor, h: int, w: int) -> Tensor:
    """What the official plain models add: resampled by scale factors (n + 0.1) / 37 without antialias."""
    if h == w == 37:
        return table
    square = table[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    resampled = F.interpolate(square, scale_factor=((h + 0.1) / 37, (w + 0.1) / 37), mode="bicubic")
    assert resampled.shape[-2:] == (h, w)
    return torch.cat([table[:, :1], resampled.permute(0, 2, 3, 1).reshape(1, h * w, -1)], dim=1)


def hugging_face(size: str, registers: int):
    arch = registry.architecture(f"dinov2_vit{size}14")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=arch.width,
        num_hidden_layers=DEPTH[size],
        num_attention_heads=arch.heads,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=arch.ffn == "swiglu",
    )
    return getattr(transformers, f"{kind}Model")(config).eval()


def tokens(model, images: Tensor) -> Tensor:
    (features,) = model([images])
    return torch.cat([features.cls[:, None], features.registers, features.patches.flatten(1, 2)], dim=1)


@torch.inference_mode()
@pytest.mark.parametrize("registers", [0, 4], ids=["plain", "registers"])
@pytest.mark.parametrize("size", DEPTH)
def test_transformers(size, registers, tmp_path):
    peer = hugging_face(size, registers)
    randomise(peer)
    peer.save_pretrained(tmp_path)
    ours, report = weights.restore(tmp_path)
    assert not report.missing
    assert not report.unexpected
    named = registry.architecture(f"dinov2_vit{size}14" + "_reg4" * bool(registers))
    assert {**vars(named), "depth": DEPTH[size]} == vars(ours.arch)
    table = peer.embeddings.position_embeddings
    for h, w in SIZES:
        images = torch.randn(1, 3, h, w)
        if not registers:
            official = official_positions(table, h // 14, w // 14)
            peer.embeddings.interpolate_pos_encoding = lambda *_, official=official: official
        theirs = peer(images).last_hidden_state
        assert (tokens(ours, images) - theirs).abs().max() <= 1e-4, (h, w)


@torch.inference_mode()
@pytest.mark.parametrize("registers", [0, 4], ids=["plain", "registers"])
@pytest.mark.parametrize("size", DEPTH)
def test_timm(size, registers, tmp_path):
    name = f"vit_{TIMM[size]}_patch14{'_reg4' * bool(registers)}_dinov2"
    options = {"pretrained": False, "depth": DEPTH[size], "num_classes": 0}
    peer = timm.create_model(name, img_size=518, dynamic_img_size=bool(registers), **options).eval()
    randomise(peer)
    path = tmp_path / "timm.pth"
    torch.save(peer.state_dict(), path)
    ours = registry.create(f"dinov2_vit{size}14" + "_reg4" * bool(registers), depth=DEPTH[size])
    report = weights.load(ours, path)
    assert report.missing == (["pos_embed[:, 0]", "mask_token"] if registers else ["mask_token"])
    for h, w in SIZES:
        images = torch.randn(1, 3, h, w)
        if not registers and (h, w) != (518, 518):
            state = peer.state_dict()
            state["pos_embed"] = official_positions(ours.pos_embed, h // 14, w // 14)
            sized = timm.create_model(name, img_size=(h, w), **options).eval()
            sized.load_state_dict(state)
        else:
            sized = peer
        assert (tokens(ours, images) - sized.forward_features(images)).abs().max() <= 1e-4, (h, w)


@torch.inference_mode()
def test_layers_match_hidden_states(tmp_path):
    peer = hugging_face("s", 4)
    randomise(peer)
    peer.save_pretrained(tmp_path)
    ours, _ = weights.restore(tmp_path)
    images = torch.randn(2, 3, 56, 84)
    hidden = peer(images, output_hidden_states=True).hidden_states
    for features, theirs in zip(ours.layers(images, [0, 1], normalise=False), hidden[1:], strict=True):
        assert (features.cls - theirs[:, 0]).abs().max() <= 1e-4
        assert (features.patches.flatten(1, 2) - theirs[:, 5:]).abs().max() <= 1e-4
