"""Pretraining as a user asks for it: a recipe of one phase or several, each of which runs, resumes, or is done already.

    OUT/1-pretrain, OUT/2-high-res, …   the run of each phase, in the form of any run
    OUT/backbone.safetensors            of the last one, when all are done; so with heads.safetensors
    OUT/recipe.yaml                     the recipe with its phases

A recipe without phases runs in OUT itself. What goes from one phase to the next is in `start`.
"""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from opsin import ranks
from opsin.data.sources import scan, summarise
from opsin.errors import OpsinError
from opsin.machine import pick_device
from opsin.output import make_folder, write
from opsin.pretrain import checkpoint
from opsin.pretrain.anchor import START
from opsin.pretrain.folder import RECIPE, check_same, copy, disk_errors
from opsin.pretrain.loop import BACKBONE, HEADS, Finished, Job, check_masks, check_sizes, run
from opsin.pretrain.recipe import Recipe, Stage, stages, to_yaml


def pretrain(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    device: str | None = None,
    accept_changes: bool = False,
    quiet: bool = False,
) -> Finished:
    """Train a backbone on the images of `data`, phase by phase, and leave everything about it in `out`.

    Args:
        recipe: all settings; `opsin.pretrain.presets.preset(name)` gives the named ones.
        data: see `scan`: a folder of any depth, a list, shards, here or in a bucket.
        out: folder of the run; if it holds one already, that run goes on. All processes must see it.
        device: "cuda", "mps" or "cpu"; by default the first of these that is there.
        accept_changes: go on although recipe, data or image decoder differ from those the run began with.
        quiet: no progress on stderr.

    Returns:
        How the last phase that ran ended, in its own folder; that of `out` when all phases are done.

    Raises:
        OpsinError: for anything the user can mend: bad settings, unreadable data, a full disk, NaN gradients.
    """
    out, settings = Path(out), {"device": device, "accept_changes": accept_changes, "quiet": quiet}
    console = Console(stderr=True, soft_wrap=True, highlight=False, quiet=quiet)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks.started(pick_device(device), recipe.parallel.timeout))
        if not recipe.phases:
            ranks.by_first(lambda: _check_without_phases(out))
            return run([Job(recipe, out)], data, out, **settings)[0]  # type: ignore[arg-type]
        stack.enter_context(disk_errors(out))
        found = ranks.by_first(lambda: _prepared(recipe, data, out, accept_changes=accept_changes, quiet=quiet))
        before: Path | None = None
        for number, stage in enumerate(found, start=1):
            folder = folders(recipe, out)[number - 1]
            name = f"phase {number} of {len(found)}, {folder.name}: {stage.recipe.steps} steps"
            if done(folder, stage.recipe):
                if ranks.first():
                    console.print(f"{name}, which are done", markup=False)
                finished = Finished(folder, stage.recipe.steps, None)
            else:
                if ranks.first():
                    console.print(name + _changes(stage), markup=False)
                job = Job(stage.recipe, folder, before=before, fresh=stage.phase.fresh if stage.phase else ())
                finished = run([job], data, out, **settings)[0]  # type: ignore[arg-type]
            if finished.stopped_by is not None:
                return finished
            before = folder
        assert before is not None
        if ranks.first():
            for file in (BACKBONE, HEADS):
                copy(before / file, out / file)
    return replace(finished, out=out)


def folders(recipe: Recipe, out: Path) -> list[Path]:
    """Where the phases of a recipe run, in their order."""
    names = [f"{number}-{phase.name}" for number, phase in enumerate(recipe.phases, start=1)]
    return [out / name for name in names] or [out]


def done(folder: Path, recipe: Recipe) -> bool:
    """Whether a run has reached its last step and left its backbone."""
    return recipe.steps in checkpoint.steps(folder) and (folder / BACKBONE).exists()


def _check_without_phases(out: Path) -> None:
    begun = next((folder for folder in sorted(out.glob("[0-9]*-*")) if checkpoint.steps(folder)), None)
    if begun is not None:
        raise OpsinError(
            f"{out} holds a run with phases, such as {begun.name}, and this recipe has none: give another --out, or "
            f"--recipe {out / RECIPE} to go on with it."
        )


def _prepared(recipe: Recipe, data: str | Path, out: Path, *, accept_changes: bool, quiet: bool) -> list[Stage]:
    """The phases with their lengths in steps; what would keep one from running is said before the first does."""
    make_folder(out)
    if checkpoint.steps(out):
        raise OpsinError(f"{out} holds a run without phases, and this recipe has some: give another --out.")
    source = scan(data, out / "cache", not quiet, recipe.data.bad_shards)
    found = stages(recipe, len(source))
    summary = summarise(source, workers=recipe.data.threads(), progress=not quiet, channels=recipe.backbone.channels)
    for stage, folder in zip(found, folders(recipe, out), strict=True):
        if checkpoint.steps(folder) and not accept_changes:
            check_same(stage.recipe, folder)
        try:
            stage.recipe.stream()
            check_masks(stage.recipe)
            check_sizes(stage.recipe, source, summary)
            stage.recipe.batch.split(ranks.count())
            _check_anchor(stage.recipe, out)
        except OpsinError as error:
            option = f"--phases.{stage.phase.name}." if stage.phase else "--"
            told = re.sub(r"--(?=[a-z]+\.)", option, str(error))
            raise OpsinError(f"phase {folder.name}: {told}") from None
    write(out / RECIPE, to_yaml(recipe))
    return found


def _check_anchor(recipe: Recipe, out: Path) -> None:
    """Refuse an anchor that is not there and will not come from a phase of this run."""
    anchor = Path(recipe.gram.anchor)
    own = anchor.resolve().is_relative_to(out.resolve())
    if recipe.gram.weight and recipe.gram.anchor != START and not own and not anchor.exists():
        raise OpsinError(f"gram.anchor is {anchor}, and there is no such file: give the path of a backbone's weights.")


def _changes(stage: Stage) -> str:
    """What a phase changes, for its announcement."""
    phase, warmup = stage.phase, stage.recipe.schedule.warmup_steps
    rising = f"; its rate only rises, since schedule.warmup_steps is {warmup}" * (warmup >= stage.recipe.steps)
    if phase is None or not (phase.change or phase.fresh):
        return rising
    changes = [f"{name} {value}" for name, value in phase.change.items()]
    return "; " + ", ".join([*changes, *(f"fresh {what}" for what in phase.fresh)]) + rising
