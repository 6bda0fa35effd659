"""The command line: what it says to a mistake, and that nothing is lost by one."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import opsin
from opsin.backbone import weights
from opsin.backbone.registry import architecture
from opsin.backbone.vit import VisionTransformer
from opsin.cli import COMMANDS, main
from opsin.pretrain.presets import PRESETS, preset
from opsin.pretrain.recipe import from_yaml, read

SMALL = {
    "steps": 4,
    "batch.size": 8,
    "batch.group": 4,
    "crops.global-size": 16,
    "crops.local-size": 8,
    "crops.local-count": 2,
    "backbone.depth": 1,
    "backbone.width": 16,
    "backbone.heads": 2,
    "backbone.grid": 2,
    "heads.dino-prototypes": 32,
    "heads.ibot-prototypes": 32,
    "heads.hidden": 16,
    "checkpoint.every": 2,
    "schedule.warmup-steps": 2,
    "data.workers": 2,
}
TINY = ["--recipe", "cpu", "--device", "cpu", "--no-report"]
TINY += [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(random.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> Path:
    """A finished run of four steps; read only."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["pretrain", "--data", str(photos), "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pretrain(data: Path, out: Path, *options: object) -> list[str]:
    return ["pretrain", "--data", str(data), "--out", str(out), *TINY, *map(str, options)]


def environment() -> dict[str, str]:
    # without buffers, a pipe that was closed is noticed earlier than it is for users
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return kept | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def refused(capsys):
    """Calls the command, which must end with one sentence, and returns it without `opsin: `."""

    def call(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return only_sentence(capsys.readouterr().err)

    return call


def only_sentence(stderr: str) -> str:
    lines = stderr.splitlines()
    assert [line for line in lines if line.startswith("opsin: ")] == lines[-1:], stderr
    assert "Traceback" not in stderr
    return lines[-1].removeprefix("opsin: ")


# ---- the way in


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"opsin {opsin.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for name in COMMANDS:
        assert f"\n  {name} " in printed.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    printed = capsys.readouterr()
    assert f"opsin {name}" in printed.out
    assert printed.err == ""
    about = (COMMANDS[name].__doc__ or "").splitlines()[0]
    assert " ".join(about.split()[:4]) in printed.out


def test_help_of_pretrain_shows_the_recipe(capsys):
    assert main(["pretrain", "--recipe", "vitl14", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--schedule.warmup-steps" in printed
    assert "(default: 100000)" in printed  # as this recipe has it, not as another
    assert "Of the initial weights and of everything" in printed  # a field's own words


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(len(line.split()) > 5 for line in lines)


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "--help"], ["evaluate", "robustness", "--help"]])
def test_a_closed_pipe_is_silent(arguments):
    # what `opsin recipes | head -1` comes to when head is the faster
    there, here = os.pipe()
    os.close(there)
    line = [sys.executable, "-m", "opsin.cli", *arguments]
    with open(here, "wb") as pipe:
        done = subprocess.run(line, stdout=pipe, stderr=subprocess.PIPE, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "")


def test_the_installed_command_and_its_status():
    done = subprocess.run([Path(sys.executable).parent / "opsin", "recipe"], capture_output=True, text=True)
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", "opsin: unknown command 'recipe': did you mean 'recipes'?\n")


# ---- names that do not exist

EVALUATIONS = [f"opsin {name}" for name in COMMANDS if name.startswith("evaluate ")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("pretrian", "unknown command 'pretrian': did you mean 'pretrain'?"),
        ("evaluate", f"opsin evaluate needs a task: {', '.join(EVALUATIONS)}."),
        ("evaluate kn --data x", "unknown command 'evaluate kn': did you mean 'evaluate knn'?"),
        (
            "xyz",
            f"unknown command 'xyz': known: {', '.join(sorted(COMMANDS))}.",
        ),
        ("recipes --all", "unknown option '--all': known: --help, --show."),
        ("features --dat x", "unknown option '--dat': did you mean '--data'?"),
        ("features --data x", "opsin features needs --out and --weights: see opsin features --help."),
        ("evaluate knn --k 1", "opsin evaluate knn needs --data and --weights: see opsin evaluate knn --help."),
        ("pretrain --recipe cpu", "opsin pretrain needs --data and --out: see opsin pretrain --help."),
        ("pretrain --data x --out y", "opsin pretrain needs --recipe: see opsin pretrain --help."),
        ("pretrain --data x --out y --recipe vitl-14", "unknown recipe 'vitl-14': did you mean 'vitl14'?"),
        ("pretrain --recipe=vitl-14", "unknown recipe 'vitl-14': did you mean 'vitl14'?"),
        (
            "pretrain --data x --out y --recipe cpu --shedule.rate 1",
            "unknown option '--shedule.rate': did you mean '--schedule.rate'?",
        ),
        (
            "pretrain --data x --out y --recipe cpu --schedule.rat=1",
            "unknown option '--schedule.rat': did you mean '--schedule.rate'?",
        ),
        (
            "pretrain --data x --out y --recipe cpu --crops.globalsize 1",
            "unknown option '--crops.globalsize': did you mean '--crops.global-size'?",
        ),
    ],
)
def test_names_that_do_not_exist(arguments, said, refused):
    assert refused(*arguments.split()) == said


