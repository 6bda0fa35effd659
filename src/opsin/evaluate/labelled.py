"""Class tokens of labelled train and test images: what nearest neighbours and logistic regression start from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.data.decode import shown
from opsin.evaluate.datasets.classification import SETS, allowed, read_set
from opsin.evaluate.metrics import Measured
from opsin.evaluate.model import Model
from opsin.evaluate.pooled import features
from opsin.evaluate.sets import ImageSet, named, several_classes, train_and_test
from opsin.evaluate.task import Run
from opsin.evaluate.transforms import Transform


@dataclass(frozen=True, eq=False)
class Part:
    """The images of a part that can be read."""

    images: ImageSet
    """The part, with those that cannot."""
    tokens: Tensor
    """Class tokens of the last block after the final norm, not of unit length, fp32 `[N, D]` on the model's device."""
    labels: Tensor
    """`[N]` or `[N, K]` (see `ImageSet.labels`), on the model's device."""
    left_out: list[tuple[str, str]]
    """Images that cannot be read, each with the reason."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Labelled:
    """A train and a test part with the same classes."""

    train: Part
    """What a classifier learns from."""
    test: Part
    """What it is measured on."""
    data: str
    """What is measured on: the name of a published set, or where images of one's own lie."""
    classes: list[str]
    """Names of the K classes."""
    answers: Tensor | None
    """Classes that an answer may be, booleans `[K]` on the model's device; None allows all (see `allowed`)."""

    def details(self, measured: Measured) -> dict[str, Any]:
        """What every result of a classifier says: numbers of images, classes, and the metric by class."""
        by_class = zip(self.classes, measured.by_class.tolist(), strict=True)
        return {
            "n_train": len(self.train),
            "n_test": len(self.test) if measured.outcomes is None else len(measured.outcomes),
            "classes": self.classes,
            "per_class": {name: value for name, value in by_class if value == value},  # NaN: a class without a test
        }


def labelled(
    model: Model,
    data: str,
    test_data: str | None,
    test_fraction: float,
    seed: int,
    transform: Transform,
    run: Run,
) -> Labelled:
    """The class tokens of images given as `sets.train_and_test` takes them, from the store where they are known.

    Raises:
        OpsinError: see `sets.train_and_test` and `pooled.features`.
    """
    train, test = train_and_test(data, test_data, test_fraction, seed, model.arch.channels)
    name, path = named(test_data or data, SETS)
    # `test` is in the classes of `train` by now: which classes a published set has, only its lists tell.
    own_test = read_set(name, Path(path), SETS[name].test) if name and test_data else test
    answers = allowed(own_test, train.classes)
    learnt, measured = (_part(model, images, transform, run) for images in (train, test))
    several_classes(learnt.labels.cpu().numpy(), train.where, train.classes)
    return Labelled(
        learnt,
        measured,
        name or test.where,
        [shown(name) for name in train.classes],
        None if answers is None else answers.to(model.device),
    )


def _part(model: Model, images: ImageSet, transform: Transform, run: Run) -> Part:
    known = features(model, images, transform, run)
    assert images.labels is not None
    labels: NDArray[np.int64] = images.labels[known.good.numpy()]
    return Part(
        images,
        known.pooled.cls[known.good, -1].to(model.device),
        torch.from_numpy(labels).to(model.device),
        [(images.name(index), reason) for index, reason in sorted(known.bad.items())],
    )
