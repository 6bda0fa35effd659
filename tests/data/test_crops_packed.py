"""Packed crops at twice the resolution, through Triton's interpreter where there is no GPU (see `test_kernels`)."""

import numpy as np
import pytest
import torch
from skimage import data as photos

from opsin.data.crops import CropRecipe, draw_crops, render
from opsin.data.packed import pack

pytest.importorskip("triton", reason="Triton comes with torch on Linux only")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made(recipe, images, dtype=torch.float32, scale=1):
    """By kernels from a packed buffer, and by `render`."""
    sizes = np.array([image.shape[1:] for image in images])
    drawn = draw_crops(recipe, "global", 3, np.arange(len(images)), sizes)
    one = pack(images, {"global": drawn})
    crops = one.on(one.buffer.to(DEVICE)).crops(recipe, "global", dtype, scale)
    return crops.cpu(), render(recipe, "global", images, drawn, dtype, scale)


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    photo = torch.from_numpy(photos.astronaut()).permute(2, 0, 1)
    return [photo[:, 60:90, 200:224], photo[:, 80:90, 180:216]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_crops_at_twice_the_resolution_are_renders(images, dtype):
    recipe = CropRecipe(global_size=8, blur=(1, 0.5, 0), solarize=(0.5, 0.5, 0), jitter=1)
    mine, twin = made(recipe, images, dtype, scale=2)
    assert mine.dtype == dtype
    assert mine.shape == (4, 3, 16, 16)
    tolerance = 3e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    assert ((mine.float() - twin.float()).abs() > tolerance).sum() <= 1  # one may lie at the threshold of solarize


def test_one_mean_stands_for_all_channels_of_packed_crops(images):
    recipe = CropRecipe(global_size=8, mean=(0.4,), std=(0.3,), solarize=(0, 0, 0))
    mine, twin = made(recipe, images[:1])
    assert (mine - twin).abs().max() < 3e-5
