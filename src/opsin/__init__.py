"""Opsin learns visual features from images without labels: the DINOv2 system, complete, fast and tested."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["__version__", "create", "load", "preset"]

if TYPE_CHECKING:
    from opsin.backbone.features import load
    from opsin.backbone.registry import create
    from opsin.pretrain.presets import preset

_HOMES = {
    "create": "opsin.backbone.registry",
    "load": "opsin.backbone.features",
    "preset": "opsin.pretrain.presets",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import opsin` stays instant, and a command loads only what it needs."""
    if name not in _HOMES:
        raise AttributeError(f"module 'opsin' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
