"""A recipe: every setting of a run, as one tree of frozen dataclasses, and the phases that it goes through.

Each part is defined, documented and checked beside the code that reads it. The command line overrides any field by its
dotted name (`--schedule.rate 1e-3`); the resolved recipe is written beside the weights as YAML and can be fed back. The
named recipes are in `presets`.

A recipe with phases stands for several runs, one after the other. Each phase changes some fields of the one before:

    phases:
    - {name: pretrain, length: 100 epochs}
    - {name: high-res, length: 10000 steps, change: {crops.global_size: 518, backbone.grid: 37, schedule.rate: 1.0e-4}}
"""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from opsin.backbone.vit import Architecture
from opsin.constants import normalisation
from opsin.data.crops import CropRecipe
from opsin.data.masks import MaskRecipe
from opsin.data.stream import BatchRecipe, DataRecipe, StreamRecipe
from opsin.errors import FINITE, OpsinError, unknown, within
from opsin.pretrain.gram import GramRecipe
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.monitor import MonitorRecipe
from opsin.pretrain.objective import LossRecipe
from opsin.pretrain.optim import OptimRecipe
from opsin.pretrain.parallel import ParallelRecipe
from opsin.pretrain.schedules import ScheduleRecipe
from opsin.settings import dumped, parsed, structured, text_of, tree_of


@dataclass(frozen=True)
class CheckpointRecipe:
    """When the run saves itself."""

    every: int = 1_000
    """Steps between checkpoints; one is also written at the end, on Ctrl-C and on SIGTERM."""
    keep: int = 3
    """Latest checkpoints that stay."""

    def __post_init__(self) -> None:
        within(self, "checkpoint.", every=(1, FINITE), keep=(1, FINITE))


