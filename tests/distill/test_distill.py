"""Whole distillations in this process: students of one teacher, alone and together, stopped and continued."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lessons import (
    assert_same_run,
    network,
    recipe,
    records,
    remember_teachers,
    save,
    state,
    student,
    taught,
)

from group import together
from opsin.backbone import weights
from opsin.data.stream import BatchRecipe
from opsin.distill import run as module
from opsin.distill.run import Lesson
from opsin.errors import OpsinError
from opsin.pretrain import checkpoint
from opsin.pretrain.objective import LossRecipe
from opsin.pretrain.recipe import read
from opsin.pretrain.step import Step

FEATURES = Lesson(method="features")
METHODS = pytest.mark.parametrize("method", ["prototypes", "features"])


def two(folder: Path, **shared) -> list[str]:
    """A narrow student and a wide one, which is deep too where that can be."""
    depth = 1 if shared.get("drop_path") else 2
    return [student(folder, "narrow", recipe(12, **shared)), student(folder, "wide", recipe(16, depth, **shared))]


def stop_after(monkeypatch, steps: int, only: str = "") -> None:
    """Give this process SIGTERM in the middle of a step of a run whose folder has this name."""
    finish, seen = Step.finish, []

    def stopped(self):
        outcome = finish(self)
        seen.append(self)
        if len(seen) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    monkeypatch.setattr(Step, "finish", stopped)


# ---- one look for several students


@METHODS
@pytest.mark.parametrize(("micro", "drop_path"), [(0, 0.0), (4, 0.3)])
def test_students_together_are_students_alone(teacher, photos, tmp_path, monkeypatch, method, micro, drop_path):
    students = two(tmp_path, batch=BatchRecipe(size=8, micro=micro, group=4), drop_path=drop_path)
    teachers, lesson = remember_teachers(monkeypatch), Lesson(method=method)
    taught(teacher, students, photos, tmp_path / "both", lesson)
    for each in students:
        name = Path(each).stem
        taught(teacher, [each], photos, tmp_path / name, lesson)
        assert_same_run(tmp_path / "both" / name, tmp_path / name / name)
    assert [each.looked for each in teachers] == [4 * (2 if micro else 1)] * 3
    assert records(tmp_path / "both" / "narrow") != records(tmp_path / "both" / "wide")


def test_a_moving_centre_is_that_of_all_students_whichever_comes_first(teacher, photos, tmp_path, monkeypatch):
    students = two(tmp_path, loss=LossRecipe(centering="average"))
    taught(teacher, students, photos, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)  # both students' second steps
        assert [each.stopped_by for each in taught(teacher, students, photos, tmp_path / "swapped")] == [15, 15]
    taught(teacher, students[::-1], photos, tmp_path / "swapped")
    for name in ("narrow", "wide"):
        assert state(tmp_path / "whole" / name)["objective.centre.image"].any()
        assert_same_run(tmp_path / "whole" / name, tmp_path / "swapped" / name)


def both_methods(teacher: Path, photos: Path, out: Path, students: list[str]) -> list[str]:
    """In each of several processes; what a cache says if they are on different machines."""
    for method in ("prototypes", "features"):
        taught(teacher, students, photos, out / method, Lesson(method=method))
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    repeating = student(out / f"{os.environ['RANK']}", "cached", recipe(crops=replace(recipe().crops, repeat=1)))
    with pytest.raises(OpsinError) as error:
        taught(teacher, [repeating], photos, out / "cached", Lesson(method="features", cache=True))
    return [str(error.value)]


def test_two_processes_are_one(teacher, photos, tmp_path):
    students = two(tmp_path, drop_path=0.3)
    said = together(both_methods, 2, tmp_path / "ranks", teacher, photos, tmp_path / "two", students)
    assert said == [["--cache keeps features for the processes of one machine, and this job runs on several: leave it "
                     "out, or run on one."]] * 2  # fmt: skip
    for method in ("prototypes", "features"):
        taught(teacher, students, photos, tmp_path / "one" / method, Lesson(method=method))
        for name in ("narrow", "wide"):
            one, other = (tmp_path / number / method / name for number in ("one", "two"))
            for mine, theirs in zip(records(other), records(one), strict=True):
                for key, value in theirs.items():
                    if key not in ("teacher.agreement", "teacher.rank"):  # means over processes
                        assert mine[key] == pytest.approx(value, rel=1e-10, abs=1e-10), key
            expected = state(one)
            for key, tensor in state(other).items():
                assert torch.allclose(tensor, expected[key], rtol=0, atol=1e-10), key


# ---- teachers without heads, and distillations that were stopped


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A backbone's file, which has no heads beside it."""
    return save(network(), tmp_path_factory.mktemp("bare"), heads=None) / "backbone.safetensors"


