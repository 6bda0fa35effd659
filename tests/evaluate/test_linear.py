"""Linear probes: the stacked heads are 52 separate ones, and the task measures what it says."""

import contextlib
import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from small import images_in, small, write_digits
from torch import nn

from opsin.errors import OpsinError
from opsin.evaluate import knn as knn_module
from opsin.evaluate import linear as linear_module
from opsin.evaluate import probe as probe_module
from opsin.evaluate.classifier import Classifier, inputs, load
from opsin.evaluate.datasets.classification import SETS, Published
from opsin.evaluate.heads import Heads, Kind, rows_of
from opsin.evaluate.linear import Linear, linear
from opsin.evaluate.pooled import Pooled, features
from opsin.evaluate.probe import CODE_RATES, PAPER_RATES, Probe, _best, cosine, fit, fit_pooled
from opsin.evaluate.sets import ImageSet, in_classes_of, own, train_and_test
from opsin.evaluate.task import Run
from opsin.evaluate.training import train as training
from opsin.evaluate.transforms import Centre
from opsin.evaluate.views import order

QUICK = Probe(steps=60, train_batch=64, crops="centre", size=16)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), classes=4, each=12)


@pytest.fixture
def run(tmp_path):
    return Run(batch_size=16, workers=2, cache=tmp_path / "kept", progress=False)


