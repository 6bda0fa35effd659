import json
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image

import opsin
from opsin.backbone import registry, weights
from opsin.backbone.features import FeatureExtractor
from opsin.cli import main
from opsin.data.decode import DecodeError, decode
from opsin.data.sources import scan
from opsin.errors import OpsinError
from opsin.evaluate import extract
from opsin.evaluate.extract import write_features
from opsin.evaluate.knn import Knn, knn
from opsin.evaluate.model import wrap
from opsin.evaluate.task import Run

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


def paths(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def rows_of(path: Path) -> dict[str, dict]:
    return {row["path"]: row for row in pq.read_table(path).to_pylist()}


def test_every_row_is_what_the_image_alone_gives(extractor, source, tmp_path):
    out = tmp_path / "new folder" / "features.parquet"
    done = []
    count = write_features(extractor, source, out, patches=True, size=SIZE, batch_size=4, advance=done.append)
    rows = rows_of(out)
    assert count == len(rows) == len(SHAPES)
    assert sum(done) == len(source) == len(SHAPES) + 2
    assert list(rows) == [path for path in paths(source) if path not in ("2b.png", "deep/9.jpg")]
    shapes = set()
    for path, row in rows.items():
        alone = extractor.features(decode(Path(source.root, path)), size=SIZE)
        np.testing.assert_allclose(row["cls"], alone.cls[0], rtol=0, atol=1e-5)
        patches = np.array(row["patches"]).reshape(row["rows"], row["columns"], -1)
        assert patches.shape == alone.patches.shape[1:]
        np.testing.assert_allclose(patches, alone.patches[0], rtol=0, atol=1e-5)
        shapes.add(patches.shape)
    assert len(shapes) > 3  # or nothing was mixed
    schema = pq.read_schema(out)
    assert str(schema.field("cls").type) == "fixed_size_list<element: float>[16]"
    assert sorted(p.name for p in out.parent.iterdir()) == ["features.parquet", "features.parquet.unreadable.jsonl"]


def one_batch_after_another(extractor, source, batch_size) -> dict[str, tuple]:
    """The plain way: decode, prepare and compute a batch, then the next."""
    expected = {}
    for at in range(0, len(source), batch_size):
        names, images = [], []
        for path in paths(source)[at : at + batch_size]:
            with suppress(DecodeError):
                images.append(decode(Path(source.root, path)))
                names.append(path)
        if names:
            expected |= dict(zip(names, extractor.each(images, SIZE), strict=True))
    return expected


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("workers", [1, 5])
def test_the_pipeline_changes_no_value(extractor, source, tmp_path, monkeypatch, batch_size, workers):
    monkeypatch.setattr(extract, "PART", 6)
    out = tmp_path / "f.parquet"
    write_features(extractor, source, out, patches=True, size=SIZE, batch_size=batch_size, workers=workers)
    expected, rows = one_batch_after_another(extractor, source, batch_size), rows_of(out)
    assert list(rows) == list(expected)  # row order, and no row for the two files that are no images
    for path, row in rows.items():
        np.testing.assert_allclose(row["cls"], expected[path].cls[0], rtol=0, atol=1e-6)
        assert (row["rows"], row["columns"]) == tuple(expected[path].patches.shape[1:3])
        np.testing.assert_allclose(row["patches"], expected[path].patches.flatten(), rtol=0, atol=1e-6)


def test_a_batch_without_a_readable_image(extractor, source, tmp_path):
    # the third and the last of the nine files are no images, and each is a batch of its own
    assert write_features(extractor, source, tmp_path / "f.parquet", patches=True, size=SIZE, batch_size=1) == 7


def test_half_precision_is_written_in_fp32(extractor, source, tmp_path):
    half = FeatureExtractor(extractor.backbone, precision="bf16")
    write_features(half, source, tmp_path / "f.parquet", size=SIZE, batch_size=4)
    assert str(pq.read_schema(tmp_path / "f.parquet").field("cls").type) == "fixed_size_list<element: float>[16]"
    for path, row in rows_of(tmp_path / "f.parquet").items():
        alone = half.features(decode(Path(source.root, path)), size=SIZE).cls[0].numpy()
        np.testing.assert_allclose(row["cls"], alone, rtol=0, atol=0.1)
        assert (
            np.abs(row["cls"] - extractor.features(decode(Path(source.root, path)), size=SIZE).cls[0].numpy()).max() > 0
        )


def test_images_are_prepared_ahead_in_the_worker_threads(extractor, source, tmp_path, monkeypatch):
    """The model gets its first batch when later ones are being prepared already, and none in its own thread."""
    threads, preprocess = [], extractor.preprocess
    third = threading.Event()

    def watched(image, size):
        threads.append((threading.current_thread().name, torch.get_num_threads()))
        if len(threads) >= 3:
            third.set()
        return preprocess(image, size)

    forward = extractor.backbone.forward
    monkeypatch.setattr(extractor, "preprocess", watched)
    monkeypatch.setattr(extractor.backbone, "forward", lambda images: third.wait(20) and forward(images))
    assert write_features(extractor, source, tmp_path / "f.parquet", size=SIZE, batch_size=2, workers=2) == 7
    assert len(threads) == 7
    assert {(name.rstrip("01"), count) for name, count in threads} == {("prepare_", 1)}


def test_writing_does_not_hold_up_the_model(extractor, source, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "PART", 3)
    later, write, forward = threading.Event(), pq.write_table, extractor.backbone.forward
    computed = []

    def slow(table, path):
        if len(computed) < 9:  # the first part waits until the next one has been computed
            assert later.wait(20)
        write(table, path)

    def watched(images):
        computed.extend(images)
        if len(computed) >= 5:
            later.set()
        return forward(images)

    monkeypatch.setattr(pq, "write_table", slow)
    monkeypatch.setattr(extractor.backbone, "forward", watched)
    assert write_features(extractor, source, tmp_path / "f.parquet", size=SIZE, batch_size=1) == 7


def test_a_full_disk_is_told_when_the_writer_meets_it(extractor, source, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "PART", 3)
    write = pq.write_table

    def full(table, path):
        if path.stem == "000000000003":
            raise OSError(28, "No space left on device")
        write(table, path)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OpsinError, match=r"No space left on device; free some space .* finished parts stay in"):
        write_features(extractor, source, tmp_path / "f.parquet", size=SIZE, batch_size=2)
    assert (tmp_path / "f.parquet.parts" / "000000000000.parquet").exists()
    monkeypatch.undo()
    monkeypatch.setattr(extract, "PART", 3)
    assert write_features(extractor, source, tmp_path / "f.parquet", size=SIZE, batch_size=2) == 7