def test_heads_are_trained_first_and_a_stop_anywhere_changes_nothing(bare, photos, tmp_path, monkeypatch):
    students, lesson = two(tmp_path), Lesson(heads_steps=4)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finished = taught(bare, students, photos, whole, lesson)
    assert [each.out for each in finished] == [whole / "narrow", whole / "wide"]
    # The heads learnt, their backbone did not; the students have as many prototypes.
    before, after = network().backbone.state_dict(), weights.restore(whole / "teacher" / "backbone.safetensors")[0]
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name
    assert read(whole / "teacher" / "recipe.yaml").train == "heads"
    losses = [record["loss.dino"] for record in records(whole / "teacher")]
    assert len(losses) == 4

    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        (heads,) = taught(bare, students, photos, stopped, lesson)
    assert (heads.out, heads.step, heads.stopped_by) == (stopped / "teacher", 3, signal.SIGTERM)
    assert not (stopped / "narrow").exists()
    with monkeypatch.context() as patch:
        stop_after(patch, 1 + 2 * 2 + 1)  # one more of the heads, two of both students, and in the first of the third
        found = taught(bare, students, photos, stopped, lesson)
    assert [(each.step, each.stopped_by) for each in found] == [(3, signal.SIGTERM)] * 2
    assert not (stopped / "narrow" / "backbone.safetensors").exists()
    taught(bare, students, photos, stopped, lesson)
    for name in ("teacher", "narrow", "wide"):
        assert_same_run(stopped / name, whole / name)


KILLED = """
import os, signal, sys, time
import torch
torch.set_num_threads({threads})  # as in the process that goes on: sums depend on them
sys.path[:0] = {paths}
from pathlib import Path
from lessons import taught
from opsin.pretrain import checkpoint
save = checkpoint.Checkpoints._save
def killed(self, step, meta):
    if step == 4 and self.out.name == "wide":  # the other student's checkpoint is there, this one's is not
        other = checkpoint.folder(self.out.parent / "narrow") / "step-00000004"
        while not other.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, step, meta)
checkpoint.Checkpoints._save = killed
taught(Path({teacher!r}), {students}, Path({photos!r}), Path({out!r}))
"""


