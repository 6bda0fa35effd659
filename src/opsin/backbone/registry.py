"""Names of architectures: the released ones (paper Table 17, registers of 2309.16588) and tiny ones for a CPU."""

from dataclasses import fields, replace
from typing import Any

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import unknown

_SIZES = {
    "s": Architecture(width=384, depth=12, heads=6),
    "b": Architecture(width=768, depth=12, heads=12),
    "l": Architecture(width=1024, depth=24, heads=16),
    "g": Architecture(width=1536, depth=40, heads=24, ffn="swiglu"),
}

_ARCHITECTURES = {
    "vit_nano8": Architecture(width=128, depth=4, heads=2, patch=8, grid=8),
    "vit_micro8": Architecture(width=192, depth=6, heads=3, patch=8, grid=8),
}
# Patch 14 is stored at 518 pixels, as released; patch 16 is for training from scratch at 224.
for _size, _plain in _SIZES.items():
    for _patch, _grid in ((14, 37), (16, 14)):
        _sized = replace(_plain, patch=_patch, grid=_grid)
        _ARCHITECTURES[f"dinov2_vit{_size}{_patch}"] = _sized
        _ARCHITECTURES[f"dinov2_vit{_size}{_patch}_reg4"] = replace(
            _sized, registers=4, position_offset=0.0, position_antialias=True
        )


def names() -> list[str]:
    """All architecture names."""
    return list(_ARCHITECTURES)


def architecture(name: str) -> Architecture:
    """The architecture called `name`; an unknown name is an `OpsinError` that suggests the nearest."""
    if name not in _ARCHITECTURES:
        raise unknown("backbone", name, _ARCHITECTURES)
    return _ARCHITECTURES[name]


def create(name: str, **overrides: Any) -> VisionTransformer:
    """A freshly initialised backbone, with any field of `Architecture` overridden (`depth=2`, `channels=4`, …)."""
    known = [field.name for field in fields(Architecture)]
    for given in overrides:
        if given not in known:
            raise unknown("field of the architecture", given, known)
    return VisionTransformer(replace(architecture(name), **overrides))