@dataclass(frozen=True)
class Phase:
    """A part of a run that is trained by itself, from where the phase before it ended."""

    name: str
    """Of the phase and, after its number, of its folder: letters, digits, - and _."""
    length: str = ""
    """'500 steps', '2 epochs' or '1e6 images', rounded up to whole steps; by default the recipe's `steps`."""
    change: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe by their dotted names, with the values that they have from this phase on."""
    fresh: tuple[Literal["heads", "optimiser"], ...] = ()
    """What begins anew: else all that fits is carried over from the phase before."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise OpsinError(f"a phase is called {self.name!r}: give a name of letters, digits, - and _.")
        if wrong := set(self.fresh) - {"heads", "optimiser"}:
            raise OpsinError(f"phase {self.name} has fresh {sorted(wrong)[0]!r}: give heads, optimiser, or both.")
        self.count()

    def count(self) -> tuple[Fraction, str]:
        """The length as a number and its unit; no unit if the recipe's `steps` are meant."""
        if not self.length:
            return Fraction(0), ""
        found = re.fullmatch(r"([\d_.]+(?:[eE]\+?\d+)?) ?(steps?|epochs?|images?)", self.length.strip())
        try:
            number = float(found[1]) if found else 0.0
        except ValueError:
            number = 0.0
        if found is None or not 0 < number <= FINITE:
            raise OpsinError(
                f"the length of phase {self.name} is {self.length!r}: give a number and a unit, such as '500 steps', "
                "'2 epochs' or '1e6 images'."
            )
        return Fraction(found[1]), found[2].rstrip("s")

    def steps(self, recipe: "Recipe", images: int | None) -> int:
        """The length in steps of `recipe`, on so many images; None if there are none to count."""
        number, unit = self.count()
        if not unit:
            return recipe.steps
        if unit == "step":
            return math.ceil(number)
        if unit == "epoch" and images is None:
            raise OpsinError(
                f"phase {self.name} has a length in epochs, and there are no images to count: give steps or images."
            )
        return math.ceil(number * (1 if images is None or unit == "image" else images) / recipe.batch.size)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a pretraining run, apart from the images."""

    backbone: Architecture
    steps: int = 125_000
    """Optimiser steps of the run, or of a phase that does not say its own length."""
    seed: int = 0
    """Of the initial weights and of everything that is drawn; phase n draws with seed + n - 1."""
    weights: str = ""
    """A backbone's weights, in any form that `opsin.load` reads, with which student and teacher begin; the stem is
    fitted to other channels, patches and position grids (see `backbone.adapt`). Without, they begin at random."""
    train: Literal["all", "heads"] = "all"
    """What learns: all of the network, or its heads alone, on a backbone that stays as `weights` has it."""
    drop_path: float = 0.3
    """Stochastic depth: share of a group's samples that each branch leaves out, the same in every block."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16"
    """Of the matrix products; weights, moments and sums are fp32 (fp64 throughout for fp64). fp16 scales its loss."""
    graphs: bool = True
    """Record the step as CUDA graphs on a GPU; without, every kernel is launched by itself: slower, easier to debug."""
    max_skipped: int = 10
    """Steps in a row with NaN or infinite gradients, which are left out, before the run stops."""
    log_every: int = 10
    """Steps between records in metrics.jsonl; reading losses more often makes a GPU wait."""
    batch: BatchRecipe = field(default_factory=BatchRecipe)
    crops: CropRecipe = field(default_factory=CropRecipe)
    masks: MaskRecipe = field(default_factory=MaskRecipe)
    heads: HeadRecipe = field(default_factory=HeadRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    gram: GramRecipe = field(default_factory=GramRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    monitor: MonitorRecipe = field(default_factory=MonitorRecipe)
    phases: Annotated[tuple[Phase, ...], tyro.conf.Suppress] = ()
    """Parts of the run, each a change of the one before; without, it has one. In a command, a field of a phase is
    `--phases.NAME.FIELD`, such as --phases.high-res.length '500 steps' or --phases.high-res.schedule.rate 1e-4."""

    def __post_init__(self) -> None:
        within(self, "", steps=(1, 2**28), log_every=(1, FINITE), max_skipped=(0, FINITE), seed=(0, 2**63 - 1))
        within(self, "", drop_path=(0, 0.99))
        if self.backbone.channels != 3 and (self.crops.mean, self.crops.std) == normalisation(3):
            # The default is of RGB: for other channels it is what an adapted stem expects (see `backbone.adapt`).
            mean, std = normalisation(self.backbone.channels)
            object.__setattr__(self, "crops", replace(self.crops, mean=mean, std=std))
        if len(self.crops.mean) not in (1, self.backbone.channels):
            raise OpsinError(
                f"backbone.channels is {self.backbone.channels} but crops.mean and crops.std have "
                f"{len(self.crops.mean)} entries: give one per channel, or one for all."
            )
        stages(self, self.batch.size)

    def stream(self) -> StreamRecipe:
        """The part that decides the contents of the batches."""
        return StreamRecipe(
            seed=self.seed,
            batch=self.batch,
            crops=self.crops,
            masks=self.masks,
            patch=self.backbone.patch,
            depth=self.backbone.depth,
            drop_path=self.drop_path,
        )


class Stage(NamedTuple):
    """A phase with all its settings."""

    phase: Phase | None
    """None for a recipe without phases."""
    recipe: Recipe
    """Has no phases."""


def stages(recipe: Recipe, images: int | None) -> list[Stage]:
    """The phases of a recipe on so many images, one after the other; one if it names none.

    Without images, no length can be in epochs.

    Raises:
        OpsinError: a phase changes a field that does not exist, or in a way that leaves nothing to go on with.
    """
    found: list[Stage] = []
    tree = tree_of(recipe) | {"phases": []}
    for number, phase in enumerate(recipe.phases):
        where = f"phase {phase.name}"
        if phase.name in (stage.phase.name for stage in found if stage.phase):
            raise OpsinError(f"two phases are called {phase.name}: give each a name of its own.")
        tree = copy.deepcopy(tree)
        for dotted, value in phase.change.items():
            _change(tree, dotted, value, where)
        try:
            made = structured(tree, where, Recipe)
            made = replace(made, steps=phase.steps(made, images), seed=recipe.seed + number)
        except OpsinError as error:
            raise OpsinError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
        if found:
            _check_follows(found[-1].recipe, made, where)
        found.append(Stage(phase, made))
    return found or [Stage(None, recipe)]


NOT_CHANGED = ("steps", "phases", "seed")
"""Fields that a phase has other ways to say."""


def _change(tree: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    *path, last = dotted.split(".")
    branch: Any = tree
    for name in path:
        branch = branch.get(name) if isinstance(branch, dict) else None
    known = [name for name in _dotted_names(tree) if name not in NOT_CHANGED]
    if not isinstance(branch, dict) or dotted not in known:
        if dotted == "steps":
            raise OpsinError(f"{where} changes steps: give its length instead, such as length: 500 steps.")
        raise OpsinError(f"{where}: {unknown('field', dotted, known)}")
    branch[last] = value


def _dotted_names(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in tree.items():
        names += _dotted_names(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return names


def _check_follows(before: Recipe, after: Recipe, where: str) -> None:
    """Refuse a phase that could not go on from the weights of the one before."""
    if before.weights != after.weights:
        raise OpsinError(
            f"{where} changes weights, but begins with those of the phase before: leave this to the first."
        )
    ours, theirs = asdict(before.backbone), asdict(after.backbone)
    other = [name for name in ours if ours[name] != theirs[name] and name not in ("grid", "layerscale")]
    if other:
        raise OpsinError(
            f"{where} changes backbone.{other[0]} from {ours[other[0]]} to {theirs[other[0]]}, and the weights of the "
            "phase before would not fit: of the backbone only the position grid can change."
        )


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, fields in the order of their definition."""
    return dumped(recipe)


def from_yaml(text: str, where: str) -> Recipe:
    """A recipe from YAML; `where` names its source in messages. Unknown keys and wrong types are errors."""
    return parsed(text, where, Recipe)


def read(path: Path) -> Recipe:
    """The recipe of a YAML file."""
    return from_yaml(text_of(path, "Give a name that `opsin recipes` lists."), str(path))
