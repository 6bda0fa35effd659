"""Labelled images: folders and shards of one's own, and published sets as they are distributed.

`--data` is what `opsin pretrain` takes, with labels (a folder per class, shards with labels), or NAME:PATH for a
published set whose files lie at PATH, such as `imagenet:/data/imagenet`.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opsin.data.decode import DecodeError, decode, shown
from opsin.data.sources import ImageFiles, Source, scan
from opsin.errors import OpsinError, unknown

TRIES = 100
"""Images that are tried in place of one that does not decode."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in a fixed order, with labels if there are any. Reading is safe from many threads."""

    where: str
    """Where they lie, for messages and tables."""
    count: int
    """Number of images."""
    open: Callable[[int], Path | bytes | Tensor]
    """File, content or pixels (uint8 `[3, H, W]`) of an image; may raise `DecodeError`."""
    name: Callable[[int], str]
    """The name of an image, for messages."""
    fingerprint: str
    """Another value means other images: part of the key of kept features."""
    labels: NDArray[np.int64] | None = None
    """Class of every image, as an index into `classes`, `[N]`. Or `[N, K]` where an image may have several: 1 for its
    classes, 0 for others, -1 for those that do not count for this image. An image without any class counts nowhere."""
    classes: Sequence[str] = ()
    """Names of the classes. Empty with labels: they number the classes of the set that trains, in its order (as
    ImageNet's validation labels number its sorted WordNet identifiers)."""
    channels: int = 3
    """Bands that images are decoded to."""

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Tensor:
        """The pixels of an image, uint8 `[C, H, W]` as a rule.

        Raises:
            DecodeError: it cannot be decoded.
        """
        stored = self.open(index)
        return stored if isinstance(stored, Tensor) else decode(stored, channels=self.channels)

    def readable(self, index: int) -> tuple[int, Tensor]:
        """The image at `index`, or the first after it that decodes, and its index: for training, where any will do."""
        for step in range(min(TRIES, self.count)):
            at = (index + step) % self.count
            try:
                return at, self.read(at)
            except DecodeError as error:
                reason = error
        raise OpsinError(f"none of {min(TRIES, self.count)} successive images of {self.where} can be decoded: {reason}")

    def part(self, indices: NDArray[np.int64]) -> "ImageSet":
        """Some of the images, in the order of `indices`, with all class names."""
        chosen = np.asarray(indices, dtype=np.int64)
        digest = hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest()
        return replace(
            self,
            count=len(chosen),
            open=lambda index: self.open(int(chosen[index])),
            name=lambda index: self.name(int(chosen[index])),
            fingerprint=digest,
            labels=None if self.labels is None else self.labels[chosen],
        )


def stamp(names: Iterable[str | Path], files: Iterable[str | Path]) -> str:
    """SHA-256 over names, sizes and times of files: an image that is replaced by one of its size is another, too.

    Args:
        names: of the files within their set, in order.
        files: where they lie; one that is gone counts as empty, since reading it will tell.
    """
    digest = hashlib.sha256()
    for name, file in zip(names, files, strict=True):
        try:
            facts = os.stat(file)
            size, time = facts.st_size, facts.st_mtime_ns
        except OSError:
            size = time = -1
        digest.update(b"%b\0%d %d\n" % (os.fsencode(name), size, time))
    return digest.hexdigest()


def of_source(source: Source, channels: int = 3) -> ImageSet:
    """The images of a scanned source, with its labels if it has any."""
    fingerprint = source.fingerprint  # of names and sizes
    if isinstance(source.images, ImageFiles) and "://" not in source.root:
        indices = range(len(source))
        fingerprint = stamp(map(source.name, indices), map(source.place, indices))
    return ImageSet(
        where=shown(source.root),
        count=len(source),
        open=source.open,
        name=lambda index: shown(source.name(index)),
        fingerprint=fingerprint,
        labels=source.labels,
        classes=[shown(name) for name in source.classes],
        channels=channels,
    )


def of_files(where: str, paths: Sequence[Path], labels: NDArray[np.int64] | None, classes: Sequence[str]) -> ImageSet:
    """Image files whose labels a reader knows."""
    fingerprint = stamp([path.name for path in paths], paths)
    return ImageSet(
        where, len(paths), paths.__getitem__, lambda index: shown(paths[index]), fingerprint, labels, classes
    )


def named(spec: str, known: Iterable[str]) -> tuple[str | None, str]:
    """The name of a published set and where it lies: `imagenet:/data` is ("imagenet", "/data"); else (None, spec).

    Raises:
        OpsinError: the name before the colon is not known, or nothing follows it.
    """
    name, colon, path = spec.partition(":")
    if not colon or path.startswith("//") or not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9-]+", name) or os.path.exists(spec):
        return None, spec
    if name not in (names := list(known)):
        raise unknown("published set", name, names)
    if not path:
        raise OpsinError(f"{spec} says no place: give {name}:PATH, where the files of the set lie.")
    return name, path


