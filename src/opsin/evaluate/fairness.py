"""Accuracy by group of people or places, and labels that groups are given: section 8 of the paper.

The protocol is that of Goyal et al., "Fairness indicators for systematic assessments of visual feature extractors"
(FAccT 2022), with a linear classifier on the frozen backbone, as in the paper, where they fine-tune. Intervals are of
our own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.data.decode import shown
from opsin.errors import FINITE, SEEDS, OpsinError, unknown, within
from opsin.evaluate.attributes import ByGroup, Gap, Grouped, Share, by_group, grouped
from opsin.evaluate.classifier import Classifier, load
from opsin.evaluate.datasets.classification import SETS, read_set
from opsin.evaluate.datasets.fairness import GROUP_SETS
from opsin.evaluate.datasets.layout import understood
from opsin.evaluate.metrics import counted
from opsin.evaluate.model import Model
from opsin.evaluate.pooled import Pooled, features
from opsin.evaluate.probe import Probe, fit
from opsin.evaluate.sets import ImageSet, in_classes_of, named, own, split
from opsin.evaluate.task import Result, Run, Table
from opsin.evaluate.transforms import Centre
from opsin.settings import text_of, yaml_of

CHOOSING = 0.1
"""Share of the training images on which the classifier is chosen: never those whose groups are compared."""
ASSOCIATED = 5
"""Labels of an image that may count for a label group."""
IMAGES = 8192
"""Images that are scored at a time."""


@dataclass(frozen=True)
class Fairness:
    """Settings of `fairness`."""

    data: str = ""
    """The folder that the paths in `table` start from; or dollarstreet:PATH."""
    table: Path | None = None
    """CSV or Parquet with a row per image: a column `path`, one of labels, and attributes such as region or age."""
    label_column: str = "label"
    """Column of the class of every image; not read with `groups`."""
    attribute_columns: tuple[str, ...] = ()
    """Columns whose values are the groups; none takes all others of 2 to 20 different values."""
    cluster_column: str | None = None
    """Column of what images have in common, such as the household: they train or test together, and intervals are drawn
    by it."""
    equal_clusters: bool | None = None
    """A group's share is the mean over its clusters, so that a household of many images counts as one of few. By
    default for Dollar Street, whose published shares are made so, and for nothing else."""
    train_data: str | None = None
    """Labelled images on which the classifier is trained, a folder per class or NAME:PATH such as imagenet:PATH;
    without it, the rows of the table are split."""
    test_fraction: float = 0.5
    """Share of the rows that is tested, if they are split."""
    seed: int = 0
    """Of the split and of the intervals."""
    head: Path | None = None
    """A file of `opsin evaluate linear --save-head`, or a …_linear_head.pth of the official release, to use instead of
    training; its classes are those of `train_data` or the table."""
    groups: Path | None = None
    """YAML or JSON that names groups of labels, {group: [class, …]}: then it is counted how often images of each group
    of people get a label of each group, instead of accuracy. The paper's grouping of 619 classes of ImageNet-22k is not
    included: VISSL's repository lists it (label_associations_indicator1.md and the script of Casual Conversations)."""
    threshold: float = 0.1
    """Least probability of a label that counts for a label group."""
    top: int | None = None
    """Labels of an image that count: by default 1 for accuracy, 5 for Dollar Street and for label groups."""
    repeats: int = 10_000
    """Times that the images are drawn again for the intervals."""
    smallest: int = 10
    """Images that a group needs to count in gaps; smaller ones are shown."""
    probe: Probe = field(default_factory=Probe)
    """The linear classifier; images are tested at its `size`."""

    def __post_init__(self) -> None:
        within(self, "--", seed=SEEDS, threshold=(0, 1), repeats=(1, FINITE), smallest=(1, FINITE))
        if self.top is not None:
            within(self, "--", top=(1, FINITE))
        if not 0 < self.test_fraction < 1:
            raise OpsinError(f"--test-fraction is {self.test_fraction}: give a share between 0 and 1, such as 0.5.")


