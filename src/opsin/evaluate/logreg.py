"""Logistic regression on frozen features, its penalty chosen on held-out images: the protocol of SimCLR's twelve sets.

The values of C follow one another from the strongest penalty to the weakest, each fit starting from the solution before
(see `logistic`); the one that is best on the held-out images is used for a last fit on all training images.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsin.data.progress import progress
from opsin.errors import FINITE, SEEDS, OpsinError, within
from opsin.evaluate import sets
from opsin.evaluate.datasets.classification import metric_of
from opsin.evaluate.labelled import Part, labelled
from opsin.evaluate.logistic import Fit, Regression
from opsin.evaluate.metrics import of_scores
from opsin.evaluate.model import Model
from opsin.evaluate.task import Result, Run, Table
from opsin.evaluate.transforms import Centre


@dataclass(frozen=True)
class Logreg:
    """What is fitted, and how its penalty is chosen."""

    data: str = ""
    """Training images: one folder per class, shards with labels, or NAME:PATH of a published set."""
    test_data: str | None = None
    """Test images, likewise; without it a published set's own test part, or a part of `data` that is held out."""
    test_fraction: float = 0.2
    """Share of every class that is held out for the test without `test_data`."""
    seed: int = 0
    """Of the splits."""
    size: int = 224
    """Side in pixels to which the shorter side of an image is resized, and of its centre crop; a multiple of the
    patch."""
    values: int = 45
    """Number of values of C, the inverse of the penalty, evenly spaced in their logarithm. 1 takes `lowest` and holds
    nothing out."""
    lowest: float = -6.0
    """Power of ten of the smallest C."""
    highest: float = 5.0
    """Power of ten of the largest C."""
    held_out: float = 0.1
    """Share of the training images, per class, on which C is chosen; all are used for the final fit."""
    max_iterations: int = 1000
    """Most iterations of conjugate gradients for one C; details say for which C they did not suffice."""

    def __post_init__(self) -> None:
        within(self, "--", seed=SEEDS, size=(1, FINITE), values=(1, 10_000), max_iterations=(1, FINITE))
        within(self, "--", lowest=(-12, 12), highest=(-12, 12))
        if self.lowest > self.highest:
            raise OpsinError(f"--lowest {self.lowest:g} is above --highest {self.highest:g}: exchange them.")
        if not 0 < self.held_out < 1:
            raise OpsinError(f"--held-out {self.held_out:g} is not between 0 and 1: give, for example, 0.1.")


def logreg(model: Model, settings: Logreg, run: Run) -> Result:
    """Logistic regression on frozen features, its penalty chosen on held-out training images.

    On class tokens of the last block, not of unit length. Images with several classes each have one regression per
    class, in which images that do not count for it (labels of -1) take no part.

    Returns:
        The set's own metric: `accuracy`, `per_class` or `voc_map`. Details: the chosen `C`, `per_class`, `path` (every
        C with the metric on held-out images), `not_converged` (values of C for which `max_iterations` were too few).

    Raises:
        OpsinError: see `sets.train_and_test` and `pooled.features`; no class has an image to hold out.
    """
    transform = Centre(settings.size, shorter=settings.size)
    split = labelled(model, settings.data, settings.test_data, settings.test_fraction, settings.seed, transform, run)
    metric, classes = metric_of(settings.test_data or settings.data), len(split.classes)
    device = torch.device("cpu") if model.device.type == "mps" else model.device  # MPS has no fp64
    tokens, labels = split.train.tokens.to(device), split.train.labels.to(device)
    powers = np.linspace(settings.lowest, settings.highest, settings.values)
    path: list[dict[str, float]] = []
    chosen, best, short = float(10 ** powers[0]), None, []
    if settings.values > 1:
        fitted, held = _hold_out(split.train, settings)
        regression = Regression(tokens[fitted], labels[fitted], classes)
        fit: Fit | None = None
        with progress("penalties", len(powers), "values of C", run.progress) as advance:
            for c in (10**powers).tolist():
                fit = regression.fit(c, fit, settings.max_iterations)
                found = of_scores(fit.scores(tokens[held]), labels[held], metric).value
                if best is None or found > max(point[metric] for point in path):  # of equals, the strongest penalty
                    chosen, best = c, fit
                short += [] if fit.converged else [c]
                path.append({"C": c, metric: found, "iterations": fit.iterations})
                advance(1)
    final = Regression(tokens, labels, classes).fit(chosen, best, settings.max_iterations)
    short += [] if final.converged or chosen in short else [chosen]
    scores = final.scores(split.test.tokens.to(device))
    if split.answers is not None:
        scores[:, ~split.answers.to(device)] = -torch.inf
    measured = of_scores(scores, split.test.labels, metric)
    details: dict[str, Any] = {"C": chosen, "path": path, "not_converged": short} | split.details(measured)
    title = {"accuracy": "accuracy", "per_class": "mean accuracy per class", "voc_map": "11-point mAP"}[metric]
    numbers = f"{details['n_train']} training and {details['n_test']} test images."
    late = f" {len(short)} fits were stopped by --max-iterations." if short else ""
    return Result(
        data=split.data,
        metrics={metric: measured.value},
        table=Table(("C", title), [[f"{chosen:.3g}", f"{measured.value:.3f}"]], numbers + late),
        details=details,
        left_out=split.train.left_out + split.test.left_out,
        outcomes=None if measured.outcomes is None else measured.outcomes.numpy(),
    )


def _hold_out(train: Part, settings: Logreg) -> tuple[Tensor, Tensor]:
    """Indices of the training images that are fitted and of those on which C is chosen."""
    labels = train.labels.cpu().numpy()
    if labels.ndim == 1:
        fitted, held = sets.split(labels, settings.held_out, settings.seed)
    else:
        order = np.random.default_rng(settings.seed).permutation(len(labels))
        count = min(max(round(len(labels) * settings.held_out), 1), len(labels) - 1)
        held, fitted = np.sort(order[:count]), np.sort(order[count:])
    if not len(held):
        raise OpsinError(
            f"every class of {train.images.where} has a single training image, so none is left to choose C on: add "
            "images, or give --values 1 and the C of your choice as the power of ten --lowest."
        )
    return torch.from_numpy(fitted).to(train.labels.device), torch.from_numpy(held).to(train.labels.device)
