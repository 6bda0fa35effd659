"""Weights in and out: strict, and self-describing.

`save` writes safetensors whose header names the architecture. `load` reads those and the files that others write:

- official flat `.pth` files, and training dumps `{"teacher": {"backbone.…", "dino_head.…"}}`, also with chunked block
  keys (`blocks.{chunk}.{i}.`) and the prefixes that compiled or replicated modules leave behind;
- Hugging Face `Dinov2Model` and `Dinov2WithRegistersModel` folders, also sharded or with a classifier on top;
- timm state dicts.

Whatever in a file does not fit and has no stated reason is an error; nothing is ever loaded partially. `adapt` is for
weights that go into a model of another stem: other channels, another patch, another position grid, added registers; it
names what it changed. Pickles are read with torch's restricted reader, which refuses code.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from opsin.backbone import registry
from opsin.backbone.adapt import KERNEL, fit_stem, positions, resampled
from opsin.backbone.formats import FORMAT, Contents, open_weights, some
from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError

_VISIBLE = ("width", "depth", "patch", "ffn", "registers", "channels")
_TRUNK = ("width", "depth", "heads", "ffn")


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor; `str()` gives a short summary."""

    source: str
    """Where the weights came from."""
    described: bool
    """Whether the source itself names its architecture; if not, only what shapes show was compared."""
    matched: list[str]
    """Tensors taken over as they are."""
    reshaped: list[str]
    """Tensors changed to fit, by `adapt` or when asked; each has in `explained` how."""
    missing: list[str]
    """Tensors of the model that the source lacks; each has its reason in `explained`."""
    unexpected: list[str]
    """Tensors of the source that the model lacks; each has its reason in `explained`."""
    explained: dict[str, str]
    """Why a missing or unexpected name is no error, how a reshaped tensor was changed, what else is to be known."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What was given to `save`, for our own files."""

    def __str__(self) -> str:
        counts = ", ".join(f"{len(getattr(self, k))} {k}" for k in ("matched", "missing", "unexpected", "reshaped"))
        lines = [f"{self.source}: {counts}"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.explained.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  {some(found)}: {reason}" for reason, found in reasons.items()]
        if not self.described:
            lines.append("  architecture inferred from the shapes; heads and position rule are not visible in the file")
        return "\n".join(lines)


def save(model: VisionTransformer, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write `model` as safetensors that name their architecture; a crash leaves the old file or the new one.

    Raises:
        OpsinError: when `path` cannot be written.
    """
    path = Path(path)
    header = {
        **(metadata or {}),
        "opsin.format": str(FORMAT),
        "opsin.architecture": json.dumps(asdict(model.arch)),
    }
    write_tensors(path, model.state_dict(), header, "weights")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], what: str) -> None:
    """Write safetensors whole or not at all, for all whom the umask lets read them.

    Raises:
        OpsinError: when `path` cannot be written; `what` they are is said.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        mode = beside.stat().st_mode
        save_file(state, beside, dict(header))
        beside.chmod(mode)  # safetensors makes files that only their owner reads
        with open(beside, "rb+") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise OpsinError(f"cannot write {what} to {path} ({error}): free some space or choose another path.") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def read(path: str | Path) -> tuple[dict[str, Tensor], Architecture | None]:
    """The tensors of any readable source in our names, and the architecture where the source names one.

    Raises:
        OpsinError: when `path` cannot be read, is damaged, or is a pickle that holds more than tensors.
    """
    contents = open_weights(Path(path))
    return contents.state, contents.arch


def infer(state: Mapping[str, Tensor], source: str = "the state dict") -> Architecture:
    """The architecture that the shapes of `state` (in our names) show.

    Heads leave no trace in the shapes: they are taken as width / 64, as in every released model. So does the rule for
    resampling positions, which is taken from the released models with or without registers.
    """
    seen = _visible(state, source)
    if seen["width"] % 64:
        raise OpsinError(
            f"{source} has width {seen['width']}, from which the number of heads cannot be told: create the backbone "
            "with its heads, then load the weights into it."
        )
    registers = seen["registers"] > 0
    return Architecture(
        **seen,
        heads=seen["width"] // 64,
        grid=_grid(state["pos_embed"], source),
        position_offset=0.0 if registers else 0.1,
        position_antialias=registers,
    )


def load(model: VisionTransformer, source: str | Path, *, resample_positions: bool = False) -> LoadReport:
    """Copy weights into `model`: all of them, or none and an error.

    Args:
        model: the backbone to fill.
        source: a file or folder in any of the forms that this module lists.
        resample_positions: take a position table of another size, resampled as `VisionTransformer.positions` does; the
            model then computes at its own size what the source would have computed there.

    Raises:
        OpsinError: another architecture, tensors missing, unexpected or of another shape, NaN or infinite values.
    """
    contents = open_weights(Path(source))
    _check_exactly(model, contents, str(source), resample_positions)
    return _fill(model, contents, str(source))


def adapt(model: VisionTransformer, source: str | Path) -> LoadReport:
    """Copy weights into `model`, whose stem may differ from theirs; the report says what was changed, and how.

    - Channels: weights for 3 fit a model of any number (rule: `opsin.backbone.adapt.channels`); others must be equal.
    - Patch: the convolution is resampled (`opsin.backbone.adapt.patch`).
    - Position grid: resampled by the source's rule, so that the model has at its own size the positions that the source
      would have there. At other sizes the model follows its own rule; if that is another, the report says so.
    - Registers: a model with registers takes weights without. Its register tokens stay as they are, so it must be an
      initialised model. Otherwise the numbers must be equal: registers are neither dropped nor added to trained ones.

    Width, depth, heads and feed-forward must be equal. Where nothing differs, this is `load`, bit for bit. What is
    changed is computed in fp32 or more; then everything is cast to the model's type, as in `load`.

    Args:
        model: the initialised backbone to fill.
        source: a file or folder in any of the forms that this module lists.

    Raises:
        OpsinError: another trunk, channels or registers beyond these rules, or what `load` raises; nothing is loaded.
    """
    contents, where = open_weights(Path(source)), str(source)
    theirs = _visible(contents.state, where)
    if contents.arch is not None:
        theirs["heads"] = contents.arch.heads
    _check_trunk(model.arch, theirs, where)
    fit_stem(contents, model, theirs | {"grid": _grid(contents.state["pos_embed"], where)}, where)
    return _fill(model, contents, where)


def restore(source: str | Path, device: str | torch.device | None = None) -> tuple[VisionTransformer, LoadReport]:
    """A new backbone of the architecture that `source` names or shows, with its weights.

    Raises:
        OpsinError: as `load` and `infer`.
    """
    contents = open_weights(Path(source))
    model = empty(contents.arch or infer(contents.state, str(source)), device)
    _check_exactly(model, contents, str(source), resample_positions=False)
    return model, _fill(model, contents, str(source))


def empty(arch: Architecture, device: str | torch.device | None = None) -> VisionTransformer:
    """A backbone whose weights are not initialised, for `load` to fill; spares the time of drawing random ones."""
    with torch.device("meta"):
        model = VisionTransformer(arch)
    return model.to_empty(device=device or "cpu")


def _fill(model: VisionTransformer, contents: Contents, where: str) -> LoadReport:
    state = contents.state
    _check_tensors(model.state_dict(), state, where)
    model.load_state_dict(state)
    changed = {*contents.reshaped, *contents.filled}
    return LoadReport(
        source=where,
        described=contents.arch is not None,
        matched=[name for name in state if name not in changed],
        reshaped=list(contents.reshaped),
        missing=list(contents.filled),
        unexpected=list(contents.ignored),
        explained=contents.filled | contents.ignored | contents.reshaped | contents.noted,
        metadata=contents.metadata,
    )


def _check_exactly(model: VisionTransformer, contents: Contents, where: str, resample_positions: bool) -> None:
    """Refuse another architecture; another position grid is refused or, when asked, resampled in `contents`."""
    _check_architecture(model, contents, where)
    state, ours = contents.state, model.arch.grid
    if "pos_embed" not in state or (grid := _grid(state["pos_embed"], where)) == ours:
        return
    if not resample_positions:
        raise OpsinError(
            f"{where} has a position grid of {grid}×{grid}, not {ours}×{ours} as the model: create the model with "
            f"grid={grid}, or resample it with resample_positions=True."
        )
    state["pos_embed"] = positions(state["pos_embed"], ours, model.arch)
    contents.reshaped["pos_embed"] = resampled(grid, ours)


def _check_trunk(arch: Architecture, theirs: dict[str, Any], where: str) -> None:
    """Refuse weights of other blocks, and name the architecture that they are of."""
    ours = {name: value for name, value in asdict(arch).items() if name in theirs}
    trunk = {name: theirs[name] for name in _TRUNK if name in theirs}
    differing = [f"{name} {value} (model: {ours[name]})" for name, value in trunk.items() if value != ours[name]]
    if not differing:
        return
    known = {name: asdict(registry.architecture(name)) for name in registry.names()}
    alike = [name for name in known if all(known[name][key] == value for key, value in trunk.items())]
    alike.sort(key=lambda name: sum(known[name][key] != theirs[key] for key in ("patch", "registers")))
    raise OpsinError(
        f"{where} holds {_describe(theirs)} and the model is {_describe(ours)}, which differ in "
        f"{', '.join(differing)}: only channels, patch, position grid and registers can be adapted, so give --init the "
        f"architecture of the weights{f', {alike[0]}' if alike else ''}."
    )


def _check_architecture(model: VisionTransformer, contents: Contents, where: str) -> None:
    """Refuse another architecture in one sentence, before a list of shapes buries the reason."""
    if contents.arch is None:
        theirs = _visible(contents.state, where)
    else:
        theirs = asdict(contents.arch)
        del theirs["layerscale"], theirs["grid"]  # an initial value, and what `resample_positions` is for
    ours = {name: value for name, value in asdict(model.arch).items() if name in theirs}
    if differing := [f"{name} {theirs[name]} (model: {ours[name]})" for name in theirs if theirs[name] != ours[name]]:
        raise OpsinError(
            f"{where} holds {_describe(theirs)} and the model is {_describe(ours)}, which differ in "
            f"{', '.join(differing)}: create the model to fit the weights, or pass weights that fit the model."
        )


def _check_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that are missing, unexpected, of another shape, or not finite."""
    missing = [name for name in ours if name not in theirs]
    unexpected = [name for name in theirs if name not in ours]
    shapes = [
        f"{name} {list(theirs[name].shape)} for {list(tensor.shape)}"
        for name, tensor in ours.items()
        if name in theirs and theirs[name].shape != tensor.shape
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(wrong.values()):
        found = "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in wrong.items() if names)
        raise OpsinError(
            f"{where} does not fit the model ({found}): nothing was loaded; pass the complete file of one backbone, "
            "with every tensor named as its source names it."
        )
    if bad := [name for name, tensor in theirs.items() if not torch.isfinite(tensor).all()]:
        raise OpsinError(
            f"{where} holds NaN or infinite values in {some(bad)}: nothing was loaded; use weights saved before the "
            "training diverged, or fetch the file again."
        )


def _visible(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The fields of `Architecture` that shapes show, but for the grid."""
    blocks = [int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)]
    patches = state.get(KERNEL, torch.empty(0))
    square = patches.ndim == 4 and patches.shape[2] == patches.shape[3]
    if not square or "pos_embed" not in state or not blocks:
        raise OpsinError(
            f"{source} holds no vision transformer in any known form (its first tensors: {some(list(state))}): pass a "
            "backbone of DINOv2, from Opsin, the official release, transformers or timm."
        )
    registers = state.get("register_tokens")
    return {
        "width": patches.shape[0],
        "depth": max(blocks) + 1,
        "patch": patches.shape[-1],
        "ffn": "swiglu" if any(".mlp.w12." in name for name in state) else "mlp",
        "registers": 0 if registers is None or registers.ndim != 3 else registers.shape[1],
        "channels": patches.shape[1],
    }


def _grid(table: Tensor, source: str) -> int:
    grid = round((table.shape[1] - 1) ** 0.5) if table.ndim == 3 and len(table) == 1 else 0
    if not grid or 1 + grid**2 != table.shape[1]:
        raise OpsinError(
            f"{source} has a position table of shape {list(table.shape)}, which is not a class position and a square "
            "grid: only square grids can be read."
        )
    return grid


def _describe(fields: dict[str, Any]) -> str:
    """The name of an architecture, or its fields."""
    for name in registry.names():
        known = asdict(registry.architecture(name))
        if all(known[key] == value for key, value in fields.items()):
            return name
    return "a backbone of " + ", ".join(f"{key} {fields[key]}" for key in _VISIBLE)
