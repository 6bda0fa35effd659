import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from opsin.curate.copies import KINDS, copy_of, measure
from opsin.errors import OpsinError


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    from skimage import data

    return torch.from_numpy(np.array(Image.fromarray(data.astronaut()).resize((200, 160)))).permute(2, 0, 1)


def copies(photo, kind, count=12):
    return [copy_of(photo, kind, 0, number) for number in range(count)]


def array(pixels):
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_depends_on_kind_seed_and_number_alone(photo, kind):
    first = copies(photo, kind, 6)
    torch.manual_seed(5)
    again = [copy_of(photo.clone(), kind, 0, number) for number in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(copy.dtype == torch.uint8 and copy.ndim == 3 and len(copy) == 3 for copy in first)
    if kind != "flipped":
        assert not all(torch.equal(first[0], other) for other in first[1:])
        assert not torch.equal(first[0], copy_of(photo, kind, 1, 0))


def test_the_picture_itself_is_left_alone(photo):
    before = photo.clone()
    for kind in KINDS:
        copies(photo, kind, 3)
    assert torch.equal(photo, before)


@pytest.mark.parametrize(("kind", "lowest"), [("recompressed", 24), ("format", 27)])
def test_recoded_copies_differ_a_little_everywhere(photo, kind, lowest):
    for copy in copies(photo, kind):
        assert copy.shape == photo.shape
        assert lowest < peak_signal_noise_ratio(array(photo), array(copy)) < 45


def test_resized_copies_have_a_share_of_both_sides(photo):
    shares = [copy.shape[1] / photo.shape[1] for copy in copies(photo, "resized", 40)]
    assert min(shares) >= 0.24
    assert max(shares) <= 0.71
    assert max(shares) - min(shares) > 0.3
    assert all(abs(copy.shape[2] / copy.shape[1] - 200 / 160) < 0.05 for copy in copies(photo, "resized"))


def test_cropped_copies_are_rectangles_of_the_picture(photo):
    shares = []
    for number, copy in enumerate(copies(photo, "cropped", 40)):
        height, width = copy.shape[1:]
        shares.append(height * width / (200 * 160))
        if number >= 5:
            continue
        windows = photo.unfold(1, height, 1).unfold(2, width, 1)
        assert (windows == copy[:, None, None]).all(-1).all(-1).all(0).any()
    assert 0.58 < min(shares) < 0.7
    assert 0.8 < max(shares) < 0.92


def test_flipped(photo):
    assert torch.equal(copy_of(photo, "flipped", 0, 0), photo.flip(2))


def test_colours_change_and_edges_stay(photo):
    gray = [np.asarray(Image.fromarray(array(x)).convert("L")) for x in (photo, *copies(photo, "colour"))]
    for copy, luma in zip(copies(photo, "colour"), gray[1:], strict=True):
        assert copy.shape == photo.shape
        assert (copy.float() - photo.float()).abs().mean() > 3
        assert structural_similarity(gray[0], luma) > 0.6


def test_text_covers_a_part(photo):
    for copy in copies(photo, "text"):
        changed = (copy != photo).any(0).float().mean()
        assert 0.0003 < changed < 0.15


def test_strong_copies_differ_much_and_are_of_many_shapes(photo):
    made = copies(photo, "strong", 30)
    assert len({copy.shape for copy in made}) > 20
    small = [Image.fromarray(array(x)).resize((32, 32)) for x in (photo, *made)]
    assert np.mean([np.abs(np.asarray(small[0], float) - np.asarray(x, float)).mean() for x in small[1:]]) > 20


@settings(max_examples=40)
@given(st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 2**31))
def test_any_image_has_copies(kind, height, width, number, seed):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))
    copy = copy_of(pixels, kind, seed, number)
    assert copy.dtype == torch.uint8
    assert min(copy.shape) >= 1


def test_unknown_kind(photo):
    with pytest.raises(OpsinError, match="unknown kind of copy 'crop': did you mean 'cropped'"):
        copy_of(photo, "crop", 0, 0)


def test_measure_finds_the_lowest_threshold_by_brute_force():
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(20, 6), dim=-1)
    copies = torch.nn.functional.normalize(images[:, None] + 0.3 * torch.randn(20, 3, 6), dim=-1)
    vectors = torch.cat([images[:, None], copies], dim=1)
    kinds = [["resized", "text", "strong"]] * 20
    found = measure(vectors, kinds, 0.8)
    cosines = torch.einsum("nvd,md->nvm", copies, images)
    own = torch.eye(20, dtype=torch.bool)[:, None].expand(-1, 3, -1)
    good = [
        (t, (cosines[own] >= t).float().mean().item())
        for t in cosines[own].tolist()
        if (own & (cosines >= t)).sum() / (cosines >= t).sum() >= 0.8
    ]
    threshold, recall = min(good)
    assert found["threshold"] == pytest.approx(threshold, abs=1e-6)
    assert found["recall"] == pytest.approx(recall)
    assert np.mean(list(found["kinds"].values())) == pytest.approx(recall)
    assert found["first"] == pytest.approx((cosines.argmax(2) == torch.arange(20)[:, None]).float().mean().item())


def test_measure_where_no_threshold_will_do():
    vectors = torch.ones(10, 2, 1)
    found = measure(vectors, [["text"]] * 10, 0.9)
    assert (found["threshold"], found["recall"], found["kinds"]) == (1.0, 0.0, {"text": 0.0})
