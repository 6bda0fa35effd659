"""A fixed set of images that the teacher looks at every now and then: rank, kNN and a picture.

    probe.rank    RankMe of the class tokens after the final norm
    probe.drift, probe.kept     how far class tokens are from those with which the run began, see `guard`
    probe.knn     share of images whose class is that of their 10 nearest neighbours' vote, each image left out of its
                  own; only with labels of two classes or more

The picture OUT/probe/step-00001000.png has eight images in its upper row, and below each the first three principal
components of its patch features as colours. The components are found anew for every picture: those of an earlier step
would point into directions that mean nothing by now. So colours can be compared within a picture, and from picture to
picture the shapes, not the colours. Of images with more than three channels the upper row shows the first three, of
those with fewer the first, in gray.

The set depends on the data only, so that runs with other seeds, and the phases of a run, are measured on the same one.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from opsin import ranks
from opsin.backbone.features import evaluation_transform
from opsin.backbone.probe import knn_accuracy, pca_basis, rank_me
from opsin.backbone.vit import VisionTransformer
from opsin.constants import normalisation
from opsin.data.reader import ImageReader
from opsin.data.sources import Source, scan
from opsin.errors import OpsinError
from opsin.pretrain.guard import Drift
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.step import DTYPES

NEIGHBOURS = 10
"""Votes for the class of an image."""
SHOWN = 8
"""Images of a picture."""
BATCH = 32
"""Images of a forward."""


class Sample:
    """Centre crops of some images of a source, and their classes if it has several."""

    def __init__(self, source: Source, reader: ImageReader, recipe: Recipe) -> None:
        count = min(recipe.monitor.probe_images, len(source))
        self.indices = np.sort(np.random.default_rng(0).choice(len(source), count, replace=False))
        size = recipe.crops.global_size
        mean, std = map(_channels, normalisation(recipe.backbone.channels))

        def crop(index: int) -> Tensor:
            return (evaluation_transform(reader.read(index), size) * std + mean).clamp(0, 1)

        torch.get_num_threads()  # fixes this thread's number: torch starts a thread with the number set last anywhere
        with ThreadPoolExecutor(recipe.data.threads(), "probe", torch.set_num_threads, (1,)) as pool:
            self.images = torch.stack(list(pool.map(crop, self.indices.tolist())))
        """`[n, C, S, S]`, values in 0 … 1."""
        self.labels: NDArray[np.int64] | None = None
        """`[n]`; -1 where another image took the place of an unreadable one."""
        if source.labels is not None and len(source.classes) > 1:
            readable = [int(index) not in reader.bad for index in self.indices]
            self.labels = np.where(readable, source.labels[self.indices], -1)


def labelled_sample(recipe: Recipe, out: Path) -> Sample:
    """Of the folder that `monitor.labelled` names."""
    source = scan(recipe.monitor.labelled, cache=out / "cache", progress=False)
    if source.labels is None:
        raise OpsinError(
            f"monitor.labelled is {recipe.monitor.labelled}, and its images do not all lie in sub-folders: put each "
            "into one that is named after its class."
        )
    with ImageReader(source, workers=1, channels=recipe.backbone.channels, max_bad_fraction=1) as reader:
        return Sample(source, reader, recipe)


class Probe:
    """What the teacher makes of a sample."""

    def __init__(self, sample: Sample, recipe: Recipe, out: Path, drift: Drift | None = None) -> None:
        self.drift = drift
        self.sample, self.folder, self.dtype = sample, out / "probe", DTYPES[recipe.precision]
        self._mean, self._std = _channels(recipe.crops.mean), _channels(recipe.crops.std)

    def look(self, step: int, backbone: VisionTransformer) -> dict[str, float]:
        """The numbers of a record, and the picture. All processes call it together, each with the same weights.

        Args:
            step: finished steps.
            backbone: the teacher's that computes, in the recipe's precision; it may be sharded over the processes.
        """
        tokens = self._tokens(backbone)
        patches = self._features(backbone, np.arange(min(SHOWN, len(self.sample.images))))[1]
        record = {"probe.rank": rank_me(tokens)}
        if self.drift is not None:
            record |= self.drift.measure(step, tokens)
        if self.sample.labels is not None:
            labels = torch.from_numpy(self.sample.labels)
            known = labels >= 0
            if len(labels[known]) > 1 and tokens.isfinite().all():
                record["probe.knn"] = _accuracy(tokens[known], labels[known])
        if ranks.first() and patches.isfinite().all():
            self._draw(step, patches)
        return record

    def _tokens(self, backbone: VisionTransformer) -> Tensor:
        """Class tokens `[n, D]` on the CPU; every process computes a part of them, in equally many forwards."""
        n, processes = len(self.sample.images), ranks.count()
        per_process = -(-n // processes)
        mine = ranks.rank() + processes * np.arange(per_process)
        found = [self._features(backbone, mine[start : start + BATCH] % n)[0] for start in range(0, per_process, BATCH)]
        tokens = torch.cat(found)
        all_tokens = tokens.new_zeros(n, tokens.shape[1])
        all_tokens[mine[mine < n]] = tokens[: int((mine < n).sum())]
        return ranks.sum_(all_tokens).cpu()

    @torch.no_grad()
    def _features(self, backbone: VisionTransformer, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Class tokens `[b, D]` and patches `[b, h, w, D]` of some images, in at least fp32."""
        token = backbone.cls_token
        images = ((self.sample.images[rows] - self._mean) / self._std).to(token.device, self.dtype)
        features = backbone([images])[0]
        dtype = torch.promote_types(features.cls.dtype, torch.float32)
        return features.cls.to(dtype), features.patches.to(dtype)

    def _draw(self, step: int, patches: Tensor) -> None:
        images = self.sample.images[: len(patches)]
        images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        basis = pca_basis(list(patches))
        colours = torch.stack([basis.apply(image)[0] for image in patches]).permute(0, 3, 1, 2)
        colours = torch.nn.functional.interpolate(colours, images.shape[-2:], mode="nearest")
        rows = [row.permute(2, 0, 3, 1).flatten(1, 2) for row in (images, colours)]  # [S, n·S, 3]
        pixels = (torch.cat(rows) * 255).round().to(torch.uint8)
        self.folder.mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(self.folder / f"step-{step:08d}.png")


def _accuracy(tokens: Tensor, labels: Tensor) -> float:
    classes = int(labels.max()) + 1
    found = knn_accuracy(tokens, tokens, labels, labels, [NEIGHBOURS], num_classes=classes, exclude_self=True)
    return next(iter(found.values()))


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]
