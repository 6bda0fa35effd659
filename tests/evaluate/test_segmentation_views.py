"""Random views: image and mask stay together, crops keep to the rule, colours change as HSV says."""

import colorsys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from opsin.evaluate import segmentation_views
from opsin.evaluate.dense import normalised
from opsin.evaluate.segmentation_head import IGNORED
from opsin.evaluate.segmentation_views import BRIGHTNESS, FACTORS, HUE, Views, coloured, distorted
from opsin.evaluate.sliding import size_with


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(segmentation_views, "distorted", lambda pixels, _: pixels)


def unnormalised(view):
    zero, one = normalised(torch.zeros(3, 1, 1)), normalised(torch.full((3, 1, 1), 255.0))
    return (view - zero) / (one - zero) * 255


def test_without_scaling_a_view_is_a_piece_of_the_image(plain):
    mask = torch.randint(250, (40, 50))
    pixels = torch.stack([mask, mask // 2, 255 - mask]).float()  # the mask can be read off the image
    views = Views(crop=16, shorter=40, ratios=(1.0, 1.0), most=1.0)
    places = set()
    for seed in range(20):
        view, seen = views.draw(pixels, mask, np.random.default_rng(seed))
        assert view.shape == (3, 16, 16)
        found = unnormalised(view).round().long()
        assert torch.equal(found[0], seen)
        assert torch.equal(found[2], 255 - seen)
        places.add(tuple(seen[0].tolist()))
    assert len(places) == 20


@given(st.integers(0, 1000), st.booleans())
def test_at_any_scale_edges_of_image_and_mask_coincide(seed, upright):
    stripes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, 12)).repeat_interleave(5)
    mask = stripes.expand(47, 60) if upright else stripes[:, None].expand(60, 47)
    views = Views(crop=32, shorter=47, ratios=(0.5, 2.0), most=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation_views, "distorted", lambda pixels, _: pixels)
        view, seen = views.draw((mask * 255.0).expand(3, -1, -1), mask, np.random.default_rng(seed))
    value = unnormalised(view)[0] / 255
    counted = (seen != IGNORED) & ((value - 0.5).abs() > 1e-3)  # halfway is either
    assert counted.any()
    assert torch.equal((value > 0.5).long()[counted], seen[counted])


@pytest.mark.parametrize("ratio", [0.5, 0.83, 1.7])
def test_a_view_of_all_is_the_resized_image(plain, ratio):
    pixels, mask = torch.rand(3, 30, 41) * 255, torch.randint(5, (30, 41))
    size = size_with(int(30 * ratio), 30, 41)
    rng = np.random.default_rng(1)
    view, seen = Views(crop=96, shorter=30, ratios=(ratio, ratio), most=1.0).draw(pixels, mask, rng)
    wanted = normalised(F.interpolate(pixels[None], size, mode="bilinear", align_corners=False))[0]
    nearest = F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].long()
    assert view.shape == (3, 96, 96)
    assert seen.shape == (96, 96)
    inside = view[:, : size[0], : size[1]], seen[: size[0], : size[1]]
    if not torch.equal(inside[1], nearest):
        wanted, nearest = wanted.flip(2), nearest.flip(1)
    torch.testing.assert_close(inside[0], wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(inside[1], nearest)
    assert not view[:, size[0] :].any()
    assert not view[:, :, size[1] :].any()
    assert (seen[size[0] :] == IGNORED).all()
    assert (seen[:, size[1] :] == IGNORED).all()


def test_scales_and_flips_are_drawn_over_their_range(plain):
    columns = torch.arange(64).expand(64, 64)
    pixels = torch.zeros(3, 64, 64)
    sides = []
    for seed in range(200):
        _, seen = Views(256, 64, (0.5, 2.0), 1.0).draw(pixels, columns, np.random.default_rng(seed))
        sides.append((seen != IGNORED).sum(0).max().item())
    assert 32 <= min(sides) < 36
    assert 124 < max(sides) <= 128
    assert 64 < np.mean(sides) < 96
    firsts = [
        Views(64, 64, (1.0, 1.0), 1.0).draw(pixels, columns, np.random.default_rng(seed))[1][0, 0].item()
        for seed in range(200)
    ]
    assert set(firsts) == {0, 63}
    assert 70 < firsts.count(63) < 130


def test_one_class_fills_a_view_only_if_no_other_is_found(plain):
    mask = torch.zeros(64, 64, dtype=torch.long)
    mask[20:44, 20:44] = 1
    mask[:, :3] = IGNORED
    pixels = torch.zeros(3, 64, 64)

    def largest(most):
        found = []
        for seed in range(100):
            _, seen = Views(20, 64, (1.0, 1.0), most).draw(pixels, mask, np.random.default_rng(seed))
            counts = torch.bincount(seen[seen != IGNORED], minlength=2)
            found.append((counts.max() / counts.sum()).item())
        return np.array(found)

    assert (largest(1.0) >= 0.75).mean() > 0.3  # the first try is taken
    assert (largest(0.75) >= 0.75).mean() < 0.1
    assert (largest(0.0) >= 0.75).mean() > 0.5  # the last try is taken
    single = torch.ones(64, 64, dtype=torch.long)
    assert Views(20, 64, (1.0, 1.0), 0.75).draw(pixels, single, np.random.default_rng(0))[1].eq(1).all()
    nothing = torch.full((64, 64), IGNORED)
    assert Views(20, 64, (1.0, 1.0), 0.75).draw(pixels, nothing, np.random.default_rng(0))[1].eq(IGNORED).all()


def test_views_are_distorted_before_they_are_normalised(monkeypatch):
    pixels, mask = torch.full((3, 20, 20), 100.0), torch.zeros(20, 20, dtype=torch.long)
    monkeypatch.setattr(segmentation_views, "distorted", lambda pixels, _: pixels + 7)
    view, _ = Views(16, 20, (1.0, 1.0), 1.0).draw(pixels, mask, np.random.default_rng(0))
    torch.testing.assert_close(unnormalised(view), torch.full((3, 16, 16), 107.0))


def test_colours_are_those_of_hsv():
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (3, 8, 9))).float()
    pixels[:, 0] = torch.tensor([[0.0], [128.0], [255.0]])
    pixels[:, 1] = 77  # gray
    for saturation, hue in ((0.5, 0.0), (1.5, 0.0), (1.0, 36.0), (1.3, -36.0), (0.7, 200.0)):
        found = coloured(pixels, saturation, hue)
        for y in range(8):
            for x in range(9):
                h, s, v = colorsys.rgb_to_hsv(*(pixels[:, y, x] / 255).tolist())
                wanted = colorsys.hsv_to_rgb((h + hue / 360) % 1, min(s * saturation, 1), v)
                np.testing.assert_allclose(found[:, y, x] / 255, wanted, atol=1e-5)


