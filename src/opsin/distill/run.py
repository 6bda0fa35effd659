"""Distillation: students learn from a large frozen teacher, each in a run of its own, all from one look at each batch.

    OUT/NAME             the run of a student, in the form of any run
    OUT/teacher          the run in which heads were trained on the teacher's features, if it came without
    OUT/distill.json     what the students learn from

As in the paper (§5): the loop of pretraining with a frozen teacher, no masks and no stochastic depth, the patch loss on
all patches of both global crops; what is left is a moving average of the student, which plays no part in training.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from opsin import ranks
from opsin.backbone import weights
from opsin.backbone.vit import VisionTransformer
from opsin.data.decode import DECODER
from opsin.data.sources import scan
from opsin.distill.cache import TeacherCache
from opsin.distill.methods import ByFeatures, ByPrototypes
from opsin.distill.students import FEATURES, HEADS_RUN, recipes, with_heads_of
from opsin.distill.teacher import Teacher, check_grids, fingerprint
from opsin.errors import OpsinError, within
from opsin.machine import pick_device
from opsin.output import make_folder, write
from opsin.pretrain import checkpoint, phases
from opsin.pretrain.folder import disk_errors
from opsin.pretrain.heads import read_heads
from opsin.pretrain.loop import BACKBONE, HEADS, Finished, Job, run
from opsin.pretrain.objective import Network
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.step import DTYPES

FILE = "distill.json"


@dataclass(frozen=True)
class Lesson:
    """How a teacher teaches."""

    method: Literal["prototypes", "features"] = "prototypes"
    """By the teacher's assignments to prototypes, as in the paper, or by its class and patch tokens themselves, which
    needs no heads."""
    teacher_size: int = 0
    """Side in pixels at which the teacher sees the students' global crops; 0 is their own."""
    heads_steps: int = 10_000
    """Steps in which heads are trained on the teacher's features first, where it has none and the method needs them."""
    cache: bool = False
    """Keep the teacher's features on disk, in OUT/teacher-features, and do not compute them twice; for crops that
    repeat (crops.repeat)."""

    def __post_init__(self) -> None:
        within(self, "", teacher_size=(0, 1e5), heads_steps=(0, 2**28))


def distill(
    teacher: Path,
    lesson: Lesson,
    students: Sequence[str],
    settings: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    device: str | None = None,
    accept_changes: bool = False,
    quiet: bool = False,
) -> list[Finished]:
    """Train students of a frozen teacher on the images of `data`; the same call goes on with one that stopped.

    Args:
        teacher: folder of a run, whose backbone and heads are taken, or a backbone's weights in any form that
            `opsin.load` reads.
        lesson: how it teaches.
        students: names of architectures, or recipe files; see `students.recipes`.
        settings: the recipe of students that have none of their own.
        data: see `scan`.
        out: folder of the distillation.
        device: "cuda", "mps" or "cpu"; by default the first of these that is there.
        accept_changes: go on although settings differ from those it began with.
        quiet: no progress on stderr.

    Returns:
        How each student's run ended; if heads were to be trained first and this stopped, how that ended.

    Raises:
        OpsinError: for anything the user can mend.
    """
    out, on = Path(out), pick_device(device)
    found = recipes(students, settings)
    first = next(iter(found.values()))
    how = {"device": device, "accept_changes": accept_changes, "quiet": quiet}
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks.started(on, first.parallel.timeout))
        stack.enter_context(disk_errors(out))
        backbone_file, heads_file, facts = ranks.by_first(lambda: _found(teacher, lesson))
        backbone = weights.restore(backbone_file)[0].eval()
        facts["backbone"] = fingerprint(backbone.state_dict())
        arch = backbone.arch
        for side in [entry[0] for entry in first.crops.mixture] or [first.crops.global_size]:
            check_grids(backbone, lesson.teacher_size, side, first.backbone.patch, first.backbone.channels)
        ranks.by_first(lambda: _check_begun(out, facts, accept_changes))
        console = Console(stderr=True, soft_wrap=True, highlight=False, quiet=quiet or not ranks.first())
        has = "with its heads" if heads_file else "without heads"
        console.print(f"teacher: {backbone_file}, {arch.depth} blocks of width {arch.width}, patch {arch.patch}, {has}")
        if lesson.method == "prototypes" and heads_file is None:
            console.print(
                f"first, heads are trained on its features for {lesson.heads_steps} steps, in {out / HEADS_RUN}"
            )
            heads_run = out / HEADS_RUN
            trained = phases.pretrain(_heads_recipe(first, lesson, backbone, backbone_file), data, heads_run, **how)  # type: ignore[arg-type]
            if trained.stopped_by is not None:
                return [trained]
            heads_file = heads_run / HEADS
        network: Network | VisionTransformer = backbone
        if lesson.method == "prototypes":
            assert heads_file is not None
            heads, recipe, width = read_heads(heads_file)
            facts["heads"] = fingerprint(heads)
            if width != arch.width:
                raise OpsinError(
                    f"the heads {heads_file} are for a backbone of width {width} and {backbone_file} has {arch.width}: "
                    "give --teacher the folder of the run that holds both."
                )
            network = Network(arch, recipe)
            network.load_state_dict({**{f"backbone.{n}": t for n, t in backbone.state_dict().items()}, **heads})
            found = {name: with_heads_of(student, recipe) for name, student in found.items()}
        ranks.by_first(lambda: _begin(out, facts, accept_changes))
        by = f"its {recipe.dino_prototypes} prototypes" if lesson.method == "prototypes" else "its features"
        console.print(f"{', '.join(found)} learn by {by}")
        dtype = DTYPES[first.precision]
        cache = _cache(lesson, first, arch.width, facts["backbone"], data, out) if lesson.cache else None
        frozen = Teacher(network.to(on), dtype, lesson.teacher_size, cache)
        method = ByPrototypes(frozen) if lesson.method == "prototypes" else ByFeatures(frozen)
        jobs = [Job(recipe, out / name, method) for name, recipe in found.items()]
        return run(jobs, data, out, **how)  # type: ignore[arg-type]


