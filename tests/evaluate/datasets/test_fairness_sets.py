"""Dollar Street as a miniature with the true layout."""

import csv
from math import exp

import numpy as np
import pytest
from PIL import Image

from opsin.errors import OpsinError
from opsin.evaluate.datasets.fairness import GROUP_SETS, income_bucket

HEADER = [
    "id", "country.id", "country.name", "region.id", "type", "imageRelPath", "topics", "place", "income",
    "imagenet_synonyms", "imagenet_sysnet_id",
]  # fmt: skip
ROWS = {
    "train": [
        ("aa", "bi", "Burundi", "af", 27.0, [532, 762]),
        ("bb", "bi", "Burundi", "af", 27.0, [999]),
        ("cc", "cn", "China", "as", 558.5, [0]),
    ],
    "test": [("dd", "us", "United States", "am", 4650.0, [851]), ("ee", "fr", "France", "eu", 27.0, [851])],
}


@pytest.fixture
def dollarstreet(tmp_path):
    base = tmp_path / "dataset_dollarstreet"
    for part, rows in ROWS.items():
        base.mkdir(exist_ok=True)
        with (base / f"images_v2_imagenet_{part}.csv").open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(HEADER)
            for key, code, country, region, income, classes in rows:
                path = f"assets/{key}/{key}.jpg"
                (base / path).parent.mkdir(parents=True)
                Image.fromarray(np.full((8, 8, 3), ord(key[0]), dtype=np.uint8)).save(base / path)
                line = [key, code, country, region, "image", path, "['Beds', \"it's\"]", "home", income]
                writer.writerow([*line, "['a', 'b']", classes])
    return tmp_path


def test_dollar_street_has_groups_households_and_several_classes(dollarstreet):
    found = GROUP_SETS["dollarstreet"].read(dollarstreet)
    assert found.attributes["region"].tolist() == ["africa", "africa", "asia", "americas", "europe"]
    assert found.attributes["income"].tolist() == ["low", "low", "medium", "high", "low"]
    assert found.clusters[0] == found.clusters[1]
    assert len(set(found.clusters.tolist())) == 4  # the same income in another country is another home
    assert found.images.labels.shape == (5, 1000)
    assert [np.flatnonzero(row).tolist() for row in found.images.labels] == [[532, 762], [999], [0], [851], [851]]
    assert abs(int(found.images.read(3)[0, 0, 0]) - ord("d")) < 3
    inside = GROUP_SETS["dollarstreet"].read(dollarstreet / "dataset_dollarstreet")
    assert inside.images.fingerprint == found.images.fingerprint


def test_buckets_are_those_of_the_reference_code():
    for income in (5, 26.99, 90, 91, 500, 1807, 1809, 19671):
        assert income_bucket(income) == {1: "low", 2: "medium", 3: "high"}[np.round(np.log(income) / 3)]
    assert income_bucket(exp(4.49)) == "low"
    assert income_bucket(exp(4.51)) == "medium"
    assert income_bucket(2.0) == "low"  # where that code has no answer
    assert income_bucket(1e6) == "high"


def test_a_missing_table_is_named_with_its_source(dollarstreet):
    (dollarstreet / "dataset_dollarstreet" / "images_v2_imagenet_test.csv").unlink()
    with pytest.raises(
        OpsinError, match=r"images_v2_imagenet_test.csv is missing: it comes from .*dataset_dollarstreet.zip"
    ):
        GROUP_SETS["dollarstreet"].read(dollarstreet)


def test_missing_images_are_counted_with_an_example(dollarstreet):
    (dollarstreet / "dataset_dollarstreet" / "assets" / "cc" / "cc.jpg").unlink()
    with pytest.raises(OpsinError, match=r"1 of 5 images are missing, such as .*cc.jpg"):
        GROUP_SETS["dollarstreet"].read(dollarstreet)


@pytest.mark.parametrize(("old", "new"), [(",af,", ",xx,"), ("27.0", "much"), ("[999]", "[1000]"), ("27.0", "0")])
def test_what_dollar_street_does_not_have_is_an_error(dollarstreet, old, new):
    path = dollarstreet / "dataset_dollarstreet" / "images_v2_imagenet_train.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(OpsinError, match="hold an income, region or class that Dollar Street does not have"):
        GROUP_SETS["dollarstreet"].read(dollarstreet)


def test_another_table_is_an_error(dollarstreet):
    path = dollarstreet / "dataset_dollarstreet" / "images_v2_imagenet_train.csv"
    path.write_text(path.read_text().replace("income", "salary"))
    with pytest.raises(OpsinError, match="has no column income"):
        GROUP_SETS["dollarstreet"].read(dollarstreet)


def test_two_incomes_in_one_country_are_two_homes(tmp_path):
    from opsin.evaluate.datasets.fairness import dollarstreet

    for table, rows in (("train", "Chad,af,a.jpg,50,[1]"), ("test", "Chad,af,b.jpg,70,[2]")):
        (tmp_path / f"images_v2_imagenet_{table}.csv").write_text(
            "country.name,region.id,imageRelPath,income,imagenet_sysnet_id\n" + rows + "\n"
        )
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    assert len(set(dollarstreet(tmp_path).clusters.tolist())) == 2