def blobs(count, blocks=4, width=6, classes=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, blocks + 1, width, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % classes
    tokens = centres[labels] + 0.3 * torch.randn(count, blocks + 1, width, generator=rng)
    return Pooled(tokens[:, :-1], tokens[:, -1]), labels


def separate_heads(pooled, labels, classes, settings, first):
    """The reference's way: a module per head, a parameter group per head, the sum of all losses."""
    heads = []
    for number, kind in enumerate(settings.kinds):
        for rate in range(len(settings.grid)):
            head = nn.Linear(first.weights[number].shape[2], classes)
            head.weight.data.copy_(first.weights[number][rate])
            nn.init.zeros_(head.bias)
            heads.append((kind, head))
    grouped = [
        {"params": head.parameters(), "lr": settings.grid[number % len(settings.grid)]}
        for number, (_, head) in enumerate(heads)
    ]
    optimiser = torch.optim.SGD(grouped, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps, eta_min=0)
    for index in order(len(labels), settings.train_batch, settings.probe_seed, 0, settings.steps):
        rows = pooled.rows(index)
        loss = sum(F.cross_entropy(head(inputs(rows, *kind)), labels[index]) for kind, head in heads)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return heads


@pytest.mark.parametrize("rates", ["paper", "code"])
def test_stacked_heads_are_52_separate_ones(run, rates, monkeypatch):
    settings = Probe(rates=rates, steps=25, train_batch=16)
    pooled, labels = blobs(40)
    first = Heads(settings.kinds, 13, 3, 6, settings.probe_seed)
    wanted = separate_heads(pooled, labels, 3, settings, first)
    assert len(wanted) == 52
    kept = []
    monkeypatch.setattr("opsin.evaluate.probe._best", lambda heads, *_: kept.append(heads) or (None, None))
    fit_pooled(pooled, labels, pooled, labels, 3, settings, run, torch.device("cpu"), {})
    for number, (kind, head) in enumerate(wanted):
        which, rate = divmod(number, 13)
        assert kept[0].kinds[which] == kind
        torch.testing.assert_close(kept[0].weights[which][rate], head.weight.data, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(kept[0].biases[which][rate], head.bias.data, rtol=1e-4, atol=1e-6)


def test_slopes_are_autograds_and_the_loss_is_the_sum():
    pooled, labels = blobs(10)
    heads = Heads([Kind(2, True), Kind(1, False)], 3, 3, 6, 0)
    rows = rows_of(pooled, 2)
    total, slopes = heads.slopes(rows, labels)
    wanted = 0
    for number, slope in enumerate(slopes):
        scores = heads.logits(rows, number).requires_grad_()
        loss = sum(F.cross_entropy(one, labels) for one in scores)
        torch.testing.assert_close(slope, torch.autograd.grad(loss, scores)[0])
        wanted += loss
    torch.testing.assert_close(total, wanted)


def test_heads_start_as_the_reference_and_see_what_classifiers_see():
    heads = Heads([Kind(1, True), Kind(4, False)], 5, 40, 50, 0)
    assert heads.weights[0].std().item() == pytest.approx(0.01, rel=0.02)
    assert not any(bias.any() for bias in heads.biases)
    pooled, _ = blobs(8, width=50)
    for number, kind in enumerate(heads.kinds):
        assert torch.equal(heads.inputs(rows_of(pooled, 4), kind), inputs(pooled, *kind))
        scores = inputs(pooled, *kind) @ heads.weights[number][3].T
        torch.testing.assert_close(heads.logits(rows_of(pooled, 4), number)[3], scores)


def test_rates_are_the_papers_and_the_codes():
    assert Probe().grid == list(PAPER_RATES)
    assert Probe(rates="code", train_batch=1024).grid == [rate * 4 for rate in CODE_RATES]
    assert len(PAPER_RATES) == len(CODE_RATES) == 13
    assert [cosine(10)(step) for step in (0, 5, 10)] == pytest.approx([1, 0.5, 0])


def test_the_best_head_on_the_test_images_is_taken(run):
    settings = Probe(steps=80, train_batch=32)
    pooled, labels = blobs(60)
    test, test_labels = blobs(200, seed=1)
    classifier, facts = fit_pooled(pooled, labels, test, test_labels, 3, settings, run, torch.device("cpu"), {})
    assert len(facts["grid"]) == 52
    values = [entry["accuracy"] for entry in facts["grid"]]
    assert facts["chosen"] == facts["grid"][int(np.argmax(values))]
    right = (classifier.logits(test).argmax(1) == test_labels).double().mean().item()
    assert right == facts["chosen"]["accuracy"]
    regression = LogisticRegression(max_iter=500).fit(inputs(pooled, 4, True), labels)
    assert right >= regression.score(inputs(test, 4, True), test_labels) - 0.02
    several = F.one_hot(test_labels, 3)  # as ReaL's; images without a class count nowhere
    several[:50] = 0
    _, again = fit_pooled(pooled, labels, test, several, 3, settings, run, torch.device("cpu"), {})
    assert again["chosen"]["accuracy"] == pytest.approx(max(entry["accuracy"] for entry in again["grid"]), abs=1e-12)
    assert json.dumps(again)


def test_a_stopped_probe_goes_on_as_if_it_had_not_been(run, model, digits, tmp_path, monkeypatch):
    train, test = train_and_test(str(digits), None, 0.25, 0)
    settings = Probe(steps=8, train_batch=8, size=16, crops="random")
    whole = fit(model, train, test, settings, run)
    other = Run(batch_size=16, workers=2, cache=tmp_path / "other", progress=False)
    monkeypatch.setattr("opsin.evaluate.probe.training", functools.partial(training, every=0))
    monkeypatch.setattr("opsin.evaluate.training.progress", stopping(5))
    with pytest.raises(KeyboardInterrupt):
        fit(model, train, test, settings, other)
    monkeypatch.undo()
    state = torch.load(next(other.cache.glob("probe-*")) / "state.pt", weights_only=True)
    assert state["step"] == 4
    gone_on = fit(model, train, test, settings, other)
    assert torch.equal(whole.classifier.weight, gone_on.classifier.weight)
    assert whole.facts == gone_on.facts


def stopping(at):
    """A counter that stops the training after some steps."""

    @contextlib.contextmanager
    def counter(what, *_):
        done = 0

        def advance(number):
            nonlocal done
            done += number
            if what == "linear heads" and done >= at:
                raise KeyboardInterrupt

        yield advance

    return counter


def test_a_tiny_set_is_overfitted_with_random_and_centre_crops(run, model, digits):
    train, _ = train_and_test(str(digits), None, 0.25, 0)
    for crops, steps in (("centre", 300), ("random", 12)):
        settings = Probe(steps=steps, train_batch=36, size=16, crops=crops)
        fitted = fit(model, train, train, settings, run)
        assert fitted.facts["chosen"]["accuracy"] > (0.99 if crops == "centre" else 0.5)


def test_linear_is_as_good_as_logistic_regression(run, model, digits):
    settings = Linear(str(digits), test_fraction=0.25, probe=Probe(steps=300, train_batch=36, crops="centre", size=16))
    result = linear(model, settings, run)
    train, test = train_and_test(str(digits), None, 0.25, 0)
    known = [features(model, part, Centre(16), run).pooled for part in (train, test)]
    scores = [
        LogisticRegression(max_iter=2000, C=c)
        .fit(inputs(known[0], 4, True), train.labels)
        .score(inputs(known[1], 4, True), test.labels)
        for c in (1, 100)
    ]
    assert result.metrics["accuracy"] >= max(scores) - 0.1
    assert list(result.metrics) == ["accuracy"]
    assert result.outcomes.mean() == result.metrics["accuracy"]
    assert result.details["n_test"] == len(test) == len(result.outcomes)
    assert json.dumps(result.details)


def test_a_saved_head_gives_the_same_and_is_measured_on_further_sets(run, model, digits, tmp_path):
    head = tmp_path / "head.safetensors"
    trained = linear(model, Linear(str(digits), test_fraction=0.25, save_head=head, probe=QUICK), run)
    assert load(head, 24, 4).blocks == trained.details["chosen"]["blocks"]
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "digit2").symlink_to(digits / "digit2")
    again = linear(
        model, Linear(str(digits), test_fraction=0.25, head=head, also=(str(tmp_path / "some"),), probe=QUICK), run
    )
    assert again.metrics["accuracy"] == trained.metrics["accuracy"]
    assert np.array_equal(again.outcomes, trained.outcomes)
    assert again.metrics[f"accuracy_{tmp_path / 'some'}"] == 1.0  # its only class is the only answer
    assert len(again.table.rows) == 2


def test_images_that_cannot_be_read_count_nowhere(run, model, digits, tmp_path):
    copy = tmp_path / "copy"
    for path in digits.rglob("*.png"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).write_bytes(path.read_bytes())
    _, test = train_and_test(str(copy), None, 0.25, 0)
    broken = test.name(0)
    next(path for path in copy.rglob("*.png") if str(path).endswith(broken[-14:])).write_bytes(b"broken")
    result = linear(model, Linear(str(copy), test_fraction=0.25, probe=QUICK), run)
    assert len(result.left_out) == 1
    assert result.details["n_test"] == len(result.outcomes) == len(test) - 1


def test_mistakes_are_told_in_a_sentence(run, model, digits, tmp_path):
    with pytest.raises(OpsinError, match=r"--probe.blocks is \(\)"):
        Probe(blocks=())
    with pytest.raises(OpsinError, match=r"--probe.steps is 0"):
        Probe(steps=0)
    with pytest.raises(OpsinError, match="--test-fraction is 1"):
        Linear(test_fraction=1)
    with pytest.raises(OpsinError, match="leave out one of them"):
        Linear(head=tmp_path, save_head=tmp_path)
    with pytest.raises(OpsinError, match="the last 5 blocks, and features of 4 are kept"):
        linear(model, Linear(str(digits), probe=Probe(blocks=(5,), crops="centre", size=16)), run)
    head = tmp_path / "head.safetensors"
    linear(model, Linear(str(digits), save_head=head, probe=QUICK), run)
    for name in ("digit0", "digit1"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).symlink_to(digits / name)
    with pytest.raises(OpsinError, match="has 4 classes and the data 2"):
        linear(model, Linear(str(tmp_path / "two"), head=head, probe=QUICK), run)
    several = ImageSet("voc", 2, lambda _: b"", str, "p", np.eye(2, dtype=np.int64), ["a", "b"])
    with pytest.raises(OpsinError, match="evaluate this set with logreg"):
        fit(model, several, several, QUICK, run)


def test_heads_differ_by_seed_and_rows_hold_the_last_blocks():
    assert not torch.equal(Heads([Kind(1, True)], 2, 3, 4, 0).weights[0], Heads([Kind(1, True)], 2, 3, 4, 1).weights[0])
    pooled, _ = blobs(5)
    assert torch.equal(rows_of(pooled, 1), torch.cat([pooled.cls[:, -1], pooled.mean], 1))


def test_further_sets_are_answered_with_their_classes_and_counted_their_way(at, tmp_path, monkeypatch):
    root = images_in(tmp_path / "data", {"a": 4, "b": 4})
    images_in(tmp_path / "some", {"b": 3})
    monkeypatch.setitem(SETS, "few", Published("t", lambda path, _: own(str(path)), "", "test", "per_class", ""))
    monkeypatch.setattr(
        linear_module, "load", lambda *_: Classifier(torch.zeros(2, 24), torch.tensor([1.0, 0.0]), 1, False)
    )
    found = linear(small(), Linear(str(root), head=tmp_path, also=(f"few:{tmp_path / 'some'}",), probe=QUICK), at)
    assert found.metrics["per_class_few"] == 1.0  # unmasked every answer would be a
    images_in(tmp_path / "uneven", {"a": 3, "b": 1})
    found = linear(small(), Linear(str(root), head=tmp_path, also=(f"few:{tmp_path / 'uneven'}",), probe=QUICK), at)
    assert found.metrics["per_class_few"] == 0.5  # accuracy would be 3/4


def test_the_head_is_chosen_by_the_metric_of_the_set(at, tmp_path, monkeypatch):
    images_in(tmp_path / "a", {"x": 2, "y": 2})
    monkeypatch.setitem(
        SETS, "mini", Published("t", lambda path, part: own(str(path / "a")), "a", "a", "per_class", "")
    )
    asked, real = [], linear_module.fit
    monkeypatch.setattr(linear_module, "fit", lambda *a: asked.append(a[5:]) or real(*a))
    linear(small(), Linear(f"mini:{tmp_path}", probe=replace(QUICK, steps=1)), at)
    assert asked == [("per_class",)]


def test_the_best_head_per_class_is_not_the_most_accurate():
    heads = probe_module.Heads([probe_module.Kind(1, False)], 2, 2, 1, 0)
    with torch.no_grad():
        heads.weights[0].copy_(torch.tensor([[[0.0], [0.0]], [[0.0], [1.0]]]))
        heads.biases[0].copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    test = Pooled(torch.tensor([1.0, 1, 1, -1, -1, -1, -1, 1])[:, None, None], torch.zeros(8, 1))
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])  # all 0: 7/8 and 1/2; by sign: 5/8 and 11/14
    settings = SimpleNamespace(grid=[0.1, 0.2], train_batch=8)
    assert _best(heads, test, labels, 2, settings, "accuracy")[1]["chosen"]["rate"] == 0.1
    assert _best(heads, test, labels, 2, settings, "per_class")[1]["chosen"]["rate"] == 0.2


