"""Networks that stay as they were while others learn: the anchor of Gram anchoring, and a backbone under its heads."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from phased import one_phase
from torch import Tensor

from group import together
from opsin import ranks
from opsin.backbone import weights
from opsin.backbone.vit import VisionTransformer
from opsin.data.masks import MaskRecipe
from opsin.data.stream import Batch, BatchRecipe, Share
from opsin.errors import OpsinError
from opsin.pretrain.gram import GramRecipe, gram_loss, reduced
from opsin.pretrain.objective import total
from opsin.pretrain.parallel import Spread
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.schedules import Scheduled
from opsin.pretrain.step import Step

CPU = torch.device("cpu")
NOW = Scheduled(rate=1e-3, last_layer_rate=1e-3, decay=0.05, momentum=0.9, teacher_temperature=0.05)
STEPS = 5


def recipe(micro: int = 0, precision: str = "fp64", **changes: Any) -> Recipe:
    return one_phase(precision=precision, batch=BatchRecipe(size=8, micro=micro, group=2), **changes)


def batch(settings: Recipe, step: Step, number: int = 0, share: Share | None = None) -> Batch:
    share = share or Share()
    random, size = torch.Generator().manual_seed(number), settings.batch.size // share.ranks
    images = [torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=random) for _ in range(8)]
    return Batch(settings.stream(), number, images[share.rank * size :][:size], CPU, step.dtype, share=share)


def apart(step: Step) -> Step:
    """With an anchor that is not the teacher, and a teacher that is not the student."""
    torch.manual_seed(1)
    with torch.no_grad():
        for network in (step.average.backbone, step.objective.anchor.backbone):
            for p in network.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return step


def seen(step: Step, whole: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms of the whole batch and gradients, without an update."""
    sums: dict[str, Tensor] = {}
    targets = step.objective.targets(whole, torch.tensor(0.05, dtype=torch.float64))
    for micro in range(whole.micro_batches):
        terms = step.objective.terms(whole, micro, targets)
        total(terms).backward()
        sums = {name: sums.get(name, 0) + term.detach() for name, term in terms.items()}
    return sums, {name: p.grad.clone() for name, p in step.student.named_parameters()}


# ---- the term of the loss


@pytest.mark.parametrize("over", ["image", "group"])
@pytest.mark.parametrize("scale", [1, 2])
def test_the_term_is_weight_times_the_mean_over_all_global_crops(over, scale):
    settings = recipe(gram=GramRecipe(weight=2.5, scale=scale, over=over))
    step = apart(Step(settings, CPU))
    whole = batch(settings, step)
    features = step.student.backbone([whole.crops("global", 0)], [whole.masked(0).mask], whole.kept(0)[:1])[0]
    student = features.patches.flatten(1, 2)
    assert whole.masked(0).mask.any()
    anchor = step.objective.anchor.backbone([whole.crops("global", 0, scale)])[0].patches
    anchor = (reduced(anchor, (2, 2)) if scale == 2 else anchor).flatten(1, 2)
    assert student.shape == anchor.shape == (16, 4, 16)
    values = []
    for crop in range(2):
        for first in range(0, 8, 1 if over == "image" else 2):
            rows = range(crop * 8 + first, crop * 8 + first + (1 if over == "image" else 2))
            pair = (torch.cat([x[row] for row in rows])[None] for x in (student, anchor))
            values.append(gram_loss(*pair))
    expected = 2.5 * torch.stack(values).mean()
    assert expected > 1e-3
    found, _ = seen(step, whole)
    torch.testing.assert_close(found["gram"], expected.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("over", ["image", "group"])
def test_micro_batches_do_not_change_it(over):
    found = []
    for micro in (0, 4, 2):
        settings = recipe(micro, gram=GramRecipe(weight=2.0, scale=2, over=over))
        step = apart(Step(settings, CPU))
        found.append(seen(step, batch(settings, step)))
    (terms, gradients), *others = found
    for more, grads in others:
        torch.testing.assert_close(more["gram"], terms["gram"], rtol=1e-12, atol=0)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, gradients[name], rtol=1e-12, atol=1e-12)


def test_it_costs_nothing_while_student_and_anchor_are_the_same():
    still = {"masks": MaskRecipe(probability=0.0), "drop_path": 0.0}
    for weight, changes in ((2.0, still), (2.0, {"masks": still["masks"]}), (2.0, {"drop_path": 0.0})):
        settings = recipe(gram=GramRecipe(weight=weight), **changes)
        step = Step(settings, CPU)
        term = seen(step, batch(settings, step))[0]["gram"]
        assert bool(term < 1e-24) is (changes is still)


def test_no_anchor_without_weight_or_where_no_backbone_learns():
    assert Step(recipe(), CPU).objective.anchor is None
    settings = recipe(gram=GramRecipe(weight=1.0), train="heads")
    step = Step(settings, CPU)
    assert step.objective.anchor is None
    assert "gram" not in step(batch(settings, step), NOW).terms


# ---- which network it is


def backbones_equal(a: VisionTransformer, b: VisionTransformer) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name].to(tensor.dtype)) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_the_anchor_is_the_first_teacher_until_it_is_made_anew(precision):
    settings = recipe(precision=precision, gram=GramRecipe(weight=1.0, refresh_every=2, refresh_most=2))
    step = Step(settings, CPU)
    anchor, teachers = step.objective.anchor.backbone, []
    expected = [0, 0, 2, 2, 4, 4, 4, 4]  # the step before which its teacher was taken; the third time is one too many
    for number, taken in enumerate(expected):
        teachers.append(copy.deepcopy(step.average.backbone))
        step(batch(settings, step, number), NOW)
        assert backbones_equal(anchor, teachers[taken]), number
        assert not any(p.requires_grad for p in anchor.parameters())
        assert {p.dtype for p in anchor.parameters()} == {step.dtype}
    assert not backbones_equal(anchor, teachers[0])
    kept = {name for name in step.state() if name.startswith("objective.anchor.")}
    assert len(kept) == len(anchor.state_dict())


