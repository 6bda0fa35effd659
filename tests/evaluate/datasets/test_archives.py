import os
import random
import shutil
import struct
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.data.decode import DecodeError
from opsin.errors import OpsinError
from opsin.evaluate.datasets.archives import files, packed_file, tars_of_classes

PART = st.text("abcXYZ019 _-äß漢", min_size=1, max_size=12).map(str.strip).filter(bool)
NAMES = st.lists(PART, min_size=1, max_size=4).map("/".join)
MEMBERS = st.dictionaries(NAMES, st.binary(max_size=1500), max_size=8).filter(
    lambda held: not any(a != b and b.startswith(a + "/") for a in held for b in held)
)


def write_tar(path, held, form=tarfile.GNU_FORMAT, mode="w"):
    with tarfile.open(path, mode, format=form) as tar:
        for name, data in held.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def write_zip(path, held, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, data in held.items():
            packed.writestr(name, data)


def write_folder(path, held):
    path.mkdir()
    for name, data in held.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def content(found):
    stored = [found.open(i) for i in range(len(found.names))]
    return dict(zip(found.names, [one.read_bytes() if isinstance(one, Path) else one for one in stored], strict=True))


@settings(max_examples=60, deadline=None)
@given(
    MEMBERS,
    st.sampled_from(["tar gnu", "tar pax", "zip deflated", "zip stored", "folder"]),
    st.booleans(),
)
def test_any_members_are_read_back(held, kind, hidden):
    with TemporaryDirectory() as folder:
        path = Path(folder, {"t": "x.tar", "z": "x.zip", "f": "x"}[kind[0]])
        stored = held | ({".hidden": b"1", "dir/.a/b": b"2"} if hidden else {})
        if kind == "folder":
            write_folder(path, stored)
        elif kind.startswith("tar"):
            write_tar(path, stored, tarfile.PAX_FORMAT if kind == "tar pax" else tarfile.GNU_FORMAT)
        else:
            write_zip(path, stored, zipfile.ZIP_STORED if kind == "zip stored" else zipfile.ZIP_DEFLATED)
        found = files(path)
        assert content(found) == held
        assert list(found.names) == sorted(held, key=os.fsencode)
        if kind != "zip deflated":
            assert list(found.sizes) == [len(held[name]) for name in found.names]
        for name in held:
            if kind != "folder":
                assert packed_file(path, name) in [data for other, data in held.items() if other.endswith(name)]
        assert kind == "folder" or packed_file(path, "not there") is None


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(PART.filter(lambda name: "." not in name), MEMBERS, min_size=1, max_size=4), st.booleans())
def test_a_tar_of_tars_and_a_folder_of_tars(classes, unpacked):
    with TemporaryDirectory() as folder:
        tars = Path(folder, "tars")
        tars.mkdir()
        for name, held in classes.items():
            write_tar(tars / f"{name}.tar", held)
        path = tars
        if not unpacked:
            path = Path(folder, "train.tar")
            write_tar(path, {tar.name: tar.read_bytes() for tar in tars.iterdir()})
            shutil.rmtree(tars)
        truth = {f"{name}/{inner}": data for name, held in classes.items() for inner, data in held.items()}
        assert content(tars_of_classes(path)) == truth


def test_an_inner_tar_without_an_end_does_not_run_into_the_next(tmp_path):
    write_tar(tmp_path / "a.tar", {"1": b"one"})
    inner = (tmp_path / "a.tar").read_bytes()[:1024]  # header and content, no zeros after them
    write_tar(tmp_path / "train.tar", {"a.tar": inner, "b.tar": inner})
    with pytest.raises(OpsinError, match=r"train\.tar is damaged \(it is cut short: it ends at byte 1,024 without"):
        tars_of_classes(tmp_path / "train.tar")


def test_reading_from_many_threads(tmp_path):
    rng = random.Random(0)
    held = {f"{i}.bin": rng.randbytes(rng.randrange(20_000)) for i in range(60)}
    write_tar(tmp_path / "x.tar", held)
    write_zip(tmp_path / "x.zip", held)
    for path in (tmp_path / "x.tar", tmp_path / "x.zip"):
        found = files(path)
        wanted = [rng.randrange(60) for _ in range(600)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(found.open, wanted)) == [held[found.names[i]] for i in wanted]


