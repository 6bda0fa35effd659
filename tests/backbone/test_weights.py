import json
import os
import pickle
import re
from dataclasses import replace

import pytest
import timm
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opsin.backbone import registry, weights
from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError

torch.set_num_threads(2)

PLAIN = Architecture(width=64, depth=3, heads=1, patch=14, grid=4)
REGISTERS = replace(PLAIN, registers=4, position_offset=0.0, position_antialias=True, ffn="swiglu")
BOTH = pytest.mark.parametrize("arch", [PLAIN, REGISTERS], ids=["plain", "registers"])


def backbone(arch, seed=0):
    torch.manual_seed(seed)
    model = VisionTransformer(arch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, state[name]), name


def refused(model, path, *parts):
    """Loading fails in one sentence that says each of `parts`, and leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OpsinError) as error:
        weights.load(model, path)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert_same(model, before)


# ---- our own files


@BOTH
def test_ours_round_trips_and_describes_itself(arch, tmp_path):
    model, path = backbone(arch), tmp_path / "deep" / "w.safetensors"
    weights.save(model, path, {"step": "12"})
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["opsin.architecture"])["registers"] == arch.registers
        assert file.metadata()["opsin.format"] == "1"
    state, found = weights.read(path)
    assert found == arch
    assert_same(model, state)
    restored, report = weights.restore(path)
    assert restored.arch == arch
    assert_same(restored, model.state_dict())
    assert report.described
    assert len(report.matched) == len(model.state_dict())
    assert not report.missing + report.unexpected + report.reshaped
    assert report.metadata == {"step": "12"}
    assert str(report) == f"{path}: {len(report.matched)} matched, 0 missing, 0 unexpected, 0 reshaped"


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    weights.save(backbone(PLAIN), path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OpsinError, match=r"cannot write weights to .*No space left on device"):
        weights.save(backbone(PLAIN, seed=1), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_save_under_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OpsinError, match=r"cannot write weights to .*choose another path"):
        weights.save(backbone(PLAIN), tmp_path / "file" / "w.safetensors")


def test_a_header_from_the_future(tmp_path):
    path = tmp_path / "w.safetensors"
    for header in ({"opsin.format": "2"}, {"opsin.format": "1", "opsin.architecture": '{"rotary": true}'}):
        save_file(backbone(PLAIN).state_dict(), path, header)
        refused(backbone(PLAIN), path, "header that this version of Opsin cannot read: upgrade")


# ---- files of others


@BOTH
def test_official_flat_file(arch, tmp_path):
    source, path = backbone(arch), tmp_path / "w.pth"
    torch.save(source.state_dict(), path)
    state, named = weights.read(path)
    assert named is None
    assert weights.infer(state) == arch
    model, report = weights.restore(path)
    assert model.arch == arch
    assert_same(model, source.state_dict())
    assert not report.described
    assert "heads and position rule are not visible" in str(report)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_training_dump_with_chunks_heads_and_prefixes(prefix, tmp_path):
    source, path = backbone(PLAIN), tmp_path / "dump.pth"
    teacher = {}
    for name, tensor in source.state_dict().items():
        chunked = re.sub(r"^blocks\.(\d)\.", lambda found: f"blocks.{int(found[1]) // 2}.{found[1]}.", name)
        teacher[f"{prefix}backbone.{chunked}"] = tensor
    assert f"{prefix}backbone.blocks.1.2.norm1.weight" in teacher
    teacher[f"{prefix}dino_head.mlp.0.weight"] = torch.zeros(2, 2)
    teacher[f"{prefix}ibot_head.last_layer.weight_g"] = torch.full((2, 2), torch.nan)  # not read, so not checked
    torch.save({"teacher": teacher, "student": {"x": torch.zeros(1)}, "iteration": 7}, path)
    model = backbone(PLAIN, seed=1)
    report = weights.load(model, path)
    assert_same(model, source.state_dict())
    assert report.explained == {
        "student": "not the teacher of a training dump",
        "iteration": "not the teacher of a training dump",
        "dino_head.mlp.0.weight": "a training head, not the backbone",
        "ibot_head.last_layer.weight_g": "a training head, not the backbone",
    }
    assert sorted(report.unexpected) == sorted(report.explained)
    assert "ibot_head.last_layer.weight_g: a training head" in str(report)


def hugging_face(kind, folder, suffix="Model", **options):
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=1, image_size=56, patch_size=14, **options
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{suffix}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "arch"), [("Dinov2", PLAIN), ("Dinov2WithRegisters", REGISTERS)])
def test_hugging_face_classifier_folder(kind, arch, tmp_path):
    peer = hugging_face(kind, tmp_path, "ForImageClassification", use_swiglu_ffn=arch.ffn == "swiglu", num_labels=5)
    model, report = weights.restore(tmp_path)
    assert model.arch == arch
    assert report.described
    heads = ["classifier.bias", "classifier.weight"]
    assert sorted(report.unexpected) == heads
    assert report.explained == dict.fromkeys(heads, "a classifier on top of the backbone")
    table = getattr(peer, peer.base_model_prefix).embeddings.position_embeddings
    assert torch.equal(model.pos_embed, table)


@pytest.mark.parametrize("form", ["bin", "sharded safetensors", "sharded bin", "weights file alone"])
def test_hugging_face_files(form, tmp_path):
    hugging_face("Dinov2", tmp_path)
    whole, _ = weights.restore(tmp_path)
    raw = load_file(tmp_path / "model.safetensors")
    source = tmp_path
    if form == "weights file alone":
        source = tmp_path / "model.safetensors"
    else:
        (tmp_path / "model.safetensors").unlink()
    if form == "bin":
        torch.save(raw, tmp_path / "pytorch_model.bin")
    elif form.startswith("sharded"):
        stem, suffix = ("model", "safetensors") if form.endswith("safetensors") else ("pytorch_model", "bin")
        where = {name: f"{stem}-{1 + i % 2}.{suffix}" for i, name in enumerate(raw)}
        for shard in set(where.values()):
            part = {name: raw[name] for name in raw if where[name] == shard}
            (save_file if suffix == "safetensors" else torch.save)(part, tmp_path / shard)
        (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    model, _ = weights.restore(source)
    assert model.arch == PLAIN
    assert_same(model, whole.state_dict())


def test_hugging_face_model_without_mask_token(tmp_path):
    hugging_face("Dinov2", tmp_path, use_mask_token=False)
    model, report = weights.restore(tmp_path)
    assert report.missing == ["mask_token"]
    assert (model.mask_token == 0).all()


def test_hugging_face_file_that_lacks_tensors(tmp_path):
    hugging_face("Dinov2", tmp_path)
    raw = load_file(tmp_path / "model.safetensors")
    for name in ("cls_token", "mask_token"):
        del raw[f"embeddings.{name}"]
    del raw["encoder.layer.1.attention.attention.key.bias"]
    save_file(raw, tmp_path / "model.safetensors")
    refused(backbone(PLAIN), tmp_path, "3 missing: cls_token, mask_token, blocks.1.attn.qkv.bias)")


def test_hugging_face_folders_that_do_not_fit(tmp_path):
    model = backbone(PLAIN)
    refused(model, tmp_path, "has no readable config.json")
    hugging_face("Dinov2", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"model_type": "vit"}, "model type 'vit'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu', which is no DINOv2 backbone: it must be 'gelu'"),
        ({"num_hidden_layers": 2}, "depth 2 (model: 3)"),
        ({"num_attention_heads": 2}, "heads 2 (model: 1)"),
    ):
        path.write_text(json.dumps(config | change))
        refused(model, tmp_path, message)
    del config["num_attention_heads"]
    path.write_text(json.dumps(config))
    refused(model, tmp_path, "does not describe the architecture ('num_attention_heads')")
    (tmp_path / "model.safetensors").unlink()
    path.write_text(json.dumps(config | {"num_attention_heads": 1}))
    refused(model, tmp_path, "has no weights: it needs one of model.safetensors.index.json")


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize("registers", [0, 4])
def test_timm_state_dict(registers, form, tmp_path):
    name = f"vit_small_patch14{'_reg4' * bool(registers)}_dinov2"
    peer = timm.create_model(name, pretrained=False, depth=1, img_size=56, num_classes=3)
    path = tmp_path / f"w.{form}"
    (torch.save if form == "pth" else save_file)(peer.state_dict(), path)
    model, report = weights.restore(path)
    assert model.arch.registers == registers
    assert (model.mask_token == 0).all()
    assert report.missing == (["pos_embed[:, 0]", "mask_token"] if registers else ["mask_token"])
    assert sorted(report.unexpected) == ["head.bias", "head.weight"]
    assert sorted(report.explained) == sorted(report.missing + report.unexpected)
    if registers:
        assert (model.pos_embed[:, 0] == 0).all()
        assert torch.equal(model.pos_embed[:, 1:], peer.pos_embed)
        assert torch.equal(model.register_tokens, peer.reg_token)


# ---- strictness


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: s.pop("blocks.1.norm1.weight"), ["1 missing: blocks.1.norm1.weight", "nothing was loaded"]),
        (
            lambda s: [s.pop(f"blocks.1.{k}") for k in ("norm1.bias", "norm2.bias", "ls1.gamma", "ls2.gamma")],
            ["4 missing: blocks.1.norm1.bias, blocks.1.ls1.gamma, blocks.1.norm2.bias and 1 more"],
        ),
        (lambda s: s.update({"head.weight": torch.zeros(2)}), ["1 unexpected: head.weight"]),
        (
            lambda s: s.update({"blocks.0.mlp.fc1.weight": torch.zeros(99, 64)}),
            ["1 of another shape: blocks.0.mlp.fc1.weight [99, 64] for [256, 64]"],
        ),
        (lambda s: s["norm.bias"].fill_(torch.nan), ["NaN or infinite values in norm.bias"]),
        (lambda s: s["cls_token"].fill_(-torch.inf), ["NaN or infinite values in cls_token"]),
        (lambda s: s.update(pos_embed=torch.zeros(1, 12, 64)), ["shape [1, 12, 64]", "square"]),
        (lambda s: s.update({"module.norm.bias": s["norm.bias"]}), ["norm.bias twice, once as module.norm.bias"]),
        (lambda s: s.update(epoch=3), ["entries that are not tensors (epoch)"]),
        (lambda s: s.pop("patch_embed.proj.weight"), ["no vision transformer", "cls_token"]),
    ],
)
def test_what_does_not_fit_is_named(change, parts, tmp_path):
    source, path = backbone(PLAIN).state_dict(), tmp_path / "w.pth"
    change(source)
    torch.save(source, path)
    refused(backbone(PLAIN, seed=1), path, *parts)


def test_our_own_file_may_not_lack_the_mask_token(tmp_path):
    path = tmp_path / "w.safetensors"
    weights.save(backbone(PLAIN), path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    state = load_file(path)
    del state["mask_token"]
    save_file(state, path, header)
    refused(backbone(PLAIN), path, "1 missing: mask_token")


def test_heads_of_an_unknown_network_are_not_taken_for_training_heads(tmp_path):
    path = tmp_path / "w.pth"
    state = {f"backbone.{name}": tensor for name, tensor in backbone(PLAIN).state_dict().items()}
    torch.save(state | {"neck.weight": torch.zeros(1)}, path)
    refused(backbone(PLAIN), path, "1 unexpected: neck.weight")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"width": 128, "heads": 2}, "width 64 (model: 128)"),
        ({"depth": 4}, "depth 3 (model: 4)"),
        ({"patch": 8}, "patch 14 (model: 8)"),
        ({"channels": 1}, "channels 3 (model: 1)"),
        ({"registers": 2}, "registers 0 (model: 2)"),
        ({"ffn": "swiglu"}, "ffn mlp (model: swiglu)"),
    ],
)
def test_another_architecture_is_named_in_every_form(changes, part, tmp_path):
    source = backbone(PLAIN)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    weights.save(source, tmp_path / "w.safetensors")
    for path in tmp_path.iterdir():
        refused(VisionTransformer(replace(PLAIN, **changes)), path, part, "create the model to fit the weights")


def test_what_only_our_own_header_knows_is_compared_too(tmp_path):
    weights.save(backbone(PLAIN), tmp_path / "w.safetensors")
    for changes, part in (({"heads": 2}, "heads 1 (model: 2)"), ({"position_offset": 0.0}, "position_offset 0.1")):
        refused(VisionTransformer(replace(PLAIN, **changes)), tmp_path / "w.safetensors", part)
    # only an initial value: it does not change what the network computes
    weights.load(VisionTransformer(replace(PLAIN, layerscale=1.0)), tmp_path / "w.safetensors")


def test_named_architectures_are_named(tmp_path):
    weights.save(registry.create("vit_nano8"), tmp_path / "w.safetensors")
    refused(registry.create("vit_micro8"), tmp_path / "w.safetensors", "holds vit_nano8 and the model is vit_micro8")


@BOTH
def test_position_grid_of_another_size(arch, tmp_path):
    source, path = backbone(arch), tmp_path / "w.safetensors"
    weights.save(source, path)
    model = VisionTransformer(replace(arch, grid=6))
    refused(model, path, "position grid of 4×4, not 6×6", "grid=4", "resample_positions=True")
    report = weights.load(model, path, resample_positions=True)
    assert report.reshaped == ["pos_embed"]
    assert "pos_embed" not in report.matched
    images = torch.randn(1, 3, 84, 84)
    with torch.no_grad():
        assert torch.equal(model([images])[0].cls, source([images])[0].cls)


def test_heads_that_cannot_be_inferred(tmp_path):
    path = tmp_path / "w.pth"
    model = backbone(replace(PLAIN, width=96, heads=3))
    torch.save(model.state_dict(), path)
    with pytest.raises(OpsinError, match="width 96, from which the number of heads cannot be told"):
        weights.restore(path)
    weights.load(model, path)


# ---- files that are no weights


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("legacy", [False, True])
def test_unsafe_pickle_is_refused(legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, "evil.pth", _use_new_zipfile_serialization=not legacy)
    refused(
        backbone(PLAIN), "evil.pth", "evil.pth was refused: it is a pickle that would load posix.system", "any code"
    )
    assert not (tmp_path / "pwned").exists()


def test_plain_pickle_of_a_class_is_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps(PLAIN, protocol=2))
    refused(backbone(PLAIN), tmp_path / "w.pth", "would load opsin.backbone.vit.Architecture")


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_truncated_file(form, share, tmp_path):
    source, path = backbone(PLAIN), tmp_path / "weights"
    if form == "safetensors":
        weights.save(source, path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    refused(backbone(PLAIN), path, "is damaged, truncated or no weights file")


def test_no_file_and_no_weights(tmp_path):
    refused(backbone(PLAIN), tmp_path / "none.pth", "there is no weights file")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    refused(backbone(PLAIN), tmp_path / "page.pth", "is damaged, truncated or no weights file")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    refused(backbone(PLAIN), tmp_path / "list.pth", "holds a list, not named tensors")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    refused(backbone(PLAIN), tmp_path / "other.pth", "no vision transformer in any known form", "fc.weight")


def test_half_precision_files_become_the_models_precision(tmp_path):
    source = backbone(PLAIN).half()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model, _ = weights.restore(tmp_path / "w.pth")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.norm.weight, source.norm.weight.float())
