"""Several processes over gloo, and one that is alone."""

import os
import time
from pathlib import Path

import pytest
import torch

from group import together
from opsin import ranks
from opsin.errors import OpsinError
from opsin.machine import pick_device


def refuse() -> None:
    raise OpsinError("there is nothing.")


def sums_and_news() -> dict[str, object]:
    ranks.PULSE = 0.05  # so that the others hear several times that the first goes on
    me = ranks.rank()
    part = torch.tensor([0.5, -1000.0, -torch.inf, 3.0]) + torch.tensor([me, me, 0.0, 2000.0 * me])
    found: dict[str, object] = {
        "who": (ranks.rank(), ranks.count(), ranks.first(), ranks.local_rank(), ranks.on_this_node()),
        "sum": ranks.sum_(torch.tensor([1.0, me])),
        "max": ranks.max_(torch.tensor([1.0, me])),
        "agree": ranks.agree(me * 7),
        "log_sum_exp": ranks.log_sum_exp_(part),
        "told": ranks.by_first(lambda: (time.sleep(0.3), f"by {me}")[1]),
    }
    try:
        ranks.by_first(refuse)
    except OpsinError as error:
        found["mistake"] = type(error).__name__, str(error)
    return found


def test_three_processes(tmp_path: Path):
    parts = torch.tensor([[0.5, -1000.0, -torch.inf, 3.0], [1.5, -999.0, -torch.inf, 2003.0]])
    parts = torch.stack([*parts, torch.tensor([2.5, -998.0, -torch.inf, 4003.0])])
    for rank, found in enumerate(together(sums_and_news, 3, tmp_path, per_node=2)):
        assert found["who"] == (rank, 3, rank == 0, rank % 2, 2)
        assert found["sum"].tolist() == [3, 3]
        assert found["max"].tolist() == [1, 2]
        assert found["agree"] == 14
        assert torch.allclose(found["log_sum_exp"], parts.logsumexp(0))
        assert found["told"] == "by 0"
        assert found["mistake"] == (("OpsinError" if rank == 0 else "ElsewhereError"), "there is nothing.")


def test_alone_nothing_is_sent():
    tensor = torch.tensor([1.0, -torch.inf])
    assert (ranks.rank(), ranks.count(), ranks.first(), ranks.on_this_node()) == (0, 1, True, 1)
    for sum_of_all in (ranks.sum_, ranks.max_, ranks.log_sum_exp_):
        assert sum_of_all(tensor) is tensor
    assert tensor.tolist() == [1, -torch.inf]
    with pytest.raises(OpsinError, match="there is nothing"):
        ranks.by_first(refuse)


def test_a_process_that_cannot_join_says_so(monkeypatch):
    values = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (values | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}).items():
        monkeypatch.setenv(name, value)

    def said() -> str:
        with pytest.raises(OpsinError) as error, ranks.started(torch.device("cpu"), 1):
            pass
        return str(error.value)

    assert said().startswith("process 1 of 2 could not join the others at 127.0.0.1:9 (")
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert said().startswith("WORLD_SIZE is 2 but LOCAL_WORLD_SIZE, MASTER_PORT is not set: start the processes with")


def test_every_process_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(None) == torch.device("cuda")
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    assert pick_device(None) == pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each process sees its own only
    assert pick_device(None) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "2")
    with pytest.raises(OpsinError, match="this machine has 2 GPUs, and process 2 has none"):
        pick_device(None)
