"""Readers of the forms in which backbones are kept; every form comes out in the names of the official release.

Pickles are read with torch's restricted reader, which refuses code.
"""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opsin.backbone.vit import Architecture
from opsin.errors import OpsinError

FORMAT = 1
"""Version of our own header."""

_PREFIXES = {"module", "_orig_mod"}  # left by DistributedDataParallel and torch.compile
_HUGGING_FACE_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_HUGGING_FACE_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layernorm": "norm",
}


@dataclass
class Contents:
    """What a source holds."""

    state: dict[str, Tensor]
    """Tensors in our names."""
    arch: Architecture | None = None
    """The architecture, where the source names it."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Names left out of `state`, with the reason."""
    filled: dict[str, str] = field(default_factory=dict)
    """Names put into `state`, with the reason."""
    reshaped: dict[str, str] = field(default_factory=dict)
    """Names changed in `state` to fit a model, with how."""
    noted: dict[str, str] = field(default_factory=dict)
    """What else is to be known of a model that was fitted, by subject."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What was given to `save`."""


def some(names: list[str]) -> str:
    """The first few of `names`, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def open_weights(path: Path) -> Contents:
    """Read `path` in whichever form it has."""
    if path.is_dir():
        return _open_hugging_face(path)
    raw, header = _read_file(path)
    if "opsin.format" in header:
        return _open_own(raw, header, path)
    ignored = {}
    if isinstance(raw.get("teacher"), Mapping):
        ignored = {name: "not the teacher of a training dump" for name in raw if name != "teacher"}
        raw = raw["teacher"]
    if odd := [str(name) for name, value in raw.items() if not isinstance(value, Tensor)]:
        raise OpsinError(
            f"{path} holds entries that are not tensors ({some(odd)}) and no 'teacher': save the backbone's state dict "
            "alone, without what surrounds it."
        )
    contents = _translate(raw, path)
    contents.ignored |= ignored
    return contents


def _open_own(raw: dict[str, Tensor], header: dict[str, str], path: Path) -> Contents:
    try:
        version, arch = int(header["opsin.format"]), Architecture(**json.loads(header["opsin.architecture"]))
    except (ValueError, KeyError, TypeError):
        version, arch = FORMAT + 1, None
    if version > FORMAT:
        raise OpsinError(f"{path} has a header that this version of Opsin cannot read: upgrade Opsin.")
    return Contents(raw, arch, metadata={k: v for k, v in header.items() if not k.startswith("opsin.")})


def _open_hugging_face(folder: Path) -> Contents:
    """A folder that transformers' `save_pretrained` wrote."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise OpsinError(
            f"folder {folder} has no readable config.json: pass a folder written by transformers' save_pretrained, or "
            "a weights file."
        ) from None
    arch = _hugging_face_architecture(config, folder)
    path = next((folder / name for name in _HUGGING_FACE_FILES if (folder / name).exists()), None)
    if path is None:
        raise OpsinError(f"folder {folder} has no weights: it needs one of {', '.join(_HUGGING_FACE_FILES)}.")
    if path.suffix == ".json":
        try:
            shards = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise _damaged(path, error) from None
        raw = {name: tensor for shard in shards for name, tensor in _read_file(folder / shard)[0].items()}
    else:
        raw = _read_file(path)[0]
    contents = _translate(raw, path)
    contents.arch = arch
    return contents


