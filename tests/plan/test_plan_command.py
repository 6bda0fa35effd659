"""`opsin plan` and `opsin plan curation`: what they answer, and what they say to a mistake."""

import json
import re
from dataclasses import replace

import pytest

from opsin.cli import main
from opsin.data.stream import BatchRecipe
from opsin.errors import OpsinError
from opsin.plan import training
from opsin.plan.curation import PAPER, plan_curation
from opsin.plan.memory import step_memory
from opsin.plan.options import Cluster, Rates
from opsin.plan.training import plan
from opsin.pretrain.parallel import Spread
from opsin.pretrain.presets import preset
from opsin.pretrain.recipe import Recipe

TINY = {
    "batch.size": 32,
    "batch.group": 4,
    "crops.global-size": 32,
    "crops.local-size": 16,
    "backbone.depth": 2,
    "heads.dino-prototypes": 64,
    "heads.ibot-prototypes": 64,
}
OPTIONS = ["--recipe", "cpu", "--gpu", "l4", *(part for n, v in TINY.items() for part in (f"--{n}", str(v)))]


@pytest.fixture
def small() -> Recipe:
    recipe = preset("cpu")
    return replace(
        recipe,
        backbone=replace(recipe.backbone, depth=2, grid=4),
        batch=BatchRecipe(size=32, group=4),
        crops=replace(recipe.crops, global_size=32, local_size=16),
        precision="bf16",
    )


def room_for(monkeypatch, needed: int) -> None:
    """From here on an L4 has this much memory for a model."""
    found = training.find

    def find(name, precision):
        return replace(found(name, precision), memory=needed + 2**30)

    monkeypatch.setattr(training, "find", find)


# ---- training


def test_it_answers_in_one_sentence_first(capsys):
    assert main(["plan", *OPTIONS, "--precision", "bf16", "--batch.micro", "8"]) == 0
    first, blank, *rest = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"fits: on l4 micro-batches of 8 need 0\.\d of 21\.4 GiB, and up to 32 would fit\.", first)
    assert blank == ""
    names = [
        "parameters",
        "FLOPs per image",
        "memory",
        "  activations",
        "  loss",
        "images/s",
        "days to the end",
        "energy",
    ]
    for name in names:
        assert any(line.startswith(name + " ") for line in rest), name
    assert "CO2" not in " ".join(rest)
    assert any(line.startswith("- speed, slow end:") for line in rest[rest.index("assumed:") :])


