"""The processes of a run: one per device, started by torchrun or Slurm, or just one without either.

Everything here is plain when there is one process: sums are what they were, and nothing is waited for.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from opsin.errors import OpsinError

PULSE = 5.0
"""Seconds between the signs of life of a process that others wait for."""

GRACE = 120.0
"""Seconds by which a device waits longer for the others than its host, which can say what it waits for."""
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Of the environment, as torchrun and `opsin launch` set it."""

_hosts: list[dist.ProcessGroup] = []
"""What hosts send one another by gloo, apart from what their devices do."""

Result = TypeVar("Result")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if together() else 0


def count() -> int:
    """Processes of the run."""
    return dist.get_world_size() if together() else 1


def local_rank() -> int:
    """The number of this process on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def on_this_node() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if together() else 1


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def together() -> bool:
    """Whether a process group is there."""
    return dist.is_available() and dist.is_initialized()


def sum_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over all processes, and return it."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its largest value over all processes, and return it."""
    if count() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def agree(number: int) -> int:
    """The largest of the numbers that the processes give, without their devices."""
    if count() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_hosts[0])
    return int(largest)


def log_sum_exp_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by the logarithm of the sum of its exponentials over all processes, and return it."""
    if count() > 1:
        top = max_(tensor.clone())
        shift = torch.where(top.isfinite(), top, 0)  # all -inf, or something that is not finite anyway
        tensor.copy_(sum_((tensor - shift).exp_()).log_() + shift)
    return tensor


class ElsewhereError(OpsinError):
    """A mistake that another process found and tells."""


def by_first(work: Callable[[], Result]) -> Result:
    """What `work` gives in the first process, in all of them; the mistakes it meets end all of them.

    It may take long: the others hear every few seconds that it goes on. The result is pickled.
    """
    if count() == 1:
        return work()
    answer: list[Any] = [None, None, None]  # whether done, result, mistake
    with ThreadPoolExecutor(1) as worker:
        working = worker.submit(work) if first() else None
        while not answer[0]:
            if working is not None and wait([working], timeout=PULSE).done:
                mistake = working.exception()
                answer = [True, None if mistake else working.result(), mistake and str(mistake)]
            dist.broadcast_object_list(answer, group=_hosts[0])
    if working is not None:
        return working.result()
    if answer[2] is not None:
        raise ElsewhereError(answer[2])
    result: Result = answer[1]
    return result


@contextlib.contextmanager
def started(device: torch.device, seconds: float) -> Iterator[None]:
    """Join the processes that torchrun or Slurm started; alone, do nothing.

    Args:
        device: of this process: sums go through NCCL for a GPU, through gloo otherwise.
        seconds: how long to wait for a process that does not answer.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or together():
        yield
        return
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise OpsinError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not set: start the processes with "
            "torchrun or opsin launch slurm, which set all of them, or unset WORLD_SIZE to run alone."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # With a GPU there are two: what the hosts agree on and what checkpoints do needs no device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds + GRACE * (device.type == "cuda")))
        _hosts[:] = [cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds)))]
    except (RuntimeError, ValueError) as error:
        raise OpsinError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({' '.join(str(error).split())[:200]}): let the "
            "machines reach one another, by the interface that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name if they "
            "have several, and start all processes within this time."
        ) from None
    yield
    # Not after an error: leaving in order waits for processes that may be gone.
    dist.destroy_process_group()
