"""Block-wise masks for iBOT (Zhou et al., 2111.07832, after BEiT), with ratios stratified inside a group.

A *group* is a stated number of images whose masks are drawn together. The reference draws per GPU; here a group's draw
depends only on (seed, step, group), so it is the same on any number of ranks and with any micro-batches.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from opsin.data.rng import Floats, Integers, Stream, uniform
from opsin.errors import OpsinError, within


@dataclass(frozen=True)
class MaskRecipe:
    """How patches of the global crops are hidden from the student, and which of them it predicts."""

    probability: float = 0.5
    """Share of a group's global crops that get a mask; exactly that many do."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of hidden patches; the range is split evenly over the masked crops of a group."""
    min_block: int = 4
    """Smallest area of a block in patches."""
    min_aspect: float = 0.3
    """Aspect ratios of blocks are log-uniform in [min_aspect, 1 / min_aspect]."""
    predicted: Literal["hidden", "all"] = "hidden"
    """Patches whose assignment the student predicts: the hidden ones, or, for distillation (paper §5), all of both
    global crops. Every crop counts then, and not only those with a mask: the loss is 1 / probability times as large."""

    def __post_init__(self) -> None:
        within(self, "masks.", probability=(0, 1), ratio=(0, 1), min_block=(1, 1e6), min_aspect=(1e-2, 1))
        if self.ratio[0] > self.ratio[1]:
            raise OpsinError(f"masks.ratio is {self.ratio}: give the smaller share first.")


def draw_masks(
    recipe: MaskRecipe, seed: int, step: int, groups: Integers, crops: int, grid: tuple[int, int]
) -> NDArray[np.bool_]:
    """Masks `[groups, crops, h, w]`, True where hidden.

    Args:
        recipe: the shares and block shapes.
        seed: the run's seed.
        step: the training step.
        groups: numbers of the groups within the step's global batch, `[G]`.
        crops: global crops in a group (2 × its images).
        grid: patches (h, w) of a crop.
    """
    h, w = grid
    masked = int(recipe.probability * crops)
    masks = np.zeros((len(groups), crops, h, w), dtype=bool)
    if masked == 0:
        return masks
    where = step * 2**24 + np.asarray(groups, dtype=np.int64)
    numbers = uniform(seed, Stream.MASK_RATIO, where, masked + crops)
    edges = np.linspace(*recipe.ratio, masked + 1)
    ratios = edges[:-1] + numbers[:, :masked] * np.diff(edges)
    targets = (ratios * (h * w)).astype(np.int64)  # truncated, as in the reference
    order = np.argsort(numbers[:, masked:], axis=1, kind="stable")[:, :masked]  # which crops get the masks
    positions = (where[:, None] * 2**12 + np.arange(masked)).reshape(-1)
    largest = int(recipe.ratio[1] * h) * w  # the reference's cap on one block: half the crop's patches
    drawn = _blocks(recipe, seed, positions, targets.reshape(-1), (h, w), largest)
    masks[np.arange(len(groups))[:, None], order] = drawn.reshape(len(groups), masked, h, w)
    return masks


def masked_bound(recipe: MaskRecipe, crops: int, grid: tuple[int, int]) -> int:
    """The most patches of one group that the student predicts: buffers of this size never overflow.

    They are all, or the most that the masks of the group can hide.
    """
    if recipe.predicted == "all":
        return crops * grid[0] * grid[1]
    edges = np.linspace(*recipe.ratio, int(recipe.probability * crops) + 1)[1:]
    return int((edges * grid[0] * grid[1]).astype(np.int64).sum())


def _blocks(
    recipe: MaskRecipe, seed: int, positions: Integers, targets: Integers, grid: tuple[int, int], largest: int
) -> NDArray[np.bool_]:
    """Fill masks `[M, h, w]` block by block; all masks try one block at a time, together.

    A block is taken when it hides at least one new patch and not more than are still wanted. A mask is done when it
    has reached its target, or after ten blocks in a row that were not taken (it may then fall a few patches short).
    """
    h, w = grid
    masks = np.zeros((len(targets), h, w), dtype=bool)
    count = np.zeros(len(targets), dtype=np.int64)
    failures = np.zeros(len(targets), dtype=np.int64)
    rows, columns = np.arange(h)[:, None], np.arange(w)
    log_aspect = np.log([recipe.min_aspect, 1 / recipe.min_aspect])
    attempt = 0
    active = np.flatnonzero(targets > 0)
    while len(active):
        u: Floats = uniform(seed, Stream.MASK_BLOCKS, positions[active], 4, offset=4 * attempt)
        wanted = targets[active] - count[active]
        area = recipe.min_block + u[:, 0] * (np.minimum(wanted, largest) - recipe.min_block)
        aspect = np.exp(log_aspect[0] + u[:, 1] * (log_aspect[1] - log_aspect[0]))
        height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (height < h) & (width < w)
        top = (u[:, 2] * (h - height + 1)).astype(np.int64)
        left = (u[:, 3] * (w - width + 1)).astype(np.int64)
        block = ((rows >= top[:, None, None]) & (rows < (top + height)[:, None, None])) & (
            (columns >= left[:, None, None]) & (columns < (left + width)[:, None, None])
        )
        new = (block & ~masks[active]).sum(axis=(1, 2))
        taken = fits & (new > 0) & (new <= np.minimum(wanted, largest))
        masks[active[taken]] |= block[taken]
        count[active[taken]] += new[taken]
        failures[active] = np.where(taken, 0, failures[active] + 1)
        active = active[(count[active] < targets[active]) & (failures[active] < 10)]
        attempt += 1
    return masks
