"""The linear segmentation head: the reference's outputs from the release's file format, its loss, its own files."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from opsin.errors import OpsinError
from opsin.evaluate.segmentation_head import IGNORED, SegmentationHead, load_head, pixel_loss, save_head, stretched


def released(path, channels, classes, seed=0):
    """A file as the official release has them, of random tensors."""
    rng = torch.Generator().manual_seed(seed)
    state = {
        "decode_head.bn.weight": torch.rand(channels, generator=rng) + 0.5,
        "decode_head.bn.bias": torch.randn(channels, generator=rng),
        "decode_head.bn.running_mean": torch.randn(channels, generator=rng),
        "decode_head.bn.running_var": torch.rand(channels, generator=rng) + 0.1,
        "decode_head.bn.num_batches_tracked": torch.tensor(40000),
        "decode_head.conv_seg.weight": torch.randn(classes, channels, 1, 1, generator=rng),
        "decode_head.conv_seg.bias": torch.randn(classes, generator=rng),
    }
    torch.save({"meta": {"mmcv_version": "1.5.0", "iter": 40000}, "state_dict": state}, path)
    return state


class ReferenceHead(nn.Module):
    """The toolbox's head, written down independently: layers as maps, resized to the first, normalised, mixed."""

    def __init__(self, state):
        super().__init__()
        self.state = {name.removeprefix("decode_head."): value for name, value in state.items()}

    def forward(self, maps, size):
        joint = torch.cat(
            [F.interpolate(one, maps[0].shape[2:], mode="bilinear", align_corners=False) for one in maps], dim=1
        )
        s = self.state
        shape = (1, -1, 1, 1)
        joint = (joint - s["bn.running_mean"].view(shape)) / (s["bn.running_var"].view(shape) + 1e-5).sqrt()
        joint = joint * s["bn.weight"].view(shape) + s["bn.bias"].view(shape)
        mixed = torch.einsum("bchw,kc->bkhw", joint, s["conv_seg.weight"][:, :, 0, 0])
        mixed = mixed + s["conv_seg.bias"].view(shape)
        return F.interpolate(mixed, size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_released_head_gives_what_the_reference_gives(model, tmp_path, blocks):
    path = tmp_path / "dinov2_vits14_ade20k_linear_head.pth"
    state = released(path, 24 * blocks, 7)
    head = load_head(path, 24, 4)
    assert (head.blocks, head.classes, head.training) == (blocks, 7, False)
    images = torch.randn(3, 3, 21, 38)  # no multiples of 8: the reference pads 1.5 rows and 1 column on each side
    padded = F.pad(images, (1, 1, 1, 2))
    layers = model.backbone.layers(padded, list(range(4 - blocks, 4)))
    maps = [layer.patches.detach().permute(0, 3, 1, 2) for layer in layers]
    assert maps[0].shape[2:] == (3, 5)
    wanted = ReferenceHead(state)(maps, (21, 38))
    with torch.no_grad():
        torch.testing.assert_close(stretched(head.score(model, images, 2), 21, 38), wanted, atol=1e-4, rtol=1e-4)


def test_our_file_is_the_head(model, tmp_path):
    head = SegmentationHead(24, 2, 5, seed=3)
    head(torch.randn(4, 48, 3, 3))  # which moves the running statistics
    save_head(head, tmp_path / "heads" / "mine.safetensors")
    again = load_head(tmp_path / "heads" / "mine.safetensors", 24, 4)
    assert again.blocks == 2
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_first_weights_are_decided_by_the_seed():
    one, same, other = (SegmentationHead(24, 1, 500, seed=seed).conv_seg for seed in (1, 1, 2))
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert 0.0095 < one.weight.std() < 0.0105
    assert not one.bias.any()


def test_statistics_are_of_all_images_however_many_the_backbone_takes(model):
    images = torch.randn(5, 3, 16, 16)
    head = SegmentationHead(24, 1, 3)
    torch.testing.assert_close(head.score(model, images, 2), head.score(model, images, 5), atol=1e-6, rtol=1e-5)


def test_the_loss_is_the_mean_over_all_pixels_with_ignored_ones_as_zero():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 2, 3, requires_grad=True)
    targets = torch.randint(4, (3, 9, 10))
    targets[torch.rand(3, 9, 10) < 0.3] = IGNORED
    loss = pixel_loss(logits, targets)
    full = F.interpolate(logits, (9, 10), mode="bilinear", align_corners=False)
    each = F.cross_entropy(full, targets.clamp(min=0), reduction="none") * (targets != IGNORED)
    torch.testing.assert_close(loss, each.mean())
    (wanted,) = torch.autograd.grad(each.mean(), logits, retain_graph=True)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, wanted)
    assert pixel_loss(logits, torch.full((3, 9, 10), IGNORED)) == 0


def test_what_is_no_head_is_one_sentence(tmp_path):
    with pytest.raises(OpsinError, match=r"there is no file .*give --head"):
        load_head(tmp_path / "none.pth", 24, 4)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(OpsinError, match=r"cannot be read as a segmentation head"):
            load_head(tmp_path / name, 24, 4)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(OpsinError, match=r"is no linear segmentation head, it has no bn\.bias"):
        load_head(tmp_path / "list.pth", 24, 4)
    torch.save({"state_dict": {"decode_head.conv_depth.weight": torch.zeros(2)}}, tmp_path / "depth.pth")
    with pytest.raises(OpsinError, match=r"is no linear segmentation head, it has no bn\.bias"):
        load_head(tmp_path / "depth.pth", 24, 4)
    state = SegmentationHead(24, 1, 5).state_dict()
    save_file({**state, "conv_seg.weight": torch.zeros(5, 24)}, tmp_path / "flat.safetensors")
    with pytest.raises(OpsinError, match=r"no linear segmentation head, conv_seg.weight is \[5, 24\]"):
        load_head(tmp_path / "flat.safetensors", 24, 4)
    save_file({**state, "bn.bias": torch.zeros(23)}, tmp_path / "short.safetensors")
    with pytest.raises(OpsinError, match=r"is damaged: size mismatch for bn.bias.*Get the file again"):
        load_head(tmp_path / "short.safetensors", 24, 4)


@pytest.mark.parametrize("channels", [25, 12, 120])
def test_a_head_of_another_backbone(tmp_path, channels):
    released(tmp_path / "head.pth", channels, 3)
    with pytest.raises(OpsinError, match=rf"a head on {channels} features per patch, and this backbone has 24 in each"):
        load_head(tmp_path / "head.pth", 24, 4)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OpsinError, match=r"cannot write the head .*--save-head"):
        save_head(SegmentationHead(24, 1, 2), tmp_path / "file" / "head.safetensors")
