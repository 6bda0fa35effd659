"""Runs of the real command under torchrun: stopped on some processes, continued on others, the same curve."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import opsin
from group import tensors_of
from opsin.pretrain import checkpoint

EXACT = ["--precision", "fp64", "--batch.size", "16", "--steps", "10", "--checkpoint.every", "1000"]


def command(processes: int, photos: Path, out: Path, options: list[str]) -> list[str]:
    line = ["-m", "opsin.cli", "pretrain", "--recipe", "cpu", "--no-report", "--device", "cpu", "--data.workers", "1"]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*start, *line, "--data", str(photos), "--out", str(out), *options]


def started(processes: int, photos: Path, out: Path, options: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = command(processes, photos, out, options)
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run(processes: int, photos: Path, out: Path, options: list[str], status: int = 0) -> str:
    process = started(processes, photos, out, options)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == status, said[-3000:]
    return said


def stopped(processes: int, photos: Path, out: Path, options: list[str], after: int) -> str:
    """Begin, or go on, and give torchrun SIGTERM once some more steps are done."""
    metrics = out / "metrics.jsonl"
    process = started(processes, photos, out, options)
    deadline = time.monotonic() + 200
    while len(lines(metrics)) < after and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    return said


def lines(metrics: Path) -> list[str]:
    return metrics.read_text().splitlines() if metrics.exists() else []


def curve(out: Path) -> list[dict]:
    # the last two are means over processes of what each sees in its own images
    timings = ("images_per_second", "step_seconds", "data_seconds", "teacher.agreement", "teacher.rank")
    found = [json.loads(line) for line in lines(out / "metrics.jsonl")]
    return [{key: value for key, value in record.items() if key not in timings} for record in found]


@pytest.fixture(scope="module")
def alone(photos, tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    run(1, photos, out, [*tiny, *EXACT])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_a_run_stopped_on_2_processes_goes_on_on_4_and_on_1(photos, tiny, tmp_path, alone, mode):
    out, options = tmp_path / "run", [*tiny, *EXACT]
    said = stopped(2, photos, out, [*options, "--parallel.mode", mode], 2)
    assert "stopped after step" in said
    (first,) = checkpoint.steps(out)
    said = stopped(4, photos, out, [*options, "--parallel.mode", mode, "--batch.micro", "4"], first + 2)
    assert f"going on from the checkpoint of step {first}" in said
    second = checkpoint.steps(out)[-1]
    assert first < second < 10
    assert "backbone: " in run(1, photos, out, options)
    assert [r["step"] for r in curve(out)] == list(range(1, 11))
    for mine, one in zip(curve(out), curve(alone), strict=True):
        assert mine == pytest.approx(one, rel=1e-10, abs=1e-10)
    theirs = tensors_of(checkpoint.folder(alone) / "step-00000010")
    for name, tensor in tensors_of(checkpoint.folder(out) / "step-00000010").items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-10), name
    assert opsin.load(out / "backbone.safetensors").backbone.cls_token.shape == (1, 1, 16)


def test_two_processes_are_one_run_and_mistakes_are_told_once(photos, tiny, tmp_path):
    out, options = tmp_path / "run", [*tiny, *EXACT, "--steps", "3"]
    said = run(2, photos, out, options)
    assert said.count("checkpoints work") == said.count("backbone: ") == 1
    assert "2 processes, each with a whole model" in said
    assert [r["step"] for r in curve(out)] == [1, 2, 3]
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    said = run(2, photos, out, [*options, "--schedule.rate", "1"], status=1)
    assert said.count("opsin: ") == 1
    assert "schedule.rate (0.008 then, 1.0 now)" in said
