"""What pictures of patch features are made of: colours in one basis, attention, similarity, matches."""

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import images_in, small

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError
from opsin.evaluate.maps import Look, attention, images_of, joint_pca, look, matches, patch_at, patches, similarity
from opsin.evaluate.model import wrap


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "registers"])
def model(request):
    torch.manual_seed(0)
    return wrap(
        VisionTransformer(
            Architecture(width=24, depth=3, heads=2, patch=8, grid=4, layerscale=0.1, registers=request.param)
        )
    )


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(skimage.data.astronaut()[:300, :400]).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_an_image_is_shown_as_the_backbone_sees_it(model, photo):
    seen = look(model, photo, 48)
    assert seen.pixels.shape == (48, 64, 3)
    whole = np.asarray(Image.open(photo).resize((64, 48), Image.Resampling.BICUBIC))
    assert np.abs(seen.pixels.astype(int) - whole).mean() < 1
    assert patches(model, seen).shape == (6, 8, 24)


def test_attention_is_a_share_of_one(model, photo):
    seen, registers = look(model, photo, 48), model.arch.registers
    heads = attention(model, seen, layer=1)
    assert heads.shape == (2, 6, 8)
    # the twin: queries and keys by hand
    with torch.no_grad():
        before = model.backbone.layers(seen.batch, [0], normalise=False)[0]
        tokens = torch.cat([before.cls[:, None], before.registers, before.patches.flatten(1, 2)], 1)[0]
        block = model.backbone.blocks[1]
        q, k, _ = block.attn.qkv(block.norm1(tokens)).view(-1, 3, 2, 12).permute(1, 2, 0, 3)
        wanted = torch.softmax(q @ k.transpose(1, 2) / 12**0.5, -1)
    torch.testing.assert_close(heads.flatten(1), wanted[:, 0, 1 + registers :], atol=1e-5, rtol=1e-4)
    if registers:
        torch.testing.assert_close(
            attention(model, seen, 1, register=1).flatten(1), wanted[:, 2, 3:], atol=1e-5, rtol=1e-4
        )
    with pytest.raises(OpsinError, match="there is no register 2"):
        attention(model, seen, register=2)
    with pytest.raises(OpsinError, match="there is no layer 7"):
        attention(model, seen, layer=7)


def test_pca_has_one_basis_for_all_images(tmp_path):
    rng = torch.Generator().manual_seed(0)
    grids = [torch.randn(5, 6, 12, generator=rng) for _ in range(2)]
    basis, colours = joint_pca(grids)
    assert [colour.shape for colour in colours] == [(5, 6, 3)] * 2
    assert not np.allclose(joint_pca(grids[:1])[1][0], colours[0])
    again, same = joint_pca(grids[:1], basis)
    assert again is basis
    assert np.array_equal(same[0], colours[0])


@given(st.floats(0, 1), st.floats(0, 1))
def test_every_point_has_its_patch(x, y):
    class Seen:
        pixels = np.zeros((24, 40, 3))

    row, column = patch_at(Seen, x, y, 8)
    assert row <= y * 3 <= row + 1
    assert column <= x * 5 <= column + 1


def test_a_point_outside(model, photo):
    with pytest.raises(OpsinError, match="outside the image"):
        patch_at(look(model, photo, 48), 1.2, 0.5, 8)


def test_similarity_is_the_cosine():
    rng = torch.Generator().manual_seed(0)
    grid, other = torch.randn(3, 4, 8, generator=rng), torch.randn(2, 2, 8, generator=rng)
    own, theirs = similarity(grid, (1, 2), [grid, other])
    assert own[1, 2] == pytest.approx(1)
    wanted = torch.nn.functional.cosine_similarity(other[0, 1], grid[1, 2], dim=0)
    assert theirs[0, 1] == pytest.approx(wanted.item(), abs=1e-6)


def test_matches_find_a_shifted_object():
    rng = torch.Generator().manual_seed(0)
    background, thing = torch.zeros(16), torch.randn(4, 4, 16, generator=rng) + 3
    first, second = (background + 0.01 * torch.randn(12, 12, 16, generator=rng) for _ in range(2))
    first[2:6, 2:6], second[5:9, 7:11] = thing, thing
    found = matches(first, second, radius=0)
    assert len(found) == 16
    assert all((b[0] - a[0], b[1] - a[1]) == (3, 5) for a, b, _ in found)
    assert [match.distance for match in found] == sorted(match.distance for match in found)
    sparse = matches(first, second, radius=2)
    places = np.array([match.first for match in sparse])
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 9 * np.eye(len(places))
    assert 1 < len(sparse) < 16
    assert apart.min() > 2
    assert len(matches(first, second, radius=0, limit=3)) == 3


def test_images_of_a_file_a_folder_and_shards(photo, tmp_path):
    assert images_of(str(photo), 5) == [photo]
    for i in range(7):
        (tmp_path / f"more{i}.png").write_bytes(photo.read_bytes())
    assert len(images_of(str(tmp_path), 3)) == 3
    with pytest.raises(OpsinError, match="no data at"):
        images_of(str(tmp_path / "nothing"), 3)


def test_images_are_spread_over_the_data(tmp_path):
    images_in(tmp_path, {"a": 9})
    assert [path.name for path in images_of(str(tmp_path), 3)] == ["0.png", "3.png", "6.png"]


def test_the_attention_of_a_register_is_its_row():
    model, batch = small(registers=2), torch.randn(1, 3, 16, 24)
    look = Look(np.zeros((16, 24, 3), dtype=np.uint8), batch)
    for register, row in ((None, 0), (0, 1), (1, 2)):
        wanted = model.backbone.attention(batch, -1)[0, :, row, 3:].reshape(-1, 2, 3)
        torch.testing.assert_close(attention(model, look, -1, register), wanted.detach())
