"""The linear probe of the paper: a grid of heads on a frozen backbone, and the one that is best on the test set.

Every learning rate, with the class tokens of the last block or of the last four, with and without the mean patch token,
trains on the same batches (paper, B.3); the best head *on the test images* is the result, as in the reference.
"""

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opsin.errors import FINITE, SEEDS, OpsinError, within
from opsin.evaluate.classifier import Classifier
from opsin.evaluate.datasets.classification import Metric
from opsin.evaluate.heads import Descent, Heads, Kind, predictions, rows_of
from opsin.evaluate.metrics import of_predictions
from opsin.evaluate.model import Model
from opsin.evaluate.pooled import Known, Pooled, features, pool
from opsin.evaluate.sets import ImageSet, several_classes
from opsin.evaluate.store import place
from opsin.evaluate.task import Run
from opsin.evaluate.training import train as training
from opsin.evaluate.transforms import Centre
from opsin.evaluate.views import Views, order

PAPER_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)
"""Table of the paper (B.3)."""
CODE_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Of the released code, for a batch of 256; multiplied by batch / 256."""


@dataclass(frozen=True)
class Probe:
    """How linear heads are trained."""

    rates: Literal["paper", "code"] = "paper"
    """The grid of learning rates: the paper's, or the released code's, which grow with the batch."""
    steps: int = 12_500
    """Steps of stochastic gradient descent. The default is the paper's, for ImageNet; 500 do for a few hundred."""
    train_batch: int = 1024
    """Images per step. A small set comes several times in a batch."""
    blocks: tuple[int, ...] = (1, 4)
    """Last blocks whose class tokens a head sees: heads are trained for every one of these numbers."""
    crops: Literal["random", "centre"] = "random"
    """Training images: a fresh random-resized crop at every visit, the paper's way, which takes days on a CPU; or the
    centre crop, whose features are computed once: much faster, and a little less accurate."""
    size: int = 224
    """Side of the crops in pixels, a multiple of the patch."""
    probe_seed: int = 0
    """Of the initial heads, the order and the crops."""

    def __post_init__(self) -> None:
        within(self, "--probe.", steps=(1, FINITE), train_batch=(1, FINITE), size=(1, FINITE), probe_seed=SEEDS)
        if not self.blocks or min(self.blocks) < 1 or len(set(self.blocks)) < len(self.blocks):
            raise OpsinError(f"--probe.blocks is {self.blocks}: give different numbers of blocks, such as 1 4.")

    @property
    def grid(self) -> list[float]:
        """The 13 rates."""
        return list(PAPER_RATES) if self.rates == "paper" else [rate * self.train_batch / 256 for rate in CODE_RATES]

    @property
    def kinds(self) -> list[Kind]:
        """What heads see."""
        return [Kind(blocks, mean) for blocks in self.blocks for mean in (False, True)]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A probe's result."""

    classifier: Classifier
    """The head that is best on the test images, on the model's device."""
    facts: dict[str, Any]
    """JSON-able: `grid`, a list of `blocks`, `mean`, `rate` and the metric by its name for every head, and `chosen`,
    the entry of the best."""
    test: Known
    """Features of the test images."""
    left_out: Sequence[tuple[str, str]] = ()
    """Training images that cannot be read, each with the reason; with random crops it is not known which were met."""


def fit(
    model: Model, train: ImageSet, test: ImageSet, settings: Probe, run: Run, metric: Metric = "accuracy"
) -> Fitted:
    """Train all heads on `train` and choose the best on `test`.

    Images that cannot be read count nowhere: a test image is left out, in training the next one takes its place.

    Args:
        model: the frozen backbone.
        train: with one class per image.
        test: with labels in the numbering of `train` (`sets.train_and_test`), `[N]` or `[N, K]`.
        settings: of the training.
        run: how to compute; an interrupted training goes on.
        metric: by which the head is chosen, "accuracy" or "per_class".

    Raises:
        OpsinError: images of several classes in `train`; more blocks than are kept; features or losses not finite.
    """
    labels = _one_class_each(train)
    assert test.labels is not None
    known = features(model, test, Centre(settings.size), run)
    pooled, test_labels = known.pooled.rows(known.good), torch.from_numpy(test.labels)[known.good]
    key = {"weights": model.digest, "images": train.fingerprint}
    classes = len(train.classes)
    if settings.crops == "centre":
        kept = features(model, train, Centre(settings.size), run)
        several_classes(labels[kept.good].numpy(), train.where, train.classes)
        args = kept.pooled.rows(kept.good), labels[kept.good], pooled, test_labels, classes, settings, run, model.device
        bad = [(train.name(index), reason) for index, reason in sorted(kept.bad.items())]
        return Fitted(*fit_pooled(*args, key, metric), known, bad)
    _check_blocks(settings, pooled)

    def batches(first: int) -> Iterator[tuple[Tensor, Tensor]]:
        views = Views(train, settings.size, settings.train_batch, settings.probe_seed)
        stream = views.batches(first, settings.steps, run.workers)
        try:
            for images, targets in stream:
                found = [pool(model, part) for part in images.split(run.batch_size)]
                both = Pooled(torch.cat([one.cls for one in found]), torch.cat([one.mean for one in found]))
                yield rows_of(both, max(settings.blocks)), targets.to(model.device)
        finally:
            stream.close()

    heads = _trained(batches, pooled, labels, classes, settings, run, model.device, key)
    return Fitted(*_best(heads, pooled, test_labels, classes, settings, metric), known)


