"""The commands of evaluation as a user gives them, on real images that come with packages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from opsin.backbone.registry import create
from opsin.backbone.weights import save
from opsin.cli import main


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        save(
            create("dinov2_vits14", width=48, depth=4, heads=3, grid=2, layerscale=1.0), folder / f"{name}.safetensors"
        )
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """360 real digits, a folder per class."""
    folder, found = tmp_path_factory.mktemp("digits"), load_digits()
    for i in range(360):
        place = folder / str(found.target[i])
        place.mkdir(exist_ok=True)
        Image.fromarray((found.images[i] * 15.9).astype(np.uint8)).resize((28, 28)).save(place / f"{i:04}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    images = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), *load_sample_images().images]
    for number, image in enumerate(images):
        Image.fromarray(image).resize((96, 80)).save(folder / f"{number}.png")
    return folder


def options(tmp_path):
    return ["--cache", str(tmp_path / "kept"), "--no-progress", "--device", "cpu", "--batch-size", "90"]


def evaluate(task, tmp_path, *arguments):
    out = tmp_path / f"{task}.json"
    given = ["evaluate", task, *map(str, arguments), "--out", str(out), *options(tmp_path)]
    assert main(given) == 0
    return json.loads(out.read_text())


def test_classifiers_on_digits(weights, digits, tmp_path, capsys):
    w = weights / "one.safetensors"
    found = evaluate("knn", tmp_path, "--weights", w, "--data", digits, "--size", 28, "--k", 5, "--shots", 1, 5)
    assert found["metrics"]["accuracy"] > 0.3  # chance is 0.1
    assert found["settings"]["shots"] == [1, 5]
    assert "knn on" in capsys.readouterr().out
    probe = ["--probe.crops", "centre", "--probe.size", 28, "--probe.steps", 60, "--probe.train-batch", 64]
    found = evaluate("linear", tmp_path, "--weights", w, "--data", digits, *probe)
    assert found["metrics"]["accuracy"] > 0.4
    found = evaluate("logreg", tmp_path, "--weights", w, "--data", digits, "--size", 28, "--values", 4)
    assert found["metrics"]["accuracy"] > 0.5
    assert len(list((tmp_path / "kept").glob("features-*"))) == 4  # train and test, of two preparations
    hard = ["--corruptions", "contrast", "--severities", 1, 5, *probe]
    found = evaluate("robustness", tmp_path, "--weights", w, "--data", digits, *hard)
    assert found["metrics"]["accuracy"] > 0.4
    assert found["metrics"]["corruption_error"] > 1 - found["metrics"]["accuracy"]  # digits of almost no contrast
    assert "mce" not in found["metrics"]  # which is of ImageNet


def test_a_suite_of_two_models(weights, digits, tmp_path, capsys):
    config = tmp_path / "suite.yaml"
    config.write_text(
        f"""
models:
  - {{name: one, weights: {weights}/one.safetensors}}
  - {{name: two, weights: {weights}/two.safetensors}}
tasks:
  - {{task: knn, data: {digits}, size: 28, k: [5]}}
  - {{task: linear, data: {digits}, probe: {{crops: centre, size: 28, steps: 5, train_batch: 32}}}}
"""
    )
    given = ["evaluate", "suite", "--config", str(config), "--out", str(tmp_path / "suite"), *options(tmp_path)]
    assert main(given) == 0
    results = json.loads((tmp_path / "suite" / "results.json").read_text())
    assert set(results["results"]) == {"one", "two"}
    assert {one["entry"] for one in results["differences"]} == {"knn", "linear"}
    page = (tmp_path / "suite" / "report.html").read_text()
    assert "two − one" in page
    assert "Cost" in page
    assert "Traceback" not in capsys.readouterr().err
    assert main(given) == 0
    assert capsys.readouterr().out.count("measured before") == 4


def test_a_suite_tells_what_failed_at_the_end(weights, digits, tmp_path, capsys):
    config = tmp_path / "suite.yaml"
    config.write_text(
        f"""
models: [{{name: one, weights: {weights}/one.safetensors}}]
tasks:
  - {{task: knn, name: gone, data: {tmp_path}/gone}}
  - {{task: knn, data: {digits}, size: 28, k: [5]}}
