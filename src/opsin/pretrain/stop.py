"""When a run stops before its last step: a signal, in any of its processes, or a process that is lost."""

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from opsin import ranks
from opsin.errors import OpsinError
from opsin.pretrain import checkpoint

GONE = "clos|reset|timed? ?out|remote|unreachable|refused|broken pipe"
"""What gloo and NCCL say of a process that is gone; their other errors are of this process."""
FAILED = 1000
"""Larger than the number of any signal."""


class Stop:
    """The signal that this process received, and what all processes agree on."""

    signal: int | None = None

    def agreed(self, failed: bool) -> int | None:
        """The signal that any process received, or `FAILED` if anything has failed in the background of any.

        All processes ask between the same two steps, and stop together.
        """
        return ranks.agree(FAILED if failed else self.signal or 0) or None


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Ctrl-C, SIGTERM and a lost terminal end the run after the step in progress; a second Ctrl-C ends it at once."""
    stop = Stop()

    def handle(number: int, _: FrameType | None) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or number

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not in the main thread: the caller's signals stay the caller's
        yield stop
        return
    try:
        yield stop
    except Exception:
        if ranks.count() > 1:  # torchrun ends this process too, which says first what is wrong, and is gone then
            before = {}
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def lost_processes(out: Path) -> Iterator[None]:
    """Another process that died or cannot be reached, in whichever sum it is missed, as one sentence."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        sent = isinstance(error, dist.DistError) or re.search("gloo|nccl", text, re.IGNORECASE)
        if ranks.count() == 1 or not sent or not re.search(GONE, text, re.IGNORECASE):
            raise
        left = checkpoint.what_is_left(out)
        raise OpsinError(
            f"another process of the run is gone or cannot be reached ({_reason(text)}); {left}. See what that process "
            "said last, then give the same command again, on any number of processes."
        ) from None


def _reason(text: str) -> str:
    """The first sentence, without the place in the source that gloo puts before it."""
    return re.sub(r"^\[[^\]]*\] *", "", text).partition(". ")[0][:200]
