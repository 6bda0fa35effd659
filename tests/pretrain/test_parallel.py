"""However a batch and a model are spread over processes, the losses and the weights are the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from group import together
from opsin import ranks
from opsin.backbone.registry import architecture
from opsin.data.crops import CropRecipe
from opsin.data.stream import Batch, BatchRecipe, Share
from opsin.errors import OpsinError
from opsin.pretrain import prototypes
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.objective import LossRecipe
from opsin.pretrain.parallel import (
    ParallelRecipe,
    RecomputedBlock,
    Spread,
    choose,
    count_parameters,
    state_bytes,
)
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.schedules import Scheduled
from opsin.pretrain.step import Step

CPU = torch.device("cpu")
NOW = Scheduled(rate=1e-3, last_layer_rate=1e-3, decay=0.05, momentum=0.9, teacher_temperature=0.05)
STEPS = 5


def recipe(precision: str = "fp64", micro: int = 0, tied: bool = False, **changes: Any) -> Recipe:
    return Recipe(
        # widths and prototypes that neither 2 nor 4 processes can share out evenly
        backbone=replace(architecture("vit_nano8"), width=36, heads=3, depth=3, layerscale=0.1),
        precision=precision,
        drop_path=0.3,
        batch=BatchRecipe(size=16, micro=micro, group=4),
        crops=CropRecipe(global_size=32, local_size=16, local_count=2),
        heads=HeadRecipe(
            tied=tied, dino_prototypes=61, dino_bottleneck=15, ibot_prototypes=47, ibot_bottleneck=16, hidden=30
        ),
        **changes,
    )


def train(settings: Recipe, spread: Spread, steps: int = STEPS) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses of the whole batch in every step, and all weights and moments after the last."""
    prototypes.SAFE_SCORE = 0.0 if settings is CASES["log domain"] else 30.0  # else a CPU takes exponentials
    step, share = Step(settings, CPU, spread), Share(ranks.rank(), ranks.count())
    size, losses = settings.batch.size // share.ranks, []
    for number in range(steps):
        random = torch.Generator().manual_seed(number)
        images = [torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=random) for _ in range(16)]
        mine = images[share.rank * size :][:size]
        outcome = step(Batch(settings.stream(), number, mine, CPU, step.dtype, share=share), NOW)
        numbers = {name: ranks.sum_(term.double()) for name, term in outcome.terms.items()}
        losses.append({name: float(n) for name, n in (numbers | outcome.norms).items()})
    return losses, {name: whole(tensor).clone() for name, tensor in step.state().items()}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


CASES = {
    "plain": recipe(),
    "log domain": recipe(),
    "micro-batches": recipe(micro=4),
    "recomputed": recipe(parallel=ParallelRecipe(recompute="selective")),
    "tied, centred": recipe(tied=True, loss=LossRecipe(centering="average")),
    "fp32": recipe("fp32"),
    "bf16": recipe("bf16"),
}
SPREADS = {2: [Spread(2, 1), Spread(1, 2)], 4: [Spread(4, 1), Spread(1, 4), Spread(2, 2)]}


def everything(number: int) -> dict[tuple[str, Spread], Any]:
    cases = CASES if number == 2 else {name: CASES[name] for name in ("plain", "micro-batches", "fp32")}
    found = {(name, spread): train(settings, spread) for name, settings in cases.items() for spread in SPREADS[number]}
    return found | {("one fp32 step", spread): train(CASES["fp32"], spread, 1) for spread in SPREADS[number]}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found = {name: train(settings, Spread()) for name, settings in CASES.items()}
    return found | {"one fp32 step": train(CASES["fp32"], Spread(), 1)}


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_and_any_spread_is_one_process(number, alone, tmp_path: Path):
    for rank, found in enumerate(together(everything, number, tmp_path, number)):
        for (name, spread), (losses, state) in found.items():
            expected, weights = alone[name]
            where = f"{name}, {spread}, rank {rank}"
            # Adam's first steps make much of little: below fp64 only the first losses and gradients must agree.
            close = {"fp32": 1e-5, "one fp32 step": 1e-5, "bf16": 3e-2}.get(name, 1e-10)
            for mine, one in zip(losses[: 1 if name in ("fp32", "bf16") else STEPS], expected, strict=False):
                assert mine == pytest.approx(one, rel=close), where
            if name == "one fp32 step":  # the first moments are the gradients, clipped
                means = [key for key in state if key.startswith("optimiser.mean.")]
                mine, one = (torch.cat([tensors[key].flatten() for key in means]) for tensors in (state, weights))
                assert (mine - one).norm() <= 1e-5 * one.norm(), where
            elif name not in ("fp32", "bf16"):
                assert state.keys() == weights.keys()
                for key, tensor in state.items():
                    assert torch.allclose(tensor, weights[key], rtol=0, atol=1e-10), f"{key}: {where}"
            elif name == "fp32":
                assert [one["dino"] for one in losses] == pytest.approx([one["dino"] for one in expected], rel=1e-3)


