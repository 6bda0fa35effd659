"""Several processes write a checkpoint together; any number of them reads it, however weights are sharded."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from group import together
from opsin import ranks
from opsin.backbone import registry, weights
from opsin.errors import OpsinError
from opsin.pretrain import checkpoint
from opsin.pretrain.checkpoint import Checkpoints

# Sizes that neither 2 nor 4 processes can share out evenly; of some tensors, processes get nothing.
ARCH = registry.create("vit_nano8", depth=1, width=18, heads=2).arch
NAMES = ("replicate", "shard")


def tensors(seed: int, grid: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """Those of a run: cut up over a grid of processes, or whole."""
    generator = torch.Generator().manual_seed(seed)
    net = weights.empty(ARCH)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    if grid is not None:
        mesh = init_device_mesh("cpu", grid, mesh_dim_names=NAMES[-len(grid) :])
        fully_shard(net.blocks[0], mesh=mesh)
        fully_shard(net, mesh=mesh)
    found = {f"average.backbone.{name}": tensor for name, tensor in net.state_dict().items()}
    # Of a sharded run too, some are whole and equal everywhere.
    found["centre"] = torch.randn(33, 5, generator=generator).bfloat16()
    found["count"] = torch.tensor(2**53 + seed)
    return found


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrong(found: dict[str, Tensor], seed: int) -> list[str]:
    """Names of what is not exactly the state of `seed`."""
    return [name for name, tensor in tensors(seed).items() if not torch.equal(whole(found[name]), tensor)]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder(out).iterdir())


def sentence(checkpoints: Checkpoints, step: int) -> str:
    checkpoints.save(step, {})
    with pytest.raises(OpsinError) as refused:
        checkpoints.wait()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def full(writer: FileSystemWriter, *_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(writer.path))


def flipping(writer: FileSystemWriter, *arguments: Any) -> Any:
    """Write, and let a bit of the largest tensor go wrong on its way to the disk."""
    done = original(writer, *arguments)
    (file,) = Path(writer.path).glob(f"__{ranks.rank()}_*")
    data = bytearray(file.read_bytes())
    place = max(done.value(), key=lambda result: result.size_in_bytes).storage_data
    data[place.offset + place.length // 2] ^= 1
    file.write_bytes(data)
    return done


original = FileSystemWriter.write_data


def write(out: Path, results: Path) -> dict[str, Any]:
    """In each of two processes."""
    found: dict[str, Any] = {}
    state, second = tensors(1, (2,)), ranks.rank() == 1
    with Checkpoints(out, state, ARCH, keep=2) as checkpoints, pytest.MonkeyPatch.context() as patch:
        found["self-test"], found["left by it"] = checkpoints.self_test(), names(out)
        checkpoints.save(1, {"seed": 1})
        for tensor in state.values():  # at once, while it is being written
            tensor.mul_(0)
        # and the training's own sums go on
        found["after"] = [float(whole(tensor).abs().sum()) for tensor in state.values()]
        checkpoints.wait()
        checkpoints.load(1)
        found["loaded"] = wrong(state, 1)

        # What fails in the second process only
        if second:
            patch.setattr(FileSystemWriter, "write_data", full)
        found["full"] = sentence(checkpoints, 2), names(out)
        if second:
            patch.setattr(FileSystemWriter, "write_data", flipping)
        found["flipped"] = sentence(checkpoints, 2), names(out)
        patch.undo()
        if second:
            patch.setattr(Path, "is_dir", lambda _: False)
        found["another disk"] = sentence(checkpoints, 2), names(out)
        patch.undo()
        weight = state["average.backbone.blocks.0.mlp.fc1.weight"]
        if second:
            weight.to_local()[0, 0] = torch.nan  # type: ignore[attr-defined]
        found["nan"] = sentence(checkpoints, 2), names(out)
        weight.nan_to_num_()
        checkpoints.load(1)

        # The next one is none the worse for all that
        checkpoints.save(3, {"seed": 1})
        checkpoints.wait()
        found["in the end"] = names(out)

    # Others have written it, or hold it in other shards
    state = tensors(9, (2,))
    with Checkpoints(out / "alone", state, ARCH, keep=1) as checkpoints:
        checkpoints.load(8)
        found["by one"] = wrong(state, 8)
    state = tensors(9)
    with Checkpoints(out, state, ARCH, keep=2) as checkpoints:
        checkpoints.load(3)
        found["into whole ones"] = wrong(state, 1)
        if second:
            next(iter(state.values())).view(-1)[0] += 1e-6
        found["other weights"] = sentence(checkpoints, 4), names(out)

    # Equal everywhere: each process writes a part
    with Checkpoints(out / "whole", tensors(2), ARCH, keep=1) as checkpoints:
        checkpoints.save(4, {})
        checkpoints.wait()

    # The second process is gone in the middle of a save
    with (
        Checkpoints(out / "lost", tensors(3, (2,)), ARCH, keep=2) as checkpoints,
        pytest.MonkeyPatch.context() as patch,
    ):
        checkpoints.save(1, {})
        checkpoints.wait()
        if second:
            torch.save(found, results / "rank-1.pt")
            patch.setattr(FileSystemWriter, "write_data", lambda *_: os._exit(0))
        found["lost"] = sentence(checkpoints, 2)
    return found


def read(out: Path) -> dict[str, Any]:
    """In each of four processes."""
    found: dict[str, Any] = {}
    for grid in ((4,), (2, 2), None):
        state = tensors(9, grid)
        with Checkpoints(out, state, ARCH, keep=2) as checkpoints:
            found[f"meta {grid}"] = checkpoints.load(3)
            found[f"wrong {grid}"] = wrong(state, 1)
    state = tensors(5, (2, 2))
    with Checkpoints(out / "hybrid", state, ARCH, keep=1) as checkpoints:
        checkpoints.save(6, {})
        checkpoints.wait()
    with Checkpoints(out, state, ARCH, keep=2) as checkpoints:
        file = checkpoint.folder(out) / "step-00000003" / "__1_0.distcp"
        if ranks.first():
            file.write_bytes(file.read_bytes()[:-2000])
        checkpoints._gather(None)  # wait for the first
        with pytest.raises(OpsinError) as refused:
            checkpoints.load(3)
        found["damaged"] = str(refused.value)
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def written(out: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with Checkpoints(out / "alone", tensors(8), ARCH, keep=1) as checkpoints:
        checkpoints.save(8, {})
    results = tmp_path_factory.mktemp("write")
    return together(write, 2, results, out, results)


@pytest.fixture(scope="module")
def loaded(out: Path, written: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(read, 4, tmp_path_factory.mktemp("read"), out)


def alone(out: Path, step: int, seed: int) -> None:
    state = tensors(9)
    with Checkpoints(out, state, ARCH, keep=2) as checkpoints:
        checkpoints.load(step)
    assert wrong(state, seed) == []
    backbone, _ = weights.restore(checkpoint.folder(out) / f"step-{step:08d}" / "backbone.safetensors")
    assert wrong({f"average.backbone.{n}": t for n, t in backbone.state_dict().items()} | state, seed) == []


def test_what_is_written_is_what_was_there_when_save_was_called(out, written):
    for found in written:
        assert found["self-test"].startswith("checkpoints work: each takes ")
        assert set(found["after"]) == {0.0}
        assert found["loaded"] == []
    assert written[0]["left by it"] == []


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("full", "process 1: No space left on device"),
        ("flipped", "process 1: 'average.backbone.patch_embed.proj.weight' reads back otherwise than it was written"),
        (
            "another disk",
            "process 1: it does not see the folder that process 0 made: all must share the disk of --out",
        ),
    ],
)
def test_what_fails_in_one_process_is_raised_in_all_and_leaves_nothing(out, written, what, why):
    for found in written:
        said, _ = found[what]
        path = checkpoint.folder(out) / "step-00000002"
        intact = "there is no earlier checkpoint" if what == "another disk" else "the checkpoint of step 1 is intact"
        assert said == (
            f"cannot write the checkpoint {path}: {why}; {intact}. Free some space or choose another --out, then give "
            "the same command again."
        )
    # the first process tidies up
    assert written[0][what][1] == ["step-00000001"]
    assert written[0]["in the end"] == ["step-00000001", "step-00000003"]


def test_processes_that_have_drifted_apart_are_told_apart(written):
    for found in written:
        said, left = found["other weights"]
        assert said.startswith("process 1 has other weights than the first: 1 tensors, such as ")
        assert left == found["in the end"]


def test_nan_in_the_shard_of_one_process_is_never_saved(written):
    for found in written:
        said, _ = found["nan"]
        assert said.startswith(
            "1 tensors of the run, such as average.backbone.blocks.0.mlp.fc1.weight, hold NaN or infinity after step 2"
        )
    assert written[0]["nan"][1] == ["step-00000001"]


def test_two_processes_wrote_it_and_one_reads_it(out, written):
    alone(out, 1, 1)
    alone(out, 3, 1)


def test_processes_with_equal_tensors_share_the_work(out, written):
    alone(out / "whole", 4, 2)
    sizes = [path.stat().st_size for path in checkpoint.folder(out / "whole").glob("step-*/*.distcp")]
    assert len(sizes) == 2
    assert max(sizes) < 0.7 * sum(sizes)


def test_one_process_wrote_it_and_two_read_it(written):
    assert [found["by one"] for found in written] == [[], []]


def test_shards_are_read_into_whole_tensors(written):
    assert [found["into whole ones"] for found in written] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["(4,)", "(2, 2)", "None"])
def test_two_processes_wrote_it_and_four_read_it(loaded, grid):
    for found in loaded:
        assert found[f"meta {grid}"] == {"step": 3, "seed": 1}
        assert found[f"wrong {grid}"] == []


@pytest.mark.slow
def test_four_processes_with_shards_and_copies_wrote_it_and_one_reads_it(out, loaded):
    alone(out / "hybrid", 6, 5)
    sizes = sum(path.stat().st_size for path in checkpoint.folder(out / "hybrid").glob("step-*/*.distcp"))
    once = sum(path.stat().st_size for path in checkpoint.folder(out / "whole").glob("step-*/*.distcp"))
    assert sizes < 1.5 * once  # twice would be the copies as well; every part has a header


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_by_all(out, loaded):
    (said,) = {found["damaged"] for found in loaded}
    assert said.startswith(f"the checkpoint {checkpoint.folder(out) / 'step-00000003'} cannot be read (process ")
    assert said.endswith("): remove this folder to go on from the one before.")


def test_a_process_that_dies_in_a_save_leaves_the_others_a_sentence(out, written):
    said = written[0]["lost"]
    assert said.startswith("the processes of the run lost one another at a checkpoint (process 0: ")
    assert "go on from the last checkpoint" in said
    assert names(out / "lost") == ["step-00000001"]
    alone(out / "lost", 1, 3)
