"""Measures of features as plain tensors: nearest neighbours, effective rank, outliers among patch norms, joint PCA.

Pure functions that the training monitor and the evaluation share. They know nothing of models, files of images or
devices; results do not depend on an autocast region around the call.

Letters in shapes: Q queries, G gallery entries, N samples, h w patches, D width, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opsin.errors import OpsinError

NEIGHBOURS = (10, 20, 100, 200)
"""The k of the published kNN tables; 20 is usually the best."""

OUTLIER = 3.0
"""A patch norm above this many medians is an outlier.

Registers' paper (Darcet et al., 2309.16588) cuts ViT-g's two-humped histogram by hand at a norm of 150; a norm means
nothing across models, a multiple of the median does. Its outliers lie at about ten times the usual norm, and 3 is half
the way there in the logarithm. Multiples of the spread would not do: patches of a fresh backbone, or of one with
registers, spread so little that some always lie many deviations out.
"""


@torch.no_grad()
def knn_classify(
    queries: Tensor,
    gallery: Tensor,
    labels: Tensor,
    k: Sequence[int] = NEIGHBOURS,
    *,
    num_classes: int,
    temperature: float = 0.07,
    exclude_self: bool = False,
    chunk: int = 1024,
) -> dict[int, Tensor]:
    """Class votes of the nearest neighbours by cosine similarity, in fp32 (Wu et al., 1805.01978).

    As DINOv2 uses it, where similarities are in half precision.

    A neighbour's weight is its share of softmax(similarity / temperature) over the *largest* k; the weights of the
    first k neighbours are then summed per class. So only the votes of the largest k sum to 1.

    Args:
        queries: features `[Q, D]`, any scale and precision.
        gallery: features `[G, D]` whose classes are known.
        labels: classes of the gallery `[G]`, integers in 0…K-1.
        k: numbers of neighbours; one above what the gallery holds is lowered to that.
        num_classes: K.
        temperature: of the softmax.
        exclude_self: the queries *are* the gallery, and row i may not be its own neighbour.
        chunk: queries per block; memory is `chunk * G` floats.

    Returns:
        For every k that was used (after lowering) votes `[Q, K]`.

    Raises:
        OpsinError: the gallery has no neighbour to offer, or a k is below 1.
    """
    if exclude_self and len(queries) != len(gallery):
        raise ValueError(f"exclude_self compares a set with itself, not {len(queries)} queries with {len(gallery)}.")
    available = len(gallery) - exclude_self
    if available < 1:
        raise OpsinError(f"nearest neighbours need at least {1 + exclude_self} images in the gallery: add images.")
    if min(k) < 1:
        raise OpsinError(f"k {min(k)} is not a number of neighbours: give 1 or more.")
    ks = sorted({min(number, available) for number in k})
    with torch.autocast(queries.device.type, enabled=False):
        gallery = F.normalize(gallery.float(), dim=1)
        blocks: dict[int, list[Tensor]] = {number: [] for number in ks}
        for start in range(0, len(queries), chunk):
            block = F.normalize(queries[start : start + chunk].float(), dim=1)
            similarity = block @ gallery.T
            if exclude_self:
                similarity.diagonal(start).fill_(-torch.inf)
            nearest, index = similarity.topk(ks[-1], dim=1)
            weight, neighbour_class = torch.softmax(nearest / temperature, dim=1), labels[index]
            votes, counted = weight.new_zeros(len(block), num_classes), 0
            for number in ks:
                added = slice(counted, number)
                votes = votes.scatter_add(1, neighbour_class[:, added], weight[:, added])
                blocks[number].append(votes)
                counted = number
        return {
            number: torch.cat(parts) if parts else gallery.new_zeros(0, num_classes) for number, parts in blocks.items()
        }


def knn_accuracy(
    queries: Tensor,
    gallery: Tensor,
    labels: Tensor,
    query_labels: Tensor,
    k: Sequence[int] = NEIGHBOURS,
    *,
    num_classes: int,
    temperature: float = 0.07,
    exclude_self: bool = False,
    chunk: int = 1024,
) -> dict[int, float]:
    """Share of queries whose most voted class is theirs (`query_labels [Q]`), for every k; see `knn_classify`."""
    if not len(queries):
        raise OpsinError("accuracy needs at least one query image: the test set is empty.")
    votes = knn_classify(
        queries,
        gallery,
        labels,
        k,
        num_classes=num_classes,
        temperature=temperature,
        exclude_self=exclude_self,
        chunk=chunk,
    )
    return {number: (vote.argmax(1) == query_labels).float().mean().item() for number, vote in votes.items()}


def rank_me(features: Tensor) -> float:
    """Effective rank of `features [N, D]` (RankMe, Garrido et al., 2210.02885).

    It is exp of the entropy of the singular values, normalised to sum 1, of the features as they are (not centred).
    Lies between 1 (all rows parallel: collapse) and min(N, D); 0 for all-zero features, NaN where one is not finite.
    The published 1e-7 inside the logarithm is not needed: 0·log 0 is taken as 0, in fp64.
    """
    x = _exact(features)
    if not x.isfinite().all():
        return float("nan")
    # Eigenvalues of the smaller Gram matrix: quicker than the singular values, and fp64 leaves 1e-8 of the largest.
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if singular.sum() == 0:
        return 0.0
    share = singular / singular.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


class Outliers(NamedTuple):
    """What `outliers` says of patch norms."""

    median: float
    """The usual norm (the lower median)."""
    peak: float
    """The largest norm, in medians."""
    share: float
    """Of patches above `OUTLIER` medians."""


def outliers(norms: Tensor) -> Outliers:
    """How many patches have an abnormally large norm (Darcet et al., 2309.16588); see `OUTLIER` for the rule.

    Args:
        norms: lengths of one model's patch features, of any shape, over all images together. They are to be taken
            before the final LayerNorm, which makes all lengths nearly equal.

    Raises:
        OpsinError: there are no norms, some are not finite, or most are 0.
    """
    x = _exact(norms).flatten()
    if not len(x) or not x.isfinite().all() or (median := x.median().item()) <= 0:
        raise OpsinError("patch norms must be finite and most of them above 0: check the weights and the images.")
    return Outliers(median, x.max().item() / median, (x > OUTLIER * median).double().mean().item())


def paired_bootstrap(a: Tensor, b: Tensor, repeats: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a − b with its 95 % percentile interval (low, high), over paired outcomes `[N]` of the same samples.

    How often each difference occurs in a resample is multinomial: drawing those counts is the bootstrap itself. For
    outcomes of 0 and 1 there are three, whatever N is.
    """
    if len(a) != len(b) or not len(a):
        raise OpsinError(
            f"a paired comparison needs the same images on both sides, not {len(a)} and {len(b)}: evaluate both on one "
            "test set."
        )
    values, times = np.unique((a.double() - b.double()).cpu().numpy(), return_counts=True)
    n, random = int(times.sum()), np.random.default_rng(seed)
    block = max(1, 2**22 // len(values))  # resamples at a time, to bound memory
    means = np.concatenate(
        [
            random.multinomial(n, times / n, size=min(block, repeats - start)) @ values / n
            for start in range(0, repeats, block)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values @ times / n), float(low), float(high)


@dataclass(frozen=True, eq=False)
class PcaPicture:
    """A basis that turns patch features into colours: fitted by `pca_basis`, applied to any image of that backbone."""

    mean: Tensor
    """Mean of all fitted patches `[D]`."""
    first: Tensor
    """First component of all patches `[D]`, pointing from background to foreground."""
    threshold: float
    """A patch is foreground where its projection on `first` is above this (in units of the features)."""
    centre: Tensor
    """Mean of the foreground patches `[D]`."""
    components: Tensor
    """First three components of the foreground `[3, D]`: red, green, blue."""
    low: Tensor
    """Projection on each component that is shown as 0 `[3]`."""
    high: Tensor
    """Projection on each component that is shown as 1 `[3]`."""

    def apply(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Colours of one image's patches `[h, w, D]`: rgb `[h, w, 3]` in 0…1 (fp32, CPU), foreground `[h, w]` (bool).

        Background patches have a colour too; whoever draws decides whether to hide it.
        """
        if patches.shape[-1] != len(self.mean):
            raise OpsinError(
                f"this PCA basis is for features of width {len(self.mean)}, not {patches.shape[-1]}: "
                "fit a new basis, or use the backbone that it was fitted with."
            )
        x = _exact(patches)
        foreground = (x - self.mean) @ self.first > self.threshold
        span = self.high - self.low
        colour = ((x - self.centre) @ self.components.T - self.low) / torch.where(span > 0, span, 1)
        return colour.clamp(0, 1).float(), foreground

    def save(self, path: Path) -> None:
        """Write the basis as safetensors, so that later images get the same colours."""
        tensors = {name: torch.as_tensor(value).contiguous() for name, value in vars(self).items()}
        try:
            save_file(tensors, path, _HEADER)
        except (OSError, SafetensorError) as error:
            raise OpsinError(f"cannot write the PCA basis {path}: {error}; choose another place.") from error

    @classmethod
    def load(cls, path: Path) -> "PcaPicture":
        """Read what `save` wrote.

        Raises:
            OpsinError: the file is missing, damaged, or something else.
        """
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("opsin") != _HEADER["opsin"]:
                    raise OpsinError(
                        f"{path} is a safetensors file but no PCA basis: give one written by PcaPicture.save."
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        except (OSError, SafetensorError) as error:
            raise OpsinError(f"cannot read the PCA basis {path}: {error}; fit and save it again.") from error
        return cls(**(tensors | {"threshold": tensors["threshold"].item()}))


_HEADER = {"opsin": "pca-picture"}


def pca_basis(patches: Sequence[Tensor], threshold: float = 0.0) -> PcaPicture:
    """The joint PCA of several images' patch features (paper §7.5), as a basis for pictures.

    The first PCA, over all patches, gives the axis that separates foreground from background; which end is the
    foreground is not in the features, so it is the end with less of its weight on the outermost patches of the
    images. The second PCA is over the foreground only, and its three components become red, green and blue. Signs
    are fixed: a component's entry of largest magnitude is positive. The range shown is the 1st to 99th percentile of
    the foreground. Everything is computed in fp64 on the CPU, so the same features give the same picture.

    Args:
        patches: for every image its patch features `[h, w, D]`, D ≥ 3; sizes may differ.
        threshold: where the foreground begins, in standard deviations of the first component from its mean.

    Raises:
        OpsinError: there are no patches, or some are not finite.
    """
    if not sum(image.shape[:2].numel() for image in patches):
        raise OpsinError("a PCA picture needs the patch features of at least one image.")
    x = torch.cat([_exact(image).flatten(0, 1) for image in patches])
    if not x.isfinite().all():
        raise OpsinError("the patch features hold NaN or infinity, so there is no PCA: check the weights.")
    mean = x.mean(0)
    first = _components(x - mean, 1)[0]
    projection = (x - mean) @ first
    # Projections sum to 0, so both ends weigh the same in all: the border sums to the sign of the end it holds more of.
    border = projection[torch.cat([_border(image) for image in patches])].sum()
    if border > 1e-9 * projection.abs().sum():
        first, projection = -first, -projection
    limit = threshold * projection.std(correction=0).item()
    foreground = x[projection > limit]
    if len(foreground) < 4:  # three directions need four points; features without contrast have no foreground
        foreground = x
    centre = foreground.mean(0)
    components = _components(foreground - centre, 3)
    low, high = np.quantile(((foreground - centre) @ components.T).numpy(), [0.01, 0.99], axis=0)
    return PcaPicture(mean, first, limit, centre, components, torch.from_numpy(low), torch.from_numpy(high))


def _exact(features: Tensor) -> Tensor:
    # fp64 does not exist on every device, and the matrices here are small.
    return features.detach().cpu().double()


def _components(centred: Tensor, number: int) -> Tensor:
    """The leading principal directions `[number, D]` of `centred [N, D]`, each with its largest entry positive."""
    vectors: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :number].T
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


def _border(image: Tensor) -> Tensor:
    """Booleans `[h*w]`: the outermost ring of patches of an image `[h, w, D]`."""
    ring = torch.ones(image.shape[:2], dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    return ring.flatten()
