"""The linear segmentation head on patch features, ours and that of the official release."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opsin.backbone.vit import Features
from opsin.data.decode import shown
from opsin.errors import OpsinError
from opsin.evaluate.dense import patch_features
from opsin.evaluate.model import Model

IGNORED = -1
"""The class of pixels that count nowhere, in targets."""
PREFIX = "decode_head."
"""Before the names of the tensors in files of the official release."""


class SegmentationHead(nn.Module):
    """Batch normalisation and one linear layer on the patch features of the last blocks, side by side.

    Without activation and dropout, as the reference's BNHead. Its tensors have the names of the release.
    """

    def __init__(self, width: int, blocks: int, classes: int, seed: int = 0) -> None:
        """A new head.

        Args:
            width: D of the backbone.
            blocks: last blocks whose patch features are taken, after the final norm.
            classes: K.
            seed: of the weights, which are normal with deviation 0.01; biases are 0.
        """
        super().__init__()
        self.blocks = blocks
        self.bn = nn.BatchNorm2d(width * blocks)
        self.conv_seg = nn.Conv2d(width * blocks, classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]  # it has one

    @property
    def classes(self) -> int:
        """K."""
        return self.conv_seg.out_channels

    def forward(self, grids: Tensor) -> Tensor:
        """Logits `[B, K, h, w]` of grids `[B, blocks * D, h, w]`."""
        logits: Tensor = self.conv_seg(self.bn(grids))
        return logits

    def score(self, model: Model, images: Tensor, batch_size: int) -> Tensor:
        """Logits `[B, K, h, w]` on the patch grid of normalised images `[B, C, H, W]`, padded to the patch if need be.

        The backbone takes `batch_size` images at a time, the head all of them together.
        """
        layers = range(-self.blocks, 0)
        parts = (patch_features(model, part, layers, normalise=True) for part in images.split(batch_size))
        logits: Tensor = self(torch.cat([_stacked(part) for part in parts]))
        return logits


def _stacked(features: Sequence[Features]) -> Tensor:
    """`[B, blocks * D, h, w]`, earlier blocks first."""
    return torch.cat([layer.patches for layer in features], dim=-1).permute(0, 3, 1, 2)


def stretched(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits `[B, K, h, w]` at `height` by `width` pixels, bilinear with corners not aligned."""
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits `[B, K, h, w]`, stretched to targets `[B, H, W]`.

    Ignored pixels count as 0 in the mean and so make the loss smaller, as in the reference; a batch without any other
    is harmless. One image is stretched at a time, again when gradients are taken: at full size the logits of a batch
    of 16 with 150 classes would take 2.5 GB, their gradients as much again.
    """

    def of_one(grid: Tensor, target: Tensor) -> Tensor:
        full = stretched(grid[None], *target.shape)
        return F.cross_entropy(full, target[None], ignore_index=IGNORED, reduction="sum")

    sums = [
        checkpoint(of_one, grid, target, use_reentrant=False, preserve_rng_state=False)
        for grid, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(sums).sum() / targets.numel()


def save_head(head: SegmentationHead, path: Path) -> None:
    """Write the head as safetensors.

    Raises:
        OpsinError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}, path)
    except (OSError, SafetensorError) as error:
        raise OpsinError(f"cannot write the head to {shown(path)}: {error}. Choose another --save-head.") from None


def load_head(path: Path, width: int, depth: int) -> SegmentationHead:
    """Read a head of ours (.safetensors) or of the official release (.pth), in eval mode, on the CPU.

    Args:
        path: such as dinov2_vits14_ade20k_linear_head.pth or dinov2_vits14_voc2012_ms_head.pth.
        width: D of the backbone, from which follows how many blocks the head takes.
        depth: blocks of the backbone.

    Raises:
        OpsinError: there is no such file, it is no head, or one of another backbone.
    """
    if not path.is_file():
        raise OpsinError(f"there is no file {shown(path)}: give --head a segmentation head, or leave it out to train.")
    stored = _tensors(path)
    if any(name.startswith(PREFIX) for name in stored):
        stored = {name.removeprefix(PREFIX): value for name, value in stored.items() if name.startswith(PREFIX)}
    weight = stored.get("conv_seg.weight")
    names = {name for part in ("bn", "conv_seg") for name in (f"{part}.weight", f"{part}.bias")}
    names |= {"bn.running_mean", "bn.running_var"}
    missing = sorted(names - stored.keys())
    if missing or weight is None or weight.ndim != 4 or weight.shape[2:] != (1, 1):
        lacks = (
            f"it has no {', '.join(missing)}"
            if missing
            else f"conv_seg.weight is {list(stored['conv_seg.weight'].shape)}"
        )
        raise OpsinError(
            f"{shown(path)} is no linear segmentation head, {lacks}: give a file that --save-head wrote, or one of the "
            "official release such as dinov2_vits14_ade20k_linear_head.pth."
        )
    classes, channels = weight.shape[:2]
    blocks = channels // width
    if channels != blocks * width or not 1 <= blocks <= depth:
        raise OpsinError(
            f"{shown(path)} is a head on {channels} features per patch, and this backbone has {width} in each of "
            f"{depth} blocks: give the head that was trained on it."
        )
    if not all(stored[name].isfinite().all() for name in names):
        raise OpsinError(f"{shown(path)} has values that are not finite: it is damaged, or its training diverged.")
    head = SegmentationHead(width, blocks, classes)
    counted = {"bn.num_batches_tracked": torch.tensor(0), **stored}
    try:
        head.load_state_dict({name: counted[name] for name in head.state_dict()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise OpsinError(f"{shown(path)} is damaged: {reason} Get the file again.") from None
    return head.eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, or an OpsinError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged files make both readers raise almost anything
        raise OpsinError(
            f"{shown(path)} cannot be read as a segmentation head: give a .safetensors file that --save-head wrote, or "
            "a .pth file of the official release."
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    pairs = state.items() if isinstance(state, dict) else ()
    return {name: value for name, value in pairs if isinstance(name, str) and isinstance(value, Tensor)}
