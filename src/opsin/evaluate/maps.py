"""What patch features show in images: principal components, attention, similarity to one patch, matches of two images.

Grids have one entry per patch, `[h, w]`; images are prepared as `FeatureExtractor.preprocess` does, without a crop.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from opsin.backbone.probe import PcaPicture, pca_basis
from opsin.constants import normalisation
from opsin.data.decode import decode, shown
from opsin.errors import OpsinError
from opsin.evaluate.model import Model

Pixels = NDArray[np.uint8]


class Look(NamedTuple):
    """An image as the backbone sees it."""

    pixels: Pixels
    """`[H, W, 3]`, H and W multiples of the patch."""
    batch: Tensor
    """The same, normalised, `[1, C, H, W]`."""


class Match(NamedTuple):
    """Two patches, each as (row, column), and the distance of their features."""

    first: tuple[int, int]
    second: tuple[int, int]
    distance: float


def look(model: Model, path: Path | bytes, size: int) -> Look:
    """Decode an image file and prepare it, its shorter side `size` pixels."""
    pixels = decode(path, channels=model.arch.channels)
    batch = model.extractor.preprocess(pixels, size)[None]
    mean, std = (torch.tensor(v)[:, None, None] for v in normalisation(model.arch.channels))
    seen = ((batch[0] * std + mean) * 255).round().clamp(0, 255).byte()
    rgb = seen[:3] if len(seen) >= 3 else seen[:1].expand(3, -1, -1)
    return Look(rgb.permute(1, 2, 0).numpy(), batch)


def patches(model: Model, look: Look) -> Tensor:
    """Patch features of the last block after the final norm, `[h, w, D]`, on the CPU."""
    return model.extractor.features(look.batch).patches[0].cpu()


def joint_pca(
    grids: Sequence[Tensor], basis: PcaPicture | None = None, *, background: bool = False
) -> tuple[PcaPicture, list[NDArray[np.float64]]]:
    """Colours of several images' patches in one basis (paper §7.5), and that basis.

    Args:
        grids: patch features `[h, w, D]` of every image.
        basis: of an earlier picture of the same backbone; None fits one to these images together.
        background: colour what the first component takes for background, too.

    Returns:
        For every image `[h, w, 3]` from 0 to 1, the background black unless it is to be coloured.
    """
    basis = basis or pca_basis(grids)
    pictures = []
    for grid in grids:
        rgb, foreground = basis.apply(grid)
        pictures.append((rgb if background else rgb * foreground[..., None]).double().numpy())
    return basis, pictures


@torch.no_grad()
def attention(model: Model, look: Look, layer: int = -1, register: int | None = None) -> Tensor:
    """How much the class token of a block attends to each patch, by head: `[heads, h, w]`, on the CPU.

    The fused attention of the forward pass keeps no weights, so this block's are computed once more.

    Args:
        model: the backbone.
        look: the image.
        layer: the block, 0 the first, -1 the last.
        register: that of register number 0, 1, …, instead of the class token's.

    Raises:
        OpsinError: there is no such block or register.
    """
    registers = model.arch.registers
    if register is not None and not 0 <= register < registers:
        raise OpsinError(f"there is no register {register}: this backbone has {registers or 'none'}.")
    token = 0 if register is None else 1 + register
    batch = look.batch.to(model.device, model.extractor.dtype)
    weights = model.backbone.attention(batch, layer)[0, :, token, 1 + registers :]
    h, w = (side // model.arch.patch for side in look.batch.shape[-2:])
    return weights.float().reshape(-1, h, w).cpu()


def patch_at(look: Look, x: float, y: float, patch: int) -> tuple[int, int]:
    """Row and column of the patch at a point of an image, given as fractions of its width and height from 0 to 1."""
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise OpsinError(f"--at {x:g} {y:g} is outside the image: give fractions of width and height from 0 to 1.")
    h, w = (side // patch for side in look.pixels.shape[:2])
    return min(int(y * h), h - 1), min(int(x * w), w - 1)


def similarity(grid: Tensor, at: tuple[int, int], others: Sequence[Tensor]) -> list[Tensor]:
    """Cosine similarity of one patch of `grid [h, w, D]` to all patches of each of the `others`, `[h, w]` each."""
    probe = F.normalize(grid[at], dim=0)
    return [F.normalize(other, dim=-1) @ probe for other in others]


def matches(first: Tensor, second: Tensor, radius: float = 2.0, limit: int = 50) -> list[Match]:
    """Patches of two images that belong together (paper §7.5), the nearest first.

    Features of the foreground patches of both, by a joint PCA, are assigned one to one with the least sum of Euclidean
    distances; then of matches whose patches lie within `radius` patches of one another in the first image only the
    nearest is kept.

    Args:
        first: patch features `[h, w, D]`.
        second: the same of another image, of any size.
        radius: in patches; 0 keeps all.
        limit: largest number of matches.

    Raises:
        OpsinError: scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise OpsinError("matching needs scipy, which is missing: pip install 'opsin[eval]'.") from None
    basis = pca_basis([first, second])
    places, features = [], []
    for grid in (first, second):
        foreground = basis.apply(grid)[1]
        foreground = foreground if foreground.any() else torch.ones_like(foreground)
        places.append(foreground.nonzero())
        features.append(grid[foreground].double())
    distance = torch.cdist(features[0], features[1])
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(distance.numpy()))
    found: list[Match] = []
    taken = torch.empty(0, 2)
    for i in distance[rows, columns].argsort(stable=True).tolist():
        at, there = places[0][rows[i]], places[1][columns[i]]
        if radius and len(taken) and (taken - at).square().sum(1).min() <= radius**2:
            continue
        taken = torch.cat([taken, at[None].float()])
        pair = tuple(at.tolist()), tuple(there.tolist())
        found.append(Match(*pair, float(distance[rows[i], columns[i]])))
        if len(found) == limit:
            break
    return found


def images_of(data: str, limit: int) -> list[Path]:
    """Up to `limit` evenly spaced image files of a folder or list, or the one file that is given.

    Raises:
        OpsinError: nothing is there, or the images are in shards.
    """
    from opsin.data.sources import scan

    if Path(data).is_file() and Path(data).suffix.lower() != ".txt":
        return [Path(data)]
    source = scan(data)
    count = min(limit, len(source))
    files = [source.open(i * len(source) // count) for i in range(count)]
    if not all(isinstance(file, Path) for file in files):
        raise OpsinError(f"{shown(data)} holds shards, and pictures are of image files: give a folder or a file.")
    return [file for file in files if isinstance(file, Path)]