def _found(given: Path, lesson: Lesson) -> tuple[Path, Path | None, dict[str, Any]]:
    """The files of the teacher's backbone and, if it has any, of its heads, and what distill.json says of them."""
    if not given.exists():
        raise OpsinError(f"there is no file or folder {given}: give --teacher a run's folder or a backbone's weights.")
    ours = given / BACKBONE
    backbone, heads = (ours, given / HEADS) if ours.exists() else (given, None)
    if given.is_dir() and not ours.exists() and not (given / "config.json").exists():
        raise OpsinError(
            f"{given} holds neither {BACKBONE}, which a finished run leaves, nor a model of transformers: give "
            "--teacher the folder of a finished run, or a backbone's weights."
        )
    heads = heads if heads is not None and heads.exists() else None
    if lesson.method == "prototypes" and heads is None and lesson.heads_steps == 0:
        raise OpsinError(
            f"the teacher {given} has no heads ({HEADS}), and --heads-steps is 0: let them be trained on its features "
            "first, or give --method features, which needs none."
        )
    facts = {
        "teacher": str(given),
        **asdict(lesson),
        "backbone": "",
        "heads": "",
    }
    return backbone, heads, facts


DECISIVE = ("method", "teacher_size", "backbone", "heads")
"""What a distillation that goes on may not change; a teacher that came with heads, or needs none, may have moved."""


def _begin(out: Path, facts: dict[str, Any], accept_changes: bool) -> None:
    """Write OUT/distill.json, unless it says that the runs there have learnt from something else."""
    _check_begun(out, facts, accept_changes)
    write(out / FILE, json.dumps(facts, indent=1))


def _check_begun(out: Path, facts: dict[str, Any], accept_changes: bool) -> None:
    """Refuse to go on with runs that have learnt from something else than `facts` say, as far as they say it yet."""
    make_folder(out)
    path = out / FILE
    begun = any(checkpoint.steps(folder) for folder in out.iterdir() if folder.is_dir() and folder.name != HEADS_RUN)
    if begun and not accept_changes:
        try:
            before = json.loads(path.read_text())
            known = [name for name in DECISIVE if facts[name] or name != "heads"]
            changed = [f"{k} ({before[k]} then, {facts[k]} now)" for k in known if before[k] != facts[k]]
        except (OSError, ValueError, KeyError, TypeError):
            raise OpsinError(
                f"{path} is missing or damaged, so nothing says what the runs beside it learnt from: give "
                "--accept-changes to go on regardless, or another --out."
            ) from None
        if changed:
            raise OpsinError(
                f"{out} holds a distillation that differs in {', '.join(changed)}: give what it began with, another "
                "--out, or --accept-changes."
            )


def _heads_recipe(student: Recipe, lesson: Lesson, backbone: VisionTransformer, file: Path) -> Recipe:
    """The run in which heads learn on the frozen teacher, by crops of one size, that at which it sees the students'."""
    patch = backbone.arch.patch
    local = max(1, round(student.crops.local_size / patch)) * patch
    size = lesson.teacher_size or student.crops.global_size
    return replace(
        student,
        backbone=backbone.arch,
        weights=str(file.resolve()),
        train="heads",
        steps=lesson.heads_steps,
        crops=replace(student.crops, global_size=size, local_size=local, mixture=(), repeat=0),
        schedule=replace(
            student.schedule,
            warmup_steps=min(student.schedule.warmup_steps, lesson.heads_steps // 10),
            teacher_temperature_steps=min(student.schedule.teacher_temperature_steps, lesson.heads_steps // 3),
            freeze_last_layer_steps=0,
        ),
    )


def _cache(lesson: Lesson, recipe: Recipe, width: int, contents: str, data: str | Path, out: Path) -> TeacherCache:
    """Rows for every image and every drawing of its crops, of tokens on the students' grid."""
    crops = recipe.crops
    if not crops.repeat:
        raise OpsinError(
            "--cache keeps the teacher's features of crops that come again, and crops.repeat is 0: give "
            "--crops.repeat 1, or more for as many drawings of each image's crops."
        )
    if ranks.count() > ranks.on_this_node():
        raise OpsinError(
            "--cache keeps features for the processes of one machine, and this job runs on several: leave it out, or "
            "run on one."
        )

    def look() -> tuple[int, str]:
        source = scan(data, out / "cache", False, recipe.data.bad_shards)
        return len(source), source.fingerprint

    images, fingerprint_of_images = ranks.by_first(look)
    side = crops.global_size // recipe.backbone.patch
    shape = (2, 1 + side**2, width)
    dtype: torch.dtype = DTYPES[recipe.precision]
    seen = (contents, asdict(crops), recipe.seed, fingerprint_of_images, DECODER, lesson.teacher_size, str(dtype))
    return TeacherCache(out / FEATURES, images * crops.repeat, shape, dtype, str(seen))
