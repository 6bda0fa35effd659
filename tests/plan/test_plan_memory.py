"""The memory of a step: what the ledger counts, and what the process then really takes."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from opsin.backbone.fused import fuse
from opsin.backbone.registry import architecture
from opsin.backbone.vit import VisionTransformer
from opsin.bench.step import recipe_of
from opsin.data.stream import BatchRecipe
from opsin.plan.memory import ALLOCATOR, META, Ledger, block_elements, step_memory
from opsin.pretrain.parallel import Spread, count_parameters, state_bytes
from opsin.pretrain.recipe import Recipe

TOLERANCE = 0.15
"""Of the prediction, against the peak of resident memory; `benchmarks/plan.py` prints more of them."""


def small(precision="fp32", **changes) -> Recipe:
    recipe = recipe_of("dinov2_vits14", 8, precision, 1024, 112)
    return replace(recipe, **changes)


# ---- the ledger


def test_the_ledger_counts_what_is_there():
    ledger = Ledger("cpu")
    with ledger.watching():
        a = torch.empty(1000, device=META)
        b = a.view(10, 100)[2:]  # no memory of its own
        with ledger.counting("loss"):
            c = a + 1
        assert ledger.live == {"activations": 4000, "loss": 4000}
        del a, c
        assert ledger.live.total() == 4000  # b is a view of a
        del b
        assert ledger.live.total() == 0
        assert ledger.fullest == {"activations": 4000, "loss": 4000}


def test_the_ledger_sees_what_autograd_keeps():
    ledger = Ledger("cpu")
    x = torch.empty(4, 100, device=META, requires_grad=True)
    with ledger.watching():
        y = F.layer_norm(x.exp(), (100,))
        # the exponential, which both functions keep, the result, and a mean and a deviation of each row, seen by nobody
        assert ledger.live.total() == 2 * 1600 + 2 * 16
        del y
        assert ledger.live.total() == 0


def test_the_ledger_says_that_tensors_are_where_the_plan_is():
    with Ledger("cuda"):
        x = torch.empty(3, device=META)
        assert x.device.type == "cuda"
        assert torch.zeros(2, device=x.device).is_meta


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitg14"])
@pytest.mark.parametrize("keep", [None, 3])
def test_a_fused_block_keeps_ten_widths_of_a_token(name, keep):
    arch = replace(architecture(name), grid=4)
    with META:
        one, three = (VisionTransformer(replace(arch, depth=depth)) for depth in (1, 3))
    images, tokens = 4, 4 * 17
    sizes = []
    for backbone in (one, three):
        fuse(backbone)
        ledger = Ledger("cuda")
        for parameter in backbone.parameters():  # are no activations
            ledger.record(parameter)
        ledger.live.clear()
        kept = None if keep is None else [torch.zeros((backbone.arch.depth, 2, keep), dtype=torch.int64)]
        with ledger.watching():
            crops = torch.empty((images, 3, 56, 56), device=META)
            kept = None if kept is None else [part.to(META) for part in kept]
            features = backbone([crops], None, kept)
            sizes.append(ledger.live.total())
        del features
    rows = tokens if keep is None else keep * 17
    expected = 4 * block_elements(arch, tokens, rows)
    if name == "dinov2_vits14" and keep is None:
        assert expected == 4 * 10 * arch.width * tokens
    # besides: means and deviations of two norms, attention's row sums, places and numbers of the kept rows
    assert expected <= (sizes[1] - sizes[0]) / 2 <= 1.02 * expected + 8 * 4 * tokens


# ---- the parts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_is_that_of_the_code_that_trains(precision):
    recipe = small(precision)
    found = step_memory(recipe, "cuda")
    parameters = count_parameters(recipe.backbone, recipe.heads)
    shared = 2 * 1024 * 257 * 4 if precision == "bf16" else 0  # prototypes have no copies
    assert found.state == pytest.approx(state_bytes(parameters, precision) - shared, rel=1e-3)
    assert found.optimiser == 8 * parameters


def test_recomputing_stores_less():
    totals = []
    for which in ("none", "selective", "full"):
        recipe = small("bf16")
        totals.append(step_memory(replace(recipe, parallel=replace(recipe.parallel, recompute=which)), "cuda"))
    none, selective, full = (memory.activations for memory in totals)
    assert full < 0.45 * none
    assert full < selective < none


def test_activations_grow_with_the_micro_batch_and_nothing_else_does():
    recipe = small("bf16", batch=BatchRecipe(size=64, group=4))
    sizes = [step_memory(replace(recipe, batch=replace(recipe.batch, micro=m)), "cuda") for m in (8, 16, 32)]
    steps = [b.activations - a.activations for a, b in pairwise(sizes)]
    assert steps[1] == pytest.approx(2 * steps[0], rel=0.02)
    assert len({memory.state for memory in sizes}) == 1


def test_scores_stay_in_their_chunks():
    few, many = (step_memory(recipe_of("vit_nano8", 8, "fp32", k, 64), "cuda").loss for k in (2**14, 2**18))
    array = (2**18 - 2**14) * 256 * 4
    assert 3 * array < many - few < 8 * array + 2**30  # weights of two heads with gradients on their way; some chunks


def test_a_sharded_model_is_cut_up():
    recipe = small("bf16", batch=BatchRecipe(size=32, group=8))
    whole, shards, hybrid = (step_memory(recipe, "cuda", s) for s in (Spread(4, 1), Spread(1, 4), Spread(2, 2)))
    # whole models also keep copies in half precision
    assert shards.state == pytest.approx(state_bytes(count_parameters(recipe.backbone, recipe.heads), "bf16", 4), abs=9)
    assert shards.state < hybrid.state < whole.state
    assert (whole.gathered, hybrid.gathered) == (0, shards.gathered)
    assert shards.gathered > 0
    assert whole.activations == shards.activations  # the share of the batch is the same


def test_the_total_is_that_of_all_parts():
    memory = step_memory(small(), "cpu")
    moving = memory.activations + memory.loss + memory.inputs
    assert memory.total == memory.state + moving + memory.allocator
    assert memory.allocator == pytest.approx(ALLOCATOR["cpu"] * moving, abs=1)


# ---- against what a process really takes

MEASURE = """
import json, sys, torch
from opsin.bench.step import IMAGE, VALUES, recipe_of
from opsin.bench.timing import PeakMemory
from opsin.data.stream import Batch
from opsin.memory import keep_freed_memory
from opsin.pretrain.step import Step
keep_freed_memory()
recipe = recipe_of(*json.loads(sys.argv[1]))
device = torch.device("cpu")
memory = PeakMemory(device)
step = Step(recipe, device)
images = [torch.randint(0, 256, IMAGE, dtype=torch.uint8) for _ in range(recipe.batch.size)]
for number in range(2):
    step(Batch(recipe.stream(), number, images, device, step.dtype), VALUES)
print(memory.read())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    "settings",
    [
        ("dinov2_vits14", 2, "fp32", 16384, 98),  # mostly state and prototypes
        pytest.param(("vit_nano8", 8, "fp32", 1024, 224), marks=pytest.mark.slow),  # mostly activations
        pytest.param(("dinov2_vits14", 4, "bf16", 65536, 224), marks=pytest.mark.slow),
    ],
)
def test_the_prediction_is_near_the_measured_peak(settings):
    line = [sys.executable, "-c", MEASURE, json.dumps(settings)]
    measured = int(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert step_memory(recipe_of(*settings), "cpu").total == pytest.approx(measured, rel=TOLERANCE)
