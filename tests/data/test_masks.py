import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.data.masks import MaskRecipe, draw_masks, masked_bound
from opsin.errors import OpsinError

GRID = (16, 16)


def test_shares_of_the_reference():
    # exactly half of a group's crops; ratios stratified in [0.1, 0.5]; never above the target; shortfall small.
    masks = draw_masks(MaskRecipe(), seed=0, step=3, groups=np.arange(20), crops=64, grid=GRID)
    hidden = masks.reshape(20, 64, -1).sum(-1)
    assert ((hidden > 0).sum(1) == 32).all()
    for group in hidden:
        ratios = np.sort(group[group > 0]) / 256
        edges = np.linspace(0.1, 0.5, 33)
        assert (ratios <= edges[1:]).all()
        assert np.mean(ratios >= edges[:-1] - 1 / 256) > 0.85
    targets_mean = 256 * 0.3
    assert hidden[hidden > 0].mean() == pytest.approx(targets_mean, abs=1.0)
    assert (hidden.sum(1) <= masked_bound(MaskRecipe(), 64, GRID)).all()


def test_which_crops_are_masked_and_by_how_much_is_shuffled():
    masks = draw_masks(MaskRecipe(), 0, 0, np.arange(200), 8, GRID).reshape(200, 8, -1).sum(-1)
    assert (masks > 0).mean(0) == pytest.approx(np.full(8, 0.5), abs=0.12)
    where = draw_masks(MaskRecipe(), 0, 0, np.arange(400), 8, GRID).mean((0, 1))
    assert where.min() > 0.005  # blocks fall everywhere, and no side is preferred
    for mirrored in (where[::-1], where[:, ::-1], where.T):
        assert np.abs(where - mirrored).max() < 0.05


def test_blocks_have_the_reference_shapes():
    # A single block: its area and aspect must stay within the stated ranges.
    recipe = MaskRecipe(probability=1.0, ratio=(0.04, 0.05))
    masks = draw_masks(recipe, 1, 0, np.arange(100), 4, GRID).reshape(-1, 16, 16)
    runs = np.abs(np.diff(np.pad(masks, ((0, 0), (0, 0), (1, 1))).astype(int), axis=2)).sum((1, 2)) / 2
    rows = masks.any(2).sum(1)
    assert (runs >= rows).all()
    assert masks.sum((1, 2)).max() <= 0.05 * 256


@settings(max_examples=25)
@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 20), st.integers(3, 20))
def test_a_group_draws_the_same_in_any_company(seed, step, groups, crops, side):
    together = draw_masks(MaskRecipe(), seed, step, np.arange(groups), crops, (side, side))
    alone = draw_masks(MaskRecipe(), seed, step, np.array([groups - 1]), crops, (side, side))
    assert np.array_equal(together[-1:], alone)
    assert together.reshape(groups, -1).sum(1).max() <= masked_bound(MaskRecipe(), crops, (side, side))


def test_bad_shares():
    with pytest.raises(OpsinError, match=r"masks.ratio is \(0.5, 0.1\): give the smaller"):
        MaskRecipe(ratio=(0.5, 0.1))


def test_all_patches_are_predicted_where_that_is_asked():
    recipe = MaskRecipe(probability=0.0, predicted="all")
    assert masked_bound(recipe, 8, (5, 7)) == 8 * 5 * 7
    masks = [draw_masks(MaskRecipe(predicted=which), 0, 0, np.arange(2), 8, GRID) for which in ("hidden", "all")]
    assert np.array_equal(*masks)  # what is hidden does not change


def test_no_masks():
    assert not draw_masks(MaskRecipe(probability=0.0), 0, 0, np.arange(2), 8, GRID).any()
