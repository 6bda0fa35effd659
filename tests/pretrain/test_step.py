from dataclasses import replace

import pytest
import torch

from opsin.backbone.fused import FusedBlock
from opsin.backbone.registry import architecture
from opsin.data.crops import CropRecipe
from opsin.data.stream import Batch, BatchRecipe
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.schedules import Scheduled
from opsin.pretrain.step import Step, build, working_copy

CPU = torch.device("cpu")
NOW = Scheduled(rate=1e-3, last_layer_rate=1e-3, decay=0.05, momentum=0.9, teacher_temperature=0.05)


def recipe(precision="fp32", micro=0, **changes) -> Recipe:
    return Recipe(
        backbone=replace(architecture("vit_nano8"), layerscale=0.1),
        precision=precision,
        batch=BatchRecipe(size=8, micro=micro, group=4),
        crops=CropRecipe(global_size=32, local_size=16, local_count=2),
        heads=HeadRecipe(dino_prototypes=64, dino_bottleneck=16, ibot_prototypes=64, ibot_bottleneck=16, hidden=32),
        **changes,
    )


def batch(settings: Recipe, number: int, device=CPU) -> Batch:
    random = torch.Generator().manual_seed(number)
    images = [torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=random) for _ in range(8)]
    return Batch(settings.stream(), number, images, device)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_trains_student_and_teacher(precision):
    settings = recipe(precision)
    step = Step(settings, CPU)
    assert all(isinstance(block, FusedBlock) for block in step.objective.student.backbone.blocks)
    before = {name: t.clone() for name, t in step.state().items()}
    outcomes = [step(batch(settings, 0), NOW) for _ in range(8)]
    first, last = (float(o.terms["dino"] + o.terms["ibot"]) for o in (outcomes[0], outcomes[-1]))
    assert last < first
    after = step.state()
    assert all(t.dtype in (torch.float32, torch.float64) for t in after.values())
    frozen = {"student.backbone.register_tokens", "loss_scale.scale", "loss_scale.good"}
    same = {name for name, t in after.items() if torch.equal(t, before[name])}
    assert same <= frozen, same


def test_micro_batches_and_a_restart_give_the_same_weights():
    whole, split, again = (Step(recipe("fp64", micro), CPU) for micro in (0, 4, 4))
    for number in range(3):
        if number == 2:
            for name, tensor in again.state().items():
                tensor.copy_(split.state()[name])
            again.loaded()
            again(batch(recipe("fp64", 4), number), NOW)
        whole(batch(recipe("fp64"), number), NOW)
        split(batch(recipe("fp64", 4), number), NOW)
    for name, tensor in whole.state().items():
        assert torch.allclose(tensor, split.state()[name], rtol=0, atol=1e-10), name
        assert torch.equal(split.state()[name], again.state()[name]), name


def test_a_loaded_checkpoint_reaches_the_copies_that_compute():
    settings = recipe("bf16")
    one, two = Step(settings, CPU), Step(replace(settings, seed=1), CPU)
    one(batch(settings, 0), NOW)
    for name, tensor in two.state().items():
        tensor.copy_(one.state()[name])
    two.loaded()
    outcomes = [step(batch(settings, 1), NOW) for step in (one, two)]
    assert outcomes[0].terms["dino"] == outcomes[1].terms["dino"]


def test_half_precision_follows_full_precision():
    losses = []
    for precision in ("fp32", "bf16"):
        settings = recipe(precision)
        step = Step(settings, CPU)
        losses.append([float(step(batch(settings, n), NOW).terms["dino"]) for n in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_the_working_copy_of_full_precision_is_the_network():
    student, _ = build(recipe(), CPU)
    assert working_copy(student, torch.float32) is student


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("micro", [0, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_are_the_launched_ones(precision, micro):
    device = torch.device("cuda")
    losses = []
    for graphs in (False, True):
        settings = recipe(precision, micro, graphs=graphs)
        step = Step(settings, device)
        losses.append(
            [float(step(batch(settings, n, device), NOW).terms["dino"]) for n in range(10)]
        )  # past every recording
        assert bool(step.learn.captured) == graphs
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
