"""How things are measured: warm, synchronised, as medians with their spread, and on which machine."""

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from opsin.machine import commit


@dataclass(frozen=True)
class Spread:
    """What repeated measurements of one number say, in its unit."""

    median: float
    """The figure to quote."""
    lower_quartile: float
    """A quarter of the measurements lie below."""
    upper_quartile: float
    """A quarter of the measurements lie above."""
    minimum: float
    """The smallest."""
    maximum: float
    """The largest."""
    count: int
    """How many measurements there were."""


@dataclass(frozen=True)
class Machine:
    """What the figures were taken with; they mean nothing without it."""

    device: str
    """Name of the GPU or of the processor that computed."""
    cpu: str
    """Name of the processor."""
    cores: int
    """Cores of the processor that this process may use."""
    threads: int
    """Threads of an operation of torch on the processor."""
    python: str
    """Version of Python."""
    torch: str
    """Version of torch."""
    cuda: str | None
    """Version of CUDA that torch was built with, if it was."""
    commit: str | None
    """Commit of the code, marked -dirty when it was changed since; None outside a checkout."""
    date: str
    """When the measurement began, ISO 8601 in UTC."""


def machine(device: torch.device) -> Machine:
    """The machine as it is now, with the computing `device`."""
    cpu = processor()
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        cpu=cpu,
        cores=cores(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use, fewer than the machine's in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def spread(values: Sequence[float]) -> Spread:
    """The spread of one measurement or more."""
    lower, upper = values[0], values[0]
    if len(values) > 1:
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), lower, upper, min(values), max(values), len(values))


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def timed(call: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of each of some calls, after `warm_up` calls that are not counted."""
    for _ in range(warm_up):
        call()
    return [elapsed(call, device) for _ in range(repeats)]


def rate(call: Callable[[], object], items: int, device: torch.device, seconds: float, rounds: int = 5) -> Spread:
    """Items per second of a call that works through `items` of them, over some rounds that together take `seconds`."""
    rates = []
    for _ in range(rounds):
        synchronise(device)
        start, done = time.perf_counter(), 0
        while not done or time.perf_counter() - start < seconds / rounds:
            call()
            done += items
        synchronise(device)
        rates.append(done / (time.perf_counter() - start))
    return spread(rates)


class Clock:
    """Adds up the time of named parts; what runs inside another part does not count there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time of the block counts for `name`."""
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def start(self, name: str) -> None:
        """From here on time counts for `name`."""
        self._count()
        self._open.append(name)

    def stop(self) -> None:
        """From here on time counts for the part around this one."""
        self._count()
        self._open.pop()

    def _count(self) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def watch(self, module: nn.Module, name: str) -> None:
        """Count the forward of a module for `name` from now on."""

        def before(*_: object) -> None:
            self.start(name)

        def after(*_: object) -> None:
            self.stop()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


class PeakMemory:
    """The most memory that was in use between `reset` and `read`, in bytes.

    On CUDA what torch allocated, all of it. On a processor the peak of the process's resident set, what its allocator
    keeps included, less what was resident when this object was made, so that torch itself does not count. Linux can
    forget an earlier peak; elsewhere the figure is too low when the process once needed more.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0 if device.type == "cuda" else _status("VmRSS")

    def reset(self) -> None:
        """Forget earlier peaks."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak, VmHWM
        except OSError:
            return

    def read(self) -> int:
        """The peak since then."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, _status("VmHWM") - self._before)


def _status(field: str) -> int:
    """A number of bytes from /proc/self/status, or where there is none the peak of the process so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def matrix_product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of ten large square products in `dtype`: what a step could reach at most, as measured here."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return float(2 * side**3 / min(timed(lambda: a @ b, device, repeats=10, warm_up=3)))
