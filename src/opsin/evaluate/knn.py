"""Weighted nearest-neighbour accuracy of a frozen backbone, by the reference's protocol."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.backbone.probe import NEIGHBOURS, knn_classify
from opsin.data.progress import progress
from opsin.errors import FINITE, SEEDS, OpsinError, within
from opsin.evaluate.datasets.classification import Metric, metric_of
from opsin.evaluate.labelled import Labelled, labelled
from opsin.evaluate.metrics import Measured, of_predictions
from opsin.evaluate.model import Model
from opsin.evaluate.task import Result, Run, Table
from opsin.evaluate.transforms import Centre

QUERIES = 4096
"""Queries of which all votes are held at once."""
SIMILARITIES = 2**28
"""Similarities that are held at once: 1 GiB."""


@dataclass(frozen=True)
class Knn:
    """What nearest neighbours are asked."""

    data: str = ""
    """Training images, among which neighbours are found: one folder per class, shards with labels, or NAME:PATH of a
    published set."""
    test_data: str | None = None
    """Test images, likewise; without it a published set's own test part, or a part of `data` that is held out."""
    test_fraction: float = 0.2
    """Share of every class that is held out without `test_data`."""
    seed: int = 0
    """Of that split, and of the draws of few images."""
    size: int = 224
    """Side of the centre crop in pixels, a multiple of the patch."""
    k: tuple[int, ...] = NEIGHBOURS
    """Numbers of neighbours; one above the number of training images is lowered to that."""
    temperature: float = 0.07
    """Of the softmax over similarities, which weighs the neighbours."""
    shots: tuple[int, ...] = ()
    """Also measure with so many training images per class (fewer where a class has fewer), drawn at random."""
    tries: int = 5
    """Draws for each number of `shots`; their mean is reported."""
    balanced: bool = False
    """Every class of the training images has the same weight in all (a neighbour's vote is divided by the number of
    images of its class), and so it has in the result: mean accuracy per class."""

    def __post_init__(self) -> None:
        if not self.k:
            raise OpsinError("--k is empty: give numbers of neighbours, for example 20.")
        within(self, "--", k=(1, FINITE), size=(1, FINITE), seed=SEEDS, temperature=(1e-6, FINITE))
        within(self, "--", shots=(1, FINITE), tries=(1, FINITE))


def knn(model: Model, settings: Knn, run: Run) -> Result:
    """Weighted k-nearest-neighbour accuracy of frozen features, also from few images per class.

    Neighbours are by cosine similarity of class tokens. The best k is chosen on the test images, as the reference does.

    Returns:
        `accuracy` (or `per_class`) at the best k, `accuracy_at_20` and so on for every k, `accuracy_1_shot` and so on
        for every number of `shots`. Details: `best_k`, `per_class` at that k, `shots` (for every number its best k,
        mean, standard deviation, tries, and how many classes have fewer images).

    Raises:
        OpsinError: see `sets.train_and_test` and `pooled.features`; training images have several classes each, or none
            has as many as `shots`.
    """
    split = labelled(
        model, settings.data, settings.test_data, settings.test_fraction, settings.seed, Centre(settings.size), run
    )
    if split.train.labels.ndim == 2:
        raise OpsinError(
            f"images of {split.train.images.where} have several classes each, and a neighbour votes for one: "
            "evaluate logreg on this set."
        )
    if split.answers is not None:  # only images of classes that an answer may be can be neighbours
        rows = split.answers[split.train.labels]
        train = replace(split.train, tokens=split.train.tokens[rows], labels=split.train.labels[rows])
        split = replace(split, train=train)
    published = metric_of(settings.test_data or settings.data)
    metric: Metric = "per_class" if settings.balanced or published == "per_class" else "accuracy"

    def measure(k: Sequence[int], rows: Tensor | None = None) -> dict[int, Measured]:
        predicted = _predicted(split, k, settings, run, rows)
        labels, classes = split.test.labels, len(split.classes)
        return {number: of_predictions(classed, labels, classes, metric) for number, classed in predicted.items()}

    by_k = measure(settings.k)
    best = max(by_k, key=lambda number: by_k[number].value)
    few = {number: _few_shot(number, split, settings, measure) for number in sorted(set(settings.shots))}
    details = split.details(by_k[best]) | {"best_k": best}
    outcomes = by_k[best].outcomes
    assert outcomes is not None
    return Result(
        data=split.data,
        metrics={
            metric: by_k[best].value,
            **{f"{metric}_at_{number}": measured.value for number, measured in by_k.items()},
            **{f"{metric}_{number}_shot": found["mean"] for number, found in few.items()},
        },
        table=Table(
            ("neighbours", "accuracy" if metric == "accuracy" else "mean accuracy per class"),
            [
                *([str(number), f"{measured.value:.3f}"] for number, measured in by_k.items()),
                *(
                    [
                        f"{found['k']} of {number} per class",
                        f"{found['mean']:.3f} ± {found['standard_deviation']:.3f}",
                    ]
                    for number, found in few.items()
                ),
            ],
            f"{details['n_train']} training and {details['n_test']} test images.",
        ),
        details=details | ({"shots": {str(number): found for number, found in few.items()}} if few else {}),
        left_out=split.train.left_out + split.test.left_out,
        outcomes=outcomes.numpy(),
    )


