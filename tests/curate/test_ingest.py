import hashlib
import json

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import ENGINE, PHOTOS, photo, photos, tiles
from PIL import Image, ImageFilter

from opsin.curate import ingest as module
from opsin.curate.engine import Engine
from opsin.curate.ingest import SCHEMA, Ingest, images_table, ingest
from opsin.curate.looks import eight_bits, looks, perceptual_hash, reduction_to, shrunk
from opsin.errors import OpsinError


def tensor(image):
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def whole_table(out):
    return pa.concat_tables(pq.read_table(file) for file in sorted(out.glob("*.parquet")))


def rows(out):
    return {row["path"].rpartition("/")[2]: row for row in whole_table(out).to_pylist()}


def bits(a, b):
    return (a ^ b).bit_count()


def heap(folder):
    """Photos, and junk of every kind."""
    photos(folder)
    Image.new("RGB", (100, 100), "red").save(folder / "flat.png")
    photo("coffee").resize((200, 31)).save(folder / "low.png")
    photo("coffee").resize((401, 100)).save(folder / "wide.png")
    photo("coffee").resize((100, 401)).save(folder / "tall.png")
    photo("coffee").resize((400, 100)).save(folder / "justwide.png")
    whole = (folder / "coffee.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:3000])
    (folder / "text.jpg").write_bytes(b"<html>not found</html>")
    (folder / "empty.png").write_bytes(b"")
    return folder


def test_every_image_has_a_row_and_every_dropped_one_a_reason(tmp_path):
    folder = heap(tmp_path / "heap")
    facts = ingest(ENGINE, [str(folder)], tmp_path / "images", Ingest(part=5))
    found = rows(tmp_path / "images")
    kept = {f"{name}.jpg" for name in PHOTOS} | {"justwide.png"}
    assert {name for name, row in found.items() if row["reason"] is None} == kept
    assert len(found) == facts["images"] == 12
    assert facts["kept"] == 5
    assert found["low.png"]["reason"] == "smaller than 32 pixels"
    assert found["wide.png"]["reason"] == found["tall.png"]["reason"] == "longer side more than 4 times the shorter"
    assert found["flat.png"]["reason"] == "near-constant"
    assert found["empty.png"]["reason"] == "unreadable: the file is empty"
    assert found["cut.jpg"]["reason"].startswith("unreadable: image file is truncated")
    assert facts["reasons"] == {
        "unreadable": 3,
        "longer side more than 4 times the shorter": 2,
        "near-constant": 1,
        "smaller than 32 pixels": 1,
    }
    for name, row in found.items():
        content = (folder / name).read_bytes()
        assert row["hash"] == hashlib.sha256(content).digest()
        assert row["bytes"] == len(content)
        assert row["path"] == str(folder / name)
    assert (found["wide.png"]["width"], found["wide.png"]["height"], found["wide.png"]["format"]) == (401, 100, "png")
    assert found["text.jpg"]["width"] is None
    table = images_table(tmp_path / "images")
    assert table.schema.equals(SCHEMA)
    assert [part.rows for part in table.parts] == [5, 5, 2]


def test_sources_follow_one_another_and_are_numbered(tmp_path, monkeypatch):
    tiles(tmp_path / "a", range(3))
    tiles(tmp_path / "b", range(3, 8))
    monkeypatch.chdir(tmp_path)
    facts = ingest(ENGINE, ["a", "b"], tmp_path / "images", Ingest(part=4))
    monkeypatch.chdir("/")
    table = whole_table(tmp_path / "images")
    assert table["source"].to_pylist() == [0] * 3 + [1] * 5
    assert table["index"].to_pylist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert [one["spec"] for one in facts["sources"]] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert [one["images"] for one in facts["sources"]] == [3, 5]


def test_a_stopped_ingest_goes_on_and_ends_alike(tmp_path):
    folder, out = heap(tmp_path / "heap"), tmp_path / "images"
    facts = ingest(ENGINE, [str(folder)], out, Ingest(part=3))
    whole = {file.name: file.read_bytes() for file in out.glob("*.parquet")}
    assert len(whole) == 4
    made = json.loads((out / "_step.json").read_text())
    (out / "_step.json").write_text(json.dumps({key: made[key] for key in ("step", "settings", "inputs")}))
    (out / "part-00000001.parquet").unlink()
    (out / "part-00000002.parquet.partial").write_bytes(b"half")
    kept = (out / "part-00000000.parquet").stat().st_mtime_ns
    assert ingest(ENGINE, [str(folder)], out, Ingest(part=3)) == facts
    assert {file.name: file.read_bytes() for file in out.glob("*.parquet")} == whole
    assert (out / "part-00000000.parquet").stat().st_mtime_ns == kept


def test_threads_do_not_show(tmp_path):
    folder = heap(tmp_path / "heap")
    for threads in (1, 2):
        ingest(Engine(threads=threads), [str(folder)], tmp_path / f"{threads}", Ingest(part=7))
    assert whole_table(tmp_path / "1").equals(whole_table(tmp_path / "2"))


def test_a_finished_ingest_reads_no_image_again(tmp_path, monkeypatch):
    folder = tiles(tmp_path / "heap", range(3))
    facts = ingest(ENGINE, [str(folder)], tmp_path / "images", Ingest())
    monkeypatch.setattr(module, "decode_reduced", None)
    assert ingest(ENGINE, [str(folder)], tmp_path / "images", Ingest()) == facts


def test_another_heap_in_the_same_folder_is_refused(tmp_path):
    folder = tiles(tmp_path / "heap", range(3))
    ingest(ENGINE, [str(folder)], tmp_path / "images", Ingest())
    tiles(folder, [7])
    with pytest.raises(OpsinError, match="was made with other sources"):
        ingest(ENGINE, [str(folder)], tmp_path / "images", Ingest())


def test_a_source_that_changes_meanwhile_is_noticed_by_the_workers(tmp_path):
    folder = tiles(tmp_path / "heap", range(3))
    found, _ = module.Heap.scanned([str(folder)], tmp_path / "listing")
    tiles(folder, [7])
    with pytest.raises(OpsinError, match="changed while it was being read"):
        found.source(0)


def test_an_empty_folder_and_no_folder_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpsinError, match="is empty: give a folder with images"):
        ingest(ENGINE, [str(tmp_path / "empty")], tmp_path / "images", Ingest())
    with pytest.raises(OpsinError, match="no images are given"):
        ingest(ENGINE, [], tmp_path / "images", Ingest())
    (tmp_path / "urls.txt").write_text("# mine\nhttp://localhost/a.jpg\n")
    with pytest.raises(OpsinError, match=r"urls\.txt lists URLs: fetch"):
        ingest(ENGINE, [str(tmp_path / "urls.txt")], tmp_path / "images", Ingest())


