"""Recipes of several phases: what goes from one to the next, and that any of them can be stopped and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from phased import (
    LENGTHS,
    ONE_PHASE,
    PHASES,
    equal,
    first_states,
    one_phase,
    pretrain,
    records,
    signalled,
    six_phases,
    state,
)
from safetensors.torch import load_file

import opsin
from opsin.backbone.adapt import positions
from opsin.errors import OpsinError
from opsin.pretrain import checkpoint, phases
from opsin.pretrain.recipe import read

TABLE = "backbone.pos_embed"


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A run of all phases in one go: its folder, what it said, the state at each beginning. Read only."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with first_states() as begun:
        finished, said = pretrain(six_phases(), photos, out)
    assert (finished.out, finished.step, finished.stopped_by) == (out, LENGTHS[-1], None)
    return out, said, begun


def folders(out: Path) -> list[Path]:
    return phases.folders(six_phases(), out)


def assert_same_phases(out: Path, other: Path) -> None:
    for ours, theirs in zip(folders(out), folders(other), strict=True):
        assert records(ours) == records(theirs), ours.name
        assert equal(state(ours), state(theirs)), ours.name
    for name in ("backbone.safetensors", "heads.safetensors"):
        assert equal(load_file(out / name), load_file(other / name))
    assert (out / "recipe.yaml").read_text() == (other / "recipe.yaml").read_text()


# ---- one after the other


def test_every_phase_runs_and_says_what_it_goes_on_with(whole):
    out, said, _ = whole
    names = ["1-pretrain", "2-anchor", "3-high-res", "4-heads", "5-new-heads", "6-new-moments"]
    assert [folder.name for folder in folders(out)] == names
    assert [records(folder)[-1]["step"] for folder in folders(out)] == LENGTHS
    lines = said.splitlines()
    for at, (name, length) in enumerate(zip(names, LENGTHS, strict=True), start=1):
        (announced,) = [line for line in lines if line.startswith(f"phase {at} of 6, ")]
        assert announced.startswith(f"phase {at} of 6, {name}: {length} steps")
    assert [line for line in lines if line.startswith("phase 3")] == [
        "phase 3 of 6, 3-high-res: 3 steps; gram.weight 0.0, backbone.grid 4, crops.global_size 32, "
        "crops.mixture [[32, 16, 0.5], [16, 8, 0.5]], parallel.recompute full, schedule.rate 1e-4"
    ]
    assert "phase 5 of 6, 5-new-heads: 2 steps; train all, fresh heads" in lines
    rest = "centres, loss scale"
    assert [line.partition(": ")[2] for line in lines if line.startswith("from ")] == [
        f"backbone, heads, optimiser, {rest}",
        f"backbone, heads, positions resampled to 4×4, {rest}; fresh: optimiser",  # of another number of positions
        f"backbone, heads, optimiser, {rest}",
        "backbone, loss scale; fresh: heads, optimiser, centres",  # the old ones belong to the old heads
        "backbone, heads, centres; fresh: optimiser, loss scale",
    ]


def test_a_phase_begins_with_the_last_weights_of_the_one_before(whole):
    out, _, begun = whole
    assert len(begun) == 6
    for number in range(1, 6):
        before, now = state(folders(out)[number - 1]), begun[number]
        fresh_heads = number == 4
        for name, tensor in now.items():
            who, _, part = name.partition(".")
            if who not in ("student", "average"):
                continue
            if part == TABLE and number == 2:
                arch = six_phases().backbone
                assert torch.equal(tensor, positions(before[name], 4, arch)), name
            elif part.startswith("backbone.") or not fresh_heads:
                assert torch.equal(tensor, before[name]), f"{folders(out)[number].name}: {name}"
        prototypes = "student.dino_head.last_layer.weight_v"
        assert torch.equal(now[prototypes], before[prototypes]) is not fresh_heads


def test_moments_go_on_or_begin_anew_as_it_says(whole):
    out, _, begun = whole
    carried = [True, False, True, False, False]
    for number, goes_on in enumerate(carried, start=1):
        before, now = state(folders(out)[number - 1]), begun[number]
        moments = {name: tensor for name, tensor in now.items() if name.startswith("optimiser.")}
        if goes_on:
            assert equal(moments, {name: before[name] for name in moments})
            assert moments["optimiser.count"] > 0
        else:
            assert not any(tensor.any() for tensor in moments.values()), folders(out)[number].name
    # With heads alone, only theirs are there.
    assert not [name for name in begun[3] if name.startswith(("optimiser.mean.backbone", "optimiser.square.backbone"))]


def test_centres_go_with_the_heads_whose_scores_they_are_of(whole):
    out, _, begun = whole
    for number in range(1, 6):
        before, now = state(folders(out)[number - 1]), begun[number]
        for name in ("objective.centre.image", "objective.centre.patch"):
            assert before[name].any()
            assert torch.equal(now[name], torch.zeros_like(now[name]) if number == 4 else before[name]), number


def test_each_phase_draws_other_crops_and_has_its_own_schedule(whole):
    out, _, _ = whole
    recipes = [read(folder / "recipe.yaml") for folder in folders(out)]
    assert [recipe.seed for recipe in recipes] == [0, 1, 2, 3, 4, 5]
    assert [recipe.steps for recipe in recipes] == LENGTHS
    assert not any(recipe.phases for recipe in recipes)
    assert [recipe.schedule.rate for recipe in recipes] == [1e-3] * 2 + [1e-4] * 4
    assert read(out / "recipe.yaml") == six_phases()
    sizes = [recipes[2].stream().at(step).crops.global_size for step in range(3)]
    assert set(sizes) == {16, 32}


def test_the_gram_term_is_there_where_it_is_asked_for(whole):
    out, _, _ = whole
    with_gram = ["loss.gram" in records(folder)[0] for folder in folders(out)]
    assert with_gram == [False, True, False, False, False, False]


def test_heads_alone_leave_the_backbone_as_it_was(whole):
    out, _, begun = whole
    folder = folders(out)[3]
    now = state(folder)
    for name, tensor in begun[3].items():
        if name.startswith(("student.backbone.", "average.backbone.")):
            assert torch.equal(tensor, now[name]), name
        elif name.startswith("student.") and name.endswith("weight"):
            assert not torch.equal(tensor, now[name]), name
    assert "grad_norm.backbone" not in records(folder)[0]
    assert records(folder)[0]["grad_norm.dino_head"] > 0


def test_the_last_phase_is_what_others_get(whole):
    out, _, _ = whole
    last = folders(out)[-1]
    assert (out / "backbone.safetensors").read_bytes() == (last / "backbone.safetensors").read_bytes()
    extractor, kept = opsin.load(out / "backbone.safetensors"), state(last)
    for name, tensor in extractor.backbone.state_dict().items():
        assert torch.equal(tensor, kept[f"average.backbone.{name}"]), name
    assert (out / "heads.safetensors").exists()
    facts = json.loads((folders(out)[4] / "run.json").read_text())
    assert facts["begin"] == {"method": "self", "before": "../4-heads", "fresh": ["heads"]}


# ---- stopped, killed, done


def test_stopped_inside_each_phase_and_continued_is_uninterrupted(photos, whole, tmp_path):
    out = tmp_path / "stopped"
    for number, (folder, length) in enumerate(zip(folders(out), LENGTHS, strict=True)):
        with signalled(number, length - 1):  # of the anchor's phase, this is after it was made anew
            finished, said = pretrain(six_phases(), photos, out)
        assert (finished.out, finished.step, finished.stopped_by) == (folder, length - 1, signal.SIGTERM)
        assert checkpoint.steps(folder) == [length - 1]
        assert f"stopped after step {length - 1}, which is saved" in said
        assert not (out / "backbone.safetensors").exists()
        assert said.count(", which are done") == max(0, number - 1)
        if number:
            assert f"going on from the checkpoint of step {LENGTHS[number - 1] - 1}" in said
    pretrain(six_phases(), photos, out)
    assert_same_phases(out, whole[0])


def test_a_signal_in_the_last_step_of_a_phase_does_not_begin_the_next(photos, tmp_path):
    recipe = six_phases(ONE_PHASE + "phases: [{name: one}, {name: two}]")
    with signalled(0, 3):
        finished, _ = pretrain(recipe, photos, tmp_path)
    assert (finished.out, finished.stopped_by) == (tmp_path / "1-one", signal.SIGTERM)
    assert not (tmp_path / "2-two").exists()


KILLED = """
import os, signal, sys, time
import torch
from pathlib import Path
torch.set_num_threads({threads})  # as in the process that goes on: sums depend on them
from opsin.pretrain import checkpoint, loop, phases
if "{where}" == "inside":
    train = loop.train
    def broken(steps, batch, values):
        if steps[0].objective.anchor is not None and batch.step == 3:
            while not checkpoint.steps(Path("{out}") / "2-anchor"):
                time.sleep(0.01)  # it is written in the background
            os.kill(os.getpid(), signal.SIGKILL)
        return train(steps, batch, values)
    loop.train = broken