def test_labels_features_and_weights_lead_to_probes_of_their_own(at, tmp_path):
    root, quick = images_in(tmp_path / "data", {"a": 4, "b": 4}), Probe(steps=1, train_batch=4, crops="centre", size=16)
    images = own(str(root))
    fit(small(), images, images, quick, at)
    fit(small(), replace(images, labels=1 - images.labels), images, quick, at)
    fit(small(1), images, images, quick, at)
    fit(small(), images.part(np.arange(8)[::-1]), images, replace(quick), at)  # other images, labels 1 - as above
    assert len(list(at.cache.glob("probe-*"))) == 4


@pytest.mark.parametrize(
    ("module", "run"),
    [
        (linear_module, lambda s: linear_module.linear(small(), Linear("x", seed=s), None)),
        (knn_module, lambda s: knn_module.knn(small(), knn_module.Knn("x", seed=s), None)),
    ],
)
def test_the_seed_splits_the_images(module, run, monkeypatch):
    asked = []

    def stop(*a):
        asked.extend(one for one in a if one == 7)
        raise KeyError

    monkeypatch.setattr(module, "train_and_test" if module is linear_module else "labelled", stop)
    with pytest.raises(KeyError):
        run(7)
    assert asked == [7]


def test_columns_of_several_classes_are_renumbered():
    def of(labels, classes):
        return ImageSet("x", len(labels), None, str, "f", np.array(labels), classes)

    assert in_classes_of(of([[1, 0], [-1, 1]], ["c", "a"]), of([], ["a", "b", "c"])).tolist() == [[0, 0, 1], [1, 0, -1]]