def test_a_heap_of_junk_is_told_and_its_reasons_stay(tmp_path):
    folder = tmp_path / "heap"
    folder.mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
    for _ in range(2):
        with pytest.raises(OpsinError, match=r"all 2 images are dropped, 2 of them as 'near-constant'"):
            ingest(ENGINE, [str(folder)], tmp_path / "images", Ingest())
    assert {row["reason"] for row in rows(tmp_path / "images").values()} == {"near-constant"}


def test_credentials_do_not_get_into_tables(tmp_path):
    with pytest.raises(OpsinError, match=r"s3://heap/a was given with credentials") as caught:
        ingest(ENGINE, ["s3://me:secret@heap/a"], tmp_path / "images", Ingest())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"part": 0}, {"min_side": 0}, {"max_aspect": 0.5}, {"min_spread": float("nan")}])
def test_settings_out_of_range_are_told(wrong):
    with pytest.raises(OpsinError, match=next(iter(wrong))):
        Ingest(**wrong)


def test_blurred_photos_are_dropped_when_asked(tmp_path):
    folder = photos(tmp_path / "heap")
    photo("coffee").filter(ImageFilter.GaussianBlur(20)).save(folder / "blurred.jpg")
    facts = ingest(ENGINE, [str(folder)], tmp_path / "images", Ingest(min_sharpness=50))
    assert facts["reasons"] == {"blurred": 1}
    assert rows(tmp_path / "images")["blurred.jpg"]["reason"] == "blurred"
    assert ingest(ENGINE, [str(folder)], tmp_path / "all", Ingest())["kept"] == 5


def write_hook(tmp_path, monkeypatch, name, body):
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    return f"{name}:judge"


def test_a_filter_of_the_user_drops_with_its_own_reason(tmp_path, monkeypatch):
    hook = write_hook(
        tmp_path,
        monkeypatch,
        "mean_filter",
        "import torch\n"
        "def judge(images):\n"
        "    assert all(image.dtype == torch.uint8 and image.shape[0] == 3 for image in images)\n"
        "    assert all(min(image.shape[1:]) <= 256 for image in images)\n"
        "    means = [image.float().mean() for image in images]\n"
        "    return [f'dark: {mean:.0f}' if mean < 100 else None for mean in means]\n",
    )
    folder = heap(tmp_path / "heap")
    facts = ingest(ENGINE, [str(folder)], tmp_path / "images", Ingest(drop_hook=hook))
    dark = {name for name in PHOTOS if np.asarray(photo(name)).mean() < 100}
    assert dark
    assert facts["reasons"]["dark"] == sum(
        row["reason"][:4] == "dark" for row in rows(tmp_path / "images").values() if row["reason"]
    )
    for name in PHOTOS:
        reason = rows(tmp_path / "images")[f"{name}.jpg"]["reason"]
        assert (reason is not None and reason.startswith("dark: ")) == (name in dark)
    assert rows(tmp_path / "images")["flat.png"]["reason"] == "near-constant"  # judged before the hook


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def judge(images): return [None]", "was given 3 images and returned a list of 1"),
        ("def judge(images): return 'dark'", "returned a str:"),
        ("def judge(images): return [False] * len(images)", "returned False for"),
        ("def judge(images): return [''] * len(images)", "returned '' for"),
        ("def judge(images): raise RuntimeError('no model')", r"failed on 3 images .* \(RuntimeError: no model\)"),
        ("def other(images): ...", "has no function 'judge'"),
        ("import nothing_like_it", "cannot import"),
    ],
)
def test_a_wrong_hook_is_told_in_a_sentence(tmp_path, monkeypatch, body, said, request):
    name = f"wrong_{abs(hash(request.node.name))}"
    hook = write_hook(tmp_path, monkeypatch, name, body)
    with pytest.raises(OpsinError, match=said) as caught:
        ingest(ENGINE, [str(tiles(tmp_path / "heap", range(3)))], tmp_path / "images", Ingest(drop_hook=hook))
    assert "\n" not in str(caught.value)


