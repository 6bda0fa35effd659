import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.curate import engine as module
from opsin.curate.engine import SILENT, Engine, in_order
from opsin.errors import OpsinError

ENGINE = Engine(threads=1, memory=0.2)


@dataclass(frozen=True)
class Square:
    """Writes a file for every task, and says what it saw."""

    folder: Path

    def __call__(self, task, engine):
        number = task["number"]
        (self.folder / f"{number}").write_text("")
        return {"square": number**2, "done": task.get("weight", 1), "threads": torch.get_num_threads()} | {
            "engine": [engine.runner, engine.bytes]
        }


@dataclass(frozen=True)
class Fails:
    """Fails at some task."""

    at: int
    error: type[Exception]
    folder: Path

    def __call__(self, task, engine):  # noqa: ARG002
        if task["number"] == self.at:
            raise self.error("the file pictures/ß.jpg is “odd”: put it back.")
        time.sleep(0.01)
        (self.folder / str(task["number"])).write_text("")
        return {}


@pytest.mark.parametrize("count", [0, 1, 57])
def test_every_task_is_done_once_and_its_result_has_its_number(tmp_path, count):
    threads = torch.get_num_threads()
    results = list(ENGINE.run("squares", Square(tmp_path), [{"number": i} for i in range(count)]))
    assert sorted(number for number, _ in results) == list(range(count))
    for number, result in results:
        assert result["square"] == number**2
        assert result["threads"] == 1
        assert result["engine"] == ["native", 200_000_000]
    assert len(list(tmp_path.iterdir())) == count
    assert torch.get_num_threads() == threads


def test_equal_tasks_are_each_done(tmp_path):
    results = list(ENGINE.run("squares", Square(tmp_path), [{"number": 3}] * 20))
    assert sorted(number for number, _ in results) == list(range(20))


def test_the_progress_counts_what_tasks_say(tmp_path, monkeypatch):
    seen = []
    real = module.progress

    def watched(what, total, unit, show):
        seen.append((what, total, unit))
        return real(what, total, unit, show)

    monkeypatch.setattr(module, "progress", watched)
    tasks = [{"number": i, "weight": 10} for i in range(3)]
    list(ENGINE.run("squares", Square(tmp_path), tasks, total=30, unit="vectors"))
    list(ENGINE.run("squares", Square(tmp_path), tasks))
    assert seen == [("squares", 30, "vectors"), ("squares", 3, "images")]


def test_an_error_of_a_task_reaches_the_caller_as_it_is(tmp_path):
    tasks = [{"number": i} for i in range(40)]
    with pytest.raises(OpsinError) as caught:
        list(ENGINE.run("failing", Fails(5, OpsinError, tmp_path), tasks))
    assert str(caught.value) == "the file pictures/ß.jpg is “odd”: put it back."
    results = list(ENGINE.run("squares", Square(tmp_path), tasks))  # and the engine still works
    assert len(results) == 40


def test_a_defect_in_a_task_is_no_sentence(tmp_path):
    with pytest.raises(Exception, match="odd") as caught:
        list(ENGINE.run("failing", Fails(0, RuntimeError, tmp_path), [{"number": 0}]))
    assert not isinstance(caught.value, OpsinError)


def test_a_caller_may_stop_early(tmp_path):
    results = ENGINE.run("squares", Square(tmp_path), [{"number": i} for i in range(30)])
    next(results)
    results.close()
    assert len(list(ENGINE.run("squares", Square(tmp_path), [{"number": 1}]))) == 1


def test_it_runs_outside_of_the_main_thread(tmp_path):
    found = []
    work = Square(tmp_path)
    thread = threading.Thread(target=lambda: found.extend(ENGINE.run("squares", work, [{"number": 2}])))
    thread.start()
    thread.join()
    assert [result["square"] for _, result in found] == [4]


def test_importing_daft_tells_nobody_and_ones_own_settings_stay(monkeypatch):
    for name in SILENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DAFT_PROGRESS_BAR", "1")
    module._daft("native")
    assert {name: os.environ[name] for name in SILENT} == SILENT | {"DAFT_PROGRESS_BAR": "1"}
    assert SILENT["DAFT_ANALYTICS_ENABLED"] == "0"
    assert SILENT["DO_NOT_TRACK"] == "1"
    assert SILENT["RAY_USAGE_STATS_ENABLED"] == "0"


