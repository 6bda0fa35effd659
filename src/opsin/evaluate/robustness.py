"""Robustness of a linear head: common corruptions of the test images, and test sets of other origin."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.functional import center_crop, resize

from opsin.backbone.features import evaluation_transform
from opsin.data.decode import DecodeError
from opsin.data.pipeline import prepared
from opsin.data.progress import progress
from opsin.errors import SEEDS, OpsinError, unknown, within
from opsin.evaluate.classifier import Classifier, load
from opsin.evaluate.corruptions import EXTRA, KINDS, SEVERITIES, Stored, applied, drawn, missing
from opsin.evaluate.corruptions.published import ALEXNET, corruption_errors, mean
from opsin.evaluate.datasets.classification import SETS, read_set
from opsin.evaluate.dense import normalised
from opsin.evaluate.linear import further_set, left_out_of, measure
from opsin.evaluate.metrics import counted
from opsin.evaluate.model import Model
from opsin.evaluate.pooled import features, pool
from opsin.evaluate.probe import Probe, fit
from opsin.evaluate.sets import ImageSet, in_classes_of, named, train_and_test
from opsin.evaluate.store import place, recalled, save
from opsin.evaluate.task import Result, Run, Table
from opsin.evaluate.transforms import Centre

PART = 512
"""Images in a file of kept results: what an interruption can cost."""
GROUPS = {"standard": KINDS, "extra": EXTRA, "none": ()}
"""Names for several kinds of corruption."""
CLEAN = ("clean", 0)
"""The condition of images as they are, cropped as the corrupted ones."""
DISTRIBUTED = "imagenet-c"
"""The published set, whose images are corrupted already."""

Condition = tuple[str, int]
"""Kind of corruption and severity."""
Ways = Iterator[tuple[Condition, Tensor]]
"""Conditions with a batch under each, normalised."""
Errors = dict[str, dict[int, float]]
"""Kind → severity → error, from 0 to 1."""
Wrong = dict[Condition, NDArray[np.float64]]
"""By condition, for every image `[N]`: 1 for a wrong answer, 0 for a right one, NaN where it does not count."""
RIGHT, WRONG, NOT = "1", "0", "-"
"""Letters by which answers are kept; the last is for images that do not count."""


@dataclass(frozen=True)
class Robustness:
    """What a linear head is trained on, and what it has to bear."""

    data: str = ""
    """Training images: one folder per class, shards with labels, or NAME:PATH of a published set. With `head` they only
    tell the classes."""
    test_data: str | None = None
    """Test images, likewise; without it a published set's own test part, or a part of `data` that is held out."""
    test_fraction: float = 0.2
    """Share of every class that is held out for the test without `test_data`."""
    seed: int = 0
    """Of that choice, and of what is random in corruptions."""
    head: Path | None = None
    """Measure this head instead of training one: a file of `opsin evaluate linear`, or one of the official release."""
    tests: tuple[str, ...] = ()
    """Further test sets for the same head, such as imagenet-a:PATH, imagenet-real:PATH and folders of one's own. With
    imagenet-c:PATH corrupted images are read there, not made."""
    corruptions: tuple[str, ...] = ("standard",)
    """Kinds of corruption: names, "standard" (the 15), "extra" (the 4 others), or "none"."""
    severities: tuple[int, ...] = SEVERITIES
    """Strengths, from 1 to 5."""
    stored_as: Stored = "jpeg85"
    """Corrupted images go through JPEG of quality 85 as in the published set, or stay as they are ("png")."""
    probe: Probe = field(default_factory=Probe)
    """How the head is trained. Its size is that of the crop that is corrupted, too; the published strengths are for
    224."""

    def __post_init__(self) -> None:
        within(self, "--", seed=SEEDS, severities=(1, 5))
        if not 0 < self.test_fraction < 1:
            raise OpsinError(f"--test-fraction is {self.test_fraction}: give a share between 0 and 1, such as 0.2.")
        if not self.severities or len(set(self.severities)) < len(self.severities):
            raise OpsinError(f"--severities is {self.severities}: give different numbers from 1 to 5.")
        for name in self.corruptions:
            if name not in GROUPS and name not in KINDS + EXTRA:
                raise unknown("corruption", name, [*GROUPS, *KINDS, *EXTRA])

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of corruption that are asked for, each once."""
        return tuple(dict.fromkeys(kind for name in self.corruptions for kind in GROUPS.get(name, (name,))))


def robustness(model: Model, settings: Robustness, run: Run) -> Result:
    """Measure a linear head on corrupted test images (ImageNet-C, or your set -C) and on test sets of other origin.

    Returns:
        With corruptions `mce` on ImageNet (errors as a share of AlexNet's, mean over kinds), or `corruption_error` (the
        mean error) and `degradation` (that minus the error of the same crops, clean) on any other set; `accuracy` on
        clean test images; `accuracy_NAME` for every set of `tests`. Details: `errors` by kind and severity, `missing`
        kinds.

    Raises:
        OpsinError: see `sets.train_and_test`, `probe.fit` and `classifier.load`; bands other than RGB; asked-for
            corruptions cannot be made.
    """
    if model.arch.channels != 3:
        raise OpsinError(f"corruptions are defined for RGB, and the backbone takes {model.arch.channels} bands.")
    train, test = train_and_test(settings.data, settings.test_data, settings.test_fraction, settings.seed)
    spec = settings.test_data or settings.data
    distributed = [path for name, path in (named(one, SETS) for one in settings.tests) if name == DISTRIBUTED]
    others = [one for one in settings.tests if named(one, SETS)[0] != DISTRIBUTED]
    further = [(named(one, SETS)[0] or one, *further_set(one, train, 3)) for one in others]
    lacking = {} if distributed else {kind: why for kind, why in missing().items() if kind in settings.kinds}
    kinds = [kind for kind in settings.kinds if kind not in lacking]
    if settings.kinds and not kinds:
        raise OpsinError(f"no corruption is left to measure: {'; '.join(f'{k}: {why}' for k, why in lacking.items())}.")

    left_out: list[tuple[str, str]] = []
    if settings.head is not None:
        classifier = load(settings.head, model.arch.width, len(train.classes))
        known = features(model, test, Centre(settings.probe.size), run)
    else:
        fitted = fit(model, train, test, settings.probe, run)
        classifier, known = fitted.classifier, fitted.test
        left_out += fitted.left_out
    measured = measure(classifier, test, known, "accuracy")
    outcomes, clean = measured.outcomes, {"accuracy": measured.value}
    left_out += left_out_of(test, known)

    conditions = [(kind, severity) for kind in kinds for severity in settings.severities]
    classifier = replace(classifier, weight=classifier.weight.to(model.device), bias=classifier.bias.to(model.device))
    if distributed:
        wrong = _read(model, classifier, Path(distributed[0]), train, conditions, settings, run)
    elif conditions:
        wrong = _made(model, classifier, test, [CLEAN, *conditions], settings, run)
    else:
        wrong = {}
    error = {one: float(np.nanmean(images)) for one, images in wrong.items()}
    errors = {kind: {severity: error[kind, severity] for severity in settings.severities} for kind in kinds}
    imagenet = bool(distributed) or (named(spec, SETS)[0] == "imagenet" and len(train.classes) == 1000)
    terms = corruption_errors(errors) if imagenet else {}
    metrics = clean
    if errors:
        average = mean([mean(list(by_severity.values())) for by_severity in errors.values()])
        if imagenet:
            metrics = {"mce": mean(list(terms.values()))} | clean
        else:
            metrics = {"corruption_error": average} | clean | {"degradation": average - error[CLEAN]}
        outcomes = _by_image(wrong, kinds, settings.severities, relative=imagenet)
    rows = []
    for name, images, mask, metric in further:
        found = features(model, images, Centre(settings.probe.size), run)
        metrics[f"{metric}_{name}"] = measure(classifier_on_cpu(classifier), images, found, metric, mask).value
        rows.append([name, *[""] * len(settings.severities), f"{1 - metrics[f'{metric}_{name}']:.3f}", ""])
        left_out += left_out_of(images, found)
    return Result(
        data=named(spec, SETS)[0] or test.where,
        metrics=metrics,
        table=_table(errors, terms, 1 - measured.value, error.get(CLEAN), lacking, rows, settings),
        details={"errors": errors, "terms": terms, "missing": lacking, "n_test": int(known.good.sum())},
        left_out=left_out,
        outcomes=None if outcomes is None else outcomes.numpy(),
    )


def _by_image(wrong: Wrong, kinds: Sequence[str], severities: Sequence[int], *, relative: bool) -> Tensor | None:
    """What each image that counts has of the corruption error, or of mCE if `relative`, `[N]`.

    The metric is their mean. None if the conditions are of different images, as published files that are not whole.
    """
    if len({len(images) for images in wrong.values()}) > 1:
        return None
    by_kind = [np.mean([wrong[kind, severity] for severity in severities], axis=0) for kind in kinds]
    if relative:
        theirs = [mean([ALEXNET[kind][severity - 1] / 100 for severity in severities]) for kind in kinds]
        by_kind = [images / error for images, error in zip(by_kind, theirs, strict=True)]
    found = np.mean(by_kind, axis=0)
    return torch.from_numpy(found[~np.isnan(found)])


def classifier_on_cpu(classifier: Classifier) -> Classifier:
    """The same on the CPU, where kept features lie."""
    return replace(classifier, weight=classifier.weight.cpu(), bias=classifier.bias.cpu())


def crop(pixels: Tensor, size: int) -> Tensor:
    """What ImageNet-C corrupts: the centre, uint8 `[3, size, size]`, after a bilinear resize as 256 is to 224."""
    height, width = pixels.shape[-2:]
    shorter = round(size * 256 / 224)
    sides = [shorter * side // min(height, width) for side in (height, width)]
    cropped: Tensor = center_crop(resize(pixels, sides, antialias=True), [size, size])
    return cropped


def _made(
    model: Model, head: Classifier, test: ImageSet, conditions: Sequence[Condition], settings: Robustness, run: Run
) -> Wrong:
    """What goes wrong under conditions: every batch is decoded once and corrupted in all ways before the next."""

    def seen(images: Tensor, numbers: Sequence[int], wanted: Sequence[Condition]) -> Ways:
        for kind in dict.fromkeys(kind for kind, _ in wanted):
            draws = () if kind == CLEAN[0] else drawn(kind, settings.seed, numbers, *images.shape[-2:])
            draws = tuple(one.to(images.device) for one in draws)
            for severity in (severity for name, severity in wanted if name == kind):
                clean = (kind, severity) == CLEAN
                changed = images if clean else applied(images, kind, severity, draws, settings.stored_as)
                yield (kind, severity), normalised(changed)

    facts, size = {"stored_as": settings.stored_as, "seed": settings.seed}, settings.probe.size
    return _kept(model, head, test, conditions, lambda image: crop(image, size), seen, settings, run, facts)


def _read(
    model: Model,
    head: Classifier,
    path: Path,
    train: ImageSet,
    conditions: Sequence[Condition],
    settings: Robustness,
    run: Run,
) -> Wrong:
    """What goes wrong on the published corrupted images, as they are: 224 pixels, not resized."""
    wrong: Wrong = {}
    for condition in conditions:
        images = read_set(DISTRIBUTED, path, _key(condition))
        images = replace(images, labels=in_classes_of(images, train), classes=train.classes)

        def seen(images: Tensor, numbers: Sequence[int], wanted: Sequence[Condition]) -> Ways:
            assert len(images) == len(numbers)
            yield wanted[0], images

        def prepare(image: Tensor) -> Tensor:
            return evaluation_transform(image, settings.probe.size, settings.probe.size)

        wrong |= _kept(model, head, images, [condition], prepare, seen, settings, run, {"stored_as": "distributed"})
    return wrong


def _kept(
    model: Model,
    head: Classifier,
    images: ImageSet,
    conditions: Sequence[Condition],
    prepare: Callable[[Tensor], Tensor],
    seen: Callable[[Tensor, Sequence[int], Sequence[Condition]], Ways],
    settings: Robustness,
    run: Run,
    facts: dict[str, Any],
) -> Wrong:
    """What goes wrong, from what is kept of each part of the images, computed where something is missing.

    Args:
        model: the backbone.
        head: on its device.
        images: with labels in the head's numbering.
        conditions: all that are wanted.
        prepare: image → what batches are made of.
        seen: batch, numbers of its images, conditions → each condition with the batch as the backbone takes it.
        settings: of the task.
        run: how to compute.
        facts: what else decides the results.
    """
    digest = hashlib.sha256(f"{head.blocks} {head.mean}".encode())
    for tensor in (head.weight, head.bias):
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    facts |= {"weights": model.digest, "head": digest.hexdigest(), "images": images.fingerprint, "part": PART}
    # Labels are not among the images' fingerprint: the split of one's own images decides both, a reader may not.
    assert images.labels is not None
    facts |= {"labels": hashlib.sha256(images.labels.tobytes()).hexdigest(), "size": settings.probe.size}
    folder = place(run.cache, "judged", **facts)
    parts = [range(start, min(start + PART, len(images))) for start in range(0, len(images), PART)]
    files = [folder / f"{part.start}.json" for part in parts]
    known: list[dict[str, str]] = [recalled(file) or {} for file in files]
    wanted = [[one for one in conditions if _key(one) not in have] for have in known]
    total = sum(len(part) * len(ones) for part, ones in zip(parts, wanted, strict=True))
    with progress("corruptions", total, "images", run.progress and total > 0) as advance:
        for part, ones, have, file in zip(parts, wanted, known, files, strict=True):
            if ones:
                have |= _judged(model, head, images, part, ones, prepare, seen, run, advance)
                save(file, have)
    found = {one: "".join(have[_key(one)] for have in known) for one in conditions}
    if any(set(judged) == {NOT} for judged in found.values()):
        raise OpsinError(f"no labelled image of {images.where} can be decoded: replace the damaged files.")
    values = {WRONG: 1.0, RIGHT: 0.0, NOT: np.nan}
    return {one: np.array([values[letter] for letter in judged]) for one, judged in found.items()}


def _judged(
    model: Model,
    head: Classifier,
    images: ImageSet,
    part: range,
    wanted: Sequence[Condition],
    prepare: Callable[[Tensor], Tensor],
    seen: Callable[[Tensor, Sequence[int], Sequence[Condition]], Ways],
    run: Run,
    advance: Callable[[int], None],
) -> dict[str, str]:
    """A letter for every image by condition; those that do not decode, or have no label, count nowhere."""
    assert images.labels is not None
    judged = {one: dict.fromkeys(part, NOT) for one in wanted}
    batches = [part[start : start + run.batch_size] for start in range(0, len(part), run.batch_size)]

    def read(index: int) -> Tensor | None:
        try:
            return prepare(images.read(index))
        except DecodeError:
            return None

    with closing(prepared(read, batches, workers=run.workers, ahead=1)) as ready:
        for batch, items in zip(batches, ready, strict=True):
            numbers = [index for index, item in zip(batch, items, strict=True) if item is not None]
            crops = [item for item in items if item is not None]
            if crops:
                labels = torch.from_numpy(images.labels[numbers])
                counts = counted(labels).tolist()
                for one, prepared_batch in seen(torch.stack(crops).to(model.device), numbers, wanted):
                    right = _right(model, head, prepared_batch, labels).tolist()
                    for number, hit, counts_too in zip(numbers, right, counts, strict=True):
                        judged[one][number] = (RIGHT if hit else WRONG) if counts_too else NOT
            advance(len(batch) * len(wanted))
    return {_key(one): "".join(letters.values()) for one, letters in judged.items()}


def _key(condition: Condition) -> str:
    return f"{condition[0]}/{condition[1]}"


def _right(model: Model, head: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Booleans `[B]`: the head gives a class of the image."""
    answers = head.logits(pool(model, images)).argmax(1).cpu()
    if labels.ndim == 2:
        return labels.gather(1, answers[:, None])[:, 0] == 1
    return (labels == answers) & counted(labels)