def test_the_index_is_kept_while_the_archive_is_the_same(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, {"a": b"1"})
    assert files(path) is files(path)
    os.utime(path, ns=(0, 0))
    first = files(path)
    write_tar(path, {"b": b"2"})
    assert list(files(path).names) == ["b"]
    assert list(first.names) == ["a"]


@pytest.mark.parametrize("kind", ["tar.gz", "tgz", "tar.bz2"])
def test_compressed_tars_give_lists_only(kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    write_tar(
        path, {"kit/data/labels.txt": b"1\n", "other_labels.txt": b"2\n"}, mode="w:bz2" if "bz" in kind else "w:gz"
    )
    assert packed_file(path, "labels.txt") == b"1\n"
    assert packed_file(path, "data/labels.txt") == b"1\n"
    assert packed_file(path, "abels.txt") is None
    with pytest.raises(OpsinError, match=rf"x\.{kind} is compressed as a whole, .*: unpack it and give the folder, or"):
        files(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(OpsinError, match=rf"x\.{kind} is damaged \(.+\): copy it again\.$"):
        packed_file(path, "labels.txt")


def test_what_is_no_archive(tmp_path):
    with pytest.raises(OpsinError, match=r"cannot read .*none \(no such file or directory\): check that it is there"):
        files(tmp_path / "none")
    with pytest.raises(OpsinError, match=r"cannot read .*none"):
        tars_of_classes(tmp_path / "none")
    for name, told in (
        ("x.txt", "is neither a folder nor a .zip nor a .tar"),
        ("x.zip", r"x\.zip is damaged \(File is not a zip file\): copy it again"),
        ("x.tar", r"x\.tar is damaged \(it is cut short"),
    ):
        (tmp_path / name).write_bytes(b"12345")
        with pytest.raises(OpsinError, match=told):
            files(tmp_path / name)
    with pytest.raises(OpsinError, match=r"x\.zip is damaged"):
        packed_file(tmp_path / "x.zip", "a")


def test_zips_that_cannot_be_read(tmp_path):
    write_zip(tmp_path / "x.zip", {"a/b.jpg": b"1" * 99}, zipfile.ZIP_LZMA)
    with pytest.raises(OpsinError, match=r"compressed by another method than Deflate, for example a/b\.jpg: unpack it"):
        files(tmp_path / "x.zip")
    write_zip(tmp_path / "y.zip", {"a.jpg": b"1"})
    data = bytearray((tmp_path / "y.zip").read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 8 : at + 10] = struct.pack("<H", 1)
    (tmp_path / "y.zip").write_bytes(data)
    with pytest.raises(OpsinError, match=r"y\.zip is encrypted"):
        files(tmp_path / "y.zip")


def test_damage_inside_is_an_image_that_does_not_decode(tmp_path):
    write_zip(tmp_path / "x.zip", {"a.jpg": b"1234567890" * 20, "b.jpg": b"whole"}, zipfile.ZIP_STORED)
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[60] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    found = files(tmp_path / "x.zip")
    with pytest.raises(DecodeError, match=r"x\.zip/a\.jpg: its checksum in the zip is another"):
        found.open(0)
    assert found.open(1) == b"whole"
    data[0] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(DecodeError, match="no file where its directory says so"):
        found.open(0)
    write_zip(tmp_path / "y.zip", {"a.jpg": b"1234567890" * 20})
    found = files(tmp_path / "y.zip")
    data = bytearray((tmp_path / "y.zip").read_bytes())
    data[35:40] = b"\xff" * 5
    (tmp_path / "y.zip").write_bytes(data)
    with pytest.raises(DecodeError, match=r"y\.zip/a\.jpg: "):
        found.open(0)
    write_tar(tmp_path / "x.tar", {"a.jpg": b"1" * 5000})
    found = files(tmp_path / "x.tar")
    os.truncate(tmp_path / "x.tar", 2000)
    with pytest.raises(DecodeError, match="the tar has become shorter since it was indexed"):
        found.open(0)
    os.remove(tmp_path / "x.tar")
    with pytest.raises(DecodeError, match="no such file or directory"):
        found.open(0)