else:
    run = phases.run
    def broken(jobs, *arguments, **options):
        if jobs[0].out.name == "2-anchor":
            os.kill(os.getpid(), signal.SIGKILL)
        return run(jobs, *arguments, **options)
    phases.run = broken
from opsin.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("where", ["between", "inside"])
def test_killed_and_continued_is_uninterrupted(photos, whole, tmp_path, where):
    out, file = tmp_path / "killed", tmp_path / "six.yaml"
    file.write_text(ONE_PHASE.replace("every: 1000", "every: 2") + PHASES)
    options = ["--recipe", str(file), "--data", str(photos), "--out", str(out), "--device", "cpu", "--no-report"]
    code = (
        KILLED.replace("{where}", where).replace("{out}", str(out)).replace("{threads}", str(torch.get_num_threads()))
    )
    line = [sys.executable, "-c", code, "pretrain", *options]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert checkpoint.steps(out / "2-anchor") == ([2] if where == "inside" else [])
    _, said = pretrain(six_phases(), photos, out)  # how often it is saved is free to change
    assert "phase 1 of 6, 1-pretrain: 3 steps, which are done" in said
    assert ("going on from the checkpoint of step 2" in said) is (where == "inside")
    for ours, theirs in zip(folders(out), folders(whole[0]), strict=True):
        assert records(ours) == records(theirs)
        assert equal(state(ours), state(theirs))


