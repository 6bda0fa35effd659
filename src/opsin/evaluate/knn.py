"""Weighted nearest-neighbour accuracy of a frozen backbone on labelled folders, by the reference's protocol."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from opsin.backbone.features import evaluation_transform
from opsin.backbone.probe import NEIGHBOURS, knn_classify
from opsin.backbone.vit import VisionTransformer
from opsin.data.decode import shown
from opsin.data.pipeline import prepared
from opsin.data.reader import ImageReader
from opsin.data.sources import Source, scan
from opsin.errors import OpsinError

log = logging.getLogger(__name__)


def extract(
    backbone: VisionTransformer,
    read: Callable[[int], Tensor],
    count: int,
    *,
    size: int,
    batch_size: int,
    device: torch.device | str,
    workers: int = 1,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Class tokens after the final norm, not normalised to unit length: `[count, D]`, fp32, on the CPU.

    Images are resized (shorter side to size·256/224, antialiased bicubic), centre-cropped and normalised as
    `evaluation_transform` does. The backbone moves to `device`. It computes in its own precision; on CUDA in bf16 under
    autocast, where the reference has fp16: the same speed without its overflow.

    Args:
        backbone: of C channels.
        read: index 0…count-1 → image `[C, H, W]`, see `evaluation_transform`; called from `workers` threads, while the
            backbone computes.
        count: number of images.
        size: side of the crop in pixels, a multiple of the patch.
        batch_size: images per forward.
        device: where the backbone runs.
        workers: threads that read and transform.
        advance: called with the number of images after every batch.
    """
    device = torch.device(device)
    # On a CPU the transform shares the cores with the backbone anyway, and MPS lacks antialiased bicubic.
    transform_on = device if device.type == "cuda" else torch.device("cpu")
    backbone = backbone.to(device).eval()
    precision = next(backbone.parameters()).dtype
    features = torch.empty(count, backbone.arch.width)

    def prepare(index: int) -> Tensor:
        return evaluation_transform(read(index).to(transform_on), size)

    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    with torch.inference_mode(), closing(prepared(prepare, batches, workers=workers, ahead=1)) as ready:
        for batch, crops in zip(batches, ready, strict=True):
            images = torch.stack(crops).to(device, precision)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                cls = backbone([images])[0].cls
            features[batch.start : batch.stop] = cls.float().cpu()
            if advance is not None:
                advance(len(batch))
    return features


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


