"""Recognition of exhibits on the Met data set, by its authors' nearest-neighbour classifier and metrics.

A query's class is that of its most similar train image; how sure that is follows from a softmax over all classes, in
which only those among the K nearest train images have a similarity and all others have 0. K and the temperature are
those with the best GAP on the validation queries.
"""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from opsin.errors import OpsinError
from opsin.evaluate.datasets.retrieval import MetSet
from opsin.evaluate.model import Model
from opsin.evaluate.ranking import global_average_precision, nearest
from opsin.evaluate.task import Result, Run, Table
from opsin.evaluate.transforms import Transform
from opsin.evaluate.vectors import Feature, learn_whitening, vectors

NEIGHBOURS = (1, 2, 3, 5, 7, 10, 15, 20, 50)
TEMPERATURES = (0.01, 0.1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 50.0, 100.0, 500.0)
"""The grid of the authors' code; similarities are multiplied by the temperature."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def classify(
    similarity: Floats, labels: Integers, neighbours: int, temperature: float, classes: int
) -> tuple[Integers, Floats]:
    """Class and confidence of each query, `[Q]` each.

    Args:
        similarity: to the nearest train images, best first, `[Q, K]`.
        labels: their classes, `[Q, K]`.
        neighbours: how many of them count.
        temperature: factor of the similarity in the softmax.
        classes: number of classes in the train set.

    Returns:
        The class of the greatest probability p, and -(1 - p)/p: it orders queries as p does, and does not round to one
        value where p comes near 1.
    """
    scores, names = np.maximum(similarity[:, :neighbours], 0), labels[:, :neighbours]
    # Only the best image of a class counts, and that is its first.
    again = np.stack([(names[:, :i] == names[:, i : i + 1]).any(1) for i in range(names.shape[1])], axis=1)
    powers = np.exp(temperature * (scores - scores[:, :1])) * ~again
    absent = (classes - (~again).sum(1)) * np.exp(-temperature * scores[:, 0])
    others = powers[:, 1:].sum(1) + absent
    predicted = np.where(scores[:, 0] > 0, names[:, 0], names.min(1))  # all alike at 0: the first class by number
    return predicted, -others


def figures(predicted: Integers, confidence: Floats, truth: Integers) -> dict[str, float]:
    """GAP over all queries, GAP- and accuracy without distractors, whose truth is -1."""
    known = truth >= 0
    right = predicted == truth
    return {
        "gap": float(global_average_precision(right, confidence, int(known.sum())).sum()),
        "gap_minus": float(global_average_precision(right[known], confidence[known], int(known.sum())).sum()),
        "accuracy": float(right[known].mean()),
    }


def recognise(
    model: Model, data: MetSet, name: str, transform: Transform, feature: Feature, dimensions: int | None, run: Run
) -> Result:
    """Measure `gap`, `gap_minus` and `accuracy` on the test queries, tuned on the validation queries.

    Args:
        model: the frozen backbone.
        data: the set.
        name: of the set.
        transform: of images.
        feature: see `vectors`.
        dimensions: of the PCA whitening learned on the train images; None does not whiten.
        run: how to compute.
    """
    sets = {"train": data.train, "val": data.val, "test": data.test}
    found, labels, left_out = {}, {}, []
    for part, images in sets.items():
        assert images.labels is not None
        vectors_of, bad = vectors(model, images, transform, feature, run)
        good = np.setdiff1d(np.arange(len(images)), list(bad))
        found[part], labels[part] = (vectors_of, images.labels) if not bad else (vectors_of[good], images.labels[good])
        left_out += [(images.name(i), reason) for i, reason in sorted(bad.items())]
        if not (labels[part] >= 0).any():
            raise OpsinError(f"no image of an exhibit among the {part} images of {images.where} can be decoded.")
    if dimensions is not None:
        whitening = learn_whitening(found["train"], dimensions)
        found = {part: whitening(one) for part, one in found.items()}
    classes = len(np.unique(labels["train"]))

    def closest(part: str) -> tuple[Floats, Integers]:
        similarity, index = nearest(found[part], found["train"], max(NEIGHBOURS), model.device)
        return similarity.double().numpy(), labels["train"][index.numpy()]

    similarity, names = closest("val")
    grid = [k for k in NEIGHBOURS if k <= similarity.shape[1]]
    tuned = {
        (k, t): figures(*classify(similarity, names, k, t, classes), labels["val"])["gap"]
        for k, t in product(grid, TEMPERATURES)
    }
    neighbours, temperature = max(tuned, key=lambda choice: tuned[choice])
    predicted, confidence = classify(*closest("test"), neighbours, temperature, classes)
    truth = labels["test"]
    metrics = figures(predicted, confidence, truth)
    known = truth >= 0
    contribution = global_average_precision(predicted == truth, confidence, int(known.sum()))
    return Result(
        data=name,
        metrics=metrics,
        table=Table(
            ("metric", "value"),
            [(metric, f"{value:.3f}") for metric, value in metrics.items()],
            f"{int(known.sum()):,} queries of exhibits and {int((~known).sum()):,} of other things among "
            f"{len(truth):,}; {neighbours} neighbours and temperature {temperature:g}, chosen on val",
        ),
        details={
            "neighbours": neighbours,
            "temperature": temperature,
            "val_gap": tuned[neighbours, temperature],
            "train": len(labels["train"]),
            "classes": classes,
            "queries": int(known.sum()),
            "distractors": int((~known).sum()),
            "transform": transform.name,
            "feature": feature,
            "whitened_to": None if dimensions is None else int(found["train"].shape[1]),
        },
        left_out=left_out,
        outcomes=contribution[known] * int(known.sum()),
    )
