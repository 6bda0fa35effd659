"""What classification counts: right answers, their mean over classes, and VOC 2007's average precision.

Letters in shapes: N test images, K classes. Labels are `[N]`, or `[N, K]` where an image may have several classes: 1
for its classes, 0 for others, -1 for those that do not count for this image (see `sets.ImageSet`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opsin.errors import OpsinError
from opsin.evaluate.datasets.classification import Metric


@dataclass(frozen=True, eq=False)
class Measured:
    """What a metric says of a test set, on the CPU."""

    value: float
    """The metric, from 0 to 1."""
    by_class: Tensor
    """The same by class, fp64 `[K]`: share of its images that are right, or its average precision. NaN for a class that
    no image tests."""
    outcomes: Tensor | None
    """1 or 0 for right or wrong, fp64 `[N]`, of the images that count; None where nothing is said of one image."""


def counted(labels: Tensor) -> Tensor:
    """Booleans `[N]`: images that have a class. The others tell nothing of a prediction (as ReaL's without a label)."""
    return (labels == 1).any(1) if labels.ndim == 2 else labels >= 0


def of_predictions(predicted: Tensor, labels: Tensor, classes: int, metric: Metric = "accuracy") -> Measured:
    """Accuracy, or its mean over the classes that are tested, of predicted classes `[N]`.

    A prediction for an image of several classes is right if it is one of them (Beyer et al., 2006.07159).

    Args:
        predicted: one class for every image.
        labels: `[N]` or `[N, K]`.
        classes: K.
        metric: "accuracy" or "per_class".

    Raises:
        OpsinError: no image has a class.
    """
    labels, predicted = labels.cpu(), predicted.cpu()
    rows = counted(labels)
    if not rows.any():
        raise OpsinError("no test image has a label, so there is nothing to count: look at the labels of the test set.")
    labels, predicted = labels[rows], predicted[rows]
    members = labels == 1 if labels.ndim == 2 else labels[:, None] == torch.arange(classes)
    right = members.gather(1, predicted[:, None])[:, 0].double()
    by_class = right @ members.double() / members.sum(0)
    value = right.mean() if metric == "accuracy" else by_class[~by_class.isnan()].mean()
    return Measured(value.item(), by_class, right)


def of_scores(scores: Tensor, labels: Tensor, metric: Metric) -> Measured:
    """Any metric of scores `[N, K]`, of which the largest is the predicted class.

    Raises:
        OpsinError: see `of_predictions`; average precision is asked for and no class has an image.
    """
    classes = scores.shape[1]
    if metric != "voc_map":
        return of_predictions(scores.argmax(1), labels, classes, metric)
    if labels.ndim == 1:
        labels = (labels[:, None].cpu() == torch.arange(classes)).long()
    by_class = torch.tensor(
        [voc_average_precision(scores[:, k], labels[:, k]) for k in range(classes)], dtype=torch.float64
    )
    tested = ~by_class.isnan()
    if not tested.any():
        raise OpsinError("no class has a test image, so there is no average precision: look at the test set's labels.")
    return Measured(by_class[tested].mean().item(), by_class, None)


def voc_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Average precision of one class by the 11-point rule of VOC 2007 (Everingham et al., 2010, §4.2.1).

    The mean, over recalls 0, 0.1, … 1, of the best precision at that recall or above. Images of equal score enter
    together, so their order does not matter.

    Args:
        scores: `[N]`, higher means more likely.
        labels: `[N]`, 1, 0, or -1 for images that are left out ("difficult").

    Returns:
        From 0 to 1; NaN if no image has the class.
    """
    counts = labels >= 0
    score, positive = scores[counts].double().cpu().numpy(), (labels[counts] == 1).cpu().numpy()
    if not positive.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    score, found = score[order], np.cumsum(positive[order])
    last = np.append(score[1:] != score[:-1], True)  # of those of equal score
    found, shown = found[last], np.flatnonzero(last) + 1
    precision = found / shown
    # Whole numbers, since 0.1 · 3 is not 0.3 in floating point. Recall 1 is always reached: all are shown in the end.
    reached = [precision[10 * found >= tenth * found[-1]].max() for tenth in range(11)]
    return float(np.mean(reached))
