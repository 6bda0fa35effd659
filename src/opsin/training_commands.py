"""The commands that train by a recipe, whose fields are their options: made for the recipe that is named."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from opsin.distill.run import Lesson
from opsin.errors import OpsinError
from opsin.pretrain.presets import DISTILL
from opsin.pretrain.recipe import Recipe

Data = Annotated[str, tyro.conf.arg(metavar="SRC")]
Out = Annotated[Path, tyro.conf.arg(metavar="PATH")]


def pretrain(settings: Recipe) -> Callable[..., int]:
    """The `pretrain` command, with the fields of `settings` as its options and their defaults."""

    def command(
        data: Data,
        out: Out,
        recipe: str,  # read before the other options, whose defaults it gives: see cli.py
        settings: Annotated[Recipe, tyro.conf.arg(name="")] = settings,
        device: str | None = None,
        accept_changes: bool = False,
        report: bool = True,
        replay: int | None = None,
        init: str | None = None,  # read before the other options too, whose backbone it gives
    ) -> int:
        """Train a backbone on images without labels. The same command goes on with a run that stopped.

        Args:
            data: a folder of images of any depth, a text file that lists images, shards (.tar, .parquet, .arrow), or an
                s3:// URI of such: see docs/data.md.
            out: folder of the run: weights, checkpoints, metrics, report.
            recipe: a name that `opsin recipes` lists, or the recipe.yaml of an earlier run. The defaults shown for
                the other options are those of this recipe (of `cpu` while none is given).
            settings: any field of the recipe.
            device: cuda, mps or cpu; by default the first of these that is there.
            accept_changes: go on although recipe, data or decoder differ from those the run began with.
            report: write report.html at the end.
            replay: do not train: compute this step of the run in `out` again, counted from 0, and say where in it
                something is not finite.
            init: architecture of the weights that --weights names, with which the run begins; without --recipe, the
                recipe is then `continued`.
        """
        if replay is not None:
            from opsin.pretrain.replay import replay as again

            print(again(data, out, replay, device=device, say=lambda text: print(text, file=sys.stderr)))
            return 0
        from opsin.pretrain.phases import folders
        from opsin.pretrain.phases import pretrain as train

        finished = train(settings, data, out, device=device, accept_changes=accept_changes)
        if finished.stopped_by is not None:
            return 128 + finished.stopped_by
        if int(os.environ.get("RANK", "0")):  # the first process of a job tells
            return 0
        for folder in folders(settings, out) if report else []:
            from opsin.story import tell

            print(f"report: {tell(folder, data, device=device)}")
        print(f"backbone: {finished.backbone}")
        return 0

    return command


def distill(defaults: Recipe) -> Callable[..., int]:
    """The `distill` command, with the fields of `defaults` as its options and their defaults."""

    def command(
        data: Data,
        out: Out,
        teacher: Path,
        students: tuple[str, ...],
        lesson: Annotated[Lesson, tyro.conf.arg(name="")] = Lesson(),  # noqa: B008
        recipe: str = DISTILL,  # read before the other options, whose defaults it gives: see cli.py
        settings: Annotated[Recipe, tyro.conf.arg(name="")] = defaults,
        device: str | None = None,
        accept_changes: bool = False,
        report: bool = True,
    ) -> int:
        """Train small backbones by a large frozen one. The same command goes on with a distillation that stopped.

        Args:
            data: a folder of images of any depth, a text file that lists images, shards (.tar, .parquet, .arrow), or an
                s3:// URI of such: see docs/data.md.
            out: folder of the distillation; each student's run is in a folder of its own there.
            teacher: folder of a run, whose backbone and heads are taken, or a backbone's weights: a file of ours, an
                official .pth, a Hugging Face folder or a timm file.
            students: names of architectures, such as dinov2_vits14, or recipe files; all learn from one look at each
                batch.
            lesson: how the teacher teaches.
            recipe: a name that `opsin recipes` lists, or a recipe file, for students that are named by architecture.
            settings: any field of the recipe.
            device: cuda, mps or cpu; by default the first of these that is there.
            accept_changes: go on although settings differ from those the distillation began with.
            report: write report.html for each student at the end.
        """
        from opsin.distill.run import distill

        if settings != defaults and all(name.endswith((".yaml", ".yml")) for name in students):
            raise OpsinError(
                "options of the recipe are for students that are named by architecture, and --students are all recipe "
                "files: change these."
            )
        finished = distill(teacher, lesson, students, settings, data, out, device=device, accept_changes=accept_changes)
        for each in finished:
            if each.stopped_by is not None:
                return 128 + each.stopped_by
        if int(os.environ.get("RANK", "0")):  # the first process of a job tells
            return 0
        for each in finished:
            if report:
                from opsin.story import tell

                print(f"report: {tell(each.out, data, device=device)}")
            print(f"backbone: {each.backbone}")
        return 0

    return command
