import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import evidence


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Mosaics of stripes, the same lying, a chessboard and white."""
    monkeypatch.setattr(evidence, "REGIONS", 2)
    folders = evidence.Paths(*(tmp_path / name for name in ("train", "large", "mosaics")))
    folders.mosaics.mkdir()
    across = (np.arange(evidence.SIDE) // 8 % 2 * 255).astype(np.uint8)
    patterns = (across[None].repeat(128, 0), across[:, None].repeat(128, 1), across[None] ^ across[:, None])
    wholes = [np.stack([pattern] * 3, 2) for pattern in (*patterns, np.full_like(patterns[0], 255))]
    draw = np.random.default_rng(0)
    for kind in ("seen", "asked"):
        for number in range(3):
            picture, mask = evidence._mosaic(wholes, np.arange(4), False, draw)
            evidence._save(picture, folders.mosaics / f"{kind}-{number}.png")
            evidence._save(mask, folders.mosaics / f"{kind}-{number}-mask.png")
    return folders


def test_a_constant_knows_nothing(paths):
    def nothing(images):
        return torch.ones(len(images), 4), torch.ones(len(images), 8, 8, 4)

    found = evidence._dense(nothing, paths)
    assert found.figures["dense"] < 0.6
    assert len(found.items) == 3


def test_seen_and_asked_tiles_share_no_pixel():
    photo = torch.arange(512 * 512).view(512, 512)[None].repeat(3, 1, 1)
    seen, asked = map(evidence._quarters, evidence.quickstart.cut({"one": photo}, 128))
    pixels = [{int(n) for tile in tiles.images for n in tile[0].flatten()} for tiles in (seen, asked)]
    assert not pixels[0] & pixels[1]
    assert len(pixels[0]) == len(pixels[1]) == 512 * 512 // 2
    assert seen.images[0].shape == (3, 64, 64)


def test_grids_of_any_size_are_compared_on_the_same_pixels(paths):
    def perfect(side):
        masks = {kind: evidence._mosaics(paths, kind)[1] for kind in ("seen", "asked")}
        order = iter(("seen", "asked"))

        def look(images):
            step = 128 // side
            classes = masks[next(order)][:, step // 2 :: step, step // 2 :: step]
            return torch.zeros(len(images), 1), torch.nn.functional.one_hot(classes, 4).float()

        return look

    coarse, fine = (evidence._dense(perfect(side), paths).figures["dense"] for side in (4, 32))
    assert fine > 0.97
    assert coarse < fine


def test_an_untrained_backbone_is_measured_at_two_sizes(paths):
    backbone = evidence.untrained(evidence.recipe(0))
    assert torch.equal(backbone.pos_embed, evidence.untrained(evidence.recipe(0)).pos_embed)
    for size in (32, 48):
        assert 0 <= evidence.dense(backbone, size, paths).figures["dense"] <= 1


def test_paired_differences_have_both_intervals():
    items = torch.arange(40).double() / 40
    ours = [evidence.Measured({}, items + 0.1 + shift) for shift in (0.0, 0.01, 0.02)]
    found = evidence.paired(ours, [evidence.Measured({}, items)] * 3)
    assert found.mean == pytest.approx(0.11)
    # Student's t at 2 degrees of freedom: 4.303 · 0.01 / √3
    assert found.over_seeds == pytest.approx((0.11 - 0.02484, 0.11 + 0.02484), abs=1e-4)
    assert found.over_items == pytest.approx((0.11, 0.11))


def test_asked_pieces_are_gray():
    piece = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    changed = evidence._changed(piece, np.random.default_rng(1))
    assert (changed == changed[..., :1]).all()
    assert changed.dtype == np.uint8


def test_a_second_preparation_finds_the_files_there(tmp_path):
    (tmp_path / "done").touch()
    assert evidence.prepare(tmp_path).train == tmp_path / "train"
