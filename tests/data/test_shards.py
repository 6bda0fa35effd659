import io
import json
import os
import tarfile
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_files import (
    add,
    encoded,
    identity,
    save_to_disk,
    table,
    write_arrow,
    write_parquet,
    write_tar,
)

from opsin.data import columns, shards, tars
from opsin.data.crops import CropRecipe
from opsin.data.decode import decode
from opsin.data.files import Store, locate
from opsin.data.masks import MaskRecipe
from opsin.data.order import Order
from opsin.data.reader import ImageReader
from opsin.data.sources import scan, summarise
from opsin.data.stream import BatchRecipe, DataRecipe, Stream, StreamRecipe
from opsin.errors import OpsinError

KINDS = ("tar", "parquet", "arrow", "disk")


def parity(i):
    return i % 3


def write(root, kind, parts, label=None):
    """Shards of one kind in a folder, and the folder."""
    if kind == "disk":
        return save_to_disk(root, parts, label=label)
    writers = {"tar": write_tar, "parquet": write_parquet, "arrow": write_arrow}
    for number, part in enumerate(parts):
        writers[kind](root / f"part-{number:03}.{kind}", part, label=label)
    return root


PARTS = [list(range(10)), list(range(10, 13)), list(range(13, 30))]


def contents(source, workers=4):
    with ImageReader(source, workers=workers) as reader:
        images = [identity(image) for image in reader.read_many(range(len(source)))]
        assert reader.bad == {}
    return images


def message(function, *arguments, **options):
    with pytest.raises(OpsinError) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [False, True])
def test_all_images_of_all_kinds_of_shards(tmp_path, kind, cached):
    data, cache = write(tmp_path / "data", kind, PARTS), tmp_path / "run" / "cache" if cached else None
    before = sorted(data.iterdir())
    source = scan(data, cache)
    assert contents(source) == list(range(30))
    assert source.labels is None
    assert source.classes == []
    assert source.root == str(data)
    assert source.total_bytes == sum(path.stat().st_size for path in data.iterdir() if path.suffix != ".json")
    assert sorted(data.iterdir()) == before  # nothing is written beside the data
    ending = ".arrow" if kind == "disk" else f".{kind}"
    assert f"  stored in   3 {ending} shards\n" in str(summarise(source, workers=2))
    assert "formats     png 30\n" in str(summarise(source, workers=2))


