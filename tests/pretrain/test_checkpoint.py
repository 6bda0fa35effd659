import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsin.backbone import registry, weights
from opsin.errors import OpsinError
from opsin.pretrain import checkpoint


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return registry.create("vit_nano8", depth=1, width=16, heads=2)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(5, 7, generator=generator)
    return {
        "weight": drawn,
        "view": drawn.T,  # not contiguous
        "half": torch.randn(3, 2, generator=generator).bfloat16(),
        "exact": torch.randn(4, generator=generator, dtype=torch.float64),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "count": torch.tensor(2**53 + seed + 1),  # not a value that any float type holds
        "scale": torch.tensor(65536.0),
    }


def blank(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_tensor_comes_back_bit_for_bit(tmp_path, backbone):
    stored = tensors()
    path = checkpoint.save(tmp_path, 7, stored, backbone, {"recipe": {"seed": 3}}, keep=2)
    assert path.name == "step-00000007"
    back = blank(stored)
    places = {name: tensor.data_ptr() for name, tensor in back.items()}
    assert checkpoint.load(tmp_path, 7, back) == {"step": 7, "recipe": {"seed": 3}}
    for name, tensor in stored.items():
        assert back[name].dtype == tensor.dtype
        assert bits(back[name]) == bits(tensor), name
        assert back[name].data_ptr() == places[name]  # copied into what the run holds
    restored, report = weights.restore(path / "backbone.safetensors")
    assert report.metadata == {"step": "7"}
    assert all(torch.equal(tensor, restored.state_dict()[name]) for name, tensor in backbone.state_dict().items())


def test_the_latest_stay(tmp_path, backbone):
    assert checkpoint.steps(tmp_path) == []
    for step in (1, 2, 10, 200_000_000, 9):
        checkpoint.save(tmp_path, step, tensors(step), backbone, {}, keep=3)
    assert checkpoint.steps(tmp_path) == [9, 10, 200_000_000]
    assert {path.name for path in checkpoint.folder(tmp_path).iterdir()} == {
        "step-00000009",
        "step-00000010",
        "step-200000000",
    }


def test_saving_a_step_again_replaces_it(tmp_path, backbone):
    for seed in (1, 2):
        checkpoint.save(tmp_path, 5, tensors(seed), backbone, {"seed": seed}, keep=1)
    back = blank(tensors())
    assert checkpoint.load(tmp_path, 5, back)["seed"] == 2
    assert torch.equal(back["weight"], tensors(2)["weight"])


def test_what_a_killed_run_left_is_never_listed_and_is_cleaned(tmp_path, backbone):
    checkpoint.save(tmp_path, 3, tensors(), backbone, {}, keep=3)
    left = checkpoint.folder(tmp_path) / ".step-00000006"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half of i")
    assert checkpoint.steps(tmp_path) == [3]
    checkpoint.save(tmp_path, 6, tensors(6), backbone, {}, keep=3)  # not in the way
    assert checkpoint.steps(tmp_path) == [3, 6]
    left.mkdir()
    checkpoint.clean(tmp_path)
    assert not left.exists()
    assert checkpoint.steps(tmp_path) == [3, 6]


@pytest.mark.parametrize("stage", ["save_file", "weights.save", "_sync"])
def test_until_it_is_whole_a_checkpoint_has_no_name(tmp_path, backbone, monkeypatch, stage):
    checkpoint.save(tmp_path, 3, tensors(), backbone, {}, keep=1)
    before = (checkpoint.folder(tmp_path) / "step-00000003" / "state.safetensors").read_bytes()

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    home, name = (checkpoint.weights, "save") if "." in stage else (checkpoint, stage)
    monkeypatch.setattr(home, name, killed)
    for step in (3, 6):  # also when the step exists already
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, step, tensors(step), backbone, {}, keep=1)
        assert checkpoint.steps(tmp_path) == [3]
        assert (checkpoint.folder(tmp_path) / "step-00000003" / "state.safetensors").read_bytes() == before


