import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from opsin.backbone import registry, weights
from opsin.backbone.features import FeatureExtractor
from opsin.cli import main
from opsin.data.decode import decode
from opsin.data.sources import scan
from opsin.errors import OpsinError
from opsin.evaluate import extract
from opsin.evaluate.extract import write_features

SHAPES = [(40, 40), (40, 64), (64, 40), (33, 50), (40, 40), (90, 31), (40, 64)]
SIZE = 24


def tiny(seed: int = 0) -> FeatureExtractor:
    torch.manual_seed(seed)
    return FeatureExtractor(registry.create("vit_nano8", depth=2, width=16, heads=2, grid=3, layerscale=1.0))


@pytest.fixture(scope="module")
def extractor():
    return tiny()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Seven photos of five shapes, and two files that only seem to be photos."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, shape in enumerate(SHAPES):
        path = folder / ("deep/er" if number % 2 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    (folder / "2b.png").write_bytes(b"not a picture")
    (folder / "deep" / "9.jpg").write_bytes((folder / "0.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def source(photos):
    return scan(photos)


def rows_of(path: Path) -> dict[str, dict]:
    return {row["path"]: row for row in pq.read_table(path).to_pylist()}


def test_every_row_is_what_the_image_alone_gives(extractor, source, tmp_path):
    out = tmp_path / "new folder" / "features.parquet"
    done = []
    count = write_features(extractor, source, out, patches=True, size=SIZE, batch_size=4, advance=done.append)
    rows = rows_of(out)
    assert count == len(rows) == len(SHAPES)
    assert sum(done) == len(source) == len(SHAPES) + 2
    assert list(rows) == [path for path in source.paths if path not in ("2b.png", "deep/9.jpg")]
    shapes = set()
    for path, row in rows.items():
        alone = extractor.features(decode(source.root / path), size=SIZE)
        np.testing.assert_allclose(row["cls"], alone.cls[0], rtol=0, atol=1e-5)
        patches = np.array(row["patches"]).reshape(row["rows"], row["columns"], -1)
        assert patches.shape == alone.patches.shape[1:]
        np.testing.assert_allclose(patches, alone.patches[0], rtol=0, atol=1e-5)
        shapes.add(patches.shape)
    assert len(shapes) > 3  # or nothing was mixed
    schema = pq.read_schema(out)
    assert str(schema.field("cls").type) == "fixed_size_list<element: float>[16]"
    assert sorted(p.name for p in out.parent.iterdir()) == ["features.parquet", "features.parquet.unreadable.jsonl"]


def test_patches_are_left_out_unless_asked_for(extractor, source, tmp_path):
    write_features(extractor, source, tmp_path / "f.parquet", size=SIZE)
    assert pq.read_schema(tmp_path / "f.parquet").names == ["path", "cls"]


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.with_name(out.name + ".unreadable.jsonl").read_text().splitlines()]


def unreadable(out: Path) -> list[str]:
    return sorted(Path(line["path"]).name for line in log(out))


def test_unreadable_files_are_listed_once_with_the_reason(extractor, source, tmp_path):
    out = tmp_path / "f.parquet"
    for _ in range(2):  # a finished extraction is made anew, and so is its list
        write_features(extractor, source, out, size=SIZE, batch_size=2)
        assert unreadable(out) == ["2b.png", "9.jpg"]
    reasons = {Path(line["path"]).name: line["reason"] for line in log(out)}
    assert "not a JPEG, PNG" in reasons["2b.png"]


def test_a_mended_file_is_no_longer_listed(extractor, photos, tmp_path):
    data, out = shutil.copytree(photos, tmp_path / "data"), tmp_path / "f.parquet"
    assert write_features(extractor, scan(data), out, size=SIZE) == len(SHAPES)
    shutil.copy(data / "0.png", data / "2b.png")
    assert write_features(extractor, scan(data), out, size=SIZE) == len(SHAPES) + 1
    assert unreadable(out) == ["9.jpg"]


@pytest.mark.parametrize("stop_after", [3, 5])  # at the end of the first part, and inside the second
def test_an_interrupted_extraction_goes_on_and_gives_the_same_file(
    extractor, source, tmp_path, monkeypatch, stop_after
):
    monkeypatch.setattr(extract, "PART", 3)
    settings = {"patches": True, "size": SIZE, "batch_size": 1, "workers": 2}
    whole, out = tmp_path / "whole.parquet", tmp_path / "f.parquet"
    write_features(extractor, source, whole, **settings)

    done = 0

    def interrupt(images):
        nonlocal done
        if done == stop_after:
            raise KeyboardInterrupt
        done += images

    with pytest.raises(KeyboardInterrupt):
        write_features(extractor, source, out, **settings, advance=interrupt)
    parts = tmp_path / "f.parquet.parts"
    assert [p.name for p in sorted(parts.glob("*.parquet"))] == ["000000000000.parquet"]
    assert not out.exists()
    (parts / "000000000003.partial").write_bytes(b"cut off by a kill")

    computed = []
    each = extractor.each
    monkeypatch.setattr(extractor, "each", lambda images, size: computed.append(len(images)) or each(images, size))
    shown = []
    assert write_features(extractor, source, out, **settings, advance=shown.append) == len(SHAPES)
    assert sum(computed) == len(source) - 3
    assert sum(shown) == len(source)  # the bar begins where it stopped, and ends full
    assert out.read_bytes() == whole.read_bytes()
    assert list(rows_of(out)) == [path for path in source.paths if path not in ("2b.png", "deep/9.jpg")]
    assert unreadable(out) == unreadable(whole) == ["2b.png", "9.jpg"]
    assert not parts.exists()


def interrupted(extractor, source, out: Path) -> None:
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(extractor, source, out, size=SIZE, advance=interrupt)


def test_parts_of_another_extraction_are_refused(extractor, source, photos, tmp_path):
    out = tmp_path / "f.parquet"
    interrupted(extractor, source, out)
    others = {
        "size": lambda: write_features(extractor, source, out, size=SIZE + 8),
        "patches, size": lambda: write_features(extractor, source, out, patches=True),
        "weights": lambda: write_features(tiny(seed=1), source, out, size=SIZE),
        "source": lambda: write_features(extractor, scan(photos / "deep"), out, size=SIZE),
    }
    for changed, again in others.items():
        with pytest.raises(OpsinError, match=f"holds parts made with other {changed}: remove it, or choose another"):
            again()
    # how it is computed may change
    assert write_features(extractor, source, out, size=SIZE, batch_size=3, workers=1) == len(SHAPES)


def test_an_unwritable_place_is_one_sentence(extractor, source, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OpsinError) as refused:
        write_features(extractor, source, tmp_path / "file" / "f.parquet", size=SIZE)
    said = str(refused.value)
    assert said.startswith(
        f"cannot write {tmp_path / 'file' / 'f.parquet'}: Not a directory; free some space or choose"
    )
    assert "\n" not in said
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("option", ["batch_size", "workers"])
def test_settings_out_of_range_are_refused(extractor, source, tmp_path, option):
    with pytest.raises(OpsinError, match="must be 1 or more"):
        write_features(extractor, source, tmp_path / "f.parquet", **{option: 0})


def test_the_command_end_to_end(extractor, photos, tmp_path, capsys):
    file, out = tmp_path / "backbone.safetensors", tmp_path / "features.parquet"
    weights.save(extractor.backbone, file)
    options = ["--data", str(photos), "--out", str(out), "--weights", str(file), "--size", str(SIZE), "--patches"]
    assert main(["features", *options, "--device", "cpu", "--workers", "2", "--batch-size", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"7 images written to {out}, 2 unreadable: see {out}.unreadable.jsonl\n"
    assert "9/9 images" in printed.err
    row = rows_of(out)["deep/er/1.png"]
    alone = extractor.features(decode(photos / "deep/er/1.png"), size=SIZE)
    np.testing.assert_allclose(row["cls"], alone.cls[0], rtol=0, atol=1e-5)
    assert (row["rows"], row["columns"]) == tuple(alone.patches.shape[1:3])