def few_per_class(labels: NDArray[np.int64], number: int, seed: int, draw: int) -> NDArray[np.int64]:
    """Sorted indices of `number` images of every class of `labels [N]`, or of all that it has if it has fewer.

    What is drawn for a smaller number is part of what the same seed and draw give for a larger one.
    """
    order = np.random.default_rng([seed, draw]).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, first, inverse = np.unique(labels[order], return_index=True, return_inverse=True)
    return np.sort(order[np.arange(len(labels)) - first[inverse] < number])


def _few_shot(
    number: int, split: Labelled, settings: Knn, measure: Callable[[Sequence[int], Tensor], dict[int, Measured]]
) -> dict[str, Any]:
    """Measured with `number` training images per class, with up to `number` neighbours, as in the reference."""
    labels = split.train.labels.cpu().numpy()
    sizes = np.unique(labels, return_counts=True)[1]
    if sizes.max() < number:
        raise OpsinError(
            f"no class of {split.train.images.where} has --shots {number} training images, the largest has "
            f"{sizes.max()}: give smaller numbers."
        )
    k = sorted({number, *(one for one in settings.k if one < number)})
    tries = [
        measure(k, torch.from_numpy(few_per_class(labels, number, settings.seed, draw)))
        for draw in range(settings.tries)
    ]
    by_k = {one: [measured[one].value for measured in tries] for one in k}
    best = max(by_k, key=lambda one: np.mean(by_k[one]))
    return {
        "k": best,
        "mean": float(np.mean(by_k[best])),
        "standard_deviation": float(np.std(by_k[best], ddof=min(1, settings.tries - 1))),
        "tries": by_k[best],
        "classes_with_fewer": int((sizes < number).sum()),
    }


def _predicted(
    split: Labelled, k: Sequence[int], settings: Knn, run: Run, rows: Tensor | None = None
) -> dict[int, Tensor]:
    """The most voted class of every test image `[Q]` for every k, from all training images or some rows of them."""
    gallery, labels = split.train.tokens, split.train.labels
    if rows is not None:
        gallery, labels = gallery[rows.to(gallery.device)], labels[rows.to(labels.device)]
    sizes = labels.bincount(minlength=len(split.classes)).clamp(min=1)
    parts: dict[int, list[Tensor]] = {}
    with progress("neighbours", len(split.test), "images", run.progress) as advance:
        for queries in split.test.tokens.split(QUERIES):
            votes = knn_classify(
                queries,
                gallery,
                labels,
                k,
                num_classes=len(split.classes),
                temperature=settings.temperature,
                chunk=min(1024, max(1, SIMILARITIES // len(gallery))),
            )
            for number, vote in votes.items():
                # A class's votes are a sum over its images: dividing the sum divides each of them.
                vote = vote / sizes if settings.balanced else vote
                parts.setdefault(number, []).append(vote.argmax(1))
            advance(len(queries))
    return {number: torch.cat(found) for number, found in parts.items()}
