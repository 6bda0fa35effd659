"""The page of a curation, told from what its steps left behind."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heaps import PART, MadeUp, alter, made_up
from opsin import heap_story
from opsin.curate import album
from opsin.curate.tables import STEP, Table
from opsin.errors import OpsinError
from opsin.heap_story import Flow, flow, tell

DONE = {name: title for name, title in heap_story.STEPS.items() if name != "calibration"}
"""The steps that `made_up` writes."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> MadeUp:
    return made_up(tmp_path_factory.mktemp("heap"))


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The curation's folder, to be spoiled; the photos stay where they are."""
    shutil.copytree(finished.out, tmp_path / "out")
    return tmp_path / "out"


def read_page(out: Path) -> str:
    """The page without its pictures."""
    return re.sub(r"data:image/[^\"')]*", "data:", tell(out).read_text())


def facts(step: Path, **changes) -> None:
    """Change some facts of a finished step."""
    said = json.loads((step / STEP).read_text())
    alter(step, facts=said["facts"] | changes)


def cluster_examples(out: Path, sampled: bool) -> list[album.Cluster]:
    return album.cluster_examples(Table(out / "clusters"), Table(out / "sample") if sampled else None)


def test_the_page_of_a_finished_curation(finished):
    path = tell(finished.out)
    assert path == finished.out / "report.html"
    page = path.read_text()
    assert len(page) < 5_000_000
    text = read_page(finished.out)
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", text)
    assert "http" not in text.replace("http-equiv", "")
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Steps", "Composition", "Cluster sizes", "Clusters", "Duplicates", "Pairs around the threshold",
        "Dropped at ingest", "Versions",
    ]  # fmt: skip
    count, copies = len(finished.names), sum(len(group["members"]) for group in finished.groups)
    steps = text[text.index("<h2>Steps") : text.index("<h2>Composition")]
    rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", steps, re.S)]
    assert rows[1][:3] == ["Ingest", f"{count}", "13"]
    assert rows[1][3] == "<div>near-constant: 10</div><div>unreadable: 2</div><div>smaller than 32 pixels: 1</div>"
    assert rows[3][0] == "De-duplicate"
    assert rows[3][1] == f"{count - 14}"
    assert rows[3][4] == f"{count - 14 - copies}"
    assert rows[6][3] == f"<div>chosen: {sum(finished.chosen)}</div>"
    assert "<td>1,234,567</td>" in text
    assert "In all, 14 images of the heap; counted set by set, 2 more." in text
    assert rows[5][3] == "<div>retrieved: 14</div>"
    assert "cats &amp; &lt;dogs&gt;" in text
    above, below = text[text.index("<h2>Pairs") : text.index("<h2>Dropped")].split("threshold 0.6<")
    assert min(map(float, re.findall(r"<h3>(0\.\d+), one group", above))) > 0.6
    assert max(map(float, re.findall(r"<h3>(0\.\d+), kept apart", below))) <= 0.6
    assert "kept apart" not in above
    assert "one group" not in below
    assert "weights: vit_small.safetensors" in text
    # the largest family: 12 copies, of which 11 were dropped and 8 are shown
    largest = finished.groups[0]
    assert "<p>12 in the group</p>" in text
    assert "Level 1: 6 clusters, 0.250 → 0.125 nats from balance" in text
    assert "3 not shown" in text
    shown = text[text.index("<h2>Duplicates") : text.index("<h2>Pairs")]
    for number, similarity in zip(largest["members"][:8], largest["similarities"][:8], strict=True):
        assert f'title="{finished.photos / finished.names[number]}"' in shown
        assert (f"<p>{similarity:.3f}</p>" if similarity else "<p>exact duplicate</p>") in shown
    # two of three junk files have no pixels; nothing else is missing
    assert text.count('class="missing"') == 2
    assert "unreadable: the file is empty" in text
    assert "&lt;b&gt;&amp;.jpg" in text


