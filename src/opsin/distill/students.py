"""The students of a distillation: which there are, and what they must have in common to share their teacher's work."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from opsin.backbone import registry
from opsin.backbone.vit import Architecture
from opsin.errors import OpsinError, unknown
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.recipe import Recipe, read

SHARED = (
    "backbone.patch", "backbone.channels", "steps", "seed", "precision", "log_every", "drop_path", "batch", "crops",
    "masks", "data", "checkpoint.every", "loss.centering", "loss.sinkhorn_iterations", "loss.centre_momentum",
    "schedule.teacher_temperature", "schedule.teacher_temperature_steps",
)  # fmt: skip
"""Fields that decide the batches and what the teacher makes of them; all else each student has for itself. With
stochastic depth the depth is one of them, since samples are drawn for each block."""
HEADS_RUN, FEATURES = "teacher", "teacher-features"
"""Folders beside those of the students: of the heads' run, and of the teacher's features."""
RESERVED = (HEADS_RUN, FEATURES, "cache")


def recipes(students: Sequence[str], settings: Recipe) -> dict[str, Recipe]:
    """The recipe of each student by its name.

    Args:
        students: names of architectures, which take all else from `settings`, or recipe files, which name all.
        settings: of the distillation.

    Raises:
        OpsinError: an unknown name, the same one twice, or recipes that do not agree on what students share.
    """
    found: dict[str, Recipe] = {}
    for given in students:
        if given.endswith((".yaml", ".yml")):
            name, recipe = Path(given).stem, read(Path(given))
        elif given in registry.names():
            name, recipe = given, replace(settings, backbone=_architecture(given, settings))
        else:
            raise unknown("student", given, [*registry.names(), "a recipe file, NAME.yaml"])
        if name in found or name in RESERVED:
            what = f"{name} twice" if name in found else f"{name}, the name of a folder that the distillation makes"
            raise OpsinError(
                f"--students has {what}: each needs a name of its own, which is that of its architecture or of its "
                "recipe file."
            )
        _check_distillable(recipe, name)
        # Students are small, and a teacher's view is shared by processes that hold whole ones.
        found[name] = replace(recipe, parallel=replace(recipe.parallel, mode="replicate"))
    if not found:
        raise OpsinError("--students is empty: give names of architectures or recipe files.")
    first, *others = found
    for name in others:
        for dotted in (*SHARED, *(["backbone.depth"] if found[first].drop_path else [])):
            ours, theirs = _field(asdict(found[first]), dotted), _field(asdict(found[name]), dotted)
            if ours != theirs:
                while isinstance(ours, dict):  # down to one setting
                    part = next(part for part in ours if ours[part] != theirs[part])
                    dotted, ours, theirs = f"{dotted}.{part}", ours[part], theirs[part]
                raise OpsinError(
                    f"students {first} and {name} differ in {dotted} ({ours} and {theirs}), which those who share a "
                    "teacher's look at each batch have in common: make it equal, or distil them one by one."
                )
    return found


def _architecture(name: str, settings: Recipe) -> Architecture:
    """A student's backbone; positions are stored for the size of its crops."""
    arch = registry.architecture(name)
    grid = max(1, settings.crops.global_size // arch.patch)
    return replace(arch, channels=settings.backbone.channels, layerscale=settings.backbone.layerscale, grid=grid)


def with_heads_of(recipe: Recipe, teacher: HeadRecipe) -> Recipe:
    """The recipe with as many heads and prototypes as the teacher has; bottleneck and MLP stay the student's."""
    heads = replace(
        recipe.heads,
        tied=teacher.tied,
        dino_prototypes=teacher.dino_prototypes,
        ibot_prototypes=teacher.ibot_prototypes,
    )
    return replace(recipe, heads=heads)


def _check_distillable(recipe: Recipe, name: str) -> None:
    wrong = {
        "phases": bool(recipe.phases),
        "train": recipe.train != "all",
        "gram.weight": recipe.gram.weight > 0,
        "parallel.mode": recipe.parallel.mode in ("shard", "hybrid"),
    }
    for dotted, given in wrong.items():
        if given:
            raise OpsinError(
                f"{dotted} of student {name} has no meaning in a distillation: leave it at its default. A student "
                "can go through more phases afterwards, with opsin pretrain --weights."
            )
    try:
        recipe.stream()  # refuses crops that its patches do not divide, before heads are trained
    except OpsinError as error:
        raise OpsinError(f"student {name}: {error}") from None


def _field(tree: Mapping[str, Any], dotted: str) -> Any:
    value: Any = tree
    for part in dotted.split("."):
        value = value[part]
    return value
