"""The timed step: that it is a whole one, that its parts are all of it, and how many operations it needs."""

from dataclasses import fields

import pytest
import torch

from opsin.backbone.registry import names
from opsin.bench.flops import step_flops
from opsin.bench.step import IMAGE, Parts, recipe_of, time_step
from opsin.data.stream import Batch
from opsin.errors import OpsinError

CPU = torch.device("cpu")


def tiny(**changes: object):
    return recipe_of(
        **{"backbone": "vit_nano8", "batch": 4, "precision": "fp32", "prototypes": 64, "global_size": 32} | changes
    )


def test_the_step_is_the_reference_work():
    recipe = recipe_of("dinov2_vits14", 8, "bf16", 65536, 224)
    assert (recipe.crops.global_size, recipe.crops.local_size, recipe.crops.local_count) == (224, 98, 8)
    assert (recipe.backbone.patch, recipe.drop_path, recipe.batch.group) == (14, 0.3, 8)
    assert (recipe.heads.dino_prototypes, recipe.heads.ibot_prototypes, recipe.heads.tied) == (65536, 65536, False)
    assert recipe.loss.centering == "sinkhorn"


@pytest.mark.parametrize("name", names())
def test_every_backbone_has_a_default_step(name):
    recipe = recipe_of(name, 2, "fp32", 64, 224)
    assert recipe.crops.local_size % recipe.backbone.patch == 0
    assert 90 <= recipe.crops.local_size <= 98


def test_the_parts_are_all_of_the_step():
    result = time_step("vit_nano8", 2, "fp32", 64, 32, 2, CPU)
    parts = {f.name: getattr(result.parts, f.name) for f in fields(Parts)}
    assert all(part.count == 2 and part.minimum > 0 for part in parts.values())
    inside = [parts.pop(name) for name in ("student", "prototype_loss", "backward")]
    assert sum(part.minimum for part in inside) <= 5 * parts["learning"].maximum
    assert sum(part.minimum for part in parts.values()) <= 5 * result.step.maximum
    assert sum(part.maximum for part in parts.values()) >= result.step.minimum / 5
    assert inside[2].median > parts["balancing"].median
    assert result.without_crops.median < result.step.median
    assert result.share_of_matrix_product == pytest.approx(
        result.tera_flop_per_second / result.matrix_product_tera_flop_per_second
    )
    assert result.images_per_second == pytest.approx(2e3 / result.step.median)
    assert result.peak_bytes > 0
    assert 0 < result.first_step_seconds < result.ready_seconds


def test_operations_by_the_formula():
    """Twice the multiplications of every product; backward is twice the forward, but for the pixels' gradient."""
    recipe = tiny(prototypes=96)
    arch, batch = recipe.backbone, 4
    sides = {2: recipe.crops.global_size, 8: recipe.crops.local_size}

    def blocks(images: int, side: int) -> int:
        tokens = 1 + (side // arch.patch) ** 2
        dense = 2 * images * tokens * 12 * arch.width**2
        attention = 4 * images * tokens**2 * arch.width
        return arch.depth * (dense + attention)

    def embed(images: int, side: int) -> int:
        return 2 * images * (side // arch.patch) ** 2 * 3 * arch.patch**2 * arch.width

    def head(rows: int) -> int:
        return 2 * rows * (arch.width * 2048 + 2048**2 + 2048 * 256 + 256 * 96)

    hidden = len(Batch(recipe.stream(), 0, [torch.empty(IMAGE)] * batch, CPU).masked(0).hidden)
    teacher = embed(2 * batch, 32) + blocks(2 * batch, 32) + head(2 * batch + hidden)
    student = 3 * head(10 * batch + hidden)
    for count, side in sides.items():
        student += 2 * embed(count * batch, side) + 3 * blocks(int(count * batch * 0.7), side)
    assert step_flops(recipe) == teacher + student


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"backbone": "vit_nano9"}, "unknown backbone 'vit_nano9': did you mean 'vit_nano8'?"),
        ({"batch": 0}, "--batch is 0: give 2 or more, for KoLeo needs neighbours."),
        ({"batch": 1}, "--batch is 1: give 2 or more, for KoLeo needs neighbours."),
        ({"prototypes": 0}, "--prototypes is 0: give 1 or more."),
        ({"global_size": 30}, "--global-size 30 is not a multiple of the patch of vit_nano8, 8: try 32."),
        ({"global_size": -8}, "--global-size -8 is not a multiple of the patch of vit_nano8, 8: try 8."),
    ],
)
def test_settings_that_do_not_fit(change, sentence):
    with pytest.raises(OpsinError) as error:
        tiny(**change)
    assert str(error.value) == sentence