@pytest.mark.parametrize("kind", KINDS)
def test_labels(tmp_path, kind):
    source = scan(write(tmp_path, kind, PARTS, label=parity))
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [parity(i) for i in range(30)]
    assert source.classes == (["0", "1", "2"] if kind == "tar" else ["cat", "dog", "fox"])


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_those_that_have_images(tmp_path, kind):
    source = scan(write(tmp_path, kind, PARTS, label=lambda i: 2 if i < 13 else 7))
    assert source.labels.tolist() == [0] * 13 + [1] * 17
    assert source.classes == (["2", "7"] if kind == "tar" else ["fox", "7"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_missing_label_is_none_for_all(tmp_path, kind):
    source = scan(write(tmp_path, kind, PARTS, label=lambda i: "" if kind == "tar" and i == 3 else -(i == 3)))
    assert source.labels is None


def test_names_lead_back_to_the_sample(tmp_path):
    write_tar(tmp_path / "a" / "x.tar", [0, 1], prefix="deep/er/")
    source = scan(tmp_path / "a")
    assert [source.name(i) for i in range(2)] == ["x.tar/deep/er/000000.png", "x.tar/deep/er/000001.png"]
    assert source.place(1) == f"{tmp_path}/a/x.tar/deep/er/000001.png"
    source = scan(write_parquet(tmp_path / "b" / "x.parquet", range(6)))
    assert source.name(5) == "x.parquet/row 5"
    with pytest.raises(IndexError, match="image 6 of a source with 6"):
        source.name(6)


def test_a_single_shard_and_patterns(tmp_path):
    for number in range(12):
        write_tar(tmp_path / "data" / f"s-{number:02}.tar", [number])
    write_tar(tmp_path / "data" / ".hidden.tar", [99])
    data = tmp_path / "data"
    assert contents(scan(data / "s-03.tar")) == [3]
    assert contents(scan(f"{data}/s-{{02..10}}.tar")) == list(range(2, 11))
    assert contents(scan(f"{data}/s-{{03,01}}.tar")) == [1, 3]
    assert contents(scan(f"{data}/*.tar")) == list(range(12))
    assert contents(scan(f"{data}/s-?1.tar")) == [1, 11]
    assert contents(scan(f"{data}/s-0[2-4].tar")) == [2, 3, 4]
    assert contents(scan(f"{tmp_path}/{{data,data}}/s-{{00,11}}.tar")) == [0, 0, 11, 11]
    assert contents(scan(f"file://{data}/s-05.tar")) == [5]
    assert scan(f"{data}/s-{{02..10}}.tar").root == str(data)
    assert message(scan, f"{data}/s-{{08..14}}.tar") == (
        f"3 of the 7 files that {data}/s-{{08..14}}.tar names do not exist, first 's-12.tar': correct the pattern."
    )
    assert message(scan, f"{data}/*.parquet") == f"no file matches {data}/*.parquet: correct the pattern."
    assert "a wildcard in a folder's name" in message(scan, f"{tmp_path}/*/s-00.tar")
    assert "more than 1,000,000 names" in message(scan, f"{data}/{{0..1000000}}.tar")
    (data / "[odd].tar").write_bytes((data / "s-07.tar").read_bytes())
    assert contents(scan(data / "[odd].tar")) == [7]  # what is there is no pattern


def test_patterns_of_image_files(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    write_tar(tmp_path / "s.tar", [9])
    source = scan(f"{tmp_path}/*.png")
    assert contents(source) == [0, 1, 2, 3]
    assert source.order == Order(4)


def test_mixtures_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [0])
    write_parquet(tmp_path / "b.parquet", [0])
    write_parquet(tmp_path / "c.parquet", [0])
    (tmp_path / "d.png").write_bytes(encoded(0))
    assert message(scan, tmp_path) == (
        f"{tmp_path} holds 1 image files and 2 .parquet shards and 1 .tar shards: give a folder of one kind, or a "
        f"pattern such as {tmp_path}/*.parquet."
    )


def test_compressed_tars_are_refused(tmp_path):
    for name in ("a.tar.gz", "b.TGZ", "c.tar.zst"):
        (tmp_path / name).write_bytes(b"x")
        reason = "in which no image can be reached without unpacking all before it: unpack them to .tar"
        assert reason in message(scan, tmp_path / name)
    assert f"{tmp_path} holds .tar.gz files, in which" in message(scan, tmp_path)
    assert "holds .tar.gz files" in message(scan, f"{tmp_path}/*.tar.gz")
    (tmp_path / "photo.png").write_bytes(encoded(0))  # beside images they are downloads that were unpacked
    assert len(scan(tmp_path)) == 1


LONG = "a-very-long-folder-name-" * 6 + "/" + "and-a-long-key-" * 9


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@settings(max_examples=20, deadline=None)
@given(
    names=st.lists(st.text("ab.é /-", min_size=1, max_size=150), max_size=6),
    sizes=st.lists(st.integers(0, 2000), min_size=6, max_size=6),
)
def test_members_are_those_that_tarfile_finds(form, names, sizes):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, size in zip(names, sizes, strict=False):
            try:
                add(tar, name, bytes(range(256)) * (size // 256 + 1))
            except (ValueError, UnicodeEncodeError):  # ustar has no way to say it
                continue
    size = len(out.getvalue())
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    found = list(tars.members(out, size))
    assert [(name.removeprefix("./").rstrip("/"), *rest) for name, *rest in expected] == [
        (name.rstrip("/"), *rest) for name, *rest in found
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_their_labels(tmp_path, form):
    write_tar(tmp_path / "x.tar", [4, 5], label=parity, form=form, prefix=LONG)
    source = scan(tmp_path)
    assert source.name(0) == f"x.tar/{LONG}000004.png"
    assert source.labels.tolist() == [0, 1]
    assert source.classes == ["1", "2"]
    assert contents(source) == [4, 5]


def test_what_counts_as_an_image_in_a_tar(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(link)
        for name in ("./0.png", "a.b.PNG", "._0.png", ".trash/1.png", "text.txt", "2.png.bak"):
            add(tar, name, encoded(3))
    source = scan(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["x.tar/0.png", "x.tar/a.b.PNG"]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("random_access", [False, True])
def test_columns_of_bytes_and_files_of_random_access(tmp_path, flat, random_access):
    write_arrow(tmp_path / "a.arrow", range(7), flat=flat, random_access=random_access)
    write_parquet(tmp_path / "a.parquet", range(7), flat=flat)
    for name in ("a.arrow", "a.parquet"):
        assert contents(scan(tmp_path / name)) == list(range(7))


def test_compressed_record_batches(tmp_path):
    rows = table(range(9))
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        writer = pa.ipc.new_stream(sink, rows.schema, options=options)
        writer.write_table(rows, max_chunksize=2)
        writer.close()
    assert contents(scan(tmp_path)) == list(range(9))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=6))
def test_messages_are_those_that_pyarrow_reads(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("arrow") / "a.arrow"
    batches = [pa.record_batch({"image": pa.array([b"x" * n for n in range(count)], pa.binary())}) for count in rows]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("image", pa.binary())])) as writer:
        for batch in batches:
            writer.write_batch(batch)
    store = Store(locate(str(path.parent)))
    contents = columns.index_arrow(store, store.find("a.arrow"))
    assert contents.samples == sum(rows)
    assert contents.pieces["first"].to_pylist() == [sum(rows[:i]) for i in range(len(rows))]
    for piece, count in zip(contents.pieces.to_pylist(), rows, strict=True):
        found = columns.read_arrow(store, "a.arrow", "image", piece["offset"], piece["length"])
        assert found.to_pylist() == [b"x" * n for n in range(count)]


def test_columns_that_do_not_tell(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "number": [1]}), tmp_path / "a.parquet")
    assert message(scan, tmp_path) == (
        f"{tmp_path}/a.parquet has no column with the bytes of image files (columns: text, number): give files with "
        "one, of bytes or of pairs of bytes and path."
    )
    two = {"left": pa.array([b"x"]), "right": pa.array([b"x"])}
    pq.write_table(pa.table(two), tmp_path / "a.parquet")
    assert f"{tmp_path}/a.parquet has several columns of bytes, left, right: name the one with" in message(
        scan, tmp_path
    )
    pq.write_table(pa.table({**two, "image": pa.array([encoded(3)])}), tmp_path / "a.parquet")
    assert contents(scan(tmp_path)) == [3]


def test_a_row_without_bytes_is_a_bad_image(tmp_path):
    images = [{"bytes": encoded(0), "path": None}, {"bytes": None, "path": "else.png"}, None, {"bytes": encoded(3)}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(images, kind)}), tmp_path / "a.parquet")
    with ImageReader(scan(tmp_path), workers=2) as reader:
        assert [identity(image) for image in reader.read_many(range(4))] == [0, 3, 3, 3]
        assert reader.bad == dict.fromkeys((1, 2), "the row holds no bytes of an image")