def gathered(micro: int) -> int:
    """Gathers of a step, sharded over all processes."""
    settings = recipe(micro=micro)
    step, share = Step(settings, CPU, Spread(1, 2)), Share(ranks.rank(), 2)
    images = [torch.zeros((3, 40, 50), dtype=torch.uint8)] * 8
    with CommDebugMode() as counter:
        step(Batch(settings.stream(), 0, images, CPU, step.dtype, share=share), NOW)
    return sum(number for name, number in counter.get_comm_counts().items() if "gather" in str(name))


def gathers() -> list[int]:
    return [gathered(8), gathered(4)]


def test_prototypes_are_gathered_once_per_step(tmp_path: Path):
    """Of both networks each micro-batch gathers 3 blocks, the rest of the backbone and 2 MLPs, the student's blocks
    again in the backward; the step gathers 4 layers of prototypes, however many micro-batches it has."""
    each = (3 + 1 + 2) * 2 + 3
    assert together(gathers, 2, tmp_path) == [[each + 4, 2 * each + 4]] * 2


def test_recomputed_blocks_are_the_same_blocks(alone):
    step = Step(CASES["recomputed"], CPU)
    kinds = [isinstance(block, RecomputedBlock) for block in step.student.backbone.blocks]
    assert kinds == [True, False, True]
    assert alone["recomputed"][0] == alone["plain"][0]


def test_the_spread_is_chosen_by_what_fits():
    auto = ParallelRecipe()

    def needed(shard: int) -> int:
        return 800 // shard

    assert choose(auto, needed, 1, 1, 10) == Spread(1, 1)
    assert choose(auto, needed, 16, 8, None) == Spread(16, 1)  # on a CPU
    assert choose(auto, needed, 16, 8, 2000) == Spread(16, 1)
    assert choose(auto, needed, 16, 8, 1999) == Spread(2, 8)
    assert choose(auto, needed, 16, 8, 249) == Spread(1, 16)
    assert choose(auto, needed, 16, 8, 1) == Spread(1, 16)
    assert choose(auto, needed, 3, 2, 500) == Spread(1, 3)  # no hybrid of 2 and 1
    assert choose(ParallelRecipe(mode="hybrid"), needed, 16, 8, None) == Spread(2, 8)
    assert choose(ParallelRecipe(mode="shard"), needed, 16, 8, 10**9) == Spread(1, 16)
    with pytest.raises(OpsinError, match="hybrid needs the same number of processes on every machine, and 3 are not"):
        choose(ParallelRecipe(mode="hybrid"), needed, 3, 2, None)


def test_the_bytes_of_a_state_are_those_that_are_held():
    for precision in ("fp32", "bf16"):
        step = Step(recipe(precision), CPU)
        held = [*step.student.parameters(), *step.average.parameters(), *step.optimiser.moments.values()]
        held += [p.grad for p in step.student.parameters()]
        for slot in step.optimiser.slots.values():
            held += slot.copies or ()
        found = sum(tensor.numel() * tensor.element_size() for tensor in held)
        parameters = count_parameters(recipe().backbone, recipe().heads)
        predicted = state_bytes(parameters, precision)  # prototypes have no copies
        assert found == predicted if precision == "fp32" else 0.9 * predicted < found < predicted


def test_a_batch_that_cannot_be_shared_names_those_that_can():
    batch = BatchRecipe(size=96, micro=0, group=32)
    assert BatchRecipe(size=64, micro=32, group=8).split(4) == (16, 16)
    assert BatchRecipe(size=96, micro=48, group=8).split(3) == (32, 32)
    assert BatchRecipe(size=96, micro=24, group=8).split(3) == (32, 16)  # 24 does not divide 32
    with pytest.raises(OpsinError) as error:
        batch.split(2)
    assert str(error.value) == (
        "batch.size 96 is 3 × batch.group 32, which 2 processes cannot share equally: try batch.size 64 or "
        "128, or batch.group 48."
    )


@given(ranks=st.integers(1, 64), groups=st.integers(1, 40), group=st.integers(2, 16), micro=st.integers(0, 80))
def test_shares_are_whole_groups_and_micro_batches_divide_them(ranks, groups, group, micro):
    batch = replace(BatchRecipe(size=ranks * groups * group, micro=0, group=group))
    object.__setattr__(batch, "micro", micro * group)
    share, part = batch.split(ranks)
    assert share * ranks == batch.size
    assert share % part == 0
    assert part % group == 0
    assert part <= max(micro * group, group) or micro == 0
