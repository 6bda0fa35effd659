import io
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as photos

from opsin.data import crops as C
from opsin.data.crops import CropRecipe, draw_crops, render
from opsin.data.decode import decode, decode_reduced
from opsin.errors import OpsinError


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return torch.from_numpy(photos.astronaut()).permute(2, 0, 1).contiguous()


def _sizes(count: int, height: int, width: int) -> np.ndarray:
    return np.tile([height, width], (count, 1))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 700), st.integers(4, 230), st.sampled_from([1, 3, 4]))
def test_both_resizes_agree(height, width, top, size, channels):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (channels, 701, 701), dtype=np.uint8))
    top = min(top, 701 - height)
    boxes = np.array([[top, 0, height, width]])
    kernel, products = (f([image], boxes, size) for f in (C.resize_by_kernel, C.resize_by_products))
    assert (kernel - products).abs().max() * 255 < 0.01


def test_resize_is_torchvisions_and_pillows(photo):
    boxes = np.array([[30, 40, 300, 260], [0, 0, 512, 512], [100, 100, 50, 40]])
    mine = C.resize_by_products([photo] * 3, boxes, 98)
    for crop, (top, left, height, width) in zip(mine, boxes.tolist(), strict=True):
        theirs = TF.resized_crop(photo.float() / 255, top, left, height, width, [98, 98], T.InterpolationMode.BICUBIC)
        assert (crop - theirs.clamp(0, 1)).abs().max() * 255 < 0.02
        pillow = TF.resized_crop(
            TF.to_pil_image(photo), top, left, height, width, [98, 98], T.InterpolationMode.BICUBIC
        )
        # Pillow rounds and clips to 8 bits after each of its two passes: a few values at sharp edges differ more.
        difference = (crop - TF.to_tensor(pillow)).abs() * 255
        assert (difference <= 2).float().mean() > 0.995
        assert difference.mean() <= 0.4


FACTORS = torch.tensor([0.6, 0.9, 1.0, 1.4])


@pytest.mark.parametrize(
    ("mine", "theirs", "values"),
    [
        (C.brightness, TF.adjust_brightness, FACTORS),
        (C.contrast, TF.adjust_contrast, FACTORS),
        (C.saturation, TF.adjust_saturation, FACTORS),
        (C.hue, TF.adjust_hue, torch.tensor([-0.5, -0.1, 0.0, 0.1])),
        (C.blur, lambda x, sigma: TF.gaussian_blur(x, 9, sigma), torch.tensor([0.1, 0.7, 1.3, 2.0])),
    ],
)
def test_photometric_operations_are_torchvisions(photo, mine, theirs, values):
    x = torch.stack([TF.resize(photo[:, i * 30 :], [64, 64], antialias=True) for i in range(4)]).float() / 255
    x[3] = x[3].mean(0)  # a gray image has no hue
    result = mine(x, values)
    for crop, image, value in zip(result, x, values.tolist(), strict=True):
        assert (crop - theirs(image, value)).abs().max() < 2e-5


def test_gray_and_solarize_are_torchvisions(photo):
    x = photo[None, :, :64, :64].float() / 255
    assert (C.grayscale(x) - TF.rgb_to_grayscale(x)).abs().max() < 1e-6
    assert torch.equal(C.solarize(x)[0], TF.solarize(x[0], 128 / 255))


@pytest.mark.parametrize("kind", ["global", "local"])
def test_boxes_follow_random_resized_crop(kind):
    recipe, count = CropRecipe(local_count=2), 8000
    plan = draw_crops(recipe, kind, 0, np.arange(count), _sizes(count, 375, 500))
    torch.manual_seed(0)
    image, scale = torch.empty(3, 375, 500), recipe.global_scale if kind == "global" else recipe.local_scale
    theirs = np.array([T.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)])
    for mine, other in (
        (plan.boxes[:, 2] * plan.boxes[:, 3], theirs[:, 2] * theirs[:, 3]),
        (np.log(plan.boxes[:, 3] / plan.boxes[:, 2]), np.log(theirs[:, 3] / theirs[:, 2])),
        (plan.boxes[:, 0], theirs[:, 0]),
        (plan.boxes[:, 1], theirs[:, 1]),
    ):
        # Two-sample Kolmogorov-Smirnov at about the 1e-4 level
        grid = np.sort(np.concatenate([mine, other]))
        distance = np.abs(
            np.searchsorted(np.sort(mine), grid, "right") / len(mine)
            - np.searchsorted(np.sort(other), grid, "right") / len(other)
        ).max()
        assert distance < 2.2 * np.sqrt(1 / len(mine) + 1 / len(other))
    assert (plan.boxes >= 0).all()
    assert (plan.boxes[:, 0] + plan.boxes[:, 2] <= 375).all()
    assert (plan.boxes[:, 1] + plan.boxes[:, 3] <= 500).all()