def test_what_is_done_is_not_opened_again(photos, whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole[0], tmp_path / "done")
    stamps = {path: path.stat().st_mtime_ns for folder in folders(out) for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(phases, "run", lambda *_, **__: pytest.fail("a finished phase was run"))
    finished, said = pretrain(six_phases(), photos, out)
    assert (finished.out, finished.stopped_by) == (out, None)
    assert said.count(", which are done") == len(said.splitlines()) == 6
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_a_finished_phase_needs_no_more_than_its_last_step(photos, whole, tmp_path, monkeypatch):
    """A phase that is lost is made again from the one before; those before it are not opened."""
    out = shutil.copytree(whole[0], tmp_path / "lost")
    shutil.rmtree(out / "6-new-moments")
    ran, run = [], phases.run
    monkeypatch.setattr(phases, "run", lambda jobs, *a, **o: ran.append(jobs[0].out.name) or run(jobs, *a, **o))
    pretrain(six_phases(), photos, out)
    assert ran == ["6-new-moments"]
    assert_same_phases(out, whole[0])


# ---- refused


@pytest.mark.parametrize(
    ("old", "new", "where", "said"),
    [
        ("drop_path: 0.2", "drop_path: 0.1", "1-pretrain", "drop_path (0.2 then, 0.1 now)"),
        ("length: 1 epoch", "length: 2 epochs", "3-high-res", "steps (3 then, 6 now)"),
        ("gram.weight: 2.0", "gram.weight: 1.0", "2-anchor", "gram.weight (2.0 then, 1.0 now)"),
    ],
)
def test_another_recipe_for_a_finished_phase_is_refused(photos, whole, old, new, where, said):
    """Read only, as a refused run is."""
    out, text = whole[0], ONE_PHASE + PHASES
    assert old in text
    before = (out / "recipe.yaml").read_bytes()
    with pytest.raises(OpsinError) as caught:
        pretrain(six_phases(text.replace(old, new)), photos, out)
    assert str(caught.value).startswith(f"{out / where} holds a run that differs in {said}: give the settings it began")
    assert (out / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("crops.global_size: 20", "crops.global_size 20 is not a multiple of backbone.patch 8: try 16."),
        ("crops.mixture: [[16, 12, 1.0]]", "crops.mixture: a side of 12 is not a multiple of backbone.patch 8: try 8."),
        ("masks.ratio: [0.01, 0.1]", "no mask fits the 2×2 patches of a global crop"),
        ("crops.global_size: 48", "has a side of 40 pixels, below the global crop of 48"),
    ],
)
def test_what_a_later_phase_could_not_do_is_refused_before_the_first(photos, tmp_path, changed, said):
    text = ONE_PHASE + "phases: [{name: one}, {name: two, change: {" + changed + "}}]"
    with pytest.raises(OpsinError) as caught:
        pretrain(six_phases(text), photos, tmp_path)
    assert said in str(caught.value)
    assert str(caught.value).startswith("phase 2-two: ")
    assert not (tmp_path / "1-one").exists()


def test_heads_alone_without_weights_are_refused(photos, tmp_path):
    recipe = six_phases(ONE_PHASE + "phases: [{name: one, change: {train: heads}}, {name: two, change: {train: all}}]")
    with pytest.raises(OpsinError, match="train is heads, and without weights the backbone would stay random"):
        pretrain(recipe, photos, tmp_path)
    assert not checkpoint.steps(tmp_path / "1-one")


def test_a_run_with_phases_and_one_without_do_not_mix(photos, tmp_path, whole):
    pretrain(one_phase(steps=1), photos, tmp_path / "one")
    before = (tmp_path / "one" / "recipe.yaml").read_bytes()
    with pytest.raises(OpsinError, match="holds a run without phases, and this recipe has some: give another --out"):
        pretrain(six_phases(), photos, tmp_path / "one")
    assert (tmp_path / "one" / "recipe.yaml").read_bytes() == before
    with pytest.raises(OpsinError, match="holds a run with phases"):
        pretrain(one_phase(steps=1), photos, whole[0])
    assert not checkpoint.steps(whole[0])


def test_processes_that_cannot_share_the_batch_of_a_later_phase(photos, tmp_path, monkeypatch):
    text = ONE_PHASE + "phases: [{name: one}, {name: two, change: {batch.size: 4}}]"
    monkeypatch.setattr(phases.ranks, "count", lambda: 2)
    with pytest.raises(OpsinError) as caught:
        phases._prepared(six_phases(text), photos, tmp_path, accept_changes=False, quiet=True)
    assert str(caught.value).startswith(
        "phase 2-two: batch.size 4 is 1 × batch.group 4, which 2 processes cannot share"
    )
    assert not (tmp_path / "recipe.yaml").exists()
