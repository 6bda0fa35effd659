import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import encoded, identity, write_parquet, write_tar

from opsin.data import manifest as module
from opsin.data.decode import decode
from opsin.data.reader import ImageReader
from opsin.data.shards import BLOCK_BYTES, Unreadable
from opsin.data.sources import scan, summarise
from opsin.errors import OpsinError


def folder(path, indices):
    path.mkdir(parents=True)
    for i in indices:
        (path / f"{i:04}.png").write_bytes(encoded(i))
    return path


def write(path, specs, kept, group=7, sources=None):
    """A manifest of all images of `specs` in which `kept(source, index)` decides."""
    rows = []
    for number, spec in enumerate(specs):
        rows += [(number, index) for index in range(len(scan(spec)))]
    told = (
        [{"spec": str(spec), "fingerprint": scan(spec).fingerprint} for spec in specs] if sources is None else sources
    )
    about = {"opsin": "0", "sources": told, "steps": {}}
    table = pa.table(
        {
            "source": pa.array([row[0] for row in rows], pa.int32()),
            "index": pa.array([row[1] for row in rows], pa.int64()),
            "bytes": pa.array([10] * len(rows), pa.int64()),
            "kept": [bool(kept(*row)) for row in rows],
        }
    ).replace_schema_metadata({module.METADATA: json.dumps(about)})
    pq.write_table(table, path, row_group_size=group)
    return [row for row in rows if kept(*row)]


def read_all(source):
    with ImageReader(source, workers=2) as reader:
        assert not reader.bad
        order = source.order.indices(3, np.arange(len(source)))
        return [identity(image) for image in reader.read_many(order.tolist())]


@pytest.fixture
def heap(tmp_path):
    """Images 0 … 39 in a folder, two tars and a Parquet shard."""
    return [
        folder(tmp_path / "files", range(10)),
        write_tar(tmp_path / "tars/a.tar", range(10, 15)).parent,
        write_parquet(tmp_path / "rows.parquet", range(25, 40)),
    ]


@pytest.mark.parametrize("cached", [True, False])
def test_the_stream_reads_exactly_the_kept_images(tmp_path, heap, cached):
    write_tar(heap[1] / "b.tar", range(15, 25))
    numbers = {(0, i): i for i in range(10)} | {(1, i): 10 + i for i in range(15)} | {(2, i): 25 + i for i in range(15)}
    kept = write(tmp_path / "manifest.parquet", heap, lambda source, index: numbers[source, index] % 3 == 0)
    cache = tmp_path / "cache" if cached else None
    for _ in range(2):  # the second time from the cache
        source = scan(tmp_path / "manifest.parquet", cache)
        assert sorted(read_all(source)) == list(range(0, 40, 3))
    assert [identity(decode(source.open(i))) for i in range(len(source))] == [numbers[row] for row in kept]
    assert source.labels is None
    assert source.classes == []
    assert source.total_bytes == 10 * len(kept)
    assert source.place(0) == source.name(0) == str(heap[0] / "0000.png")
    assert source.place(4) == str(heap[1] / "a.tar/000012.png")
    assert source.root == str(tmp_path / "manifest.parquet")
    told = str(summarise(source, workers=2))
    assert "14 images" in told
    assert "of which a manifest names 14 images" in told


def test_rows_come_from_the_cache_unless_the_manifest_changes(tmp_path, monkeypatch):
    files = folder(tmp_path / "files", range(6))
    path = tmp_path / "manifest.parquet"
    write(path, [files], lambda _, index: index < 3)
    first = scan(path, tmp_path / "cache")
    real, written = module._write, []
    monkeypatch.setattr(module, "_write", lambda *given: written.append(1) or real(*given))
    again = scan(path, tmp_path / "cache")
    assert not written
    assert again.fingerprint == first.fingerprint
    write(path, [files], lambda _, index: index > 3)
    os.utime(path, ns=(1, 1))
    other = scan(path, tmp_path / "cache")
    assert written
    assert other.fingerprint != first.fingerprint
    assert sorted(read_all(other)) == [4, 5]
    for kept in (tmp_path / "cache").glob("manifest-*.arrow"):
        kept.write_bytes(b"damaged")
    assert sorted(read_all(scan(path, tmp_path / "cache"))) == [4, 5]


def test_kept_rows_are_mapped_and_not_held(tmp_path):
    files = folder(tmp_path / "files", range(6))
    write(tmp_path / "manifest.parquet", [files], lambda *_: True)
    before = pa.total_allocated_bytes()
    images = scan(tmp_path / "manifest.parquet", tmp_path / "cache").images
    assert pa.total_allocated_bytes() - before < 1000
    assert not images._manifest._indices[0].flags.owndata


def test_the_parts_of_the_file_do_not_show(tmp_path, monkeypatch):
    files = folder(tmp_path / "files", range(20))
    write(tmp_path / "a.parquet", [files], lambda _, index: index % 2, group=3)
    write(tmp_path / "b.parquet", [files], lambda _, index: index % 2, group=100)
    one = scan(tmp_path / "b.parquet")
    monkeypatch.setattr(module, "ROWS", 2)  # many batches
    several = scan(tmp_path / "a.parquet")
    assert len(several.images._manifest._indices) > 2
    assert several.fingerprint == one.fingerprint
    assert read_all(several) == read_all(one)