"""
    )
    given = ["evaluate", "suite", "--config", str(config), "--out", str(tmp_path / "suite"), *options(tmp_path)]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith("opsin: 1 of 2 measurements failed, first gone of one (no data at ")
    assert "knn" in json.loads((tmp_path / "suite" / "results.json").read_text())["results"]["one"]


def test_brackets_in_names_are_no_markup(weights, digits, tmp_path, capsys):
    (tmp_path / "plain [").mkdir()
    os.symlink(digits, tmp_path / "plain [" / "red]")
    data = tmp_path / "plain [" / "red]"
    found = evaluate("knn", tmp_path, "--weights", weights / "one.safetensors", "--data", data, "--size", 28, "--k", 5)
    assert found["metrics"]["accuracy"] > 0.3
    os.symlink(digits, tmp_path / "plain [" / "b]")
    data = f"{tmp_path}/plain [/b]"
    evaluate("knn", tmp_path, "--weights", weights / "one.safetensors", "--data", data, "--size", 28, "--k", 5)
    assert "[/b]" in "".join(capsys.readouterr().out.split("\n"))


def test_searching_photos(weights, photos, tmp_path, capsys):
    w = str(weights / "one.safetensors")
    where = ["--device", "cpu", "--no-progress"]
    index = ["index", "--weights", w, "--data", str(photos), "--out", str(tmp_path / "index"), "--size", "56", *where]
    assert main(index) == 0
    assert "5 images in" in capsys.readouterr().out
    query = str(sorted(photos.iterdir())[1])
    search = ["search", "--weights", w, "--index", str(tmp_path / "index"), "--queries", query, "--k", "3", *where]
    assert main([*search, "--out", str(tmp_path / "found.json")]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert found[0]["image"] == query
    assert found[0]["similarity"] == pytest.approx(1, abs=2e-3)
    assert len(found) == 3
    assert main([*search, "--out", str(tmp_path / "found.html")]) == 0
    assert "data:image/jpeg" in (tmp_path / "found.html").read_text()
    assert main([*search, "--out", str(tmp_path / "found.txt")]) == 2
    assert "ends in .html or .json" in capsys.readouterr().err
    other = [part if part != w else str(weights / "two.safetensors") for part in search]
    assert main(other) == 2
    assert "was made by other weights" in capsys.readouterr().err


def test_pictures(weights, photos, tmp_path, capsys):
    w, image = str(weights / "one.safetensors"), str(sorted(photos.iterdir())[0])
    common = ["--weights", w, "--size", "70", "--device", "cpu"]
    data = ["--data", str(photos), "--images", "2"]
    for name, given, count in (
        ("pca", data, 2),
        ("attention", [*data, "--layer", "1"], 2),
        ("similarity", [*data, "--image", image, "--at", "0.4", "0.3"], 3),
        ("matches", ["--first", image, "--second", image], 1),
    ):
        out = tmp_path / name
        assert main(["visualize", name, *given, *common, "--out", str(out)]) == 0, name
        pictures = sorted(out.glob("*.png"))
        assert len(pictures) == count
        assert np.asarray(Image.open(pictures[0])).std() > 5
    again = [
        "visualize",
        "pca",
        *data,
        *common,
        "--out",
        str(tmp_path / "b"),
        "--basis",
        str(tmp_path / "pca/basis.safetensors"),
    ]
    assert main(again) == 0
    first, second = (sorted((tmp_path / name).glob("*.png"))[0].read_bytes() for name in ("pca", "b"))
    assert first == second
    assert main([*again[:-4], "--out", str(tmp_path / "all"), "--background"]) == 0
    whole, cut = (np.asarray(Image.open(sorted((tmp_path / name).glob("*.png"))[0])) for name in ("all", "pca"))
    black = (cut == 0).all(-1)
    assert black.mean() > 0.05
    assert (whole[black] == 0).all(-1).mean() < 0.5  # some are black by themselves
    assert np.array_equal(whole[~black], cut[~black])
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.png").write_bytes(Path(image).read_bytes())
    (tmp_path / "some" / "b.png").write_bytes(b"none")
    capsys.readouterr()
    assert (
        main(["visualize", "attention", *common, "--data", str(tmp_path / "some"), "--out", str(tmp_path / "c")]) == 0
    )
    assert "passed over: cannot decode" in capsys.readouterr().out
    assert len(list((tmp_path / "c").glob("*.png"))) == 1
    assert (
        main(["visualize", "matches", "--first", "gone.png", "--second", image, *common, "--out", str(tmp_path)]) == 2
    )
    assert capsys.readouterr().err == "opsin: there is no file gone.png: give --first an image.\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["knn", "--data", "{digits}", "--k", "0"], "--k is (0,)"),
        (["knn", "--data", "{digits}", "--test-data", "{digits}"], "as train and as test set"),
        (["knn", "--data", "imagnet:/x"], "did you mean 'imagenet'?"),
        (["knn", "--data", "imagenet:{photos}"], "it comes from ILSVRC2012_img_train.tar"),
        (["linear", "--data", "{photos}"], "has no labels"),
        (["segmentation", "--data", "{photos}"], "--masks"),
        (["depth", "--data", "{photos}"], "--depths"),
        (["discovery", "--data", "{photos}"], "--boxes"),
        (["copies", "--data", "{photos}"], "give --pairs FILE, or put the copies"),
        (["video", "--data", "{photos}"], ""),
        (["fairness", "--data", "{photos}"], "--table"),
        (["retrieval", "--data", "{photos}"], ""),
    ],
)
def test_mistakes_are_one_sentence(weights, digits, photos, tmp_path, capsys, arguments, said):
    filled = [word.format(digits=digits, photos=photos) for word in arguments]
    given = ["evaluate", *filled, "--weights", str(weights / "one.safetensors"), *options(tmp_path)]
    assert main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("opsin: ")
    assert err.count("\n") == 1
    assert said in err


def test_the_help_of_a_group_lists_its_tasks(capsys):
    assert main(["evaluate", "--help"]) == 0
    said = capsys.readouterr().out
    for task in ("knn", "segmentation", "suite"):
        assert f"\n  {task:14} " in said
    assert main(["evaluat", "--help"]) == 2


def test_what_the_system_refuses_is_one_sentence(digits, tmp_path, capsys):
    given = ["evaluate", "knn", "--data", str(digits), "--weights", "w" * 300, *options(tmp_path)]
    assert main(given) == 2
    assert capsys.readouterr().err == f"opsin: the system refuses {'w' * 300}: File name too long.\n"


def test_a_full_disk_is_one_sentence(weights, digits, tmp_path):
    given = ["evaluate", "knn", "--data", digits, "--weights", weights / "one.safetensors", "--size", "28"]
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from opsin.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *map(str, [*given, *options(tmp_path)])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("opsin: cannot keep features in")
    assert run.stderr.count("\n") == 1


def test_a_killed_training_goes_on(weights, digits, tmp_path):
    """kill -9 in the middle of a linear probe on fresh crops: the same command ends with the uninterrupted numbers."""
    probe = ["--probe.size", "28", "--probe.steps", "200", "--probe.train-batch", "16"]
    base = [sys.executable, "-c", "import opsin.evaluate.training as t, sys; from opsin.cli import main\n"
            "t.train.__kwdefaults__['every'] = 0.2\nsys.exit(main(sys.argv[1:]))"]  # fmt: skip

    def command(name):
        given = ["evaluate", "linear", "--weights", weights / "one.safetensors", "--data", digits, *probe]
        kept = ["--cache", tmp_path / name, "--no-progress", "--device", "cpu", "--out", tmp_path / f"{name}.json"]
        return [*base, *map(str, [*given, *kept])]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL)
    states: list[Path] = []
    while process.poll() is None and not states:
        time.sleep(0.05)
        states = list((tmp_path / "killed").glob("probe-*/state.pt"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it was too quick to be killed"
    step = torch.load(states[0], weights_only=True)["step"]
    assert 0 < step < 200
    for name in ("killed", "whole"):
        subprocess.run(command(name), env=environment, check=True, stdout=subprocess.DEVNULL)
    killed, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("killed", "whole"))
    assert killed["metrics"] == whole["metrics"]
    assert killed["details"] == whole["details"]


class Stop(Exception):
    pass


def called(monkeypatch, *arguments):
    """What opens the model is asked for, and what follows."""
    asked = []
    monkeypatch.setattr("opsin.evaluate.model.open_model", lambda *a, **k: asked.append(a[1:]) or "model")
    with pytest.raises(Stop):
        main(list(arguments))
    return asked


def stops(seen):
    def stop(*a, **k):
        seen.append((a, k))
        raise Stop

    return stop


MODEL = ["--model", "tiny", "--device", "cpu", "--precision", "bf16"]


def test_evaluate_opens_the_model_as_asked(monkeypatch):
    monkeypatch.setattr("opsin.evaluate.suite.timed", stops([]))
    assert called(monkeypatch, "evaluate", "knn", "--weights", "w", "--data", "d", *MODEL) == [("tiny", "cpu", "bf16")]


def test_index_makes_what_is_asked(monkeypatch):
    seen = []
    monkeypatch.setattr("opsin.evaluate.search.build_index", stops(seen))
    given = [
        "index",
        "--weights",
        "w",
        "--data",
        "d",
        "--out",
        "o",
        "--size",
        "56",
        "--resize",
        "padded",
        "--feature",
        "both",
    ]
    assert called(monkeypatch, *given, *MODEL) == [("tiny", "cpu", "bf16")]
    assert seen[0][1] == {"size": 56, "resize": "padded", "feature": "both"}


def test_a_suite_computes_where_and_as_asked(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("opsin.evaluate.suite.read", lambda *_: (None, []))
    monkeypatch.setattr("opsin.evaluate.suite.measure", stops(seen))
    called(
        monkeypatch,
        "evaluate",
        "suite",
        "--config",
        "c",
        "--out",
        str(tmp_path / "o"),
        "--device",
        "cpu",
        "--precision",
        "bf16",
    )
    assert (seen[0][1]["device"], seen[0][1]["precision"]) == ("cpu", "bf16")


@pytest.mark.parametrize(
    ("given", "function", "wanted"),
    [
        (["attention", "--data", "{0}", "--layer", "1", "--register", "2"], "attention", (1, 2)),
        (["matches", "--first", "{0}", "--second", "{0}", "--radius", "3", "--limit", "7"], "matches", (3.0, 7)),
        (["similarity", "--image", "{0}", "--at", "0.2", "0.7"], "patch_at", (0.2, 0.7, 14)),
        (["pca", "--data", "{0}"], "look", (70,)),
        (["matches", "--first", "{0}", "--second", "{0}"], "look", (70,)),
    ],
)
def test_pictures_are_made_as_asked(monkeypatch, tmp_path, given, function, wanted):
    Image.new("RGB", (80, 80)).save(tmp_path / "0.png")
    seen = []
    from types import SimpleNamespace

    looked = SimpleNamespace(pixels=np.zeros((70, 70, 3), dtype=np.uint8))
    monkeypatch.setattr("opsin.evaluate.maps.look", lambda *_: looked)
    monkeypatch.setattr("opsin.evaluate.maps.patches", lambda *_: torch.zeros(5, 5, 4))
    monkeypatch.setattr(f"opsin.evaluate.maps.{function}", stops(seen))
    monkeypatch.setattr("opsin.picture_commands.View.open", lambda *_: SimpleNamespace(arch=SimpleNamespace(patch=14)))
    with pytest.raises(Stop):
        main(
            [
                "visualize",
                *[one.format(tmp_path / "0.png") for one in given],
                "--weights",
                "w",
                "--out",
                str(tmp_path / "o"),
                "--size",
                "70",
            ]
        )
    assert wanted == tuple(one for one in seen[0][0] if isinstance(one, int | float))


def test_the_second_picture_is_the_mean_of_the_heads(monkeypatch, tmp_path):
    Image.new("RGB", (80, 80)).save(tmp_path / "0.png")
    from types import SimpleNamespace

    seen, heads = [], torch.tensor([0.0, 1.0])[:, None, None].expand(2, 5, 5)
    monkeypatch.setattr(
        "opsin.evaluate.maps.look", lambda *_: SimpleNamespace(pixels=np.zeros((70, 70, 3), dtype=np.uint8))
    )
    monkeypatch.setattr("opsin.evaluate.maps.attention", lambda *_: heads)
    monkeypatch.setattr(
        "opsin.report.maps.heat",
        lambda values, *_: seen.append(values.mean().item()) or np.zeros((70, 70, 3), dtype=np.uint8),
    )
    monkeypatch.setattr("opsin.picture_commands.View.open", lambda *_: None)
    assert (
        main(
            [
                "visualize",
                "attention",
                "--data",
                str(tmp_path / "0.png"),
                "--weights",
                "w",
                "--out",
                str(tmp_path / "o"),
            ]
        )
        == 0
    )
    assert seen == [0.5, 0.0, 1.0]
