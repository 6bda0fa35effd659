import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_tables import ENGINE, directions, halves, stored, tiny, unit, write_vectors

from opsin.curate import tables as tables_module
from opsin.curate.components import Components
from opsin.curate.dedup import Dedup, TooManyError, dedup
from opsin.curate.hashes import equal_pairs, words
from opsin.curate.representatives import Representatives
from opsin.curate.tables import STEP, Step, Table, read, read_step, write_part
from opsin.errors import OpsinError

PLAIN = Dedup(threshold=0.9, reference_threshold=0.8, whiten=False, nearest=500)
COLUMNS = ["kept", "component", "duplicate_of", "reason", "neighbours", "similarities"]


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=60),
    st.integers(1, 9),
    st.integers(1, 5000),
    st.sampled_from([1, 2]),
)
def test_equal_hashes_are_found_in_any_number_of_passes(values, block, memory, width):
    keys = np.array([pair[:width] for pair in values], np.uint64).reshape(-1, width)
    numbers = np.arange(len(keys)) * 3

    def blocks():
        for start in range(0, len(keys), block):
            yield keys[start : start + block], numbers[start : start + block]

    found = sorted((a, b) for some in equal_pairs(blocks, len(keys), memory) for a, b in zip(*some, strict=True))
    expected = []
    for i, key in enumerate(keys.tolist()):
        first = keys.tolist().index(key)
        if first < i:
            expected.append((first * 3, i * 3))
    assert found == expected or sorted(expected) == found


def test_passes_hold_their_share(monkeypatch):
    held = []
    real = np.lexsort
    monkeypatch.setattr(np, "lexsort", lambda keys: held.append(len(keys[0])) or real(keys))
    keys = np.random.default_rng(0).integers(0, 2**64, (20_000, 2), np.uint64)
    assert list(equal_pairs(lambda: [(keys, np.arange(20_000))], 20_000, 96 * 1000))
    assert len(held) == 20
    assert max(held) < 1200


def test_words_are_the_first_of_the_bytes():
    raw = np.frombuffer(b"".join(hashlib.sha256(bytes([i])).digest() for i in range(9)), np.uint8).reshape(9, 32)
    assert [row.tobytes() for row in words(raw)] == [row[:16].tobytes() for row in raw]
    assert words(np.arange(4, dtype=np.uint64)).shape == (4, 1)