def test_the_page_is_made_again_and_no_other_file_is_left(finished):
    before = {path.relative_to(finished.out) for path in finished.out.rglob("*")}
    first = tell(finished.out).read_bytes()
    assert tell(finished.out).read_bytes() == first
    assert {path.relative_to(finished.out) for path in finished.out.rglob("*")} - before <= {Path("report.html")}


@pytest.mark.parametrize("there", range(1, 7))
def test_a_pipeline_that_got_so_far(copied, there):
    names = list(DONE)
    for name in names[there:]:
        shutil.rmtree(copied / name)
    text = read_page(copied)
    for number, title in enumerate(DONE.values()):
        assert (f'<th scope="row">{title}</th>' in text) == (number < there)
    assert ("<h2>Duplicates" in text) == (there >= 3)
    assert ("<h2>Clusters" in text) == (there >= 4)
    assert ("chosen" in text) == (there == 6)


@pytest.mark.parametrize("name", DONE)
def test_one_step_alone_or_unfinished(copied, name):
    for other in DONE:
        if other != name:
            shutil.rmtree(copied / other)
    assert "Steps" in read_page(copied)
    alter(copied / name, done=None, facts=None)
    assert "<div>not finished</div>" in read_page(copied)


def test_a_step_that_is_not_finished_among_others(copied):
    alter(copied / "clusters", done=None, facts=None)
    text = read_page(copied)
    assert text.count("<div>not finished</div>") == 1
    assert "<h2>Clusters" not in text
    assert "<h2>Duplicates" in text


def test_what_is_not_a_curation(tmp_path, finished):
    for folder in (tmp_path, tmp_path / "nothing", finished.photos, finished.out / "images"):
        with pytest.raises(OpsinError, match=r"is not the folder of a curation.*give the --out of opsin curate\.$"):
            tell(folder)
        assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (f"images/{STEP}", f"{STEP} is missing or damaged"),
        ("images/part-00000001.parquet", "part-00000001.parquet is half-written or damaged"),
        ("sample/part-00000000.parquet", "part-00000000.parquet is half-written or damaged"),
        ("clusters/levels.safetensors", "levels.safetensors is missing or damaged"),
        ("manifest.parquet", "manifest.parquet is half-written or damaged"),
    ],
)
def test_a_damaged_file_is_named(copied, broken, says):
    (copied / broken).write_bytes(b"half")
    with pytest.raises(OpsinError, match=says):
        tell(copied)


def test_a_sample_of_other_images_is_refused(copied):
    (copied / "sample" / "part-00000001.parquet").unlink()
    with pytest.raises(OpsinError, match="are not of the same images"):
        tell(copied)


def test_images_that_vanished_or_moved_have_a_box_and_a_reason(tmp_path):
    made = made_up(tmp_path)
    gone = made.groups[0]["members"][0]
    kept = tell(made.out).read_text().count("data:image/jpeg")
    (made.photos / made.names[gone]).write_bytes(b"")
    text = read_page(made.out)
    assert "the file is empty" in text
    assert text.count('class="missing"') > 2
    # one more file, before all others: every index now means another file, and none is shown under a wrong name
    (made.photos / "0.png").write_bytes((made.photos / made.names[0]).read_bytes())
    text = read_page(made.out)
    assert text.count("its source has changed") > kept // 2
    shutil.rmtree(made.photos)
    text = read_page(made.out)
    assert text.count("data:") - text.count("img-src data:") == 1  # the histogram
    assert f"no data at {made.photos}" in text


def test_every_number_gives_its_own_image(finished):
    images = Table(finished.out / "images")
    looks = album.look(images, [*range(len(finished.names) - 1, -1, -1), 3, 3])
    assert list(looks) == list(range(len(finished.names)))
    for number, name in enumerate(finished.names):
        assert looks[number].place == str(finished.photos / name)
        assert (looks[number].pixels is None) == finished.dropped.get(number, "").startswith("unreadable")
        assert looks[number].reason == finished.dropped.get(number)
    blue = [i for i, name in enumerate(finished.names) if "flat" in name]
    assert [int(looks[i].pixels[0].float().mean()) for i in blue] == [20 * i for i in range(10)]
    assert album.look(images, []) == {}


