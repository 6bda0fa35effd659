import json
import threading
import time

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin.data import bands
from opsin.data import reader as module
from opsin.data.decode import decode, decode_reduced
from opsin.data.reader import ImageReader
from opsin.data.sources import scan
from opsin.errors import OpsinError


def folder(root, count, bad=()):
    """`count` images, image i of colour i and size (4 + i % 5, 4); those in `bad` hold text."""
    root.mkdir(exist_ok=True)
    for i in range(count):
        path = root / f"{i:04}.png"
        if i in bad:
            path.write_text("no image")
        else:
            Image.new("RGB", (4 + i % 5, 4), (i % 256, i // 256, 7)).save(path)
    return scan(root)


def identity(image):
    """Which of `folder`'s images this is."""
    assert image[2, 0, 0] == 7
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def test_images_come_in_the_order_asked_for(tmp_path):
    source = folder(tmp_path / "data", 12)
    with ImageReader(source, workers=4) as reader:
        assert torch.equal(reader.read(3), decode(source.open(3)))
        order = [5, 0, 11, 5, 2]
        assert [identity(image) for image in reader.read_many(order)] == order
        pending = reader.submit(range(12))
        assert [identity(image) for image in pending.result()] == list(range(12))
        assert pending.done()
        assert reader.read_many([]) == []
        assert reader.bad == {}


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_the_source(tmp_path, index):
    with (
        ImageReader(folder(tmp_path / "data", 3), workers=1) as reader,
        pytest.raises(IndexError, match="source with 3"),
    ):
        reader.read_many([index])


def test_submit_does_not_wait_and_decodes_in_parallel(tmp_path, monkeypatch):
    source = folder(tmp_path / "data", 4)
    together = threading.Barrier(4)

    def meet(path, reduction, **options):
        together.wait(timeout=10)
        return decode_reduced(path, reduction, **options)

    monkeypatch.setattr(module, "decode_reduced", meet)
    with ImageReader(source, workers=4) as reader:
        assert len(reader.read_many(range(4))) == 4
        together = threading.Barrier(2)
        pending = reader.submit([0])
        assert not pending.done()
        together.wait(timeout=10)
        pending.result()


def test_a_bad_file_is_replaced_logged_and_counted_once(tmp_path, monkeypatch):
    source = folder(tmp_path / "data", 10, bad={3, 4, 9})
    log = tmp_path / "run" / "unreadable.jsonl"
    decoded = []

    def note(path, reduction, **options):
        decoded.append(path.name)
        return decode_reduced(path, reduction, **options)

    monkeypatch.setattr(module, "decode_reduced", note)
    with ImageReader(source, workers=3, log=log) as reader:
        for _ in range(3):
            images = reader.read_many([3, 4, 9, 5, 0])
            assert [identity(image) for image in images] == [5, 5, 0, 5, 0]
        assert sorted(reader.bad) == [3, 4, 9]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((line["index"], line["path"]) for line in lines) == [
        (i, str(tmp_path / "data" / f"000{i}.png")) for i in (3, 4, 9)
    ]
    assert all(line["reason"].startswith("not a JPEG") for line in lines)
    late = [name for name in decoded[len(decoded) - 10 :] if name in ("0003.png", "0004.png", "0009.png")]
    assert late == []  # a known bad file is not decoded again


def test_a_bad_file_that_two_threads_meet_at_once_counts_once(tmp_path, monkeypatch):
    source = folder(tmp_path / "data", 3, bad={0})
    together = threading.Barrier(2)

    def meet(path, reduction, **options):
        if path.name == "0000.png":
            together.wait(timeout=10)
        return decode_reduced(path, reduction, **options)

    monkeypatch.setattr(module, "decode_reduced", meet)
    with ImageReader(source, workers=2, log=tmp_path / "bad.jsonl") as reader:
        assert [identity(image) for image in reader.read_many([0, 0])] == [1, 1]
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bad=st.sets(st.integers(0, 19), max_size=9),
    workers=st.integers(1, 6),
    order=st.permutations(list(range(20))),
    delays=st.integers(0, 99),
)
def test_what_an_index_gives_depends_on_the_files_alone(tmp_path, bad, workers, order, delays):
    source = folder(tmp_path / "data", 20, bad)
    expected = [next(j % 20 for j in range(i, i + 20) if j % 20 not in bad) for i in order]
    jitter = np.random.default_rng(delays)
    pauses = {str(source.open(i)): float(jitter.uniform(0, 0.003)) for i in range(20)}

    def slow(path, reduction, **options):
        time.sleep(pauses[str(path)])
        return decode_reduced(path, reduction, **options)

    with pytest.MonkeyPatch.context() as patch, ImageReader(source, workers=workers) as reader:
        patch.setattr(module, "decode_reduced", slow)
        assert [identity(image) for image in reader.read_many(order)] == expected
        assert set(reader.bad) == bad


def test_too_many_bad_files_stop_the_run(tmp_path):
    source = folder(tmp_path / "data", 300, bad=set(range(100, 120, 2)))
    log = tmp_path / "bad.jsonl"
    with ImageReader(source, workers=1, max_bad_fraction=0.05, log=log) as reader:
        for index in [*range(90), *range(100, 118, 2)]:
            reader.read(index)  # up to nine never stop it, whatever their share
        with pytest.raises(OpsinError) as caught:
            reader.read(118)
    reason = "not a JPEG, PNG, WebP, GIF, BMP or TIFF file, it begins with b'no image'"
    # 90 good ones, nine that replaced a bad one, and the ten bad ones.
    assert str(caught.value) == (
        "10 of the 109 files tried cannot be decoded, more than data.max_bad_fraction = 0.05 allows, for example "
        f"0100.png ({reason}), 0102.png ({reason}), 0104.png ({reason}): mend or remove the bad files of "
        f"{tmp_path}/data ({log} lists all), or allow more with --data.max-bad-fraction."
    )


def test_the_share_is_of_distinct_files(tmp_path):
    source = folder(tmp_path / "data", 250, bad=set(range(0, 200, 20)))  # 10 of 250 is 4 %
    with ImageReader(source, workers=2, max_bad_fraction=0.05) as reader:
        for _ in range(2):
            reader.read_many(range(249, -1, -1))
        assert len(reader.bad) == 10
    with ImageReader(source, workers=2, max_bad_fraction=0.039) as reader:
        for _ in range(50):
            reader.read_many(range(241, 250))  # reading good ones again does not dilute the share
        with pytest.raises(OpsinError, match=r"10 of the 2\d\d files tried"):
            reader.read_many(range(240, -1, -1))


def test_no_replacement_within_a_hundred_files(tmp_path):
    source = folder(tmp_path / "data", 130, bad=set(range(10, 120)))
    with ImageReader(source, workers=1, max_bad_fraction=1.0) as reader:
        assert identity(reader.read(21)) == 120
        with pytest.raises(OpsinError, match=r"^none of 100 successive files can be decoded, for example 0010\.png"):
            reader.read(10)
        assert identity(reader.read(9)) == 9
    source = folder(tmp_path / "few", 3, bad={0, 1, 2})
    failure = pytest.raises(OpsinError, match="none of 3 successive files")
    with ImageReader(source, workers=2) as reader, failure as caught:
        reader.read_many([0, 1, 2])
    assert "allow more" not in str(caught.value)


def test_an_error_in_a_thread_reaches_the_caller_and_cancels_the_rest(tmp_path, monkeypatch):
    source = folder(tmp_path / "data", 50)
    started = []

    def fail(path, reduction, **options):
        started.append(path)
        time.sleep(0.01)
        raise MemoryError("out of memory")

    monkeypatch.setattr(module, "decode_reduced", fail)
    with ImageReader(source, workers=1) as reader:
        with pytest.raises(MemoryError):
            reader.read_many(range(50))
        time.sleep(0.2)
        assert len(started) < 10


def test_closing_drops_what_has_not_begun(tmp_path, monkeypatch):
    source = folder(tmp_path / "data", 50)
    started = []

    def slow(path, reduction, **options):
        started.append(path)
        time.sleep(0.02)

    monkeypatch.setattr(module, "decode_reduced", slow)
    before = threading.active_count()
    reader = ImageReader(source, workers=2)
    reader.submit(range(50))
    reader.close()
    assert len(started) < 10
    assert threading.active_count() == before


def test_a_log_that_cannot_be_written(tmp_path):
    source = folder(tmp_path / "data", 3, bad={0})
    (tmp_path / "file").touch()
    log = tmp_path / "file" / "bad.jsonl"
    with ImageReader(source, workers=1, log=log) as reader, pytest.raises(OpsinError) as caught:
        reader.read(0)
    assert str(caught.value) == (
        f"cannot log a bad file in {log} (a file is in the way): choose another output folder or free some space."
    )


def test_limits_and_reductions_are_passed_on(tmp_path):
    Image.new("RGB", (64, 48), (1, 0, 7)).save(tmp_path / "a.jpg")
    Image.new("RGB", (5, 5), (0, 0, 7)).save(tmp_path / "b.png")
    source = scan(tmp_path)
    with ImageReader(source, workers=2) as reader:
        pending = reader.submit([0, 1, 0], [lambda *size: {(48, 64): 2}[size]] * 2 + [lambda *_: 4])
        images, scales = zip(*pending.scaled(), strict=True)
        assert [image.shape[1:] for image in images] == [(24, 32), (5, 5), (12, 16)]
        assert scales == ((48, 64, 2), (5, 5, 1), (48, 64, 4))
        assert reader.submit([0]).result()[0].shape == (3, 48, 64)
    with ImageReader(source, workers=1, max_pixels=100) as reader:
        assert reader.read(0).shape == (3, 5, 5)
        assert "more than max_pixels 100" in reader.bad[0]


# Other channels


@pytest.mark.parametrize(("channels", "dtype"), [(1, "u1"), (1, "u2"), (4, "u2"), (13, "u2"), (13, "f4")])
def test_images_of_other_channels(tmp_path, channels, dtype):
    random = np.random.default_rng(0)
    images = [(random.random((channels, 9, 8 + i)) * (1 if dtype == "f4" else 255)).astype(dtype) for i in range(4)]
    (tmp_path / "data").mkdir()
    for i, image in enumerate(images):
        np.save(tmp_path / "data" / f"{i}.npy", image)
    with ImageReader(scan(tmp_path / "data"), workers=2, channels=channels) as reader:
        for found, image in zip(reader.read_many(range(4)), images, strict=True):
            assert np.array_equal(found.numpy(), image)
            assert found.numpy().dtype == image.dtype
        assert reader.bad == {}


def test_files_of_other_bands_are_bad_files(tmp_path):
    source = folder(tmp_path / "data", 12)
    with ImageReader(source, workers=2, channels=13) as reader, pytest.raises(OpsinError) as caught:
        reader.read_many(range(12))
    assert "it has 3 bands (RGB), and 13 are asked for" in str(caught.value)
    with ImageReader(source, workers=2, channels=1) as reader:
        gray = np.asarray(Image.open(source.open(5)).convert("L"))
        assert np.array_equal(reader.read(5).numpy(), gray[None])


def test_a_missing_package_is_no_bad_file(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "0.tif", np.zeros((13, 9, 8), np.uint16), photometric="minisblack")
    monkeypatch.setattr(bands, "find_spec", lambda _: None)
    bands._tifffile.cache_clear()
    with ImageReader(scan(tmp_path), workers=1, channels=13) as reader:
        with pytest.raises(OpsinError, match=r"pip install 'opsin\[bands\]'"):
            reader.read_many([0])
        assert reader.bad == {}
    bands._tifffile.cache_clear()
