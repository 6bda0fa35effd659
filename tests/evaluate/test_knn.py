import json
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin.backbone.features import evaluation_transform
from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.data.decode import decode
from opsin.errors import OpsinError
from opsin.evaluate import knn as module
from opsin.evaluate.datasets.classification import SETS, Published
from opsin.evaluate.knn import Knn, few_per_class, knn
from opsin.evaluate.logreg import Logreg, logreg
from opsin.evaluate.model import wrap
from opsin.evaluate.pooled import extract
from opsin.evaluate.sets import ImageSet, own, split
from opsin.evaluate.task import Run
from opsin.evaluate.transforms import Centre

COLOURS = {"blue": (30, 40, 200), "green": (20, 180, 30), "red": (200, 30, 40)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return wrap(VisionTransformer(Architecture(width=24, depth=2, heads=2, patch=8, grid=2, layerscale=0.1)))


@pytest.fixture
def run(tmp_path):
    return Run(batch_size=5, workers=2, cache=tmp_path / "kept", progress=False)


def asks(data, test_data=None, **options):
    return Knn(str(data), None if test_data is None else str(test_data), **({"size": 16} | options))


def write(folder, colour, count, seed):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        h, w = rng.integers(20, 40, 2)
        noise = rng.normal(0, 25, (h, w, 3)) + np.array(colour)
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")


def data_set(root, counts, seed=0):
    for i, (name, count) in enumerate(counts.items()):
        write(root / name, COLOURS.get(name, (128, 128, 128)), count, seed + i)
    return root


def in_memory(read, count):
    return ImageSet("memory", count, read, str, "")


# ---- features without the store


def test_extract_equals_one_image_at_a_time(model):
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, *rng.integers(20, 60, 2)), dtype=np.uint8)) for _ in range(11)]
    seen = []
    source, run = in_memory(images.__getitem__, 11), Run(batch_size=4, workers=3)
    found, bad = extract(model, source, range(2, 11), Centre(16), run, seen.append)
    alone = torch.cat([model.backbone([evaluation_transform(image, 16)[None]])[0].cls for image in images[2:]])
    assert bad == {}
    assert found.cls.dtype == torch.float32
    assert not found.cls.requires_grad
    torch.testing.assert_close(found.cls[:, -1], alone.detach(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found.cls[:, -1].norm(dim=1), torch.ones(9))
    assert seen == [4, 4, 1]


def test_extract_reads_one_batch_ahead(model):
    read, started, arrived = {-1}, [], threading.Condition()

    class Watched(VisionTransformer):
        def layers(self, *args, **kwargs):
            with arrived:  # the next batch is read while this one computes
                arrived.wait_for(lambda: max(read) >= min(4 * len(started) + 7, 19), timeout=5)
            started.append(max(read))
            return super().layers(*args, **kwargs)

    def reader(index):
        with arrived:
            read.add(index)
            arrived.notify_all()
        return torch.zeros(3, 20, 20, dtype=torch.uint8)

    run = Run(batch_size=4, workers=2)
    extract(wrap(Watched(model.arch)), in_memory(reader, 20), range(20), Centre(16), run, lambda _: None)
    assert started == [7, 11, 15, 19, 19]


def test_extract_passes_on_what_reading_raises(model):
    def reader(index):
        if index == 6:
            raise OpsinError("image 6 is broken")
        return torch.zeros(3, 20, 20, dtype=torch.uint8)

    with pytest.raises(OpsinError, match="image 6 is broken"):
        extract(model, in_memory(reader, 20), range(20), Centre(16), Run(batch_size=4, workers=2), lambda _: None)


# ---- splits and draws


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_split_gives_each_class_its_share(labels, fraction, seed):
    labels = np.array(labels)
    train, test = split(labels, fraction, seed)
    assert sorted([*train, *test]) == list(range(len(labels)))
    for label in np.unique(labels):
        n, tested = (labels == label).sum(), (labels[test] == label).sum()
        if n == 1:
            assert tested == 0
        else:
            assert 1 <= tested <= n - 1
            assert abs(tested - n * fraction) <= 1
    again = split(labels, fraction, seed)
    np.testing.assert_array_equal(again[0], train)
    np.testing.assert_array_equal(again[1], test)


def test_split_depends_on_the_seed_and_not_on_other_classes():
    labels = np.repeat([0, 1], 50)
    drawn = {tuple(split(labels, 0.2, seed)[1]) for seed in range(5)}
    assert len(drawn) == 5
    alone = split(labels[:50], 0.2, 3)[1]
    both = split(labels, 0.2, 3)[1]
    np.testing.assert_array_equal(both[both < 50], alone)
    assert set(both[both >= 50] - 50) != set(alone)  # classes are drawn independently


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.sampled_from([0, 2, 3, 9]), min_size=1, max_size=60),
    number=st.integers(1, 20),
    draw=st.integers(0, 100),
)
def test_few_per_class_draws_as_many_as_there_are(labels, number, draw):
    labels = np.array(labels)
    rows = few_per_class(labels, number, 0, draw)
    assert list(rows) == sorted(set(rows))
    for label in np.unique(labels):
        assert (labels[rows] == label).sum() == min(number, (labels == label).sum())
    np.testing.assert_array_equal(rows, few_per_class(labels, number, 0, draw))
    assert set(rows) <= set(few_per_class(labels, number + 1, 0, draw))


