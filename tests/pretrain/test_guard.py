"""What a run that begins with weights says of how far its features have moved, and whether they have got worse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from phased import equal, one_phase, pretrain, records, signalled, state
from safetensors.torch import load_file

import opsin
from opsin.errors import OpsinError
from opsin.pretrain import checkpoint, monitor
from opsin.pretrain.guard import BEST, Drift, Guard, drift, kept
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.schedules import ScheduleRecipe

# ---- how far


@given(st.integers(3, 30), st.integers(2, 8), st.integers(0, 2**31))
def test_drift_and_kept_are_those_of_a_plain_loop(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, count, width, generator=generator)
    apart, same = 0.0, 0
    number = min(10, count - 1)
    for i in range(count):
        apart += 1 - float(F.cosine_similarity(before[i].double(), after[i].double(), dim=0))
        nearest = []
        for tokens in (before.double(), after.double()):
            alike = [(float(F.cosine_similarity(tokens[i], tokens[j], dim=0)), j) for j in range(count) if j != i]
            nearest.append({j for _, j in sorted(alike, reverse=True)[:number]})
        same += len(nearest[0] & nearest[1])
    assert drift(before, after) == pytest.approx(apart / count, abs=1e-12)
    assert kept(before, after) == pytest.approx(same / (count * number), abs=1e-12)


@given(st.integers(2, 40), st.integers(0, 2**31))
def test_nothing_has_moved_at_first_and_a_rotation_keeps_the_neighbours(count, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 6, dtype=torch.float64, generator=generator)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))[0]
    assert drift(tokens, tokens) == pytest.approx(0, abs=1e-12)
    assert kept(tokens, tokens) == kept(tokens, 3 * tokens @ turn) == 1
    assert drift(tokens, -tokens) == pytest.approx(2)


def test_the_start_is_kept_for_a_run_that_goes_on(tmp_path: Path):
    torch.manual_seed(0)
    first, later = torch.randn(2, 12, 4)
    here = Drift(tmp_path)
    (tmp_path / "probe").mkdir()
    assert here.measure(0, first) == {"probe.drift": pytest.approx(0, abs=1e-7), "probe.kept": 1.0}
    again = Drift(tmp_path)  # another process, after a restart
    assert again.measure(3, later) == here.measure(3, later)
    assert again.measure(3, later)["probe.drift"] == drift(first, later)
    assert again.measure(3, later[:5]) == {}  # other images: not to be compared
    assert again.measure(3, later * torch.nan) == {}
    assert Drift(tmp_path / "other").measure(3, later) == {}


# ---- whether it has got worse


def test_it_is_worse_only_below_the_margin_and_says_so_once(tmp_path: Path):
    guard = Guard(0.05, tmp_path)
    seen = [(0, 0.5), (1, 0.46), (2, 0.44), (3, 0.40), (4, 0.46), (5, 0.60), (6, 0.60), (7, 0.449)]
    found = [guard.examine(step, knn) for step, knn in seen]
    assert [verdict.best for verdict in found] == [True, False, False, False, False, True, False, False]
    assert [step for (step, _), verdict in zip(seen, found, strict=True) if verdict.worse] == [2, 7]
    assert found[2].worse == (
        "after step 2 the kNN of the probe set is 0.440, more than 0.05 below the 0.500 with which the run began: what "
        f"the weights knew is being lost. Those of step 0, the best so far (0.500), are in {tmp_path / BEST}. Train "
        "heads longer first, lower --schedule.rate, or anchor with --gram.weight 1."
    )
    assert "Those of step 5, the best so far (0.600)" in str(found[7].worse)


def test_a_guard_that_goes_on_judges_as_if_it_had_not_stopped(tmp_path: Path):
    seen = [(0, 0.5), (1, 0.6), (2, 0.3), (3, 0.3), (4, 0.55), (5, 0.3), (6, 0.7)]
    whole = Guard(0.1, tmp_path)
    expected = [whole.examine(*look) for look in seen]
    for cut in range(len(seen)):
        first, second = Guard(0.1, tmp_path), Guard(0.1, tmp_path)
        for look in seen[:cut]:
            first.examine(*look)
        for name, tensor in second.state().items():
            tensor.copy_(first.state()[name])
        assert [second.examine(*look) for look in seen[cut:]] == expected[cut:]


def test_a_knn_of_nothing_is_a_start_too(tmp_path: Path):
    guard = Guard(0.02, tmp_path)
    assert guard.examine(0, 0.0).best
    assert guard.examine(1, 0.0).worse is None
    assert guard.examine(2, 0.1).best


# ---- in a run


def destroying(source: Path, policy: str = "warn", rate: float = 0.3, steps: int = 8) -> Recipe:
    """At a rate that leaves nothing of what the weights knew."""
    recipe = one_phase(steps=steps, weights=str(source / "backbone.safetensors"), drop_path=0.0)
    return replace(
        recipe,
        schedule=ScheduleRecipe(
            rate=rate, warmup_steps=0, momentum=(0.0, 0.0), freeze_last_layer_steps=0, teacher_temperature_steps=0
        ),
        monitor=monitor.MonitorRecipe(probe_every=2, probe_images=24, policy=policy),
    )


def findings(out: Path) -> list[dict]:
    lines = (out / "findings.jsonl").read_text().splitlines()
    return [found for found in map(json.loads, lines) if found["name"] == "worse-than-start"]


@pytest.fixture(scope="module")
def source(photos, tmp_path_factory) -> Path:
    """A run whose backbone tells rough photos from smooth ones better than chance; read only."""
    out = tmp_path_factory.mktemp("source") / "run"
    pretrain(one_phase(steps=2, monitor=monitor.MonitorRecipe(probe_every=2, probe_images=24)), photos, out)
    assert "probe.drift" not in records(out)[-1]
    assert not (out / BEST).exists()
    return out


@pytest.fixture(scope="module")
def destroyed(photos, source, tmp_path_factory) -> tuple[Path, str]:
    """A run that loses what the weights knew: its folder and what it said; read only."""
    out = tmp_path_factory.mktemp("destroyed") / "run"
    finished, said = pretrain(destroying(source), photos, out)
    assert finished.step == 8
    return out, said


def test_a_run_that_loses_what_the_weights_knew_says_so_and_keeps_them(source, destroyed):
    out, said = destroyed
    (line,) = [line for line in said.splitlines() if line.startswith("probe after step 0")]
    assert "probe.drift 0, probe.kept 1, probe.knn " in line
    start = float(line.rpartition(" ")[2])
    probes = [record for record in records(out) if "probe.knn" in record]
    assert [record["step"] for record in probes] == [2, 4, 6, 8]
    worst = min(probes, key=lambda record: record["probe.knn"])
    assert worst["probe.knn"] < start - 0.2
    assert worst["probe.drift"] > 0.01
    assert worst["probe.kept"] < 1
    found = findings(out)
    assert len(found) == 1
    assert found[0]["action"] == "warn"
    assert f"more than 0.02 below the {start:.3f} with which the run began" in found[0]["sentence"]
    assert f"Those of step 0, the best so far ({start:.3f}), are in {out / BEST}" in found[0]["sentence"]
    assert f"worse-than-start: {found[0]['sentence']}" in said


def test_the_best_weights_are_those_of_the_start_to_the_bit(source, destroyed):
    out, _ = destroyed
    assert equal(load_file(out / BEST), load_file(source / "backbone.safetensors"))
    assert not torch.equal(
        load_file(out / "backbone.safetensors")["pos_embed"], load_file(out / BEST)["pos_embed"]
    )  # what came of them
    opsin.load(out / BEST)


def test_with_policy_stop_it_stops(photos, source, destroyed, tmp_path):
    recipe = destroying(source, "stop")
    for _ in range(2):  # the same command comes to the same end
        with pytest.raises(OpsinError, match="worse-than-start: after step") as caught:
            pretrain(recipe, photos, tmp_path)
        assert str(caught.value).endswith("The run stops (monitor.policy is stop).")
    stopped = findings(tmp_path)[0]
    assert (stopped["step"], stopped["action"]) == (findings(destroyed[0])[0]["step"], "stop")
    assert equal(load_file(tmp_path / BEST), load_file(source / "backbone.safetensors"))
    assert not (tmp_path / "backbone.safetensors").exists()


@pytest.mark.parametrize("after", [1, 7])
def test_a_run_that_goes_on_finds_the_same(photos, source, destroyed, tmp_path, after):
    recipe = destroying(source)
    with signalled(0, after):
        finished, _ = pretrain(recipe, photos, tmp_path)
    assert checkpoint.steps(tmp_path) == [finished.step] == [after]
    pretrain(recipe, photos, tmp_path)
    assert records(tmp_path) == records(destroyed[0])
    assert equal(state(tmp_path), state(destroyed[0]))
    (here,), (there,) = findings(tmp_path), findings(destroyed[0])
    assert here["step"] == there["step"]
    assert equal(load_file(tmp_path / BEST), load_file(destroyed[0] / BEST))


def test_later_weights_that_are_better_are_kept(photos, source, tmp_path, monkeypatch):
    from opsin.pretrain import probe

    seen = iter([0.5, 0.4, 0.7, 0.6, 0.6])
    monkeypatch.setattr(probe, "_accuracy", lambda *_: next(seen))
    recipe = destroying(source, rate=1e-3)
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every=2, keep=9))
    recipe = replace(recipe, schedule=replace(recipe.schedule, momentum=(0.5, 0.5)))  # not the student
    pretrain(recipe, photos, tmp_path)
    best = checkpoint.folder(tmp_path) / "step-00000004" / "backbone.safetensors"
    assert equal(load_file(tmp_path / BEST), load_file(best))
    assert [found["step"] for found in findings(tmp_path)] == [2]


def test_without_labels_it_says_that_it_cannot_tell(photos, source, tmp_path):
    for number, file in enumerate(sorted(photos.rglob("*.png"))):
        (tmp_path / "flat").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "flat" / f"{number}.png")
    recipe = destroying(source, steps=2)
    _, said = pretrain(recipe, tmp_path / "flat", tmp_path / "run")
    assert "whether the features get worse than they were is not measured, since no image has a label" in said
    assert not (tmp_path / "run" / BEST).exists()
    assert "probe.drift" in records(tmp_path / "run")[-1]
    # with a labelled folder beside, it can
    recipe = replace(recipe, monitor=replace(recipe.monitor, labelled=str(photos)))
    _, said = pretrain(recipe, tmp_path / "flat", tmp_path / "other")
    assert "is not measured" not in said
    assert (tmp_path / "other" / BEST).exists()
