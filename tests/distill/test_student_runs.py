"""What a student's run leaves is what any run leaves, and what it says is about that student."""

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from lessons import recipe, records, state, student, taught
from safetensors.torch import load_file

import opsin
from opsin import story
from opsin.cli import main
from opsin.distill.run import Lesson
from opsin.errors import OpsinError
from opsin.pretrain.heads import read_heads
from opsin.pretrain.phases import pretrain
from opsin.pretrain.recipe import read
from opsin.pretrain.replay import replay
from opsin.pretrain.step import Step

METHODS = pytest.mark.parametrize("method", ["prototypes", "features"])


@pytest.fixture(scope="module")
def finished(teacher, photos, tmp_path_factory) -> Path:
    """A distillation of two students by each method; read only."""
    out = tmp_path_factory.mktemp("finished")
    students = [student(out, "narrow", recipe(12)), student(out, "wide", recipe(16, 2))]
    for method in ("prototypes", "features"):
        taught(teacher, students, photos, out / method, Lesson(method=method))
    return out


@METHODS
def test_the_average_is_what_is_left(finished, method):
    out = finished / method
    assert {path.name for path in out.iterdir()} == {"cache", "distill.json", "narrow", "wide"}
    for name, width in (("narrow", 12), ("wide", 16)):
        average = {key: t for key, t in state(out / name).items() if key.startswith("average.")}
        loaded = opsin.load(out / name / "backbone.safetensors")
        assert loaded.backbone.arch.width == width
        for key, tensor in load_file(out / name / "backbone.safetensors").items():
            assert torch.equal(tensor, average[f"average.backbone.{key}"]), key
        assert json.loads((out / name / "run.json").read_text())["begin"]["method"] == method
        heads = out / name / "heads.safetensors"
        if method == "features":
            assert not heads.exists()
            continue
        tensors, sizes, of_width = read_heads(heads)
        assert (sizes, of_width) == (read(out / name / "recipe.yaml").heads, width)
        assert (sizes.dino_prototypes, sizes.ibot_prototypes, sizes.dino_bottleneck) == (40, 30, 40)
        expected = {key.removeprefix("average."): t for key, t in average.items() if "_head." in key}
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())


@METHODS
def test_each_student_has_losses_of_its_own(finished, method):
    curves = [records(finished / method / name) for name in ("narrow", "wide")]
    terms = ("dino", "ibot", "koleo") if method == "prototypes" else ("cls", "patch")
    for curve in curves:
        assert [record["step"] for record in curve] == [1, 2, 3, 4]
        for record in curve:
            assert record["loss"] == pytest.approx(sum(record[f"loss.{term}"] for term in terms))
    for one, other in zip(*curves, strict=True):
        assert all(one[f"loss.{term}"] != other[f"loss.{term}"] for term in terms)
        if method == "prototypes":  # the teacher is the same for both
            assert one["teacher.entropy"] == other["teacher.entropy"]


@METHODS
def test_a_students_run_is_told_like_any_other(finished, photos, method, monkeypatch):
    out, seen = finished / method / "narrow", {}
    monkeypatch.setattr(story, "write_report", lambda path, report: seen.update({path: report}))
    assert story.tell(out, photos, device="cpu") == out / "report.html"
    (report,) = seen.values()
    assert report["curves"]
    settings = read(out / "recipe.yaml")
    before, _ = story.backbones(out, settings, torch.device("cpu"))
    first = Step(settings, torch.device("cpu")).student.backbone.state_dict()  # the same whatever it learns from
    assert all(torch.equal(tensor, first[name]) for name, tensor in before.state_dict().items())


def test_a_student_can_be_used_trained_on_and_taught_by(finished, photos, tmp_path, capsys):
    out = finished / "prototypes" / "narrow"
    weights, features = out / "backbone.safetensors", tmp_path / "features.parquet"
    line = ["features", "--weights", weights, "--data", photos, "--out", features, "--size", "16", "--device", "cpu"]
    assert main([str(word) for word in line]) == 0, capsys.readouterr().err
    assert [len(row) for row in parquet.read_table(features)["cls"].to_pylist()] == [12] * 16
    settings = recipe(12, steps=1, precision="fp32", weights=str(weights))
    assert pretrain(settings, photos, tmp_path / "on", device="cpu", quiet=True).step == 1
    (last,) = taught(out, [student(tmp_path, "grandchild", recipe(8, 1, steps=1))], photos, tmp_path / "again")
    assert last.step == 1


@METHODS
def test_its_steps_are_not_run_again(finished, photos, method):
    with pytest.raises(
        OpsinError, match=r"narrow holds a distilled student: only steps of opsin pretrain can be run a"
    ):
        replay(photos, finished / method / "narrow", 1, device="cpu")


def test_what_is_found_belongs_to_the_student_it_was_found_in(teacher, photos, tmp_path, monkeypatch, capsys):
    learn, calls = Step._learn, []

    def broken(self, scale, *inputs):
        calls.append(self.student.backbone.arch.width)
        return learn(self, scale * (float("nan") if calls == [12, 16, 12] else 1), *inputs)

    monkeypatch.setattr(Step, "_learn", broken)
    students = [student(tmp_path, "narrow", recipe(12)), student(tmp_path, "wide", recipe(16))]
    taught(teacher, students, photos, tmp_path / "out", quiet=False)
    found = {}
    for name in ("narrow", "wide"):
        lines = (tmp_path / "out" / name / "findings.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["name"] for line in lines]
    assert "not-finite" in found["narrow"]
    assert "not-finite" not in found["wide"]
    assert [records(tmp_path / "out" / name)[-1]["skipped"] for name in found] == [1, 0]
    said = capsys.readouterr().err
    last = [line for line in said.splitlines() if line.startswith("step 4/4")]
    losses = [records(tmp_path / "out" / name)[-1]["loss"] for name in found]
    assert len(last) == 1
    assert f"narrow loss {losses[0]:.3f} (dino " in last[0]
    assert f"· wide loss {losses[1]:.3f} (dino " in last[0]
    assert last[0].count("img/s") == 1


def test_what_is_said_of_one_of_several_students_names_it(teacher, photos, tmp_path, capsys):
    students = [student(tmp_path, name, recipe()) for name in ("one", "two")]
    taught(teacher, students, photos, tmp_path / "out", quiet=False)
    said = capsys.readouterr().err.splitlines()
    for what in ("batch-too-small", "checkpoints work"):
        assert {line.partition(what)[0] for line in said if what in line} == {"one: ", "two: "}