def save_images(folder, count, seed=0, part=100, reasons=None, hashes=None, looks=None):
    """A table of images with few different sizes and sharpnesses, so that there are ties."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    hashes = np.arange(count) if hashes is None else hashes
    looks = np.arange(count) if looks is None else looks
    rows = [
        {
            "path": f"{random.integers(10**6)}/ß {i}.jpg",
            "width": int(random.integers(1, 4)) * 10,
            "height": int(random.integers(1, 4)) * 10,
            "sharpness": float(random.integers(3)),
            "hash": hashlib.sha256(str(hashes[i]).encode()).digest(),
            "phash": int(looks[i]) * 977 % 2**64,
            "reason": (reasons or {}).get(i),
        }
        for i in range(count)
    ]
    schema = pa.schema(
        {"path": pa.string(), "width": pa.int32(), "height": pa.int32(), "sharpness": pa.float32()}
        | {"hash": pa.binary(32), "phash": pa.uint64(), "reason": pa.string()}
    )
    for number, start in enumerate(range(0, count, part)):
        write_part(folder / f"part-{number:08d}.parquet", pa.Table.from_pylist(rows[start : start + part], schema))
    return Table(folder), rows


def rank(row):
    return (-row["width"] * row["height"], -row["sharpness"], hashlib.sha256(row["path"].encode()).digest())


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_then_the_sharpest_then_the_smallest_hash_of_the_path_stays(tmp_path, seed):
    random = np.random.default_rng(seed)
    table, rows = save_images(tmp_path / "images", 400, seed, part=37)
    components = Components(tmp_path / "parents.npy", 400)
    components.join(random.integers(0, 400, 300), random.integers(0, 400, 300))
    considered = random.random(400) < 0.8
    of = components.labels(0, 400)
    for images, key in ((table, lambda i: rank(rows[i])), (None, lambda i: i)):
        found = Representatives(tmp_path, components, considered, images)
        numbers = np.flatnonzero(considered)
        members = {label: [i for i in numbers if of[i] == label] for label in of[numbers]}
        assert found.of(numbers).tolist() == [min(members[of[i]], key=key) for i in numbers]
        assert found.sizes(numbers).tolist() == [len(members[of[i]]) for i in numbers]
        several = sorted((label for label in members if len(members[label]) > 1), key=lambda x: (-len(members[x]), x))
        assert found.largest(5).tolist() == [min(members[label], key=key) for label in several[:5]]


class Forest:
    """Components by a naive loop."""

    def __init__(self, count):
        self.label = list(range(count))

    def join(self, a, b):
        keep, gone = sorted((self.label[a], self.label[b]))
        self.label = [keep if each == gone else each for each in self.label]


def naive(vectors, there, images, references, what):
    """What becomes of every image: (kept, component, duplicate of, reason), one rule after the other."""
    count = len(vectors)
    rows = images or [{"reason": None} for _ in range(count)]
    fate = ["before" if rows[i]["reason"] else None for i in range(count)]
    seen = [i for i in range(count) if fate[i] is None]
    forest = Forest(count)

    def best(i):
        mine = [j for j in seen if forest.label[j] == forest.label[i]]
        return min(mine, key=lambda j: rank(rows[j]) if images else j)

    def drop(reason):
        leaders = {i: best(i) for i in seen}
        for i in seen:
            if fate[i] is None and leaders[i] != i:
                fate[i] = reason

    if images:
        for name, reason in (("hash", "exact duplicate"), ("phash", "same perceptual hash"))[: 1 + what.perceptual]:
            left = [i for i in seen if fate[i] is None]
            for i in left:
                for j in left:
                    if i < j and rows[i][name] == rows[j][name]:
                        forest.join(i, j)
            drop(reason)
    cosine = stored(vectors) @ stored(vectors).T
    left = [i for i in seen if fate[i] is None and there[i]]
    for i in left:
        for j in left:
            if i < j and cosine[i, j] > what.threshold:
                forest.join(i, j)
    drop("near-duplicate")
    component = [None if each == "before" else forest.label[i] for i, each in enumerate(fate)]
    copies = [best(i) if fate[i] not in (None, "before") else None for i in range(count)]
    if references:
        left = [i for i in range(count) if fate[i] is None and there[i]]
        everything = np.concatenate([stored(vectors)[left], *(stored(each) for each in references.values())])
        names = [None] * len(left) + [name for name, each in references.items() for _ in each]
        cosine = everything @ everything.T
        apart = Forest(len(names))
        for i, j in zip(*np.nonzero(np.triu(cosine, 1) > what.reference_threshold), strict=True):
            apart.join(i, j)
        for place, i in enumerate(left):
            sets = [name for j, name in enumerate(names) if name and apart.label[j] == apart.label[place]]
            if sets:
                fate[i] = f"near-duplicate of {sets[0]}"
    reason = [None if each == "before" else each for each in fate]
    return [
        {"kept": fate[i] is None, "component": component[i], "duplicate_of": copies[i], "reason": reason[i]}
        for i in range(count)
    ]


def told(folder):
    """The rows of a result without neighbours."""
    table = pq.read_table(sorted(folder.glob("*.parquet")))
    assert table.column_names == COLUMNS
    return table.drop_columns(["neighbours", "similarities"]).to_pylist()


def planted(seed, count=220, dimensions=12):
    """Vectors with copies nearer and farther than thresholds, chains of them, equal hashes, and some dropped before."""
    random = np.random.default_rng(seed)
    vectors = directions(count, dimensions, seed)
    hashes, looks = np.arange(count), np.arange(count)
    for i in random.permutation(count)[: count // 2]:
        like = random.integers(0, count)
        vectors[i] = vectors[like] + random.choice([0.02, 0.08, 0.15, 0.25]) * random.standard_normal(dimensions)
    for many, kind in ((12, hashes), (12, looks)):
        kind[random.permutation(count)[:many]] = kind[random.permutation(count)[:many]]
    dropped = random.permutation(count)[:15].tolist()
    reasons = {int(i): "too small" for i in dropped[:8]}
    vanished = {int(i): "it has vanished" for i in dropped[8:]}
    near = unit(vectors[random.permutation(count)[:6]] + 0.1 * random.standard_normal((6, dimensions)))
    references = {"one": near[:4], "two": np.concatenate([near[3:], directions(3, dimensions, seed + 50)])}
    return unit(vectors), hashes, looks, reasons, vanished, references


@pytest.mark.parametrize("perceptual", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_dropped_is_what_the_rules_say(tmp_path, seed, perceptual):
    vectors, hashes, looks, reasons, vanished, references = planted(seed)
    images, rows = save_images(tmp_path / "images", len(vectors), seed, 90, reasons, hashes, looks)
    missing = {*reasons, *vanished}
    table = write_vectors(tmp_path / "vectors", vectors, 90, missing, vanished)
    what = Dedup(threshold=0.9, reference_threshold=0.8, whiten=False, nearest=500, perceptual=perceptual)
    sets = {name: write_vectors(tmp_path / name, each) for name, each in references.items()}
    facts = dedup(
        tiny(30_000) if seed % 2 else ENGINE,
        table,
        tmp_path / "out",
        what,
        graph=tmp_path / "graph",
        images=images,
        references=sets,
        accept=True,
    )
    for i, reason in vanished.items():
        rows[i]["reason"] = rows[i]["reason"] or reason
    there = [i not in missing for i in range(len(vectors))]
    expected = naive(vectors, there, rows, references, what)
    assert told(tmp_path / "out") == expected
    counts = {reason: sum(row["reason"] == reason for row in expected) for reason in facts["dropped"]}
    assert facts["dropped"] == counts
    assert len(counts) == 4 + perceptual
    assert facts["kept"] == sum(row["kept"] for row in expected)
    assert facts["images"] == len(vectors) - len(missing)
    groups = [row["component"] for row in expected if row["component"] is not None]
    assert facts["largest"] == max(map(groups.count, groups))
    for group in facts["groups"]:
        leader = group["representative"]
        component = expected[leader]["component"]
        assert group["size"] == groups.count(component)
        assert {*group["members"]} <= {i for i, row in enumerate(expected) if row["component"] == component} - {leader}
    for pair in facts["pairs"]:
        assert pair["kept_apart"] == (pair["similarity"] <= 0.9)
        assert abs(pair["similarity"] - 0.9) < 0.1501
    assert Table(tmp_path / "out").parts[1].rows == 90
    Table(tmp_path / "out").aligned(table)


def test_without_images_only_vectors_decide_and_the_first_stays(tmp_path):
    vectors, *_, references = planted(9)
    table = write_vectors(tmp_path / "vectors", vectors, 60)
    sets = {name: write_vectors(tmp_path / name, each) for name, each in references.items()}
    what = PLAIN
    dedup(ENGINE, table, tmp_path / "out", what, graph=tmp_path / "graph", references=sets, accept=True)
    assert told(tmp_path / "out") == naive(vectors, [True] * len(vectors), None, references, what)


def test_neighbours_above_the_floor_are_in_the_result(tmp_path):
    vectors, *_ = planted(3)
    table = write_vectors(tmp_path / "vectors", vectors, 60)
    what = Dedup(threshold=0.9, whiten=False, nearest=5, floor=0.5)
    dedup(tiny(20_000), table, tmp_path / "out", what, graph=tmp_path / "graph", accept=True)
    cosine = stored(vectors) @ stored(vectors).T
    np.fill_diagonal(cosine, -2)
    for i, row in enumerate(pq.read_table(sorted((tmp_path / "out").glob("*.parquet"))).to_pylist()):
        best = np.sort(cosine[i][cosine[i] > 0.5])[::-1][:5]
        np.testing.assert_allclose(row["similarities"], best, atol=2e-6)
        np.testing.assert_allclose(cosine[i][row["neighbours"]], best, atol=2e-6)


def run(tmp_path, vectors, name="out", references=None, engine=ENGINE, accept=True, part=100, **more):
    """The result without images, as (kept, reason)."""
    table = write_vectors(tmp_path / f"vectors-{name}", vectors, part)
    sets = {key: write_vectors(tmp_path / f"{key}-{name}", each) for key, each in (references or {}).items()}
    what = Dedup(**{"whiten": False, "threshold": 0.9, **more})
    graph = tmp_path / f"graph-{name}"
    dedup(engine, table, tmp_path / name, what, graph=graph, references=sets, accept=accept)
    return [(row["kept"], row["reason"]) for row in told(tmp_path / name)]


@pytest.mark.parametrize("cosine", [0.25, 0.5, 0.75])
def test_copies_are_above_a_threshold_and_not_at_it(tmp_path, cosine):
    one = np.array([0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0])
    other = {0.25: [0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0], 0.5: [0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0]}
    other = np.array(other.get(cosine, [0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0]))
    assert one @ other == cosine
    both = np.stack([one, other])
    below = float(np.nextafter(np.float32(cosine), np.float32(0)))
    assert run(tmp_path, both, "at", threshold=cosine)[1] == (True, None)
    assert run(tmp_path, both, "below", threshold=below)[1] == (False, "near-duplicate")
    references = {"set": other[None]}
    assert run(tmp_path, one[None], "ref-at", references, reference_threshold=cosine) == [(True, None)]
    found = run(tmp_path, one[None], "ref-below", references, reference_threshold=below)
    assert found == [(False, "near-duplicate of set")]


def around(*degrees):
    """Vectors in a plane at these angles."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians), *np.zeros((6, len(degrees)))], axis=1)


