"""Spreads, rates, clocks, memory and operations."""

import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from torch import nn

from opsin.bench.flops import flops
from opsin.bench.timing import Clock, PeakMemory, machine, rate, spread, timed

CPU = torch.device("cpu")


def test_a_spread_of_known_numbers():
    s = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (s.minimum, s.lower_quartile, s.median, s.upper_quartile, s.maximum, s.count) == (1, 2, 3, 4, 5, 5)


def test_a_spread_of_one_number_is_that_number():
    s = spread([7.0])
    assert set(asdict(s).values()) == {7.0, 1}


def test_calls_that_warm_up_are_not_counted():
    calls = []

    def call() -> None:
        calls.append(1)
        if len(calls) <= 2:
            time.sleep(0.05)

    times = timed(call, CPU, repeats=3, warm_up=2)
    assert len(calls) == 5
    assert len(times) == 3
    assert max(times) < 0.05


def test_a_rate_counts_items_and_every_round_works_at_least_once():
    calls = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.01)

    slow = rate(call, 8, CPU, seconds=0, rounds=3)
    assert len(calls) == 3
    assert 0 < slow.median < 8 / 0.01
    longer = rate(call, 8, CPU, seconds=0.3, rounds=3)
    assert len(calls) > 6
    assert longer.maximum < 8 / 0.01


def test_time_inside_an_inner_part_counts_there_only():
    clock = Clock(CPU)
    with clock.part("outer"):
        time.sleep(0.01)
        with clock.part("inner"):
            time.sleep(0.1)
        time.sleep(0.01)
    assert clock.seconds["inner"] >= 0.1
    assert 0.02 <= clock.seconds["outer"] < 0.1


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x + 1


def test_the_forward_of_a_watched_module_counts():
    outer, clock = nn.Sequential(Slow(), Slow()), Clock(CPU)
    clock.watch(outer, "outer")
    clock.watch(outer[1], "inner")
    outer(torch.zeros(2))
    assert clock.seconds["inner"] >= 0.02
    assert clock.seconds["outer"] >= 0.02
    before = dict(clock.seconds)
    outer(torch.zeros(2))
    assert all(clock.seconds[name] >= before[name] + 0.02 for name in before)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets an earlier peak")
def test_the_peak_of_the_memory_is_that_since_the_reset():
    """In a process of its own: others may have told the allocator to keep what is freed."""
    code = """
import numpy, torch
from opsin.bench.timing import PeakMemory
memory = PeakMemory(torch.device("cpu"))
for _ in range(2):
    memory.reset()
    print(memory.read())
    held = numpy.ones(96 * 2**20, dtype=numpy.uint8)
    del held
    print(memory.read())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, peak, after, again = map(int, done.stdout.split())
    assert max(before, after) < 48 * 2**20
    assert [peak, again] == pytest.approx([96 * 2**20] * 2, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_peak_of_a_gpu_is_what_was_allocated():
    device = torch.device("cuda")
    memory = PeakMemory(device)
    memory.reset()
    before = torch.cuda.memory_allocated()
    held = torch.ones(2**26, dtype=torch.uint8, device=device)
    del held
    assert memory.read() == before + 2**26


def test_operations_are_the_same_with_and_without_pixels():
    def call(device: str) -> None:
        x = torch.ones(2, 3, 8, 8, device=device)
        w = torch.ones(5, 3, 4, 4, device=device, requires_grad=True)
        y = nn.functional.conv2d(x, w, stride=4).flatten(2)  # [2, 5, 4]
        (y.transpose(1, 2) @ y).sum().backward()

    forward = 2 * 2 * 4 * (3 * 4 * 4) * 5
    assert flops(lambda: call("cpu")) == flops(lambda: call("meta")) == 2 * forward + 3 * (2 * 2 * 4 * 5 * 4)


def test_the_machine_is_named():
    m = machine(CPU)
    assert m.device == m.cpu != ""
    assert m.cores >= 1
    assert m.torch == torch.__version__
    assert m.date.endswith("+00:00")
