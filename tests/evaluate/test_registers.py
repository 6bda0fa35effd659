"""What reads patches must skip the class token and every register: features on disk, pictures, attention."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from opsin import story
from opsin.backbone import weights
from opsin.backbone.features import FeatureExtractor, load
from opsin.backbone.registry import architecture
from opsin.backbone.vit import VisionTransformer
from opsin.cli import main
from opsin.data.decode import decode
from opsin.evaluate.transforms import Centre

REGISTERS = 3


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    arch = replace(architecture("vit_nano8"), depth=2, width=16, heads=2, grid=3, layerscale=1.0)
    made = VisionTransformer(replace(arch, registers=REGISTERS, position_offset=0.0, position_antialias=True)).eval()
    with torch.no_grad():
        made.register_tokens.normal_()  # registers of nearly 0 could be mistaken for nothing
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, shape in enumerate([(24, 24), (24, 40), (24, 24)]):
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def tokens(backbone: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """All tokens of the last block after the final norm `[B, N, D]`, seen from inside."""
    seen = []
    with torch.no_grad(), backbone.norm.register_forward_hook(lambda *call: seen.append(call[-1])):
        backbone([images])
    return seen[0].view(len(images), -1, backbone.arch.width)


def test_features_on_disk(backbone, photos, tmp_path):
    weights.save(backbone, tmp_path / "w.safetensors")
    out = tmp_path / "features.parquet"
    options = ["--weights", str(tmp_path / "w.safetensors"), "--data", str(photos), "--out", str(out), "--patches"]
    assert main(["features", *options, "--size", "24", "--device", "cpu"]) == 0
    rows = pq.read_table(out).to_pylist()
    assert [(row["rows"], row["columns"]) for row in rows] == [(3, 3), (3, 5), (3, 3)]
    extractor = load(tmp_path / "w.safetensors")
    for row in rows:
        all_tokens = tokens(extractor.backbone, extractor.preprocess(decode(photos / row["path"]), 24)[None])[0]
        assert len(all_tokens) == 1 + REGISTERS + row["rows"] * row["columns"]
        np.testing.assert_allclose(row["cls"], all_tokens[0], rtol=0, atol=1e-5)
        patches = np.array(row["patches"]).reshape(-1, 16)
        np.testing.assert_allclose(patches, all_tokens[1 + REGISTERS :], rtol=0, atol=1e-5)


def test_layers_packed_images_and_class_tokens(backbone):
    extractor = FeatureExtractor(backbone)
    images = [torch.randint(0, 256, (3, 24, width), dtype=torch.uint8) for width in (24, 40, 24)]
    for image, packed in zip(images, extractor.each(images, size=24), strict=True):
        expected = tokens(backbone, extractor.preprocess(image, 24)[None])
        (chosen,) = extractor.features(image, [-1], size=24)
        for found in (packed, chosen):
            together = torch.cat([found.cls[:, None], found.registers, found.patches.flatten(1, 2)], dim=1)
            assert found.registers.shape == (1, REGISTERS, 16)
            torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)
    (cls,) = story.class_tokens(images[:1], backbone, 16)
    wanted = tokens(backbone, Centre(16)(images[0])[None])[0, 0]
    torch.testing.assert_close(cls, wanted, rtol=0, atol=1e-5)


def test_attention_lists_the_class_token_then_registers_then_patches(backbone):
    images = torch.randn(2, 3, 16, 24)
    block = backbone.blocks[-1]
    entered = []
    with torch.no_grad(), block.register_forward_pre_hook(lambda _, given: entered.append(given[0])):
        backbone([images])
        attention = backbone.attention(images)
        x = block.norm1(entered[0]).view(2, 1 + REGISTERS + 6, 16)
        q, k, _ = block.attn.qkv(x).view(2, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        first_patch = 1 + REGISTERS
        row = torch.softmax(q[:, :, first_patch, None] @ k.mT / 8**0.5, dim=-1)[:, :, 0]
    assert attention.shape == (2, 2, 1 + REGISTERS + 6, 1 + REGISTERS + 6)
    torch.testing.assert_close(attention[:, :, first_patch], row, rtol=0, atol=1e-5)


def test_pictures_of_patches(backbone, tmp_path):
    images = [torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8) for _ in range(2)]
    pictures = story.patch_pictures(images, backbone, backbone, 24, tmp_path / "pca.safetensors")
    assert [len(row) for row in pictures["rows"]] == [3, 3]
    assert story.patch_norms(images, backbone, 48).shape == (2, 6, 6)