def test_distortion_is_decided_by_the_generator_and_stays_in_range():
    pixels = torch.rand(3, 8, 8) * 255
    found = [distorted(pixels, np.random.default_rng(seed)) for seed in range(300)]
    assert torch.equal(found[7], distorted(pixels, np.random.default_rng(7)))
    assert all(((one >= 0) & (one <= 255.001)).all() for one in found)
    unchanged = sum(torch.equal(one, pixels) for one in found)
    assert 6 <= unchanged <= 36  # 1/16 of 300
    gray = torch.full((1, 4, 4), 100.0)
    values = [distorted(gray, np.random.default_rng(seed))[0, 0, 0].item() for seed in range(1000, 2000)]
    assert min(values) < 60
    assert max(values) > 180
    assert 200 <= values.count(100.0) <= 300  # neither brightness nor contrast: 1/4


def test_contrast_comes_before_or_after_the_colours(monkeypatch):
    """Contrast by 1.5 clips: the order shows in bright colours."""

    class Scripted:
        def __init__(self, early):
            self.coins = iter([0.9, 0.1, 0.1 if early else 0.9, 0.1, 0.9])  # contrast, order, saturation; no hue
            self.ranges = iter([1.5, 0.5])

        def random(self):
            return next(self.coins)

        def uniform(self, low, high):
            assert (low, high) == (0.5, 1.5)
            return next(self.ranges)

    pixels = torch.tensor([220.0, 100.0, 40.0])[:, None, None]
    early, late = distorted(pixels, Scripted(True)), distorted(pixels, Scripted(False))
    torch.testing.assert_close(early.flatten(), torch.tensor([255.0, 202.5, 157.5]))  # 255, 150, 60, then half as far
    torch.testing.assert_close(late.flatten(), torch.tensor([255.0, 240.0, 195.0]))  # 220, 160, 130, then 1.5 times


def test_ignored_pixels_are_no_class_of_a_view():
    mask = torch.full((40, 40), -1)
    mask[:, :10] = 0
    mask[:4, :4] = 1  # of counted pixels more than nine tenths are of class 0
    drawn_at = []

    class Watched(Views):
        def _window(self, side, rng):
            drawn_at.append(side)
            return super()._window(side, rng)

    Watched(40, 40, (1.0, 1.0), 0.75).draw(torch.zeros(3, 40, 40), mask, np.random.default_rng(0))
    assert len(drawn_at) == 2 * 10  # tried again and again


def test_distortions_are_as_strong_as_the_toolboxs():
    assert (BRIGHTNESS, FACTORS, HUE) == (32, (0.5, 1.5), 36)  # ± 18 of OpenCV's 180
