import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from opsin.backbone import registry, weights
from opsin.backbone.features import FeatureExtractor, by_shape, evaluation_transform, load
from opsin.constants import IMAGENET_MEAN, IMAGENET_STD, normalisation
from opsin.errors import OpsinError

torch.set_num_threads(2)


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    return FeatureExtractor(registry.create("vit_nano8", layerscale=1.0))


def photo(h, w, seed=0):
    """Smooth with sharp edges, so that resizing errors show."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((w, h), Image.Resampling.BICUBIC))
    pixels[h // 3 : h // 2, w // 4 : w // 2] = generator.integers(0, 256, 3)
    return pixels


def as_tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


def denormalise(x):
    return x * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]


# ---- preprocessing


@pytest.mark.parametrize(
    ("h", "w", "size", "expected"),
    [
        (480, 640, 224, (224, 296)),  # 640 * 224 / 480 = 298.7, and 296 is the nearest multiple of 8
        (640, 480, 224, (296, 224)),
        (100, 100, 64, (64, 64)),
        (50, 500, 40, (40, 400)),
        (480, 640, 100, (104, 136)),
        (9, 9, 1, (8, 8)),
    ],
)
def test_size_keeps_the_aspect_and_fits_the_patch(extractor, h, w, size, expected):
    assert extractor.preprocess(as_tensor(photo(h, w)), size).shape == (3, *expected)


@settings(max_examples=50, deadline=None)
@given(h=st.integers(8, 400), w=st.integers(8, 400), size=st.integers(8, 160))
def test_sides_are_within_half_a_patch_of_the_aspect(extractor, h, w, size):
    sides = extractor.preprocess(torch.zeros(3, h, w, dtype=torch.uint8), size).shape[1:]
    for side, given_side in zip(sides, (h, w), strict=True):
        assert side % 8 == 0
        assert abs(side - given_side * size / min(h, w)) <= 4 + 1e-9


def test_pixels_match_torchvisions_antialiased_bicubic(extractor):
    pixels = photo(300, 420)
    prepared = extractor.preprocess(as_tensor(pixels), 96)
    expected = resize(as_tensor(pixels), list(prepared.shape[1:]), InterpolationMode.BICUBIC, antialias=True)
    difference = (denormalise(prepared) * 255 - expected).abs()
    assert difference.max() <= 2  # the peer rounds to 8 bits after each of its two passes
    assert difference.mean() <= 0.4


@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (300, 300), (123, 457), (60, 90)])
@pytest.mark.parametrize("size", [224, 64])
def test_evaluation_crop_matches_torchvision_on_pil(shape, size):
    pixels = photo(*shape)
    peer = transforms.Compose(
        [
            transforms.Resize(round(size * 256 / 224), InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    ours, theirs = evaluation_transform(as_tensor(pixels), size), peer(Image.fromarray(pixels))
    assert ours.shape == (3, size, size)
    difference = (denormalise(ours) - denormalise(theirs)).abs() * 255
    assert difference.max() <= (
        2 if min(shape) >= size else 4
    )  # enlarging overshoots, and Pillow clips after each pass
    assert difference.mean() <= 0.4


def test_pil_images_of_every_mode(extractor):
    pixels = photo(40, 56)
    rgb = Image.fromarray(pixels)
    expected = extractor.preprocess(as_tensor(pixels), 40)
    assert torch.equal(extractor.preprocess(rgb, 40), expected)
    alpha = np.random.default_rng(0).integers(0, 256, (40, 56, 1), dtype=np.uint8)
    veiled = Image.fromarray(np.concatenate([pixels, alpha], axis=2))
    on_white = (pixels * (alpha / 255) + 255 * (1 - alpha / 255)).round().astype(np.uint8)
    difference = extractor.preprocess(veiled, 40) - extractor.preprocess(as_tensor(on_white), 40)
    assert difference.abs().max() < 2 / 255 / 0.2
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV"):
        converted = rgb.convert(mode)
        same = as_tensor(np.array(converted.convert("RGB")))
        assert torch.equal(extractor.preprocess(converted, 40), extractor.preprocess(same, 40)), mode


def test_sixteen_bits_are_scaled_not_clipped(extractor):
    values = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29
    grey = torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, -1, -1)
    assert torch.equal(extractor.preprocess(Image.fromarray(values), 40), extractor.preprocess(grey, 40))
    with pytest.raises(OpsinError, match="mode I cannot be taken: 32-bit samples have no stated range"):
        extractor.preprocess(Image.fromarray(values.astype(np.int32)), 40)


def test_orientation_is_applied(extractor):
    pixels = photo(40, 80)
    turned = Image.fromarray(np.rot90(pixels).copy())
    turned.getexif()[0x0112] = 6  # shown turned by a quarter to the right
    assert torch.equal(extractor.preprocess(turned, 40), extractor.preprocess(as_tensor(pixels), 40))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 9, 9, dtype=torch.uint8), r"not torch.uint8 \[1, 9, 9\]"),
        (torch.zeros(3, 9, 9, dtype=torch.int64), r"not torch.int64 \[3, 9, 9\]"),
        (np.zeros((9, 9, 3), np.uint8), "not ndarray"),
        (Image.fromarray(np.zeros((9, 9), np.float32)), "mode F cannot be taken"),
    ],
)
def test_what_is_no_image(extractor, image, message):
    with pytest.raises(OpsinError, match=message):
        extractor.features([image])
    with pytest.raises(OpsinError, match="there are no images"):
        extractor.features([])
    with pytest.raises(OpsinError, match="size 0 is no number of pixels"):
        extractor.features(torch.zeros(3, 9, 9, dtype=torch.uint8), size=0)


# ---- other channels


@pytest.fixture(scope="module")
def multispectral():
    torch.manual_seed(0)
    return {
        channels: FeatureExtractor(registry.create("vit_nano8", depth=1, channels=channels)) for channels in (1, 4, 13)
    }


def test_normalisation_of_other_channels():
    assert normalisation(3) == (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = normalisation(1)
    assert mean == pytest.approx((0.449,))
    assert std == pytest.approx((0.226,))
    for channels in (2, 4, 13):
        for found, rgb in zip(normalisation(channels), (IMAGENET_MEAN, IMAGENET_STD), strict=True):
            assert found == (rgb * 5)[:channels]


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_every_type_of_sample_counts_the_same(multispectral, channels):
    generator = torch.Generator().manual_seed(0)
    eight = torch.randint(0, 256, (channels, 40, 56), generator=generator, dtype=torch.uint8)
    sixteen = (eight.int() * 257).to(torch.uint16)
    shares = eight / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in normalisation(channels))
    expected = resize(shares, [24, 32], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    prepared = multispectral[channels].preprocess(eight, 24)
    assert prepared.shape == (channels, 24, 32)
    torch.testing.assert_close(prepared * std + mean, expected, rtol=0, atol=1e-5)
    for image in (sixteen, shares, shares.double()):
        torch.testing.assert_close(multispectral[channels].preprocess(image, 24), prepared, rtol=0, atol=1e-5)
        cropped = evaluation_transform(image, 24)
        assert cropped.shape == (channels, 24, 24)
        torch.testing.assert_close(cropped, evaluation_transform(eight, 24), rtol=0, atol=1e-5)
    assert multispectral[channels].features([sixteen]).cls.isfinite().all()


def test_the_low_byte_of_sixteen_bits_counts(multispectral):
    flat = torch.full((1, 24, 24), 20000, dtype=torch.uint16)
    more = torch.full((1, 24, 24), 20001, dtype=torch.uint16)
    difference = multispectral[1].preprocess(more, 24) - multispectral[1].preprocess(flat, 24)
    torch.testing.assert_close(
        difference * normalisation(1)[1][0] * 65535, torch.ones_like(difference), rtol=0, atol=0.02
    )


def test_pil_images_of_other_channels(multispectral):
    pixels = photo(40, 56)
    rgb = Image.fromarray(pixels)
    gray = torch.from_numpy(np.array(rgb.convert("L")))[None]
    assert torch.equal(multispectral[1].preprocess(rgb, 40), multispectral[1].preprocess(gray, 40))
    values = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29
    expected = multispectral[1].preprocess(torch.from_numpy(values)[None], 40)
    assert torch.equal(multispectral[1].preprocess(Image.fromarray(values), 40), expected)
    rgba = np.concatenate([pixels, pixels[..., :1]], axis=2)
    assert torch.equal(
        multispectral[4].preprocess(Image.fromarray(rgba), 40), multispectral[4].preprocess(as_tensor(rgba), 40)
    )
    for channels in (4, 13):
        with pytest.raises(
            OpsinError, match=rf"mode RGB cannot be taken: it has 3 bands \(RGB\), and {channels} are asked"
        ):
            multispectral[channels].preprocess(rgb)


def test_images_of_a_wrong_range_or_number_of_channels(multispectral):
    with pytest.raises(OpsinError, match=r"a tensor \[13, H, W\] .* not torch.uint8 \[3, 9, 9\]"):
        multispectral[13].preprocess(torch.zeros(3, 9, 9, dtype=torch.uint8))
    for wrong in (255.0, -1.0, torch.nan):
        image = torch.zeros(13, 9, 9)
        image[12, 8, 8] = wrong
        with pytest.raises(OpsinError, match="a float image must have values from 0 to 1, and these go from"):
            multispectral[13].preprocess(image)


# ---- features


def test_one_image_a_list_and_a_batch_agree(extractor):
    images = [as_tensor(photo(64, 64, seed)) for seed in range(3)]
    batch = torch.stack([extractor.preprocess(image, 64) for image in images])
    features = extractor.features(batch)
    assert features.cls.shape == (3, 128)
    assert features.registers.shape == (3, 0, 128)
    assert features.patches.shape == (3, 8, 8, 128)
    for given_images in (images, torch.stack(images), [Image.fromarray(photo(64, 64, seed)) for seed in range(3)]):
        assert torch.equal(extractor.features(given_images, size=64).patches, features.patches)
    torch.testing.assert_close(extractor.features(images[1], size=64).cls, features.cls[1:2])
    assert not torch.allclose(features.cls[0], features.cls[1])


def test_chosen_layers(extractor):
    batch = torch.randn(2, 3, 32, 40)
    last, first = extractor.features(batch, layers=[-1, 0])
    assert torch.equal(last.cls, extractor.features(batch).cls)
    raw = extractor.features(batch, layers=[0], normalise=False)[0]
    assert torch.equal(extractor.backbone.norm(raw.patches), first.patches)


def test_images_of_different_shapes_come_out_one_by_one(extractor):
    shapes = [(64, 64), (64, 96), (90, 64), (64, 64)]
    images = [as_tensor(photo(h, w, seed)) for seed, (h, w) in enumerate(shapes)]
    with pytest.raises(OpsinError, match=r"come out at 3 sizes \(64×64, 64×96, 88×64…\).*use each\(images\)"):
        extractor.features(images, size=64)
    for image, features in zip(images, extractor.each(images, size=64), strict=True):
        alone = extractor.features(image, size=64)
        for together, separate in zip(features, alone, strict=True):
            torch.testing.assert_close(together, separate, rtol=0, atol=1e-5)


def test_features_can_train_a_head(extractor):
    head = torch.nn.Linear(128, 2)
    head(extractor.features(torch.randn(2, 3, 16, 16)).cls).sum().backward()
    assert head.weight.grad is not None
    assert extractor.backbone.cls_token.grad is None
    assert not extractor.backbone.training


def test_features_are_fp32_in_every_precision(extractor):
    image = as_tensor(photo(40, 56))
    half = FeatureExtractor(extractor.backbone, precision="bf16")
    assert half.dtype == half.backbone.norm.weight.dtype == torch.bfloat16
    assert extractor.dtype == extractor.backbone.norm.weight.dtype == torch.float32  # a copy was converted
    prepared = extractor.preprocess(image, 40)
    (expected,) = half.backbone([prepared[None].bfloat16()])
    for features in (half.features(image, size=40), half.each([image], size=40)[0], half.features(image, [-1])[0]):
        assert all(tensor.dtype == torch.float32 for tensor in features)
    assert torch.equal(half.features(image, size=40).cls, expected.cls.float())
    assert not torch.equal(half.features(image, size=40).cls, extractor.features(image, size=40).cls)
    double = FeatureExtractor(registry.create("vit_nano8", depth=1).double())
    assert double.features(image, size=40).cls.dtype == torch.float64


def test_a_precision_that_the_weights_have_costs_no_copy(extractor):
    assert FeatureExtractor(extractor.backbone, precision="fp32").backbone is extractor.backbone
    half = registry.create("vit_nano8", depth=1).bfloat16()
    assert FeatureExtractor(half).backbone is FeatureExtractor(half, precision="bf16").backbone is half


def test_a_precision_that_cannot_be(extractor):
    with pytest.raises(OpsinError, match="unknown precision 'bf61': did you mean 'bf16'"):
        FeatureExtractor(extractor.backbone, precision="bf61")
    with pytest.raises(OpsinError, match=r"fp16 is for GPUs, .* slower than fp32: choose fp32 or bf16"):
        FeatureExtractor(extractor.backbone, precision="fp16")


@pytest.mark.parametrize("scale", [1, 20])
def test_half_precision_is_as_near_as_the_docstring_says(scale):
    torch.manual_seed(0)
    full = FeatureExtractor(registry.create("dinov2_vits14", layerscale=1.0))
    with torch.no_grad():  # rough positions and input, which the initial weights are not
        full.backbone.pos_embed.mul_(scale)
    half = FeatureExtractor(full.backbone, precision="bf16")
    images = [as_tensor(photo(240, 240, seed)) for seed in range(2)]
    for one, other in zip(full.features(images), half.features(images), strict=True):
        assert (F.cosine_similarity(one, other, dim=-1) > 0.999).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_gives_what_a_processor_gives(extractor, precision):
    images = [as_tensor(photo(40, 56, seed)) for seed in range(3)]
    on_gpu = FeatureExtractor(copy.deepcopy(extractor.backbone).cuda(), precision=precision)
    for one, other in zip(extractor.features(images, size=40), on_gpu.features(images, size=40), strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other.cpu(), one, rtol=0, atol=2e-2 if precision == "fp32" else 0.1)


# ---- grouping


def test_by_shape_names_every_image_once():
    shapes = [(2, 3), (3, 2), (2, 3), (4, 4), (3, 2)]
    assert by_shape([torch.zeros(3, *shape) for shape in shapes]) == [[0, 2], [1, 4], [3]]
    assert by_shape([]) == []


# ---- load


def test_load_by_name_and_by_path(tmp_path, capsys):
    source, path = registry.create("vit_nano8"), tmp_path / "w.safetensors"
    weights.save(source, path)
    for extractor in (load("vit_nano8", path), load(path), load(str(path)), load("vit_nano8", str(path), device="cpu")):
        assert torch.equal(extractor.backbone.mask_token, source.mask_token)
        assert extractor.backbone.arch == source.arch
        assert len(extractor.report.matched) == len(source.state_dict())
        assert extractor.device.type == "cpu"
    assert capsys.readouterr().out == ""


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(OpsinError, match="'dinov2_vits14' names an architecture and weights are not downloaded: pass"):
        load("dinov2_vits14")
    with pytest.raises(OpsinError, match=r"no such file or folder\) 'dinov2_vits4': did you mean 'dinov2_vits14'"):
        load("dinov2_vits4")
    path = tmp_path / "w.safetensors"
    weights.save(registry.create("vit_nano8", depth=1), path)
    with pytest.raises(OpsinError, match="weights are given twice"):
        load(path, path)
    with pytest.raises(OpsinError, match=r"depth 1 \(model: 4\)"):
        load("vit_nano8", path)
    with pytest.raises(OpsinError, match="there is no weights file"):
        load("vit_nano8", tmp_path / "none")