def test_what_reaches_a_reference_only_through_other_images_is_dropped_with_them(tmp_path):
    """20° is a copy for references and 60° is not: a chain of images leads to one, another chain to none."""
    pool = around(20, 40, 60, 80, 140, 160)
    more = {"reference_threshold": 0.93, "threshold": 0.97}
    found = run(tmp_path, pool, references={"set": around(0)}, **more)
    assert found == [(False, "near-duplicate of set")] * 4 + [(True, None)] * 2
    found = run(tmp_path, pool[[0, 1, 3, 4]], "gap", {"first": around(300), "second": around(60)}, **more)
    assert found == [(False, "near-duplicate of second")] * 3 + [(True, None)]
    assert run(tmp_path, pool, "none", {"set": around(250)}, **more) == [(True, None)] * 6


def test_references_do_not_bring_copies_of_each_other_into_the_result(tmp_path):
    table = write_vectors(tmp_path / "vectors", around(0, 90))
    sets = {"set": write_vectors(tmp_path / "set", around(180, 180.1, 181))}
    facts = dedup(ENGINE, table, tmp_path / "out", PLAIN, graph=tmp_path / "graph", references=sets)
    assert facts["dropped"] == {}
    assert pq.read_table(sorted((tmp_path / "out").glob("*.parquet")))["neighbours"].to_pylist() == [[], []]


