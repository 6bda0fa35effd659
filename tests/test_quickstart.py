"""The quickstart's task and its baselines, on a short run; the real one is `make quickstart`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from opsin import quickstart
from opsin.cli import main
from opsin.errors import OpsinError


@pytest.fixture
def short(monkeypatch):
    whole = quickstart.recipe
    monkeypatch.setattr(
        quickstart,
        "recipe",
        lambda seed: replace(whole(seed), steps=4, backbone=replace(whole(seed).backbone, depth=1)),
    )


def test_tiles_of_both_colours_share_no_pixel():
    photo = torch.arange(3 * 300 * 400).reshape(3, 300, 400)
    train, test = quickstart.cut({"a": photo, "b": photo + 10**6})
    seen, held = (torch.cat([tile.flatten() for tile in tiles.images]) for tiles in (train, test))
    assert not np.intersect1d(seen.numpy(), held.numpy()).size
    assert len(seen) == len(seen.unique())
    assert train.labels.bincount().tolist() == [12, 12]
    assert test.labels.bincount().tolist() == [12, 12]


def test_queries_are_changed_and_repeatable():
    _, test = quickstart.cut(quickstart.shipped_photos())
    queries, labels = quickstart.changed(test, 0)
    again, _ = quickstart.changed(test, 0)
    other, _ = quickstart.changed(test, 1)
    assert torch.equal(queries, again)
    assert not torch.equal(queries, other)
    assert torch.equal(labels, test.labels.repeat(quickstart.QUERIES))
    plain = torch.stack([quickstart.resized(tile) for tile in test.images]).repeat(quickstart.QUERIES, 1, 1, 1)
    moved = (queries.mean((2, 3)) - plain.mean((2, 3))).abs().mean()
    assert moved > 0.08


def test_the_histogram_is_a_histogram():
    x = torch.rand(2, 3, 10, 10)
    counts = quickstart.histogram(x).square()
    assert counts.sum(1).tolist() == pytest.approx([100, 100])
    expected, _ = np.histogramdd(x[0].flatten(1).T.numpy(), bins=8, range=[(0, 1)] * 3)
    assert (counts[0].view(8, 8, 8).numpy().round() != expected).mean() < 0.01  # borders of bins may round


@pytest.mark.usefixtures("short")
def test_it_writes_the_report_and_all_four_numbers(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["quickstart", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["knn"]) == {"trained", "random_init", "raw_pixels", "colour_histogram"}
    assert all(0 < accuracy < 1 for accuracy in results["knn"].values())
    assert results["images_per_second"] > 0
    assert results["seconds"] > 0
    assert results["margin_95"][0] <= results["margin"] <= results["margin_95"][1]
    page = (out / "report.html").read_text()
    assert "data:image/png" in page
    assert f"{results['knn']['trained']:.3f}" in page
    assert "report.html" in capsys.readouterr().out


@pytest.mark.usefixtures("short")
def test_own_photos(tmp_path):
    random = np.random.default_rng(0)
    for i in range(3):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.jpg")
    Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "photos" / "small.jpg")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no photo")
    assert main(["quickstart", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "photos")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["chance"] == pytest.approx(1 / 3)


def test_too_few_photos(tmp_path):
    Image.new("RGB", (300, 300)).save(tmp_path / "one.png")
    with pytest.raises(OpsinError, match=r"1 photo\(s\) of 128 × 128 pixels or more, and the quickstart needs two"):
        quickstart.own_photos(tmp_path)


def test_other_photos_of_the_same_names_are_not_the_old_ones(tmp_path):
    for shade in (0, 255):
        _, tiles = quickstart.cut({"a": torch.full((3, 128, 128), shade, dtype=torch.uint8)})
        quickstart.save(tmp_path / "tiles", tiles, ["a"])
    written = sorted((tmp_path / "tiles").rglob("*.png"))
    assert len(written) == len(tiles.images)
    assert all(np.asarray(Image.open(path)).min() == 255 for path in written)


def test_the_output_may_not_lie_among_the_photos(tmp_path, capsys):
    assert main(["quickstart", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "lies inside --data" in capsys.readouterr().err
