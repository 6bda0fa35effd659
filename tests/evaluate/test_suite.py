"""A suite: its file, what is measured again and what is not, what differs, what failed, and the page."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from opsin import suite_story
from opsin.backbone.registry import create
from opsin.backbone.weights import save
from opsin.errors import OpsinError, within
from opsin.evaluate import suite as suites
from opsin.evaluate.suite import Entry, Measured, Report, differences, measure, read
from opsin.evaluate.task import Picture, Result, Run, Table, Task

CALLS = []


@dataclass(frozen=True)
class Guess:
    """Settings of a task that only this test has."""

    data: str = ""
    sides: int = 2

    def __post_init__(self):
        within(self, "--", sides=(1, 9))


def guess(model, settings, run):
    """Guess."""
    CALLS.append((model.name, settings.sides))
    if settings.data == "missing":
        raise OpsinError("no data at missing: give some.")
    value = float(model.backbone.cls_token.detach().abs().sum())
    outcomes = np.array([1.0, 0.0, value > 1, value > 1])
    return Result(
        settings.data,
        {"accuracy": float(outcomes.mean()), "other": 0.5},
        Table(["k", "accuracy"], [["1", f"{outcomes.mean():.3f}"]], "Guessed."),
        left_out=[("a.png", "no image")],
        outcomes=outcomes,
        pictures=[Picture("a picture", np.zeros((4, 6, 3), dtype=np.uint8))],
    )


TASKS = {"guess": Task(guess, Guess)}


@pytest.fixture
def config(tmp_path):
    CALLS.clear()
    for name, scale in (("small", 0.0), ("large", 1.0)):
        torch.manual_seed(0)
        backbone = create("dinov2_vits14", depth=1, width=32, heads=2, grid=2)
        with torch.no_grad():
            backbone.cls_token.fill_(scale)
        save(backbone, tmp_path / f"{name}.safetensors")
    text = """
models:
  - {name: small, weights: %s/small.safetensors}
  - {name: large, weights: %s/large.safetensors}
tasks:
  - {task: guess, data: here}
  - {task: guess, name: guess of three, data: there, sides: 3}