def test_features_that_are_not_finite_are_refused(source, tmp_path):
    broken = tiny()
    with torch.no_grad():
        broken.backbone.norm.weight[3] = torch.inf
    with pytest.raises(OpsinError, match=r"the features of 0\.png .* not finite: the weights are damaged, or .* fp16"):
        write_features(broken, source, tmp_path / "f.parquet", size=SIZE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("one_shape", [True, False])
def test_graphs_and_packed_batches_on_a_gpu(photos, tmp_path, one_shape):
    on_gpu, data = tiny(), tmp_path / "data"
    data.mkdir()
    for number in range(7):  # batches of three: two full ones, which a graph computes, and one that is padded
        shutil.copy(photos / ("0.png" if one_shape else f"{number // 2 * 2}.png"), data / f"{number}.png")
    expected = one_batch_after_another(on_gpu, scan(data), 3)
    on_gpu.backbone.cuda()
    assert write_features(on_gpu, scan(data), tmp_path / "f.parquet", patches=True, size=SIZE, batch_size=3) == 7
    for path, row in rows_of(tmp_path / "f.parquet").items():
        np.testing.assert_allclose(row["cls"], expected[path].cls[0], rtol=0, atol=2e-2)  # convolutions use TF32
        np.testing.assert_allclose(row["patches"], expected[path].patches.flatten(), rtol=0, atol=2e-2)


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

    prepared = []
    preprocess = extractor.preprocess
    monkeypatch.setattr(extractor, "preprocess", lambda *image: prepared.append(1) or preprocess(*image))
    shown = []
    assert write_features(extractor, source, out, **settings, advance=shown.append) == len(SHAPES)
    assert len(prepared) == len(SHAPES) - 2  # the first part has two images and a file that is none
    assert sum(shown) == len(source)  # the bar begins where it stopped, and ends full
    assert out.read_bytes() == whole.read_bytes()
    assert list(rows_of(out)) == [path for path in paths(source) if path not in ("2b.png", "deep/9.jpg")]
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
        "precision, weights": lambda: write_features(
            FeatureExtractor(extractor.backbone, precision="bf16"), source, out, size=SIZE
        ),
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
    row = rows_of(out)["deep/er/1.png"]  # in fp32, which is what a processor computes in unless told otherwise
    alone = extractor.features(decode(photos / "deep/er/1.png"), size=SIZE)
    np.testing.assert_allclose(row["cls"], alone.cls[0], rtol=0, atol=1e-5)
    assert (row["rows"], row["columns"]) == tuple(alone.patches.shape[1:3])


def test_the_command_in_half_precision(extractor, photos, tmp_path, capsys):
    file, out = tmp_path / "backbone.safetensors", tmp_path / "features.parquet"
    weights.save(extractor.backbone, file)
    options = ["--data", str(photos), "--out", str(out), "--weights", str(file), "--size", str(SIZE), "--device", "cpu"]
    assert main(["features", *options, "--precision", "bf16"]) == 0
    half = FeatureExtractor(extractor.backbone, precision="bf16")
    alone = half.features(decode(photos / "0.png"), size=SIZE)
    np.testing.assert_allclose(rows_of(out)["0.png"]["cls"], alone.cls[0], rtol=0, atol=0.1)
    for precision, message in {"fp8": "unknown precision 'fp8': ", "fp16": "fp16 is for GPUs"}.items():
        capsys.readouterr()
        assert main(["features", *options, "--precision", precision]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


# ---- other channels


def band_files(folder: Path, channels: int) -> dict[str, np.ndarray]:
    """Files of every kind that holds so many bands, and their pixels; two shapes."""
    random = np.random.default_rng(0)
    images = {}

    def add(name: str, dtype: str, write) -> None:
        image = random.integers(0, 256, (channels, 40, 40 + 8 * (len(images) % 2)))
        image = (image / 255).astype(dtype) if dtype == "f4" else image.astype(dtype)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, image)
        images[name] = image

    def pages(path: Path, image: np.ndarray) -> None:
        tifffile.imwrite(path, image, photometric="minisblack")

    def interleaved(path: Path, image: np.ndarray) -> None:
        tifffile.imwrite(path, image.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig")

    def png(path: Path, image: np.ndarray) -> None:
        Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0)).save(path)

    add("a/0.tif", "u2", pages)
    add("a/1.tif", "f4", pages)
    if channels == 1:
        add("b/2.png", "u1", png)
        add("b/3.png", "u2", png)
    else:
        add("b/2.tif", "u2", interleaved)
        add("b/3.png" if channels == 4 else "b/3.tif", "u1", png if channels == 4 else interleaved)
    return images


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_features_of_other_channels(channels, tmp_path):
    images = band_files(tmp_path / "data", channels)
    (tmp_path / "data" / "a" / "rgb.jpg").write_bytes(b"no image")
    torch.manual_seed(0)
    extractor = FeatureExtractor(opsin.create("vit_nano8", channels=channels))
    out = tmp_path / "features.parquet"
    assert write_features(extractor, scan(tmp_path / "data"), out, size=SIZE, batch_size=3, workers=2) == 4
    rows = rows_of(out)
    assert list(rows) == sorted(images)
    for name, image in images.items():
        alone = extractor.features([torch.from_numpy(image)], size=SIZE)
        np.testing.assert_allclose(rows[name]["cls"], alone.cls[0], rtol=0, atol=1e-5)
    assert len({tuple(row["cls"]) for row in rows.values()}) == 4
    settings = Knn(str(tmp_path / "data"), k=(1,), size=SIZE, test_fraction=0.5)
    result = knn(wrap(extractor.backbone), settings, Run(cache=tmp_path / "kept", progress=False))
    assert (result.details["n_train"], result.details["n_test"], len(result.left_out)) == (2, 2, 1)


def test_features_of_arrays(tmp_path):
    images = np.random.default_rng(0).integers(0, 65536, (3, 13, 40, 40), dtype=np.uint16)
    for number, image in enumerate(images):
        np.save(tmp_path / f"{number}.npy", image)
    extractor = FeatureExtractor(opsin.create("vit_nano8", depth=1, channels=13))
    assert write_features(extractor, scan(tmp_path), tmp_path / "out.parquet", size=SIZE) == 3
    alone = extractor.features([torch.from_numpy(images[1])], size=SIZE)
    np.testing.assert_allclose(rows_of(tmp_path / "out.parquet")["1.npy"]["cls"], alone.cls[0], rtol=0, atol=1e-5)
