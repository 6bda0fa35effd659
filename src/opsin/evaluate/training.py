"""Training a head on a frozen backbone so that an interruption costs a minute at most."""

import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from opsin.data.progress import progress
from opsin.errors import OpsinError

Batch = TypeVar("Batch")


def train(
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    rate: Callable[[int], float],
    batches: Callable[[int], Iterator[Batch]],
    loss: Callable[[Batch], Tensor],
    steps: int,
    folder: Path,
    *,
    what: str = "training",
    show: bool = True,
    clip: float | None = None,
    every: float = 60.0,
) -> None:
    """Train `module` for `steps` steps, from the state in `folder` if there is one, and leave the final state there.

    A run that was stopped goes on as if it had not been, provided that `batches` and `loss` depend on the step alone.
    A finished one only loads its result.

    Args:
        module: what learns; its parameters and buffers are saved.
        optimiser: of its parameters; every group's `lr` at the start is what `rate` scales.
        rate: step (0, 1, …) → factor of the rate.
        batches: first step → the batches from there on; closed when training ends.
        loss: batch → a scalar.
        steps: in all.
        folder: from `store.place`, keyed by everything that decides the result.
        what: named by the counter.
        show: a counter on the terminal.
        clip: largest norm of the gradient of all parameters together; None does not clip.
        every: seconds between saved states.

    Raises:
        OpsinError: the loss is not finite, or the state cannot be written.
    """
    path = folder / "state.pt"
    rates = [group["lr"] for group in optimiser.param_groups]
    done = 0
    if (state := _recalled(path)) is not None:
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        done = state["step"]
    if done == steps:
        module.eval()
        return
    module.train()
    saved = time.monotonic()
    stream = batches(done)
    try:
        with progress(what, steps, "steps", show) as advance:
            advance(done)
            for step in range(done, steps):
                for group, base in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = base * rate(step)
                value = loss(next(stream))
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimiser.step()
                done = step + 1
                advance(1)
                if time.monotonic() - saved > every:
                    _check(value, step)
                    _save(path, module, optimiser, done)
                    saved = time.monotonic()
            _check(value, steps - 1)
    finally:
        if isinstance(stream, Generator):
            stream.close()
    module.eval()
    _save(path, module, optimiser, done)


def _recalled(path: Path) -> dict[str, Any] | None:
    """What `_save` wrote; None if there is nothing, or a damaged file, and then training starts anew."""
    try:
        # On the CPU: a full GPU is no damage of the file.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises almost anything of a file that is not whole
        return None
    return state if isinstance(state, dict) and state.keys() == {"module", "optimiser", "step"} else None


def _check(value: Tensor, step: int) -> None:
    if not value.isfinite():
        raise OpsinError(f"the loss is {value.item():g} at step {step}: lower the rate, or look at labels and weights.")


def _save(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    partial = path.with_suffix(".partial")
    try:
        torch.save({"module": module.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's writer
        raise OpsinError(
            f"cannot keep the state of training in {path.parent}: {error}. Choose another --cache."
        ) from None
