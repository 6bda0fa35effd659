import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from opsin.backbone import registry, weights
from opsin.curate.embedders import BackboneEmbedder, HeadEmbedder, load_embedder
from opsin.curate.heads import KIND, About, CopyHead, read_head, save_head, tokens
from opsin.errors import OpsinError

SIZE = 24


class Network(nn.Module):
    """A small copy-detection network with a foretold width."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=2)
        self.out = nn.Linear(8, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.out(self.conv(x).mean((2, 3))), dim=-1)


class Returns(nn.Module):
    """A network that gives something else than vectors."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor):
        flat = x.mean((2, 3))
        return {
            "map": x,
            "list": [flat],
            "one": flat.mean(0, keepdim=True),
            "nan": flat * torch.nan,
            "width": x.new_ones(len(x), len(x)),
        }[self.what]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8))


def expected(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return network((batch / 255 - mean) / std)


def save_backbone(path: Path, seed: int = 0, **changes) -> Path:
    torch.manual_seed(seed)
    net = registry.create("vit_nano8", **{"depth": 3, "width": 32, "heads": 2, "grid": 3, "layerscale": 1.0} | changes)
    net.init_weights()
    weights.save(net, path)
    return path


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


def head_over(path: Path, backbone: Path, layers: tuple[int, ...] = (-2, -1)) -> Path:
    torch.manual_seed(1)
    embedder = load_embedder(backbone, size=SIZE)
    inputs = 2 * len(layers) * embedder.width
    head = CopyHead(inputs, 5, 16, 7)
    head.whiten.normal_()
    save_head(path, head, About(embedder.fingerprint, str(backbone), None, SIZE, layers, inputs, 5, 16, 7, 0.4))
    return path


@pytest.fixture(scope="module")
def head(backbone):
    return head_over(backbone.with_name("head.safetensors"), backbone)


def save_torchscript(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(path)
    return path


def save_scripted_trace(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, torch.zeros(2, 3, 32, 32)).save(path)
    return path


def save_exported(network: nn.Module, path: Path) -> Path:
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=shapes), path)
    return path