def test_what_datasets_keeps_beside_its_data(tmp_path):
    data = save_to_disk(tmp_path / "train", PARTS)
    write_arrow(data / "cache-0123456789abcdef.arrow", [99])
    assert contents(scan(data)) == list(range(30))
    (data / "data-00001-of-00003.arrow").unlink()
    assert message(scan, data) == (
        f"1 of the 3 files that {data}/state.json lists do not exist, first 'data-00001-of-00003.arrow': save or copy "
        "the data set again."
    )
    (data / "state.json").write_text("{")
    assert f"{data}/state.json is damaged" in message(scan, data)
    save_to_disk(tmp_path / "test", PARTS)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert message(scan, tmp_path) == (
        f"{tmp_path} holds a data set with the splits train, test: give one of them, such as {tmp_path}/train."
    )


# Damage


def cut(path, left):
    path.write_bytes(path.read_bytes()[:left])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_truncated_shard_is_named_and_left_out_or_stops(tmp_path, kind, share, caplog):
    data = write(tmp_path, kind, PARTS)
    path = sorted(data.glob("*[0-9].[tpa]*"))[1]
    # Behind its last image a tar has two blocks that mark its end, and zeros up to 10 KiB.
    size = path.stat().st_size if kind != "tar" else 3 * 2048
    cut(path, int(size * share))
    source = scan(data)
    assert contents(source) == [*range(10), *range(13, 30)]
    ((name, reason),) = source.unreadable
    assert name == path.name
    if kind in ("arrow", "disk") and share == 0.6:
        assert reason.startswith("it is cut short: ")
        assert reason.endswith(" bytes are there; 0 images and what is behind them are lost")
    assert "are lost" in reason
    assert f"left out the damaged shard {path} (" in caplog.text
    assert f"  left out    1\n    {path.name}: {reason}" in str(summarise(source, workers=1))
    found = message(scan, data, bad_shards="stop")
    assert found == (
        f"{path} is damaged ({reason}): fetch or write it again, or leave such shards out with --data.bad-shards skip."
    )


