import re

import pytest
import torch

from opsin.backbone import registry
from opsin.errors import OpsinError

# FACTS: number of parameters at the 518 position grid, with four registers, and with a 224 grid
COUNTS = {
    "s": (22_056_576, 22_058_112, 21_629_184),
    "b": (86_580_480, 86_583_552, 85_725_696),
    "l": (304_368_640, 304_372_736, 303_228_928),
    "g": (1_136_480_768, 1_136_486_912, 1_134_771_200),
}


def count(name, **overrides):
    with torch.device("meta"):
        return sum(p.numel() for p in registry.create(name, **overrides).parameters())


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_of_the_released_models(size):
    name = f"dinov2_vit{size}14"
    assert (count(name), count(f"{name}_reg4"), count(name, grid=16)) == COUNTS[size]


def test_swiglu_from_scratch_has_the_published_count():
    assert count("dinov2_vitl14", ffn="swiglu") == 304_794_880


def test_patch_16_is_stored_at_224():
    for name in ("dinov2_vits16", "dinov2_vitg16_reg4"):
        arch = registry.architecture(name)
        assert arch.patch * arch.grid == 224
        assert arch.registers == (4 if name.endswith("reg4") else 0)


def test_every_name_makes_a_backbone_and_registers_change_the_position_rule():
    assert len(registry.names()) == len(set(registry.names())) == 18
    for name in registry.names():
        assert count(name) > 0
        arch = registry.architecture(name)
        assert arch.width == 64 * arch.heads
        assert (arch.position_offset, arch.position_antialias) == ((0.0, True) if arch.registers else (0.1, False))


def test_tiny_names_run_on_64_pixels():
    backbone = registry.create("vit_nano8", depth=1)
    assert backbone([torch.zeros(2, 3, 64, 64)])[0].patches.shape == (2, 8, 8, 128)
    assert registry.architecture("vit_micro8").heads == 3


def test_unknown_name_and_field_suggest_the_nearest():
    with pytest.raises(OpsinError, match=re.escape("unknown backbone 'dinov2_vits14_reg': did you mean")):
        registry.architecture("dinov2_vits14_reg")
    with pytest.raises(OpsinError, match="unknown field of the architecture 'chanels': did you mean 'channels'"):
        registry.create("vit_nano8", chanels=4)
    with pytest.raises(OpsinError, match=r"width 130 is not a multiple of backbone\.heads 4"):
        registry.create("vit_nano8", width=130, heads=4)
