from dataclasses import asdict, replace

import pytest
from lessons import recipe, student

from opsin.backbone.registry import architecture
from opsin.data.masks import MaskRecipe
from opsin.data.stream import BatchRecipe
from opsin.distill.run import Lesson
from opsin.distill.students import recipes, with_heads_of
from opsin.errors import OpsinError
from opsin.pretrain.gram import GramRecipe
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.objective import LossRecipe
from opsin.pretrain.optim import OptimRecipe
from opsin.pretrain.parallel import ParallelRecipe
from opsin.pretrain.presets import distill, distill_cpu
from opsin.pretrain.recipe import CheckpointRecipe, Phase


def refused(students, settings=None) -> str:
    with pytest.raises(OpsinError) as error:
        recipes(students, settings or recipe())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_architecture_takes_the_settings_and_a_file_has_its_own(tmp_path):
    settings = replace(distill_cpu(), seed=5)
    found = recipes(["vit_nano8", student(tmp_path, "mine", replace(settings, drop_path=0))], settings)
    assert list(found) == ["vit_nano8", "mine"]
    named = found["vit_nano8"]
    whole = replace(settings.parallel, mode="replicate")
    own = replace(architecture("vit_nano8"), grid=8, layerscale=1.0)
    assert named == replace(settings, backbone=own, parallel=whole)
    assert found["mine"] == replace(settings, parallel=whole)
    assert recipes(["dinov2_vits14"], distill())["dinov2_vits14"].backbone.grid == 16


def test_heads_get_the_teachers_prototypes_and_keep_their_own_sizes():
    teacher = HeadRecipe(tied=True, dino_prototypes=40, ibot_prototypes=30, dino_bottleneck=99, hidden=99, layers=9)
    mine = recipe().heads
    assert asdict(with_heads_of(recipe(), teacher).heads) == asdict(mine) | {
        "tied": True, "dino_prototypes": 40, "ibot_prototypes": 30,
    }  # fmt: skip


def test_names_that_are_none_or_not_one_are_refused(tmp_path):
    one, two = (student(tmp_path / folder, "same", recipe()) for folder in ("a", "b"))
    assert refused([one, two]).startswith("--students has same twice: each needs a name of its own, which is that of")
    assert "has vit_nano8 twice" in refused(["vit_nano8", "vit_nano8"], distill_cpu())
    for name in ("teacher", "teacher-features", "cache"):
        said = refused([student(tmp_path, name, recipe())])
        assert said.startswith(f"--students has {name}, the name of a folder that the distillation makes: each needs")
    assert "unknown student 'dinov2_vts14': did you mean 'dinov2_vits14'?" in refused(["dinov2_vts14"])
    assert refused([]) == "--students is empty: give names of architectures or recipe files."
    assert "cannot read the recipe" in refused([str(tmp_path / "nowhere.yaml")])


SHARED = {
    "steps": {"steps": 5},
    "seed": {"seed": 1},
    "precision": {"precision": "fp32"},
    "log_every": {"log_every": 2},
    "drop_path": {"drop_path": 0.1},
    "batch.size": {"batch": BatchRecipe(size=16, group=4)},
    "crops.flip": {"crops": replace(recipe().crops, flip=0.1)},
    "masks.probability": {"masks": MaskRecipe(probability=0.5, predicted="all")},
    "data.ahead": {"data": replace(recipe().data, ahead=1)},
    "backbone.patch": {"backbone": replace(recipe().backbone, patch=4)},
    "backbone.channels": {"backbone": replace(recipe().backbone, channels=1)},
    "checkpoint.every": {"checkpoint": CheckpointRecipe(every=3)},
    "loss.centering": {"loss": LossRecipe(centering="average")},
    "loss.sinkhorn_iterations": {"loss": LossRecipe(sinkhorn_iterations=4)},
    "loss.centre_momentum": {"loss": LossRecipe(centre_momentum=0.5)},
    "schedule.teacher_temperature": {"schedule": replace(recipe().schedule, teacher_temperature=(0.05, 0.06))},
    "schedule.teacher_temperature_steps": {"schedule": replace(recipe().schedule, teacher_temperature_steps=3)},
}


@pytest.mark.parametrize("field", SHARED)
def test_what_students_share_is_named_where_it_differs(tmp_path, field):
    said = refused([student(tmp_path, "one", recipe()), student(tmp_path, "two", recipe(**SHARED[field]))])
    assert said.startswith(f"students one and two differ in {field} (")
    assert said.endswith(
        "), which those who share a teacher's look at each batch have in common: make it equal, or distil them one by "
        "one."
    )


def test_with_stochastic_depth_students_are_equally_deep(tmp_path):
    shallow, deep = student(tmp_path, "shallow", recipe()), student(tmp_path, "deep", recipe(depth=3))
    assert len(recipes([shallow, deep], recipe())) == 2
    shallow, deep = (student(tmp_path, f"d{n}", recipe(depth=n, drop_path=0.1)) for n in (2, 3))
    assert refused([shallow, deep]).startswith("students d2 and d3 differ in backbone.depth (2 and 3), which")


def test_all_else_students_have_for_themselves(tmp_path):
    other = recipe(
        12,
        3,
        optim=OptimRecipe(layer_decay=0.5),
        loss=LossRecipe(koleo=0.0, dino=0.5, student_temperature=0.2),
        schedule=replace(recipe().schedule, rate=1e-4, momentum=(0.5, 1.0), decay=(0.1, 0.1)),
        heads=HeadRecipe(),
        max_skipped=1,
    )
    assert len(recipes([student(tmp_path, "one", recipe()), student(tmp_path, "two", other)], recipe())) == 2


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("phases", {"phases": (Phase("only"),)}),
        ("train", {"train": "heads"}),
        ("gram.weight", {"gram": GramRecipe(weight=1.0)}),
        ("parallel.mode", {"parallel": ParallelRecipe(mode="shard")}),
        ("parallel.mode", {"parallel": ParallelRecipe(mode="hybrid")}),
    ],
)
def test_what_has_no_meaning_for_a_student_is_refused(tmp_path, field, changes):
    said = refused([student(tmp_path, "odd", recipe(**changes))])
    assert said.startswith(f"{field} of student odd has no meaning in a distillation: leave it at its default.")


def test_crops_that_a_students_patches_do_not_divide_are_refused_at_once(tmp_path):
    assert "crops.global_size 64 is not a multiple of backbone.patch 14: try 56." in refused(
        ["dinov2_vits14"], distill_cpu()
    )


def test_a_lesson_has_sizes_and_steps_that_can_be():
    for wrong in ({"teacher_size": -1}, {"heads_steps": -1}):
        with pytest.raises(OpsinError, match=next(iter(wrong))):
            Lesson(**wrong)
