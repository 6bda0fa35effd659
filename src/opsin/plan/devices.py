"""What a GPU can do: from its data sheet, or measured on the machine at hand."""

import os
import re
from dataclasses import dataclass
from typing import Literal

import torch

from opsin.bench.timing import matrix_product_peak, processor, rate
from opsin.errors import OpsinError, unknown
from opsin.pretrain.step import DTYPES

PRODUCT_SHARE = 0.81
"""Of a data sheet's dense products, what a large square product reaches: 800 of 989 TFLOP/s, measured on an H100."""
COPY_SHARE = 0.9
"""Of a data sheet's bandwidth, what a copy reaches: 3.0 of 3.35 TB/s, measured on an H100."""
CONTEXT_BYTES = 2**30
"""Taken on a device before there is a model: Python and torch on a processor; context, libraries and their workspaces
on a GPU (assumed)."""


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU, or of a processor."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory: int
    """Bytes."""
    product: float
    """FLOP/s of a large matrix product in the recipe's precision."""
    score_product: float
    """FLOP/s of the products that form prototype scores: in fp32 on a processor."""
    bandwidth: float
    """Bytes per second that a copy reads and writes."""
    watts: float | None
    """Power under load; None where no data sheet says it."""
    link: float
    """Bytes per second that it sends to another GPU of its machine."""
    bf16: bool
    """Whether it computes in bf16."""
    source: str
    """Where the figures come from."""

    @property
    def room(self) -> int:
        """Bytes for a model and its step."""
        return self.memory - CONTEXT_BYTES


@dataclass(frozen=True)
class DataSheet:
    """A GPU as its maker describes it: dense products, no sparsity."""

    gigabytes: float
    half: float
    """TFLOP/s in bf16 or fp16, summed in fp32."""
    single: float
    """TFLOP/s in fp32, without TF32."""
    gigabytes_per_second: float
    watts: float
    link: float
    """GB/s to other GPUs in one direction: NVLink, or PCIe."""
    bf16: bool = True
    """Whether it computes in bf16."""


DATA_SHEETS = {
    "v100-32": DataSheet(32, 125, 15.7, 900, 300, 150, bf16=False),
    "a100-40": DataSheet(40, 312, 19.5, 1555, 400, 300),
    "a100-80": DataSheet(80, 312, 19.5, 2039, 400, 300),
    "h100": DataSheet(80, 989, 67, 3350, 700, 450),
    "h200": DataSheet(141, 989, 67, 4800, 700, 450),
    "l4": DataSheet(24, 121, 30.3, 300, 72, 32),
    "l40s": DataSheet(48, 362, 91.6, 864, 350, 32),
    "rtx4090": DataSheet(24, 165, 82.6, 1008, 450, 32),
    "t4": DataSheet(16, 65, 8.1, 320, 70, 16, bf16=False),
}
"""NVIDIA's data sheets of V100 (SXM2), A100 (SXM), H100 (SXM), H200 (SXM), L4, L40S and T4; for the RTX 4090 the
whitepaper of its architecture, Ada."""
NAMES = [*DATA_SHEETS, "cpu", "auto"]
"""What `find` accepts."""


def find(name: str, precision: str) -> Device:
    """The device of a name in `NAMES`: by its data sheet, or for cpu and auto by measuring this machine for a second.

    Raises:
        OpsinError: an unknown name, or a precision that it does not compute or a plan knows no speed for.
    """
    name = name.lower()
    if precision == "fp64":
        raise OpsinError("a plan has no figures for fp64, which is for tests: give --precision bf16, fp16 or fp32.")
    if name in ("cpu", "auto"):
        return _here(torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu"), precision)
    if name not in DATA_SHEETS:
        raise unknown("GPU", name, NAMES)
    sheet = DATA_SHEETS[name]
    if precision == "bf16" and not sheet.bf16:
        raise OpsinError(f"the {name} has no bf16: give --precision fp16.")
    product = 1e12 * PRODUCT_SHARE * (sheet.single if precision == "fp32" else sheet.half)
    return Device(
        name=name,
        kind="cuda",
        memory=int(1e9 * sheet.gigabytes),
        product=product,
        score_product=product,
        bandwidth=1e9 * COPY_SHARE * sheet.gigabytes_per_second,
        watts=sheet.watts,
        link=1e9 * sheet.link,
        bf16=sheet.bf16,
        source=f"data sheet; large products reach {PRODUCT_SHARE:.0%} of it and copies {COPY_SHARE:.0%}, as on an H100",
    )


def _here(device: torch.device, precision: str) -> Device:
    """This machine, measured; power from a data sheet whose GPU its name contains."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else processor()
    dtype = DTYPES[precision]
    product = matrix_product_peak(device, dtype)
    half_on_cpu = not on_gpu and dtype.itemsize == 2
    numbers = torch.zeros(2**28 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    copies = rate(numbers.clone, 2 * len(numbers), device, seconds=0.5)
    plain = name.lower().replace(" ", "")
    known = [sheet for key, sheet in DATA_SHEETS.items() if re.search(key.split("-")[0] + "(?![0-9a-z])", plain)]
    return Device(
        name=name,
        kind="cuda" if on_gpu else "cpu",
        memory=torch.cuda.get_device_properties(device).total_memory if on_gpu else _machine_memory(),
        product=product,
        score_product=matrix_product_peak(device, torch.float32) if half_on_cpu else product,
        bandwidth=copies.median,
        watts=known[0].watts if known and on_gpu else None,
        link=1e9 * (known[0].link if known and on_gpu else 16),
        bf16=not on_gpu or torch.cuda.is_bf16_supported(),
        source="products and copies measured on this machine just now",
    )


def _machine_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