def test_without_a_refresh_it_stays():
    settings = recipe(gram=GramRecipe(weight=1.0))
    step = Step(settings, CPU)
    first = copy.deepcopy(step.average.backbone)
    for number in range(3):
        step(batch(settings, step, number), NOW)
    assert backbones_equal(step.objective.anchor.backbone, first)
    assert not backbones_equal(step.average.backbone, first)


def test_an_anchor_of_a_file_is_that_of_the_file(tmp_path: Path):
    arch = one_phase().backbone
    torch.manual_seed(3)
    other = VisionTransformer(replace(arch, grid=4))  # of another grid, to which its positions are resampled
    weights.save(other, tmp_path / "other.safetensors")
    settings = recipe(gram=GramRecipe(weight=1.0, anchor=str(tmp_path / "other.safetensors")))
    anchor = Step(settings, CPU).objective.anchor.backbone
    kernel = "patch_embed.proj.weight"
    assert torch.equal(anchor.state_dict()[kernel], other.state_dict()[kernel].double())
    assert anchor.pos_embed.shape == (1, 5, 16)


@pytest.mark.parametrize("width", [None, 32])
def test_an_anchor_that_does_not_fit_is_named(tmp_path: Path, width):
    file = tmp_path / "wide.safetensors"
    if width:
        weights.save(VisionTransformer(replace(one_phase().backbone, width=width)), file)
    with pytest.raises(OpsinError, match=r"wide\.safetensors") as caught:
        Step(recipe(gram=GramRecipe(weight=1.0, anchor=str(file))), CPU)
    assert "gram.anchor" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- heads alone


def test_a_backbone_that_does_not_learn_has_no_moments_and_no_gradients():
    step = Step(recipe(train="heads"), CPU)
    assert {slot.part for slot in step.optimiser.slots.values()} == {"dino_head", "ibot_head"}
    assert not [name for name in step.state() if name.startswith(("optimiser.mean.b", "optimiser.square.b"))]
    outcome = step(batch(recipe(), step), NOW)
    assert set(outcome.norms) == {"dino_head", "ibot_head"}
    assert all(p.grad is None for p in step.student.backbone.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_heads_learn_on_a_backbone_that_stays(precision):
    settings = recipe(precision=precision, train="heads")
    step = Step(settings, CPU)
    before = {name: tensor.clone() for name, tensor in step.state().items()}
    for number in range(3):
        assert step(batch(settings, step, number), NOW).finite
    for name, tensor in step.state().items():
        if ".backbone." in name:
            assert torch.equal(tensor, before[name]), name
        elif name.startswith(("student", "average")) and name.endswith(("weight", "weight_v")):
            assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("train", ["all", "heads"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_a_restart_the_networks_that_compute_are_those_of_the_checkpoint(precision, train):
    """Those of lower precision are copies, and with heads alone none of an update makes them again."""
    settings = recipe(precision=precision, train=train, gram=GramRecipe(weight=1.0))
    whole, again = Step(settings, CPU), Step(replace(settings, seed=5), CPU)
    whole(batch(settings, whole), NOW)
    with torch.no_grad():
        for name, tensor in again.state().items():
            tensor.copy_(whole.state()[name])
    again.loaded()
    for step in (whole, again):
        step(batch(settings, step, 1), NOW)
    for name, tensor in again.state().items():
        assert torch.equal(tensor, whole.state()[name]), name
    for ours, theirs in zip(again.working.parameters(), whole.working.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ---- several processes

CASES = {
    "anchor": recipe(gram=GramRecipe(weight=2.0, scale=2, refresh_every=2)),
    "anchor, micro-batches": recipe(2, gram=GramRecipe(weight=2.0, over="group", refresh_every=2)),
    "heads": recipe(train="heads"),
    "heads, micro-batches": recipe(2, train="heads"),
}


def train(settings: Recipe, spread: Spread) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses of the whole batch in every step, and the whole state after the last."""
    step, share, losses = Step(settings, CPU, spread), Share(ranks.rank(), ranks.count()), []
    for number in range(STEPS):
        outcome = step(batch(settings, step, number, share), NOW)
        numbers = {name: ranks.sum_(term.double()) for name, term in outcome.terms.items()}
        losses.append({name: float(n) for name, n in (numbers | outcome.norms).items()})
    state = step.state()
    return losses, {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in state.items()}


def everything() -> dict[tuple[str, Spread], Any]:
    spreads = (Spread(2, 1), Spread(1, 2))
    return {(name, spread): train(settings, spread) for name, settings in CASES.items() for spread in spreads}


def test_two_processes_whole_or_sharded_are_one(tmp_path: Path):
    alone = {name: train(settings, Spread()) for name, settings in CASES.items()}
    assert all("gram" in loss for loss in alone["anchor"][0])
    for rank, found in enumerate(together(everything, 2, tmp_path)):
        assert len(found) == 2 * len(CASES)
        for (name, spread), (losses, state) in found.items():
            expected, tensors = alone[name]
            where = f"{name}, {spread}, rank {rank}"
            for mine, one in zip(losses, expected, strict=True):
                assert mine == pytest.approx(one, rel=1e-10), where
            assert state.keys() == tensors.keys()
            for key, tensor in state.items():
                assert torch.allclose(tensor, tensors[key], rtol=0, atol=1e-10), f"{key}: {where}"