def _table(
    errors: Errors,
    terms: dict[str, float],
    clean: float,
    clean_crop: float | None,
    lacking: dict[str, str],
    rows: Sequence[Sequence[str]],
    settings: Robustness,
) -> Table:
    headers = ["error", *(f"severity {severity}" for severity in settings.severities), "mean", "of AlexNet's"]
    blank = [""] * len(settings.severities)
    body = [["clean", *blank, f"{clean:.3f}", ""]]
    notes = []
    if clean_crop is not None:
        body.append(["clean, the corrupted crop", *blank, f"{clean_crop:.3f}", ""])
    for kind, by_severity in errors.items():
        values = list(by_severity.values())
        term = f"{terms[kind]:.3f}" if kind in terms else ""
        body.append([kind, *(f"{value:.3f}" for value in values), f"{mean(values):.3f}", term])
    body += [[kind, *["missing"] * len(settings.severities), "missing", ""] for kind in lacking]
    if terms:
        body.append(["mCE", *blank, "", f"{mean(list(terms.values())):.3f}"])
        if set(terms) != set(KINDS) or set(settings.severities) != set(SEVERITIES):
            notes.append("The published mCE is over 15 kinds and 5 severities, this one over those above.")
    elif errors:
        notes.append(
            "AlexNet's errors are of ImageNet, so no mCE is given: mean errors, to compare with the clean crop."
        )
    notes += [f"{kind} is left out: {why}." for kind, why in lacking.items()]
    shown = len(headers) if terms else -1  # without AlexNet's column where nothing is compared with it
    return Table(headers[:shown], [row[:shown] for row in [*body, *rows]], " ".join(notes))
