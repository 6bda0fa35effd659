"""The processes of a run: one per device, started by torchrun or Slurm, or just one without either.

Everything here is plain when there is one process: sums are what they were, and nothing is waited for.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opsin.errors import OpsinError

PULSE = 5.0
"""Seconds between the signs of life of a process that others wait for."""

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
            dist.broadcast_object_list(answer, device=torch.device("cpu"))
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
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # With a GPU there are two: what the host agrees on and what checkpoints do needs no device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise OpsinError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not join the others "
            f"({' '.join(str(error).split())[:200]}): start all of them with torchrun or opsin launch slurm, and let "
            "their machines reach one another."
        ) from None
    yield
    # Not after an error: leaving in order waits for processes that may be gone.
    dist.destroy_process_group()
