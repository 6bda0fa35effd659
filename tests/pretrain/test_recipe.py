import ast
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import opsin
from opsin.errors import OpsinError
from opsin.pretrain.presets import PRESETS, preset
from opsin.pretrain.recipe import Recipe, from_yaml, to_yaml


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_yaml(name):
    recipe = preset(name)
    assert from_yaml(to_yaml(recipe), "there") == recipe


def test_a_hand_written_number_without_a_point(tmp_path):
    # PyYAML reads 1e-4 as text.
    text = to_yaml(preset("cpu")).replace("rate: 0.008", "rate: 1e-4")
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert preset(str(file)).schedule.rate == 1e-4


@given(st.floats(1e-9, 1), st.integers(1, 10**7), st.floats(0, 0.99))
def test_numbers_survive_yaml(rate, steps, drop):
    recipe = dataclasses.replace(preset("cpu"), steps=steps, drop_path=drop)
    recipe = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, rate=rate))
    assert from_yaml(to_yaml(recipe), "there") == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 300", "stepss: 300", r"unknown field 'stepss': did you mean 'steps'\?"),
        ("steps: 300", "steps: many", "steps"),
        ("steps: 300", "steps: 3.5", "whole number"),
        ("graphs: true", "graphs: 1", "true or false"),
        ("precision: fp32", "precision: fp8", "precision"),
        ("drop_path: 0.0", "drop_path: 1.0", "drop_path is 1.0"),
        ("steps: 300", "steps: [", "not YAML"),
    ],
)
def test_what_is_wrong_is_named(old, new, message):
    text = to_yaml(preset("cpu"))
    assert old in text
    with pytest.raises(OpsinError, match=message) as caught:
        from_yaml(text.replace(old, new), "mine.yaml")
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "just words", "1: 2"])
def test_what_is_no_recipe_at_all(text):
    with pytest.raises(OpsinError, match=r"mine.yaml is not a recipe: it must hold names and values"):
        from_yaml(text, "mine.yaml")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("backbone", "heads", 0),
        ("backbone", "depth", -1),
        ("backbone", "patch", 0),
        ("backbone", "channels", 4),
        ("crops", "local_size", 0),
        ("crops", "std", (0.0, 0.0, 0.0)),
        ("crops", "blur", (0.0, 2.0, 0.0)),
        ("masks", "min_aspect", 0.0),
        ("data", "workers", -1),
        ("schedule", "rate", float("nan")),
        ("schedule", "momentum", (2.0, 2.0)),
        ("optim", "clip", float("inf")),
        ("heads", "hidden", 0),
        ("loss", "student_temperature", 0.0),
        ("checkpoint", "keep", 0),
    ],
)
def test_numbers_outside_their_range_are_named(part, name, value):
    recipe = preset("cpu")
    with pytest.raises(OpsinError, match=rf"{part}.{name} is "):
        dataclasses.replace(recipe, **{part: dataclasses.replace(getattr(recipe, part), **{name: value})})


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(OpsinError, match=r"unknown recipe 'vitl16short': did you mean 'vitl16-short'\?"):
        preset("vitl16short")
    with pytest.raises(OpsinError, match=r"cannot read the recipe nowhere.yaml"):
        preset("nowhere.yaml")


def _leaves(kind: type, prefix: str = "") -> list[tuple[str, str]]:
    import typing

    hints = typing.get_type_hints(kind)
    found = []
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            found += _leaves(hints[f.name], f"{prefix}{f.name}.")
        else:
            found.append((prefix + f.name, f.name))
    return found


@pytest.mark.parametrize(("dotted", "name"), _leaves(Recipe))
def test_every_key_is_read_somewhere(dotted, name):
    """A setting that no code reads would be a lie: outside its own definition, somebody must take the attribute."""
    root = Path(opsin.__file__).parent
    reads = 0
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                # Checks in __post_init__ do not count as use.
                node.body = [n for n in node.body if not (isinstance(n, ast.FunctionDef) and n.name == "__post_init__")]
            if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Load):
                reads += 1
            # "global_scale" and such are read through getattr with a literal nowhere else but in checks
    assert reads, dotted


def test_every_key_is_documented():
    root = Path(opsin.__file__).parent
    undocumented = []
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and (node.name.endswith("Recipe") or node.name == "Architecture"):
                for at, item in enumerate(node.body):
                    if isinstance(item, ast.AnnAssign) and node.name != "Recipe":
                        after = node.body[at + 1] if at + 1 < len(node.body) else None
                        if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                            undocumented.append(f"{node.name}.{ast.unparse(item.target)}")
    assert not undocumented
