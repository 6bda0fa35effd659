"""What a run begins with: random weights, those of a file, or those of the run before it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from phased import equal, one_phase, pretrain, state
from torch import Tensor

from opsin.backbone import adapt, weights
from opsin.backbone.vit import VisionTransformer
from opsin.constants import normalisation
from opsin.errors import OpsinError
from opsin.pretrain import checkpoint
from opsin.pretrain.parallel import ALONE
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.start import Start, Stored
from opsin.pretrain.step import Step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def before(photos, tmp_path_factory) -> Path:
    """A run of two steps; read only."""
    out = tmp_path_factory.mktemp("before") / "run"
    pretrain(one_phase(steps=2), photos, out)
    return out


def begun(recipe: Recipe, *before: object) -> tuple[dict[str, Tensor], str]:
    """The state of a run at its beginning, and what is said of it."""
    start = Start(recipe, *before)
    step = Step(recipe, CPU, ALONE, start.networks)
    start.rest(step.state())
    (said,) = start.said or [""]
    return step.state(), said


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], beginning: str) -> bool:
    names = [name for name in ours if name.startswith(beginning)]
    assert names
    return all(torch.equal(ours[name], theirs[name]) for name in names)


# ---- from the run before


def test_everything_that_fits_goes_on_bit_for_bit(before):
    ours, said = begun(one_phase(seed=7, steps=9), before)
    theirs = state(before)
    assert equal(ours, {name: theirs[name] for name in ours})
    assert said == f"from {before}: backbone, heads, optimiser, centres, loss scale"


@pytest.mark.parametrize(
    ("fresh", "carried", "new"),
    [
        (("heads",), ["student.backbone", "loss_scale"], ["student.dino_head.mlp.0.weight", "optimiser", "objective"]),
        (("optimiser",), ["student", "average", "objective"], ["optimiser.mean", "optimiser.count"]),
        (("heads", "optimiser"), ["student.backbone", "average.backbone"], ["optimiser", "objective"]),
    ],
)
def test_what_is_asked_for_begins_anew(before, fresh, carried, new):
    ours, said = begun(one_phase(seed=7), before, fresh)
    theirs = state(before)
    for name in carried:
        assert same(ours, theirs, name), name
    for name in new:
        assert not same(ours, theirs, name), name
    assert same(ours, {name.replace("average", "student"): t for name, t in theirs.items()}, "student.") is False
    for name in fresh:
        assert name in said.partition("; fresh: ")[2].split(", ")
    random = Step(one_phase(seed=7), CPU).state()  # new heads are those of the phase's own seed
    assert same(ours, random, "student.dino_head") is ("heads" in fresh)


@pytest.mark.parametrize("change", ["prototypes", "hidden", "tied"])
def test_heads_of_another_form_begin_anew_and_with_them_the_optimiser(before, change):
    recipe = one_phase()
    heads = {"prototypes": {"dino_prototypes": 48}, "hidden": {"hidden": 24}, "tied": {"tied": True}}[change]
    recipe = replace(recipe, heads=replace(recipe.heads, **heads))
    ours, said = begun(recipe, before)
    if change == "tied":  # the one head that is left fits
        assert "; fresh" not in said or "heads" not in said.partition("; fresh")[2]
        return
    assert said == f"from {before}: backbone, loss scale; fresh: heads, optimiser, centres"
    assert same(ours, state(before), "student.backbone")
    assert not any(t.any() for name, t in ours.items() if name.startswith("optimiser."))


@pytest.mark.parametrize("grid", [1, 3, 4])
def test_positions_are_resampled_of_student_and_teacher_each(before, grid):
    recipe = one_phase()
    ours, said = begun(replace(recipe, backbone=replace(recipe.backbone, grid=grid)), before)
    theirs = state(before)
    for who in ("student", "average"):
        name = f"{who}.backbone.pos_embed"
        assert torch.equal(ours[name], adapt.positions(theirs[name], grid, recipe.backbone))
    assert not torch.equal(ours["student.backbone.pos_embed"], ours["average.backbone.pos_embed"])
    assert f"positions resampled to {grid}×{grid}" in said
    assert said.endswith("; fresh: optimiser")
    assert same(ours, theirs, "student.backbone.blocks")


def test_another_precision_takes_the_same_weights(before):
    ours, _ = begun(one_phase(precision="fp64"), before)
    theirs = state(before)
    for name, tensor in ours.items():
        if name.startswith(("student.", "average.")):
            assert tensor.dtype == torch.float64
            assert torch.equal(tensor, theirs[name].double()), name


def test_there_must_be_something_to_go_on_from(tmp_path):
    with pytest.raises(OpsinError) as caught:
        Stored(tmp_path)
    assert str(caught.value) == f"{tmp_path} has no checkpoint to go on from: give the command that made it again."


def test_a_damaged_checkpoint_is_named(before, tmp_path):
    path = checkpoint.folder(tmp_path) / "step-00000002"
    path.mkdir(parents=True)
    (path / ".metadata").write_bytes(b"no such thing")
    for file in ("meta.json", "backbone.safetensors"):
        (path / file).write_bytes((checkpoint.folder(before) / path.name / file).read_bytes())
    with pytest.raises(OpsinError, match="cannot be read") as caught:
        begun(one_phase(), tmp_path)
    assert str(path) in str(caught.value)
    assert "remove it" in str(caught.value)


# ---- from a file


def test_weights_are_those_of_student_and_teacher(before):
    file = before / "backbone.safetensors"
    recipe = one_phase(weights=str(file), seed=3)
    ours, said = begun(recipe)
    loaded = weights.restore(file)[0].state_dict()
    for name, tensor in loaded.items():
        assert torch.equal(ours[f"student.backbone.{name}"], tensor)
        assert torch.equal(ours[f"average.backbone.{name}"], tensor)
    assert same(ours, Step(replace(recipe, weights=""), CPU).state(), "student.dino_head")
    assert said.startswith("student and teacher begin with ")
    assert str(file) in said


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_of_another_stem_they_are_fitted(before, channels):
    mean, std = normalisation(channels)
    recipe = one_phase(weights=str(before / "backbone.safetensors"))
    crops = replace(recipe.crops, mean=mean, std=std, global_size=12, local_size=4)
    recipe = replace(recipe, backbone=replace(recipe.backbone, channels=channels, patch=4, grid=3), crops=crops)
    ours, said = begun(recipe)
    kernel = ours["student.backbone.patch_embed.proj.weight"]
    theirs = state(before)["average.backbone.patch_embed.proj.weight"]
    torch.testing.assert_close(kernel, adapt.patch(adapt.channels(theirs, channels), 4))
    assert torch.equal(kernel, ours["average.backbone.patch_embed.proj.weight"])
    assert "patch_embed.proj.weight" in said or "reshaped" in said


def test_weights_of_another_architecture_name_the_option(tmp_path):
    recipe = one_phase(weights=str(tmp_path / "wide.safetensors"))
    weights.save(VisionTransformer(replace(recipe.backbone, width=32)), tmp_path / "wide.safetensors")
    with pytest.raises(OpsinError) as caught:
        begun(recipe)
    assert "width 32" in str(caught.value)
    assert "--init" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_weights_all_is_random_and_equal(before):
    ours, said = begun(one_phase())
    assert said == ""
    assert equal(ours, Step(one_phase(), CPU).state())
    with pytest.raises(OpsinError, match="train is heads, and without weights the backbone would stay random: give --"):
        begun(one_phase(train="heads"))
    begun(one_phase(train="heads", weights=str(before / "backbone.safetensors")))
    begun(one_phase(train="heads"), before)  # those of the run before are weights too