def test_what_is_lost_is_counted(tmp_path):
    path = write_tar(tmp_path / "a.tar", range(10))
    write_tar(tmp_path / "b.tar", range(10, 12))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        eighth = [info for info in tar if info.name.endswith(".png")][7]
    path.write_bytes(whole[: eighth.offset_data + 5])
    ((_, reason),) = scan(tmp_path).unreadable
    size, least = eighth.offset_data + 5, eighth.offset_data + eighth.size
    assert reason == (
        f"it is cut short: {size:,} of at least {least:,} bytes are there; 7 images and what is behind them are lost"
    )
    path.write_bytes(whole[: eighth.offset])  # between two members
    assert "without the mark of an end; 7 images" in scan(tmp_path).unreadable[0][1]
    for damage, text in ((b"\0" * 512, "zeros stand where a header should be"), (b"?" * 512, "no tar header at byte")):
        path.write_bytes(whole[: eighth.offset] + damage + whole[eighth.offset + 512 :])
        assert text in scan(tmp_path).unreadable[0][1]
        assert "; 7 images and what" in scan(tmp_path).unreadable[0][1]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=1500), st.sampled_from(["tar", "parquet", "arrow"]), st.integers(0, 4000))
def test_damage_is_damage_whatever_it_looks_like(tmp_path_factory, noise, kind, at):
    data = tmp_path_factory.mktemp("noise")
    write(data, kind, PARTS[:2])
    path = data / f"part-000.{kind}"
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    try:
        source = scan(data)
    except OpsinError as error:  # a schema that is still one, but of other columns
        if "no column with the bytes" in str(error) or "several columns" in str(error):
            return
        raise
    with ImageReader(source, workers=1, max_bad_fraction=1) as reader:
        reader.read(len(source) - 1)  # the damage may be to an image alone


def test_when_nothing_is_left(tmp_path):
    for name in ("a.tar", "b.tar"):
        cut(write_tar(tmp_path / name, range(3)), 700)
    assert message(scan, tmp_path).startswith(f"{tmp_path}/a.tar is damaged (it is cut short")
    assert message(scan, tmp_path).endswith("and 1 more shards are damaged: fetch or write it again.")
    (tmp_path / "b.tar").unlink()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.txt", b"text")
    assert message(scan, tmp_path) == f"the 1 .tar shards of {tmp_path} hold no images."


def test_a_damaged_image_is_replaced_and_logged_with_shard_and_key(tmp_path):
    write_tar(tmp_path / "data" / "a.tar", range(3))
    source = scan(tmp_path / "data")
    path = tmp_path / "data" / "a.tar"
    bytes_ = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmember("000001.png").offset_data
    bytes_[at : at + 8] = b"no image"
    path.write_bytes(bytes_)
    with ImageReader(source, workers=1, log=tmp_path / "bad.jsonl") as reader:
        assert [identity(reader.read(i)) for i in range(3)] == [0, 2, 2]
    line = json.loads((tmp_path / "bad.jsonl").read_text())
    assert line["path"] == f"{path}/000001.png"
    assert line["reason"].startswith("not a JPEG")


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow"])
@pytest.mark.parametrize("change", ["cut", "gone"])
def test_a_shard_that_is_damaged_after_it_was_indexed(tmp_path, kind, change):
    """All its images are replaced by the first of the next shard, though they are more than a reader tries."""
    data = write(tmp_path, kind, [range(2), range(2, 242), [1000]])
    sources = [scan(data, bad_shards=policy) for policy in ("skip", "stop")]
    path = data / f"part-001.{kind}"
    if change == "cut":
        cut(path, 600)
    else:
        path.unlink()
        for source in sources:
            source.images._store._open.clear()  # an open file would still be there
    with ImageReader(sources[0], workers=2, max_bad_fraction=1) as reader:
        images = [identity(image) for image in reader.read_many([1, 5, 2, 241, 242])]
        assert images == [1, 1000, 1000, 1000, 1000]
        assert set(reader.bad) >= {5, 2, 241}
    with ImageReader(sources[1], workers=1, max_bad_fraction=1) as reader:
        found = message(reader.read, 5)
    assert found.startswith(f"{path} cannot be read (")
    assert found.endswith("or pass over such parts with --data.bad-shards skip.")


