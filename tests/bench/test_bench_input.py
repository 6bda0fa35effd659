"""The three rates of the input pipeline measure what their names say."""

import shutil

import pytest
import torch
from PIL import Image

from opsin.bench import input as bench
from opsin.data.reader import ImageReader
from opsin.data.sources import scan
from opsin.data.stream import DataRecipe

CPU = torch.device("cpu")
RECIPE = DataRecipe(workers=1, ahead=1)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_synthetic_photos(count, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "DISTINCT", 3)
    bench.make_photos(tmp_path / "photos", count)
    files = sorted((tmp_path / "photos").iterdir())
    assert len(files) == count
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
    assert len({file.read_bytes() for file in files}) == min(count, 3)


def test_crops_alone_open_no_file(tmp_path):
    folder = tmp_path / "photos"
    bench.make_photos(folder, 3)
    source = scan(folder, progress=False)
    with ImageReader(source, workers=1) as reader:
        decoded = bench._Decoded(source, reader, 3)
    shutil.rmtree(folder)
    with decoded:
        assert bench.stream_rate(decoded, RECIPE, 2, 0, CPU).minimum > 0


def test_decoding_reads_every_file_in_turn(tmp_path):
    bench.make_photos(tmp_path / "photos", 3)
    asked: list[int] = []

    class Noting(ImageReader):
        def submit(self, indices, *more):
            asked.extend(indices)
            return super().submit(indices, *more)

    with Noting(scan(tmp_path / "photos", progress=False), workers=1) as reader:
        assert bench.decode_rate(reader, 2, 0).minimum > 0
    assert asked == [(2 + i) % 3 for i in range(len(asked))]
    assert len(asked) >= 2 * 5
