import numpy as np
import pytest

from opsin.pretrain.presets import vitl14, vitl16_short
from opsin.pretrain.schedules import ScheduleRecipe, scheduled


def literal_cosine(base: float, final: float, total: int, warmup: int = 0) -> np.ndarray:
    """The whole schedule as an array, by its definition: linspace up (endpoint included), then half a cosine."""
    steps = np.arange(total - warmup)
    down = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / len(steps)))
    return np.concatenate([np.linspace(0, base, warmup), down])


def test_short_schedules_against_whole_arrays():
    recipe = ScheduleRecipe(warmup_steps=10, teacher_temperature_steps=20, freeze_last_layer_steps=5)
    got = [scheduled(recipe, step, 100, 1024) for step in range(100)]
    assert [g.rate for g in got] == pytest.approx(literal_cosine(4e-3, 1e-6, 100, 10))
    assert [g.decay for g in got] == pytest.approx(literal_cosine(0.04, 0.4, 100))
    assert [g.momentum for g in got] == pytest.approx(literal_cosine(0.992, 1.0, 100))
    temperature = np.concatenate([np.linspace(0.04, 0.07, 20), np.full(80, 0.07)])
    assert [g.teacher_temperature for g in got] == pytest.approx(temperature)
    assert [g.last_layer_rate == 0 for g in got[:7]] == [True] * 5 + [False] * 2


def test_the_official_numbers():
    # FACTS §2.6: peak rates at the official batch sizes, warm-ups, freezes
    for recipe, peak, batch in ((vitl16_short(), 5.66e-3, 2048), (vitl14(), 3.46e-4, 3072)):
        assert recipe.batch.size == batch
        top = scheduled(recipe.schedule, recipe.schedule.warmup_steps - 1, recipe.steps, batch).rate
        assert top == pytest.approx(peak, rel=2e-3)
    long = vitl14().schedule
    assert (vitl14().steps, long.warmup_steps, long.freeze_last_layer_steps) == (625_000, 100_000, 1_250)
    assert (long.decay, long.momentum) == ((0.04, 0.2), (0.994, 1.0))
    assert long.teacher_temperature_steps == 37_500
    assert scheduled(long, 0, 625_000, 3072).rate == 0


def test_runs_shorter_than_their_warm_up():
    assert scheduled(ScheduleRecipe(), 4, 5, 1024).rate == pytest.approx(4e-3)
