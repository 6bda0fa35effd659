"""Checkpoints: all tensors of a run as safetensors, written whole or not at all.

    OUT/checkpoints/step-00001000/state.safetensors     student, teacher, moments, centres, loss scale
    OUT/checkpoints/step-00001000/backbone.safetensors  the teacher's backbone, for `opsin.load`
    OUT/checkpoints/step-00001000/meta.json             step and what the run was made of

A checkpoint is written into a hidden folder, synced to disk, and then renamed: a folder with a proper name is complete,
whatever killed the run. No pickle is written or read.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opsin.backbone import weights
from opsin.backbone.vit import VisionTransformer
from opsin.errors import OpsinError


def folder(out: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return out / "checkpoints"


def steps(out: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    found = (path.name.removeprefix("step-") for path in folder(out).glob("step-*") if path.is_dir())
    return sorted(int(step) for step in found if step.isdecimal())


def save(
    out: Path, step: int, tensors: Mapping[str, Tensor], backbone: VisionTransformer, meta: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of `step` finished steps, then remove all but the latest `keep`."""
    final = folder(out) / f"step-{step:08d}"
    partial = folder(out) / f".step-{step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial / "state.safetensors")
        weights.save(backbone, partial / "backbone.safetensors", {"step": str(step)})
        (partial / "meta.json").write_text(json.dumps({"step": step, **meta}, indent=1))
        for file in partial.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder(out))
    except (OSError, SafetensorError, OpsinError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        # weights.save has its own sentence, this one says more: only the system's reason is taken from it
        cause = error.__context__ if isinstance(error, OpsinError) else error
        done = steps(out)
        left = f"the checkpoint of step {done[-1]} is intact" if done else "there is no earlier checkpoint"
        raise OpsinError(
            f"cannot write the checkpoint {final}: {_reason(cause or error)}; {left}. Free some space or choose "
            "another --out, then give the same command again."
        ) from None
    for old in steps(out)[:-keep]:
        shutil.rmtree(folder(out) / f"step-{old:08d}", ignore_errors=True)
    return final


def load(out: Path, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copy the checkpoint of `step` into `tensors`, which must have exactly its names and shapes; returns its meta."""
    path = folder(out) / f"step-{step:08d}"
    try:
        meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
        with safe_open(path / "state.safetensors", framework="pt") as stored:
            names = set(stored.keys())
            odd = sorted(names ^ set(tensors))
            if odd:
                raise OpsinError(
                    f"the checkpoint {path} is of another network: {len(odd)} names differ, the first is '{odd[0]}'. "
                    "Give the recipe it was made with, or another --out."
                )
            with torch.no_grad():
                for name, target in tensors.items():
                    value = stored.get_tensor(name)
                    if value.shape != target.shape or value.dtype != target.dtype:
                        raise OpsinError(
                            f"the checkpoint {path} is of another network: '{name}' is {list(value.shape)} "
                            f"{value.dtype} there and {list(target.shape)} {target.dtype} here. Give the recipe it was "
                            "made with, or another --out."
                        )
                    target.copy_(value)
    except (OSError, SafetensorError, ValueError) as error:
        raise OpsinError(
            f"the checkpoint {path} cannot be read ({_reason(error)}): remove this folder to go on from the one before."
        ) from None
    return meta


def clean(out: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in folder(out).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