def test_a_kill_between_two_students_checkpoints_changes_nothing(teacher, photos, tmp_path):
    students, out, here = two(tmp_path, steps=6), tmp_path / "killed", Path(__file__).parent
    code = KILLED.format(
        paths=[str(here), str(here.parent)], threads=torch.get_num_threads(),
        teacher=str(teacher), students=students, photos=str(photos), out=str(out),
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.steps(out / "narrow") == [2, 4]
    assert checkpoint.steps(out / "wide") == [2]
    taught(teacher, students, photos, out)
    taught(teacher, students, photos, tmp_path / "whole")
    for name in ("narrow", "wide"):
        assert_same_run(out / name, tmp_path / "whole" / name, 6)


def test_a_student_that_comes_later_does_not_undo_the_others(teacher, photos, tmp_path):
    students, out = two(tmp_path), tmp_path / "out"
    taught(teacher, students[:1], photos, out)
    before = (out / "narrow" / "metrics.jsonl").read_text()
    with pytest.raises(OpsinError, match="narrow"):
        taught(teacher, students, photos, out)
    assert (out / "narrow" / "metrics.jsonl").read_text() == before


# ---- the cache


def cached(folder: Path, **changes) -> list[str]:
    """Two students whose crops are the same in every epoch; four steps are two epochs."""
    return two(folder, **({"crops": replace(recipe().crops, repeat=1)} | changes))


@METHODS
def test_a_cache_is_looked_into_instead_and_changes_nothing(teacher, photos, tmp_path, monkeypatch, method):
    students, teachers = cached(tmp_path), remember_teachers(monkeypatch)
    taught(teacher, students, photos, tmp_path / "plain", Lesson(method=method))
    taught(teacher, students, photos, tmp_path / "cached", Lesson(method=method, cache=True))
    assert [each.looked for each in teachers] == [4, 2]
    for name in ("narrow", "wide"):
        assert_same_run(tmp_path / "plain" / name, tmp_path / "cached" / name)
    again = cached(tmp_path / "later", optim=replace(recipe().optim, clip=1.0))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cached" / "teacher-features").rename(tmp_path / "elsewhere" / "teacher-features")
    taught(teacher, again, photos, tmp_path / "elsewhere", Lesson(method=method, cache=True))
    assert teachers[-1].looked == 0


def test_features_of_something_else_are_not_taken_from_a_cache(teacher, photos, tmp_path, monkeypatch):
    lesson, folder = Lesson(method="features", cache=True), "teacher-features"
    taught(teacher, cached(tmp_path, steps=1), photos, tmp_path / "first", lesson)
    other = network()
    with torch.no_grad():
        other.backbone.norm.bias += 1
    crops = recipe().crops
    wrong = {
        "teacher": (save(other, tmp_path / "other"), {}, {}),
        "seed": (teacher, {"seed": 1}, {}),
        "crops": (teacher, {"crops": replace(crops, repeat=1, flip=0.4)}, {}),
        "repeats": (teacher, {"crops": replace(crops, repeat=2)}, {}),
        "size": (teacher, {}, {"teacher_size": 24}),
        "precision": (teacher, {"precision": "fp32"}, {}),
        "decoder": (teacher, {}, {}),
    }
    for name, (given, changes, differently) in wrong.items():
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        (tmp_path / "first" / folder).rename(out / folder)
        with monkeypatch.context() as patch:
            if name == "decoder":
                patch.setattr(module, "DECODER", "another one")
            with pytest.raises(OpsinError, match="holds features of another teacher, of other images or of other"):
                taught(given, cached(out, steps=1, **changes), photos, out, replace(lesson, **differently))
        (out / folder).rename(tmp_path / "first" / folder)


def test_a_cache_needs_crops_that_repeat(teacher, photos, tmp_path):
    with pytest.raises(OpsinError, match=r"crops that come again, and crops\.repeat is 0: give --crops\.repeat 1"):
        taught(teacher, two(tmp_path), photos, tmp_path / "out", Lesson(cache=True))


# ---- what a distillation refuses


def test_mistakes_about_the_teacher_are_one_sentence(teacher, bare, photos, tmp_path):
    students = two(tmp_path)
    wide = save(network(), tmp_path / "wide")
    (wide / "backbone.safetensors").unlink()
    weights.save(network(replace(network().backbone.arch, width=32)).backbone, wide / "backbone.safetensors")
    (tmp_path / "empty").mkdir()
    mistakes = [
        (tmp_path / "nowhere", Lesson(), "there is no file or folder .*nowhere: give --teacher a run's folder"),
        (tmp_path / "empty", Lesson(), "empty holds neither backbone.safetensors, which a finished run leaves, nor a"),
        (bare, Lesson(heads_steps=0), r"has no heads \(heads.safetensors\), and --heads-steps is 0: let them be"),
        (wide, Lesson(), "heads .* are for a backbone of width 24 and .* has 32: give --teacher the folder of"),
        (teacher, Lesson(teacher_size=20), "patches of 8 pixels do not divide the 20 pixels .* give --teacher-size 16"),
    ]
    for given, lesson, message in mistakes:
        with pytest.raises(OpsinError, match=message) as error:
            taught(given, students, photos, tmp_path / "out", lesson)
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*/checkpoints"))
    # What was refused is not held against the command that is right.
    taught(teacher, students, photos, tmp_path / "out", Lesson(method="features"))


def test_another_teacher_is_refused_on_resume_and_one_that_moved_is_not(teacher, photos, tmp_path, monkeypatch):
    students, out = two(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        taught(teacher, students, photos, out)
    said = (out / "distill.json").read_text()
    other = network()
    with torch.no_grad():
        other.dino_head.mlp[0].bias += 1
    moved, another = shutil.copytree(teacher, tmp_path / "moved"), save(other, tmp_path / "another")
    with pytest.raises(OpsinError, match=r"differs in heads \(\w+ then, \w+ now\): give what it began"):
        taught(another, students, photos, out)
    with pytest.raises(OpsinError, match=r"differs in method \(prototypes then, features now\): give"):
        taught(teacher, students, photos, out, FEATURES)
    with pytest.raises(OpsinError, match=r"differs in teacher_size \(0 then, 32 now\)"):
        taught(teacher, students, photos, out, Lesson(teacher_size=32))
    assert (out / "distill.json").read_text() == said
    for damage in ("{", "[]", "{}", None):
        (out / "distill.json").unlink() if damage is None else (out / "distill.json").write_text(damage)
        with pytest.raises(OpsinError, match=r"distill\.json is missing or damaged, so nothing says what the runs"):
            taught(teacher, students, photos, out)
    (out / "distill.json").write_text(said)
    assert [each.step for each in taught(moved, students, photos, out)] == [4, 4]
    taught(another, students, photos, out, accept_changes=True)
