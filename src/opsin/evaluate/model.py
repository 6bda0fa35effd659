"""The frozen backbone that is evaluated, known by the content of its weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from opsin.backbone.features import FeatureExtractor, load
from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError
from opsin.machine import pick_device


@dataclass(frozen=True, eq=False)
class Model:
    """A backbone with its preprocessing, in eval mode, on its device."""

    extractor: FeatureExtractor
    """Gives features; `extractor.features(batch, layers=[…])` is frozen, but what it returns can train a head."""
    name: str
    """How tables call it."""
    digest: str
    """SHA-256 over architecture, weights and precision: what is kept of a model's features is found by it."""

    @property
    def backbone(self) -> VisionTransformer:
        """The network, for what features do not tell, such as attention."""
        return self.extractor.backbone

    @property
    def arch(self) -> Architecture:
        """Its width, depth, patch and channels."""
        return self.extractor.backbone.arch

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.extractor.device


def wrap(backbone: VisionTransformer, name: str = "backbone", precision: str | None = None) -> Model:
    """A `Model` of a network where it lies, in the precision asked for (see `FeatureExtractor`)."""
    return Model(FeatureExtractor(backbone, None, precision), name, _digest(backbone, precision))


def open_model(
    weights: Path, architecture: str | None = None, device: str | None = None, precision: str | None = None
) -> Model:
    """Load a backbone for evaluation.

    Args:
        weights: a file of ours, an official .pth, a Hugging Face folder or a timm file.
        architecture: its name, where the file does not tell it.
        device: cuda, mps or cpu; by default the first of these that is there.
        precision: fp32, bf16 or fp16 (on GPUs only); by default bf16 on cuda and fp32 elsewhere.

    Raises:
        OpsinError: there is no such file, device or precision, or the weights do not fit.
    """
    on = pick_device(device)
    if not weights.exists():
        raise OpsinError(f"there is no file or folder {weights}: give --weights the path of a backbone.")
    loaded = load(weights, device=on) if architecture is None else load(architecture, weights, device=on)
    precision = precision or ("bf16" if on.type == "cuda" else "fp32")
    digest = _digest(loaded.backbone, precision)
    name = weights.parent.name if weights.name == "backbone.safetensors" else weights.stem
    return Model(FeatureExtractor(loaded.backbone, loaded.report, precision), name or str(weights), digest)


def _digest(backbone: VisionTransformer, precision: str | None) -> str:
    digest = hashlib.sha256(f"{backbone.arch} {precision}".encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