@given(st.integers(1, 40), st.integers(1, 2000))
def test_impossible_aspects_fall_back_to_the_central_crop(short, long):
    for height, width in ((short, long), (long, short)):
        boxes = draw_crops(CropRecipe(), "global", 0, np.arange(4), _sizes(4, height, width)).boxes
        assert (boxes[:, 2:] >= 1).all()
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 0] + boxes[:, 2] <= height).all()
        assert (boxes[:, 1] + boxes[:, 3] <= width).all()
    boxes = draw_crops(CropRecipe(), "global", 0, np.arange(4), _sizes(4, 30, 2000)).boxes
    assert (boxes == [0, 980, 30, 40]).all()  # aspect 4/3 in the middle


def test_rates_of_the_photometric_operations():
    # FACTS §2.4, with the blur rates that the released weights were trained with
    n = 6000
    both = draw_crops(CropRecipe(), "global", 0, np.arange(n), _sizes(n, 300, 300))
    local = draw_crops(CropRecipe(local_count=1), "local", 0, np.arange(n), _sizes(n, 300, 300))
    first, second = both.rows(slice(0, n)), both.rows(slice(n, 2 * n))
    for plan, blur, solarize in ((first, 0.0, 0.0), (second, 0.9, 0.2), (local, 0.5, 0.0)):
        assert (plan.sigma > 0).mean() == pytest.approx(blur, abs=0.02)
        assert plan.solarize.mean() == pytest.approx(solarize, abs=0.02)
        assert plan.flip.mean() == pytest.approx(0.5, abs=0.025)
        assert plan.jitter.mean() == pytest.approx(0.8, abs=0.02)
        assert plan.gray.mean() == pytest.approx(0.2, abs=0.02)
        assert plan.factors.min(0) == pytest.approx([0.6, 0.6, 0.8, -0.1], abs=2e-3)
        assert plan.factors.max(0) == pytest.approx([1.4, 1.4, 1.2, 0.1], abs=2e-3)
        assert len(np.unique(plan.order, axis=0)) == 24
    sigma = second.sigma[second.sigma > 0]
    assert sigma.min() == pytest.approx(0.1, abs=0.01)
    assert sigma.max() == pytest.approx(2.0, abs=0.01)


def test_the_pipeline_is_the_references_in_its_order(photo):
    """One crop with everything on, against torchvision's functions called one after the other."""
    recipe = CropRecipe(jitter=1, gray=0, blur=(1, 1, 1), solarize=(1, 1, 1), flip=1)
    plan = draw_crops(recipe, "global", 5, np.array([11]), _sizes(1, 512, 512))
    mine = render(recipe, "global", [photo], plan)
    for row in range(2):
        top, left, height, width = plan.boxes[row].tolist()
        x = TF.resized_crop(photo.float() / 255, top, left, height, width, [224, 224], T.InterpolationMode.BICUBIC)
        x = TF.hflip(x.clamp(0, 1))
        operations = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
        for number in plan.order[row]:
            x = operations[number](x, plan.factors[row, number])
        x = TF.solarize(TF.gaussian_blur(x, 9, plan.sigma[row]), 128 / 255)
        x = TF.normalize(x, recipe.mean, recipe.std)
        # A value within rounding of the threshold may fall on either side of it.
        assert ((mine[row] - x).abs() < 1e-3).float().mean() > 0.999


