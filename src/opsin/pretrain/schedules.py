"""How rate, weight decay, teacher momentum and teacher temperature go with the step, as in the reference code.

All are pure functions of the step, so a resumed run needs no scheduler state.
"""

import math
from dataclasses import dataclass

from opsin.errors import FINITE, within


@dataclass(frozen=True)
class ScheduleRecipe:
    """Rates and the other quantities that change during a run."""

    rate: float = 4e-3
    """Peak learning rate at a batch of 1024; the run uses rate × √(batch / 1024)."""
    final_rate: float = 1e-6
    """Learning rate at the end of the cosine, whatever the batch."""
    warmup_steps: int = 12_500
    """Steps in which the rate rises linearly from 0."""
    decay: tuple[float, float] = (0.04, 0.4)
    """Weight decay at the start and the end, on a cosine."""
    momentum: tuple[float, float] = (0.992, 1.0)
    """Momentum of the teacher's moving average at the start and the end, on a cosine."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """Teacher temperature at the start and after its warm-up, linear in between, then constant."""
    teacher_temperature_steps: int = 37_500
    """Length of that warm-up."""
    freeze_last_layer_steps: int = 1_250
    """Steps in which the prototypes are not updated; their optimiser state advances."""

    def __post_init__(self) -> None:
        steps = ("warmup_steps", "teacher_temperature_steps", "freeze_last_layer_steps")
        within(self, "schedule.", **dict.fromkeys(steps, (0, FINITE)), rate=(0, 1e3), final_rate=(0, 1e3))
        within(self, "schedule.", decay=(0, 1e3), momentum=(0, 1), teacher_temperature=(1e-3, 1e3))


@dataclass(frozen=True)
class Scheduled:
    """The values of one step."""

    rate: float
    last_layer_rate: float
    decay: float
    momentum: float
    teacher_temperature: float


def scheduled(recipe: ScheduleRecipe, step: int, steps: int, batch_size: int) -> Scheduled:
    """The values at `step` (from 0) of a run of `steps` steps."""
    peak = recipe.rate * math.sqrt(batch_size / 1024)
    warmup = min(recipe.warmup_steps, steps)
    if step < warmup:
        rate = peak * step / max(1, warmup - 1)  # endpoint included: the last warm-up step has the peak rate
    else:
        rate = cosine(peak, recipe.final_rate, step - warmup, steps - warmup)
    start, end = recipe.teacher_temperature
    ramp = recipe.teacher_temperature_steps
    temperature = end if step >= ramp else start + (end - start) * step / max(1, ramp - 1)
    return Scheduled(
        rate=rate,
        last_layer_rate=0.0 if step < recipe.freeze_last_layer_steps else rate,
        decay=cosine(*recipe.decay, step, steps),
        momentum=cosine(*recipe.momentum, step, steps),
        teacher_temperature=temperature,
    )


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """From `start` at step 0 towards `end`, which step `steps` would reach."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / max(1, steps)))
