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
