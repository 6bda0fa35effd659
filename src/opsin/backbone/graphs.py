"""Functions of tensors with static shapes, replayed as CUDA graphs: one launch instead of hundreds.

By the rules of torch's notes on CUDA graphs: a warm-up on a side stream; inputs at fixed addresses, filled before every
replay. `Piece` is for functions that change something, such as a training step, `Replay` for those that do not. Where
there is no CUDA both simply call the function.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before a capture: libraries choose their algorithms and kernels are compiled."""


class Captured(NamedTuple):
    """One recorded call."""

    inputs: Any
    """What it reads: tensors, and tuples and lists of such."""
    replay: Callable[[], None]
    """Computes `outputs` from `inputs` again."""
    outputs: Any
    """What it writes."""


class Recorder:
    """The stream on which calls are recorded, and the memory that the recordings share.

    A replay may overwrite the results of every other recording: what is needed longer is cloned.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Work on the recorder's stream, in the order of the current one."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Captured:
        """Record a call; it computes nothing before it is replayed."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may pin memory meanwhile, which would spoil a capture in the default mode
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = function(*inputs)
        return Captured(inputs, graph.replay, outputs)


class Piece:
    """A function whose inputs come in a few forms, recorded for each once it has been called a few times with it.

    A form is the inputs' nesting, the shapes and types of their tensors, and the values of what is no tensor: a batch
    of another resolution has a form of its own. Every form holds memory for its inputs and outputs for good, so a
    constant must not change from call to call.

    The first calls and the recording are calls like all others: each is computed once, so the function may change
    weights. What it changes must stay where it is. Results belong to the caller.
    """

    def __init__(self, function: Callable[..., Any], recorder: Recorder | None = None) -> None:
        self.function, self.recorder = function, recorder
        self.calls: Counter[Any] = Counter()
        """By form, until it is recorded."""
        self.captured: dict[Any, Captured] = {}
        """By form."""

    def __call__(self, *inputs: Any) -> Any:
        """What the function gives for `inputs`: tensors on the device, tuples and lists of such, and constants."""
        if self.recorder is None:
            return self.function(*inputs)
        with self.recorder.stream():
            kind = form(inputs)
            captured = self.captured.get(kind)
            if captured is None:
                self.calls[kind] += 1
                if self.calls[kind] <= WARM_UP:
                    return self.function(*inputs)
                captured = self.captured[kind] = self.recorder.record(self.function, mapped(torch.clone, inputs))
            for static, given in zip(leaves(captured.inputs), leaves(inputs), strict=True):
                static.copy_(given, non_blocking=True)
            captured.replay()
            return mapped(torch.clone, captured.outputs)


Function = Callable[..., Sequence[Tensor]]
"""Tensors to tensors, row by row: row i of every output depends on row i of every input alone."""


class Replay:
    """`function` on the device, as a CUDA graph for every shape of its inputs; called plainly where there is no CUDA.

    A graph holds `rows` rows. Fewer are padded with what the buffer held before, and the padding's results are dropped.
    The first `limit` shapes get a graph and later ones are called plainly, so memory is bounded; all graphs share one
    pool, because none needs what another has left there.
    """

    def __init__(self, function: Function, rows: int, device: torch.device, limit: int = 8) -> None:
        self.function, self.rows, self.device, self.limit = function, rows, device, limit
        self.recorder = Recorder(device) if device.type == "cuda" else None
        self._captured: dict[tuple[tuple[torch.Size, torch.dtype], ...], Captured] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `function` gives for `inputs`, each `[n, …]` with n from 1 to `rows`, on the host or the device.

        Pinned inputs are uploaded without waiting. The outputs, each `[n, …]`, belong to the caller; on CUDA they may
        still be computing, in the order of the current stream.
        """
        key = tuple((given.shape[1:], given.dtype) for given in inputs)
        captured = self._captured.get(key)
        if captured is None and self.recorder is not None and len(self._captured) < self.limit:
            captured = self._captured[key] = self._capture(self.recorder, inputs)
        if captured is None:
            wait_not = self.recorder is not None
            return tuple(self.function(*(given.to(self.device, non_blocking=wait_not) for given in inputs)))
        n = len(inputs[0])
        for static, given in zip(captured.inputs, inputs, strict=True):
            static[:n].copy_(given, non_blocking=True)
        captured.replay()
        return tuple(out[:n].clone() for out in captured.outputs)

    def _capture(self, recorder: Recorder, inputs: Sequence[Tensor]) -> Captured:
        static = tuple(
            torch.zeros((self.rows, *given.shape[1:]), dtype=given.dtype, device=self.device) for given in inputs
        )
        with recorder.stream():
            for _ in range(WARM_UP):
                self.function(*static)
            return recorder.record(lambda *given: tuple(self.function(*given)), static)


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from leaves(branch)


def form(tree: Any) -> Any:
    """What a recording of a call depends on, to compare by and to look up with (see `Piece`).

    Raises:
        TypeError: there is something that can be no constant, such as a dictionary.
    """
    if isinstance(tree, Tensor):
        return Tensor, tree.shape, tree.dtype
    if isinstance(tree, (tuple, list)):
        return type(tree), *map(form, tree)
    hash(tree)
    return type(tree), tree


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Nested tuples, lists and dictionaries with `function` of every tensor in its place."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {name: mapped(function, branch) for name, branch in tree.items()}
    if isinstance(tree, (tuple, list)):
        branches = [mapped(function, branch) for branch in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
    return tree