def test_few_per_class_draws_every_image_equally_often():
    labels = np.array([0] * 6 + [1] * 4)
    counts = np.zeros(10)
    for draw in range(600):
        counts[few_per_class(labels, 2, 0, draw)] += 1
    np.testing.assert_allclose(counts, [200] * 6 + [300] * 4, atol=60)
    assert set(few_per_class(labels, 1, 0, 0)) | set(few_per_class(labels, 1, 1, 0)) != set(
        few_per_class(labels, 1, 0, 0)
    )


# ---- the whole task


def by_hand(model, root):
    """Features of unit length and class names, one image after another."""
    files = sorted(root.glob("*/*.png"))
    crops = torch.stack([evaluation_transform(decode(file), 16) for file in files])
    with torch.no_grad():
        features = torch.nn.functional.normalize(model.backbone([crops])[0].cls)
    return features.numpy(), np.array([file.parent.name for file in files])


def test_knn_on_a_folder_pair_equals_scikit_learn(model, run, tmp_path, monkeypatch):
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(module, "QUERIES", 7)
    # Grey noise beside colours, so that some queries are wrong.
    train = data_set(tmp_path / "train", {"blue": 6, "grey": 9, "other": 8, "red": 7})
    test = data_set(tmp_path / "test", {"grey": 8, "other": 8, "red": 3}, seed=50)  # no blue: numbering differs
    result = knn(model, asks(train, test, k=(1, 3, 999), temperature=0.002), run)
    balanced = knn(model, asks(train, test, k=(1, 3, 999), temperature=0.002, balanced=True), run)
    (x, names), (y, truth) = by_hand(model, train), by_hand(model, test)
    kinds = np.unique(names)
    for k in (1, 3, 30):
        reference = KNeighborsClassifier(k, weights=lambda d: np.exp(-(d**2) / 2 / 0.002)).fit(x, names)
        predicted = reference.predict(y)
        assert result.metrics[f"accuracy_at_{k}"] == pytest.approx((predicted == truth).mean())
        if k == result.details["best_k"]:
            for name in ("grey", "other", "red"):
                expected = (predicted == truth)[truth == name].mean()
                assert result.details["per_class"][name] == pytest.approx(expected)
            np.testing.assert_array_equal(result.outcomes, predicted == truth)
        weighed = reference.predict_proba(y) / [(names == name).sum() for name in kinds]
        expected = balanced_accuracy_score(truth, kinds[weighed.argmax(1)])
        assert balanced.metrics[f"per_class_at_{k}"] == pytest.approx(expected)
    assert list(balanced.metrics) == ["per_class", "per_class_at_1", "per_class_at_3", "per_class_at_30"]
    assert list(result.metrics) == ["accuracy", "accuracy_at_1", "accuracy_at_3", "accuracy_at_30"]
    assert 0.2 < result.metrics["accuracy"] < 1  # the comparison above is of something
    assert result.metrics["accuracy"] == max(result.metrics.values())
    assert list(result.details["per_class"]) == ["grey", "other", "red"]
    assert (result.details["n_train"], result.details["n_test"]) == (30, 19)
    assert result.details["classes"] == ["blue", "grey", "other", "red"]
    assert result.data == str(test)
    assert [row[0] for row in result.table.rows] == ["1", "3", "30"]
    assert result.table.note == "30 training and 19 test images."
    assert json.loads(json.dumps(result.details)) == result.details


def test_knn_splits_one_folder(model, run, tmp_path, capfd):
    root = data_set(tmp_path / "data", {"blue": 10, "green": 5, "red": 1})
    result = knn(model, asks(root, k=(1,), test_fraction=0.4), run)
    assert (result.details["n_train"], result.details["n_test"]) == (6 + 3 + 1, 4 + 2)
    assert list(result.details["per_class"]) == ["blue", "green"]
    assert result.metrics["accuracy"] == 1.0  # an untrained network can tell plain colours
    assert result.details["best_k"] == 1
    again = knn(model, asks(root, k=(1,), test_fraction=0.4), run)
    assert (again.metrics, again.details) == (result.metrics, result.details)
    assert capfd.readouterr().out == ""