def test_any_split_of_a_batch_gives_the_same_crops(photo):
    recipe, positions = CropRecipe(global_size=56), np.arange(6)
    images = [photo[:, : 200 + 40 * i, : 300 - 20 * i] for i in range(6)]
    sizes = np.array([image.shape[-2:] for image in images])
    whole = render(recipe, "global", images, draw_crops(recipe, "global", 0, positions, sizes))
    for i in range(6):
        part = render(
            recipe, "global", images[i : i + 1], draw_crops(recipe, "global", 0, positions[i : i + 1], sizes[i : i + 1])
        )
        assert torch.equal(part, whole[[i, 6 + i]])


def test_twice_the_resolution_shows_the_same(photo):
    recipe = CropRecipe(global_size=56, blur=(1, 1, 1), solarize=(0, 0.5, 0))
    plan = draw_crops(recipe, "global", 3, np.arange(8), _sizes(8, 512, 512))
    once, twice = (render(recipe, "global", [photo] * 8, plan, scale=scale) for scale in (1, 2))
    assert twice.shape == (16, 3, 112, 112)
    # exactly: the larger crop, with a Gaussian that is as wide in the picture and ends at the same distance
    sharp = replace(plan, sigma=np.zeros(16), solarize=np.zeros(16, dtype=bool))
    x = render(replace(recipe, global_size=112, mean=(0.0,), std=(1.0,)), "global", [photo] * 8, sharp)
    for row in range(16):
        crop = TF.gaussian_blur(x[row], 17, 2 * plan.sigma[row])
        crop = TF.normalize(TF.solarize(crop, 128 / 255) if plan.solarize[row] else crop, recipe.mean, recipe.std)
        assert ((twice[row] - crop).abs() < 1e-4).float().mean() > 0.999
    # nearly: what the student sees, where no sharp edge was left; values have a standard deviation of about 1
    smooth = ~plan.solarize & (plan.sigma > 0.6)
    reduced = TF.resize(twice, [56, 56], T.InterpolationMode.BICUBIC)
    assert smooth.sum() > 5
    assert (reduced - once)[smooth].abs().mean((1, 2, 3)).max() < 0.03


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_a_doubled_blur_is_as_wide_as_the_single_one(sigma):
    """Its spread, in pixels of the single resolution: 9 taps would cut it off."""
    spread = []
    for scale in (1, 2):
        point = torch.zeros(1, 1, 64 * scale, 64 * scale, dtype=torch.float64)
        point[..., 32 * scale, 32 * scale] = 1
        line = C.blur(point, torch.tensor([sigma * scale]), radius=4 * scale)[0, 0].sum(0)
        offsets = (torch.arange(64.0 * scale) - 32 * scale) / scale
        spread.append((line * offsets**2).sum().sqrt().item())
    assert spread[1] == pytest.approx(spread[0], rel=0.03)


def test_one_mean_stands_for_all_channels(photo):
    plan = draw_crops(CropRecipe(), "global", 0, np.arange(1), _sizes(1, 512, 512))
    one, three = (
        render(CropRecipe(global_size=28, mean=(0.4,) * n, std=(0.3,) * n), "global", [photo], plan) for n in (1, 3)
    )
    assert torch.equal(one, three)


MIXED = CropRecipe(mixture=((56, 28, 0.3), (112, 28, 0.6), (112, 56, 0.1)))


def test_every_step_draws_its_resolution():
    drawn = [MIXED.at(seed=5, step=step) for step in range(3000)]
    assert all(not one.mixture for one in drawn)
    counts = Counter((one.global_size, one.local_size) for one in drawn)
    for side, local_side, share in MIXED.mixture:
        assert counts[side, local_side] / 3000 == pytest.approx(share, abs=0.035)  # four standard deviations
    assert drawn[7] == MIXED.at(5, 7)
    assert drawn[:40] != [MIXED.at(6, step) for step in range(40)]
    runs = sum(one != other for one, other in pairwise(drawn))
    assert runs / 3000 == pytest.approx(1 - (0.09 + 0.36 + 0.01), abs=0.04)  # one step says nothing of the next
    assert CropRecipe().at(5, 7) == CropRecipe()


