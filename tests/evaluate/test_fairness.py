"""Fairness: accuracy by group, label groups, tables of one's own and Dollar Street, wrong input."""

import csv
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_digits
from small import small

from opsin.errors import OpsinError
from opsin.evaluate import fairness as fairness_module
from opsin.evaluate import linear as linear_module
from opsin.evaluate.classifier import Classifier
from opsin.evaluate.fairness import Fairness, associated, fairness, read_label_groups, top_hits
from opsin.evaluate.pooled import pool
from opsin.evaluate.probe import Probe
from opsin.evaluate.sets import ImageSet
from opsin.evaluate.task import Run
from opsin.evaluate.transforms import Centre

PROBE = Probe(steps=120, train_batch=64, blocks=(1,), crops="centre", size=16)


def run_in(tmp_path):
    return Run(batch_size=64, workers=2, cache=tmp_path / "kept", progress=False)


def write_table(path, rows):
    with path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Patches of a photo and of a bluish one, of which those of one place are drowned in noise: the same there."""
    folder, rng, rows = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), []
    bluish = skimage.data.camera()[:, :, None] * np.array([0.3, 0.5, 1])  # so that any random backbone sees it
    for name, photo in (("coffee", skimage.data.coffee()), ("camera", bluish)):
        for i in range(80):
            top, left = rng.integers(0, 250, 2)
            patch = photo[top : top + 32, left : left + 32].astype(float)
            place = ("indoors", "outdoors")[i % 2]
            if place == "outdoors":
                patch = rng.integers(0, 256, patch.shape)
            Image.fromarray(patch.astype(np.uint8)).save(folder / f"{name}{i}.png")
            row = {"path": f"{name}{i}.png", "label": name, "place": place, "age": "young" if i % 3 else "old"}
            rows.append(row | {"home": f"{place} {i // 8}"})
    return folder, write_table(folder / "table.csv", rows)


def test_the_group_that_is_drowned_in_noise_is_worse(model, photos, tmp_path):
    folder, table = photos
    settings = Fairness(data=str(folder), table=table, attribute_columns=("place", "age"), repeats=500, probe=PROBE)
    result = fairness(model, settings, run_in(tmp_path))
    assert list(result.metrics) == [
        "accuracy",
        "gap_between_groups",
        "accuracy_place_indoors",
        "accuracy_place_outdoors",
        "accuracy_age_old",
        "accuracy_age_young",
    ]
    place = result.details["attributes"]["accuracy"]["place"]
    assert (place["gap"]["best"], place["gap"]["worst"]) == ("indoors", "outdoors")
    assert place["gap"]["low"] > 0
    assert result.metrics["gap_between_groups"] == place["gap"]["value"]
    assert result.metrics["accuracy_place_indoors"] > 0.7
    assert result.outcomes.mean() == pytest.approx(result.metrics["accuracy"])
    assert result.details["n_test"] == len(result.outcomes) == 80
    assert result.table.rows[0] == ["all", "80", f"{result.metrics['accuracy']:.3f}"]
    assert [row[0] for row in result.table.rows[1:]] == [
        "place: indoors",
        "place: outdoors",
        "place: gap",
        "age: old",
        "age: young",
        "age: gap",
    ]
    json.dumps(result.details, allow_nan=False)


def head(classes, width=24, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return Classifier(torch.randn(classes, width, generator=rng), torch.zeros(classes), 1, False)


def test_accuracy_by_group_is_that_of_each_image_by_pandas(model, photos, tmp_path, monkeypatch):
    folder, table = photos
    monkeypatch.setattr(fairness_module, "load", lambda *_: head(2))
    settings = Fairness(data=str(folder), table=table, head=tmp_path / "h.pth", repeats=50, probe=PROBE)
    result = fairness(model, settings, run_in(tmp_path))
    frame = pd.read_csv(table)
    images = [torch.from_numpy(np.array(Image.open(folder / path))).permute(2, 0, 1) for path in frame.path]
    predicted = head(2).logits(pool(model, torch.stack([Centre(16)(image) for image in images]))).argmax(1)
    frame["right"] = np.array(["camera", "coffee"])[predicted.numpy()] == frame.label
    assert result.outcomes.tolist() == frame.right.astype(float).tolist()
    for attribute in ("place", "age", "home"):
        for group, share in frame.groupby(attribute).right.mean().items():
            assert result.metrics[f"accuracy_{attribute}_{group}"] == pytest.approx(share)


def test_clusters_train_or_test_and_are_counted(model, photos, tmp_path, monkeypatch):
    folder, table = photos
    seen = []

    def trains(model, train, chooses, settings, run):
        seen.extend([train.name(i) for i in range(len(train))] + [chooses.name(i) for i in range(len(chooses))])
        return type("Fitted", (), {"classifier": head(2), "facts": {}})

    monkeypatch.setattr(fairness_module, "fit", trains)
    settings = Fairness(data=str(folder), table=table, cluster_column="home", repeats=50, probe=PROBE)
    result = fairness(model, settings, run_in(tmp_path))
    homes = pd.read_csv(table).set_index("path").home
    trained = {homes[name.rsplit("/", 1)[1]] for name in seen}
    assert len(seen) + result.details["n_test"] == 160
    assert 60 <= result.details["n_test"] <= 80
    left = homes[[path for path in homes.index if not any(name.endswith(f"/{path}") for name in seen)]]
    assert trained.isdisjoint(set(left))
    assert f"drawn by {left.nunique()} clusters" in result.table.note


def test_training_images_of_their_own_leave_all_rows_to_the_test(model, tmp_path):
    digits = load_digits()
    rows = []
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label > 1 or i > 900:
            continue
        part = tmp_path / ("train" if i % 2 else "test") / f"digit{label}"
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).resize((32, 32)).save(part / f"{i}.png")
        if not i % 2:
            rows.append({"path": f"digit{label}/{i}.png", "label": f"digit{label}", "writer": "ab"[i // 2 % 2]})
    settings = Fairness(
        data=str(tmp_path / "test"), table=write_table(tmp_path / "t.csv", rows), train_data=str(tmp_path / "train"),
        repeats=50, probe=PROBE,
    )  # fmt: skip
    result = fairness(model, settings, run_in(tmp_path))
    assert result.details["n_test"] == len(rows)
    assert result.metrics["accuracy"] > 0.95


def test_hits_among_the_first_by_hand():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 9.0]])
    assert top_hits(scores, torch.tensor([0, 1, 0]), 1).tolist() == [True, False, False]
    assert top_hits(scores, torch.tensor([0, 1, 2]), 2).tolist() == [True, True, True]
    several = torch.tensor([[0, 0, 1], [0, 1, 1], [-1, -1, 0]])
    assert top_hits(scores, several, 1).tolist() == [False, False, False]
    assert top_hits(scores, several, 2).tolist() == [False, True, False]


def test_labels_that_count_by_hand():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.94, 0.03, 0.02, 0.01], [0.2, 0.2, 0.15, 0.45]])
    members = {"human": [0, 1], "animal": [2], "crime": [3]}
    five = associated(probabilities.log() + 7, members, 4, 0.1)
    assert {name: given.tolist() for name, given in five.items()} == {
        "human": [True, True, True],
        "animal": [True, False, True],
        "crime": [False, False, True],
    }
    two = associated(probabilities.log(), members, 2, 0.1)  # the third of an image does not count
    assert two["animal"].tolist() == [False, False, False]
    assert associated(probabilities.log(), members, 4, 0.4)["human"].tolist() == [True, True, False]


def test_shares_of_label_groups_are_those_of_each_image(model, photos, tmp_path, monkeypatch):
    folder, table = photos
    for name in ("cup", "cat", "dog", "jail"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(tmp_path / "train" / name / "0.png")
    (tmp_path / "groups.yaml").write_text("animal: [cat, dog]\ncrime: [jail]\n")
    frame = pd.read_csv(table)
    images = [torch.from_numpy(np.array(Image.open(folder / path))).permute(2, 0, 1) for path in frame.path]
    pooled = pool(model, torch.stack([Centre(16)(image) for image in images]))
    raw = head(4)
    spread = raw.logits(pooled)
    saved = Classifier(raw.weight / spread.std(0)[:, None], -spread.mean(0) / spread.std(0), 1, False)
    monkeypatch.setattr(fairness_module, "load", lambda *_: saved)
    settings = Fairness(
        data=str(folder), table=table, attribute_columns=("place",), groups=tmp_path / "groups.yaml", threshold=0.3,
        train_data=str(tmp_path / "train"), head=tmp_path / "h.pth", repeats=200, probe=PROBE,
    )  # fmt: skip
    result = fairness(model, settings, run_in(tmp_path))
    chances = saved.logits(pooled).softmax(1).numpy()
    classes = ["cat", "cup", "dog", "jail"]
    frame["animal"] = [any(one[classes.index(name)] >= 0.3 for name in ("cat", "dog")) for one in chances]
    frame["crime"] = chances[:, 3] >= 0.3
    assert list(result.metrics) == ["gap_between_groups", "share_animal", "share_crime"]
    assert result.outcomes is None
    gaps = []
    for labels in ("animal", "crime"):
        assert 0 < frame[labels].mean() < 1
        assert result.metrics[f"share_{labels}"] == pytest.approx(frame[labels].mean())
        by_place = frame.groupby("place")[labels].mean()
        gaps.append(by_place.max() - by_place.min())
        for place, share in by_place.items():
            assert result.details["attributes"][labels]["place"]["groups"][place]["value"] == pytest.approx(share)
    assert result.metrics["gap_between_groups"] == pytest.approx(max(gaps))
    assert result.table.headers == ("group", "images", "animal", "crime")
    assert all(len(row) == 4 for row in result.table.rows)


def test_dollar_street_counts_the_first_five_of_several_classes(model, tmp_path, monkeypatch):
    base, rng, rows = tmp_path / "dataset_dollarstreet", np.random.default_rng(0), []
    for i in range(48):
        path = f"assets/{i}/{i}.jpg"
        (base / path).parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(base / path)
        region, income = ("af", 40.0) if i < 24 else ("eu", 3000.0)
        classes = sorted(rng.choice(1000, 250, replace=False).tolist()) if i < 40 else list(range(999))
        rows.append({"country.name": f"c{i % 5}", "region.id": region, "imageRelPath": path, "income": income + i % 7})
        rows[-1]["imagenet_sysnet_id"] = classes
    write_table(base / "images_v2_imagenet_train.csv", rows[:20])
    write_table(base / "images_v2_imagenet_test.csv", rows[20:])
    imagenet = ImageSet(
        "ImageNet", 0, lambda _: b"", str, "x", np.zeros(0, dtype=np.int64), [str(i) for i in range(1000)]
    )
    monkeypatch.setattr(fairness_module, "own", lambda _: imagenet)
    monkeypatch.setattr(fairness_module, "load", lambda *_: head(1000))
    settings = Fairness(
        data=f"dollarstreet:{tmp_path}", train_data="photos", head=tmp_path / "h.pth", repeats=50, probe=PROBE
    )
    result = fairness(model, settings, run_in(tmp_path))
    assert result.data == "Dollar Street"
    assert result.details["top"] == 5
    assert {name for name in result.metrics if name.startswith("accuracy_")} == {
        "accuracy_income_low",
        "accuracy_income_high",
        "accuracy_region_africa",
        "accuracy_region_europe",
    }
    images = [torch.from_numpy(np.array(Image.open(base / row["imageRelPath"]))).permute(2, 0, 1) for row in rows]
    scores = head(1000).logits(pool(model, torch.stack([Centre(16)(image) for image in images])))
    wanted = [
        bool(set(first) & set(row["imagenet_sysnet_id"]))
        for first, row in zip(scores.topk(5).indices.tolist(), rows, strict=True)
    ]
    assert np.mean(result.outcomes == wanted) > 0.97  # a decoded JPEG may differ by a level
    homes = {}
    for row, hit in zip(rows, result.outcomes, strict=True):
        homes.setdefault((row["region.id"], row["country.name"], row["income"]), []).append(hit)
    means = [np.mean(hits) for (region, *_), hits in homes.items() if region == "af"]
    assert result.metrics["accuracy_region_africa"] == pytest.approx(np.mean(means))
    every = fairness(model, replace(settings, equal_clusters=False), run_in(tmp_path))
    assert every.metrics["accuracy_region_africa"] == pytest.approx(result.outcomes[:24].mean())
    assert "each of which counts the same" in result.table.note
    monkeypatch.setattr(fairness_module, "own", lambda _: replace(imagenet, classes=["a"] * 1001))
    with pytest.raises(OpsinError, match="the labels of Dollar Street number 1000 classes, and ImageNet has 1001"):
        fairness(model, settings, run_in(tmp_path))
    monkeypatch.setattr(fairness_module, "own", lambda _: imagenet)
    one = fairness(model, replace(settings, top=1), run_in(tmp_path))
    assert one.metrics["accuracy"] < result.metrics["accuracy"]


def test_unreadable_images_and_files_without_rows_are_told(model, photos, tmp_path, monkeypatch):
    folder, table = photos
    rows = pd.read_csv(table).to_dict("records")[::4]
    for row in rows:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / row["path"]).write_bytes((folder / row["path"]).read_bytes())
    (tmp_path / "images" / rows[0]["path"]).write_bytes(b"damaged")
    (tmp_path / "images" / "more.png").write_bytes(b"")
    monkeypatch.setattr(fairness_module, "load", lambda *_: head(2))
    settings = Fairness(
        data=str(tmp_path / "images"), table=write_table(tmp_path / "t.csv", rows), head=tmp_path / "h.pth", repeats=20,
        attribute_columns=("age",), probe=PROBE,
    )  # fmt: skip
    result = fairness(model, settings, run_in(tmp_path))
    assert [name.rsplit("/", 1)[1] for name, _ in result.left_out] == [rows[0]["path"]]
    assert result.details["n_test"] == len(result.outcomes) == len(rows) - 1
    assert "1 images have no row in the table, such as more.png." in result.table.note
    assert "1 images cannot be read, such as" in result.table.note


def test_groups_that_no_image_tests_are_told(model, photos, tmp_path):
    folder, table = photos
    rows = pd.read_csv(table)
    rows.loc[rows.path == "coffee0.png", "age"] = "unknown"
    rows.to_csv(tmp_path / "t.csv", index=False)
    settings = Fairness(
        data=str(folder),
        table=tmp_path / "t.csv",
        attribute_columns=("age",),
        repeats=20,
        probe=replace(PROBE, steps=2),
    )
    notes = {fairness(model, replace(settings, seed=seed), run_in(tmp_path)).table.note for seed in range(3)}
    assert any("No image tests age: unknown." in note for note in notes)
    assert not all("No image tests age: unknown." in note for note in notes)


def test_the_classifier_is_chosen_on_training_images(model, photos, tmp_path, monkeypatch):
    folder, table = photos
    sizes, real = [], fairness_module.fit
    monkeypatch.setattr(
        fairness_module,
        "fit",
        lambda model, train, chooses, *rest: (
            sizes.append((len(train), len(chooses))) or real(model, train, chooses, *rest)
        ),
    )
    settings = Fairness(data=str(folder), table=table, repeats=20, probe=replace(PROBE, steps=2))
    assert fairness(model, settings, run_in(tmp_path)).details["n_test"] == 80
    assert sizes == [(72, 8)]


def test_label_groups_are_read_from_yaml_and_json(tmp_path):
    (tmp_path / "g.yaml").write_text("human: [face, people]\ncrime:\n- prison\n")
    (tmp_path / "g.json").write_text('{"human": ["face", "people"], "crime": ["prison"]}')
    wanted = {"human": ["face", "people"], "crime": ["prison"]}
    assert read_label_groups(tmp_path / "g.yaml") == read_label_groups(tmp_path / "g.json") == wanted


@pytest.mark.parametrize("content", ["", "human", "human: face", "human: []", "[1, 2]"])
def test_what_is_no_mapping_of_lists_is_one_sentence(tmp_path, content):
    (tmp_path / "g.yaml").write_text(content)
    with pytest.raises(OpsinError, match="is no mapping of groups to lists of classes: write, for example"):
        read_label_groups(tmp_path / "g.yaml")


def test_label_groups_that_cannot_be_read_are_one_sentence(tmp_path):
    with pytest.raises(OpsinError, match=r"cannot read the label groups .*none.yaml: No such file"):
        read_label_groups(tmp_path / "none.yaml")
    (tmp_path / "g.yaml").write_text("{a: [")
    with pytest.raises(OpsinError, match=r"g.yaml is not YAML: while parsing"):
        read_label_groups(tmp_path / "g.yaml")
    (tmp_path / "g.yaml").write_text("a: [b]\nc: [d]\na: [e]\n")
    with pytest.raises(OpsinError, match="'a' stands there twice"):
        read_label_groups(tmp_path / "g.yaml")


def test_wrong_combinations_are_one_sentence(model, photos, tmp_path):
    folder, table = photos
    run = run_in(tmp_path)

    def fails(sentence, **options):
        with pytest.raises(OpsinError, match=sentence):
            fairness(model, Fairness(**{"data": str(folder), "table": table, "probe": PROBE, **options}), run)

    groups = tmp_path / "g.yaml"
    groups.write_text("drink: [cofee]")
    fails("need a table with their attributes: give --table", table=None)
    fails("--equal-clusters needs clusters: give --cluster-column", equal_clusters=True)
    fails("dollarstreet brings its own table", data=f"dollarstreet:{tmp_path}")
    fails("dollarstreet only tests: give --train-data imagenet:PATH", data=f"dollarstreet:{tmp_path}", table=None)
    fails("unknown column 'lable': did you mean 'label'", label_column="lable")
    fails("label groups need the names of classes: give --train-data", groups=groups)
    fails("have the same 'same', so they cannot be split", table=_with_column(table, tmp_path), cluster_column="same")
    fails("holds only the class 'x', and accuracy needs two", table=_with_column(table, tmp_path), label_column="same")
    for name in ("coffee", "tea"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(tmp_path / "train" / name / "0.png")
    train = str(tmp_path / "train")
    fails("label group 'drink': unknown class 'cofee': did you mean 'coffee'", groups=groups, train_data=train)
    fails("has classes that the train set .* has not, 'camera'", train_data=train, head=tmp_path / "none.pth")
    groups.write_text("drink: [coffee]")
    fails("every class of .* has a single training image", groups=groups, train_data=train)


def _with_column(table, tmp_path):
    rows = pd.read_csv(table).assign(same="x")
    rows.to_csv(tmp_path / "same.csv", index=False)
    return tmp_path / "same.csv"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threshold": 1.5}, "--threshold is 1.5"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"smallest": 0}, "--smallest is 0"),
        ({"top": 0}, "--top is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"test_fraction": 0.0}, "--test-fraction is 0.0: give a share between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_one_sentence(options, sentence):
    with pytest.raises(OpsinError, match=sentence):
        Fairness(**options)


def test_a_probability_of_just_the_threshold_counts():
    from opsin.evaluate.fairness import associated

    assert associated(torch.zeros(1, 4), {"g": [0]}, 4, 0.25)["g"].tolist() == [True]


def test_intervals_are_drawn_as_asked(tmp_path, monkeypatch):
    asked = []
    real = fairness_module.by_group
    monkeypatch.setattr(
        fairness_module,
        "by_group",
        lambda h, g, clusters, **k: asked.append((clusters, k)) or real(h, g, clusters, **k),
    )
    monkeypatch.setattr(fairness_module, "load", lambda *_: head(2))
    rows = [{"path": f"{i}.png", "label": "ab"[i % 2], "who": "xy"[i // 2 % 2], "home": f"h{i // 4}"} for i in range(8)]
    for row in rows:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
            tmp_path / row["path"]
        )
    table = write_table(tmp_path / "t.csv", rows)
    model = small()
    settings = fairness_module.Fairness(
        data=str(tmp_path),
        table=table,
        cluster_column="home",
        head=tmp_path / "h",
        seed=3,
        repeats=77,
        smallest=4,
        probe=PROBE,
        attribute_columns=("who",),
    )
    fairness_module.fairness(model, settings, run_in(tmp_path))
    ((clusters, options),) = asked
    assert clusters.tolist() == [0] * 4 + [1] * 4
    assert options == {"repeats": 77, "seed": 3, "smallest": 4, "equal_clusters": False}


def test_clusters_are_split_by_the_seed():
    table = fairness_module.Grouped(
        fairness_module.ImageSet("x", 40, None, str, "f", np.zeros(40, dtype=np.int64), ["a"]), {}, np.arange(40) // 2
    )
    parts = {tuple(fairness_module._halves(table, fairness_module.Fairness(seed=seed))[1]) for seed in range(4)}
    assert len(parts) == 4


@pytest.mark.parametrize(
    ("module", "read", "part"),
    [
        (fairness_module, lambda: fairness_module._parts(None, Fairness(train_data="imagenet:/x")), "train"),
        (linear_module, lambda: linear_module.further_set("imagenet:/x", None, 3), "val"),
    ],
)
def test_the_right_part_of_a_published_set_is_read(module, read, part, monkeypatch):
    asked = []

    def read_set(_name, _path, part):
        asked.append(part)
        raise KeyError

    monkeypatch.setattr(module, "read_set", read_set)
    with pytest.raises(KeyError):
        read()
    assert asked == [part]