def test_examples_of_every_reason(finished, monkeypatch):
    images = Table(finished.out / "images")
    found = album.dropped_examples(images)
    assert Counter({kind: len(numbers) for kind, numbers in found.items()}) == Counter(
        {"near-constant": 8, "unreadable": 2, "smaller than 32 pixels": 1}
    )
    for kind, numbers in found.items():
        assert numbers == sorted(set(numbers))
        assert all(finished.dropped[number].startswith(kind) for number in numbers)
    monkeypatch.setattr(album, "LOOKED_AT", 2 * PART)
    looked = album.looked_at(images)
    assert 1 <= len(looked) <= 2
    of_parts = {number // PART for numbers in album.dropped_examples(images).values() for number in numbers}
    assert of_parts <= set(looked)


def test_examples_of_clusters(finished, copied):
    number = len(finished.names)
    cluster = np.array([-1 if c is None else c for c in finished.cluster])
    for sampled in (True, False):
        found = {one.number: one for one in cluster_examples(finished.out, sampled)}
        assert len(found) == 6
        for c, one in found.items():
            inside = np.flatnonzero(cluster == c)
            assert one.size == one.seen == len(inside)
            assert set(one.numbers) <= set(inside.tolist())
            assert len(set(one.numbers)) == min(len(inside), album.EXAMPLES)
            expected = [finished.chosen[i] if sampled else None for i in one.numbers]
            assert one.chosen == expected
            assert one.taken == (sum(finished.chosen[i] for i in inside) if sampled else 0)
    # of many clusters the largest, the middle and the smallest, each from near to far
    rng = np.random.default_rng(0)
    cluster = rng.permutation(np.repeat(np.arange(13), np.arange(1, 14)))[:number]
    distance = rng.random(len(cluster)).astype(np.float32)
    for file in (copied / "clusters").glob("*.parquet"):
        file.unlink()
    pq.write_table(
        pa.table({"cluster": pa.array(cluster, pa.int32()), "distance": distance}),
        copied / "clusters" / "part-00000000.parquet",
        row_group_size=PART,
    )
    from safetensors.numpy import save_file

    sizes = np.bincount(cluster, minlength=14)
    save_file({"sizes.1": sizes}, copied / "clusters" / "levels.safetensors")
    found = cluster_examples(copied, False)
    order = [c for c in np.argsort(-sizes, kind="stable") if sizes[c]]
    assert [one.number for one in found] == [*order[:3], *order[5:8], *order[-3:]]
    for one in found:
        near_to_far = distance[one.numbers]
        assert (np.diff(near_to_far) >= 0).all()
        inside = distance[cluster == one.number]
        assert near_to_far[0] == inside.min()
        assert near_to_far[-1] == inside.max()


def test_an_empty_cluster_is_no_example_and_a_part_of_the_heap_is_named_as_such(copied, monkeypatch):
    from safetensors.numpy import save_file

    save_file({"sizes.1": np.array([100, 8, 8, 8, 8, 8, 0])}, copied / "clusters" / "levels.safetensors")
    found = cluster_examples(copied, True)
    assert 6 not in [one.number for one in found]
    text = read_page(copied)
    assert "Cluster 6" not in text
    assert re.search(r"<p>100 images</p><p>\d of \d looked at chosen</p>", text)


def test_the_page_of_a_large_heap_stays_small(copied, finished):
    kept = [i for i in range(len(finished.names)) if i not in finished.dropped]
    group = {
        "representative": kept[0],
        "members": kept * 50,
        "similarities": [0.7] * 50 * len(kept),
        "size": 10**9,
    }
    pair = {"a": kept[0], "b": kept[1], "kept_apart": False}
    pairs = [pair | {"similarity": 0.5 + i / 10_000} for i in range(2000)]
    facts(copied / "duplicates", groups=[group] * 300, pairs=pairs)
    page = tell(copied).read_text()
    assert len(page) < 5_000_000
    assert page.count("data:image/jpeg") < 400
    # pairs are of the whole range: the most and the least similar are there
    assert "0.700, one group" in page
    assert "0.500, one group" in page


def test_duplicates_that_were_too_many_are_shown_all_the_same(copied):
    for file in (copied / "duplicates").glob("*.parquet"):
        file.unlink()
    said = json.loads((copied / "duplicates" / STEP).read_text())
    alter(copied / "duplicates", done=None, facts=None, found=said["facts"])
    text = read_page(copied)
    assert "threshold 0.6<" in text
    assert "<h2>Duplicates" in text
    assert "exact duplicate" not in text
    assert "<div>not finished</div>" in text


def test_an_evaluation_set_that_took_a_group(copied, finished):
    kept = finished.groups[0]["representative"]
    path = copied / "duplicates" / f"part-{kept // PART:08d}.parquet"
    reasons = pq.read_table(path)["reason"].to_pylist()
    reasons[kept % PART] = "near-duplicate of pets & co"
    pq.write_table(pa.table({"reason": reasons}), path, row_group_size=PART)
    assert "<p>near-duplicate of pets &amp; co</p>" in read_page(copied)


def test_clusters_that_were_not_sampled(copied):
    shutil.rmtree(copied / "sample")
    text = read_page(copied)
    assert ">Level 1: 6 clusters<" in text
    assert "nats" not in text
    assert "Framed and ticked" not in text


def test_numbers_of_images_from_step_to_step():
    images = {"images": 100, "reasons": {"unreadable": 10, "blurred": 0}}
    found = {"images": images, "vectors": {"reasons": {"vanished": 2}}, "duplicates": {"dropped": {"exact": 8}}}
    assert flow({}, None) == {}
    assert flow({"vectors": {"reasons": {}}}, {None: 3}) == {}
    assert flow(found, None) == {
        "images": Flow(100, 90, {"unreadable": 10}),
        "vectors": Flow(90, 88, {"vanished": 2}),
        "duplicates": Flow(88, 80, {"exact": 8}),
    }
    assert flow(found | {"sample": {"chosen": 30}}, None)["sample"] == Flow(80, 30, {"not sampled": 50})
    assert "sample" not in flow(found | {"sample": {"chosen": 30}, "retrieved": {}}, None)
    # the manifest has 5 images of a set more, of which one is unreadable
    manifest = {None: 34, "unreadable": 11, "vanished": 2, "exact": 8, "not sampled": 50}
    rows = flow(found | {"sample": {"chosen": 30}}, manifest)
    assert rows["manifest"] == Flow(85, 34, {"unreadable": 1, "not sampled": 50})
    summary = {item["label"]: item["value"] for item in heap_story._summary(rows)}
    assert summary == {"Images kept": "34", "Images in": "105", "Dropped": "71", "Share kept": "32.4%"}


def test_the_manifest_says_how_many_are_kept(copied, finished):
    copies = {number for group in finished.groups for number in group["members"]}
    reasons = [
        finished.dropped.get(i) or ("near-duplicate" if i in copies else None) or (None if i % 2 else "not sampled")
        for i in range(len(finished.names))
    ]
    facts(copied / "vectors", reasons={})
    facts(copied / "duplicates", dropped={"near-duplicate": len(copies)})
    pq.write_table(pa.table({"reason": reasons}), copied / "manifest.parquet", row_group_size=10)
    text = read_page(copied)
    left = len(reasons) - 13 - len(copies)
    row = re.search(r'<th scope="row">Manifest</th>(.*?)</tr>', text, re.S)
    assert row is not None
    assert f"<td>{left}</td>" in row[1]
    assert f"<div>not sampled: {reasons.count('not sampled')}</div>" in row[1]
    assert f"<dd>{reasons.count(None)}</dd>" in text
