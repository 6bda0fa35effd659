import json
import os
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opsin.backbone import weights
from opsin.backbone.vit import Architecture
from opsin.errors import OpsinError
from opsin.pretrain.heads import HeadRecipe, read_heads, save_heads
from opsin.pretrain.objective import Network

UNTIED = HeadRecipe(dino_prototypes=40, dino_bottleneck=12, ibot_prototypes=30, ibot_bottleneck=8, hidden=16)
TIED = HeadRecipe(tied=True, dino_prototypes=40, dino_bottleneck=12, hidden=16, layers=2)
BOTH = pytest.mark.parametrize("recipe", [UNTIED, TIED], ids=["untied", "tied"])


def network(recipe, seed=0):
    torch.manual_seed(seed)
    return Network(Architecture(24, 1, 2, patch=7, grid=2), recipe)


def heads_of(module):
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("backbone.")}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "heads.safetensors"
    save_heads(path, heads_of(network(UNTIED)), UNTIED, 24)
    return path


def refused(path, *parts):
    with pytest.raises(OpsinError) as error:
        read_heads(path)
    for part in (str(path), *parts):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(path, change=None, header=None):
    """The file with other tensors or another header."""
    with safe_open(path, "pt") as file:
        known = file.metadata()
    state = load_file(path)
    if change:
        change(state)
    save_file(state, path, {name: value for name, value in {**known, **(header or {})}.items() if value is not None})


@BOTH
def test_heads_come_back_and_fit_their_network(recipe, tmp_path):
    path, heads = tmp_path / "deep" / "heads.safetensors", heads_of(network(recipe))
    save_heads(path, heads, recipe, 24, {"step": "12"})
    found, sizes, width = read_heads(path)
    assert (sizes, width) == (recipe, 24)
    assert found.keys() == heads.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in heads.items())
    assert any(name.startswith("ibot_head.") for name in found) != recipe.tied
    other = network(sizes, seed=1)
    assert not other.load_state_dict(found, strict=False).unexpected_keys
    assert torch.equal(other.dino_head.mlp[0].weight, heads["dino_head.mlp.0.weight"])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "step": "12", "opsin.heads_format": "1", "opsin.heads": json.dumps(asdict(recipe)), "opsin.width": "24",
        }  # fmt: skip
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_half_precision_stays(tmp_path):
    heads = {name: tensor.bfloat16() for name, tensor in heads_of(network(TIED)).items()}
    save_heads(tmp_path / "h", heads, TIED, 24)
    found, _, _ = read_heads(tmp_path / "h")
    assert all(torch.equal(found[name], tensor) for name, tensor in heads.items())


def test_a_save_that_fails_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OpsinError, match=r"cannot write heads to .*No space left on device.*free some space"):
        save_heads(saved, heads_of(network(UNTIED, seed=1)), UNTIED, 24)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_a_path_below_a_file_is_refused(saved):
    with pytest.raises(OpsinError, match="cannot write heads"):
        save_heads(saved / "h", {}, UNTIED, 24)


def test_missing_and_unexpected_tensors_are_refused(saved):
    def change(state):
        del state["ibot_head.mlp.0.bias"]
        state["ibot_head.extra"] = torch.zeros(1)

    rewrite(saved, change)
    refused(saved, "1 missing: ibot_head.mlp.0.bias", "1 unexpected: ibot_head.extra", "save it again")


def test_another_shape_is_refused(saved):
    rewrite(saved, lambda state: state.update({"dino_head.last_layer.weight_v": torch.zeros(39, 12)}))
    refused(saved, "1 of another shape: dino_head.last_layer.weight_v [39, 12] for [40, 12]")


def test_another_width_than_the_tensors_have_is_refused(saved):
    rewrite(saved, header={"opsin.width": "25"})
    refused(saved, "2 of another shape: dino_head.mlp.0.weight [16, 24] for [16, 25]")


def test_untied_heads_that_claim_to_be_tied_are_refused(saved):
    rewrite(saved, header={"opsin.heads": json.dumps({**asdict(UNTIED), "tied": True})})
    refused(saved, "8 unexpected: ibot_head.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(saved, value):
    rewrite(saved, lambda state: state["dino_head.mlp.2.weight"].view(-1)[5].fill_(value))
    refused(saved, "NaN or infinite values in dino_head.mlp.2.weight")


@pytest.mark.parametrize(
    "header",
    [
        {"opsin.heads_format": "2"},
        {"opsin.heads_format": "new"},
        {"opsin.heads": None},
        {"opsin.heads": "{"},
        {"opsin.heads": "[1]"},
        {"opsin.heads": json.dumps({"shape": "round"})},
        {"opsin.heads": json.dumps({"layers": 2.5})},
        {"opsin.heads": json.dumps({"hidden": 0})},
        {"opsin.width": "wide"},
        {"opsin.width": "-3"},
    ],
)
def test_unknown_headers_are_refused(saved, header):
    rewrite(saved, header=header)
    assert "a header that this version of Opsin cannot read: upgrade Opsin." in refused(saved)


def test_other_files_are_refused(saved, tmp_path):
    refused(tmp_path / "absent", "there is no file of heads")
    (tmp_path / "damaged").write_bytes(saved.read_bytes()[:-7])
    refused(tmp_path / "damaged", "damaged, truncated or no file of heads")
    (tmp_path / "empty").write_bytes(b"")
    refused(tmp_path / "empty", "damaged, truncated or no file of heads")
    refused(tmp_path, "damaged, truncated or no file of heads")
    weights.save(network(TIED).backbone, tmp_path / "backbone.safetensors")
    refused(tmp_path / "backbone.safetensors", "pass the heads.safetensors beside a run's backbone.safetensors")


def test_heads_are_no_backbone(saved):
    with pytest.raises(OpsinError, match=r"no vision transformer in any known form .*dino_head"):
        weights.restore(saved)
