"""Linear evaluation: accuracy of the best linear head on a frozen backbone, and of the same head on further sets."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsin.data.decode import shown
from opsin.errors import SEEDS, OpsinError, within
from opsin.evaluate.classifier import Classifier, load, save
from opsin.evaluate.datasets.classification import SETS, Metric, allowed, metric_of, read_set
from opsin.evaluate.metrics import Measured, of_scores
from opsin.evaluate.model import Model
from opsin.evaluate.pooled import Known, Pooled, features
from opsin.evaluate.probe import Probe, fit
from opsin.evaluate.sets import ImageSet, in_classes_of, named, own, train_and_test
from opsin.evaluate.task import Result, Run, Table
from opsin.evaluate.transforms import Centre

ROWS = 4096
"""Images that are scored at a time."""
TITLES = {"accuracy": "accuracy", "per_class": "mean accuracy per class"}
"""Of the metrics of a linear head."""


@dataclass(frozen=True)
class Linear:
    """What a linear head is trained and measured on."""

    data: str = ""
    """Training images: one folder per class, shards with labels, or NAME:PATH of a published set. With `head` they only
    tell the classes."""
    test_data: str | None = None
    """Test images, likewise; without it a published set's own test part, or a part of `data` that is held out."""
    test_fraction: float = 0.2
    """Share of every class that is held out for the test without `test_data`."""
    seed: int = 0
    """Of that choice."""
    also: tuple[str, ...] = ()
    """Further test sets for the same head, such as imagenet-real:PATH and imagenet-v2:PATH, or folders of one's own."""
    head: Path | None = None
    """Measure this head instead of training: a file of `save_head`, or a …_linear_head.pth of the official release."""
    save_head: Path | None = None
    """Write the best head here, as safetensors."""
    probe: Probe = field(default_factory=Probe)
    """How heads are trained."""

    def __post_init__(self) -> None:
        within(self, "--", seed=SEEDS)
        if not 0 < self.test_fraction < 1:
            raise OpsinError(f"--test-fraction is {self.test_fraction}: give a share between 0 and 1, such as 0.2.")
        if self.head is not None and self.save_head is not None:
            raise OpsinError("--head is measured as it is, so --save-head has nothing to write: leave out one of them.")
        if self.save_head is not None and self.save_head.suffix != ".safetensors":
            raise OpsinError(f"--save-head {self.save_head} does not end in .safetensors: the head is written so.")


def linear(model: Model, settings: Linear, run: Run) -> Result:
    """Train linear heads on the frozen backbone and measure the best: the paper's main figure.

    Heads of 13 learning rates, on the class token of the last block or of the last four, with and without the mean
    patch token, learn from the same batches; the best on the test images is reported, as the reference does, and
    measured on the sets of `also`.

    Returns:
        The set's metric (`accuracy` or `per_class`), and `METRIC_NAME` for every further set. Details: `chosen` and
        `grid`, the settings and the metric of all heads (not with `head`), `n_train`, `n_test`, `classes`, `per_class`.

    Raises:
        OpsinError: see `sets.train_and_test`, `probe.fit` and `classifier.load`.
    """
    train, test = train_and_test(
        settings.data, settings.test_data, settings.test_fraction, settings.seed, model.arch.channels
    )
    metric = _metric(settings.test_data or settings.data)
    further = [(_name(spec), *further_set(spec, train, model.arch.channels)) for spec in settings.also]
    facts: dict[str, Any] = {}
    left_out: list[tuple[str, str]] = []
    if settings.head is not None:
        classifier = load(settings.head, model.arch.width, len(train.classes))
        known = features(model, test, Centre(settings.probe.size), run)
    else:
        fitted = fit(model, train, test, settings.probe, run, metric)
        classifier, facts, known = fitted.classifier, fitted.facts, fitted.test
        left_out += fitted.left_out
        if settings.save_head is not None:
            save(classifier, settings.save_head)
    measured = measure(classifier, test, known, metric)
    left_out += left_out_of(test, known)
    rows = [(_name(settings.test_data or settings.data, test), measured)]
    metrics: dict[str, float] = {metric: measured.value}
    for name, images, mask, its_metric in further:
        found = features(model, images, Centre(settings.probe.size), run)
        its = measure(classifier, images, found, its_metric, mask)
        rows.append((name, its))
        metrics[f"{its_metric}_{name}"] = its.value
        left_out += left_out_of(images, found)
    by_class = zip(train.classes, measured.by_class.tolist(), strict=True)
    return Result(
        data=rows[0][0],
        metrics=metrics,
        table=_table(rows, metric, classifier, facts, settings),
        details={
            **facts,
            "n_train": 0 if settings.head else len(train),
            "n_test": int(known.good.sum()),
            "classes": [shown(name) for name in train.classes],
            "per_class": {shown(name): value for name, value in by_class if value == value},  # NaN: none is tested
        },
        left_out=left_out,
        outcomes=None if measured.outcomes is None else measured.outcomes.numpy(),
    )


