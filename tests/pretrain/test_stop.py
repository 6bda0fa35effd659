"""Signals, and errors that mean that another process is gone."""

import os
import signal

import pytest

from opsin import ranks
from opsin.errors import OpsinError
from opsin.pretrain import checkpoint
from opsin.pretrain.stop import lost_processes, stop_signal

CLOSED = "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234. This is caused by x."


def test_only_a_second_ctrl_c_ends_a_run_at_once():
    with stop_signal() as stop:
        assert stop.agreed(failed=False) is None
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may send both
        assert stop.agreed(failed=False) == signal.SIGHUP
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed(failed=True) > 64  # no signal has this number


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_wrong_with_many_processes_is_said_before_torchrun_ends_them(monkeypatch, count):
    monkeypatch.setattr(ranks, "count", lambda: count)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with pytest.raises(OpsinError, match="lost"), stop_signal():
            raise OpsinError("a process is lost")
        assert all((signal.getsignal(number) is before[number]) == (count == 1) for number in numbers)
        if count > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # would end this process
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("done", [[], [3, 6]])
def test_a_lost_process_is_told_in_a_sentence(monkeypatch, tmp_path, done):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(checkpoint, "steps", lambda _: done)
    with pytest.raises(OpsinError) as said, lost_processes(tmp_path):
        raise RuntimeError(CLOSED)
    left = "the checkpoint of step 6 is intact" if done else "there is no checkpoint yet"
    assert str(said.value) == (
        f"another process of the run is gone or cannot be reached (Connection closed by peer [127.0.0.1]:1234); "
        f"{left}. See what that process said last, then give the same command again, on any number of processes."
    )


@pytest.mark.parametrize(
    "text", ["gloo: out of memory", "NCCL error: Duplicate GPU detected", "Connection closed by peer"]
)
def test_other_errors_stay_what_they_are(monkeypatch, tmp_path, text):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(RuntimeError, match=text), lost_processes(tmp_path):
        raise RuntimeError(text)
    monkeypatch.setattr(ranks, "count", lambda: 1)
    with pytest.raises(RuntimeError, match="gloo"), lost_processes(tmp_path):
        raise RuntimeError(CLOSED)
