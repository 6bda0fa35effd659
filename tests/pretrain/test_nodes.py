"""Runs under torchrun as a user starts them: on two machines, one of which is cut off, and with a process killed.

The machines are two network namespaces with an address of their own each, joined by a virtual cable and by nothing
else. They take root; without it, the tests skip themselves.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from group import tensors_of
from opsin.cli import main
from opsin.pretrain.checkpoint import MOMENT, folder, steps

STEPS = 40
TIMEOUT = 8
"""Seconds that a process waits for another."""
ENDED = TIMEOUT + MOMENT + 45
"""Seconds within which all have ended, also if a checkpoint was being written; 45 of them for a busy machine."""


@pytest.fixture(scope="module")
def options(photos: Path, tiny: list[str]) -> list[str]:
    """Of the command that all runs here have in common, but for --out."""
    at = tiny.index("--steps") + 1
    own = ["--recipe", "cpu", "--device", "cpu", "--no-report", "--precision", "fp64", "--data.workers", "1"]
    own += ["--parallel.timeout", str(TIMEOUT), "--checkpoint.keep", "100", "--data", str(photos)]
    return [*tiny[:at], str(STEPS), *tiny[at + 1 :], *own]


@pytest.fixture(scope="module")
def alone(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that was never stopped."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(["pretrain", *options, "--out", str(out)]) == 0
    return out


@dataclass
class Machine:
    """Where torchrun is started; a network namespace, or this machine itself."""

    namespace: str | None = None
    cable: str = "lo"
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def torchrun(self, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        environment = os.environ | {"GLOO_SOCKET_IFNAME": self.cable, "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            process = subprocess.Popen(
                [*inside, sys.executable, "-m", "torch.distributed.run", *arguments],
                env=environment, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # torchrun ends the processes it has started
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(15)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Two, with the addresses 10.231.57.1 and 10.231.57.2."""
    unique = f"{os.getpid() % 100_000}"
    two = [Machine(f"opsin-{unique}-{end}", f"ops{unique}{end}") for end in "ab"]
    try:
        try:
            for machine in two:
                ip("netns", "add", str(machine.namespace))
            inside = [["netns", str(machine.namespace)] for machine in two]
            ip("link", "add", two[0].cable, *inside[0], "type", "veth", "peer", "name", two[1].cable, *inside[1])
            for number, machine in enumerate(two, 1):
                here = ["-n", str(machine.namespace)]
                ip(*here, "address", "add", f"10.231.57.{number}/30", "dev", machine.cable)
                ip(*here, "link", "set", "lo", "up")
                ip(*here, "link", "set", machine.cable, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        yield two
    finally:
        for machine in two:
            machine.end()
            subprocess.run(["ip", "netns", "delete", str(machine.namespace)], capture_output=True, check=False)


@pytest.fixture
def machine() -> Iterator[Machine]:
    """This one."""
    here = Machine()
    try:
        yield here
    finally:
        here.end()


def start(machines: list[Machine], tmp_path: Path, *command: str) -> list[subprocess.Popen[bytes]]:
    """torchrun on every machine, with a process each; what they say goes to 0.log and 1.log."""
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "10.231.57.1", "--master-port", "29417"]
    return [
        machine.torchrun(tmp_path / f"{n}.log", *where, "--node-rank", str(n), "-m", "opsin.cli", "pretrain", *command)
        for n, machine in enumerate(machines)
    ]


def until(true: Callable[[], object], processes: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """Wait for something that happens while all processes run."""
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, "waited too long"
        assert all(process.poll() is None for process in processes), said(tmp_path)
        time.sleep(0.02)


def said(tmp_path: Path) -> str:
    return "\n".join(log.read_text() for log in sorted(tmp_path.glob("*.log")))


def recorded(out: Path) -> list[int]:
    metrics = out / "metrics.jsonl"
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


def assert_same(run: Path, other: Path, step: int, tolerance: float) -> None:
    """The same weights and moments after a step, and every step recorded once."""
    ours, others = (tensors_of(folder(out) / f"step-{step:08d}") for out in (run, other))
    assert ours.keys() == others.keys()
    assert {tensor.dtype for name, tensor in ours.items() if name.startswith("student")} == {torch.float64}
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, others[name], rtol=0, atol=tolerance, msg=lambda text, at=name: f"{at}: {text}"
        )
    assert recorded(run) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_two_machines_train_what_one_process_trains(machines, options, alone, tmp_path):
    processes = start(machines, tmp_path, *options, "--out", str(tmp_path / "run"))
    assert [process.wait(200) for process in processes] == [0, 0], said(tmp_path)
    assert_same(tmp_path / "run", alone, STEPS, 1e-10)


@pytest.mark.slow
def test_a_machine_that_is_cut_off_in_the_middle(machines, options, alone, tmp_path):
    out = tmp_path / "run"
    processes = start(machines, tmp_path, *options, "--out", str(out))
    until(lambda: steps(out) and list(folder(out).glob(".step-*")), processes, tmp_path)  # while the next is written
    ip("-n", str(machines[1].namespace), "link", "set", machines[1].cable, "down")
    cut = time.monotonic()
    assert all(process.wait(ENDED) for process in processes)  # none with status 0
    assert time.monotonic() - cut < ENDED
    left = steps(out)
    assert 0 < left[-1] < STEPS
    for number in range(2):
        log = (tmp_path / f"{number}.log").read_text()
        (sentence,) = [line for line in log.splitlines() if line.startswith(("opsin:", "opsin, process"))]
        assert "another process of the run is gone or cannot be reached" in sentence
        assert f"the checkpoint of step {left[-1]} is intact" in sentence

    ip("-n", str(machines[1].namespace), "link", "set", machines[1].cable, "up")
    processes = start(machines, tmp_path, *options, "--out", str(out))
    assert [process.wait(200) for process in processes] == [0, 0], said(tmp_path)
    assert f"going on from the checkpoint of step {left[-1]}" in (tmp_path / "0.log").read_text()
    assert_same(out, alone, STEPS, 1e-10)


def test_a_process_that_is_killed_in_the_middle_of_a_step(machine, options, alone, tmp_path, capsys):
    out = tmp_path / "run"
    where = ["--standalone", "--nproc-per-node", "2", "-m", "opsin.cli", "pretrain"]
    process = machine.torchrun(tmp_path / "0.log", *where, *options, "--out", str(out))
    until(lambda: steps(out), [process], tmp_path)
    os.kill(child(process.pid, "RANK=1"), signal.SIGKILL)
    assert process.wait(ENDED) != 0
    left = steps(out)
    assert 0 < left[-1] < STEPS
    log = (tmp_path / "0.log").read_text()
    assert "another process of the run is gone or cannot be reached" in log
    assert f"the checkpoint of step {left[-1]} is intact" in log
    assert "Signal 9 (SIGKILL)" in log  # torchrun says which process it was

    capsys.readouterr()
    assert main(["pretrain", *options, "--out", str(out)]) == 0  # with one process instead of two
    assert f"going on from the checkpoint of step {left[-1]}" in capsys.readouterr().err
    assert_same(out, alone, STEPS, 1e-10)


def child(parent: int, variable: str) -> int:
    """The process that `parent` started with this environment variable."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    for pid in listed.stdout.split():
        if variable.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError(f"no process with {variable}")