def test_options_are_those_of_the_recipe(capsys, tmp_path):
    out = tmp_path / "plan.json"
    numbers = ["--gpus", "4", "--per-node", "2", "--pue", "1.5", "--grid", "0.4", "--watts", "100"]
    options = [*OPTIONS, "--parallel.mode", "hybrid", "--parallel.recompute", "full", "--out", str(out)]
    assert main(["plan", *options, *numbers, "--steps", "3600"]) == 0
    found = json.loads(out.read_text())
    assert found["spread"] == [2, 2]
    assert (found["share"], found["micro"], found["fits"]) == (8, 8, True)
    slow, fast = found["gpu_hours"]
    assert slow > fast > 0
    seconds = found["parts"]
    computing = sum(seconds[part][0] for part in ("products", "attention", "bandwidth", "loss"))
    assert slow == pytest.approx(4 * (computing + seconds["communication"][0]))  # 3,600 steps
    assert found["days"][0] == pytest.approx(slow / 4 / 24)
    assert found["images_per_second"][1] == pytest.approx(32 * 3600 * 4 / fast / 3600)
    assert found["kilowatt_hours"][0] == pytest.approx(slow * 0.1 * 1.5)
    assert found["co2_kilograms"][0] == pytest.approx(slow * 0.1 * 1.5 * 0.4)
    assert "kg at 0.4 kg/kWh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gpu", "a10040"], "unknown GPU 'a10040': did you mean 'a100-40'?"),
        (["--gpus", "0"], "--gpus is 0: give 1 or more."),
        (["--network", "0"], "--network is 0.0: give 0.001 or more."),
        (["--gpus", "2", "--gpu", "cpu"], "--gpus is 2 for a processor: plan one process, with --gpus 1."),
        (
            ["--gpus", "3"],
            "batch.size 32 is 8 × batch.group 4, which 3 processes cannot share equally: "
            "try batch.size 24 or 36, or --gpus 2 or 4.",
        ),
        (["--gpuss", "3"], "unknown option '--gpuss': did you mean '--gpus'?"),
        (["--recipe", "vitg41"], "unknown recipe 'vitg41': did you mean 'vitg14'?"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(options, sentence, capsys):
    assert main(["plan", *OPTIONS, *options] if "--recipe" not in options else ["plan", *options]) == 2
    assert capsys.readouterr().err == f"opsin: {sentence}\n"


def test_a_smaller_micro_batch_is_named(small, monkeypatch):
    eight = replace(small, batch=replace(small.batch, micro=8))
    room_for(monkeypatch, step_memory(eight, "cuda").total)
    found = plan(small, "l4", Cluster())
    assert not found.fits
    assert found.largest_micro == 8
    assert found.verdict.startswith("does not fit: on l4 micro-batches of 32 need ")
    assert found.verdict.endswith("; give --batch.micro 8, with the same result.")
    again = plan(eight, "l4", Cluster())
    assert again.fits
    assert again.verdict.startswith("fits, with little to spare: ")


@pytest.mark.parametrize(
    ("knob", "gpus", "ending"),
    [
        (
            "recompute",
            1,
            "give --batch.micro 4 --parallel.recompute full: the same result, for up to a third more time.",
        ),
        ("mode", 2, "--parallel.mode shard --parallel.recompute none: the same result, with more communication."),
        (
            "group",
            1,
            "give --batch.group 2 --batch.micro 2 --parallel.recompute full: masks are then drawn among 2 images",
        ),
        ("nothing", 1, "take more GPUs, or GPUs with more memory."),
    ],
)
def test_the_knob_that_makes_it_fit_is_named(knob, gpus, ending, small, monkeypatch):
    recompute = {"mode": "none"}.get(knob, "full")
    group = 2 if knob == "group" else 4
    changed = replace(
        small,
        batch=BatchRecipe(size=32, group=group, micro=group),
        parallel=replace(small.parallel, recompute=recompute),
    )
    spread = Spread(1, 2) if knob == "mode" else Spread(gpus, 1)
    needed = step_memory(changed, "cuda", spread).total
    room_for(monkeypatch, needed if knob != "nothing" else needed // 2)
    if knob == "mode":  # a model whose state is what is too large
        small = replace(small, parallel=replace(small.parallel, mode="replicate"))
    found = plan(small, "l4", Cluster(gpus=gpus))
    assert found.largest_micro is None
    assert found.verdict.startswith("does not fit: ")
    assert ending in found.verdict
    if knob != "nothing":
        assert step_memory(changed, "cuda", spread).total <= found.device.room


def test_the_spread_is_the_one_that_a_run_would_choose(small, monkeypatch):
    assert plan(small, "l4", Cluster(gpus=2)).spread == Spread(2, 1)
    room_for(monkeypatch, 2**22 - 2**30)
    assert plan(small, "l4", Cluster(gpus=4, per_node=2)).spread == Spread(1, 4)


@pytest.mark.slow
def test_the_paper_s_teacher_on_256_gpus():
    found = plan(preset("vitg14"), "a100-40", Cluster(gpus=256))
    assert found.fits
    assert (found.share, found.micro) == (12, 12)
    assert found.work.backbone == 1_134_771_200
    slow, fast = found.gpu_hours
    assert fast < 22_016 < slow * 1.05  # the paper's Table 14


# ---- curation


def test_curation_on_paper(capsys, tmp_path):
    out = tmp_path / "curation.json"
    numbers = ["--images", "1.2e9", "--gpu", "v100-32", "--gpus", "160"]
    assert main(["plan", "curation", *numbers, "--backbone", "dinov2_vits14", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1,200,000,000 images on 160 × v100-32: ")
    assert PAPER in printed
    found = json.loads(out.read_text())
    assert found["bytes"]["embeddings in half precision"] == 1.2e9 * 384 * 2
    assert found["hours"]["decode"][0] == pytest.approx(1.2e9 / (400 * 16 * 160) / 3600)
    slow = {name: hours[0] for name, hours in found["hours"].items()}
    side_by_side = max(slow["read"], slow["decode"], slow["embed"])
    assert found["total_hours"][0] == pytest.approx(
        side_by_side + slow["near-duplicates"] + slow["retrieve"] + slow["k-means"]
    )


def test_twice_the_gpus_take_half_the_time():
    one, two = (plan_curation(1e9, "a100-80", Cluster(gpus=n), Rates()) for n in (80, 160))
    for name, hours in one.hours.items():
        assert hours.slow == pytest.approx(2 * two.hours[name].slow)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--images", "0"], "--images is 0: give 1 or more."),
        (["--images", "nan"], "--images is nan: give 1 or more."),
        (["--images", "9", "--decode", "0"], "--decode is 0.0: give more than 0."),
        (["--images", "9", "--size", "225"], "--size 225 is not a multiple of the patch 14: try 224."),
        (["--images", "9", "--lists", "8"], "--probes is 64, but there are 8 lists: give fewer, or more --lists."),
        (["--images", "9", "--backbone", "vitb"], "unknown backbone 'vitb'"),
        ([], "opsin plan curation needs --images: see opsin plan curation --help."),
    ],
)
def test_mistakes_of_curation(options, sentence, capsys):
    assert main(["plan", "curation", "--gpu", "h100", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_numbers_of_a_cluster_are_checked():
    with pytest.raises(OpsinError, match=r"--pue is 0\.9: give 1 or more\."):
        Cluster(pue=0.9)