def test_few_shots_are_means_over_tries(model, run, tmp_path):
    from sklearn.neighbors import KNeighborsClassifier

    train = data_set(tmp_path / "train", {"grey": 9, "other": 8, "red": 2})
    test = data_set(tmp_path / "test", {"grey": 8, "other": 8, "red": 3}, seed=50)
    few = asks(train, test, k=(1, 2, 20), temperature=0.002, shots=(3, 1), tries=4, seed=2)
    result = knn(model, few, run)
    (x, names), (y, truth) = by_hand(model, train), by_hand(model, test)
    labels = np.unique(names, return_inverse=True)[1]
    for number, ks in ((1, (1,)), (3, (1, 2, 3))):
        accuracies = {k: [] for k in ks}
        for draw in range(4):
            rows = few_per_class(labels, number, 2, draw)
            for k, found in accuracies.items():
                oracle = KNeighborsClassifier(k, weights=lambda d: np.exp(-(d**2) / 2 / 0.002)).fit(
                    x[rows], names[rows]
                )
                found.append(oracle.score(y, truth))
        best = max(ks, key=lambda k: np.mean(accuracies[k]))
        assert result.metrics[f"accuracy_{number}_shot"] == pytest.approx(np.mean(accuracies[best]))
        details = result.details["shots"][str(number)]
        assert details["k"] == best
        assert details["tries"] == pytest.approx(accuracies[best])
        assert details["standard_deviation"] == pytest.approx(np.std(accuracies[best], ddof=1))
        assert details["standard_deviation"] > 0
        assert details["classes_with_fewer"] == (number == 3)
    assert list(result.metrics)[-2:] == ["accuracy_1_shot", "accuracy_3_shot"]
    assert [row[0] for row in result.table.rows[-2:]] == ["1 of 1 per class", f"{best} of 3 per class"]
    assert knn(model, replace(few, tries=1), run).details["shots"]["1"]["standard_deviation"] == 0
    whole = knn(model, replace(few, shots=(9,)), run).metrics
    assert whole["accuracy_9_shot"] == max(whole["accuracy_at_1"], whole["accuracy_at_2"], whole["accuracy_9_shot"])


def test_labels_of_several_classes_count_if_one_is_right(model, run, tmp_path, monkeypatch):
    train = data_set(tmp_path / "train", {"blue": 4, "red": 4})
    test = data_set(tmp_path / "test", {"blue": 2, "red": 3}, seed=9)
    labels = np.array([[1, 1], [0, 1], [0, 1], [0, 0], [1, 0]])  # right, wrong, right, counts nowhere, wrong
    monkeypatch.setitem(
        SETS,
        "relabelled",
        Published("t", lambda path, _: replace(own(str(path)), labels=labels), "", "val", "accuracy", ""),
    )
    result = knn(model, asks(train, f"relabelled:{test}", k=(1,)), run)
    assert result.metrics["accuracy"] == 0.5
    assert result.outcomes.tolist() == [1, 0, 1, 0]
    assert result.details["n_test"] == 4
    assert result.details["per_class"] == {"blue": 0.5, "red": pytest.approx(2 / 3)}
    assert result.data == "relabelled"
    monkeypatch.setitem(SETS, "several", replace(SETS["relabelled"], train="train", metric="voc_map"))
    with pytest.raises(OpsinError, match=r"images of .*test have several classes each, .* evaluate logreg"):
        knn(model, asks(f"several:{test}", k=(1,)), run)


def test_a_published_set_is_counted_as_its_tables_do(model, run, tmp_path, monkeypatch):
    root = data_set(tmp_path / "data", {"blue": 2, "green": 6, "grey": 4, "other": 5})
    published = Published("t", lambda path, part: own(str(path / part)), "a", "b", "per_class", "")
    monkeypatch.setitem(SETS, "mini", published)
    os.rename(root, tmp_path / "a")
    data_set(tmp_path / "b", {"blue": 2, "green": 6, "grey": 4, "other": 5}, seed=90)
    result = knn(model, asks(f"mini:{tmp_path}", k=(1,)), run)
    assert result.metrics["per_class"] == pytest.approx(np.mean(list(result.details["per_class"].values())))
    assert result.metrics["per_class"] != pytest.approx(result.outcomes.mean())
    assert result.data == "mini"


