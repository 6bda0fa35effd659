"""Submitting, environment, preemption and return to the queue, with a stand-in for Slurm on this machine."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stand_in_slurm
from opsin import launch
from opsin.cli import main
from opsin.launch import Slurm, Task, environment

SMALL = {
    "recipe": "cpu",
    "device": "cpu",
    "steps": 60,
    "batch.size": 8,
    "batch.group": 4,
    "crops.global-size": 16,
    "crops.local-size": 8,
    "crops.local-count": 2,
    "backbone.depth": 1,
    "backbone.width": 16,
    "backbone.heads": 2,
    "backbone.grid": 2,
    "heads.dino-prototypes": 32,
    "heads.ibot-prototypes": 32,
    "heads.hidden": 16,
    "schedule.warmup-steps": 2,
    "checkpoint.every": 1000,
    "data.workers": 1,
}
TINY = [*(part for name, value in SMALL.items() for part in (f"--{name}", str(value))), "--no-report"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(random.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder that holds the stand-in's programs and the states of its jobs."""
    for name, value in stand_in_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "slurm"


@pytest.fixture
def refused(capsys):
    def call(*arguments: object) -> str:
        assert main(["launch", "slurm", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        return line.removeprefix("opsin: ")

    return call


def until(true: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def ended(slurm: Path) -> int:
    """The status with which the job ended; waits for it."""
    until((slurm / "7000.ended").exists)
    return int((slurm / "7000.ended").read_text())


def steps(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


# ---- the way into the queue


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "opsin launch slurm needs the command to run after --: "),
        ("--nodes 2 pretrain", "opsin launch slurm needs the command to run after --: "),
        ("--node 2 -- recipes", "unknown option '--node': did you mean '--nodes'?"),
        ("--nodes 0 -- recipes", "--nodes is 0: give 1 or more."),
        ("--hours nan -- recipes", "--hours is nan: give 0.0166667 or more."),
        ("--hours 1 --notice 4000 -- recipes", "--notice is 4000: give from 1 to 3600."),
        ("--memory 0 -- recipes", "--memory is 0.0: give 1 or more."),
        ("--gpus 2 --processes 3 -- recipes", "--processes is 3 with 2 GPUs per node: a GPU has one process, "),
        ("--gpus 2 -- recipes", "opsin recipes is work of one process, not of 2: give --nodes 1 --gpus 1."),
        ("-- launch slurm -- recipes", "a launched command cannot launch another: "),
        ("-- pretrian --recipe cpu", "unknown command 'pretrian': did you mean 'pretrain'?"),
        ("-- pretrain --recipe cpu --data x", "opsin pretrain needs --out: see opsin pretrain --help."),
        ("-- pretrain --recipe vitl-14 --data x --out y", "unknown recipe 'vitl-14': did you mean 'vitl14'?"),
        ("-- pretrain --recipe cpu --data x --out y --batch.siz 8", "unknown option '--batch.siz': did you mean "),
        ("-- pretrain --recipe cpu --data nowhere --out y", "there is no file or folder nowhere: give --data a path "),
        ("-- pretrain --recipe cpu --data no/{a,b}.tar --out y", "there is no file or folder no: give --data a path "),
        (
            "--nodes 3 -- pretrain --recipe cpu --data . --out y",
            "batch.size 64 is 1 × batch.group",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(arguments, said, refused, slurm):
    assert refused(*arguments.split()).startswith(said)
    assert not list(slurm.glob("*.script"))


def test_values_that_do_not_fit_are_told_too(slurm, capsys):
    assert main(["launch", "slurm", "--", "pretrain", "--recipe", "cpu", "--steps", "x", "--data", ".", "--out", "y"])
    assert "--steps" in capsys.readouterr().err
    assert not list(slurm.glob("*.script"))


def test_without_slurm(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused("--", "recipes") == (
        "there is no Slurm here (sbatch, srun, scontrol, squeue not found): give this command on a login node of the "
        "cluster, or start the processes with torchrun."
    )


def test_without_submitit(refused, slurm, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert refused("--", "recipes") == "opsin launch slurm needs submitit: pip install 'opsin[slurm]'."


def test_a_job_that_slurm_refuses(refused, slurm, tmp_path):
    said = refused("--partition", "full", "--log", tmp_path / "log", "--", "recipes")
    assert said == "sbatch refused the job: sbatch: error: invalid partition specified: full"


def test_a_log_folder_that_cannot_be_written(refused, slurm, tmp_path):
    (tmp_path / "file").write_text("")
    said = refused("--log", tmp_path / "file" / "log", "--", "recipes")
    assert said == f"cannot write into --log {tmp_path}/file/log: Not a directory. Choose another folder."


def test_what_is_asked_of_slurm(slurm, tmp_path, capsys):
    options = {
        "nodes": 2, "gpus": 8, "hours": 1.5, "partition": "p", "account": "a", "qos": "q", "constraint": "c",
        "cpus": 12, "memory": 1.5, "name": "n", "notice": 240, "log": tmp_path / "log",
    }  # fmt: skip
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    setup = ["--setup", "module load cuda", "exit 0"]  # the job itself is not wanted here
    run = ["pretrain", "--recipe", "vitl14", "--data", ".", "--out", str(tmp_path / "run")]
    assert main(["launch", "slurm", *given, *setup, "--", *run]) == 0
    log = tmp_path / "log" / "7000_0_log.out"
    assert capsys.readouterr().out.splitlines() == [
        "job 7000: 2 × 8 processes with a GPU each, 1.5 hours",
        f"log:    {log}",
        f"follow: tail -F {log}",
        "state:  squeue --job 7000",
        "cancel: scancel 7000",
    ]
    script = (slurm / "7000.script").read_text()
    assert sorted(line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")) == [
        "account=a", "constraint=c", "cpus-per-task=12", "gpus-per-node=8", "job-name=n", "mem=1536M", "nodes=2",
        "ntasks-per-node=8", "open-mode=append", f"output={tmp_path}/log/%j_0_log.out", "partition=p", "qos=q",
        "requeue", "signal=HUP@240", "time=90", "wckey=submitit",
    ]  # fmt: skip
    assert "\nexport SUBMITIT_PREEMPT_SIGNAL=HUP\nmodule load cuda\nexit 0\n" in script
    assert " --kill-on-bad-exit=1 --cpus-per-task=12 " in script
    assert ended(slurm) == 0


# ---- one task


def test_the_environment_is_that_of_torchrun(monkeypatch):
    slurm = {"JOB_ID": 123456, "PROCID": 11, "LOCALID": 3, "NODEID": 1, "NTASKS": 16, "JOB_NUM_NODES": 2}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[07-08]")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert environment() == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "23456",
    }


def test_tasks_of_another_of_submitits_executors(tmp_path, monkeypatch):
    from submitit import LocalExecutor

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executor = LocalExecutor(tmp_path)
    executor.update_parameters(tasks_per_node=2, timeout_min=2)
    results = executor.submit(environment).results()
    assert [(task["RANK"], task["LOCAL_RANK"], task["WORLD_SIZE"]) for task in results] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert results[0]["MASTER_PORT"] == results[1]["MASTER_PORT"]


@pytest.fixture
def task(monkeypatch, slurm):
    """Runs a task whose command ends with a status; returns its own, or "back" if it went back into the queue."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    monkeypatch.setenv("SLURM_JOB_ID", "7000")
    monkeypatch.setenv("RANK", "")

    def back(*_: object) -> None:
        sys.exit("back")

    def call(status: int, rank: int = 0, state: str = "RUNNING") -> int | str:
        (slurm / "7000.state").write_text(state)
        for number in before:
            signal.signal(number, back)
        monkeypatch.setattr(launch, "environment", lambda: {"RANK": str(rank)})
        monkeypatch.setattr(launch.pkgutil, "resolve_name", lambda _: lambda _: status)
        try:
            Task(("recipes",), 1)()
        except SystemExit as end:
            return end.code
        return 0

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_job_goes_back_when_it_was_told_to_save_or_preempted(task):
    told, ended = 128 + signal.SIGHUP, 128 + signal.SIGTERM
    assert task(told) == "back"
    assert task(ended) == "back"
    assert task(ended, state="CANCELLED") == ended
    assert task(ended, state="") == ended  # not known any more
    assert [task(status) for status in (0, 2, 128 + signal.SIGINT)] == [0, 2, 128 + signal.SIGINT]


def test_the_other_tasks_leave_it_to_the_first(task):
    assert [task(128 + number, rank=1) for number in (signal.SIGHUP, signal.SIGTERM)] == [0, 0]
    assert task(2, rank=1) == 2


def test_a_task_that_has_no_state_to_save_yet(task, slurm):
    task(0)
    for state, ended in (("RUNNING", "back"), ("CANCELLED", "143")):
        (slurm / "7000.state").write_text(state)
        with pytest.raises(SystemExit, match=ended):
            signal.raise_signal(signal.SIGTERM)


def test_returns_to_the_queue_are_counted(capsys):
    again = Task(("recipes",), 1).checkpoint()
    assert again.function == Task(("recipes",), 0)
    with pytest.raises(SystemExit, match="2"):
        again.function.checkpoint()
    assert "as often as --requeues allows: launch it again to go on" in capsys.readouterr().err


def test_the_processes_of_a_node():
    assert [Slurm().per_node, Slurm(gpus=8).per_node, Slurm(gpus=0).per_node] == [1, 8, 1]
    assert Slurm(gpus=0, processes=3).per_node == 3


# ---- a run


def test_a_run_that_is_preempted_goes_back_and_on(slurm, photos, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    asked = ["--nodes", "2", "--gpus", "0", "--processes", "1", "--requeues", "2", "--log", str(log)]
    assert main(["launch", "slurm", *asked, "--", "pretrain", "--data", str(photos), "--out", str(out), *TINY]) == 0
    said = log / "7000_0_log.out"
    until(lambda: steps(out)[-1:] > [3] or (slurm / "7000.ended").exists())
    subprocess.run(["scancel", "--signal=HUP", "7000"], check=True)  # what preemption is, seen from inside
    assert ended(slurm) == 0, said.read_text()
    assert steps(out) == list(range(1, SMALL["steps"] + 1))  # no step twice, none left out
    assert said.read_text().count("going on from the checkpoint of step") == 1
    assert (out / "backbone.safetensors").exists()


def test_a_cancelled_run_is_saved_and_stays_away(slurm, photos, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    asked = ["--gpus", "0", "--log", str(log)]
    assert main(["launch", "slurm", *asked, "--", "pretrain", "--data", str(photos), "--out", str(out), *TINY]) == 0
    until(lambda: steps(out)[-1:] > [3] or (slurm / "7000.ended").exists())
    subprocess.run(["scancel", "7000"], check=True)
    assert ended(slurm) == 128 + signal.SIGTERM
    assert "which is saved: the same command goes on from there" in (log / "7000_0_log.out").read_text()
    assert not (slurm / "7000.requeue").exists()
