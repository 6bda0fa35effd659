"""The paper's numbers: documented as they are stored, each with a command that exists."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from opsin.backbone.registry import architecture
from opsin.cli import _checked
from opsin.evaluate import published
from opsin.evaluate.published import ABLATIONS, PAPER, beside, command_of, tables
from opsin.evaluate.tasks import TASKS

DOCS = Path(__file__).parents[2] / "docs" / "evaluate.md"


def test_the_documentation_has_these_tables():
    assert tables() in DOCS.read_text(), "print them with benchmarks/paper_tables.py"


@pytest.mark.parametrize("row", PAPER, ids=lambda row: f"{row.table}-{row.task}-{row.data}-{row.metric}-{row.options}")
def test_every_command_is_understood(row):
    checked = _checked([*command_of(row).split()[1:], "--out", "results.json"])
    settings = checked.keywords["settings"]
    assert settings.data == f"{row.data}:PATH"
    for option in (word[2:].replace("-", "_") for word in row.options.split() if word.startswith("--")):
        assert option in {field.name for field in fields(settings)}


@pytest.mark.parametrize("one", ABLATIONS, ids=lambda one: f"{one.table}-{one.what}")
def test_every_ablation_is_a_recipe(one):
    assert _checked(["pretrain", *one.options.split(), "--data", "x", "--out", "y"]).keywords["settings"]


def test_ablations_differ():
    recipes = [
        _checked(["pretrain", *one.options.split(), "--data", "x", "--out", "y"]).keywords["settings"]
        for one in ABLATIONS
    ]
    assert len({str(recipe) for recipe in recipes}) == len(ABLATIONS)


def test_every_task_of_the_tables_is_there():
    assert {row.task for row in PAPER} <= set(TASKS)


def test_what_stands_beside_a_result():
    lines = beside("knn", "imagenet:/data", architecture("dinov2_vitb14"))
    assert lines == [
        "paper, Table 4: accuracy S/14 0.79, B/14 0.821 (this size), L/14 0.835, g/14 0.835",
    ]
    assert len(beside("linear", "imagenet:/data", architecture("dinov2_vits14"))) == 3
    assert beside("knn", "/data/imagenet", architecture("dinov2_vits14")) == []
    assert beside("knn", "photos:/x", architecture("dinov2_vits14")) == []
    assert "(this size)" not in beside("knn", "imagenet:/x", replace(architecture("dinov2_vits14"), patch=16))[0]


def test_numbers_are_in_their_units():
    for row in PAPER:
        values = [value for value in row.values if value is not None]
        high = 10 if row.task == "depth" else 1
        assert all(0 < value < high for value in values), row
    assert published.MODELS[384] == "S/14"


def test_settings_have_no_default_data():
    for name, task in TASKS.items():
        assert task.settings().data == "", name