def test_a_recipe_file_that_is_not_there(refused):
    said = refused("pretrain", "--recipe", "nothing.yaml")
    assert said.startswith("cannot read the recipe nothing.yaml: No such file or directory.")


def test_underscores_and_switched_off_flags_are_known(photos, tmp_path, finished):
    out = tmp_path / "run"
    options = [option.replace("global-size", "global_size") for option in pretrain(photos, out, "--data.no-upsample")]
    assert main(options) == 0
    assert (out / "recipe.yaml").read_bytes() == (finished / "recipe.yaml").read_bytes()


@pytest.mark.parametrize("option", ["--steps=many", "--precision=fp8", "--steps", "extra"])
def test_values_that_do_not_fit_name_the_option(option, photos, tmp_path, capsys):
    assert main(pretrain(photos, tmp_path / "run", option)) == 2
    said = capsys.readouterr().err
    assert option.partition("=")[0] in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


# ---- data


def test_a_missing_folder(tmp_path, refused):
    said = refused(*pretrain(tmp_path / "nothing", tmp_path / "run"))
    assert said.startswith(f"no data at {tmp_path / 'nothing'} (no such file or directory): give a folder of images")


def test_an_empty_folder(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    said = refused(*pretrain(tmp_path / "empty", tmp_path / "run"))
    assert said.startswith(f"{tmp_path / 'empty'} is empty: give a folder with images in it")


def test_a_folder_without_images(tmp_path, refused):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.pdf").write_text("x")
    said = refused(*pretrain(tmp_path / "docs", tmp_path / "run"))
    assert said.startswith(f"{tmp_path / 'docs'} holds files but no images (seen: 1 .pdf): give a folder with")


@pytest.mark.parametrize("command", ["features --out {0}/f", "evaluate knn", "quickstart --out {0}/run --device cpu"])
def test_every_command_says_so(command, tmp_path, finished, refused):
    options = [] if command.startswith("quickstart") else ["--weights", finished / "backbone.safetensors"]
    said = refused(*command.format(tmp_path).split(), "--data", tmp_path / "nothing", *options)
    assert said.startswith(f"no data at {tmp_path / 'nothing'}")


def test_an_image_smaller_than_the_crop(photos, tmp_path, refused):
    data = shutil.copytree(photos, tmp_path / "data")
    Image.new("RGB", (40, 15)).save(data / "small.png")
    said = refused(*pretrain(data, tmp_path / "run"))
    assert said == (
        f"the smallest image of {data} has a side of 15 pixels, below the global crop of 16: give a smaller "
        "--crops.global-size, remove such images, or accept enlarged ones with --data.upsample."
    )
    assert main(pretrain(data, tmp_path / "run", "--data.upsample", "--steps", 1)) == 0  # the way out is one


def test_images_that_cannot_be_read(photos, tmp_path, refused):
    data = tmp_path / "data"
    data.mkdir()
    for file in photos.iterdir():
        (data / file.name).write_bytes(file.read_bytes()[:200])  # whole headers, so the sizes are known
    said = refused(*pretrain(data, tmp_path / "run"))
    assert "files tried cannot be decoded" in said or "successive files can be decoded" in said
    assert "mend or remove the bad files" in said


# ---- settings


@pytest.mark.parametrize(
    ("size", "group", "way_out"),
    [(1, 1, "batch.size 2"), (1, 4, "batch.size 4"), (6, 4, "batch.size 8")],
)
def test_a_batch_too_small_for_the_losses(photos, tmp_path, refused, size, group, way_out):
    said = refused(*pretrain(photos, tmp_path / "run", "--batch.size", size, "--batch.group", group))
    assert f"batch.size {size} must be a multiple of batch.group {group}" in said
    assert "KoLeo needs neighbours" in said
    assert f"try {way_out}," in said
    assert not (tmp_path / "run").exists()


def test_the_smallest_batch_trains(photos, tmp_path):
    assert main(pretrain(photos, tmp_path / "run", "--batch.size", 2, "--batch.group", 2, "--steps", 2)) == 0


def test_a_device_that_is_not_there(photos, tmp_path, refused):
    assert refused(*pretrain(photos, tmp_path / "run", "--device", "tpu")).startswith("there is no device 'tpu' on")


# ---- checkpoints


def test_a_run_of_another_architecture_is_refused(photos, run, refused):
    before = contents(run)
    said = refused(*pretrain(photos, run, "--backbone.width", 32))
    assert said.startswith(f"{run} holds a run that differs in backbone.width (16 then, 32 now): give the settings")
    # --accept-changes is for what a checkpoint can stand
    said = refused(*pretrain(photos, run, "--backbone.width", 32, "--accept-changes"))
    assert f"the checkpoint {run / 'checkpoints' / 'step-00000004'} is of another network: '" in said
    assert "Give the recipe it was made with, or another --out." in said
    assert refused(*pretrain(photos, run, "--backbone.depth", 2, "--accept-changes")).count("names differ") == 1
    assert refused(*pretrain(photos, run, "--crops.global-size", 20, "--accept-changes")) == (
        "crops.global_size 20 is not a multiple of backbone.patch 8: try 16."
    )
    assert contents(run) == before  # nothing is lost, the recipe it was made with least of all


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_the_way_out(photos, run, refused, capsys):
    last = run / "checkpoints" / "step-00000004"
    with open(last / "__0_0.distcp", "r+b") as state:
        state.truncate(5000)
    before = contents(run)
    said = refused(*pretrain(photos, run))
    assert said.startswith(f"the checkpoint {last} cannot be read (")
    assert said.endswith("): remove this folder to go on from the one before.")
    assert contents(run) == before
    shutil.rmtree(last)
    assert main(pretrain(photos, run)) == 0
    assert "going on from the checkpoint of step 2" in capsys.readouterr().err


def test_weights_of_another_architecture_are_refused(photos, finished, refused, tmp_path):
    said = refused(
        *("features", "--data", photos, "--out", tmp_path / "f.parquet", "--model", "dinov2_vits14"),
        *("--weights", finished / "backbone.safetensors", "--device", "cpu"),
    )
    assert "backbone.safetensors holds a backbone of width 16" in said
    assert "and the model is dinov2_vits14" in said
    assert list(tmp_path.iterdir()) == []


# ---- places that cannot be written


@pytest.mark.parametrize("deeper", [".", "runs/first"])
def test_an_output_under_a_file(photos, tmp_path, refused, deeper):
    (tmp_path / "file").write_text("kept")
    for command in (pretrain, lambda _, out: ["quickstart", "--out", out, "--device", "cpu"]):
        said = refused(*command(photos, tmp_path / "file" / deeper))
        assert "cannot write" in said
        assert said.endswith(("Choose another folder.", "Choose another --out."))
    assert (tmp_path / "file").read_text() == "kept"


def test_features_and_results_under_a_file(photos, finished, tmp_path, refused):
    (tmp_path / "file").write_text("kept")
    given = ["--weights", finished / "backbone.safetensors", "--device", "cpu", "--workers", 1, "--size", 16]
    said = refused("features", "--data", photos, "--out", tmp_path / "file" / "f.parquet", *given)
    assert said.startswith(f"cannot write {tmp_path / 'file' / 'f.parquet'}: Not a directory; free some space or")
    data = tmp_path / "labelled"
    for name in "ab":
        shutil.copytree(photos, data / name)
    said = refused("evaluate", "knn", "--data", data, "--out", tmp_path / "file" / "r.json", *given)
    assert said.startswith(f"cannot write --out {tmp_path / 'file' / 'r.json'}: give the name of a file in a folder")
    assert (tmp_path / "file").read_text() == "kept"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as on a disk that fills up."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def states(run: Path) -> dict[str, bytes]:
    """What decides how a run goes on, by checkpoint."""
    return {name: data for name, data in contents(run / "checkpoints").items() if name.endswith(".distcp")}


def test_a_disk_too_full_for_a_checkpoint(photos, run, finished):
    last = run / "checkpoints" / "step-00000004"
    shutil.rmtree(last)
    kept = contents(run / "checkpoints")
    line = [sys.executable, "-m", "opsin.cli", *pretrain(photos, run)]
    with largest_file(40_000):  # inherited
        done = subprocess.run(line, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    said = only_sentence(done.stderr)
    assert said.startswith(f"cannot write the checkpoint {last.with_name('.self-test')}: ")  # before any step
    assert "File too large" in said
    assert "the checkpoint of step 2 is intact. Free some space or choose another --out" in said
    assert contents(run / "checkpoints") == kept
    assert main(pretrain(photos, run)) == 0  # the same command, when there is room again
    assert states(run) == states(finished)


def test_a_disk_too_full_for_anything(photos, run, finished, tmp_path, refused):
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    before = contents(run)
    for arguments in (pretrain(photos, run), pretrain(photos, tmp_path / "new")):
        with largest_file(100):
            refused(*arguments)
    after = contents(run)
    assert {name: after[name] for name in before} == before
    assert main(pretrain(photos, run)) == 0
    assert states(run) == states(finished)


def test_a_disk_too_full_for_another_record(photos, run, refused):
    """The metrics are what grows with every step."""
    metrics = run / "metrics.jsonl"
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    steps = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(steps[0] * 2000 + steps[1])  # larger than a checkpoint
    with largest_file(metrics.stat().st_size + 100):
        said = refused(*pretrain(photos, run))
    assert said.startswith(f"cannot read or write the files of the run {run}: File too large; the checkpoint of step 2")
    assert main(pretrain(photos, run)) == 0
    assert len(metrics.read_text().splitlines()) == 2003


def test_features_on_a_full_disk_lose_nothing(photos, finished, tmp_path, refused):
    out = tmp_path / "f.parquet"
    options = ["--weights", str(finished / "backbone.safetensors"), "--size", "16", "--device", "cpu", "--workers", "1"]
    line = ["features", "--data", str(photos), "--out", str(out), *options]
    with largest_file(600):
        assert refused(*line).startswith(f"cannot write {out}: ")
    assert not out.exists()
    assert main(line) == 0
    assert out.exists()


# ---- phases, and weights to begin with


def test_a_recipe_is_printed_to_be_changed(capsys):
    for name in PRESETS:
        assert main(["recipes", "--show", name]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        assert from_yaml(printed.out, name) == preset(name)


CHANGED_BY_PHASES = ("--crops.global-size", "--crops.local-size", "--backbone.grid", "--schedule.warmup-steps")
PHASED = ["--recipe", "cpu-phases", *TINY[2:]]
del PHASED[PHASED.index("--steps") : PHASED.index("--steps") + 2]
for _option in CHANGED_BY_PHASES:
    PHASED[PHASED.index(_option)] = _option.replace("--", "--phases.pretrain.")
PHASED += [
    "--phases.pretrain.length",
    "2 steps",
    "--phases.anchor.length",
    "8 images",
    "--phases.high-res.length=1 step",
]
PHASED += ["--phases.high-res.crops.global-size", "24", "--phases.high-res.crops.local-size", "16"]
PHASED += ["--phases.high-res.backbone.grid", "3"]


def test_phases_run_through_the_command(photos, tmp_path, capsys):
    out = tmp_path / "run"
    line = ["pretrain", "--data", str(photos), "--out", str(out), *PHASED, "--phases.anchor.gram.scale", "2"]
    assert main(line) == 0
    printed = capsys.readouterr()
    assert printed.out == f"backbone: {out / 'backbone.safetensors'}\n"
    said = printed.err
    assert "phase 1 of 3, 1-pretrain: 2 steps; crops.global_size 16, crops.local_size 8, backbone.grid 2, " in said
    assert "phase 2 of 3, 2-anchor: 1 steps; gram.weight 2.0, schedule.rate 0.002, schedule.warmup_steps 5, " in said
    assert "phase 3 of 3, 3-high-res: 1 steps; crops.global_size 24" in said
    assert f"from {out / '1-pretrain'}: backbone, heads, optimiser" in said
    assert f"from {out / '2-anchor'}: backbone, heads, positions resampled to 3×3" in said
    assert read(out / "3-high-res" / "recipe.yaml").crops.global_size == 24
    assert (
        main(
            [
                "features",
                "--weights",
                str(out / "backbone.safetensors"),
                "--data",
                str(photos),
                "--out",
                str(tmp_path / "f.parquet"),
                "--size",
                "16",
                "--device",
                "cpu",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert main(line) == 0
    assert capsys.readouterr().err.count(", which are done") == 3
    said = only_sentence_of([*line, "--phases.anchor.gram.weight", "3"], capsys)
    assert said.startswith(f"{out / '2-anchor'} holds a run that differs in gram.weight (2.0 then, 3.0 now)")


def only_sentence_of(line: list[str], capsys) -> str:
    assert main(line) == 2
    return only_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--phases.hires.length=3", "unknown phase 'hires': did you mean 'high-res'?"),
        ("--phases.continue.length=3", "unknown phase 'continue': known: anchor, high-res, pretrain."),
        (
            "--phases.anchor.length=3",
            "the length of phase anchor is '3': give a number and a unit, such as",
        ),
        ("--phases.anchor=3", "--phases.anchor needs a field and a value, such as --phases.anchor.length '500 steps'."),
        ("--phases.anchor.length", "--phases.anchor.length needs a field and a value, such as --phases.anchor.length"),
        ("--phases.anchor.steps=3", "phase anchor changes steps: give its length instead, such as length: 500 steps."),
        (
            "--phases.anchor.schedule.rat=3",
            "phase anchor: unknown field 'schedule.rat': did you mean 'schedule.rate'?",
        ),
        (
            "--phases.high-res.backbone.width=32",
            "phase high-res changes backbone.width from 128 to 32, and",
        ),
        ("--phases.anchor.weights=x.pth", "phase anchor changes weights, but begins with those of the phase before"),
        (
            "--schedule.rate 1",
            "--schedule.rate is changed by phase anchor, so one value would not hold for the whole run: give "
            "--phases.anchor.schedule.rate.",
        ),
        ("--crops.global-size=24", "--crops.global-size is changed by phase high-res, so one value would not hold"),
    ],
)
def test_what_phases_cannot_take(photos, tmp_path, refused, options, said):
    out = tmp_path / "run"
    found = refused("pretrain", "--recipe", "cpu-phases", "--data", photos, "--out", out, *options.split())
    assert said in found
    assert not out.exists()


def test_the_rate_of_continued_is_changed_phase_by_phase(photos, tmp_path, refused):
    said = refused(
        "pretrain", "--recipe", "continued", "--data", photos, "--out", tmp_path / "run", "--schedule.rate=1"
    )
    assert said == (
        "--schedule.rate is changed by phase continue, so one value would not hold for the whole run: give "
        "--phases.continue.schedule.rate."
    )


def test_no_phases_to_change(photos, tmp_path, refused):
    said = refused(*pretrain(photos, tmp_path / "run", "--phases.one.length=3"))
    assert said.startswith("unknown phase 'one'")


def begin_with(weights: object, init: str = "vit_nano8") -> list[str]:
    options = ["--init", init, "--weights", str(weights), "--device", "cpu", "--no-report", "--data.upsample"]
    options += ["--batch.size", "8", "--batch.micro", "0", "--batch.group", "4", "--crops.global-size", "16"]
    options += ["--crops.local-size", "8", "--crops.local-count", "1", "--heads.dino-prototypes", "32"]
    options += ["--heads.ibot-prototypes", "32", "--heads.hidden", "16", "--precision", "fp32", "--data.workers", "1"]
    return [*options, "--phases.heads.length", "1 step", "--phases.continue.length", "1 step"]


def test_continued_pretraining_begins_with_weights_and_trains_heads_first(photos, tmp_path, capsys):
    file, out = tmp_path / "nano.safetensors", tmp_path / "run"
    weights.save(VisionTransformer(replace(architecture("vit_nano8"), grid=2)), file)
    assert main(["pretrain", "--data", str(photos), "--out", str(out), *begin_with(file)]) == 0
    said = capsys.readouterr().err
    assert "phase 1 of 2, 1-heads: 1 steps; train heads; its rate only rises, since schedule.warmup_steps is " in said
    assert f"student and teacher begin with {file}" in said
    assert f"from {out / '1-heads'}: backbone, heads, loss scale; fresh: optimiser" in said
    first = load_file(out / "1-heads" / "backbone.safetensors")
    for name, tensor in load_file(file).items():
        assert torch.equal(first[name], tensor) or name == "pos_embed", name
    assert first["pos_embed"].shape[1] == 1 + 8 * 8  # resampled to the grid of the architecture that --init names


def test_weights_to_begin_with_that_do_not_fit(photos, finished, tmp_path, refused):
    line = ["pretrain", "--data", photos, "--out", tmp_path / "run"]
    said = refused(*line, "--init", "dinov2_vits14")
    assert said == "--init dinov2_vits14 names an architecture: give --weights PATH with it, the file of its weights."
    said = refused(*line, *begin_with("x.pth", "dinov2_vits15"))
    assert said.startswith("unknown backbone 'dinov2_vits15': did you mean 'dinov2_vits")
    said = refused(*line, *begin_with(tmp_path / "nothing.pth"))
    assert "nothing.pth" in said
    said = refused(*line, *begin_with(finished / "backbone.safetensors"))
    assert f"{finished / 'backbone.safetensors'} holds a backbone of width 16" in said
    assert "--init" in said