def test_a_hook_must_name_module_and_function(tmp_path):
    with pytest.raises(OpsinError, match="not of the form module:function"):
        ingest(ENGINE, [str(tiles(tmp_path / "heap", range(3)))], tmp_path / "images", Ingest(drop_hook="judge"))


@pytest.mark.parametrize("name", PHOTOS)
def test_the_hash_is_that_of_imagehash(name):
    image = photo(name)
    assert perceptual_hash(image.convert("L")) == int(str(imagehash.phash(image)), 16)


@given(st.integers(0, 2**32 - 1), st.integers(3, 90), st.integers(3, 90))
@settings(max_examples=25)
def test_the_hash_is_that_of_imagehash_on_anything(seed, width, height):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert bits(looks(tensor(image)).hash, int(str(imagehash.phash(image)), 16)) <= 1  # of nearly equal frequencies


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 255))
@settings(max_examples=25)
def test_any_size_has_looks(width, height, value):
    seen = looks(torch.full((3, height, width), value, dtype=torch.uint8))
    assert seen.spread == seen.sharpness == 0
    assert 0 <= seen.hash < 2**64


@pytest.mark.parametrize("name", PHOTOS)
def test_looks_are_those_of_the_picture_and_not_of_its_size(name, tmp_path):
    image = photo(name)
    seen = looks(tensor(image))
    half = looks(tensor(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)))
    assert bits(seen.hash, half.hash) <= 2
    assert half.sharpness == pytest.approx(seen.sharpness, rel=0.25)
    assert half.spread == pytest.approx(seen.spread, rel=0.05)
    soft = looks(tensor(image.filter(ImageFilter.GaussianBlur(12))))
    assert soft.sharpness < 0.1 * seen.sharpness


def test_a_reduced_jpeg_looks_like_the_whole_one(tmp_path):
    folder = tmp_path / "heap"
    folder.mkdir()
    photo("astronaut").resize((1100, 1100), Image.Resampling.LANCZOS).save(folder / "large.jpg", quality=95)
    assert reduction_to(128, 1100, 1100) == 8
    ingest(ENGINE, [str(folder)], tmp_path / "images", Ingest())
    row = rows(tmp_path / "images")["large.jpg"]
    with Image.open(folder / "large.jpg") as image:
        whole = looks(tensor(image))
    assert bits(row["phash"], whole.hash) <= 2
    assert row["sharpness"] == pytest.approx(whole.sharpness, rel=0.25)
    assert (row["width"], row["height"]) == (1100, 1100)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 512))
def test_a_reduction_is_the_largest_that_leaves_the_side(height, width, side):
    factor = reduction_to(side, height, width)
    short = min(height, width)
    assert factor == 1 or short // factor >= side
    assert factor == 8 or short // (2 * factor) < side


def test_bands_of_more_bits_become_8(tmp_path):
    wide = torch.tensor([0, 256, 65535], dtype=torch.uint16).reshape(3, 1, 1)
    assert eight_bits(wide).flatten().tolist() == [0, 1, 255]
    assert eight_bits(torch.tensor([0, 0.5, 1.0]).reshape(3, 1, 1)).flatten().tolist() == [0, 128, 255]
    (tmp_path / "heap").mkdir()
    array = np.random.default_rng(0).integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    np.save(tmp_path / "heap/a.npy", array)
    assert ingest(ENGINE, [str(tmp_path / "heap")], tmp_path / "images", Ingest())["kept"] == 1


def test_a_decompression_bomb_is_not_decoded(tmp_path):
    folder = tiles(tmp_path / "heap", range(2))
    photo("coffee").save(folder / "bomb.png")
    facts = ingest(ENGINE, [str(folder)], tmp_path / "images", Ingest(max_pixels=50_000))
    assert facts["reasons"] == {"unreadable": 1}
    assert "more than max_pixels" in rows(tmp_path / "images")["bomb.png"]["reason"]


def test_what_the_hook_sees_is_never_enlarged():
    assert shrunk(torch.zeros(3, 512, 2048, dtype=torch.uint8), 256).shape == (3, 256, 1024)
    assert shrunk(torch.zeros(3, 20, 400, dtype=torch.uint8), 256).shape == (3, 20, 400)
