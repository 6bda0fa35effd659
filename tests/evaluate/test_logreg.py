"""Logistic regression: scikit-learn's minimum, the choice of C, and the task on images."""

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError
from opsin.evaluate.datasets.classification import SETS, Published
from opsin.evaluate.logistic import Regression
from opsin.evaluate.logreg import Logreg, _hold_out, logreg
from opsin.evaluate.metrics import of_scores
from opsin.evaluate.model import wrap
from opsin.evaluate.sets import own, split
from opsin.evaluate.task import Run

POWERS = (-6.0, -3.0, -1.0, 1.0, 3.0, 5.0)


def blobs(n, width, classes, seed=0, spread=1.0):
    """Overlapping clusters, far from the origin and longer in some directions, as features are."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    scale = np.logspace(0.5, -1, width)
    x = rng.normal(size=(classes, width))[labels] * spread + rng.normal(size=(n, width))
    return (x * scale) @ np.linalg.qr(rng.normal(size=(width, width)))[0] + rng.normal(size=width) * 3, labels


def sklearn_fit(x, y, c):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it would have liked more iterations
        return LogisticRegression(C=c, solver="newton-cholesky", tol=1e-9, max_iter=500).fit(x, y)


def objective(c, weight, bias, x, y):
    """scikit-learn's, of softmax regression, or of the logistic regression of two classes (weight of one row)."""
    z = x @ weight.T + bias
    if len(weight) == 1:
        z = np.concatenate([np.zeros_like(z), z], axis=1)
    highest = z.max(1, keepdims=True)
    losses = np.log(np.exp(z - highest).sum(1)) + highest[:, 0] - z[np.arange(len(y)), y]
    return c * losses.sum() + (weight**2).sum() / 2


@pytest.mark.parametrize(("n", "width", "classes"), [(300, 12, 5), (40, 60, 3), (200, 8, 2)])
def test_every_fit_is_scikit_learns_minimum(n, width, classes):
    x, y = blobs(n, width, classes)
    new, _ = blobs(100, width, classes, seed=1)
    regression, fit = Regression(torch.from_numpy(x), torch.from_numpy(y), classes), None
    for power in POWERS:
        c = 10**power
        fit = regression.fit(c, fit)
        assert fit.converged
        oracle = sklearn_fit(x, y, c)
        lowest = objective(c, oracle.coef_, oracle.intercept_, x, y)
        weight, bias = fit.weight.numpy(), fit.bias.numpy()
        if classes == 2:
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        assert fit.objective.item() == pytest.approx(objective(c, weight, bias, x, y), rel=1e-9)
        assert fit.objective.item() <= lowest * (1 + 1e-8)
        assert fit.objective.item() >= lowest * (1 - 1e-6)
        np.testing.assert_array_equal(fit.scores(torch.from_numpy(new)).argmax(1), oracle.predict(new))
        # where it started does not matter
        torch.testing.assert_close(
            regression.fit(c).weight, fit.weight, rtol=0, atol=2e-3 * fit.weight.abs().max().item()
        )


def test_lbfgs_of_scikit_learn_on_digits():
    x, y = load_digits(return_X_y=True)
    train, test = split(y, 0.3, 0)
    train = train[:400]
    regression, fit = Regression(torch.from_numpy(x[train]), torch.from_numpy(y[train]), 10), None
    for c in (1e-6, 1e-4, 1e-2, 1.0):
        fit = regression.fit(c, fit)
        oracle = LogisticRegression(C=c, solver="lbfgs", tol=1e-9, max_iter=20_000).fit(x[train], y[train])
        lowest = objective(c, oracle.coef_, oracle.intercept_, x[train], y[train])
        assert fit.objective.item() == pytest.approx(lowest, rel=1e-6)
        np.testing.assert_array_equal(fit.scores(torch.from_numpy(x[test])).argmax(1), oracle.predict(x[test]))


