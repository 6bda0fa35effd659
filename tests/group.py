"""Runs a function in several processes that know of one another, as torchrun starts them, over gloo."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from opsin import ranks


def together(work: Callable[..., Any], number: int, out: Path, *arguments: Any, per_node: int = 0) -> list[Any]:
    """What `work(*arguments)` gives in each of `number` processes; it goes through a file in `out`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.mkdir(exist_ok=True, parents=True)
    context = multiprocessing.spawn(
        _one, (number, per_node or number, port, out, work, arguments), nprocs=number, join=False
    )
    while not context.join():
        pass
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(number)]


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by torch's own reader."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in stored.items()}
    distributed_checkpoint.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def _one(rank: int, number: int, per_node: int, port: int, out: Path, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(number),
        LOCAL_RANK=str(rank % per_node),
        LOCAL_WORLD_SIZE=str(per_node),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with ranks.started(torch.device("cpu"), 60):
        torch.save(work(*arguments), out / f"rank-{rank}.pt")
