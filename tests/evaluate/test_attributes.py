"""Tables with attributes: shares by group, gaps, intervals, and tables that do not line up."""

import csv

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from opsin.errors import OpsinError
from opsin.evaluate.attributes import MOST, by_group, grouped, read_columns

OPTIONS = {"repeats": 4000, "seed": 0, "smallest": 10}


def draw(shares, sizes, seed=0):
    """Hits and groups of which the named shares hit, in a mixed order."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.array(list(shares)), sizes)
    hits = np.concatenate([rng.random(size) < share for share, size in zip(shares.values(), sizes, strict=True)])
    order = rng.permutation(len(hits))
    return hits[order], groups[order]


def test_shares_by_group_by_hand():
    hits = np.array([1, 1, 0, 1, 0, 0, 0, 1], dtype=bool)
    groups = np.array(["b", "b", "b", "b", "a", "a", "a", ""])
    found = by_group(hits, groups, repeats=100, seed=0, smallest=3)
    assert list(found.groups) == ["a", "b"]
    assert (found.groups["a"].images, found.groups["a"].value) == (3, 0.0)
    assert (found.groups["b"].images, found.groups["b"].value) == (4, 0.75)
    assert found.gap is not None
    assert found.gap[:3] == ("b", "a", 0.75)
    assert found.gap.relative == 1.0


def test_the_relative_gap_is_the_papers():
    # Table 12: 67.4 for low and 90.5 for high incomes is a relative gap of 25.5 %.
    hits = np.concatenate([np.arange(1000) < 674, np.arange(1000) < 905])
    found = by_group(hits, np.repeat(["low", "high"], 1000), **OPTIONS)
    assert found.gap is not None
    assert found.gap.value == pytest.approx(0.231)
    assert found.gap.relative == pytest.approx(0.255, abs=5e-4)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["", "a", "b", "c", "ü"])), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_shares_are_those_of_pandas(rows):
    hits, groups = np.array([hit for hit, _ in rows]), np.array([group for _, group in rows])
    found = by_group(hits, groups, repeats=20, seed=0, smallest=1)
    table = pd.DataFrame({"hit": hits, "group": groups})
    wanted = table[table.group != ""].groupby("group").hit.agg(["mean", "size"])
    assert {name: (share.value, share.images) for name, share in found.groups.items()} == {
        name: (row["mean"], row["size"]) for name, row in wanted.iterrows()
    }
    if len(wanted) < 2:
        assert found.gap is None
    else:
        assert found.gap is not None
        assert found.gap.value == pytest.approx(wanted["mean"].max() - wanted["mean"].min())
        assert found.gap.best != found.gap.worst
    for share in found.groups.values():
        assert share.low <= share.high or np.isnan(share.low)


def test_intervals_are_those_of_scipys_bootstrap():
    hits, groups = draw({"a": 0.9, "b": 0.6, "c": 0.75}, (60, 90, 50))
    found = by_group(hits, groups, repeats=20_000, seed=0, smallest=10)

    def gap(hit, group):
        return hit[group == 0].mean() - hit[group == 1].mean()

    number = np.searchsorted(["a", "b", "c"], groups)
    wanted = stats.bootstrap(
        (hits.astype(float), number), gap, paired=True, vectorized=False, n_resamples=6000, method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found.gap is not None
    assert (found.gap.best, found.gap.worst) == ("a", "b")
    assert (found.gap.low, found.gap.high) == pytest.approx(tuple(wanted), abs=0.01)
    alone = stats.bootstrap(
        (hits.astype(float), number), lambda hit, group: hit[group == 2].mean(), paired=True, vectorized=False,
        n_resamples=6000, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found.groups["c"][2:] == pytest.approx(tuple(alone), abs=0.015)


def test_clusters_of_one_image_are_images():
    hits, groups = draw({"a": 0.9, "b": 0.6}, (60, 90))
    one = by_group(hits, groups, repeats=20_000, seed=0, smallest=10).gap
    other = by_group(hits, groups, np.arange(150), repeats=20_000, seed=1, smallest=10).gap
    assert one is not None
    assert other is not None
    assert other[:3] == one[:3]
    assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=0.01)


def test_intervals_by_cluster_are_those_of_drawing_clusters_one_by_one():
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(30), rng.integers(2, 9, 30))
    clusters = clusters[rng.permutation(len(clusters))]
    kind = np.array(["a", "b"])[np.arange(30) % 2]
    groups = kind[clusters]
    groups[::7] = ""
    rate = rng.random(30)
    hits = rng.random(len(clusters)) < rate[clusters]
    found = by_group(hits, groups, clusters, repeats=20_000, seed=0, smallest=1).gap
    assert found is not None
    differences = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(clusters == one) for one in rng.integers(0, 30, 30)])
        differences.append(
            hits[rows][groups[rows] == found.best].mean() - hits[rows][groups[rows] == found.worst].mean()
        )
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=0.02)
    alone = by_group(hits, groups, repeats=20_000, seed=0, smallest=1).gap
    assert alone is not None
    assert found.high - found.low > 1.2 * (alone.high - alone.low)  # images of a cluster are alike


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = []
    for seed in range(150):
        hits, groups = draw({"a": 0.9, "b": 0.6}, (80, 80), seed)
        gap = by_group(hits, groups, repeats=600, seed=seed, smallest=10).gap
        assert gap is not None
        covered.append(gap.low <= 0.3 <= gap.high)
    assert 0.89 <= np.mean(covered) <= 0.99


def test_no_difference_gives_an_interval_that_holds_zero():
    hits, groups = draw({"a": 0.7, "b": 0.7}, (200, 200))
    gap = by_group(hits, groups, **OPTIONS).gap
    assert gap is not None
    assert gap.low <= 0 <= gap.high


def test_small_groups_are_shown_and_not_in_the_gap():
    hits, groups = draw({"a": 0.9, "b": 0.6, "tiny": 0.0}, (60, 90, 9))
    found = by_group(hits, groups, **OPTIONS)
    assert found.groups["tiny"].images == 9
    assert found.gap is not None
    assert {found.gap.best, found.gap.worst} == {"a", "b"}
    assert by_group(hits, groups, repeats=10, seed=0, smallest=70).gap is None


def test_the_seed_decides():
    hits, groups = draw({"a": 0.9, "b": 0.6}, (60, 90))
    assert by_group(hits, groups, **OPTIONS) == by_group(hits, groups, **OPTIONS)
    assert by_group(hits, groups, **OPTIONS) != by_group(hits, groups, **{**OPTIONS, "seed": 1})


def pictures(tmp_path, count=6):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(folder / "sub" / f"{i}.png")
    return folder


def rows_of(count=6, **columns):
    return {
        "path": [f"sub/{i}.png" for i in range(count)],
        "label": ["cat" if i % 2 else "dog" for i in range(count)],
        "skin": ["dark" if i < 3 else "light" for i in range(count)],
        **columns,
    }


def write_table(path, columns):
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        with path.open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_tables_of_both_kinds_give_the_same(tmp_path, ending):
    columns = rows_of(age=[20, 30, 20, 30, 20, 30], home=["x", "x", "y", "y", "z", "z"])
    found = grouped(pictures(tmp_path), write_table(tmp_path / f"t{ending}", columns), "label", (), "home")
    assert found.images.classes == ["cat", "dog"]
    assert found.images.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert {name: values.tolist() for name, values in found.attributes.items()} == {
        "skin": ["dark"] * 3 + ["light"] * 3,
        "age": ["20", "30"] * 3,
    }
    assert found.clusters.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.images.read(4)[0, 0, 0] == 4
    part = found.part(np.array([4, 1]))
    assert part.attributes["skin"].tolist() == ["light", "dark"]
    assert part.clusters.tolist() == [2, 0]
    assert part.images.read(0)[0, 0, 0] == 4


def test_columns_of_many_values_are_attributes_only_if_named(tmp_path):
    folder = pictures(tmp_path, 24)
    table = write_table(tmp_path / "t.csv", rows_of(24, name=[f"n{i}" for i in range(24)], same=["s"] * 24))
    assert list(grouped(folder, table, "label").attributes) == ["skin"]
    assert list(grouped(folder, table, "label", ("name",)).attributes) == ["name"]
    assert list(grouped(folder, table, None).attributes) == ["label", "skin"]


def test_columns_that_come_twice_are_refused(tmp_path):
    folder = pictures(tmp_path)
    (tmp_path / "t.csv").write_text("path,label,label,skin\nsub/0.png,a,b,c\n")
    with pytest.raises(OpsinError, match="has several columns 'label'"):
        grouped(folder, tmp_path / "t.csv", "label")


def test_a_number_that_is_none_belongs_to_no_group(tmp_path):
    table = write_table(tmp_path / "t.parquet", rows_of(skin=[1.0, float("nan"), 2.0, 2.0, 2.0, 1.0]))
    found = grouped(pictures(tmp_path), table, "label")
    assert found.attributes["skin"].tolist() == ["1.0", "", "2.0", "2.0", "2.0", "1.0"]


def test_an_empty_cell_belongs_to_no_group(tmp_path):
    table = write_table(tmp_path / "t.parquet", rows_of(skin=["dark", None, "light", "light", "light", "dark"]))
    found = grouped(pictures(tmp_path), table, "label")
    assert found.attributes["skin"].tolist() == ["dark", "", "light", "light", "light", "dark"]


def test_files_without_a_row_are_told(tmp_path):
    folder = pictures(tmp_path, 8)
    assert grouped(folder, write_table(tmp_path / "t.csv", rows_of(6)), "label").without == ["sub/6.png", "sub/7.png"]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "t.csv").write_text("path,label\na.png, cat \n", encoding="utf-8-sig")
    assert read_columns(tmp_path / "t.csv") == {"path": ["a.png"], "label": ["cat"]}


@pytest.mark.parametrize(
    ("columns", "options", "sentence"),
    [
        ({"label": None, "lable": ["a"] * 6}, {}, r"unknown column 'label': did you mean 'lable'\?"),
        ({}, {"attribute_columns": ("skim",)}, r"unknown column 'skim': did you mean 'skin'\?"),
        ({}, {"cluster_column": "household"}, "unknown column 'household': known: label, path, skin"),
        ({"path": None}, {}, "unknown column 'path'"),
        ({"path": [f"{i}.png" for i in range(6)]}, {}, "6 of 6 rows of .* have no file in .*, such as 0.png, 1"),
        ({"path": ["sub/1.png", "sub/./1.png", *(f"sub/{i}.png" for i in range(2, 6))]}, {}, "1 paths of .* several"),
        ({"label": ["", "a", "", "b", "b", "b"]}, {}, r"2 rows of .* have no 'label', such as sub/0.png, sub/2.png"),
        ({"skin": ["dark"] * 6}, {}, "has no attribute, a column of 2 to 20 different values"),
        ({"skin": ["dark"] * 6}, {"attribute_columns": ("skin",)}, "column 'skin' of .* has only the group 'dark'"),
        ({"skin": [""] * 6}, {"attribute_columns": ("skin",)}, "column 'skin' of .* has no value at all"),
        ({"home": ["x", "", "y", "y", "y", "y"]}, {"cluster_column": "home"}, "1 rows of .* have no .home., such"),
    ],
)  # fmt: skip
def test_what_does_not_line_up_is_one_sentence(tmp_path, columns, options, sentence):
    cells = {name: cells for name, cells in {**rows_of(), **columns}.items() if cells is not None}
    with pytest.raises(OpsinError, match=sentence):
        grouped(pictures(tmp_path), write_table(tmp_path / "t.csv", cells), "label", **options)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", b"path,label\n", "has no rows"),
        ("t.csv", b"", "has no rows"),
        ("t.csv", b"path,label\na.png\n", "row 2 of .* has 1 cells and the header 2"),
        ("t.csv", b"path,label\n\xff.png,a\n", "cannot be read as CSV in UTF-8"),
        ("t.parquet", b"nonsense", "cannot be read as Parquet"),
        ("t.xlsx", b"", "neither CSV nor Parquet"),
    ],
)
def test_damaged_tables_are_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OpsinError, match=sentence):
        read_columns(tmp_path / name)


def test_missing_files_and_folders_are_one_sentence(tmp_path):
    with pytest.raises(OpsinError, match="there is no file"):
        read_columns(tmp_path / "none.csv")
    with pytest.raises(OpsinError, match="there is no folder"):
        grouped(tmp_path / "none", write_table(tmp_path / "t.csv", rows_of()), "label")


def test_clusters_of_many_images_count_as_those_of_few():
    # In group a one home of 8 images, all hits, and one of 2, all misses; in b a home of 3 with two hits.
    hits = np.array([True] * 8 + [False] * 2 + [True, True, False])
    groups = np.array(["a"] * 10 + ["b"] * 3)
    clusters = np.array([0] * 8 + [1] * 2 + [2] * 3)
    options = {"repeats": 20_000, "seed": 0, "smallest": 1}
    images = by_group(hits, groups, clusters, **options)
    homes = by_group(hits, groups, clusters, **options, equal_clusters=True)
    assert (images.groups["a"].value, homes.groups["a"].value) == (0.8, 0.5)
    assert images.groups["b"].value == homes.groups["b"].value == pytest.approx(2 / 3)
    assert homes.groups["a"].images == 10
    assert homes.gap.best == "b"
    assert images.gap.best == "a"
    # Draws of three homes hold the first only, the second only, or both in some proportion.
    assert (homes.groups["a"].low, homes.groups["a"].high) == (0, 1)


def test_the_gap_of_groups_with_the_same_clusters_is_paired():
    rng = np.random.default_rng(0)
    home = np.repeat(np.arange(60), 2)
    hits = np.repeat(rng.random(60) < 0.5, 2)  # each household has one image of each group, both right or both wrong
    hits[0] = True
    hits[1] = False
    found = by_group(hits, np.tile(["a", "b"], 60), home, repeats=2000, seed=0, smallest=1)
    assert found.gap.high - found.gap.low < 0.1


def test_twenty_values_are_an_attribute_still(tmp_path):
    for i in range(MOST):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text("path,who\n" + "".join(f"{i}.png,v{i}\n" for i in range(MOST)))
    assert list(grouped(tmp_path, tmp_path / "t.csv", None).attributes) == ["who"]