def test_one_regression_per_class_leaves_out_what_does_not_count():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 9))
    labels = (x @ rng.normal(size=(9, 5)) + rng.normal(size=(150, 5)) > 0.5).astype(np.int64)
    labels[rng.random((150, 5)) < 0.2] = -1
    labels[:, 3] = 0  # no image has it
    labels[:, 4] = 1  # every image has it
    regression, fit = Regression(torch.from_numpy(x), torch.from_numpy(labels), 5), None
    for power in POWERS:
        c = 10**power
        fit = regression.fit(c, fit)
        assert fit.converged
        for k in range(3):
            rows = labels[:, k] >= 0
            oracle = sklearn_fit(x[rows], labels[rows, k], c)
            lowest = objective(c, oracle.coef_, oracle.intercept_, x[rows], labels[rows, k])
            assert fit.objective[k].item() == pytest.approx(lowest, rel=1e-7)
            np.testing.assert_array_equal(fit.scores(torch.from_numpy(x))[:, k] > 0, oracle.predict(x) == 1)
    assert fit.bias.isinf().tolist() == [False, False, False, True, True]
    assert (fit.weight[3:] == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 40),
    width=st.integers(1, 20),
    classes=st.integers(2, 6),
    seed=st.integers(0, 99),
    c=st.floats(-6, 5),
)
def test_the_gradient_is_zero_at_every_minimum(n, width, classes, seed, c):
    rng = np.random.default_rng(seed)
    x, y = torch.from_numpy(rng.normal(size=(n, width))), torch.from_numpy(rng.integers(0, classes, n))
    fit = Regression(x, y, classes).fit(10**c)
    assert fit.converged
    seen, index = y.unique(return_inverse=True)
    assert fit.bias.isinf().tolist() == [k not in seen for k in range(classes)]
    assert torch.isin(fit.scores(x).argmax(1), seen).all()
    if len(seen) == 2:  # softmax has twice the penalty
        return
    weight, bias = (t[seen].clone().requires_grad_() for t in (fit.weight, fit.bias))
    value = (
        10**c * torch.nn.functional.cross_entropy(x @ weight.T + bias, index, reduction="sum")
        + weight.square().sum() / 2
    )
    (gradient,) = torch.autograd.grad(value, weight)
    assert gradient.norm() <= 1e-3 * (1e-9 + value.detach()).sqrt() * (1 + 10**c) ** 0.5


def test_too_few_iterations_are_told():
    x, y = (torch.from_numpy(a) for a in blobs(300, 12, 5))
    short = Regression(x, y, 5).fit(1e3, iterations=3)
    assert (short.iterations, short.converged) == (3, False)
    assert short.objective > Regression(x, y, 5).fit(1e3).objective


def test_constant_features_and_repeated_images():
    y = torch.tensor([0, 0, 0, 1, 2])
    fit = Regression(torch.ones(5, 3), y, 3).fit(1e5)
    torch.testing.assert_close(fit.scores(torch.ones(1, 3)).softmax(1)[0], torch.tensor([0.6, 0.2, 0.2]).double())
    assert (fit.weight.abs() < 1e-6).all()