def knn(
    backbone: VisionTransformer,
    data: str | Path,
    test_data: str | Path | None = None,
    *,
    k: Sequence[int] = NEIGHBOURS,
    temperature: float = 0.07,
    size: int = 224,
    batch_size: int = 64,
    workers: int = 4,
    device: torch.device | str = "cpu",
    seed: int = 0,
    test_fraction: float = 0.2,
) -> dict[str, Any]:
    """kNN accuracy of `backbone`, with neighbours from the train images and queries from the test images.

    Args:
        backbone: a frozen backbone.
        data: a folder with one sub-folder per class.
        test_data: another one, whose classes all occur in `data`; None splits `data` per class (see `split`).
        k: numbers of neighbours; one above the number of train images is lowered to that.
        temperature: of the softmax over similarities.
        size: side of the centre crop in pixels, a multiple of the patch.
        batch_size: images per forward.
        workers: threads that read images.
        device: where the backbone runs.
        seed: of the split.
        test_fraction: share of each class that is tested, when `data` is split.

    Returns:
        JSON-able: `accuracy` for every k, `best` (the k that is best *on the test set*, as the reference reports it),
        `per_class` accuracy at that k, `n_train`, `n_test`, `classes`, `left_out` (images that do not decode, with the
        reason: they count nowhere), and `settings`.

    Raises:
        OpsinError: a folder has no labels, fewer than two classes or images, or nothing to test; the test set has a
            class that the train set has not, or is the train set; features are not finite.
    """
    for name, value in (("k", min(k, default=0)), ("size", size), ("batch_size", batch_size), ("workers", workers)):
        if value < 1:
            raise OpsinError(f"{name} {value} is too small: give 1 or more.")
    if seed < 0:
        raise OpsinError(f"seed {seed} is below 0: give 0 or more.")
    if not temperature > 0:
        raise OpsinError(f"temperature {temperature:g} is not above 0: give, for example, 0.07.")
    train, labels = _labelled(data)
    if len(train) < 2:
        raise OpsinError(f"{shown(train.root)} holds a single image, and kNN accuracy needs two or more: add images.")
    if len(train.classes) < 2:
        raise OpsinError(
            f"{shown(train.root)} holds only the class '{shown(train.classes[0])}', and kNN accuracy needs two or "
            "more: add a folder per class."
        )
    if test_data is None:
        if np.bincount(labels).max() < 2:
            raise OpsinError(
                f"every class of {shown(train.root)} has a single image, so none is left to test: add images, or give "
                "a test folder."
            )
        test = train
        gallery, queries = split(labels, test_fraction, seed)
        query_classes = labels[queries]
    else:
        test, test_labels = _labelled(test_data)
        gallery, queries = np.arange(len(train)), np.arange(len(test))
        query_classes = _renumbered(test, test_labels, train)

    sources = [train] if test is train else [train, test]
    results = [_features(backbone, s, size, batch_size, workers, device) for s in sources]
    (train_features, train_bad), (test_features, test_bad) = results[0], results[-1]
    gallery = gallery[~np.isin(gallery, list(train_bad))]
    readable = ~np.isin(queries, list(test_bad))
    queries, query_classes = queries[readable], query_classes[readable]
    if not len(gallery) or not len(queries):
        raise OpsinError(
            f"no {'test' if len(gallery) else 'train'} image of {shown(test.root if len(gallery) else train.root)} can "
            "be decoded: replace the damaged files."
        )
    asked = torch.from_numpy(query_classes)
    votes = knn_classify(
        test_features[queries].to(device),
        train_features[gallery].to(device),
        torch.from_numpy(labels[gallery]).to(device),
        k,
        num_classes=len(train.classes),
        temperature=temperature,
    )
    correct = {number: (vote.argmax(1).cpu() == asked).double() for number, vote in votes.items()}
    accuracy = {number: hits.mean().item() for number, hits in correct.items()}
    best = max(accuracy, key=lambda number: accuracy[number])
    left_out = [(source, i, bad[i]) for source, (_, bad) in zip(sources, results, strict=True) for i in sorted(bad)]
    return {
        "accuracy": {str(number): value for number, value in accuracy.items()},
        "best": {"k": best, "accuracy": accuracy[best]},
        "per_class": {
            shown(train.classes[label]): correct[best][asked == label].mean().item()
            for label in asked.unique().tolist()
        },
        "n_train": len(gallery),
        "n_test": len(queries),
        "classes": [shown(name) for name in train.classes],
        "left_out": [{"path": shown(source.place(i)), "reason": reason} for source, i, reason in left_out],
        "settings": {
            "data": shown(train.root),
            "test_data": None if test_data is None else shown(test.root),
            "k": list(k),
            "temperature": temperature,
            "size": size,
            "seed": None if test_data else seed,
            "test_fraction": None if test_data else test_fraction,
        },
    }


def _labelled(data: str | Path) -> tuple[Source, NDArray[np.int64]]:
    source = scan(data)
    if source.labels is None:
        raise OpsinError(
            f"{shown(data)} has no labels: put each image into a sub-folder that is named after its class, or "
            "give shards with labels."
        )
    return source, source.labels


def _renumbered(test: Source, test_labels: NDArray[np.int64], train: Source) -> NDArray[np.int64]:
    """The test set's labels in the numbering of the train set's classes."""
    if os.path.realpath(test.root) == os.path.realpath(train.root):
        raise OpsinError(
            f"{shown(test.root)} is given as train and as test folder, so every image would find itself: leave out the "
            "test folder to have it split."
        )
    number = {name: i for i, name in enumerate(train.classes)}
    strange = [shown(name) for name in test.classes if name not in number]
    if strange:
        names = ", ".join(f"'{name}'" for name in strange[:5]) + (
            f" and {len(strange) - 5} more" if strange[5:] else ""
        )
        raise OpsinError(
            f"the test folder {shown(test.root)} has classes that the train folder has not, {names}: name the class "
            "folders alike in both."
        )
    return np.array([number[name] for name in test.classes], dtype=np.int64)[test_labels]


def _features(
    backbone: VisionTransformer, source: Source, size: int, batch_size: int, workers: int, device: torch.device | str
) -> tuple[Tensor, dict[int, str]]:
    """Class tokens `[N, D]` of all images, and the index and reason of those that do not decode.

    The reader gives another image in place of a broken one, whose class may differ: their rows must not be used.
    """
    columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with (
        ImageReader(source, workers=1, channels=backbone.arch.channels, max_bad_fraction=1) as reader,
        Progress(*columns, console=Console(stderr=True)) as bar,
    ):
        task = bar.add_task("features", total=len(source))
        features = extract(
            backbone,
            reader.read,
            len(source),
            size=size,
            batch_size=batch_size,
            device=device,
            workers=workers,
            advance=lambda images: bar.advance(task, images),
        )
    if reader.bad:
        first = min(reader.bad)
        log.warning("%d images left out, first %s (%s)", len(reader.bad), shown(source.place(first)), reader.bad[first])
    if not features.isfinite().all():
        raise OpsinError("the backbone's features are not finite: its weights are damaged, or training diverged.")
    return features, reader.bad