def _hugging_face_architecture(config: dict[str, Any], folder: Path) -> Architecture:
    """The architecture of a config.json. Positions follow the official rule of the model, not that of transformers."""
    kind = config.get("model_type")
    if kind not in ("dinov2", "dinov2_with_registers"):
        raise OpsinError(
            f"{folder}/config.json is of model type {kind!r}: folders of 'dinov2' and 'dinov2_with_registers' can be "
            "read; pass other weights as a file."
        )
    fixed = {"hidden_act": "gelu", "mlp_ratio": 4, "qkv_bias": True}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise OpsinError(
                f"{folder}/config.json has {name} {config[name]!r}, which is no DINOv2 backbone: it must be {value!r}."
            )
    registers = kind == "dinov2_with_registers"
    try:
        return Architecture(
            width=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            patch=config["patch_size"],
            ffn="swiglu" if config["use_swiglu_ffn"] else "mlp",
            registers=config["num_register_tokens"] if registers else 0,
            channels=config["num_channels"],
            grid=config["image_size"] // config["patch_size"],
            position_offset=0.0 if registers else 0.1,
            position_antialias=registers,
        )
    except (KeyError, TypeError) as error:
        raise OpsinError(
            f"{folder}/config.json does not describe the architecture ({error}): write the folder again with "
            "transformers' save_pretrained, or pass its weights file alone."
        ) from None


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The raw mapping of a file and, for safetensors, its header; told apart by content, not by suffix."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":
            with safe_open(path, "pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise OpsinError(f"there is no weights file {path}: check the path.") from None
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or a bare pickle of old versions
        raise _damaged(path, "it begins like neither safetensors nor a torch file")
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise OpsinError(
                f"{path} was refused: it is a pickle that would load {found[1]}, and a pickle can run any code; pass a "
                "file of tensors only, such as safetensors."
            ) from None
        raise _damaged(path, "its pickle holds more than the restricted reader knows") from None
    except Exception as error:  # the restricted reader meets damaged bytes with errors of every kind
        raise _damaged(path, error) from None
    if not isinstance(raw, Mapping) or not raw:
        raise OpsinError(f"{path} holds a {type(raw).__name__}, not named tensors: save a state dict.")
    return dict(raw), {}


def _damaged(path: Path, error: Exception | str) -> OpsinError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return OpsinError(f"{path} is damaged, truncated or no weights file ({reason}): fetch or save it again.")


def _translate(raw: Mapping[str, Tensor], path: Path) -> Contents:
    """Bring the names of any known form to ours."""
    contents = Contents({})
    for given, tensor in raw.items():
        name = ".".join(part for part in given.split(".") if part not in _PREFIXES)
        if name in contents.state:
            raise OpsinError(f"{path} holds {name} twice, once as {given}: save one backbone alone.")
        contents.state[name] = tensor
    if any(name.startswith("backbone.") for name in contents.state):
        _unwrap(contents, ("backbone.",), ("dino_head.", "ibot_head."), "a training head, not the backbone")
    if any(name.endswith("embeddings.position_embeddings") for name in contents.state):
        _from_hugging_face(contents)
    else:
        contents.state = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", k): v for k, v in contents.state.items()}
        if "mask_token" not in contents.state:
            _from_timm(contents)
    return contents


def _unwrap(contents: Contents, prefixes: tuple[str, ...], heads: tuple[str, ...], reason: str) -> None:
    """Drop `prefixes` from the names and ignore `heads` for `reason`; any other name stays, for `load` to refuse."""
    kept = {}
    for name, tensor in contents.state.items():
        if name.startswith(heads):
            contents.ignored[name] = reason
        else:
            prefix = next((p for p in prefixes if name.startswith(p)), "")
            kept[name.removeprefix(prefix)] = tensor
    contents.state = kept


def _fill_mask_token(contents: Contents, reason: str) -> None:
    if "mask_token" not in contents.state and "cls_token" in contents.state:
        contents.state["mask_token"] = torch.zeros_like(contents.state["cls_token"][0])
        contents.filled["mask_token"] = f"{reason}; zeros, as before training (only masked images use it)"


def _from_hugging_face(contents: Contents) -> None:
    """Rename, and join query, key and value in that order."""
    _unwrap(contents, ("dinov2.", "dinov2_with_registers."), ("classifier.",), "a classifier on top of the backbone")
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for given, tensor in contents.state.items():
        name = given
        for theirs, ours in _HUGGING_FACE_NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}(\.|$)", rf"\g<1>{ours}\g<2>", name)
        if found := re.fullmatch(r"(.+)\.attention\.attention\.(query|key|value)\.(weight|bias)", name):
            parts.setdefault(f"{found[1]}.attn.qkv.{found[3]}", {})[found[2]] = tensor
        else:
            state[name] = tensor
    for name, part in parts.items():
        if len(part) == 3:  # a part alone leaves the product missing, which `load` reports
            state[name] = torch.cat([part["query"], part["key"], part["value"]])
    contents.state = state
    _fill_mask_token(contents, "the Hugging Face model was made without one")


def _from_timm(contents: Contents) -> None:
    """timm keeps no mask token, packs SwiGLU as fc1/fc2, and adds the class position to the class token."""
    state = contents.state
    for name in [n for n in state if n.startswith("head.")]:
        contents.ignored[name] = "timm's classifier"
        del state[name]
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        if (table := state.get("pos_embed")) is not None and table.ndim == 3:
            state["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
            contents.filled["pos_embed[:, 0]"] = "timm adds the class position to the class token; zeros"
    for name in list(state):
        if found := re.fullmatch(r"(blocks\.\d+\.mlp\.)fc1\.weight", name):
            second = state.get(f"{found[1]}fc2.weight")
            if second is not None and state[name].shape[0] == 2 * second.shape[1]:
                for theirs, ours in (("fc1", "w12"), ("fc2", "w3")):
                    for kind in ("weight", "bias"):
                        if (tensor := state.pop(f"{found[1]}{theirs}.{kind}", None)) is not None:
                            state[f"{found[1]}{ours}.{kind}"] = tensor
    _fill_mask_token(contents, "timm's files hold none")