def test_whitening_lets_copies_be_told_from_images_that_are_all_alike(tmp_path):
    random = np.random.default_rng(0)
    vectors = unit(10 + random.standard_normal((300, 12)))  # every cosine is above 0.97
    vectors[200] = unit(vectors[[3]] + 0.001 * random.standard_normal((1, 12)))[0]
    assert sum(not kept for kept, _ in run(tmp_path, vectors, "plain")) > 200
    found = run(tmp_path, vectors, "whitened", whiten=True)
    assert [i for i, (kept, _) in enumerate(found) if not kept] == [200]


def many_copies(count=200, copies=70):
    vectors = directions(count, 16)
    vectors[count - copies :] = unit(vectors[:copies] + 0.1 * directions(copies, 16, 1))
    return vectors


def times(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_too_many_copies_stop_the_step_and_another_threshold_needs_no_new_search(tmp_path):
    table = write_vectors(tmp_path / "vectors", many_copies())
    sets = {"set": write_vectors(tmp_path / "set", many_copies()[:3])}
    out, graph = tmp_path / "out", tmp_path / "graph"

    def go(**more):
        given = {"accept": more.pop("accept", False), "references": sets, "graph": graph}
        return dedup(ENGINE, table, out, Dedup(whiten=False, reference_threshold=0.9, **more), **given)

    with pytest.raises(TooManyError) as caught:
        go(threshold=0.9)
    said = "with threshold 0.9 70 of 200 images would be dropped as near-duplicates: look at the pairs around the "
    assert str(caught.value).startswith(said)
    assert len(read_step(out)["found"]["pairs"]) >= 5
    assert not list(out.glob("*.parquet"))
    before = times(graph)
    assert "found-000000.parquet" in before
    with pytest.raises(TooManyError, match=r"with threshold 0.8 \d\d of 200"):
        go(threshold=0.8)
    facts = go(threshold=0.999)
    assert facts["dropped"] == {"near-duplicate of set": 6}  # and of no earlier threshold
    assert times(graph) == before
    assert go(threshold=0.999) == facts
    with pytest.raises(OpsinError, match="out was made with other threshold"):
        go(threshold=0.9)


def test_what_was_too_many_may_be_accepted(tmp_path):
    table = write_vectors(tmp_path / "vectors", many_copies())
    out, graph = tmp_path / "out", tmp_path / "graph"
    what = Dedup(threshold=0.9, whiten=False)
    with pytest.raises(TooManyError):
        dedup(ENGINE, table, out, what, graph=graph)
    before = times(graph)
    facts = dedup(ENGINE, table, out, what, graph=graph, accept=True)
    assert facts["dropped"] == {"near-duplicate": 70}
    assert times(graph) == before
    assert dedup(ENGINE, table, out, what, graph=graph) == facts  # done: it stays accepted
    with pytest.raises(OpsinError, match="was made with other threshold"):
        dedup(ENGINE, table, out, Dedup(threshold=0.95, whiten=False), graph=graph)


@pytest.mark.parametrize(
    ("copies", "more", "stops"),
    [
        (20, {}, None),  # so few never stop it
        (21, {"dropped": 0.0}, "21 of 200 images would be dropped"),
        (60, {}, None),
        (61, {}, "61 of 200 images would be dropped"),
        (61, {"dropped": 0.5}, None),
    ],
)
def test_a_share_of_copies_is_credible(tmp_path, copies, more, stops):
    if stops is None:
        assert sum(not kept for kept, _ in run(tmp_path, many_copies(200, copies), accept=False, **more)) == copies
        return
    with pytest.raises(TooManyError, match=stops):
        run(tmp_path, many_copies(200, copies), accept=False, **more)


@pytest.mark.parametrize(("size", "more", "stops"), [(20, {}, False), (21, {}, True), (21, {"largest": 0.2}, False)])
def test_a_component_of_a_share_of_the_images_is_credible(tmp_path, size, more, stops):
    vectors = directions(150, 32)
    vectors[:size] = unit(vectors[0] + 0.01 * directions(size, 32, 3))
    if stops:
        with pytest.raises(TooManyError, match=f"one component holds {size} of 150 images"):
            run(tmp_path, vectors, accept=False, **more)
    else:
        assert sum(not kept for kept, _ in run(tmp_path, vectors, accept=False, **more)) == size - 1


def test_neighbours_of_other_images_are_not_used(tmp_path):
    """Those that perceptual hashes had dropped before have none."""
    vectors, hashes, looks, *_ = planted(2)
    images, _ = save_images(tmp_path / "images", len(vectors), hashes=hashes, looks=looks)
    table = write_vectors(tmp_path / "vectors", vectors)

    def go(name, perceptual, images=images, **more):
        what = Dedup(threshold=0.9, whiten=False, perceptual=perceptual, **more)
        return dedup(ENGINE, table, tmp_path / name, what, graph=tmp_path / "graph", images=images, accept=True)

    go("one", True)
    with pytest.raises(OpsinError, match="graph was made with other perceptual"):
        go("two", False)
    with pytest.raises(OpsinError, match=r"graph was made with other .*images"):
        go("three", False, images=None)
    with pytest.raises(OpsinError, match="graph was made with other k"):
        go("four", True, nearest=5)


def test_neighbours_of_another_column_are_not_used(tmp_path):
    folder = tmp_path / "vectors"
    one, two = (write_vectors(tmp_path / name, directions(50, 8, i)) for i, name in enumerate(("a", "b")))
    folder.mkdir()
    columns = {name: read(t.parts[0], ["semantic"])["semantic"] for name, t in (("semantic", one), ("copies", two))}
    write_part(folder / "0.parquet", pa.table(columns))

    def go(name, column):
        what = Dedup(threshold=0.9, whiten=False, column=column)
        return dedup(ENGINE, Table(folder), tmp_path / name, what, graph=tmp_path / "graph")

    assert go("one", None)["column"] == "copies"
    with pytest.raises(OpsinError, match="graph was made with other column"):
        go("two", "semantic")


def embedded(folder, **columns):
    """A table as the step `embed` leaves it, of a declared copy detector."""
    step = Step(folder, "embed", {"copy_detector": True})
    write_part(step.part(0), pa.table(columns))
    step.finish({"copy_detector": True})
    return Table(folder)


def test_the_thresholds_of_the_paper_are_those_of_copy_detectors_only(tmp_path):
    def go(name, table, **more):
        return dedup(ENGINE, table, tmp_path / name, Dedup(**more), graph=tmp_path / f"g-{name}", references=sets)

    lists = pa.array(halves(30).tolist(), pa.list_(pa.float16()))
    table = embedded(tmp_path / "declared", semantic=lists, copies=lists)
    sets = {"set": table}
    facts = go("paper", table, largest=1, dropped=1)
    assert (facts["threshold"], facts["reference_threshold"]) == (0.6, 0.45)
    facts = go("given", table, threshold=0.4, largest=1, dropped=1)
    assert (facts["threshold"], facts["reference_threshold"]) == (0.4, 0.4)
    for name, other, more in (
        ("column", table, {"column": "semantic", "whiten": False}),
        ("unknown", write_vectors(tmp_path / "unknown-vectors", halves(30)), {}),
    ):
        with pytest.raises(
            OpsinError, match=r"no threshold is known for the vectors of .*: find one with opsin curate"
        ):
            go(name, other, **more)


def vectors_with(row, kind=None):
    """A function that writes vectors of which one is `row`."""

    def make(folder):
        rows = [None if each is None else each.tolist() for each in directions(30, 8)]
        rows[17] = row
        folder.mkdir()
        write_part(folder / "0.parquet", pa.table({"semantic": pa.array(rows, kind or pa.list_(pa.float32()))}))
        return Table(folder)

    return make


def damaged(folder):
    table = write_vectors(folder, directions(2000, 8), 1000)
    file = table.parts[1].file
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes(5000) + content[5100:])
    return table


