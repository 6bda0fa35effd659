"""What the comparisons share: runs of `opsin bench step`, each in a process of its own, and how results are written."""

import json
import os
import shlex
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


def run(command: list[str], environment: dict[str, str]) -> str:
    """The output of a command; a command that fails ends the comparison."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with status {done.returncode}: {last_line(done.stderr)}")
    return done.stdout


def pretrain(
    images: Path, out: Path, *, batch: int, steps: int, precision: str, device: str | None, environment: dict[str, str]
) -> list[dict[str, Any]]:
    """The records of `opsin pretrain` with ViT-S/14 and the drop path of the reference, one record a step."""
    options = {
        "recipe": "vits14-one-gpu",
        "precision": precision,
        "drop-path": "0.3",
        "batch.size": batch,
        "batch.micro": 0,
        "batch.group": min(batch, 64),
        "steps": steps,
        "log-every": 1,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    given += ["--device", device] if device else []
    run([*OPSIN, "pretrain", "--data", str(images), "--out", str(out), "--no-report", *given], environment)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


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