def fit_pooled(
    train: Pooled,
    labels: Tensor,
    test: Pooled,
    test_labels: Tensor,
    classes: int,
    settings: Probe,
    run: Run,
    device: torch.device,
    key: dict[str, Any],
    metric: Metric = "accuracy",
) -> tuple[Classifier, dict[str, Any]]:
    """The same on features that are known, of any width and number of blocks; `settings.crops` and `size` are not used.

    Args:
        train: features of N images.
        labels: their classes `[N]`.
        test: features of the test images.
        test_labels: `[N]` or `[N, K]`.
        classes: K.
        settings: of the training.
        run: how to compute.
        device: where the heads train.
        key: JSON-able; what `train` was made of: an interrupted training with the same goes on.
        metric: by which the head is chosen.

    Returns:
        The best head, on `device`, and the facts of `Fitted`.

    Raises:
        OpsinError: see `fit`.
    """
    _check_blocks(settings, test)
    most = max(settings.blocks)

    def batches(first: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index in order(len(labels), settings.train_batch, settings.probe_seed, first, settings.steps):
            yield rows_of(train.rows(index), most).to(device), labels[index].to(device)

    heads = _trained(batches, test, labels, classes, settings, run, device, key)
    return _best(heads, test, test_labels, classes, settings, metric)


def cosine(steps: int) -> Callable[[int], float]:
    """Step → factor of the rate: from 1 down to 0 along half a cosine, as torch's `CosineAnnealingLR`."""
    return lambda step: (1 + math.cos(math.pi * step / steps)) / 2


def _trained(
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    like: Pooled,
    labels: Tensor,
    classes: int,
    settings: Probe,
    run: Run,
    device: torch.device,
    key: dict[str, Any],
) -> Heads:
    """All heads after the training, from the store if it was done before."""
    digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
    folder: Path = place(run.cache, "probe", classes=classes, labels=digest, probe=asdict(settings), of=key)
    heads = Heads(settings.kinds, len(settings.grid), classes, like.mean.shape[1], settings.probe_seed).to(device)
    descent = Descent(heads, settings.grid)
    training(
        heads,
        descent,
        cosine(settings.steps),
        batches,
        descent.loss,
        settings.steps,
        folder,
        what="linear heads",
        show=run.progress,
    )
    return heads


def _best(
    heads: Heads, test: Pooled, labels: Tensor, classes: int, settings: Probe, metric: Metric
) -> tuple[Classifier, dict[str, Any]]:
    """The head with the highest metric, of equals the first, and the table of all."""
    device = heads.biases[0].device

    def parts() -> Generator[Tensor, None, None]:
        for index in torch.arange(len(test.mean)).split(settings.train_batch):
            yield rows_of(test.rows(index), heads.blocks).to(device)

    grid: list[dict[str, Any]] = []
    for kind, predicted in zip(heads.kinds, predictions(heads, parts()), strict=True):
        for rate, one in zip(settings.grid, predicted, strict=True):
            value = of_predictions(one, labels, classes, metric).value
            grid.append({"blocks": kind.blocks, "mean": kind.mean, "rate": rate, metric: value})
    place_of_best = max(range(len(grid)), key=lambda number: float(grid[number][metric]))
    number, rate_number = divmod(place_of_best, len(settings.grid))
    weight, bias = (stacked[number][rate_number].detach().clone() for stacked in (heads.weights, heads.biases))
    return Classifier(weight, bias, *heads.kinds[number]), {"grid": grid, "chosen": grid[place_of_best]}


def _one_class_each(train: ImageSet) -> Tensor:
    assert train.labels is not None
    if train.labels.ndim == 2:
        raise OpsinError(
            f"images of {train.where} may have several classes, and a linear probe takes one class for each: evaluate "
            "this set with logreg."
        )
    return torch.from_numpy(train.labels)


def _check_blocks(settings: Probe, pooled: Pooled) -> None:
    kept = pooled.cls.shape[1]
    if max(settings.blocks) > kept:
        raise OpsinError(
            f"--probe.blocks asks for the last {max(settings.blocks)} blocks, and features of {kept} are kept: give "
            f"numbers up to {kept}."
        )