def vanished(folder):
    table = write_vectors(folder, directions(200, 8), 100)
    table.parts[1].file.unlink()
    return table


def no_rows(folder):
    folder.mkdir()
    write_part(folder / "0.parquet", pa.table({"semantic": pa.array([], pa.list_(pa.float16(), 8))}))
    return Table(folder)


def half_written(folder):
    write_vectors(folder, directions(200, 8), 100)
    file = folder / "part-00000001.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    return Table(folder)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (vectors_with([1.0] * 7 + [float("nan")]), "row 17 of .* a vector with a NaN or infinity in 'semantic'"),
        (vectors_with([0.0] * 8), "row 17 of .* a vector with zeros only in 'semantic'"),
        (vectors_with([1.0] * 5), "row 17 of .* has a vector of 5 numbers in 'semantic', others 8"),
        (damaged, "part-00000001.parquet is half-written or damaged"),
        (vanished, "part-00000001.parquet has vanished"),
        (half_written, "part-00000001.parquet is half-written or damaged"),
        (lambda folder: write_vectors(folder, directions(30, 8), missing=range(30)), "'semantic' of .* no vectors"),
        (lambda folder: write_vectors(folder, directions(30, 8), column="mine"), "neither a column 'copies' nor 'sem"),
        (no_rows, "there are no vectors|holds no vectors|0 vectors are too few"),
    ],
)
def test_vectors_that_cannot_be_used_are_told_in_one_sentence(tmp_path, make, said, whiten):
    what = Dedup(threshold=0.9, whiten=whiten)
    with pytest.raises(OpsinError, match=said) as caught:
        dedup(ENGINE, make(tmp_path / "vectors"), tmp_path / "out", what, graph=tmp_path / "graph")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whiten", [False, True])