def own(spec: str, channels: int = 3) -> ImageSet:
    """A labelled folder or shards of one's own.

    Raises:
        OpsinError: nothing is there, or it has no labels.
    """
    source = scan(spec)
    if source.labels is None:
        raise OpsinError(
            f"{shown(spec)} has no labels: put each image into a sub-folder that is named after its class, or "
            "give shards with labels."
        )
    return of_source(source, channels)


def split(labels: NDArray[np.int64], test_fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of a train and a test part, both sorted, drawn per class from `labels [N]`.

    Every class of two or more images has at least one in each part; a class of one image is in the train part only.
    """
    if not 0 < test_fraction < 1:
        raise OpsinError(f"test_fraction {test_fraction} is not between 0 and 1: give, for example, 0.2.")
    test = []
    for label in np.unique(labels):
        members = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        taken = min(max(round(len(members) * test_fraction), 1), len(members) - 1)
        test.append(members[:taken])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def several_classes(labels: NDArray[np.int64], where: str, classes: Sequence[str]) -> None:
    """An OpsinError unless the images that can be read, with labels `[N]`, are of two classes or more."""
    if labels.ndim == 1 and len(left := np.unique(labels)) < 2:
        only = f"only images of the class '{shown(classes[left[0]])}'" if len(left) else "no images"
        raise OpsinError(f"{only} of {where} can be decoded to train on: replace the damaged files.")


def in_classes_of(test: ImageSet, train: ImageSet) -> NDArray[np.int64]:
    """The labels of `test` in the numbering of the classes of `train`, of the same shape (columns for `[N, K]`).

    Raises:
        OpsinError: a class of `test` is none of `train`, or there are no labels.
    """
    assert test.labels is not None
    if list(test.classes) == list(train.classes):
        return test.labels
    if not test.classes:
        highest = test.labels.shape[1] - 1 if test.labels.ndim == 2 else int(test.labels.max(initial=0))
        if highest >= len(train.classes):
            raise OpsinError(
                f"the labels of {test.where} go up to {highest}, and {train.where} has {len(train.classes)} classes: "
                "train on the set whose classes they number."
            )
        return test.labels
    number = {name: i for i, name in enumerate(train.classes)}
    strange = [name for name in test.classes if name not in number]
    if strange:
        names = ", ".join(f"'{name}'" for name in strange[:5])
        names += f" and {len(strange) - 5} more" if strange[5:] else ""
        raise OpsinError(
            f"the test set {test.where} has classes that the train set {train.where} has not, {names}: name the class "
            "folders alike in both."
        )
    places = np.array([number[name] for name in test.classes], dtype=np.int64)
    if test.labels.ndim == 1:
        return places[test.labels]
    labels = np.zeros((len(test), len(train.classes)), dtype=np.int64)
    labels[:, places] = test.labels
    return labels


def train_and_test(
    data: str, test_data: str | None, test_fraction: float, seed: int, channels: int = 3
) -> tuple[ImageSet, ImageSet]:
    """The labelled images that train and those that test, with labels in the numbering of the first.

    Args:
        data: of one's own, or NAME:PATH; a published set brings its own test part.
        test_data: the same, for the test; None splits images of one's own per class (see `split`).
        test_fraction: share of each class that is tested, when images of one's own are split.
        seed: of that split.
        channels: bands of the images.

    Raises:
        OpsinError: see `own`; a class or image too few; the test set has classes of its own, or is the train set.
    """
    from opsin.evaluate.datasets.classification import SETS, read_set  # which themselves make image sets

    name, path = named(data, SETS)
    train = own(data, channels) if name is None else read_set(name, Path(path), SETS[name].train)
    assert train.labels is not None
    if len(train.classes) < 2:
        raise OpsinError(
            f"{train.where} holds only the class '{train.classes[0]}', and accuracy needs two or more: add a folder "
            "per class."
        )
    if test_data is None and name is not None:
        test = read_set(name, Path(path), SETS[name].test)
    elif test_data is None:
        if np.bincount(train.labels).max() < 2:
            raise OpsinError(
                f"every class of {train.where} has a single image, so none is left to test: add images, or give "
                "a test folder."
            )
        trains, tests = split(train.labels, test_fraction, seed)
        return train.part(trains), train.part(tests)
    else:
        test_name, test_path = named(test_data, SETS)
        test = (
            own(test_data, channels)
            if test_name is None
            else read_set(test_name, Path(test_path), SETS[test_name].test)
        )
        if test.fingerprint == train.fingerprint:
            raise OpsinError(
                f"{test.where} is given as train and as test set, so every image would find itself: leave out the "
                "test set to have it split."
            )
    return train, replace(test, labels=in_classes_of(test, train), classes=train.classes)