def measure(
    classifier: Classifier, images: ImageSet, known: Known, metric: Metric, answers: Tensor | None = None
) -> Measured:
    """A metric of a classifier on images whose features are known; those that cannot be read count nowhere.

    Args:
        classifier: on any device.
        images: with labels in the classifier's numbering.
        known: their features.
        metric: what is counted.
        answers: classes that an answer may be, booleans `[K]`; None allows all.
    """
    assert images.labels is not None
    scores = scores_of(classifier, known.pooled.rows(known.good))
    if answers is not None:
        scores[:, ~answers] = -torch.inf
    return of_scores(scores, torch.from_numpy(images.labels)[known.good], metric)


def scores_of(classifier: Classifier, pooled: Pooled) -> Tensor:
    """A classifier's scores `[N, K]` of many images, on the CPU, computed part by part."""
    parts = torch.arange(len(pooled.mean)).split(ROWS)
    return torch.cat([classifier.logits(pooled.rows(part)).cpu() for part in parts])


def _metric(spec: str) -> Metric:
    metric = metric_of(spec)
    if metric not in TITLES:
        raise OpsinError(f"images of {spec} have several classes each, and a linear head gives one: use logreg.")
    return metric


def _name(spec: str, images: ImageSet | None = None) -> str:
    """The published set's name, or where one's own images lie."""
    name, path = named(spec, SETS)
    return name or (shown(path) if images is None else images.where)


def further_set(spec: str, train: ImageSet, channels: int) -> tuple[ImageSet, Tensor | None, Metric]:
    """A further test set in the numbering of `train`, the classes that an answer may be, and what is counted."""
    name, path = named(spec, SETS)
    if name == "imagenet-c":
        raise OpsinError("imagenet-c has a test set for each corruption and severity: give it to robustness --tests.")
    images = own(spec, channels) if name is None else read_set(name, Path(path), SETS[name].test)
    answers = allowed(images, train.classes)
    return replace(images, labels=in_classes_of(images, train), classes=train.classes), answers, _metric(spec)


def left_out_of(images: ImageSet, known: Known) -> list[tuple[str, str]]:
    """Name and reason of the images of a set that cannot be read."""
    return [(images.name(index), reason) for index, reason in sorted(known.bad.items())]


def _table(
    rows: Sequence[tuple[str, Measured]],
    metric: Metric,
    classifier: Classifier,
    facts: dict[str, Any],
    settings: Linear,
) -> Table:
    token = f"class token{'s' if classifier.blocks > 1 else ''} of the last {classifier.blocks} block"
    seen = token + ("s" if classifier.blocks > 1 else "") + (" and the mean patch token" if classifier.mean else "")
    if settings.head is not None:
        note = f"The head {settings.head}, on the {seen}."
    else:
        note = (
            f"The best of {len(facts['grid'])} heads on the test images: rate {facts['chosen']['rate']:g}, on the "
            f"{seen}; trained on {settings.probe.crops} crops."
        )
    lines = [
        [name, f"{found.value:.3f}", str(0 if found.outcomes is None else len(found.outcomes))] for name, found in rows
    ]
    return Table(("test set", TITLES[metric], "images"), lines, note)
