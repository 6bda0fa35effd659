import json
import os
import threading

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
from opsin.evaluate.knn import extract, knn, split

COLOURS = {"blue": (30, 40, 200), "green": (20, 180, 30), "red": (200, 30, 40)}
SMALL = {"size": 16, "batch_size": 5, "workers": 2}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return VisionTransformer(Architecture(width=24, depth=2, heads=2, patch=8, grid=2, layerscale=0.1))


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


def test_extract_equals_one_image_at_a_time(backbone):
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, *rng.integers(20, 60, 2)), dtype=np.uint8)) for _ in range(11)]
    seen = []
    features = extract(
        backbone, images.__getitem__, 11, size=16, batch_size=4, device="cpu", workers=3, advance=seen.append
    )
    alone = torch.cat([backbone([evaluation_transform(image, 16)[None]])[0].cls for image in images])
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features, alone.detach(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(features.norm(dim=1), torch.ones(11))
    assert seen == [4, 4, 3]
    assert extract(backbone, images.__getitem__, 0, size=16, batch_size=4, device="cpu").shape == (0, 24)


def test_extract_reads_one_batch_ahead(backbone):
    read, started, arrived = {-1}, [], threading.Condition()

    class Watched(VisionTransformer):
        def forward(self, *args, **kwargs):
            with arrived:  # the next batch is read while this one computes
                arrived.wait_for(lambda: max(read) >= min(4 * len(started) + 7, 19), timeout=5)
            started.append(max(read))
            return super().forward(*args, **kwargs)

    def reader(index):
        with arrived:
            read.add(index)
            arrived.notify_all()
        return torch.zeros(3, 20, 20, dtype=torch.uint8)

    extract(Watched(backbone.arch), reader, 20, size=16, batch_size=4, device="cpu", workers=2)
    assert started == [7, 11, 15, 19, 19]


def test_extract_passes_on_what_reading_raises(backbone):
    def reader(index):
        if index == 6:
            raise OpsinError("image 6 is broken")
        return torch.zeros(3, 20, 20, dtype=torch.uint8)

    with pytest.raises(OpsinError, match="image 6 is broken"):
        extract(backbone, reader, 20, size=16, batch_size=4, device="cpu", workers=2)


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


def test_knn_on_a_folder_pair_equals_scikit_learn(backbone, tmp_path):
    from sklearn.neighbors import KNeighborsClassifier

    # Grey noise beside colours, so that some queries are wrong.
    train = data_set(tmp_path / "train", {"blue": 6, "grey": 9, "other": 8, "red": 7})
    test = data_set(tmp_path / "test", {"grey": 8, "other": 8, "red": 3}, seed=50)  # no blue: numbering differs
    result = knn(backbone, train, test, k=(1, 3, 999), temperature=0.002, **SMALL)

    def load(root):
        files = sorted(root.glob("*/*.png"))
        crops = torch.stack([evaluation_transform(decode(file), 16) for file in files])
        with torch.no_grad():
            features = torch.nn.functional.normalize(backbone([crops])[0].cls)
        return features.numpy(), np.array([file.parent.name for file in files])

    (x, names), (y, truth) = load(train), load(test)
    for k in (1, 3, 30):
        reference = KNeighborsClassifier(k, weights=lambda d: np.exp(-(d**2) / 2 / 0.002)).fit(x, names)
        predicted = reference.predict(y)
        assert result["accuracy"][str(k)] == pytest.approx((predicted == truth).mean())
        if k == result["best"]["k"]:
            for name in ("grey", "other", "red"):
                expected = (predicted == truth)[truth == name].mean()
                assert result["per_class"][name] == pytest.approx(expected)
    assert 0.2 < result["best"]["accuracy"] < 1  # the comparison above is of something
    assert result["best"]["accuracy"] == max(result["accuracy"].values())
    assert list(result["accuracy"]) == ["1", "3", "30"]
    assert list(result["per_class"]) == ["grey", "other", "red"]
    assert (result["n_train"], result["n_test"]) == (30, 19)
    assert result["classes"] == ["blue", "grey", "other", "red"]
    assert result["settings"]["k"] == [1, 3, 999]
    assert result["settings"]["seed"] is None
    assert json.loads(json.dumps(result)) == result


def test_knn_splits_one_folder(backbone, tmp_path, capfd):
    root = data_set(tmp_path / "data", {"blue": 10, "green": 5, "red": 1})
    result = knn(backbone, root, k=(1,), test_fraction=0.4, **SMALL)
    assert (result["n_train"], result["n_test"]) == (6 + 3 + 1, 4 + 2)
    assert list(result["per_class"]) == ["blue", "green"]
    assert result["best"] == {"k": 1, "accuracy": 1.0}  # an untrained network can tell plain colours
    assert result["settings"]["test_fraction"] == 0.4
    assert knn(backbone, root, k=(1,), test_fraction=0.4, **SMALL) == result
    output = capfd.readouterr()
    assert output.out == ""
    assert "features" in output.err


def test_a_broken_image_counts_nowhere(backbone, tmp_path, caplog):
    train = data_set(tmp_path / "train", {"blue": 4, "red": 4})
    test = data_set(tmp_path / "test", {"blue": 3, "red": 3}, seed=9)
    clean = knn(backbone, train, test, k=(1,), **SMALL)
    assert clean["best"]["accuracy"] == 1
    assert clean["left_out"] == []
    # The last of a class: the reader puts an image of the next class in its place.
    (train / "blue" / "3.png").write_bytes(b"no image")
    for i in range(10):
        (train / "red" / f"bad{i}.png").touch()
    (test / "blue" / "2.png").write_bytes((test / "blue" / "2.png").read_bytes()[:200])
    result = knn(backbone, train, test, k=(1,), **SMALL)
    assert result["best"]["accuracy"] == 1
    assert (result["n_train"], result["n_test"]) == (7, 5)
    assert [os.path.relpath(bad["path"], tmp_path) for bad in result["left_out"]] == [
        "train/blue/3.png",
        *(f"train/red/bad{i}.png" for i in range(10)),
        "test/blue/2.png",
    ]
    assert all(bad["reason"] for bad in result["left_out"])
    assert "11 images left out, first" in caplog.text


def test_knn_mistakes(backbone, tmp_path):
    good = data_set(tmp_path / "good", {"blue": 2, "red": 2})

    def fails(match, *args, **kwargs):
        with pytest.raises(OpsinError, match=match):
            knn(backbone, *args, **(SMALL | kwargs))

    flat = tmp_path / "flat"
    write(flat, (0, 0, 0), 3, 0)
    fails("flat has no labels: put each image into a sub-folder", flat)
    fails("flat has no labels", good, flat)
    fails("holds only the class 'red'", data_set(tmp_path / "one", {"red": 3}))
    fails("holds a single image", data_set(tmp_path / "single", {"red": 1}))
    fails("single image, so none is left to test", data_set(tmp_path / "thin", {"red": 1, "blue": 1}))
    strange = data_set(tmp_path / "strange", {"bleu": 1, "red": 1, "verd": 1})
    fails("classes that the train folder has not, 'bleu', 'verd': name", good, strange)
    many = data_set(tmp_path / "many", {f"c{i}": 1 for i in range(7)})
    fails("'c0', 'c1', 'c2', 'c3', 'c4' and 2 more", good, many)
    fails("given as train and as test folder", good, good)
    fails("test_fraction 1 is not between", good, test_fraction=1)
    fails("k 0 is too small", good, k=(0, 5))
    fails("k 0 is too small", good, k=())
    fails("batch_size 0 is too small", good, batch_size=0)
    fails("workers 0 is too small", good, workers=0)
    fails("temperature 0 is not above 0", good, temperature=0)
    fails("multiples of the patch 8", good, size=20)
    fails("no data at", tmp_path / "absent")
    ruined = VisionTransformer(backbone.arch)
    torch.nn.init.constant_(ruined.norm.weight, float("nan"))
    with pytest.raises(OpsinError, match="features are not finite"):
        knn(ruined, good, **SMALL)


@pytest.mark.parametrize("part", ["train", "test"])
def test_no_image_is_left(backbone, tmp_path, part):
    root = data_set(tmp_path / "data", {"blue": 2, "red": 2})
    files = sorted(root.glob("*/*.png"))
    for index in split(np.array([0, 0, 1, 1]), 0.2, 0)[part == "test"]:
        files[index].write_bytes(b"no image")
    with pytest.raises(OpsinError, match=f"no {part} image of .*data can be decoded"):
        knn(backbone, root, **SMALL)