def test_references_of_other_vectors_are_told_in_one_sentence(tmp_path, whiten):
    table = write_vectors(tmp_path / "vectors", directions(100, 16))
    what = Dedup(threshold=0.9, whiten=whiten)
    for name, reference, said in (
        ("wide", write_vectors(tmp_path / "r1", directions(10, 24)), "vectors of 16 and 24 numbers cannot be compared"),
        ("column", write_vectors(tmp_path / "r2", directions(10, 16), column="mine"), "has no column 'semantic'"),
        ("none", write_vectors(tmp_path / "r3", directions(10, 16), missing=range(10)), "holds no vectors"),
    ):
        with pytest.raises(OpsinError, match=said):
            dedup(ENGINE, table, tmp_path / name, what, graph=tmp_path / f"graph-{name}", references={name: reference})


def test_tables_that_do_not_belong_together_are_told_in_one_sentence(tmp_path):
    table = write_vectors(tmp_path / "vectors", directions(50, 8))

    def go(**more):
        return dedup(ENGINE, table, tmp_path / "out", PLAIN, graph=tmp_path / "graph", **more)

    with pytest.raises(OpsinError, match="are not of the same images"):
        go(images=save_images(tmp_path / "images", 49)[0])
    with pytest.raises(OpsinError, match="has no column 'hash'"):
        go(images=table)
    with pytest.raises(OpsinError, match="has no column 'mine'"):
        dedup(ENGINE, table, tmp_path / "out", Dedup(threshold=0.9, column="mine"), graph=tmp_path / "graph")