@pytest.mark.parametrize("failing", ["state", "backbone"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, failing):
    # In the state or in the backbone's file, whichever is larger than what may be written.
    width = 16 if failing == "state" else 64
    net = registry.create("vit_nano8", depth=1, width=width, heads=2)
    small, large = tensors(), {"large": torch.zeros(100_000)}
    state = large if failing == "state" else small
    checkpoint.save(tmp_path, 3, state, net, {}, keep=1)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OpsinError) as refused:
            checkpoint.save(tmp_path, 6, state, net, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = str(refused.value)
    assert said.startswith(f"cannot write the checkpoint {checkpoint.folder(tmp_path) / 'step-00000006'}: ")
    assert "File too large" in said
    assert "the checkpoint of step 3 is intact" in said
    assert said.count("ree some space") == 1
    assert "\n" not in said
    assert [path.name for path in checkpoint.folder(tmp_path).iterdir()] == ["step-00000003"]
    checkpoint.load(tmp_path, 3, blank(state))


def test_an_unwritable_place_is_one_sentence(tmp_path, backbone):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OpsinError, match=r"Not a directory; there is no earlier checkpoint\. Free some space or choose"
    ):
        checkpoint.save(tmp_path / "file", 1, tensors(), backbone, {}, keep=1)


def changed(tree: dict[str, torch.Tensor], **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return tree | changes


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (changed(tensors(), extra=torch.zeros(1)), "1 names differ, the first is 'extra'"),
        ({"weight": torch.zeros(5, 7)}, "6 names differ, the first is 'count'"),
        (changed(tensors(), weight=torch.zeros(5, 8)), r"'weight' is \[5, 7\] torch.float32 there and \[5, 8\]"),
        (changed(tensors(), count=torch.zeros(())), r"'count' is \[\] torch.int64 there and \[\] torch.float32 here"),
        (changed(tensors(), half=torch.zeros(3, 2)), "torch.bfloat16 there and .* torch.float32 here"),
        # copy_ would spread one value over all of them
        (changed(tensors(), scale=torch.zeros(4)), r"'scale' is \[\] torch.float32 there and \[4\]"),
    ],
)
def test_another_network_is_refused(tmp_path, backbone, target, said):
    path = checkpoint.save(tmp_path, 3, tensors(), backbone, {}, keep=1)
    with pytest.raises(OpsinError, match=f"{said}.*. Give the recipe it was made with, or another --out.") as refused:
        checkpoint.load(tmp_path, 3, target)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("harm", ["cut", "no state", "no meta", "meta cut", "rubbish"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, backbone, harm):
    path = checkpoint.save(tmp_path, 3, tensors(), backbone, {}, keep=1)
    state, meta = path / "state.safetensors", path / "meta.json"
    whole = state.read_bytes()
    harms = {
        "cut": lambda: state.write_bytes(whole[:-10]),
        "rubbish": lambda: state.write_bytes(bytes(range(256)) * 4),
        "no state": state.unlink,
        "no meta": meta.unlink,
        "meta cut": lambda: meta.write_text(meta.read_text()[:-3]),
    }
    harms[harm]()
    with pytest.raises(OpsinError, match=r"cannot be read .*: remove this folder to go on from the one before") as said:
        checkpoint.load(tmp_path, 3, blank(tensors()))
    assert str(path) in str(said.value)
    assert "\n" not in str(said.value)


def test_the_files_are_plain_safetensors_and_json(tmp_path, backbone):
    path = checkpoint.save(tmp_path, 3, tensors(), backbone, {"recipe": {}}, keep=1)
    assert sorted(file.name for file in path.iterdir()) == ["backbone.safetensors", "meta.json", "state.safetensors"]
    assert load_file(path / "state.safetensors").keys() == tensors().keys()
    assert json.loads((path / "meta.json").read_text()) == {"step": 3, "recipe": {}}
    # and what another program wrote in this form is read
    save_file({"a": torch.arange(3)}, path / "state.safetensors")
    target = {"a": torch.zeros(3, dtype=torch.int64)}
    checkpoint.load(tmp_path, 3, target)
    assert target["a"].tolist() == [0, 1, 2]