def test_other_sensors_keep_their_range():
    image = torch.rand(5, 40, 40)
    recipe = CropRecipe(global_size=16, mean=(0,) * 5, std=(1,) * 5, solarize=(0, 0, 0))
    out = render(recipe, "global", [image], draw_crops(recipe, "global", 0, np.arange(1), _sizes(1, 40, 40)))
    assert out.shape == (2, 5, 16, 16)
    sixteen = (image * 65535).to(torch.uint16)
    again = render(recipe, "global", [sixteen], draw_crops(recipe, "global", 0, np.arange(1), _sizes(1, 40, 40)))
    assert (out - again).abs().max() < 1e-4  # an 8-bit detour would cost 4e-3
    with pytest.raises(OpsinError, match="3 entries but the images 5 channels"):
        render(CropRecipe(), "global", [image], draw_crops(recipe, "global", 0, np.arange(1), _sizes(1, 40, 40)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_crops_are_the_cpus(photo):
    recipe = CropRecipe()
    plan = draw_crops(recipe, "global", 0, np.arange(4), _sizes(4, 512, 512))
    cpu = render(recipe, "global", [photo] * 4, plan)
    gpu = render(recipe, "global", [photo.cuda()] * 4, plan).cpu()
    assert ((cpu - gpu).abs() < 2e-3).float().mean() > 0.999


def test_bad_recipes():
    with pytest.raises(OpsinError, match=r"crops.global_scale"):
        CropRecipe(global_scale=(0.5, 0.2))
    with pytest.raises(OpsinError, match=r"crops.mean has 1 entries and crops.std 3: .* or both one for all"):
        CropRecipe(mean=(0.5,))
    with pytest.raises(OpsinError, match=r"shares of crops.mixture sum to 0.9: give shares that sum to 1"):
        CropRecipe(mixture=((56, 28, 0.5), (112, 28, 0.4)))
    with pytest.raises(OpsinError, match=r"crops.repeat is 2 but crops.mixture changes .*: leave one of them out"):
        CropRecipe(repeat=2, mixture=((56, 28, 1.0),))
    with pytest.raises(OpsinError, match=r"crops.mixture has an entry \(0, 28, 1.0\): give the side of"):
        CropRecipe(mixture=((0, 28, 1.0),))
    assert CropRecipe(mixture=tuple((56, 14 * n, 0.333) for n in (1, 2, 3))).at(0, 0).global_size == 56


@pytest.fixture(scope="module")
def large() -> bytes:
    """A photo of 12 megapixels with an odd side, as a JPEG."""
    image = Image.fromarray(photos.astronaut()[:384]).resize((4001, 3000), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_crops_of_a_reduced_photo_are_those_of_the_whole(large, factor):
    """With the same windows, which are as small as a reduction may make them."""
    whole, (reduced, scale) = decode(large), decode_reduced(large, lambda *_: factor)
    assert scale == (3000, 4001, factor)
    size = 3000 // factor // C._ROOM
    boxes = np.array([[0, 13, C._ROOM * size, C._ROOM * size]])
    mine = C.resize_by_kernel([reduced], boxes, size)
    twin = C.resize_by_kernel([whole], boxes * factor, size)
    difference = (mine - twin).abs() * 255
    assert difference.max() <= 2
    assert difference.mean() <= 0.2


SMALL = CropRecipe(global_size=56, local_size=28, local_count=3)


@given(st.integers(0, 2**40), st.integers(1, 6000), st.integers(1, 6000))
def test_a_reduction_is_the_largest_that_leaves_room(position, height, width):
    factor = C.reduction(SMALL, 3, position, height, width)
    size, room = np.array([[height, width]]), []
    for kind in C.KINDS:
        whole = draw_crops(SMALL, kind, 3, np.array([position]), size)
        drawn = draw_crops(SMALL, kind, 3, np.array([position]), size, np.array([factor]))
        assert (drawn.boxes == whole.boxes // factor).all()
        assert ((drawn.boxes[:, :2] + drawn.boxes[:, 2:]) * factor <= size).all()
        assert factor == 1 or (drawn.boxes[:, 2:] >= 4 * SMALL.size(kind)).all()
        room.append((whole.boxes[:, 2:] // (4 * SMALL.size(kind))).min())
    assert factor == 8 or min(room) < 2 * factor


def test_reductions_do_not_need_local_crops():
    assert C.reduction(CropRecipe(global_size=28, local_count=0), 0, 0, 3000, 4000) == 8