def test_a_part_of_which_all_images_were_dropped_before(tmp_path):
    images, _ = save_images(tmp_path / "images", 30, part=10, reasons=dict.fromkeys(range(10, 20), "too small"))
    table = write_vectors(tmp_path / "vectors", directions(30, 8), 10, missing=range(10, 20))
    dedup(ENGINE, table, tmp_path / "out", PLAIN, graph=tmp_path / "graph", images=images)
    assert [row["kept"] for row in told(tmp_path / "out")] == [True] * 10 + [False] * 10 + [True] * 10


def test_if_all_images_were_dropped_before_that_is_told(tmp_path):
    reasons = dict.fromkeys(range(20), "too small")
    images, _ = save_images(tmp_path / "images", 20, reasons=reasons)
    (tmp_path / "vectors").mkdir()
    column = pa.array([None] * 20, pa.list_(pa.float16()))
    write_part(tmp_path / "vectors" / "0.parquet", pa.table({"semantic": column}))
    with pytest.raises(OpsinError, match="no vectors"):
        dedup(ENGINE, Table(tmp_path / "vectors"), tmp_path / "out", PLAIN, graph=tmp_path / "graph", images=images)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"threshold": 1.2}, "threshold is 1.2: a cosine lies from -1 to 1"),
        ({"reference_threshold": float("nan")}, "reference_threshold is nan"),
        ({"nearest": 0}, "nearest is 0: give from 1 to 4096"),
        ({"floor": -2.0}, "floor is -2.0"),
        ({"largest": 1.1}, "largest is 1.1"),
        ({"probes": 0}, "probes is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, said):
    with pytest.raises(OpsinError, match=said):
        Dedup(**given)


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.parquet")}


def test_stopped_after_any_file_it_goes_on_to_the_same_result(tmp_path, monkeypatch):
    vectors, hashes, looks, reasons, _, references = planted(5, 150)
    images, _ = save_images(tmp_path / "images", 150, 5, 40, reasons, hashes, looks)
    table = write_vectors(tmp_path / "vectors", vectors, 40, reasons)
    sets = {name: write_vectors(tmp_path / name, each) for name, each in references.items()}
    what = Dedup(threshold=0.8, whiten=True, exact_below=10, cells=6, probes=3)
    real = Path.replace
    count, most = 0, 10**9

    def replace(self, target):
        nonlocal count
        if count >= most:
            raise RuntimeError("stopped")
        count += 1
        return real(self, target)

    def go(name):
        given = {"graph": tmp_path / name / "graph", "images": images, "references": sets, "accept": True}
        return dedup(tiny(20_000), table, tmp_path / name / "out", what, **given)

    monkeypatch.setattr(Path, "replace", replace)
    whole = go("whole")
    expected = files_of(tmp_path / "whole" / "out")
    total = count
    assert total > 40
    for stop in [*range(0, total, 7), total - 1]:
        count, most = 0, stop
        name = f"stopped-{stop}"
        with pytest.raises(Exception, match="stopped"):
            go(name)
        count, most = 0, 10**9
        facts = go(name)
        assert files_of(tmp_path / name / "out") == expected
        assert facts | {"seconds": 0} == whole | {"seconds": 0}
        shutil.rmtree(tmp_path / name)


def test_two_thresholds_in_one_process_do_not_mix(tmp_path):
    """The survivors that are compared with references are others, in files of the same names."""
    table = write_vectors(tmp_path / "vectors", many_copies())
    sets = {"set": write_vectors(tmp_path / "set", many_copies()[-3:])}
    out = tmp_path / "out"
    first, second = (Dedup(threshold=t, reference_threshold=0.9, whiten=False) for t in (0.9, 0.999))
    with pytest.raises(TooManyError):
        dedup(ENGINE, table, out, first, graph=tmp_path / "graph", references=sets)
    facts = dedup(ENGINE, table, out, second, graph=tmp_path / "graph", references=sets)
    dedup(ENGINE, table, tmp_path / "alone", second, graph=tmp_path / "graph-alone", references=sets)
    assert told(out) == told(tmp_path / "alone")
    assert facts["dropped"] == {"near-duplicate of set": 6}


MEMORY = """
import json, sys, threading, time
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, torch
from opsin.curate.dedup import Dedup, dedup
from opsin.curate.engine import Engine
from opsin.curate.tables import Table

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def save(file, rows, width):
    random = np.random.default_rng(0)
    kind = pa.list_(pa.float16(), width)
    centres = random.standard_normal((200, width)).astype(np.float32)
    with pq.ParquetWriter(file, pa.schema({"semantic": kind})) as out:
        for start in range(0, rows, 2048):
            count = min(2048, rows - start)
            some = centres[random.integers(0, 200, count)] + random.standard_normal((count, width), np.float32)
            values = pa.array(some.astype(np.float16).reshape(-1))
            out.write_table(pa.table({"semantic": pa.FixedSizeListArray.from_arrays(values, type=kind)}))
    return Table(file)

def work(table, out, engine):
    how = Dedup(threshold=0.9, floor=0.8, exact_below=1000, probes=2, nearest=8)
    dedup(engine, table, out / "duplicates", how, graph=out / "neighbours", accept=True)

root, engine = Path(sys.argv[1]), Engine(memory=0.1)
small = save(root / "small.parquet", 20_480, 256)
large = save(root / "large.parquet", 327_680, 256)
most, going = 0, True

def watch():
    global most
    while going:
        most = max(most, held())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
work(small, root / "warm", engine)  # libraries and their buffers, which they keep
work(small, root / "warmer", engine)
before = most
work(large, root / "measured", engine)
going = False
thread.join()
print(json.dumps({"grown": most - before, "before": before, "vectors": large.rows * 256 * 4}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_memory_does_not_grow_with_the_vectors(tmp_path):
    """Sixteen times as many vectors do not take the memory that they would fill."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["vectors"] > 320e6
    assert found["grown"] < 300e6, found  # a task takes 100e6; what libraries and threads hold varies by as much


def test_the_step_file_says_how_it_was_made(tmp_path):
    table = write_vectors(tmp_path / "vectors", directions(30, 8))
    dedup(ENGINE, table, tmp_path / "out", PLAIN, graph=tmp_path / "graph")
    made = json.loads((tmp_path / "out" / STEP).read_text())
    assert made["step"] == "dedup"
    assert made["settings"]["threshold"] == 0.9
    assert list(made["inputs"]) == ["vectors"]
    assert tables_module.Table(tmp_path / "out").rows == 30
