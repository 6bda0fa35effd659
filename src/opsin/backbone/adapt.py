"""Tensors of one stem in another: other channels, another patch, another position grid.

The stem is all that knows the form of the input; the blocks see tokens of a width and nothing else. So weights can be
taken over by a model whose stem differs, if the stem's tensors are changed by these rules. Each returns at least fp32.

Letters in shapes: C channels of an image, D width, p side of a patch, h w sides of a position grid.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.backbone.formats import Contents
from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError

KERNEL = "patch_embed.proj.weight"
"""The patch convolution `[D, C, p, p]`."""


def fit_stem(contents: Contents, model: VisionTransformer, theirs: dict[str, Any], where: str) -> None:
    """Change the stem in `contents` to that of `model`, and write there what was changed.

    Args:
        contents: the weights, of the same trunk as the model.
        model: initialised; lends its register tokens to weights without.
        theirs: channels, patch, grid and registers that the tensors of `contents` show.
        where: what to call the weights in an error.

    Raises:
        OpsinError: channels or registers that no rule covers.
    """
    state, ours = contents.state, model.arch
    if theirs["channels"] not in (3, ours.channels):
        raise OpsinError(
            f"{where} is for images of {theirs['channels']} channels and the model for {ours.channels}: only weights "
            f"for 3 channels fit another number, so create the model with channels={theirs['channels']}."
        )
    if theirs["registers"] not in (0, ours.registers):
        raise OpsinError(
            f"{where} has {theirs['registers']} registers and the model {ours.registers}: registers can only be added "
            f"to weights without any, so create the model with registers={theirs['registers']}."
        )
    if theirs["channels"] != ours.channels:
        state[KERNEL] = channels(state[KERNEL], ours.channels)
        how = "summed to 1" if ours.channels == 1 else f"repeated to {ours.channels}, scaled by 3/{ours.channels}"
        contents.reshaped[KERNEL] = f"3 channels {how}"
    if theirs["patch"] != ours.patch:
        state[KERNEL] = patch(state[KERNEL], ours.patch)
        how = f"patch {theirs['patch']} resampled to {ours.patch} by the pseudo-inverse of resizing"
        contents.reshaped[KERNEL] = "; ".join([*filter(None, [contents.reshaped.get(KERNEL)]), how])
    rule = contents.arch or ours
    if ours.registers and "register_tokens" not in state:
        state["register_tokens"] = model.get_parameter("register_tokens").detach().clone()
        contents.filled["register_tokens"] = "the source has none; left as the model has them"
        rule = contents.arch or replace(ours, position_offset=0.1, position_antialias=False)  # as released without
    if theirs["grid"] != ours.grid:
        state["pos_embed"] = positions(state["pos_embed"], ours.grid, rule)
        contents.reshaped["pos_embed"] = resampled(theirs["grid"], ours.grid)
    if _rule(rule) != _rule(ours):
        contents.noted["position rule"] = f"{_rule(rule)} in the source, {_rule(ours)} in the model"


def channels(kernel: Tensor, number: int) -> Tensor:
    """The patch convolution `[D, 3, p, p]` of RGB images for images of `number` channels: `[D, number, p, p]`.

    For one channel the three are summed: a grey image then gives what three copies of it gave. For others they are
    repeated R, G, B, R, … and multiplied by 3/number, which keeps the size of the sum; so does timm.
    """
    kernel = _promoted(kernel)
    if number == 1:
        return kernel.sum(dim=1, keepdim=True)
    return kernel[:, torch.arange(number) % 3] * (3 / number)


def patch(kernel: Tensor, side: int) -> Tensor:
    """The patch convolution `[D, C, p, p]` for patches of another side: `[D, C, side, side]`.

    Resizing a patch bicubically is a matrix B; the new kernel is pinv(B)ᵀ times the old one, the least-squares answer
    to "what gives on the resized patch what the old kernel gave on the original" (Beyer et al., FlexiViT, 2212.08013).
    Exact for a larger patch; for a smaller one, as exact as the pixels that are left allow. Each axis is resized by
    itself, so B and its inverse are products of one matrix per axis.
    """
    given = kernel.shape[-1]
    eye = torch.eye(given, dtype=torch.float64, device=kernel.device)[None, None]
    resize = F.interpolate(eye, size=(side, given), mode="bicubic", antialias=True)[0, 0]  # [side, given]
    inverse = torch.linalg.pinv(resize)
    resized: Tensor = inverse.T @ kernel.double() @ inverse
    return resized.to(_promoted(kernel).dtype)


def positions(table: Tensor, grid: int, arch: Architecture) -> Tensor:
    """The position table `[1, 1 + h*w, D]` of a square grid resampled to `grid`×`grid` by the rule of `arch`."""
    table = _promoted(table)
    given = round((table.shape[1] - 1) ** 0.5)
    with torch.device("meta"):  # for its rule alone: it holds no other tensor
        rule = VisionTransformer(replace(arch, grid=given, width=table.shape[2], heads=1, depth=1))
    rule.pos_embed = nn.Parameter(table, requires_grad=False)
    return rule.positions(grid, grid)


def resampled(given: int, grid: int) -> str:
    """What a report says of `positions`."""
    return f"grid {given}×{given} resampled to {grid}×{grid}"


def _rule(arch: Architecture) -> str:
    return f"offset {arch.position_offset:g} {'with' if arch.position_antialias else 'without'} antialiasing"


def _promoted(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
