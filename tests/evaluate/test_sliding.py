"""Windows, scales and flips: every pixel is seen, and what is averaged is what the reference averages."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from opsin.evaluate.dense import normalised
from opsin.evaluate.sliding import probabilities, size_with, sliding, windows

sides = st.integers(1, 40)


@given(sides, sides, st.integers(1, 40), st.data())
def test_windows_cover_the_image_and_lie_within_it(height, width, crop, data):
    stride = data.draw(st.integers(1, crop))
    boxes = windows(height, width, crop, stride)
    seen = np.zeros((height, width), dtype=int)
    for top, left, bottom, right in boxes:
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
        assert (bottom - top, right - left) == (min(crop, height), min(crop, width))
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1
    assert len(set(boxes)) == len(boxes)
    counts = [max(math.ceil((side - crop) / stride), 0) + 1 for side in (height, width)]
    assert len(boxes) == counts[0] * counts[1]


def test_windows_are_those_of_the_reference():
    assert windows(512, 683, 512, 341) == [(0, 0, 512, 512), (0, 171, 512, 683)]
    lefts = [left for top, left, _, _ in windows(1024, 2048, 512, 341) if top == 0]
    assert lefts == [0, 341, 682, 1023, 1364, 1536]
    assert windows(300, 400, 512, 341) == [(0, 0, 300, 400)]


@given(sides, sides, st.integers(1, 40), st.integers(1, 5), st.data())
def test_the_mean_of_windows_that_return_their_pixels_is_the_image(height, width, crop, batch, data):
    stride = data.draw(st.integers(1, crop))
    image = torch.randn(2, height, width, generator=torch.Generator().manual_seed(height * width))
    found = sliding(lambda seen: seen, image, crop, stride, batch)
    torch.testing.assert_close(found, image, atol=1e-4, rtol=1e-4)


def test_pixels_are_the_mean_of_the_windows_that_see_them():
    image = torch.randn(3, 23, 31)

    def score(seen):  # differs from window to window, and on a grid of its own
        means = seen.mean((1, 2, 3))
        return means[:, None, None, None] * torch.arange(24.0).view(1, 2, 4, 3)

    wanted, count = torch.zeros(2, 23, 31), torch.zeros(23, 31)
    for top, left, bottom, right in windows(23, 31, 10, 7):
        grid = score(image[None, :, top:bottom, left:right])
        full = F.interpolate(grid, (bottom - top, right - left), mode="bilinear", align_corners=False)[0]
        wanted[:, top:bottom, left:right] += full
        count[top:bottom, left:right] += 1
    assert count.max() > 3
    for batch in (1, 4, 100):
        torch.testing.assert_close(sliding(score, image, 10, 7, batch), wanted / count)


def test_a_window_that_covers_the_image_is_one_forward():
    image, calls = torch.randn(3, 20, 30), []

    def score(seen):
        calls.append(seen)
        return seen[:, :2, ::5, ::5]

    found = sliding(score, image, 30, 20, 8)
    assert len(calls) == 1
    assert torch.equal(calls[0], image[None])
    wanted = F.interpolate(image[None, :2, ::5, ::5], (20, 30), mode="bilinear", align_corners=False)[0]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("flips", [False, True])
def test_scales_and_flips_are_averaged_after_softmax(flips):
    pixels = torch.rand(3, 20, 33) * 255
    ramp = torch.linspace(-1, 1, 40)  # so that a mirrored window scores otherwise

    def score(seen):
        return seen * (1 + seen.shape[2]) / 50 + ramp[: seen.shape[3]]

    wanted = []
    for scale in (1.0, 1.5):
        size = size_with(int(16 * scale), 20, 33)
        view = normalised(F.interpolate(pixels[None], size, mode="bilinear", align_corners=False))[0]
        for mirrored in (False, True) if flips else (False,):
            logits = sliding(score, view.flip(2) if mirrored else view, 20, 13, 2)
            full = F.interpolate(logits[None], (20, 33), mode="bilinear", align_corners=False)[0].softmax(0)
            wanted.append(full.flip(2) if mirrored else full)
    found = probabilities(score, pixels, 16, (1.0, 1.5), flips, 20, 13, 2)
    torch.testing.assert_close(found, torch.stack(wanted).mean(0))
    torch.testing.assert_close(found.sum(0), torch.ones(20, 33))


def test_mirrored_images_give_mirrored_answers_with_flips():
    pixels = torch.rand(3, 24, 24) * 255
    ramp = torch.linspace(-1, 1, 24)

    def found(image):
        return probabilities(lambda seen: seen + ramp, image, 24, (1.0,), True, 24, 16, 2)

    torch.testing.assert_close(found(pixels.flip(2)), found(pixels).flip(2))


def test_sizes_are_rounded_to_the_nearest_pixel():
    assert size_with(512, 375, 500) == (512, 683)
    assert size_with(512, 500, 375) == (683, 512)
    assert size_with(640, 640, 640) == (640, 640)
    assert size_with(1, 3, 1000) == (1, 333)


def test_scales_are_cut_off_and_not_rounded():
    sizes = []

    def score(views):
        sizes.append(tuple(views.shape[-2:]))
        return views[:, :2]

    probabilities(score, torch.zeros(3, 10, 10), 10, (1.19,), False, 64, 64, 1)
    assert sizes == [(11, 11)]