def fairness(model: Model, settings: Fairness, run: Run) -> Result:
    """Compare accuracy, or the labels that images are given, between groups of a table's attributes.

    Returns:
        Accuracy: `accuracy`, `gap_between_groups` (the largest of any attribute; none if no attribute has two groups
        that are large enough), and `accuracy_ATTRIBUTE_GROUP` of every group. With label groups: `gap_between_groups`,
        and `share_LABELS` of every label group over all images. Details: by attribute, its groups with images, share
        and 95 % interval, and the gap with interval and relative size (best minus worst, divided by best).

    Raises:
        OpsinError: table and files do not line up (see `attributes.grouped`); there is nothing to train on, or one
            class only; the head does not fit; label groups name unknown classes; see `pooled.features`.
    """
    labels = None if settings.groups is None else read_label_groups(settings.groups)
    table, title, top = _table(settings)
    train, test = _parts(table, settings)
    names = _names(train, test, settings)
    members = None if labels is None else {group: _places(group, of, names) for group, of in labels.items()}
    wanted = None
    if members is None:
        wanted = torch.from_numpy(in_classes_of(test.images, test.images if train is None else train))
    known = features(model, test.images, Centre(settings.probe.size), run)
    classifier, chosen = _classifier(model, train, len(names), settings, run)
    # An image without a class tells nothing of accuracy.
    rows = (known.good if wanted is None else known.good & counted(wanted)).numpy()
    tested = test.part(np.flatnonzero(rows))
    scores = _scores(classifier, known.pooled.rows(torch.from_numpy(rows)))

    def compare(hits: Tensor) -> dict[str, ByGroup]:
        return {
            name: by_group(
                hits.numpy(),
                groups,
                tested.clusters,
                repeats=settings.repeats,
                seed=settings.seed,
                smallest=settings.smallest,
                equal_clusters=_equal_clusters(settings),
            )
            for name, groups in tested.attributes.items()
        }

    top = min(top if settings.top is None else settings.top, len(names))
    if wanted is not None:
        hits = {"accuracy": top_hits(scores, wanted[torch.from_numpy(rows)], top)}
    else:
        assert members is not None
        hits = associated(scores, members, top, settings.threshold)
    found = {name: compare(hit) for name, hit in hits.items()}
    left_out = [(test.images.name(i), why) for i, why in sorted(known.bad.items())]
    return Result(
        data=title,
        metrics=_metrics(hits, found),
        table=_report(hits, found, _notes(table, tested, left_out, settings)),
        details={
            "n_test": len(tested.images),
            "n_left_out": len(left_out),
            "n_without_row": len(table.without),
            "top": top,
            "classes": list(names),
            "classifier": chosen,
            "attributes": {name: _plain(compared) for name, compared in found.items()},
        },
        left_out=left_out,
        outcomes=hits["accuracy"].double().numpy() if members is None else None,
    )


def top_hits(scores: Tensor, labels: Tensor, top: int) -> Tensor:
    """Booleans `[N]`: whether a class of an image is among its `top` best of scores `[N, K]`.

    Labels are `[N]`, or `[N, K]` as in `ImageSet.labels`.
    """
    first = scores.topk(top, dim=1).indices
    if labels.ndim == 1:
        return (first == labels[:, None]).any(1)
    return (labels.gather(1, first) == 1).any(1)


def associated(scores: Tensor, members: Mapping[str, Sequence[int]], top: int, threshold: float) -> dict[str, Tensor]:
    """Booleans `[N]` by label group: whether an image gets one of the group's labels or more.

    An image gets the `top` most probable classes of which the probability (softmax of scores `[N, K]`) is `threshold`
    or more, as in Goyal et al. (2022).
    """
    best = scores.float().softmax(1).topk(top, dim=1)
    given = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, best.indices, best.values >= threshold)
    return {name: given[:, list(classes)].any(1) for name, classes in members.items()}


def read_label_groups(path: Path) -> dict[str, list[str]]:
    """Names of classes by label group from a YAML or JSON file.

    Raises:
        OpsinError: there is no such file, or it is not a mapping of lists of names.
    """
    example = "Write, for example, human: [face]."
    read = yaml_of(text_of(path, example, "label groups"), f"the file of label groups {shown(path)}")
    if not isinstance(read, dict) or not read or not all(isinstance(of, list) and of for of in read.values()):
        raise OpsinError(
            f"{shown(path)} is no mapping of groups to lists of classes: write, for example, human: [face]."
        )
    return {str(group): [str(name) for name in of] for group, of in read.items()}