""" % (tmp_path, tmp_path)  # noqa: UP031 - braces are YAML's
    (tmp_path / "suite.yaml").write_text(text)
    return tmp_path / "suite.yaml"


def measured(config, out, **changes):
    out.mkdir(exist_ok=True)
    if changes:
        text = config.read_text()
        for old, new in changes.values():
            assert old in text
            text = text.replace(old, new)
        config.write_text(text)
    suite, entries = read(config, TASKS)
    return measure(suite, entries, TASKS, out, Run(cache=out / "cache", progress=False), device="cpu")


def test_every_model_is_measured_by_every_task(config, tmp_path):
    report = measured(config, tmp_path / "out")
    assert CALLS == [("small", 2), ("small", 3), ("large", 2), ("large", 3)]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["results"]["large"]["guess"]["metrics"]["accuracy"] == 0.75
    assert written["results"]["small"]["guess of three"]["metrics"]["accuracy"] == 0.25
    assert written["results"]["small"]["guess"]["settings"] == {"data": "here", "sides": 2}
    assert written["results"]["small"]["guess"]["left_out"] == [{"path": "a.png", "reason": "no image"}]
    assert [one.mean for one in report.differences] == [0.5, 0.5]
    assert report.differences[0].low >= 0
    assert report.differences[0].second == "large"


def test_a_suite_goes_on_and_measures_what_changed(config, tmp_path):
    measured(config, tmp_path / "out")
    (tmp_path / "out" / "results" / "large" / "guess" / "result.json").unlink()  # as if killed before it was whole
    CALLS.clear()
    again = measured(config, tmp_path / "out")
    assert CALLS == [("large", 2)]
    assert len(again.differences) == 2
    CALLS.clear()
    measured(config, tmp_path / "out", a=("sides: 3", "sides: 4"))
    assert CALLS == [("small", 4), ("large", 4)]
    torch.manual_seed(0)
    save(create("dinov2_vits14", depth=1, width=32, heads=2, grid=3), tmp_path / "small.safetensors")
    CALLS.clear()
    measured(config, tmp_path / "out")
    assert CALLS == [("small", 2), ("small", 4)]


@pytest.mark.parametrize("name", ["result.json", "outcomes.npy"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"key": 1'])
def test_a_damaged_result_is_measured_again(config, tmp_path, name, content):
    measured(config, tmp_path / "out")
    path = tmp_path / "out" / "results" / "large" / "guess" / name
    path.unlink() if content is None else path.write_bytes(content)
    CALLS.clear()
    again = measured(config, tmp_path / "out")
    assert CALLS == [("large", 2)]
    assert len(again.differences) == 2


def test_a_model_that_cannot_be_opened_does_not_stop_the_others(config, tmp_path):
    report = measured(config, tmp_path / "out", a=("small.safetensors", "gone.safetensors"))
    assert [(model, entry) for model, entry, _ in report.failed] == [("small", "guess"), ("small", "guess of three")]
    assert "gone.safetensors" in report.failed[0][2]
    assert CALLS == [("large", 2), ("large", 3)]
    assert (tmp_path / "out" / "results.json").exists()


def test_names_do_not_run_into_each_other(config, tmp_path):
    text = config.read_text().replace("name: large", "name: small-a").replace("data: here", "name: a-b, data: here")
    config.write_text(text.replace("name: guess of three", "name: b"))
    measured(config, tmp_path / "out")
    CALLS.clear()
    measured(config, tmp_path / "out")
    assert CALLS == []


def test_a_task_that_fails_does_not_stop_the_others(config, tmp_path):
    report = measured(config, tmp_path / "out", a=("data: here", "data: missing"))
    assert report.failed == [(name, "guess", "no data at missing: give some.") for name in ("small", "large")]
    assert len(report.measured) == 2
    page = suite_story.facts(report)
    assert page["table"]["rows"][0] == ["guess", "", "not measured", "not measured"]
    assert page["failed"][0]["value"] == "no data at missing: give some."


def test_the_page(config, tmp_path):
    report = measured(config, tmp_path / "out")
    page = suite_story.facts(report)
    assert page["table"]["rows"][0] == ["guess", "accuracy", "0.2500", "0.7500 ★"]
    path = suite_story.tell(tmp_path / "out", report)
    html = path.read_text()
    unread = "1 images could not be read"
    for text in ("guess of three", "large − small", "Guessed.", unread, "a picture", "data:image"):
        assert text in html, text


def test_models_are_paired_only_on_equally_many_samples():
    def one(model, outcomes):
        return suites.Measured(model, "t", {"metrics": {"accuracy": 0.5}}, outcomes)

    assert not differences("a", [one("a", np.ones(3)), one("b", np.ones(4)), one("c", None)])
    (found,) = differences("a", [one("a", np.zeros(3)), one("b", np.ones(3) / 4)])
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("task: guess, name", "task: gues, name", "task 2: unknown task 'gues': did you mean 'guess'?"),
        ("sides: 3", "side: 3", "unknown field 'side'"),
        ("sides: 3", "sides: many", "'many' is not a whole number"),
        ("sides: 3", "sides: 12", "--sides is 12: give from 1 to 9"),
        ("data: there, ", "", "task 2 (guess of three) has no data"),
        ("name: guess of three, ", "", "two tasks of the name 'guess'"),
        ("name: large", "name: small", "two models of the name 'small'"),
        ("name: large", "name: a/b", "'a/b' cannot name a file"),
        ("models:", "model:", "unknown field 'model'"),
        ("models:", "models: x\nothers:", "is not a suite"),
        ("tasks:", "tasks: []\ntasks:", "'tasks' stands there twice"),
        ("task: guess, data: here", "task: [guess], data: here", "unknown task"),
        ("data: there", "data: ", "has no data"),
        ("name: large", f"name: {'x' * 300}", "cannot name a file"),
        ("name: large", "name: ..", "cannot name a file"),
    ],
)
def test_mistakes_in_the_file(config, old, new, said):
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    with pytest.raises(OpsinError) as error:
        read(config, TASKS)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_suite_without_tasks(config):
    config.write_text(config.read_text().partition("tasks:")[0] + "tasks: []\n")
    with pytest.raises(OpsinError, match="has no tasks"):
        read(config, TASKS)


def test_another_task_of_the_same_name_and_settings_is_measured_again(config, tmp_path, monkeypatch):
    measured(config, tmp_path / "out")
    monkeypatch.setitem(TASKS, "other", TASKS["guess"])
    CALLS.clear()
    measured(config, tmp_path / "out", a=("{task: guess, data: here}", "{task: other, name: guess, data: here}"))
    assert CALLS == [("small", 2), ("large", 2)]


def test_models_are_opened_as_asked(config, tmp_path, monkeypatch):
    real, asked = suites.open_model, []
    monkeypatch.setattr(suites, "open_model", lambda *a: asked.append(a[1:]) or real(a[0], None, "cpu"))
    config.write_text(config.read_text().replace("name: small,", "name: small, architecture: tiny,"))
    suite, entries = read(config, TASKS)
    suites.measure(
        suite, entries, TASKS, tmp_path, Run(cache=tmp_path / "c", progress=False), device="cpu", precision="bf16"
    )
    assert asked == [("tiny", "cpu", "bf16"), (None, "cpu", "bf16")]


def test_joules_are_what_the_task_took_and_differences_of_the_first_metric(config, tmp_path, monkeypatch):
    counter = iter(range(100, 10_000, 30))
    monkeypatch.setattr(suites, "joules", lambda _: next(counter))
    report = measured(config, tmp_path / "out")
    assert [one.facts["joules"] for one in report.measured] == [30] * 4
    assert {one.metric for one in report.differences} == {"accuracy"}


def test_the_page_tells_lower_is_better_costs_and_intervals():
    def one(model, value, seconds, metric="rmse"):
        return Measured(
            model,
            "t",
            {
                "metrics": {metric: value},
                "seconds": seconds,
                "joules": 7200.0,
                "data": "d",
                "paper": [],
                "table": {"headers": [], "rows": [], "note": ""},
                "left_out": [],
                "model": {"weights": "0" * 64, "precision": "fp32"},
            },
            None,
        )

    settings = Guess("d")
    page = suite_story.facts(
        Report(
            [Entry("t", "guess", settings)],
            ["a", "b"],
            [one("a", 0.5, 10.0), one("b", 0.4, 20.0)],
            [suites.Difference("t", "a", "b", "rmse", 3, -0.1, -0.2, 0.05)],
        )
    )
    assert page["table"]["rows"] == [["t", "rmse ↓", "0.5000", "0.4000 ★"]]
    assert page["costs"]["rows"] == [["t", "10.0 s, 2.00 Wh", "20.0 s, 2.00 Wh"], ["all", "10.0 s", "20.0 s"]]
    assert page["differences"]["rows"][0][3:] == ["-0.1000", "-0.2000 to +0.0500"]
    gaps = suite_story.facts(
        Report([Entry("t", "guess", settings)], ["a"], [one("a", 0.5, 1.0, "gap_between_groups")], [])
    )
    assert gaps["table"]["rows"][0][1] == "gap_between_groups ↓"
