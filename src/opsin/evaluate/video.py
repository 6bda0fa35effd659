"""Video classification by a linear classifier on frames of a frozen backbone: section 7.2 of the paper."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.data.decode import shown
from opsin.errors import SEEDS, OpsinError, within
from opsin.evaluate.classifier import Classifier
from opsin.evaluate.clips import ClipSet, clip_features, own_clips
from opsin.evaluate.datasets.layout import understood
from opsin.evaluate.datasets.video import VIDEO_SETS
from opsin.evaluate.metrics import of_scores
from opsin.evaluate.model import Model
from opsin.evaluate.pooled import Pooled
from opsin.evaluate.probe import Probe, fit_pooled
from opsin.evaluate.sets import named, several_classes, split
from opsin.evaluate.task import Result, Run, Table
from opsin.evaluate.transforms import Centre

TOP = 5
"""Classes among which that of a clip must be, for the second metric."""
CLIPS = 4096
"""Clips that are scored at a time."""


@dataclass(frozen=True)
class Video:
    """Settings of `video`."""

    data: str = ""
    """Clips: a folder per class that holds video files or folders of frame images; or a published set, NAME:PATH, of
    ucf101, k400 and ssv2."""
    test_data: str | None = None
    """Folder of clips that test, with the same classes; without it, a part of one's own clips is held out."""
    test_fraction: float = 0.2
    """Share of every class that is held out."""
    seed: int = 0
    """Of that choice."""
    frames: int = 8
    """Frames per clip, at the centres of as many equal segments."""
    combine: Literal["average", "concatenate"] | None = None
    """What the classifier sees: the average of the frames' features, or all of them in order. By default what the paper
    takes: concatenate for ssv2, average for everything else."""
    probe: Probe = field(default_factory=Probe)
    """The linear classifier. Every frame is seen through a centre crop of its `size`; its `crops` are not used, as
    features of frames are computed once."""

    def __post_init__(self) -> None:
        within(self, "--", seed=SEEDS, frames=(1, 1024))
        if not 0 < self.test_fraction < 1:
            raise OpsinError(f"--test-fraction is {self.test_fraction}: give a share between 0 and 1, such as 0.2.")


def video(model: Model, settings: Video, run: Run) -> Result:
    """Classify video clips by a linear classifier on the features of eight frames.

    The classifier is trained as for images, but on kept features: every frame is seen through its centre crop.

    Returns:
        `accuracy`, and `accuracy_top5` if there are more than five classes. Details: numbers of clips and of those left
        out, accuracy by class, which classifier was chosen.

    Raises:
        OpsinError: there are no clips, or of one class only; train and test do not line up; a file of a published set
            or PyAV is missing; see `clip_features`.
    """
    train, test, combine = _sets(settings)
    readable = []
    for clips in (train, test):
        known = clip_features(model, clips, settings.frames, combine, Centre(settings.probe.size), run)
        readable.append((known.pooled.rows(known.good), torch.from_numpy(clips.labels)[known.good], known.bad))
    (pooled, labels, bad), (test_pooled, test_labels, test_bad) = readable
    several_classes(labels.numpy(), train.where, train.classes)
    classifier, chosen = fit_pooled(
        pooled,
        labels,
        test_pooled,
        test_labels,
        len(train.classes),
        settings.probe,
        run,
        model.device,
        {
            "weights": model.digest,
            "clips": train.fingerprint,
            "frames": settings.frames,
            "combine": combine,
        },
    )
    scores = _scores(classifier, test_pooled)
    measured = of_scores(scores, test_labels, "accuracy")
    assert measured.outcomes is not None
    metrics = {"accuracy": measured.value}
    if len(train.classes) > TOP:
        first = scores.topk(TOP, dim=1).indices
        metrics["accuracy_top5"] = (first == test_labels[:, None]).any(1).double().mean().item()
    left_out = [
        *(
            (shown(clips.paths[i]), why)
            for clips, missed in ((train, bad), (test, test_bad))
            for i, why in missed.items()
        ),
        *train.missing,
        *test.missing,
    ]
    by_class = zip(train.classes, measured.by_class.tolist(), strict=True)
    return Result(
        data=test.where,
        metrics=metrics,
        table=Table(
            ("clips", *(name.replace("_", " ") for name in metrics)),
            [[test.where, *(f"{value:.3f}" for value in metrics.values())]],
            f"{len(labels)} training and {len(test_labels)} test clips, {settings.frames} frames each, features "
            f"{'averaged' if combine == 'average' else 'concatenated'}"
            + (
                f"; {len(left_out)} clips are left out, such as {left_out[0][0]}: {left_out[0][1]}."
                if left_out
                else "."
            ),
        ),
        details={
            "n_train": len(labels),
            "n_test": len(test_labels),
            "n_left_out": len(left_out),
            "combine": combine,
            "classes": list(train.classes),
            "per_class": {name: value for name, value in by_class if value == value},  # NaN: a class without a test
            "classifier": chosen,
        },
        left_out=left_out,
        outcomes=measured.outcomes.numpy(),
    )


def _sets(settings: Video) -> tuple[ClipSet, ClipSet, str]:
    """Clips that train and clips that test, with labels in the numbering of the first, and how to combine frames."""
    name, path = named(settings.data, VIDEO_SETS)
    if name is not None:
        if settings.test_data is not None:
            raise OpsinError(f"{name} brings its own test part: leave out --test-data.")
        with understood(Path(path), f"the site of {VIDEO_SETS[name].title}"):
            train, test = (VIDEO_SETS[name].read(Path(path), part) for part in ("train", "test"))
    else:
        train = own_clips(Path(path))
        if len(train.classes) < 2:
            raise OpsinError(
                f"{train.where} holds only the class '{train.classes[0]}', and accuracy needs two or more: add "
                "a folder per class."
            )
        if settings.test_data is None:
            if np.bincount(train.labels).max() < 2:
                raise OpsinError(
                    f"every class of {train.where} has a single clip, so none is left to test: add clips, or give "
                    "--test-data."
                )
            parts = split(train.labels, settings.test_fraction, settings.seed)
            train, test = (train.part(indices) for indices in parts)
        else:
            test = own_clips(Path(settings.test_data))
            if test.fingerprint == train.fingerprint:
                raise OpsinError(
                    f"{test.where} is given as train and as test set, so every clip would find itself: leave out "
                    "--test-data to have it split."
                )
    combine = settings.combine or (VIDEO_SETS[name].combine if name else "average")
    return train, replace(test, labels=_renumbered(test, train), classes=train.classes), combine


def _renumbered(test: ClipSet, train: ClipSet) -> NDArray[np.int64]:
    number = {name: i for i, name in enumerate(train.classes)}
    if strange := [name for name in test.classes if name not in number]:
        raise OpsinError(
            f"the test set {test.where} has classes that the train set {train.where} has not, such as '{strange[0]}': "
            "name the class folders alike in both."
        )
    return np.array([number[name] for name in test.classes], dtype=np.int64)[test.labels]


def _scores(classifier: Classifier, pooled: Pooled) -> Tensor:
    device = classifier.weight.device
    return torch.cat(
        [
            classifier.logits(Pooled(cls.to(device), mean.to(device))).cpu()
            for cls, mean in zip(pooled.cls.split(CLIPS), pooled.mean.split(CLIPS), strict=True)
        ]
    )
