import ast
import dataclasses
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import opsin
from opsin.data.stream import BatchRecipe
from opsin.errors import OpsinError
from opsin.pretrain.presets import PRESETS, preset
from opsin.pretrain.recipe import Phase, Recipe, from_yaml, stages, to_yaml


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
        ("backbone", "channels", 0),
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


# ---- phases


def with_phases(*phases: Phase, **changes: object) -> Recipe:
    return dataclasses.replace(preset("cpu"), phases=phases, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_phases_that_follow_one_another(name):
    recipe = preset(name)
    found = stages(recipe, 10_000)
    assert len(found) == max(1, len(recipe.phases))
    for stage in found:
        stage.recipe.stream()
        assert not stage.recipe.phases
        assert from_yaml(to_yaml(stage.recipe), "there") == stage.recipe
        for dotted, value in (stage.phase.change if stage.phase else {}).items():
            there = stage.recipe
            for part in dotted.split("."):
                there = getattr(there, part)
            assert there == (tuple(value) if isinstance(value, list) else value), dotted


def test_a_phase_changes_the_one_before():
    recipe = with_phases(
        Phase("one", length="5 steps", change={"schedule.rate": 0.1, "drop_path": 0.5}),
        Phase("two", change={"schedule.rate": 0.2, "backbone.grid": 12}, fresh=("optimiser",)),
        Phase("three", length="7 steps", change={"schedule.decay": [0.0, 0.5]}),
        seed=9,
    )
    one, two, three = (stage.recipe for stage in stages(recipe, 100))
    assert (one.schedule.rate, two.schedule.rate, three.schedule.rate) == (0.1, 0.2, 0.2)
    assert [part.drop_path for part in (one, two, three)] == [0.5] * 3
    assert [part.backbone.grid for part in (one, two, three)] == [recipe.backbone.grid, 12, 12]
    assert [part.steps for part in (one, two, three)] == [5, 300, 7]
    assert three.schedule.decay == (0.0, 0.5)
    assert [part.seed for part in (one, two, three)] == [9, 10, 11]
    assert dataclasses.replace(one, steps=300, seed=9, drop_path=0.0, schedule=recipe.schedule) == dataclasses.replace(
        recipe, phases=()
    )


@given(
    number=st.one_of(
        st.integers(1, 10**6).map(str),
        st.decimals("0.01", 1000, places=2).map(str),
        st.integers(1, 9).map(lambda n: f"{n}e3"),
    ),
    unit=st.sampled_from(["step", "epoch", "image"]),
    several=st.booleans(),
    space=st.booleans(),
    images=st.integers(1, 10**6),
    size=st.integers(2, 4096),
)
def test_lengths_are_rounded_up_to_whole_steps(number, unit, several, space, images, size):
    phase = Phase("one", length=f"{number}{' ' * space}{unit}{'s' * several}")
    recipe = dataclasses.replace(preset("cpu"), batch=BatchRecipe(size=size, group=size))
    exact = Fraction(number) * {"step": size, "image": 1, "epoch": images}[unit]  # images
    found = phase.steps(recipe, images)
    assert found * size >= exact > (found - 1) * size


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ("", 300),
        ("500 steps", 500),
        ("1 step", 1),
        ("1_000 steps", 1000),
        (" 3steps ", 3),
        ("2 epochs", 4),
        ("0.5 epochs", 1),
        ("64 images", 1),
        ("65 images", 2),
        ("1e5 images", 1563),
    ],
)
def test_lengths(length, steps):
    (stage,) = stages(with_phases(Phase("one", length=length)), 100)  # of 64 images a step
    assert stage.recipe.steps == steps


def test_a_length_is_rounded_up_no_further_than_it_must():
    recipe = dataclasses.replace(preset("cpu"), batch=BatchRecipe(size=7, group=7))
    assert Phase("one", length="0.07 epochs").steps(recipe, 100) == 1  # in floats this is a little more than 7 images


@pytest.mark.parametrize(
    "length",
    [
        *("5", "steps", "-5 steps", "0 steps", "0.0 epochs", "nan steps", "inf steps", "five steps", "5 hours"),
        *("5 steps 3", "1.2.3 steps", "1e400 steps", "1e-2 epochs", "1e99999999 images"),
    ],
)
def test_a_bad_length_is_refused(length):
    with pytest.raises(OpsinError) as caught:
        Phase("warm-up", length=length)
    assert str(caught.value) == (
        f"the length of phase warm-up is {length!r}: give a number and a unit, such as '500 steps', '2 epochs' or "
        "'1e6 images'."
    )


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ("[{name: a}, {name: a}]", "two phases are called a: give each a name of its own."),
        ("[{name: a b}]", "a phase is called 'a b': give a name of letters, digits, - and _."),
        ("[{name: a/b}]", "a phase is called 'a/b': give a name of letters, digits, - and _."),
        ('[{name: ""}]', "a phase is called '': give a name of letters, digits, - and _."),
        ("[{length: 3 steps}]", "name"),
        ("[{name: a, lenght: 3 steps}]", "unknown field 'lenght': did you mean 'length'?"),
        ("[{name: a, fresh: [head]}]", "fresh"),
        ("[{name: a, length: 3}]", "the length of phase a is '3': give a number and a unit"),
        ("[{name: a, length: 9e9 steps}]", "phase a: steps is 9000000000"),
        ("[{name: a, change: {steps: 5}}]", "phase a changes steps: give its length instead, such as length: 500"),
        ("[{name: a, change: {phases: []}}]", "phase a: unknown field 'phases'"),
        ("[{name: a, change: {stepss: 5}}]", "phase a: unknown field 'stepss'"),
        (
            "[{name: a, change: {schedule.rat: 5}}]",
            "phase a: unknown field 'schedule.rat': did you mean 'schedule.rate'?",
        ),
        ("[{name: a, change: {schedule: {rate: 5}}}]", "phase a: unknown field 'schedule'"),
        ("[{name: a, change: {schedule.rate.low: 5}}]", "phase a: unknown field 'schedule.rate.low'"),
        ("[{name: a, change: {schedule.rate: fast}}]", "phase a"),
        ("[{name: a, change: {drop_path: 2}}]", "phase a is not a recipe: drop_path is 2.0: give from 0 to 0.99."),
        ("[{name: a, change: {loss.centering: none}}]", "phase a"),
        (
            "[{name: a}, {name: b, change: {backbone.width: 384}}]",
            "phase b changes backbone.width from 128 to 384, and the weights of the phase before would not fit: of the "
            "backbone only the position grid can change.",
        ),
        ("[{name: a}, {name: b, change: {backbone.registers: 4}}]", "phase b changes backbone.registers from 0 to 4"),
        (
            "[{name: a}, {name: b, change: {weights: x.pth}}]",
            "phase b changes weights, but begins with those of the phase before: leave this to the first.",
        ),
        ("[{name: a, change: {crops.mean: [0.5, 0.5]}}]", "phase a"),
    ],
)
def test_phases_that_cannot_be_are_refused(phases, said):
    text = to_yaml(preset("cpu")).replace("phases: []", f"phases: {phases}")
    with pytest.raises(OpsinError) as caught:
        from_yaml(text, "mine.yaml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("mine.yaml")
    assert "\n" not in str(caught.value)