def test_a_published_test_set_of_some_classes_is_answered_with_these(model, run, tmp_path, monkeypatch):
    train = data_set(tmp_path / "train", {"blue": 3, "grey": 9, "other": 9})
    test = data_set(tmp_path / "test", {"blue": 4, "other": 12}, seed=50)  # grey and other look alike
    some = Published("t", lambda path, _: own(str(path)), "", "test", "accuracy", "")
    monkeypatch.setitem(SETS, "some", some)
    assert knn(model, asks(train, test, k=(1,)), run).metrics["accuracy"] < 1
    assert knn(model, asks(train, f"some:{test}", k=(1,)), run).metrics["accuracy"] == 1
    asked = Logreg(str(train), f"some:{test}", size=16, values=1, lowest=2.0)
    assert logreg(model, asked, run).metrics["accuracy"] == 1
    assert logreg(model, replace(asked, test_data=str(test)), run).metrics["accuracy"] < 1


def test_a_broken_image_counts_nowhere(model, run, tmp_path):
    train = data_set(tmp_path / "train", {"blue": 4, "red": 4})
    test = data_set(tmp_path / "test", {"blue": 3, "red": 3}, seed=9)
    clean = knn(model, asks(train, test, k=(1,)), run)
    assert clean.metrics["accuracy"] == 1
    assert clean.left_out == []
    (train / "blue" / "3.png").write_bytes(b"no image")
    for i in range(10):
        (train / "red" / f"bad{i}.png").touch()
    (test / "blue" / "2.png").write_bytes((test / "blue" / "2.png").read_bytes()[:200])
    result = knn(model, asks(train, test, k=(1,)), run)
    assert result.metrics["accuracy"] == 1
    assert (result.details["n_train"], result.details["n_test"]) == (7, 5)
    assert len(result.outcomes) == 5
    assert [name for name, _ in result.left_out] == [
        "blue/3.png",
        *(f"red/bad{i}.png" for i in range(10)),
        "blue/2.png",
    ]
    assert all(reason for _, reason in result.left_out)


def test_knn_mistakes(model, run, tmp_path):
    good = data_set(tmp_path / "good", {"blue": 2, "red": 2})

    def fails(match, *args, **kwargs):
        with pytest.raises(OpsinError, match=match):
            knn(model, asks(*args, **kwargs), run)

    flat = tmp_path / "flat"
    write(flat, (0, 0, 0), 3, 0)
    fails("flat has no labels: put each image into a sub-folder", flat)
    fails("flat has no labels", good, flat)
    fails("holds only the class 'red'", data_set(tmp_path / "one", {"red": 3}))
    fails("holds only the class 'red'", data_set(tmp_path / "single", {"red": 1}))
    fails("single image, so none is left to test", data_set(tmp_path / "thin", {"red": 1, "blue": 1}))
    strange = data_set(tmp_path / "strange", {"bleu": 1, "red": 1, "verd": 1})
    fails("classes that the train set .*good has not, 'bleu', 'verd': name", good, strange)
    many = data_set(tmp_path / "many", {f"c{i}": 1 for i in range(7)})
    fails("'c0', 'c1', 'c2', 'c3', 'c4' and 2 more", good, many)
    fails("given as train and as test set", good, good)
    fails("test_fraction 1 is not between", good, test_fraction=1)
    fails(r"--k is \(0, 5\): give 1 or more", good, k=(0, 5))
    fails("--k is empty: give numbers", good, k=())
    fails("--temperature is 0: give", good, temperature=0)
    fails("--size is 0: give", good, size=0)
    fails("--seed is -1: give", good, seed=-1)
    fails(r"--shots is \(0,\): give", good, shots=(0,))
    fails("--tries is 0: give", good, tries=0)
    fails("no class of .*good has --shots 5 training images, the largest has 1: give", good, shots=(1, 5))
    fails("crops of 20 pixels are no multiple", good, size=20)
    fails("no data at", tmp_path / "absent")
    ruined = VisionTransformer(model.arch)
    torch.nn.init.constant_(ruined.norm.weight, float("nan"))
    with pytest.raises(OpsinError, match="features are not finite"):
        knn(wrap(ruined), asks(good), run)


def test_a_class_of_which_nothing_can_be_read(model, run, tmp_path):
    root = data_set(tmp_path / "data", {"blue": 3, "red": 3})
    for path in (root / "blue").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(OpsinError, match=r"only images of the class 'red' of .*data can be decoded to train on"):
        knn(model, asks(root), run)


@pytest.mark.parametrize("part", [0, 1])
def test_no_image_is_left(model, run, tmp_path, part):
    root = data_set(tmp_path / "data", {"blue": 2, "red": 2})
    files = sorted(root.glob("*/*.png"))
    for index in split(np.array([0, 0, 1, 1]), 0.2, 0)[part]:
        files[index].write_bytes(b"no image")
    with pytest.raises(OpsinError, match=r"no image of .*data can be decoded"):
        knn(model, asks(root), run)
