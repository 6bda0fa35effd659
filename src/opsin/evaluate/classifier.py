"""A linear classifier on pooled features, as linear evaluation trains it and the official release ships it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from opsin.backbone.weights import write_tensors
from opsin.errors import OpsinError
from opsin.evaluate.pooled import Pooled

KEY = "opsin.classifier"
"""Entry of a file's header that says what the classifier sees."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """One linear layer on the class tokens of the last blocks, with or without the mean patch token."""

    weight: Tensor
    """`[K, F]`, F = (blocks + mean) · D."""
    bias: Tensor
    """`[K]`."""
    blocks: int
    """Last blocks whose class tokens go in, after the final norm: 1 or 4."""
    mean: bool
    """Whether the mean patch token of the last block follows them."""

    def logits(self, pooled: Pooled) -> Tensor:
        """Scores `[N, K]` of pooled features, on the classifier's device; they may be anywhere."""
        return inputs(pooled, self.blocks, self.mean).to(self.weight.device) @ self.weight.T + self.bias


def inputs(pooled: Pooled, blocks: int, mean: bool) -> Tensor:
    """What such a classifier sees, `[N, (blocks + mean)·D]`: earlier blocks first, the mean patch token last."""
    tokens = pooled.cls[:, -blocks:].flatten(1).float()
    return torch.cat([tokens, pooled.mean.float()], dim=1) if mean else tokens


def save(classifier: Classifier, path: Path) -> None:
    """Write a classifier as safetensors that say what it sees.

    Raises:
        OpsinError: the file cannot be written.
    """
    header = {KEY: json.dumps({"blocks": classifier.blocks, "mean": classifier.mean})}
    write_tensors(path, {"weight": classifier.weight, "bias": classifier.bias}, header, "a classifier")


def load(path: Path, width: int, classes: int | None = None) -> Classifier:
    """A classifier from a file of `save`, or from one of the official release, on the CPU in fp32.

    The release has `…_linear_head.pth`, on the class token and the mean patch token of the last block, and
    `…_linear4_head.pth`, on the class tokens of the last four blocks and the mean patch token of the last.

    Args:
        path: the file.
        width: D of the backbone whose features it is to take.
        classes: number of classes that it must have, if that is known.

    Raises:
        OpsinError: no such file, another format, another width or number of classes.
    """
    if not path.is_file():
        raise OpsinError(f"there is no file {path}: give the path of a linear head.")
    tensors, header = _read(path)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or bias is None or len(tensors) != 2 or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:4]) or "nothing"
        raise OpsinError(
            f"{path} is not a linear head: it must hold a weight [K, F] and a bias [K], and holds {found}."
        )
    if KEY in header:
        told = json.loads(header[KEY])
        blocks, mean = int(told["blocks"]), bool(told["mean"])
    else:
        blocks, mean = {2 * width: (1, True), 5 * width: (4, True)}.get(weight.shape[1], (0, False))
    if weight.shape[1] != (blocks + mean) * width or not blocks:
        raise OpsinError(
            f"the head {path} takes {weight.shape[1]} inputs and does not fit a backbone of width {width}: give the "
            "head that was trained on this backbone."
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise OpsinError(f"the head {path} has values that are not finite: it is damaged, or its training diverged.")
    if classes is not None and len(bias) != classes:
        raise OpsinError(
            f"the head {path} has {len(bias)} classes and the data {classes}: give the data that it was trained on."
        )
    return Classifier(weight.float(), bias.float(), blocks, mean)


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()):
            return state, {}
    except Exception:  # damaged files make both readers raise almost anything
        pass
    raise OpsinError(f"{path} is not a linear head: give a file of --save-head, or a …_head.pth of the release.")
