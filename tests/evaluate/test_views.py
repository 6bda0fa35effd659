"""Random-resized crops: torchvision's rule and pixels, and a function of the place alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from skimage import data
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional

from opsin.data.decode import DecodeError
from opsin.evaluate.sets import ImageSet
from opsin.evaluate.views import Box, Views, cropped, draw_box, order

PHOTO = torch.from_numpy(data.astronaut()[:120, :200].copy()).permute(2, 0, 1)


def image_set(count=5, bad=()):
    def open_image(index):
        if index in bad:
            raise DecodeError(f"{index}", "broken")
        return PHOTO.roll(index * 7, 2)

    labels = np.arange(count) % 3
    return ImageSet("here", count, open_image, str, "print", labels, ["a", "b", "c"])


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 100))
def test_a_box_lies_inside(height, width, seed):
    box = draw_box(height, width, np.random.default_rng(seed))
    assert 0 <= box.top <= box.top + box.height <= height
    assert 0 <= box.left <= box.left + box.width <= width
    assert box.height > 0
    assert box.width > 0


@pytest.mark.parametrize("shape", [(120, 200), (100, 100), (20, 300), (300, 20)])
def test_boxes_are_distributed_as_torchvisions(shape):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    canvas = torch.zeros(1, *shape)
    theirs = np.array([RandomResizedCrop.get_params(canvas, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(2000)])
    ours = np.array([draw_box(*shape, rng) for _ in range(2000)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert ks_2samp(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]).pvalue > 1e-3


@pytest.mark.parametrize("box", [Box(10, 20, 60, 45), Box(0, 0, 120, 200), Box(100, 150, 12, 16)])
def test_pixels_are_torchvisions(box):
    wanted = functional.resized_crop(PHOTO, *box, (32, 32), InterpolationMode.BICUBIC, antialias=True)
    assert (cropped(PHOTO, box, 32).round() - wanted.float()).abs().max() <= 1


def test_a_view_depends_on_its_place_alone():
    views = Views(image_set(), 16, 4, 0)
    whole = list(views.batches(0, 6, workers=3))
    later = list(views.batches(4, 6, workers=1))
    for (images, labels), (again, same) in zip(whole[4:], later, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)
    assert len(torch.unique(torch.cat([images for images, _ in whole]).flatten(1), dim=0)) == 24  # never one twice
    other = next(iter(Views(image_set(), 16, 4, 1).batches(0, 1, workers=1)))[0]
    assert not torch.equal(other, whole[0][0])


def test_every_epoch_has_every_image_once_in_the_order_of_kept_features():
    labels = torch.cat([labels for _, labels in Views(image_set(), 8, 4, 3).batches(0, 5, workers=2)])
    places = torch.cat(list(order(5, 4, 3, 0, 5)))
    assert torch.equal(labels, places % 3)
    epochs = places.view(4, 5)
    assert (epochs.sort(dim=1).values == torch.arange(5)).all()
    assert len(torch.unique(epochs, dim=0)) > 1
    assert torch.equal(torch.cat(list(order(5, 4, 3, 3, 5))), places[12:])


def test_half_of_the_views_are_flipped_and_all_normalised(monkeypatch):
    monkeypatch.setattr("opsin.evaluate.views.draw_box", lambda height, width, _: Box(0, 0, height, width))
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 8, 256)
    images = ImageSet("here", 1, lambda _: ramp, str, "print", np.array([0]), ["a"])
    batch = next(iter(Views(images, 64, 400, 0).batches(0, 1, workers=2)))[0]
    falls = batch[:, 0, 0, 0] > batch[:, 0, 0, -1]
    assert 150 < falls.sum() < 250
    assert batch[:, 0].mean().item() == pytest.approx((0.5 - 0.485) / 0.229, abs=0.01)


def test_an_image_that_cannot_be_read_is_replaced_by_the_next_with_its_label():
    labels = torch.cat([labels for _, labels in Views(image_set(bad={1}), 8, 5, 0).batches(0, 1, workers=2)])
    assert sorted(labels.tolist()) == [0, 0, 1, 2, 2]  # images 0, 2, 2, 3, 4


def test_sixteen_bits_are_seen_as_eight_bits_are():
    eight = image_set()
    deep = replace(eight, open=lambda index: (eight.open(index).int() * 257).to(torch.uint16))
    torch.testing.assert_close(Views(deep, 16, 4, 0).view(3)[0], Views(eight, 16, 4, 0).view(3)[0], atol=0.02, rtol=0)
