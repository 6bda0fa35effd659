"""Where the work of a curation runs: tasks on Daft, on this machine or on a Ray cluster, with equal results.

A step of the curation cuts its work into tasks by its settings alone, never by the number of workers. A task reads the
files it names, writes a file or two, and returns a small dictionary. So the plan is the same for both runners, a
stopped step goes on with the tasks whose files are missing, and no vectors travel through the engine.
"""

import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from types import FrameType
from typing import Any, Literal, Protocol
from uuid import uuid4

import torch

from opsin.data.progress import progress
from opsin.errors import OpsinError, within
from opsin.memory import give_back_freed_memory

Runner = Literal["native", "ray"]
"""Daft on this machine, or on Ray: the cluster that RAY_ADDRESS names, or one that is started here."""

SILENT = {
    "DO_NOT_TRACK": "1",
    "DAFT_ANALYTICS_ENABLED": "0",
    "DAFT_PROGRESS_BAR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Without these, importing Daft and starting Ray tell their makers over the network, and print over our progress."""

Task = Mapping[str, Any]
"""What a task is to do, as JSON can hold it."""


class Work(Protocol):
    """What is done for every task; it is sent to the workers, so its attributes must be picklable."""

    def __call__(self, task: Task, engine: "Engine") -> dict[str, Any]:
        """The small result of a task, as JSON can hold it; `done` in it moves the progress on."""


@dataclass(frozen=True)
class Engine:
    """How the tasks of a curation are run."""

    runner: Runner = "native"
    """`native`: this machine. `ray`: a cluster, whose machines share the output folder and the images."""
    threads: int = os.cpu_count() or 1
    """Cores of a task. Results can depend on it in their last bits; two runs with equal `threads` are equal."""
    memory: float = 2.0
    """Gigabytes that the vectors, products and tables of one task may take, beside libraries and models."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Where networks and products are computed: `cpu` or `cuda`, of which a task then has one."""

    def __post_init__(self) -> None:
        within(self, "", threads=(1, 4096), memory=(0.05, 1e6))
        if self.runner not in ("native", "ray"):
            raise OpsinError(f"there is no runner '{self.runner}': give native or ray.")
        if self.runner == "native" and self.threads > (os.cpu_count() or 1):
            raise OpsinError(f"threads is {self.threads}, and this machine has {os.cpu_count()} cores: give no more.")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise OpsinError(f"there is no device '{self.device}' for a curation: give cpu or cuda.")

    @property
    def bytes(self) -> int:
        """`memory` in bytes."""
        return int(self.memory * 1e9)

    def run(
        self, what: str, work: Work, tasks: Sequence[Task], *, total: int | None = None, unit: str = "images"
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Do `work` for every task and yield (number of the task, result) as they come, in any order.

        Args:
            what: name of the work, for the progress.
            work: see `Work`.
            tasks: see `Task`.
            total: sum of `done` over all results, for the progress; the number of tasks if None.
            unit: what `done` counts.

        Raises:
            OpsinError: that of a task; or Daft or Ray is not installed.
            KeyboardInterrupt: Ctrl-C, also where Daft alone has seen it and left tasks out.
        """
        if not tasks:
            return
        daft = _daft(self.runner)
        name = uuid4().hex
        answers: SimpleQueue[dict[str, Any] | BaseException | None] = SimpleQueue()
        # A signal is raised in the main thread, wherever that is; inside of Daft, it would make Daft panic or stop in
        # silence. So Daft has a thread of its own, and the caller's only waits for the queue.
        thread = Thread(target=self._collect, args=(daft, work, tasks, name, answers), daemon=True)
        with terminated_in_order(), progress(what, total or len(tasks), unit, show=True) as advance:
            thread.start()
            try:
                for _ in tasks:
                    row = answers.get()
                    if isinstance(row, BaseException):
                        raise row
                    if row is None:  # Daft heeds Ctrl-C by itself, even where a shell has its job ignore it
                        raise KeyboardInterrupt(f"Daft has left out tasks of '{what}'")
                    answer = json.loads(row["answer"])
                    if "error" in answer:
                        raise OpsinError(answer["error"])
                    advance(answer["result"].get("done", 1))
                    yield row["number"], answer["result"]
                thread.join()
            except BaseException as end:
                _given_up.add(name)
                if not isinstance(end, KeyboardInterrupt | SystemExit):  # which are for leaving at once
                    thread.join()
                raise

    def _collect(
        self,
        daft: Any,
        work: Work,
        tasks: Sequence[Task],
        name: str,
        answers: "SimpleQueue[dict[str, Any] | BaseException | None]",
    ) -> None:
        """Put the answers of the tasks into a queue as they come; last, None or what went wrong."""
        try:
            do = daft.cls(_Worker, cpus=self.threads, gpus=int(self.device.startswith("cuda")))(work, self, name)
            table = daft.from_pydict({"number": list(range(len(tasks))), "task": [json.dumps(task) for task in tasks]})
            # One task at a time for each worker: both cut a table into pieces of one row, each by its own name for it.
            table = table.into_partitions(len(tasks)) if self.runner == "ray" else table.into_batches(1)
            for row in table.select(table["number"], do(table["number"], table["task"]).alias("answer")).iter_rows():
                answers.put(row)
            answers.put(None)
        except BaseException as error:
            answers.put(error)


_given_up: set[str] = set()
"""Calls of `run` in this process that have failed, whose tasks need not be done any more: they end at once."""


class _Worker:
    """Turns a task into its result, both as text; lives in Daft's workers."""

    def __init__(self, work: Work, engine: Engine, name: str) -> None:
        self.work, self.engine, self.name = work, engine, name

    def __call__(self, number: int, task: str) -> str:  # noqa: ARG002 (the number keeps equal tasks apart)
        if self.name in _given_up:
            return json.dumps({"error": "given up"})
        torch.set_num_threads(self.engine.threads)  # of this thread: Daft has its own
        try:
            return json.dumps({"result": self.work(json.loads(task), self.engine)})
        except OpsinError as error:
            return json.dumps({"error": str(error)})
        finally:  # tasks run in many threads, and each thread would keep what its tasks have freed
            give_back_freed_memory()


@contextlib.contextmanager
def terminated_in_order() -> Iterator[None]:
    """SIGTERM ends the step as Ctrl-C does, with status 143; finished files stay."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread: the caller's signals stay the caller's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _daft(runner: Runner) -> Any:
    """Daft with its runner set, without telling anyone."""
    os.environ.update({name: os.environ.get(name, value) for name, value in SILENT.items()})
    try:
        import daft
    except ImportError:
        raise OpsinError("curation runs on Daft, which is missing: pip install 'opsin[curate]'.") from None
    if runner == "ray":
        try:
            import ray
        except ImportError:
            raise OpsinError("the runner ray needs Ray, which is missing: pip install 'opsin[ray]'.") from None
        if not ray.is_initialized():
            ray.init(
                address=os.environ.get("RAY_ADDRESS"),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    try:
        (daft.set_runner_ray if runner == "ray" else daft.set_runner_native)()
    except daft.exceptions.DaftCoreException:  # it was set before, and can be only once in a process
        if daft.get_or_infer_runner_type() != runner:
            raise OpsinError(
                f"Daft already runs on another runner here: use {runner} in a process of its own."
            ) from None
    return daft


def in_order(results: Iterator[tuple[int, dict[str, Any]]], use: Callable[[dict[str, Any]], None]) -> None:
    """Use results in the order of their tasks, whatever order they come in: so sums are the same on every runner."""
    waiting: dict[int, dict[str, Any]] = {}
    following = 0
    for number, result in results:
        waiting[number] = result
        while following in waiting:
            use(waiting.pop(following))
            following += 1
