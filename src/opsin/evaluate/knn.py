"""Weighted nearest-neighbour accuracy of a frozen backbone on labelled folders (the reference's protocol, §"k-NN")."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from opsin.data.decode import DecodeError, decode, shown
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
        backbone: takes 3 channels.
        read: index 0…count-1 → image, uint8 `[3, H, W]`; called from `workers` threads, while the backbone computes.
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

    with ThreadPoolExecutor(workers) as pool, torch.inference_mode():

        def submit(start: int) -> list[Future[Tensor]]:
            return [pool.submit(prepare, index) for index in range(start, min(start + batch_size, count))]

        ahead = submit(0)
        try:
            for start in range(0, count, batch_size):
                waiting, ahead = ahead, submit(start + batch_size)
                images = torch.stack([image.result() for image in waiting]).to(device, precision)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    cls = backbone([images])[0].cls
                features[start : start + len(waiting)] = cls.float().cpu()
                if advance is not None:
                    advance(len(waiting))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
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
    data: Path,
    test_data: Path | None = None,
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
    train, labels = _labelled(data)
    if len(train.classes) < 2:
        raise OpsinError(
            f"{shown(train.root)} holds only the class '{train.classes[0]}': kNN accuracy needs two or more class folders."
        )
    if test_data is None:
        if np.bincount(labels).max() < 2:
            raise OpsinError(
                f"every class of {shown(train.root)} has a single image, so none is left to test: add images, or give "
                "a test folder."
            )
        train_part, test_part = split(labels, test_fraction, seed)
        paths = [train.path(int(i)) for i in np.concatenate([train_part, test_part])]
        truth = np.concatenate([labels[train_part], labels[test_part]])
        n_train = len(train_part)
    else:
        test, test_labels = _labelled(test_data)
        paths = [source.path(i) for source in (train, test) for i in range(len(source))]
        truth = np.concatenate([labels, _renumbered(test, test_labels, train)])
        n_train = len(train)

    features, left_out = _read_all(backbone, paths, size=size, batch_size=batch_size, workers=workers, device=device)
    good = torch.ones(len(paths), dtype=torch.bool)
    good[list(left_out)] = False
    if not features[good].isfinite().all():
        raise OpsinError("the backbone gives features that are not finite: its weights are damaged, or training diverged.")
    is_train = torch.arange(len(paths)) < n_train
    gallery, queries = good & is_train, good & ~is_train
    if not gallery.any() or not queries.any():
        raise OpsinError(
            f"no {'test' if gallery.any() else 'train'} image can be decoded, for example {shown(paths[min(left_out)])} "
            f"({left_out[min(left_out)]}): replace the damaged files."
        )
    known = torch.from_numpy(truth).to(device)
    on_device = features.to(device)
    votes = knn_classify(
        on_device[queries],
        on_device[gallery],
        known[gallery],
        k,
        num_classes=len(train.classes),
        temperature=temperature,
    )
    correct = {number: (vote.argmax(1) == known[queries]).cpu() for number, vote in votes.items()}
    accuracy = {number: hits.float().mean().item() for number, hits in correct.items()}
    best = max(accuracy, key=lambda number: accuracy[number])
    asked = known[queries].cpu()
    return {
        "accuracy": {str(number): value for number, value in accuracy.items()},
        "best": {"k": best, "accuracy": accuracy[best]},
        "per_class": {
            train.classes[label]: correct[best][asked == label].float().mean().item() for label in asked.unique().tolist()
        },
        "n_train": int(gallery.sum()),
        "n_test": int(queries.sum()),
        "classes": train.classes,
        "left_out": [{"path": str(paths[index]), "reason": left_out[index]} for index in sorted(left_out)],
        "settings": {
            "data": str(train.root),
            "test_data": None if test_data is None else str(test.root),
            "k": list(k),
            "temperature": temperature,
            "size": size,
            "seed": seed,
            "test_fraction": test_fraction if test_data is None else None,
        },
    }
