"""What a run runs on: the device, what it can compute, and the commit of the code."""

import functools
import importlib.util
import os
import subprocess
from pathlib import Path

import torch

from opsin import ranks
from opsin.errors import OpsinError


def pick_device(name: str | None) -> torch.device:
    """The named device, or the fastest that is there; an OpsinError if the named one is not.

    Of several processes on a machine each gets a GPU of its own.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(kind for kind, there in present.items() if there)
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        alone = present["cuda"] and torch.cuda.device_count() == 1  # as on clusters that show each process its own
        name = f"cuda:{0 if alone else ranks.local_rank()}"
        if present["cuda"] and not alone and ranks.local_rank() >= torch.cuda.device_count():
            raise OpsinError(
                f"this machine has {torch.cuda.device_count()} GPUs, and process {ranks.local_rank()} has none: start "
                "one process per GPU, or give --device cpu."
            )
    kind = name.partition(":")[0]
    if not present.get(kind, False):
        there = ", ".join(kind for kind, is_there in present.items() if is_there)
        raise OpsinError(f"there is no device '{name}' on this machine: give --device {there}, or leave it out.")
    try:
        return torch.device(name)
    except RuntimeError:
        raise OpsinError(f"'{name}' is no device: give cpu, mps, cuda or cuda:N.") from None


def check_precision(precision: str, device: torch.device) -> None:
    """Raise an OpsinError if `device` cannot train in `precision` ("bf16", "fp64", …)."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise OpsinError("this GPU has no bf16: give --precision fp16.")
    if precision == "fp64" and device.type == "mps":
        raise OpsinError("MPS has no fp64: give --precision fp32, or --device cpu.")


def joules(device: torch.device) -> float | None:
    """Energy that a GPU has used since its driver was loaded, by NVML; None for other devices.

    Also None where the package nvidia-ml-py (in opsin[track]) or the GPU's counter is missing.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # numbers may be others than CUDA's
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(name))) / 1000
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None


@functools.cache
def has_triton() -> bool:
    """Whether kernels for CUDA can be compiled: torch brings Triton along on Linux."""
    return importlib.util.find_spec("triton") is not None


def commit() -> str | None:
    """Commit of the code that runs, with a mark when it was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