def _equal_clusters(settings: Fairness) -> bool:
    if settings.equal_clusters is None:
        return named(settings.data, GROUP_SETS)[0] is not None
    return settings.equal_clusters


def _table(settings: Fairness) -> tuple[Grouped, str, int]:
    """The images, their title, and how many labels of an image count."""
    name, path = named(settings.data, GROUP_SETS)
    if name is not None:
        if settings.table or settings.attribute_columns or settings.cluster_column:
            raise OpsinError(f"{name} brings its own table: leave out --table and the names of its columns.")
        if settings.train_data is None:
            raise OpsinError(f"{name} only tests: give --train-data imagenet:PATH, whose classes its labels are.")
        with understood(Path(path), f"the site of {GROUP_SETS[name].title}"):
            return GROUP_SETS[name].read(Path(path)), GROUP_SETS[name].title, GROUP_SETS[name].top
    if settings.table is None:
        raise OpsinError("images of one's own need a table with their attributes: give --table, a CSV or Parquet file.")
    label_column = None if settings.groups else settings.label_column
    columns, cluster = settings.attribute_columns, settings.cluster_column
    if settings.equal_clusters and cluster is None:
        raise OpsinError("--equal-clusters needs clusters: give --cluster-column, such as that of the household.")
    table = grouped(Path(path), settings.table, label_column, columns, cluster)
    return table, table.images.where, ASSOCIATED if settings.groups else 1


def _parts(table: Grouped, settings: Fairness) -> tuple[ImageSet | None, Grouped]:
    """The images that train, None if none do, and those that test."""
    if settings.train_data is not None:
        name, path = named(settings.train_data, SETS)
        train = own(path) if name is None else read_set(name, Path(path), SETS[name].train)
    elif settings.groups is not None:
        raise OpsinError("label groups need the names of classes: give --train-data, labelled images that have them.")
    elif settings.head is not None:
        return None, table
    else:
        trains, tests = _halves(table, settings)
        return table.images.part(trains), table.part(tests)
    return train, table