def test_damage_to_a_row_group_concerns_no_other(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", range(12), group=4)
    about = pq.read_metadata(path)
    column = next(i for i in range(3) if about.row_group(1).column(i).path_in_schema == "image.bytes")
    at = about.row_group(1).column(column).dictionary_page_offset or about.row_group(1).column(column).data_page_offset
    source, whole = scan(tmp_path), path.read_bytes()
    path.write_bytes(whole[:at] + b"\xff" * 40 + whole[at + 40 :])
    with ImageReader(source, workers=2) as reader:
        assert [identity(image) for image in reader.read_many(range(12))] == [0, 1, 2, 3, 8, 8, 8, 8, 8, 9, 10, 11]
        assert "its row group 1 cannot be read" in reader.bad[4]


# The index


@pytest.fixture
def indexed(monkeypatch):
    """Names of the shards that are really read for the index."""
    seen = []
    for module, name in ((tars, "index"), (columns, "index_parquet"), (columns, "index_arrow")):
        real = getattr(module, name)

        def note(store, file, real=real):
            seen.append(file.name)
            return real(store, file)

        monkeypatch.setattr(module, name, note)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_is_indexed_again_only_if_it_changed(tmp_path, kind, indexed):
    data, cache = write(tmp_path / "data", kind, PARTS, label=parity), tmp_path / "cache"
    first = scan(data, cache)
    assert len(indexed) == 3
    (kept,) = cache.iterdir()
    written = kept.stat().st_ino
    again = scan(data, cache)
    assert len(indexed) == 3
    assert kept.stat().st_ino == written
    assert (again.fingerprint, again.classes, len(again)) == (first.fingerprint, first.classes, len(first))
    assert again.labels.tolist() == first.labels.tolist()
    assert contents(again) == list(range(30))
    name = indexed[1]
    writer = {"tar": write_tar, "parquet": write_parquet}.get(kind, write_arrow)
    writer(data / name, [50, 51], label=parity)
    changed = scan(data, cache)
    assert indexed[3:] == [name]
    assert contents(changed) == [*range(10), 50, 51, *range(13, 30)]
    assert changed.fingerprint != first.fingerprint
    assert len(first) == 30  # its map of the index outlives the file
    assert first.name(29) == again.name(29)
    assert identity(decode(first.open(29))) == 29
    assert len(list(cache.iterdir())) == 1
    for damage in (b"", b"no index", next(cache.iterdir()).read_bytes()[:-9]):
        next(cache.iterdir()).write_bytes(damage)
        assert scan(data, cache).fingerprint == changed.fingerprint
    assert len(indexed) == 4 + 3 * 3


def test_a_mended_shard_is_noticed_though_its_time_and_size_are_the_same(tmp_path):
    data, cache = tmp_path / "data", tmp_path / "cache"
    write_tar(data / "a.tar", [0])
    path = write_tar(data / "b.tar", [1])
    whole, about = path.read_bytes(), path.stat()
    for content in (b"?" * len(whole), whole):
        path.write_bytes(content)
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        if content != whole:
            assert len(scan(data, cache)) == 1
    assert len(scan(data, cache)) == 2


def test_the_fingerprint_sees_names_sizes_and_members_but_not_the_place(tmp_path):
    prints = {}
    for place, prefix, name in (("a", "x", "s"), ("b", "x", "s"), ("c", "y", "s"), ("d", "x", "t")):
        prints[place] = scan(write_tar(tmp_path / place / f"{name}.tar", [0, 1], prefix=prefix).parent).fingerprint
    assert prints["a"] == prints["b"]
    assert len(set(prints.values())) == 3


def test_an_index_that_cannot_be_kept(tmp_path):
    write_tar(tmp_path / "data" / "a.tar", [0])
    (tmp_path / "file").touch()
    assert message(scan, tmp_path / "data", tmp_path / "file" / "cache") == (
        f"cannot keep the index of shards in {tmp_path}/file/cache (not a directory): choose another output folder or "
        "free some space."
    )


def test_the_index_holds_nothing_per_sample_in_memory(tmp_path):
    write_tar(tmp_path / "data" / "a.tar", range(2000))
    scan(tmp_path / "data", tmp_path / "cache")
    before = pa.total_allocated_bytes()
    source = scan(tmp_path / "data", tmp_path / "cache")
    assert source.images._shards[0].pieces.nbytes > 2000 * 30
    assert pa.total_allocated_bytes() - before < 2000  # mapped, not read


# Reading


def test_a_tar_is_read_by_ranges(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", range(3))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        big = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
        Image.fromarray(noise).save(big, "PNG")
        add(tar, "big.png", big.getvalue())
        add(tar, "last.png", encoded(4))
    asked = []
    real = Store.read
    monkeypatch.setattr(Store, "read", lambda *given: asked.append(given[1:]) or real(*given))
    source = scan(tmp_path)
    assert sum(length for _, _, length in asked) < 60_000 < len(big.getvalue())  # hops over the image
    asked.clear()
    assert source.open(3) == big.getvalue()
    assert [length for _, _, length in asked] == [len(big.getvalue())]


def test_a_row_group_is_read_once_by_many_threads_and_without_other_columns(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (40, 10_000), dtype=np.uint8)
    rows = table(range(40)).append_column("noise", pa.array([row.tobytes() for row in noise]))
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=20)
    groups = []
    real = columns.read_parquet

    def slow(store, name, column, group):
        groups.append(group)
        threading.Event().wait(0.05)
        return real(store, name, column, group)

    monkeypatch.setattr(columns, "read_parquet", slow)
    source, asked = scan(tmp_path), []
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda *given: asked.append(given[2:]) or read(*given))
    assert contents(source, workers=8) == list(range(40))
    assert sorted(groups) == [0, 1]
    assert sum(length for _, length in asked) < 300_000 < (tmp_path / "a.parquet").stat().st_size


