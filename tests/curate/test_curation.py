"""The whole curation as a user runs it: on both runners, stopped at any moment, twice at once."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from opsin.cli import main
from opsin.output import only_run

SIZE = 48


def photographs():
    """Tiles of real photos that ship with packages, 96 pixels a side."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    whole = [np.asarray(getattr(skimage.data, name)()) for name in names] + list(load_sample_images().images)
    tiles = [
        np.ascontiguousarray(photo[top : top + 96, left : left + 96])
        for photo in whole
        for top in range(0, photo.shape[0] - 95, 96)
        for left in range(0, photo.shape[1] - 95, 96)
    ]
    return [tile for tile in tiles if tile.std() > 20]  # not those of sky alone


@pytest.fixture(scope="module")
def heap(tmp_path_factory) -> Path:
    """A heap with copies and junk, an evaluation set, a query set, and a network."""
    root = tmp_path_factory.mktemp("heap")
    tiles = photographs()
    for folder in ("heap/sub", "reference", "queries"):
        (root / folder).mkdir(parents=True)
    for i, tile in enumerate(tiles):
        Image.fromarray(tile).save(root / "heap/sub" / f"{i:03}.png")
        if i % 10 == 0:
            Image.fromarray(tile).resize((80, 80)).save(root / "heap" / f"copy-{i:03}.jpg", quality=80)
        if i % 30 == 0:
            (root / "heap" / f"same-{i:03}.png").write_bytes((root / "heap/sub" / f"{i:03}.png").read_bytes())
    for i in (3, 44):
        Image.fromarray(tiles[i]).save(root / "reference" / f"{i}.jpg", quality=90)
    for i in range(6):
        Image.fromarray(tiles[i][:, ::-1]).save(root / "queries" / f"{i}.png")
    Image.new("RGB", (90, 90), "gray").save(root / "heap" / "constant.png")
    (root / "heap" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with warnings.catch_warnings(action="ignore"):  # of torch 2.14, whose TorchScript is going to end
        torch.jit.script(Thumbnail()).save(root / "thumbnail.pt")
    return root


class Thumbnail(torch.nn.Module):
    """A network that needs no training: the image at 6 × 6 pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 6).flatten(1)


def options(heap: Path, out: Path, runner: str = "native") -> list[str]:
    given = {
        "data": heap / "heap",
        "references": f"reference={heap / 'reference'}",
        "nearest": f"queries={heap / 'queries'}",
        "by-cluster": f"queries-again={heap / 'queries'}",
        "sample.images": 40,
        "ingest.part": 32,
        "embed.weights": heap / "thumbnail.pt",
        "embed.size": SIZE,
        "embed.batch": 16,
        "calibrate.sample": 24,
        "calibrate.precision": 0.8,
        "calibrate.reference-precision": 0.5,
        "retrieve.neighbours": 3,
        "retrieve.hits": 0,
        "engine.runner": runner,
        "engine.threads": 1,
        "engine.memory": 0.2,
        "out": out,
    }
    words = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return [*words, "--cluster.levels", "12", "3", "--accept"]


def curate(words: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "opsin.cli", "curate", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def rows(out: Path) -> list[dict]:
    return pq.read_table(out / "manifest.parquet").to_pylist()


@pytest.fixture(scope="module")
def finished(heap, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("native") / "out"
    run = curate(options(heap, out))
    told, wrong = run.communicate(timeout=300)
    assert run.returncode == 0, wrong
    assert "manifest" in told
    return out


def test_copies_junk_and_what_is_near_references_are_dropped(finished):
    found = {Path(row["path"]).name: row for row in rows(finished)}
    assert found["constant.png"]["reason"] == "near-constant"
    assert found["broken.jpg"]["reason"].startswith("unreadable")
    for name, row in found.items():
        assert row["kept"] == (row["reason"] is None)
        if name.startswith("same-"):
            pair = {row["reason"], found[name.removeprefix("same-")]["reason"]}
            assert "exact duplicate" in pair
    assert {"003.png", "044.png"} <= {n for n, row in found.items() if row["reason"] == "near-duplicate of reference"}
    everything = list(found.values())
    for row in everything:
        if row["duplicate_of"] is not None:
            assert everything[row["duplicate_of"]]["duplicate_of"] is None
    assert sum(row["kept"] for row in everything) >= 40
    assert {name for row in everything for name in row["sets"]} == {"queries", "queries-again"}


def test_the_manifest_is_data_for_pretraining(finished, tmp_path):
    from opsin.data.reader import ImageReader
    from opsin.data.sources import scan

    source = scan(finished / "manifest.parquet", tmp_path)
    kept = [row for row in rows(finished) if row["kept"]]
    assert len(source) == len(kept)
    with ImageReader(source, workers=1) as reader:
        for i, row in enumerate(kept):
            assert source.place(i) == row["path"]
            assert tuple(reader.read(i).shape[1:]) == (row["height"], row["width"])


def test_the_report_is_there(finished):
    page = (finished / "report.html").read_text()
    assert "near-duplicate of reference" in page
    assert page.count("data:image/") > 20


def test_the_same_command_again_changes_nothing(finished, heap):
    before = {path: path.read_bytes() for path in sorted(finished.rglob("*.parquet"))}
    run = curate(options(heap, finished))
    assert run.wait(timeout=120) == 0
    assert {path: path.read_bytes() for path in sorted(finished.rglob("*.parquet"))} == before


@pytest.mark.slow
def test_ray_gives_the_same_manifest(finished, heap, tmp_path):
    run = curate(options(heap, tmp_path / "out", "ray"))
    _, wrong = run.communicate(timeout=500)
    assert run.returncode == 0, wrong
    assert rows(tmp_path / "out") == rows(finished)
    from safetensors.torch import load_file

    mine, theirs = (load_file(out / "clusters" / "levels.safetensors") for out in (tmp_path / "out", finished))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_curation_stopped_anywhere_ends_with_the_same_manifest(finished, heap, tmp_path, how):
    out, stops = tmp_path / "out", 0
    steps = ("images", "vectors", "neighbours", "clusters") if how == signal.SIGKILL else ("vectors", "clusters")
    for step in steps:
        # Of the run: it writes its recipe first. A signal that comes while Python starts is Python's own affair.
        (out / "recipe.yaml").unlink(missing_ok=True)
        run = curate(options(heap, out))
        until = time.monotonic() + 120
        while run.poll() is None and time.monotonic() < until:
            if (out / "recipe.yaml").exists() and (out / step / "_step.json").exists():
                break
            time.sleep(0.01)
        time.sleep(0.1)
        if run.poll() is None:
            run.send_signal(how)
            stops += 1
        _, said = run.communicate(timeout=60)
        assert run.returncode in (0, -how, 128 + how), said
        assert "Traceback" not in said
    assert stops >= 2
    run = curate(options(heap, out))
    _, wrong = run.communicate(timeout=300)
    assert run.returncode == 0, wrong
    assert rows(out) == rows(finished)


def test_two_at_once_are_refused(heap, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with only_run(out):
        second = curate(options(heap, out))
        _, said = second.communicate(timeout=60)
    assert second.returncode == 2
    assert said.count("\n") == 1
    assert str(out) in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--data"], "--data"),
        (["--embed.weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--dedup.threshold", "1.5"], "threshold is 1.5"),
        (["--references", "nameless"], "NAME=SRC"),
        (["--references", "a=x", "a=y"], "two sets 'a'"),
        (["--engine.runner", "slurm"], "slurm"),
        (["--cluster.levels", "3", "12"], "levels"),
        (["--dedup.treshold", "0.5"], "did you mean"),
    ],
)
def test_mistakes_get_one_sentence(heap, tmp_path, capfd, change, said):
    assert main(["curate", *options(heap, tmp_path / "out"), *change]) == 2
    wrong = capfd.readouterr().err
    assert said in wrong
    assert "Traceback" not in wrong


def test_a_mistake_that_shows_after_daft_has_run_gets_one_sentence(heap, tmp_path):
    """In a process of its own, which must end in order although Daft has threads in it."""
    run = curate([*options(heap, tmp_path / "out"), "--cluster.levels", "1000"])
    _, wrong = run.communicate(timeout=120)
    assert run.returncode == 2
    assert "1,000 clusters" in wrong
    assert "Traceback" not in wrong


def test_ctrl_c_that_daft_alone_sees_ends_the_command_too(heap, tmp_path):
    """A shell has its background jobs ignore Ctrl-C, and Daft does not: it stops, as if its tasks were all done."""
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from opsin.cli import main\n"
        "from opsin.curate import ingest\n"
        "look = ingest._Look.__call__\n"
        "def interrupted(*given):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.5)\n"
        "    return look(*given)\n"
        "ingest._Look.__call__ = interrupted\n"
        "words = ['--data', sys.argv[1], '--out', sys.argv[2], '--part', '32', '--threads', '1']\n"
        "sys.exit(main(['curate', 'ingest', *words]))\n"
    )
    line = [sys.executable, "-c", code, str(heap / "heap"), str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr == ""


def test_nothing_is_told_to_anyone(heap, tmp_path):
    """Importing Daft and running it opens no connection to another machine."""
    code = (
        "import socket, sys\n"
        "real = socket.socket.connect\n"
        "def connect(self, address):\n"
        "    print('CONNECTED', address, flush=True)\n"
        "    raise OSError('no network')\n"
        "socket.socket.connect = connect\n"
        "from opsin.cli import main\n"
        f"sys.exit(main({['curate', 'ingest', '--data', str(heap / 'heap'), '--out', str(tmp_path / 'out')]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONNECTED" not in done.stdout


def test_vectors_of_ones_own_need_no_images(tmp_path):
    import pyarrow as pa

    random = np.random.default_rng(0)
    vectors = random.normal(size=(300, 24))
    vectors[100] = vectors[7] * 3  # a copy, whatever its length
    pq.write_table(pa.table({"mine": list(vectors)}), tmp_path / "v.parquet", row_group_size=64)
    words = ["--vectors", tmp_path / "v.parquet", "--column", "mine", "--whiten", "False", "--threshold", "0.95"]
    done = subprocess.run(
        [sys.executable, "-m", "opsin.cli", "curate", "dedup", *map(str, words), "--out", str(tmp_path / "d")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = pq.read_table(tmp_path / "d").to_pylist()
    assert [i for i, row in enumerate(found) if not row["kept"]] == [100]
    assert found[100]["duplicate_of"] == 7
    facts = json.loads((tmp_path / "d" / "_step.json").read_text())["facts"]
    assert facts["dropped"] == {"near-duplicate": 1}
