"""Whole runs of the real command in processes of their own."""

import fcntl
import json
import os
import shutil
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

TIMINGS = ("images_per_second", "step_seconds", "data_seconds")


def command(photos: Path, out: Path, options: list[str]) -> list[str]:
    line = [sys.executable, "-m", "opsin.cli", "pretrain", "--recipe", "cpu", "--no-report", "--device", "cpu"]
    return [*line, "--data", str(photos), "--out", str(out), *options]


def run(photos: Path, out: Path, options: list[str], status: int = 0, code: str | None = None) -> str:
    line = command(photos, out, options)
    if code is not None:  # the same command, after some code that breaks something in it
        line = [sys.executable, "-c", code + "\nimport sys; from opsin.cli import main; sys.exit(main())", *line[3:]]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == status, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stderr


def records(out: Path) -> list[dict]:
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMINGS}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def state(out: Path, step: int = 12) -> dict[str, torch.Tensor]:
    return tensors_of(checkpoint.folder(out) / f"step-{step:08d}")


def assert_same_run(a: Path, b: Path) -> None:
    assert records(a) == records(b)
    ours, theirs = state(a), state(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


KILL_IN_SAVE = """
import os, signal
from opsin.pretrain import checkpoint
write = checkpoint.weights.save
def killed(model, path, metadata=None):
    if "step-00000006" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)  # after the state was written, before the checkpoint is whole
    write(model, path, metadata)
checkpoint.weights.save = killed
"""


@pytest.fixture(scope="module")
def uninterrupted(photos, tiny, tmp_path_factory) -> Path:
    """A run of twelve steps in one go; read only."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(photos, out, tiny)
    return out


def test_a_run_killed_inside_a_save_resumes_bit_for_bit(photos, tiny, tmp_path, uninterrupted):
    out = tmp_path / "killed"
    run(photos, out, tiny, status=-signal.SIGKILL, code=KILL_IN_SAVE)
    assert checkpoint.steps(out) == [3]
    assert list(checkpoint.folder(out).glob(".step-*"))
    assert len(records(out)) >= 6  # the steps since are repeated, and their records replaced
    (out / "metrics.jsonl").open("a").write('{"step": 7, "lo')  # and a record was cut off
    said = run(photos, out, tiny)
    assert "going on from the checkpoint of step 3" in said
    assert not list(checkpoint.folder(out).glob(".step-*"))
    assert checkpoint.steps(out) == [6, 9, 12]
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(photos, tiny, tmp_path, uninterrupted, number):
    out = tmp_path / "stopped"
    options = [*tiny, "--checkpoint.every", "1000"]
    process = subprocess.Popen(
        command(photos, out, options),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (0, 128 + number)
    if process.returncode:  # the usual case: it had steps left
        (saved,) = checkpoint.steps(out)
        assert f"stopped after step {saved}, which is saved" in said
        assert 2 <= saved < 12
        run(photos, out, options)
    assert "Traceback" not in said
    assert_same_run(out, uninterrupted)


def test_what_a_run_leaves(photos, tiny, tmp_path, uninterrupted):
    out = uninterrupted
    assert {p.name for p in out.iterdir()} == {
        ".lock",
        "backbone.safetensors",
        "cache",
        "checkpoints",
        "findings.jsonl",  # the batch is too small
        "heads.safetensors",
        "metrics.jsonl",
        "probe",
        "recipe.yaml",
        "run.json",
    }
    facts = json.loads((out / "run.json").read_text())
    assert facts["torch"] == torch.__version__
    assert facts["data"]["images"] == 24
    assert checkpoint.steps(out) == [6, 9, 12]  # the last three
    # The backbone is the teacher's, and loads by its path alone.
    extractor = opsin.load(out / "backbone.safetensors")
    teacher = state(out)
    for name, tensor in extractor.backbone.state_dict().items():
        assert torch.equal(tensor, teacher[f"average.backbone.{name}"])
    beside = opsin.load(checkpoint.folder(out) / "step-00000012" / "backbone.safetensors")
    assert torch.equal(beside.backbone.cls_token, extractor.backbone.cls_token)
    # The resolved recipe can be fed back.
    again = tmp_path / "again"
    line = command(photos, again, [])
    line[line.index("--recipe") + 1] = str(out / "recipe.yaml")
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert_same_run(again, out)


def test_another_recipe_or_other_images_are_refused(photos, tiny, tmp_path, uninterrupted):
    photos, out = shutil.copytree(photos, tmp_path / "images"), shutil.copytree(uninterrupted, tmp_path / "run")
    run(photos, out, tiny)  # a finished run stays as it is
    assert_same_run(out, uninterrupted)
    said = run(photos, out, [*tiny, "--schedule.rate", "0.1"], status=2)
    assert "schedule.rate (0.008 then, 0.1 now)" in said
    assert said.strip().splitlines()[-1].startswith("opsin: ")
    (photos / "rough" / "01.png").unlink()
    assert "the images (24 then, 23 now)" in run(photos, out, tiny, status=2)
    run(photos, out, [*tiny, "--accept-changes"])


def test_a_folder_holds_one_run_at_a_time(photos, tiny, tmp_path):
    out = tmp_path / "busy"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"another run is writing into {out}" in run(photos, out, tiny, status=2)


def test_weights_that_are_not_finite_are_never_saved(photos, tiny, tmp_path):
    code = """
import torch
from opsin.pretrain.optim import AdamW
step = AdamW.step
def broken(self, scalars, clipped):
    step(self, scalars, clipped)
    broken.calls += 1
    if broken.calls == 5:
        self.slots["backbone.norm.weight"].teacher.fill_(float("inf"))
broken.calls = 0
AdamW.step = broken
"""
    out = tmp_path / "inf"
    said = run(photos, out, tiny, status=2, code=code)
    assert "hold NaN or infinity after step 6: nothing was saved" in said
    assert checkpoint.steps(out) == [3]


def test_what_a_damaged_folder_says(photos, tiny, tmp_path, uninterrupted):
    out = shutil.copytree(uninterrupted, tmp_path / "damaged")
    (checkpoint.folder(out) / "step-00000006 (copy)").mkdir()
    with (out / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b"123\nnull\n\xff\xfe\n")
    run(photos, out, tiny)
    assert_same_run(out, uninterrupted)
    assert "12 steps already: give --steps 12 or more" in run(photos, out, [*tiny, "--steps", "6"], status=2)
    (out / "run.json").write_text("[]")
    assert "run.json is missing or damaged" in run(photos, out, tiny, status=2)
    run(photos, out, [*tiny, "--accept-changes"])


def test_workers_and_micro_batches_are_free_to_change(photos, tiny, tmp_path, uninterrupted):
    out = tmp_path / "other"
    run(photos, out, [*tiny, "--data.workers", "3", "--data.ahead", "0", "--checkpoint.every", "5"])
    assert_same_run(out, uninterrupted)
    run(photos, out, [*tiny, "--batch.micro", "4"])


def test_nan_gradients_are_left_out_then_named(photos, tiny, tmp_path):
    code = """
import torch
from opsin.pretrain import step
whole = step.total
def broken(terms):
    broken.calls += 1
    return whole(terms) * (float("nan") if broken.calls in BAD else 1.0)
broken.calls = 0
step.total = broken
"""
    out = tmp_path / "once"
    said = run(photos, out, tiny, code=code + "BAD = (4,)")
    assert "not-finite: in step 3 the gradients of backbone, dino_head, ibot_head were NaN or infinite" in said
    assert "the step was left out. The same command with --replay 3 says" in said
    assert [r["skipped"] for r in records(out)] == [0] * 3 + [1] * 9
    assert all(t.isfinite().all() for t in state(out).values())
    out = tmp_path / "always"
    said = run(photos, out, [*tiny, "--max-skipped", "2"], status=2, code=code + "BAD = range(4, 100)")
    assert "the gradients were NaN or infinite in 3 steps in a row, the last is step 5, and max_skipped is 2" in said
    assert checkpoint.steps(out) == [3]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp64"])
def test_every_precision_trains(photos, tiny, tmp_path, precision):
    out = tmp_path / precision
    run(photos, out, [*tiny, "--steps", "3", "--precision", precision])
    assert all(r["loss"] == pytest.approx(records(out)[0]["loss"], rel=0.5) for r in records(out))
    dtype = state(out, 3)["student.backbone.cls_token"].dtype
    assert dtype == (torch.float64 if precision == "fp64" else torch.float32)