def test_the_cache_of_groups_is_bounded():
    cache, reads = shards._Groups(1000), []

    def get(key):
        return cache.get((0, key), lambda: reads.append(key) or pa.chunked_array([[b"x" * 390]]))

    for key in (1, 2, 1, 2, 3, 2, 1):
        assert get(key)[0].as_py() == b"x" * 390
    assert reads == [1, 2, 3, 1]
    assert cache._bytes <= 1000
    with pytest.raises(KeyError):
        cache.get((0, 9), lambda: {}["no"])
    assert get(9) is not None  # a failure is not kept


# Order


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_follow_the_bytes_and_groups(tmp_path, kind, monkeypatch):
    data = write(tmp_path, kind, PARTS)
    source = scan(data)
    assert source.order.samples == 30
    assert source.order.block == 30  # smaller than a block
    monkeypatch.setattr(shards, "BLOCK_BYTES", 2 * source.total_bytes // 30)
    assert scan(data).order == Order(30, 2 if kind == "tar" else 4, 64)
    monkeypatch.setattr(shards, "CACHE_BYTES", 2 * 3 * 4 * (source.total_bytes // 30))
    assert scan(data).order == Order(30, *((2, 64) if kind == "tar" else (4, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_exact_resume(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 500)
    monkeypatch.setattr(shards, "WINDOW", 3)
    data = write(tmp_path / "data", kind, PARTS)
    recipe = StreamRecipe(
        seed=3,
        batch=BatchRecipe(size=8, group=4),
        crops=CropRecipe(global_size=14, local_size=7, local_count=1),
        masks=MaskRecipe(),
        patch=7,
        depth=1,
        drop_path=0.0,
    )

    def crops(first, stop):
        source = scan(data, tmp_path / "cache")
        with ImageReader(source, workers=2) as reader:
            stream = Stream(recipe, DataRecipe(workers=2), reader, source.order, torch.device("cpu"))
            seen = np.concatenate([stream.indices(step) for step in range(first, stop)])
            return seen, [batch.crops("global", 0).clone() for batch in stream.batches(first, stop)]

    seen, whole = crops(0, 9)
    later, rest = crops(5, 9)
    assert scan(data).order.block < 30
    assert sorted(seen[:30]) == sorted(seen[30:60]) == list(range(30))
    assert np.array_equal(later, seen[40:])
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_a_summary_of_many_shards_is_of_a_sample(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [i % 50 for i in range(1500)], group=100)
    summary = summarise(scan(tmp_path), workers=2)
    assert (summary.images, summary.read) == (1500, 1000)
    assert str(summary).endswith("are of a sample: 1,000 of the images.")