def save_onnx(path: Path, channels: int = 3) -> Path:
    """The mean of every channel, built by hand: torch's exporter needs a package that is not installed."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, 32, 32])
    out = onnx.helper.make_tensor_value_info("vector", onnx.TensorProto.FLOAT, ["batch", 3])
    node = onnx.helper.make_node("ReduceMean", ["image"], ["vector"], axes=[2, 3], keepdims=0)
    graph = onnx.helper.make_graph([node], "mean", [image], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("save", [save_torchscript, save_scripted_trace, save_exported])
@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".anything"])
def test_networks_of_others(network, batch, tmp_path, save, suffix):
    path = save(network, tmp_path / f"network{suffix}")
    embedder = load_embedder(path, size=32, copy_detector=True)
    assert (embedder.size, embedder.width, embedder.copy_detector) == (32, 6, True)
    torch.testing.assert_close(embedder(batch), expected(network, batch))
    torch.testing.assert_close(embedder(batch[:1]), expected(network, batch[:1]))
    assert embedder.fingerprint == load_embedder(path, size=32).fingerprint
    assert load_embedder(path, size=32).copy_detector is False


def test_onnx(batch, tmp_path):
    embedder = load_embedder(save_onnx(tmp_path / "mean.onnx"))
    assert (embedder.size, embedder.width) == (32, 3)  # the file says which size
    torch.testing.assert_close(embedder(batch), expected(nn.Identity(), batch).mean((2, 3)))
    assert len(embedder(batch[:1])) == 1
    with pytest.raises(OpsinError, match=r"does not take images .*give the size it was made for"):
        load_embedder(tmp_path / "mean.onnx", size=40)


def test_onnx_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(OpsinError, match=r"onnxruntime is missing: pip install 'opsin\[onnx\]'"):
        load_embedder(tmp_path / "a.onnx")


def test_a_module(network, batch):
    embedder = load_embedder(network, size=32)
    torch.testing.assert_close(embedder(batch), expected(network, batch))
    torch.manual_seed(1)
    assert embedder.fingerprint != load_embedder(Network().eval(), size=32).fingerprint
    assert load_embedder(network).size == 288


def test_a_backbone(backbone, batch):
    embedder = load_embedder(backbone, size=32)
    assert isinstance(embedder, BackboneEmbedder)
    assert (embedder.width, embedder.copy_detector) == (32, False)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    cls = embedder.extractor.features((batch / 255 - mean) / std).cls
    torch.testing.assert_close(embedder(batch), cls)
    half = load_embedder(backbone, size=32, precision="bf16")
    assert half.fingerprint == embedder.fingerprint  # of the weights, not of what is made of them
    assert half(batch).dtype == torch.float32
    assert torch.cosine_similarity(half(batch), cls).min() > 0.99
    other = load_embedder(save_backbone(backbone.with_name("other.safetensors"), seed=1), size=32)
    assert other.fingerprint != embedder.fingerprint


def test_a_backbone_by_its_architecture(tmp_path):
    net = registry.create("dinov2_vits14")
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    embedder = load_embedder(tmp_path / "weights.pth", "dinov2_vits14", size=28)
    assert embedder.width == 384
    assert load_embedder(tmp_path / "weights.pth", size=28).width == 384


def test_the_whole_image_is_seen_in_a_square(backbone):
    embedder = load_embedder(backbone, size=SIZE)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (40, 90, 3), dtype=np.uint8)
    square = embedder.prepare(torch.from_numpy(pixels).permute(2, 0, 1))
    oracle = np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert square.dtype == torch.uint8
    assert np.abs(square.numpy().astype(int) - oracle).max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "by"), [(47, 900, 1), (96, 100, 2), (95, 400, 1), (500, 384, 8), (1, 1, 1)]
)
def test_reductions_leave_twice_the_size(backbone, height, width, by):
    assert load_embedder(backbone, size=SIZE).reduction(height, width) == by


def test_a_head(head, backbone, batch):
    small = batch[..., :SIZE, :SIZE]
    embedder = load_embedder(head)
    assert isinstance(embedder, HeadEmbedder)
    assert (embedder.size, embedder.width, embedder.copy_detector) == (SIZE, 7, True)
    features = load_embedder(backbone, size=SIZE).features(small, (-2, -1))
    inputs = torch.cat([t for f in features for t in (f.cls, f.patches.mean((1, 2)))], 1)
    torch.testing.assert_close(tokens(features), inputs)
    torch.testing.assert_close(embedder(small), read_head(head)[0](inputs))
    torch.testing.assert_close(embedder(small).norm(dim=1), torch.ones(5))
    assert load_embedder(head, size=32).size == 32


def test_a_head_uses_a_backbone_that_is_loaded(head, backbone, tmp_path):
    same = load_embedder(backbone, size=SIZE)
    assert load_embedder(head, backbone=same).backbone is same
    larger = load_embedder(backbone, size=32)
    assert load_embedder(head, backbone=larger).backbone is not larger


def test_a_head_over_another_backbone_is_refused(head, backbone, tmp_path):
    path = save_backbone(tmp_path / "backbone.safetensors")
    own = head_over(tmp_path / "head.safetensors", path)
    save_backbone(path, seed=5)
    with pytest.raises(OpsinError, match="was trained over another backbone"):
        load_embedder(own)
    path.unlink()
    with pytest.raises(OpsinError, match=r"a head over the backbone .*, which is gone"):
        load_embedder(own)
    assert load_embedder(own, backbone=load_embedder(backbone, size=SIZE)).width == 7


@pytest.mark.parametrize("change", ["header", "format", "field", "shape", "missing", "nan"])
def test_a_damaged_head(head, tmp_path, change):
    state, about = load_file(head), {"format": 1, **vars(read_head(head)[1])}
    if change == "format":
        about["format"] = 2
    elif change == "field":
        about["colour"] = 1
    elif change == "shape":
        about["width"] = 8
    elif change == "missing":
        del state["mean"]
    elif change == "nan":
        state["mean"][0] = torch.nan
    save_file(state, tmp_path / "a", {KIND: "[" if change == "header" else json.dumps(about)})
    message = {"format": "upgrade Opsin", "nan": "NaN or infinite"}.get(change, "no head of fit-copies, or damaged")
    with pytest.raises(OpsinError, match=message):
        load_embedder(tmp_path / "a")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("map", r"gives a tensor \[2, 3, 16, 16\] .*not vectors \[2, D\]"),
        ("list", "gives a list"),
        ("one", r"gives a tensor \[1, 3\]"),
        ("nan", "gives NaN or infinite numbers"),
    ],
)
def test_networks_that_give_no_vectors(what, message):
    with pytest.raises(OpsinError, match=message):
        load_embedder(Returns(what), size=16)


def test_a_network_of_changing_width(batch):
    embedder = load_embedder(Returns("width"), size=32)
    with pytest.raises(OpsinError, match="vectors of 2 and of 5 numbers"):
        embedder(batch)


def test_a_network_for_another_size(network, tmp_path):
    path = save_exported(network, tmp_path / "network.pt2")
    with pytest.raises(OpsinError, match=r"does not take images \[2, 3, 288, 288\] .*give the size it was made for"):
        load_embedder(path)


@pytest.mark.parametrize("save", [save_torchscript, save_exported, None])
def test_damaged_files(network, tmp_path, save):
    path = tmp_path / "network.pt"
    content = save(network, path).read_bytes() if save else b"PK\x03\x04 and no more"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(OpsinError, match="is damaged"):
        load_embedder(path)
    if save:
        middle = len(content) // 3
        path.write_bytes(content[:middle] + bytes(400) + content[middle + 400 :])
        with pytest.raises(OpsinError):
            load_embedder(path, size=32)


def test_files_that_are_no_networks(tmp_path):
    (tmp_path / "text").write_text("hello, this is a text")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "a.onnx").write_bytes(b"no protobuf")
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    for name in ("text", "empty"):
        with pytest.raises(OpsinError, match="is no network: give a backbone, a head of fit-copies, or"):
            load_embedder(tmp_path / name)
    with pytest.raises(OpsinError, match="no ONNX file"):
        load_embedder(tmp_path / "a.onnx")
    with pytest.raises(OpsinError, match="no vision transformer"):
        load_embedder(tmp_path / "a.safetensors")
    with pytest.raises(OpsinError, match="there is no network"):
        load_embedder(tmp_path / "nothing")
    with pytest.raises(OpsinError, match=r"no readable config\.json"):
        load_embedder(tmp_path)


def test_backbones_that_do_not_suit(backbone, tmp_path):
    with pytest.raises(OpsinError, match=r"size 30 is no multiple of the patch 8 .*: give 32"):
        load_embedder(backbone, size=30)
    with pytest.raises(OpsinError, match="takes images of 1 channels"):
        load_embedder(save_backbone(tmp_path / "gray", channels=1), size=SIZE)
