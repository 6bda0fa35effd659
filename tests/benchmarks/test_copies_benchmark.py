import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import copies
import photos

A, B, VIEWS = "planted/a/00", "planted/a/01", "views/graf/"


def labels(*rows):
    family, kind = zip(*rows, strict=True)
    photo = np.array([name.split("/")[1] for name in family])
    return copies.Labels(np.array(family), np.array(kind), photo, np.arange(len(rows), 0, -1))


def pairs(n, *joined):
    found = np.zeros((n, n), bool)
    for a, b in joined:
        found[a, b] = found[b, a] = True
    return found


@pytest.fixture
def heap():
    """Two tiles of one photo with a copy of each kind each, and a pair of views."""
    kinds = ("original", *photos.PLANTED)
    return labels(*((family, kind) for family in (A, B) for kind in kinds), (VIEWS, "views"), (VIEWS, "views"))


def test_pairs_are_judged_by_family(heap):
    n, per = len(heap.family), 1 + len(photos.PLANTED)
    first = photos.PLANTED.index("resized") + 1
    found = copies.judged(pairs(n, (0, first), (0, per), (0, per + first), (n - 2, n - 1)), heap)
    assert (found["pairs"], found["precision"], found["wrong pairs"]) == (4, 0.5, 2)
    assert (found["of these within one photo"], found["precision between photos"]) == (2, 1.0)
    assert found["wrong pairs of originals"] == 1
    # both copies of the kind are near the first original, and one of them is of it
    assert found["kinds"]["resized"] == {"precision": 0.5, "recall": 0.5}
    assert found["kinds"]["flipped"] == {"precision": None, "recall": 0.0}
    assert found["real"]["views"] == {"families": 1, "recall": 1.0, "kept as one": 1}


def test_components_count_families_that_are_one_and_those_that_are_lost(heap):
    n, per = len(heap.family), 1 + len(photos.PLANTED)
    star = [(0, i) for i in range(1, per)]
    apart = copies.judged(pairs(n, *star), heap)
    assert (apart["families"], apart["kept as one"], apart["lost"], apart["largest component"]) == (2, 1, 0, per)
    second = [(0, i) for i in range(per, 2 * per)]
    merged = copies.judged(pairs(n, *star, *second), heap)
    assert (merged["kept as one"], merged["lost"], merged["largest component"]) == (0, 1, 2 * per)
    known = copies.judged(pairs(n), heap, component=np.zeros(n, int), kept=np.arange(n) == 0)
    assert (known["lost"], known["kept images"]) == (2, 1)


def test_the_best_threshold_is_the_lowest_that_is_precise():
    two = labels((A, "original"), (A, "text"), (B, "original"), (B, "text"))
    nearness = np.zeros((4, 4))
    for a, b, near in ((0, 1, 0.9), (2, 3, 0.6), (0, 2, 0.5)):
        nearness[a, b] = nearness[b, a] = near
    least = copies.best(nearness, two)
    assert least == 0.6
    assert copies.pairs_from(nearness, least).sum() == 4
    nearness[0, 2] = nearness[2, 0] = 0.95
    assert copies.best(nearness, two) == float("inf")
    assert not copies.pairs_from(nearness, float("inf")).any()


def test_equally_near_pairs_are_above_a_threshold_together():
    two = labels((A, "original"), (A, "text"), (B, "original"))
    assert copies.best(np.full((3, 3), 0.5), two) == float("inf")


def test_distances_of_hashes_are_those_of_imagehash(tmp_path):
    import imagehash

    files = []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels).save(files[-1])
    found = copies.hashes(files)["phash"]
    ours = [imagehash.phash(Image.open(file)) for file in files]
    assert [[-(a - b) for b in ours] for a in ours] == found.tolist()


def test_tiles_share_no_pixel():
    photo = Image.fromarray(np.arange(120 * 160).reshape(120, 160).astype(np.int32), "I")
    seen = [np.asarray(tile).ravel() for tile in photos.tiles(photo, (4, 3))]
    assert len(seen) == 12
    assert len(np.unique(np.concatenate(seen))) == sum(map(len, seen)) == 12 * 32 * 32
    assert len(list(photos.tiles(photo.transpose(Image.Transpose.ROTATE_90), (4, 3)))) == 12


def test_a_heap_is_made_of_packages_and_the_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # nothing can be fetched
    monkeypatch.setattr(photos, "MEASURED", {"mate-backgrounds": "Aqua", "darknet": "dog"})
    monkeypatch.setattr(photos, "REAL", (("sizes", "mate-backgrounds", r"abstract/(Elephants)\w*\.jpg$"),))
    folder = tmp_path / "packages" / "mate-backgrounds" / "abstract"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    for name in ("Aqua", "Elephants", "Elephants_3840x2160"):
        Image.fromarray(noise).save(folder / f"{name}.jpg")
    photos.prepared("measured", tmp_path, tmp_path / "packages")
    files = sorted(path for path in (tmp_path / "measured/heap").rglob("*.*") if path.is_file())
    assert len(files) == 12 * (1 + len(photos.PLANTED)) + 2
    assert len(list((tmp_path / "measured/originals").iterdir())) == 12
    assert (tmp_path / "measured/missing.json").read_text() == '["darknet"]'
    known = copies.Labels.of(list(map(str, files)), np.ones(len(files), np.int64))
    assert len({*known.family.tolist()}) == 13
    assert {*known.kind.tolist()} == {"original", "sizes", *photos.PLANTED}


def test_of_textures_one_of_each_name_is_fitted_on(tmp_path, monkeypatch):
    archive = tmp_path / "ufoai-textures/usr/share/games/ufoai/base/0textures.pk3"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("wall1.jpg", "wall2.jpg", "wall1_nm.jpg", "floor.png", "notes.txt"):
            file.writestr(f"textures/{name}", b"x")
    (tmp_path / "lomiri-wallpapers-16.04").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    photos.fitted_photos(tmp_path, out)
    assert sorted(path.suffix for path in out.iterdir()) == [".jpg", ".png"]
