import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from photographs import ENGINE, tile, tiles, told
from safetensors.torch import save_file

import opsin
from opsin.curate.fetch import Fetch, fetch
from opsin.curate.ingest import Ingest, images_table, ingest
from opsin.curate.manifest import SCHEMA, write_manifest
from opsin.curate.tables import Table
from opsin.data.reader import ImageReader
from opsin.data.sources import scan
from opsin.errors import OpsinError

NONE = dict.fromkeys(("vectors", "duplicates", "clusters", "retrieved", "sample"))
PART = 4


def table(folder, columns):
    """A table in parts of `PART` rows, as the steps write them."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = pa.table(columns)
    for number, start in enumerate(range(0, len(whole), PART)):
        pq.write_table(whole.slice(start, PART), folder / f"part-{number:08d}.parquet", row_group_size=PART)
    return Table(folder)


def images(tmp_path, name="heap", indices=range(10), junk=()):
    """Ingested tiles; those in `junk` are damaged."""
    tiles(tmp_path / name, indices)
    for i in junk:
        (tmp_path / name / f"{i:04}.png").write_bytes(tile(i)[:200])
    ingest(ENGINE, [str(tmp_path / name)], tmp_path / f"{name}.images", Ingest(part=PART))
    return images_table(tmp_path / f"{name}.images")


def clusters(folder, leaves, parents):
    """`parents`: for every level but the top one, the cluster above each."""
    found = table(folder, {"cluster": pa.array(leaves, pa.int32()), "distance": pa.nulls(len(leaves), pa.float32())})
    tensors = {f"parents.{level}": torch.tensor(above) for level, above in enumerate(parents, 1)}
    save_file(tensors | {"centroids.1": torch.zeros(1, 1)}, folder / "levels.safetensors")
    return found


def duplicates(folder, reasons):
    rows = len(reasons)
    return table(
        folder,
        {
            "kept": [reason is None for reason in reasons],
            "component": pa.array(range(rows), pa.int64()),
            "duplicate_of": pa.array([None if reason is None else 0 for reason in reasons], pa.int64()),
            "reason": pa.array(reasons, pa.string()),
            "neighbours": pa.array([[i + 1, i + 2] for i in range(rows)], pa.list_(pa.int64())),
            "similarities": pa.array([[0.5, 0.25]] * rows, pa.list_(pa.float32())),
        },
    )


def read_all(source):
    with ImageReader(source, workers=2, max_bad_fraction=0) as reader:
        return [told(image) for image in reader.read_many(range(len(source)))]


def test_every_image_has_a_row_with_all_that_was_found(tmp_path):
    found = images(tmp_path, junk=[3])
    sampled = [True] * 8 + [False, False]
    facts = write_manifest(
        tmp_path / "manifest.parquet",
        found,
        vectors=table(tmp_path / "vectors", {"reason": pa.array([None] * 4 + ["vanished"] + [None] * 5, pa.string())}),
        duplicates=duplicates(tmp_path / "duplicates", [None] * 5 + ["near-duplicate"] + [None] * 4),
        clusters=clusters(tmp_path / "clusters", [2, 0, 1, None, 2, 1, 0, 1, 2, 2], [[1, 0, 1], [5, 4]]),
        retrieved=None,
        sample=table(tmp_path / "sample", {"chosen": sampled}),
        steps={"ingest": {"min_side": 32}},
    )
    manifest = pq.read_table(tmp_path / "manifest.parquet")
    assert manifest.schema.equals(SCHEMA)
    about = json.loads(manifest.schema.metadata[b"opsin.manifest"])
    heap = scan(tmp_path / "heap")
    assert about == {
        "opsin": opsin.__version__,
        "sources": [{"spec": str(tmp_path / "heap"), "fingerprint": heap.fingerprint}],
        "steps": {"ingest": {"min_side": 32}},
    }
    reasons = manifest["reason"].to_pylist()
    assert reasons[3].startswith("unreadable: ")
    assert reasons[4:6] == ["vanished", "near-duplicate"]
    assert reasons[8:] == ["not sampled"] * 2
    assert [i for i, kept in enumerate(manifest["kept"].to_pylist()) if kept] == [0, 1, 2, 6, 7]
    paths = {2: [4, 1, 2], 0: [4, 1, 0], 1: [5, 0, 1]}
    leaves = [2, 0, 1, None, 2, 1, 0, 1, 2, 2]
    assert manifest["cluster"].to_pylist() == [paths.get(leaf) for leaf in leaves]
    assert manifest["neighbours"].to_pylist()[7] == [8, 9]
    assert manifest["similarities"].to_pylist()[7] == [0.5, 0.25]
    assert manifest["duplicate_of"].to_pylist() == [None] * 5 + [0] + [None] * 4
    assert manifest["sets"].to_pylist() == [[]] * 10
    assert manifest["path"].to_pylist() == [heap.place(i) for i in range(10)]
    taken = pa.concat_tables(pq.read_table(part.file) for part in found.parts)
    for name in ("source", "index", "hash", "bytes", "width", "height"):
        assert manifest[name].to_pylist() == taken[name].to_pylist()
    assert facts == {
        "images": 10,
        "kept": 5,
        "reasons": {"not sampled": 2, "unreadable": 1, "vanished": 1, "near-duplicate": 1},
        "sets": {},
    }
    rows = pq.read_metadata(tmp_path / "manifest.parquet")
    assert [rows.row_group(i).num_rows for i in range(rows.num_row_groups)] == [4, 4, 2]
    assert not (tmp_path / "manifest.parquet.partial").exists()
    source = scan(tmp_path / "manifest.parquet", tmp_path / "cache")
    assert read_all(source) == [0, 1, 2, 6, 7]


def test_what_was_retrieved_is_kept_and_with_a_sample_the_union(tmp_path):
    found = images(tmp_path, indices=range(6))
    sets = [["b", "a"], [], ["a"], None, [], []]
    retrieved = table(tmp_path / "retrieved", {"sets": pa.array(sets, pa.list_(pa.string()))})
    sample = table(tmp_path / "sample", {"chosen": [False, False, True, True, False, None]})
    given = NONE | {"retrieved": retrieved}
    facts = write_manifest(tmp_path / "m.parquet", found, **given, steps={})
    assert facts == {"images": 6, "kept": 2, "reasons": {"not retrieved": 4}, "sets": {"a": 2, "b": 1}}
    assert pq.read_table(tmp_path / "m.parquet")["sets"].to_pylist() == [["b", "a"], [], ["a"], [], [], []]
    facts = write_manifest(tmp_path / "m.parquet", found, **given | {"sample": sample}, steps={})
    assert facts["reasons"] == {"neither sampled nor retrieved": 3}
    assert pq.read_table(tmp_path / "m.parquet")["kept"].to_pylist() == [True, False, True, True, False, False]


def test_sets_that_go_in_as_they_are_follow_with_their_sources(tmp_path):
    found = images(tmp_path, indices=range(5))
    one, two = images(tmp_path, "one", range(20, 26), junk=[22]), images(tmp_path, "two", range(30, 33))
    sample = table(tmp_path / "sample", {"chosen": [True, False, False, True, False]})
    facts = write_manifest(
        tmp_path / "m.parquet", found, **NONE | {"sample": sample}, steps={}, as_is={"one": one, "two": two}
    )
    manifest = pq.read_table(tmp_path / "m.parquet")
    assert manifest["source"].to_pylist() == [0] * 5 + [1] * 6 + [2] * 3
    assert manifest["sets"].to_pylist() == [[]] * 5 + [["one"]] * 6 + [["two"]] * 3
    assert facts == {
        "images": 14,
        "kept": 10,
        "reasons": {"not sampled": 3, "unreadable": 1},
        "sets": {"one": 5, "two": 3},
    }
    assert read_all(scan(tmp_path / "m.parquet")) == [0, 3, 20, 21, 23, 24, 25, 30, 31, 32]


def test_images_out_of_shards_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "same.py").write_text("def edit(image): return image")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tiles(tmp_path / "heap", range(9))
    fetch(ENGINE, [str(folder)], tmp_path / "copies", Fetch(edit_hook="same:edit", part=2))
    ingest(ENGINE, [str(tmp_path / "copies")], tmp_path / "images", Ingest(part=PART))
    sample = table(tmp_path / "sample", {"chosen": [i % 4 == 1 for i in range(9)]})
    given = NONE | {"sample": sample}
    write_manifest(tmp_path / "m.parquet", images_table(tmp_path / "images"), **given, steps={})
    assert read_all(scan(tmp_path / "m.parquet", tmp_path / "cache")) == [1, 5]
    with (folder.parent / "copies/part-00000001.tar").open("ab") as tar:
        tar.write(bytes(10240))
    with pytest.raises(OpsinError, match="copies is not what it was"):
        scan(tmp_path / "m.parquet", tmp_path / "cache")


def test_one_level_of_clusters_has_no_parents(tmp_path):
    found = images(tmp_path, indices=range(3))
    given = NONE | {"clusters": clusters(tmp_path / "clusters", [1, None, 0], [])}
    write_manifest(tmp_path / "m.parquet", found, **given, steps={})
    assert pq.read_table(tmp_path / "m.parquet")["cluster"].to_pylist() == [[1], None, [0]]


def test_a_writing_that_is_stopped_leaves_the_former_manifest(tmp_path, monkeypatch):
    found = images(tmp_path, indices=range(6))
    write_manifest(tmp_path / "m.parquet", found, **NONE, steps={})
    before = (tmp_path / "m.parquet").read_bytes()
    found.parts[1].file.unlink()
    with pytest.raises(OpsinError, match=r"part-00000001\.parquet has vanished"):
        write_manifest(tmp_path / "m.parquet", found, **NONE, steps={})
    assert (tmp_path / "m.parquet").read_bytes() == before


def test_wrong_tables_are_told(tmp_path):
    found = images(tmp_path, indices=range(6))
    short = table(tmp_path / "short", {"chosen": [True] * 5})
    with pytest.raises(OpsinError, match="are not of the same images"):
        write_manifest(tmp_path / "m.parquet", found, **NONE | {"sample": short}, steps={})
    other = table(tmp_path / "other", {"taken": [True] * 6})
    with pytest.raises(OpsinError, match="has no column 'chosen'"):
        write_manifest(tmp_path / "m.parquet", found, **NONE | {"sample": other}, steps={})
    lost = clusters(tmp_path / "clusters", [0] * 6, [])
    (tmp_path / "clusters/levels.safetensors").unlink()
    with pytest.raises(OpsinError, match=r"levels\.safetensors is missing or damaged"):
        write_manifest(tmp_path / "m.parquet", found, **NONE | {"clusters": lost}, steps={})
    with pytest.raises(OpsinError, match="cannot write"):
        write_manifest(tmp_path / "nowhere/m.parquet", found, **NONE, steps={})
    bare = table(tmp_path / "bare", {name: pa.nulls(6) for name in SCHEMA.names})
    with pytest.raises(OpsinError, match=r"step\.json is missing"):
        write_manifest(tmp_path / "m.parquet", bare, **NONE, steps={})


@given(st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kept_images_and_only_they_have_no_reason(tmp_path, data):
    """The first step's reason counts, whatever the steps say."""
    rows = 6
    found = images(tmp_path, indices=range(rows), junk=[2])
    texts = st.lists(st.none() | st.sampled_from(["x", "y: z"]), min_size=rows, max_size=rows)
    flags = st.lists(st.booleans(), min_size=rows, max_size=rows)
    lost, dropped, chosen, hit = data.draw(texts), data.draw(texts), data.draw(flags), data.draw(flags)
    with_sample, with_retrieved = data.draw(st.booleans()), data.draw(st.booleans())
    sets = pa.array([["q"] if one else [] for one in hit], pa.list_(pa.string()))
    facts = write_manifest(
        tmp_path / "m.parquet",
        found,
        vectors=table(tmp_path / "vectors", {"reason": pa.array(lost, pa.string())}),
        duplicates=duplicates(tmp_path / "duplicates", dropped),
        clusters=None,
        retrieved=table(tmp_path / "retrieved", {"sets": sets}) if with_retrieved else None,
        sample=table(tmp_path / "sample", {"chosen": chosen}) if with_sample else None,
        steps={},
    )
    manifest = pq.read_table(tmp_path / "m.parquet").to_pylist()
    for i, row in enumerate(manifest):
        assert row["kept"] == (row["reason"] is None)
        earlier = row["reason"] if i == 2 else (lost[i] or dropped[i])
        wanted = (with_sample and chosen[i]) or (with_retrieved and hit[i]) or not (with_sample or with_retrieved)
        assert row["kept"] == (earlier is None and wanted)
        if earlier is not None:
            assert row["reason"] == earlier
    assert manifest[2]["reason"].startswith("unreadable")
    assert facts["kept"] + sum(facts["reasons"].values()) == facts["images"] == rows
    assert facts["kept"] == np.sum([row["kept"] for row in manifest])