# ---- the task


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return wrap(VisionTransformer(Architecture(width=24, depth=2, heads=2, patch=8, grid=2, layerscale=0.1)))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def run(kept):
    return Run(batch_size=16, workers=2, cache=kept, progress=False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Real digits in folders: 25 of each class to train, 10 to test."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for label in range(10):
        for i, row in enumerate(np.flatnonzero(labels == label)[:35]):
            folder = root / ("train" if i < 25 else "test") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((images[row].reshape(8, 8) * 15.9).astype(np.uint8)).resize((24, 24))
            picture.convert("RGB").save(folder / f"{i:02}.png")
    return root


def by_hand(model, root):
    """Class tokens of images of exactly the crop's size, which the transform leaves as they are."""
    files = sorted(root.glob("*/*.png"))
    batch = torch.stack([model.extractor.preprocess(Image.open(file), 24) for file in files])
    return model.extractor.features(batch).cls.double().numpy(), np.array([int(file.parent.name) for file in files])


def test_the_task_on_digits(model, digits, run):
    asked = Logreg(str(digits / "train"), str(digits / "test"), size=24, values=23)
    result = logreg(model, asked, run)
    (x, y), (new, truth) = by_hand(model, digits / "train"), by_hand(model, digits / "test")
    fitted, held = split(y, 0.1, 0)
    assert len(held) == 20
    held_out = [sklearn_fit(x[fitted], y[fitted], c).score(x[held], y[held]) for c in 10 ** np.linspace(-6, 5, 23)]
    path = result.details["path"]
    assert [point["C"] for point in path] == pytest.approx(10 ** np.linspace(-6, 5, 23))
    assert [point["accuracy"] for point in path] == pytest.approx(held_out)
    best = int(np.argmax(held_out))
    assert result.details["C"] == pytest.approx((10 ** np.linspace(-6, 5, 23))[best])
    right = sklearn_fit(x, y, result.details["C"]).predict(new) == truth
    assert result.metrics == {"accuracy": pytest.approx(right.mean())}
    np.testing.assert_array_equal(result.outcomes, right)
    assert result.metrics["accuracy"] > 0.5
    assert (result.details["n_train"], result.details["n_test"]) == (250, 100)
    assert list(result.details["per_class"]) == [str(k) for k in range(10)]
    assert result.details["not_converged"] == []
    assert json.loads(json.dumps(result.details)) == result.details
    assert result.table.rows == [[f"{result.details['C']:.3g}", f"{result.metrics['accuracy']:.3f}"]]


def test_of_equally_good_values_the_strongest_penalty_is_taken(model, digits, run):
    asked = Logreg(str(digits / "train"), str(digits / "test"), size=24, values=3, lowest=4.99, highest=5.0)
    details = logreg(model, asked, run).details
    assert len({point["accuracy"] for point in details["path"]}) == 1
    assert details["C"] == pytest.approx(10**4.99)


def test_one_value_of_c_holds_nothing_out(model, digits, run):
    asked = Logreg(str(digits / "train"), str(digits / "test"), size=24, values=1, lowest=2.0)
    result = logreg(model, asked, run)
    assert result.details["path"] == []
    assert result.details["C"] == 100
    (x, y), (new, truth) = by_hand(model, digits / "train"), by_hand(model, digits / "test")
    assert result.metrics["accuracy"] == pytest.approx(sklearn_fit(x, y, 100).score(new, truth))
    short = logreg(model, replace(asked, max_iterations=2), run)
    assert short.details["not_converged"] == [100]
    assert short.table.note.endswith("1 fits were stopped by --max-iterations.")


def test_it_fits_what_it_trains_on(model, digits, run, tmp_path):
    for label in range(10):  # fewer images than the width of the features
        for i in range(2):
            for name in ("few", "again"):
                (tmp_path / name / str(label)).mkdir(parents=True, exist_ok=True)
                shutil.copy(digits / "train" / str(label) / f"{i:02}.png", tmp_path / name / str(label))
    Image.new("RGB", (24, 24)).save(tmp_path / "again" / "0" / "more.png")  # another set, or it would be refused
    asked = Logreg(str(tmp_path / "few"), str(tmp_path / "again"), size=24, values=1, lowest=5.0)
    result = logreg(model, asked, run)
    assert result.outcomes[[*range(2), *range(3, 21)]].tolist() == [1] * 20


def test_a_set_of_several_classes_per_image(model, digits, run, monkeypatch):
    def read(path, part):
        images = own(str(path / part))
        digit = images.labels
        labels = np.stack([digit % 2 == 0, digit % 3 == 0, digit > 4], axis=1).astype(np.int64)
        labels[digit == 9, 0] = -1
        return replace(images, labels=labels, classes=["even", "threes", "large"])

    monkeypatch.setitem(SETS, "mini", Published("t", read, "train", "test", "voc_map", ""))
    result = logreg(model, Logreg(f"mini:{digits}", size=24, values=6, highest=3.0), run)
    assert list(result.metrics) == ["voc_map"]
    assert result.data == "mini"
    assert result.outcomes is None
    assert list(result.details["per_class"]) == ["even", "threes", "large"]
    (x, y), (new, truth) = by_hand(model, digits / "train"), by_hand(model, digits / "test")
    targets = [np.stack([d % 2 == 0, d % 3 == 0, d > 4], axis=1).astype(np.int64) for d in (y, truth)]
    for labels, digit in zip(targets, (y, truth), strict=True):
        labels[digit == 9, 0] = -1
    best = result.details["C"]

    def oracle(fitted, asked, truth):
        scores = []
        for k in range(3):
            rows = fitted[targets[0][fitted, k] >= 0]
            scores.append(sklearn_fit(x[rows], targets[0][rows, k], best).decision_function(asked))
        return of_scores(torch.from_numpy(np.stack(scores, axis=1)), torch.from_numpy(truth), "voc_map").value

    assert result.metrics["voc_map"] == pytest.approx(oracle(np.arange(250), new, targets[1]))
    drawn = np.random.default_rng(0).permutation(250)
    (point,) = (point for point in result.details["path"] if point["C"] == best)
    assert point["voc_map"] == pytest.approx(oracle(drawn[25:], x[drawn[:25]], targets[0][drawn[:25]]))
    assert 0.3 < result.metrics["voc_map"] < 1
    held = [point["voc_map"] for point in result.details["path"]]
    assert result.details["C"] == pytest.approx(result.details["path"][int(np.argmax(held))]["C"])


def test_the_metric_of_the_set_also_chooses(model, digits, run, monkeypatch):
    mini = Published("t", lambda path, part: own(str(path / part)), "train", "test", "per_class", "")
    monkeypatch.setitem(SETS, "mini", mini)
    result = logreg(model, Logreg(f"mini:{digits}", size=24, values=3), run)
    assert result.metrics == {"per_class": pytest.approx(np.mean(list(result.details["per_class"].values())))}
    assert all("per_class" in point for point in result.details["path"])


def test_mistakes(model, run, tmp_path):
    def fails(match, **options):
        with pytest.raises(OpsinError, match=match):
            logreg(model, Logreg(**({"data": str(tmp_path / "few"), "size": 16} | options)), run)

    for folder in ("few/a", "few/b", "new/a", "new/b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (20, len(folder + folder[0]) + 12)).save(tmp_path / folder / f"{folder[0]}.png")
    fails("--values is 0: give", values=0)
    fails("--lowest 3 is above --highest 2: exchange", lowest=3.0, highest=2.0)
    fails("--lowest is -99.0: give", lowest=-99.0)
    fails("--held-out 1 is not between 0 and 1: give", held_out=1.0)
    fails("--max-iterations is 0: give", max_iterations=0)
    fails("every class of .*few has a single image, so none is left to test")
    fails(
        "every class of .*few has a single training image, so none is left to choose", test_data=str(tmp_path / "new")
    )


def test_the_seed_holds_out():
    class Train:
        labels = torch.arange(60) % 2

    held = {tuple(_hold_out(Train, Logreg(seed=seed))[1].tolist()) for seed in range(3)}
    assert len(held) == 3