def _halves(table: Grouped, settings: Fairness) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of rows that train and rows that test; a cluster is never in both."""
    assert table.images.labels is not None
    if table.clusters is None:
        return split(table.images.labels, settings.test_fraction, settings.seed)
    sizes = np.bincount(table.clusters)
    if len(sizes) < 2:
        raise OpsinError(
            f"all rows of the table have the same '{settings.cluster_column}', so they cannot be split into a part "
            "that trains and one that tests: give --train-data."
        )
    order = np.random.default_rng(settings.seed).permutation(len(sizes))
    number = int((np.cumsum(sizes[order]) <= settings.test_fraction * len(table.clusters)).sum())
    tested = np.isin(table.clusters, order[: min(max(number, 1), len(sizes) - 1)])
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def _names(train: ImageSet | None, test: Grouped, settings: Fairness) -> Sequence[str]:
    """Names of the classes that the classifier tells apart."""
    images = test.images if train is None else train
    names = images.classes
    if len(names) < 2:
        raise OpsinError(
            f"{images.where} holds only the class '{names[0]}', and accuracy needs two or more: look at the column "
            f"'{settings.label_column}', or give other training images."
        )
    labels = test.images.labels
    if labels is not None and labels.ndim == 2 and labels.shape[1] != len(names):
        raise OpsinError(
            f"the labels of {test.images.where} number {labels.shape[1]} classes, and {images.where} has {len(names)}: "
            "give --train-data the set whose classes they number, such as imagenet:PATH."
        )
    return names


def _places(group: str, classes: Sequence[str], names: Sequence[str]) -> list[int]:
    number = {name: i for i, name in enumerate(names)}
    for name in classes:
        if name not in number:
            raise OpsinError(f"label group '{group}': {unknown('class', name, number)}")
    return [number[name] for name in classes]


def _classifier(
    model: Model, train: ImageSet | None, classes: int, settings: Fairness, run: Run
) -> tuple[Classifier, dict[str, Any]]:
    """A saved classifier, or one that is trained on most training images and chosen on the others."""
    if settings.head is not None:
        return load(settings.head, model.arch.width, classes), {"head": settings.head.name}
    assert train is not None
    assert train.labels is not None
    if train.labels.ndim == 2:
        raise OpsinError(f"images of {train.where} have several classes each: train on images with one class each.")
    if np.bincount(train.labels).max() < 2:
        raise OpsinError(f"every class of {train.where} has a single training image: add images.")
    trains, chooses = split(train.labels, CHOOSING, settings.seed)
    fitted = fit(model, train.part(trains), train.part(chooses), settings.probe, run)
    return fitted.classifier, fitted.facts


def _scores(classifier: Classifier, pooled: Pooled) -> Tensor:
    device = classifier.weight.device
    parts = zip(pooled.cls.split(IMAGES), pooled.mean.split(IMAGES), strict=True)
    return torch.cat([classifier.logits(Pooled(cls.to(device), mean.to(device))).cpu() for cls, mean in parts])


def _metrics(hits: Mapping[str, Tensor], found: Mapping[str, Mapping[str, ByGroup]]) -> dict[str, float]:
    gaps = [one.gap.value for compared in found.values() for one in compared.values() if one.gap]
    largest = {"gap_between_groups": max(gaps)} if gaps else {}
    if "accuracy" not in hits:
        return largest | {f"share_{name}": hit.double().mean().item() for name, hit in hits.items()}
    groups = {
        f"accuracy_{attribute}_{group}": share.value
        for attribute, compared in found["accuracy"].items()
        for group, share in compared.groups.items()
    }
    return {"accuracy": hits["accuracy"].double().mean().item()} | largest | groups


def _report(hits: Mapping[str, Tensor], found: Mapping[str, Mapping[str, ByGroup]], note: str) -> Table:
    """A row for all, one per group and per gap, a column per measured share."""
    rows = [
        ["all", str(len(next(iter(hits.values())))), *(f"{hit.double().mean().item():.3f}" for hit in hits.values())]
    ]
    first = next(iter(found.values()))
    for attribute, compared in first.items():
        for group, share in compared.groups.items():
            shares = [_range(one[attribute].groups[group]) for one in found.values()]
            rows.append([f"{attribute}: {group}", str(share.images), *shares])
        if compared.gap:
            gaps = [one[attribute].gap for one in found.values()]
            rows.append([f"{attribute}: gap", "", *(_gap(gap) for gap in gaps if gap)])
    return Table(("group", "images", *found), rows, note)


def _range(share: Share) -> str:
    return f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})"


def _gap(gap: Gap) -> str:
    return f"{gap.value:.3f} ({gap.low:.3f} to {gap.high:.3f}), {gap.relative:.1%}: {gap.best} over {gap.worst}"


def _notes(table: Grouped, tested: Grouped, left_out: Sequence[tuple[str, str]], settings: Fairness) -> str:
    notes = [f"{len(tested.images)} images tested; intervals of 95 % from {settings.repeats} repeats."]
    if tested.clusters is not None:
        equal = ", each of which counts the same in its groups; all is the mean of images" * _equal_clusters(settings)
        notes.append(f"They are drawn by {len(np.unique(tested.clusters))} clusters{equal}.")
    for name, values in table.attributes.items():
        if empty := sorted(set(values.tolist()) - set(tested.attributes[name].tolist())):
            notes.append(f"No image tests {name}: {', '.join(empty)}.")
    if left_out:
        notes.append(f"{len(left_out)} images cannot be read, such as {left_out[0][0]}.")
    if table.without:
        notes.append(f"{len(table.without)} images have no row in the table, such as {shown(table.without[0])}.")
    return " ".join(notes)


def _plain(compared: Mapping[str, ByGroup]) -> dict[str, Any]:
    """For JSON, which knows no NaN: the interval of a group that hardly any repeat holds."""
    return {
        name: {
            "groups": {group: _known(share._asdict()) for group, share in one.groups.items()},
            "gap": None if one.gap is None else _known(one.gap._asdict()),
        }
        for name, one in compared.items()
    }


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in values.items()}