def test_a_changed_source_is_refused(tmp_path):
    files = folder(tmp_path / "files", range(4))
    write(tmp_path / "manifest.parquet", [files], lambda *_: True)
    (files / "0099.png").write_bytes(encoded(99))
    with pytest.raises(OpsinError, match=r"files is not what it was when .*manifest\.parquet was made from it"):
        scan(tmp_path / "manifest.parquet", tmp_path / "cache")


def test_a_vanished_source_is_told(tmp_path):
    files = folder(tmp_path / "files", range(4))
    write(tmp_path / "manifest.parquet", [files], lambda *_: True)
    files.rename(tmp_path / "elsewhere")
    with pytest.raises(OpsinError, match=r"no data at .*files"):
        scan(tmp_path / "manifest.parquet")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda table: table.drop_columns(["kept"]), "is damaged or was changed"),
        (lambda table: table.set_column(0, "source", pa.array([5] * 4, pa.int32())), "a source that is not listed"),
        (lambda table: table.set_column(1, "index", pa.array([9] * 4)), "is not what it was"),
        (lambda table: table.replace_schema_metadata({module.METADATA: b"{"}), "is damaged or was changed"),
        (lambda table: table.set_column(3, "kept", pa.array([False] * 4)), "keeps no image"),
    ],
)
def test_a_spoilt_manifest_is_told(tmp_path, spoil, said):
    files = folder(tmp_path / "files", range(4))
    path = tmp_path / "manifest.parquet"
    write(path, [files], lambda *_: True)
    pq.write_table(spoil(pq.read_table(path)), path)
    with pytest.raises(OpsinError, match=said):
        scan(path, tmp_path / "cache")


def test_a_damaged_row_group_is_told(tmp_path):
    files = folder(tmp_path / "files", range(4))
    path = tmp_path / "manifest.parquet"
    write(path, [files], lambda *_: True)
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(OpsinError, match="is damaged or was changed"):
        scan(path)


def test_a_half_written_manifest_is_a_damaged_shard(tmp_path):
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(OpsinError, match="is damaged"):
        scan(tmp_path / "manifest.parquet")


def test_parquet_shards_are_still_shards(tmp_path):
    source = scan(write_parquet(tmp_path / "rows.parquet", range(5)))
    assert len(source) == 5
    assert source.images.kind == "1 .parquet shard"


def test_a_manifest_of_a_manifest(tmp_path):
    files = folder(tmp_path / "files", range(12))
    write(tmp_path / "first.parquet", [files], lambda _, index: index % 2 == 0)
    write(tmp_path / "second.parquet", [tmp_path / "first.parquet"], lambda _, index: index % 2 == 0)
    assert sorted(read_all(scan(tmp_path / "second.parquet"))) == [0, 4, 8]


def test_damage_in_a_shard_leads_to_the_next_kept_image_behind_it(tmp_path):
    tar = write_tar(tmp_path / "a.tar", range(8))
    files = folder(tmp_path / "files", [8, 9])
    write(tmp_path / "manifest.parquet", [tar, files], lambda source, index: source or index % 2)
    source = scan(tmp_path / "manifest.parquet", tmp_path / "cache")
    os.truncate(tar, 600)
    with pytest.raises(Unreadable) as caught:
        source.open(1)
    assert caught.value.end == 4  # images 1, 3, 5 and 7 of the tar are 0 to 3 here
    with ImageReader(source, workers=1, max_bad_fraction=1) as reader:
        assert identity(reader.read(0)) == 8


def test_files_come_in_any_order_and_shards_in_blocks(tmp_path):
    class Images:
        def __init__(self, order):
            self.order, self.kind = order, "x"

    class Given:
        fingerprint = "f"

        def __init__(self, order):
            self.order, self.count, self.images = order, order.samples, Images(order)

        def __len__(self):
            return self.count

    def order(*given):
        batch = pa.record_batch(
            [
                pa.array([n for n, (_, kept) in enumerate(given) for _ in range(kept)], pa.int32()),
                pa.array([i for _, kept in given for i in range(kept)], pa.int64()),
            ],
            schema=module._COLUMNS,
        )
        about = {
            "sources": [{"spec": "s", "fingerprint": "f"}] * len(given),
            "counts": [kept for _, kept in given],
            "highest": [kept - 1 for _, kept in given],
            "digest": "d",
            "bytes": 0,
        }
        return module.Kept(module.Manifest("m", [batch], about), [Given(o) for o, _ in given]).order

    files, shards = module.Order(100), module.Order(1000, 200, 8)
    assert order((files, 30)) == module.Order(30)
    assert order((shards, 250)) == module.Order(250, 50, 8)
    assert order((files, 30), (shards, 250)) == module.Order(280, 50, 8)
    assert order((files, 30), (shards, 0)) == module.Order(30)
    assert order((shards, 1)) == module.Order(1, 1, 8)
    assert BLOCK_BYTES == 16_000_000  # what the blocks above stand for


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=25)
def test_any_choice_is_read_whole(tmp_path_factory, kept, group, rows):
    tmp_path = tmp_path_factory.mktemp("any")
    tar = write_tar(tmp_path / "a.tar", range(len(kept)))
    expected = write(tmp_path / "manifest.parquet", [tar], lambda _, index: kept[index], group=group)
    if not expected:
        with pytest.raises(OpsinError, match="keeps no image"):
            scan(tmp_path / "manifest.parquet")
        return
    before, module.ROWS = module.ROWS, rows
    try:
        source = scan(tmp_path / "manifest.parquet", tmp_path / "cache")
    finally:
        module.ROWS = before
    assert [source.images._manifest.at(i) for i in range(len(source))] == expected
    with pytest.raises(IndexError):
        source.open(len(source))
