"""Prepare images in threads while the model computes."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def prepared(
    prepare: Callable[[int], T], batches: Iterable[Sequence[int]], *, workers: int, ahead: int
) -> Generator[list[T], None, None]:
    """`prepare(index)` of every index of every batch, in order, computed in `workers` threads of one core each.

    While a batch is used, the next `ahead` are prepared; no more are held. Close the generator to stop the threads.
    What `prepare` raises is raised here.
    """
    torch.get_num_threads()  # fixes this thread's number: torch starts a thread with the number set last anywhere
    pool = ThreadPoolExecutor(workers, "prepare", torch.set_num_threads, (1,))
    waiting: deque[list[Future[T]]] = deque()
    try:
        for batch in batches:
            waiting.append([pool.submit(prepare, index) for index in batch])
            if len(waiting) > ahead:
                yield [item.result() for item in waiting.popleft()]
        while waiting:
            yield [item.result() for item in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)