def test_opsin_does_not_import_daft_before_it_is_silenced():
    code = (
        "import os, sys\n"
        "from opsin.curate import dedup, engine, pipeline\n"
        "assert 'daft' not in sys.modules and 'ray' not in sys.modules\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'daft':\n"
        "            assert all(os.environ.get(key) == value for key, value in engine.SILENT.items())\n"
        "            print('silent')\n"
        "sys.meta_path.insert(0, Watch())\n"
        "engine._daft('native')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in SILENT}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "silent\n"


@pytest.mark.parametrize(
    ("missing", "runner", "said"),
    [
        ("daft", "native", "curation runs on Daft, which is missing: pip install 'opsin[curate]'."),
        ("daft", "ray", "curation runs on Daft, which is missing: pip install 'opsin[curate]'."),
        ("ray", "ray", "the runner ray needs Ray, which is missing: pip install 'opsin[ray]'."),
    ],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, missing, runner, said):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(OpsinError) as caught:
        list(Engine(runner, threads=1).run("squares", Square(tmp_path), [{"number": 1}]))
    assert str(caught.value) == said


def test_two_runners_in_one_process_are_refused(tmp_path, monkeypatch):
    list(ENGINE.run("squares", Square(tmp_path), [{"number": 1}]))
    monkeypatch.setattr(pytest.importorskip("ray"), "is_initialized", lambda: True)
    with pytest.raises(OpsinError, match="already runs on another runner here: use ray in a process of its own"):
        list(Engine("ray", threads=1).run("squares", Square(tmp_path), [{"number": 1}]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"threads": 10**3}, f"this machine has {os.cpu_count()} cores: give no more."),
        ({"threads": 0}, "threads is 0: give from 1 to 4096."),
        ({"runner": "slurm"}, "there is no runner 'slurm': give native or ray."),
        ({"memory": 0.001}, "memory is 0.001: give from 0.05 to 1e+06."),
        ({"memory": float("nan")}, "memory is nan"),
        ({"device": "mps"}, "there is no device 'mps' for a curation: give cpu or cuda."),
    ],
)
def test_settings_that_cannot_be_are_refused(given, said):
    with pytest.raises(OpsinError) as caught:
        Engine(**given)
    assert said in str(caught.value)


def test_a_cluster_may_have_more_cores_than_this_machine():
    assert Engine("ray", threads=1000, device="cuda:1").threads == 1000


@given(st.integers(0, 30).flatmap(lambda n: st.permutations(range(n))))
def test_results_are_used_in_the_order_of_their_tasks(order):
    used = []
    in_order(iter([(i, {"i": i}) for i in order]), used.append)
    assert [result["i"] for result in used] == list(range(len(order)))


def test_results_are_used_as_soon_as_their_turn_comes():
    used = []

    def coming():
        for number, seen in ((1, 0), (0, 0), (3, 2), (2, 2)):
            assert len(used) == seen
            yield number, {}

    in_order(coming(), used.append)
    assert len(used) == 4


@dataclass(frozen=True)
class Signals(Square):
    """Has a signal come at the worst moment: while Daft, in Rust, asks Python to pickle it."""

    number: signal.Signals

    def __getstate__(self):
        under_way = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # before, nobody has planned anything
        if under_way and not (self.folder / "sent").exists():
            (self.folder / "sent").write_text("")
            os.kill(os.getpid(), self.number)
            time.sleep(0.2)
        return super().__getstate__()


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, SystemExit(143)), (signal.SIGINT, KeyboardInterrupt())], ids=str
)
def test_a_signal_while_daft_is_at_work_is_raised_by_us_and_not_in_daft(tmp_path, number, raised):
    with pytest.raises(type(raised)) as caught:
        list(ENGINE.run("signals", Signals(tmp_path, number), [{"number": i} for i in range(9)]))
    assert caught.value.args == raised.args
    assert (tmp_path / "sent").exists()
    assert len(list(ENGINE.run("squares", Square(tmp_path), [{"number": 1}]))) == 1
