import io
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin.data import listing, sources
from opsin.data.files import Store, locate
from opsin.data.listing import Listing
from opsin.data.sources import Source, scan, summarise
from opsin.errors import OpsinError


def picture(path, size=(8, 6), kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(path, kind)
    return path


def touch(root, *names):
    """Files whose content does not matter to a scan."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))


def paths(source):
    return [source.name(i) for i in range(len(source))]


def message(function, *arguments):
    with pytest.raises(OpsinError) as caught:
        function(*arguments)
    return str(caught.value)


def test_every_extension_in_any_case_at_any_depth(tmp_path):
    endings = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"]
    names = [f"{i}.{ending}" for i, ending in enumerate(endings)]
    names += ["Z.JPG", "photo.JPEG", "a/b/c/d/e.Png", "two.dots.TIF", "space name.jpg", "straße/写真.jpg"]
    touch(tmp_path, *names, "readme.md", "x.jpg.txt", "jpg", "noext", ".hidden.jpg", ".cache/a.jpg", "a/.git/b.png")
    source = scan(tmp_path)
    assert paths(source) == sorted(names, key=os.fsencode)
    assert len(source) == len(names)
    assert source.root == str(tmp_path)
    assert source.open(0) == tmp_path / source.name(0)
    assert source.labels is None
    assert source.classes == []
    assert source.unreadable == []
    assert source.total_bytes == sum(len(name.encode()) for name in names)


def test_order_is_that_of_bytes_and_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    names = [
        "B.jpg",
        "a.jpg",
        "a/z.jpg",
        "a-b/z.jpg",
        "é.jpg",
        "Z/1.jpg",
        "z10.jpg",
        "z9.jpg",
        os.fsdecode(b"\xff.jpg"),
    ]
    touch(tmp_path, *names)
    expected = scan(tmp_path)
    assert paths(expected) == sorted(names, key=os.fsencode)
    real = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = list(real(path))[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert paths(scan(tmp_path)) == paths(expected)
    assert scan(tmp_path).fingerprint == expected.fingerprint


def test_a_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    touch(tmp_path, name)
    source = scan(tmp_path, tmp_path.parent / "cache")
    assert paths(source) == [name]
    assert source.open(0).read_bytes() == b"caf\xe9.jpg"
    assert paths(scan(tmp_path, tmp_path.parent / "cache")) == [name]


def test_imagenet_class_folders_give_labels(tmp_path):
    for wnid in ("n01440764", "n01443537", "n15075141"):
        touch(tmp_path / "train", *(f"{wnid}/{wnid}_{i}.JPEG" for i in range(3)))
    touch(tmp_path / "train", "n01443537/deeper/x.JPEG", "zz_empty/readme.txt", "LOC_val_solution.csv")
    source = scan(str(tmp_path / "train"))
    assert source.classes == ["n01440764", "n01443537", "n15075141"]
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    for path, label in zip(paths(source), source.labels, strict=True):
        assert path.startswith(source.classes[label] + "/")


def test_classes_are_numbered_in_byte_order_even_where_paths_are_not(tmp_path):
    # "-" sorts before "/", so the paths of "a-b" come before those of "a".
    touch(tmp_path, "a/1.jpg", "a-b/1.jpg")
    source = scan(tmp_path)
    assert paths(source) == ["a-b/1.jpg", "a/1.jpg"]
    assert source.classes == ["a", "a-b"]
    assert source.labels.tolist() == [1, 0]


def test_flat_validation_folder_and_mixtures_have_no_labels(tmp_path):
    touch(tmp_path, *(f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 5)))
    assert scan(tmp_path).labels is None
    touch(tmp_path, "n01440764/a.JPEG")
    source = scan(tmp_path)
    assert len(source) == 5
    assert source.labels is None
    assert source.classes == []


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    touch(data, "a/1.jpg", "z/2.jpg")
    touch(other, "3.jpg", "deep/4.jpg")
    (data / "loop").symlink_to(data)
    (data / "a" / "up").symlink_to("..")
    (data / "self").symlink_to("self")
    (data / "b").symlink_to(other)
    (data / "c").symlink_to(other)
    (other / "back").symlink_to(data)
    (data / "0").symlink_to(data / "z")
    source = scan(data)
    assert paths(source) == ["a/1.jpg", "b/3.jpg", "b/deep/4.jpg", "z/2.jpg"]
    assert [path for path, _ in source.unreadable] == ["self"]


def test_a_folder_reached_through_two_links_counts_under_the_first(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    touch(data, "1.jpg")
    touch(other, "sub/2.jpg")
    for first, second in ((other, other / "sub"), (other / "sub", other)):
        (data / "l1").symlink_to(first)
        (data / "l2").symlink_to(second)
        expected = "l1/sub/2.jpg" if first == other else "l1/2.jpg"
        assert paths(scan(data)) == ["1.jpg", expected]
        (data / "l1").unlink()
        (data / "l2").unlink()


def test_links_to_files_count_and_dangling_ones_are_reported(tmp_path, caplog):
    touch(tmp_path, "data/a.jpg", "real.jpg")
    (tmp_path / "data" / "b.jpg").symlink_to(tmp_path / "real.jpg")
    (tmp_path / "data" / "c.jpg").symlink_to(tmp_path / "gone.jpg")
    source = scan(tmp_path / "data")
    assert paths(source) == ["a.jpg", "b.jpg"]
    assert source.unreadable == [("c.jpg", "no such file or directory")]
    assert "1 entries could not be read, first" in caplog.text
    assert "data/c.jpg (no such file or directory)" in caplog.text


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    touch(tmp_path, "album.jpg/a.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert paths(scan(tmp_path)) == ["album.jpg/a.png"]


def test_an_unreadable_folder_is_reported_and_nothing_is_cached(tmp_path, monkeypatch, caplog):
    data, cache = tmp_path / "data", tmp_path / "cache"
    touch(data, "a/1.jpg", "b/2.jpg")
    real = os.scandir

    def refusing(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    source = scan(data, cache)
    assert paths(source) == ["a/1.jpg"]
    assert source.unreadable == [("b", "permission denied")]
    assert "b (permission denied)" in caplog.text
    monkeypatch.undo()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    assert paths(scan(data, cache)) == ["a/1.jpg", "b/2.jpg"]

    monkeypatch.setattr(os, "scandir", refuse)
    assert message(scan, data) == (
        f"found no images in {data}, and 1 of its entries cannot be read, first {data} (permission denied): check the "
        "permissions."
    )


def test_text_list(tmp_path):
    touch(tmp_path, "lists/near.jpg", "lists/sub/x.png", "elsewhere/far", "lists/#odd.jpg", "lists/straße.jpg")
    far = tmp_path / "elsewhere" / "far"
    listed = tmp_path / "lists" / "train.TXT"
    text = f"\ufeff# a comment\n\nsub/x.png\r\n  near.jpg  \n./#odd.jpg\n{far}\nstraße.jpg\nnear.jpg"
    listed.write_text(text, encoding="utf-8", newline="")
    source = scan(listed)
    assert paths(source) == sorted([str(far), "./#odd.jpg", "near.jpg", "near.jpg", "straße.jpg", "sub/x.png"])
    assert source.root == str(tmp_path / "lists")
    assert source.open(0).is_file()
    assert all(source.open(i).is_file() for i in range(len(source)))
    assert source.labels is None


def test_a_list_may_name_files_that_are_not_utf8(tmp_path):
    touch(tmp_path, os.fsdecode(b"caf\xe9.jpg"))
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\n")
    assert scan(tmp_path / "list.txt").open(0).is_file()


def test_errors_say_what_where_and_how_to_mend(tmp_path):
    touch(tmp_path, "photo.jpg", "empty.txt", "npz/a.npz", "npz/b/c.npz", "npz/d.CSV", "npz/Makefile", "hidden/.a.jpg")
    (tmp_path / "void" / "deeper").mkdir(parents=True)
    assert message(scan, tmp_path / "nowhere") == (
        f"no data at {tmp_path}/nowhere (no such file or directory): give a folder of images or a .txt list of them."
    )
    assert message(scan, tmp_path / "photo.jpg") == (
        f"{tmp_path}/photo.jpg is neither a folder nor a .txt list of image paths nor a shard (.tar, .parquet, "
        ".arrow): give one of these."
    )
    for empty in ("void", "hidden"):
        assert message(scan, tmp_path / empty) == (
            f"{tmp_path}/{empty} is empty: give a folder with images in it, or a .txt list that names some."
        )
    assert message(scan, tmp_path / "npz") == (
        f"{tmp_path}/npz holds files but no images (seen: 2 .npz, 1 without an ending, 1 .csv): give a folder with "
        ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .npy files."
    )
    listed = tmp_path / "list.txt"
    for content in ("", "# nothing\n\n"):
        listed.write_text(content)
        assert "list.txt is empty" in message(scan, listed)
    listed.write_text("photo.jpg\nsub/gone.jpg\nnpz\n/also/gone.jpg\nzero\0byte.jpg\n")
    assert message(scan, listed) == (
        f"4 of the 5 files that {listed} lists do not exist, first 'sub/gone.jpg': correct the paths (relative ones "
        "start from the list's folder)."
    )
    listed.write_text("photo.jpg")
    touch(tmp_path, "file")
    assert message(scan, listed, tmp_path / "file" / "cache") == (
        f"cannot keep the list of images in {tmp_path}/file/cache (not a directory): choose another output folder or "
        "free some space."
    )


def test_arrays_are_images_where_no_others_are(tmp_path):
    touch(tmp_path, "a/1.npy", "a/2.NPY", "a/x.csv", "b/3.npy", "b/.4.npy")
    source = scan(tmp_path, tmp_path / ".kept")
    assert [source.name(i) for i in range(len(source))] == ["a/1.npy", "a/2.NPY", "b/3.npy"]
    assert source.classes == ["a", "b"]
    assert scan(tmp_path, tmp_path / ".kept").fingerprint == source.fingerprint
    assert len(scan(f"{tmp_path}/a/*.npy")) == 1
    touch(tmp_path, "b/5.tif")
    source = scan(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["b/5.tif"]
    assert len(scan(tmp_path / "a")) == 2
    (tmp_path / "list.txt").write_text("b/5.tif\na/1.npy\n")
    assert len(scan(tmp_path / "list.txt")) == 2  # a list means what it says


def test_a_summary_of_files_of_bands(tmp_path):
    np.save(tmp_path / "0.npy", np.zeros((13, 20, 30), np.uint16))
    np.save(tmp_path / "1.npy", np.zeros((40, 50, 13), np.uint16))
    np.save(tmp_path / "2.npy", np.zeros((40, 50, 12), np.uint16))
    summary = summarise(scan(tmp_path), workers=1, channels=13)
    assert summary.formats == {"npy": 2}
    assert (summary.width[2], summary.height[2]) == (50, 40)
    [(name, reason)] = summary.unreadable
    assert name == "2.npy"
    assert "and 13 bands are asked for" in reason


def test_fingerprint_sees_names_and_sizes_but_not_the_place(tmp_path):
    for place in ("here", "there"):
        touch(tmp_path / place, "a/1.jpg", "a/2.jpg")
    here, there = scan(tmp_path / "here"), scan(tmp_path / "there")
    assert here.fingerprint == there.fingerprint
    assert len(here.fingerprint) == 64
    (tmp_path / "there/a/2.jpg").write_bytes(b"longer than before")
    resized = scan(tmp_path / "there").fingerprint
    (tmp_path / "there/a/2.jpg").write_bytes(b"a/2.jpg")
    assert scan(tmp_path / "there").fingerprint == here.fingerprint
    (tmp_path / "there/a/2.jpg").rename(tmp_path / "there/a/3.jpg")
    renamed = scan(tmp_path / "there").fingerprint
    assert len({here.fingerprint, resized, renamed}) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text("ab0 -é", min_size=1, max_size=4), st.integers(0, 99)), unique_by=lambda f: f[0]))
def test_fingerprint_depends_on_the_set_of_files_only(files):
    def fingerprint(files):
        listing = Listing([(f"{name}.jpg", size) for name, size in files])
        return sources._source(Store(locate("/data")), listing, True).fingerprint

    assert fingerprint(files) == fingerprint(files[::-1])
    if files:
        (name, size), *rest = files
        assert fingerprint(files) != fingerprint(rest)
        assert fingerprint(files) != fingerprint([(name, size + 1), *rest])


@pytest.fixture
def walks(monkeypatch):
    """How often a folder or list is really read."""
    count = []
    for name in ("walk", "read_list"):
        real = getattr(listing, name)
        monkeypatch.setattr(listing, name, lambda *given, real=real: count.append(given) or real(*given))
    return count


def same(a: Source, b: Source):
    assert (a.root, paths(a), a.classes, a.fingerprint, a.total_bytes) == (
        b.root,
        paths(b),
        b.classes,
        b.fingerprint,
        b.total_bytes,
    )
    assert np.array_equal(a.labels, b.labels)


def test_the_cache_is_used_while_nothing_changes(tmp_path, walks):
    data, cache = tmp_path / "data", tmp_path / "run" / "cache"
    touch(data, "x/1.jpg", "y/deep/2.jpg", "y/3.jpg")
    before = {path: path.stat().st_mtime_ns for path in [data, *data.rglob("*")]}
    first = scan(data, cache)
    same(first, scan(data, cache))
    same(first, scan(data, cache))
    assert len(walks) == 1
    assert len(list(cache.iterdir())) == 1
    assert {path: path.stat().st_mtime_ns for path in [data, *data.rglob("*")]} == before
    same(first, scan(data))
    assert len(walks) == 2


@pytest.mark.parametrize(
    "change", ["add", "remove", "rename", "folder", "deep", "linked", "same tick", "remove folder"]
)
def test_the_cache_is_dropped_when_something_changes(tmp_path, change, walks):
    data, cache = tmp_path / "data", tmp_path / "cache"
    touch(data, "x/1.jpg", "y/deep/2.jpg")
    touch(tmp_path, "linked/a.jpg")
    (data / "link").symlink_to(tmp_path / "linked")
    old = time.time() - 100
    for path in [data, *data.rglob("*"), tmp_path / "linked"]:
        os.utime(path, (old, old))
    assert len(scan(data, cache)) == 3
    if change == "add":
        touch(data, "x/4.jpg")
    elif change == "remove":
        (data / "x/1.jpg").unlink()
    elif change == "rename":
        (data / "x/1.jpg").rename(data / "x/5.jpg")
    elif change == "folder":
        touch(data, "new/6.jpg")
    elif change == "deep":
        touch(data, "y/deep/7.jpg")
    elif change == "linked":
        touch(tmp_path, "linked/8.jpg")
    elif change == "same tick":
        touch(data, "x/9.jpg")
        os.utime(data / "x", (old, old))
    else:
        (data / "y/deep/2.jpg").unlink()
        (data / "y/deep").rmdir()
        os.utime(data / "y", (old, old))
    same(scan(data, cache), scan(data))
    assert len(walks) == 3
    same(scan(data, cache), scan(data))
    assert len(walks) == 4


def test_a_cached_list_is_read_again_when_it_changes(tmp_path, walks):
    touch(tmp_path, "a.jpg", "b.jpg")
    listed, cache = tmp_path / "list.txt", tmp_path / "cache"
    listed.write_text("a.jpg\n")
    same(scan(listed, cache), scan(listed, cache))
    assert len(walks) == 1
    listed.write_text("a.jpg\nb.jpg\n")
    assert len(scan(listed, cache)) == 2


def test_caches_of_several_sources_do_not_mix(tmp_path):
    cache = tmp_path / "cache"
    for name in ("one", "two"):
        touch(tmp_path, f"{name}/{name}.jpg")
        os.utime(tmp_path / name, (1e9, 1e9))
    for _ in range(2):
        assert paths(scan(tmp_path / "one", cache)) == ["one.jpg"]
        assert paths(scan(tmp_path / "two", cache)) == ["two.jpg"]


def test_a_damaged_cache_is_replaced(tmp_path, walks):
    touch(tmp_path, "data/a.jpg")
    cache = tmp_path / "cache"
    scan(tmp_path / "data", cache)
    (kept,) = cache.iterdir()
    for content in (b"", b"PAR1 nonsense", kept.read_bytes()[:-20]):
        kept.write_bytes(content)
        assert paths(scan(tmp_path / "data", cache)) == ["a.jpg"]
    assert len(walks) == 4
    scan(tmp_path / "data", cache)
    assert len(walks) == 4
    assert list(cache.iterdir()) == [kept]


def test_nothing_is_drawn_unless_stderr_is_a_terminal(tmp_path, capsys):
    picture(tmp_path / "a.jpg")
    summarise(scan(tmp_path), workers=1)
    assert capsys.readouterr() == ("", "")


def test_progress_is_drawn_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    picture(tmp_path / "a.jpg")
    for shown in (True, False):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        summarise(scan(tmp_path, progress=shown), workers=1, progress=shown)
        assert ("scanning" in terminal.getvalue()) == shown
        assert ("reading headers" in terminal.getvalue()) == shown


def test_a_large_folder_is_scanned_quickly(tmp_path):
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for file in range(250):
            (tmp_path / str(folder) / f"{file}.jpg").touch()
    start = time.perf_counter()
    assert len(scan(tmp_path)) == 5000
    assert time.perf_counter() - start < 2


def test_summary(tmp_path):
    for i, width in enumerate((10, 20, 1500)):
        picture(tmp_path / "cats" / f"{i}.jpg", (width, 2 * width))
    picture(tmp_path / "dogs" / "wrong.jpg", (30, 7), "PNG")
    touch(tmp_path, "dogs/text.jpg", "cats/none.png")
    (tmp_path / "cats/none.png").write_bytes(b"")
    source = scan(tmp_path)
    summary = summarise(source, workers=2)
    assert summary.images == summary.read == 6
    assert summary.classes == 2
    assert summary.formats == {"jpeg": 3, "png": 1}
    assert summary.width == (10, 30, 1500)
    assert summary.height == (7, 40, 3000)
    assert summary.total_bytes == source.total_bytes == sum(p.stat().st_size for p in tmp_path.rglob("*.*"))
    assert [path for path, _ in summary.unreadable] == ["cats/none.png", "dogs/text.jpg"]
    assert str(summary) == (
        f"{tmp_path}: 6 images in 2 classes, {sources._bytes(source.total_bytes)}\n"
        "  stored in   image files\n"
        "  formats     jpeg 3, png 1\n"
        "  width       10 to 1,500, median 30\n"
        "  height      7 to 3,000, median 40\n"
        "  unreadable  2\n"
        "    cats/none.png: the file is empty\n"
        "    dogs/text.jpg: not a JPEG, PNG, WebP, GIF, BMP or TIFF file, it begins with b'dogs/text.jpg'"
    )


def test_summary_of_a_sample_says_so(tmp_path):
    for i in range(10):
        picture(tmp_path / f"{i}.bmp", (10 + i, 5))
    summary = summarise(scan(tmp_path), workers=2, limit=5)
    assert (summary.images, summary.read) == (10, 5)
    assert summary.width == (10, 14, 18)  # every other image
    assert str(summary).endswith("are of a sample: 5 of the images.")
    assert "of a sample" not in str(summarise(scan(tmp_path), workers=2, limit=10))


def test_summary_when_nothing_is_readable(tmp_path):
    touch(tmp_path, *(f"{i}.jpg" for i in range(5)))
    summary = summarise(scan(tmp_path), workers=1)
    assert summary.formats == {}
    assert summary.width == (0, 0, 0)
    assert "formats     none" in str(summary)
    assert str(summary).endswith("    and 2 more")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (3_214_000_000, "3.21 GB"), (9e15, "9,000.0 TB")],
)
def test_bytes_are_readable(count, text):
    assert sources._bytes(count) == text
