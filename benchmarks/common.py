"""What the comparisons share: runs of `opsin bench step`, each in a process of its own, and how results are written."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from opsin.bench.timing import machine

OPSIN = [sys.executable, "-m", "opsin.cli"]


def device() -> torch.device:
    """What comparisons run on: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bench_step(*options: str) -> dict[str, Any]:
    """The JSON of `opsin bench step` with these options; `{"failed": why}` when it ended with an error."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "step.json"
        command = [*OPSIN, "bench", "step", *options, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"failed": last_line(done.stderr)}
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def last_line(text: str) -> str:
    """The last line of an output that is not empty: what a program said before it ended."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")


def threads(number: int) -> dict[str, str]:
    """The environment of a process that computes with this many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number)}


def finish(name: str, results: dict[str, Any]) -> None:
    """Print results as JSON and write them to runs/benchmarks/NAME.json."""
    text = json.dumps({"machine": asdict(machine(device())), **results}, indent=1)
    folder = Path("runs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(text)
    print(text)
