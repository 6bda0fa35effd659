"""`opsin bench`: the real command with right and with wrong options."""

import json
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

from opsin.bench.features import FeaturesResult
from opsin.bench.input import InputResult, make_photos
from opsin.bench.step import StepResult
from opsin.bench.timing import Machine, Spread
from opsin.cli import main

OPTIONS = {
    "step": "--backbone vit_nano8 --batch 2 --precision fp32 --prototypes 64 --global-size 32 --steps 2",
    "input": "--workers 2 --batch 4 --seconds 0.5",
    "features": "--backbone vit_nano8 --batch 4 --precision fp32 --size 32 --images 8 --workers 2",
}
RESULTS = {"step": StepResult, "input": InputResult, "features": FeaturesResult}


def opsin(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opsin.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def holds(result: Any, kind: type) -> None:
    """`result` has exactly the fields of the dataclass `kind`, and every spread is in order."""
    assert list(result) == [field.name for field in fields(kind)]
    for field in fields(kind):
        if is_dataclass(field.type):
            assert isinstance(field.type, type)
            holds(result[field.name], field.type)
    if kind is Spread:
        ordered = [result[name] for name in ("minimum", "lower_quartile", "median", "upper_quartile", "maximum")]
        assert ordered == sorted(ordered)
        assert ordered[0] > 0
        assert result["count"] >= 1


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_command_prints_a_table_and_writes_json(name, device, tmp_path):
    out = tmp_path / "result.json"
    done = opsin("bench", name, *OPTIONS[name].split(), "--device", device, "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    holds(result, RESULTS[name])
    holds(result["machine"], Machine)
    assert "images/s" in done.stdout
    assert f"torch {result['machine']['torch']}" in done.stdout
    rate = {"step": "images_per_second", "features": "model_images_per_second"}.get(name)
    assert f"{result[rate] if rate else result['both']['median']:,.1f}" in done.stdout


WRONG = [
    ("step --backbone vit_nano9", "unknown backbone 'vit_nano9': did you mean 'vit_nano8'?"),
    ("step --batch 0", "--batch is 0: give 2 or more, for KoLeo needs neighbours."),
    ("step --steps 0", "--steps is 0: give 1 or more."),
    (
        "step --global-size 225",
        "--global-size 225 is not a multiple of the patch of dinov2_vits14, 14: try 224.",
    ),
    ("step --batches 4", "unknown option '--batches': did you mean '--batch'?"),
    ("step --device tpu", "there is no device 'tpu' on this machine: give --device "),
    ("input --batch 0", "--batch is 0: give 2 or more, as a training needs."),
    ("input --seconds 0", "--seconds is 0: give more than 0."),
    ("input --seconds nan", "--seconds is nan: give more than 0."),
    ("input --workers -1", "--workers is -1: give 1 or more, or 0 for one per core."),
    ("features --backbone resnet50", "unknown backbone 'resnet50': "),
    ("features --batch 0", "--batch is 0: give 1 or more."),
    ("features --images 0", "--images is 0: give 1 or more."),
    ("features --workers 0", "--workers is 0: give 1 or more."),
    ("features --precision fp16 --device cpu", "fp16 is for GPUs, "),
    ("features --size 100", "--size 100 is not a multiple of the patch of dinov2_vits14, 14: try 98."),
]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says, which must be one sentence."""
    assert main(["bench", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    return told.err


@pytest.mark.parametrize(("arguments", "sentence"), WRONG)
def test_a_wrong_option_is_one_sentence(arguments, sentence, capsys):
    assert refused(arguments.split(), capsys).startswith(f"opsin: {sentence}")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(name, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file / "result.json", tmp_path, tmp_path / "missing" / "result.json"):
        said = refused([name, "--out", str(out)], capsys)
        assert said == f"opsin: cannot write --out {out}: give the name of a file in a folder that exists.\n"
    assert file.read_text() == "kept"


def test_the_real_command_ends_with_status_2(tmp_path):
    for arguments, sentence in (WRONG[0], (f"step --out {tmp_path}", "cannot write --out")):
        done = opsin("bench", *arguments.split())
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"opsin: {sentence}")
        assert len(done.stderr.splitlines()) == 1


def test_images_of_ones_own(tmp_path):
    make_photos(tmp_path / "photos", 3)
    out = tmp_path / "result.json"
    options = [*OPTIONS["input"].split(), "--device", "cpu", "--data", str(tmp_path / "photos"), "--out", str(out)]
    assert main(["bench", "input", *options]) == 0
    assert json.loads(out.read_text())["images"] == 3


def test_images_that_are_not_there(tmp_path, capsys):
    assert str(tmp_path / "none") in refused(["input", "--data", str(tmp_path / "none")], capsys)


def test_bench_without_a_task_lists_them(capsys):
    said = refused([], capsys)
    assert said == "opsin: opsin bench needs a task: opsin bench step, opsin bench input, opsin bench features.\n"
