"""The model of a step's time: that it counts what is computed, and comes near what was measured."""

from dataclasses import replace

import pytest

from opsin.bench.flops import step_flops
from opsin.bench.step import recipe_of
from opsin.errors import OpsinError
from opsin.plan.devices import COPY_SHARE, DATA_SHEETS, NAMES, PRODUCT_SHARE, Device, find
from opsin.plan.speed import Range, Work, communication, forward_time, step_time, work_of
from opsin.pretrain.parallel import Spread
from opsin.pretrain.presets import preset

WORK = Work(flops=4, products=3, attention=1, score_flops=1, scores=1, token_bytes=1, backbone=1000, heads=100, depth=2)


def test_operations_are_those_of_the_step():
    recipe = recipe_of("dinov2_vits14", 4, "bf16", 4096, 56)
    work = work_of(recipe)
    assert work.flops == step_flops(recipe) / 4
    scores = 2 * 4096 * 256 * ((2 + 3 * 10) + 4 * hidden(recipe))  # teacher once, student and its two gradients
    assert work.products + work.attention + scores == pytest.approx(work.flops)
    arch = recipe.backbone
    per_token = 2 * arch.depth * 12 * arch.width**2
    student = (2 * 17 + 8 * (1 + (recipe.crops.local_size // 14) ** 2)) * 0.7
    assert work.products == pytest.approx(per_token * (3 * student + 2 * 17), rel=0.12)  # and heads, and embedding


def hidden(recipe) -> float:
    from opsin.data.masks import masked_bound

    return masked_bound(recipe.masks, 8, (4, 4)) / 4


@pytest.mark.parametrize(
    ("backbone", "batch", "products", "attention", "rest"),
    [("dinov2_vits14", 128, 21.2, 11.8, 39.5), ("dinov2_vitl14", 64, 125.8, 33.6, 105.3)],
)
def test_the_step_it_was_calibrated_on_comes_out(backbone, batch, products, attention, rest):
    work = work_of(recipe_of(backbone, 8, "bf16", 65536, 224))
    recipe = recipe_of(backbone, batch, "bf16", 65536, 224)
    parts = step_time(recipe, work, find("h100", "bf16"), Spread(), 8, 25e9)
    assert parts.products.fast <= 1.001e-3 * products <= parts.products.slow
    assert parts.attention.slow == pytest.approx(1e-3 * attention, rel=0.07)
    assert parts.bandwidth.slow == pytest.approx(1e-3 * rest, rel=0.05)
    assert parts.seconds.fast < parts.seconds.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpu", "spread", "implied"),
    [("vitl14", "a100-80", Spread(96, 1), 70), ("vitg14", "a100-40", Spread(32, 8), 24)],
)
def test_published_runs_of_the_reference_are_near_the_slow_end(name, gpu, spread, implied):
    recipe = preset(name)
    seconds = step_time(recipe, work_of(recipe), find(gpu, "bf16"), spread, 8, 25e9).seconds
    assert 0.75 < implied / (recipe.batch.size / spread.replicate / spread.shard / seconds.slow) < 1.05


def test_nothing_is_sent_by_one_process():
    assert communication(preset("vitl14"), WORK, Spread(), 8, 1e9, 1e9, 1) == 0


def test_what_is_sent_depends_on_the_spread():
    recipe = preset("vitl14")

    def seconds(spread, micro_batches=1):
        return communication(recipe, WORK, spread, 4, 1e6, 1e3, micro_batches)

    # Two processes of a machine: half of twice the gradients in fp32, over the link.
    assert seconds(Spread(2, 1)) == pytest.approx(0.5 * 2 * 4 * 1100 / 1e6)
    assert seconds(Spread(8, 1)) == pytest.approx(7 / 8 * 2 * 4 * 1100 / 4e3)  # two machines, each with four ports
    sharded = 0.75 * (4 * 2 * 1000 + 12 * 100) / 1e6
    assert seconds(Spread(1, 4)) == pytest.approx(sharded)
    assert seconds(Spread(1, 4), 3) == pytest.approx(sharded + 2 * 0.75 * 4 * 2 * 1000 / 1e6)
    assert seconds(Spread(1, 8)) == pytest.approx(7 / 8 * (4 * 2 * 1000 + 12 * 100) / 4e3)
    assert seconds(Spread(2, 4)) == pytest.approx(sharded + 0.5 * 2 * 4 * 1100 / 4 / 1e3)


def test_recomputing_costs_up_to_a_third():
    recipe = recipe_of("dinov2_vits14", 4, "bf16", 4096, 56)
    work, h100 = work_of(recipe), find("h100", "bf16")

    def products(which):
        changed = replace(recipe, parallel=replace(recipe.parallel, recompute=which))
        return step_time(changed, work, h100, Spread(), 8, 25e9).products.slow

    none, selective, full = (products(which) for which in ("none", "selective", "full"))
    assert none < selective < full < 4 / 3 * none
    assert selective - none == pytest.approx(full - selective)


def test_a_forward_is_counted_on_the_model():
    arch = recipe_of("dinov2_vits14", 4, "bf16", 4096, 224).backbone
    flops, seconds = forward_time(arch, 224, "bf16", find("h100", "bf16"))
    assert flops == pytest.approx(12.2e9, rel=0.02)  # 2 × 21.3 M × 257 tokens and attention
    assert 0 < seconds.fast < seconds.slow < 1e-3


# ---- devices


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_data_sheets_are_plausible(name):
    sheet = DATA_SHEETS[name]
    assert sheet.half > 1.7 * sheet.single  # matrix units
    device = find(name.upper(), "fp16")
    assert device.kind == "cuda"
    assert device.product == pytest.approx(PRODUCT_SHARE * sheet.half * 1e12)
    assert device.bandwidth == pytest.approx(COPY_SHARE * sheet.gigabytes_per_second * 1e9)
    assert 0.9 * device.memory < device.room < device.memory
    assert find(name, "fp32").product == pytest.approx(PRODUCT_SHARE * sheet.single * 1e12)


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    device = find("auto", "fp32")
    assert device.kind == "cpu"
    assert 2**30 < device.memory < 2**44
    assert 1e9 < device.product == device.score_product
    assert 1e8 < device.bandwidth < 1e13
    assert device.watts is None


@pytest.mark.parametrize(
    ("name", "precision", "sentence"),
    [
        ("h10", "bf16", "unknown GPU 'h10': did you mean 'h100'?"),
        ("radeon", "bf16", f"unknown GPU 'radeon': known: {', '.join(sorted(NAMES))}."),
        ("t4", "bf16", "the t4 has no bf16: give --precision fp16."),
        ("a100-40", "fp64", "a plan has no figures for fp64, which is for tests: give --precision bf16, fp16 or fp32."),
    ],
)
def test_a_device_that_is_not_there(name, precision, sentence):
    with pytest.raises(OpsinError) as error:
        find(name, precision)
    assert str(error.value) == sentence


def test_a_range_goes_through_a_function():
    assert Range(4, 2).map(lambda x: 1 / x) == (0.25, 0.5)
    assert isinstance(find("h100", "bf16"), Device)
