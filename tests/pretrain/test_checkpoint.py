import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from opsin.backbone import registry, weights
from opsin.errors import OpsinError
from opsin.pretrain import checkpoint
from opsin.pretrain.checkpoint import Checkpoints

ARCH = registry.create("vit_nano8", depth=1, width=16, heads=2).arch
WRITE = FileSystemWriter.write_data


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(5, 7, generator=generator)
    backbone = weights.empty(ARCH).state_dict()
    return {
        "weight": drawn,
        "view": drawn.T.clone().T,  # not contiguous
        "half": torch.randn(3, 2, generator=generator).bfloat16(),
        "exact": torch.randn(4, generator=generator, dtype=torch.float64),
        "zeros": torch.tensor([0.0, -0.0, 1e-45]),
        "none": torch.zeros(0, 3),
        "count": torch.tensor(2**53 + seed + 1),  # not a value that any float type holds
        "scale": torch.tensor(65536.0),
        **{f"average.backbone.{n}": torch.randn(t.shape, generator=generator) for n, t in backbone.items()},
    }


def blank(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(out: Path, step: int, state: dict[str, torch.Tensor], keep: int = 3, **meta: object) -> Path:
    with Checkpoints(out, state, ARCH, keep) as checkpoints:
        checkpoints.save(step, meta)
    return checkpoint.folder(out) / f"step-{step:08d}"


def load(out: Path, step: int, state: dict[str, torch.Tensor]) -> dict[str, object]:
    with Checkpoints(out, state, ARCH, 1) as checkpoints:
        return checkpoints.load(step)


def assert_holds(out: Path, step: int, state: dict[str, torch.Tensor]) -> None:
    back = blank(state)
    load(out, step, back)
    for name, tensor in state.items():
        assert bits(back[name]) == bits(tensor), name
    backbone, report = weights.restore(checkpoint.folder(out) / f"step-{step:08d}" / "backbone.safetensors")
    assert report.metadata == {"step": str(step)}
    for name, tensor in backbone.state_dict().items():
        assert bits(tensor) == bits(state[f"average.backbone.{name}"]), name


def names(out: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder(out).iterdir())


@pytest.fixture
def writing(monkeypatch):
    """Put something in the place of what writes the tensors."""
    return lambda instead: monkeypatch.setattr(FileSystemWriter, "write_data", instead)


# ---- what is written


def test_every_tensor_comes_back_bit_for_bit(tmp_path):
    stored = tensors()
    path = save(tmp_path, 7, stored, recipe={"seed": 3})
    assert path.name == "step-00000007"
    assert names(tmp_path) == [path.name]
    assert sorted(file.name for file in path.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "backbone.safetensors",
        "meta.json",
    ]
    assert json.loads((path / "meta.json").read_text()) == {"step": 7, "recipe": {"seed": 3}}
    back = blank(stored)
    places = {name: tensor.data_ptr() for name, tensor in back.items()}
    assert load(tmp_path, 7, back) == {"step": 7, "recipe": {"seed": 3}}
    assert {name: tensor.data_ptr() for name, tensor in back.items()} == places  # copied into what the run holds
    assert_holds(tmp_path, 7, stored)


def test_tools_of_torch_read_it(tmp_path):
    path = save(tmp_path, 7, tensors())
    dcp_to_torch_save(path, tmp_path / "all.pt")
    stored = torch.load(tmp_path / "all.pt")
    assert {name: bits(tensor) for name, tensor in stored.items()} == {n: bits(t) for n, t in tensors().items()}


def test_double_precision_stays_so_in_the_backbone(tmp_path):
    state = {name: tensor.double() if tensor.dtype == torch.float32 else tensor for name, tensor in tensors().items()}
    path = save(tmp_path, 1, state)
    stored, _ = weights.read(path / "backbone.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float64}


def test_the_latest_stay(tmp_path):
    assert checkpoint.steps(tmp_path) == []
    with Checkpoints(tmp_path, tensors(), ARCH, keep=3) as checkpoints:
        for step in (1, 2, 10, 200_000_000, 9):
            checkpoints.save(step, {})
    assert checkpoint.steps(tmp_path) == [9, 10, 200_000_000]
    assert names(tmp_path) == ["step-00000009", "step-00000010", "step-200000000"]


def test_saving_a_step_again_replaces_it(tmp_path):
    for seed in (1, 2):
        save(tmp_path, 5, tensors(seed), keep=1)
    assert_holds(tmp_path, 5, tensors(2))
    assert names(tmp_path) == ["step-00000005"]


def test_all_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(Path(f"/proc/self/fd/{file}").resolve()), sync(file)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(("named", to)), rename(path, to)))
    if not Path("/proc/self/fd").exists():
        pytest.skip("does not say which file is synced")
    path = save(tmp_path, 7, tensors())
    named = done.index(("named", path))
    before, after = done[:named], done[named + 1 :]
    hidden = path.with_name("." + path.name)
    files = ("__0_0.distcp", ".metadata", "backbone.safetensors", "meta.json")
    assert {hidden / name for name in files} <= set(before)
    assert before[-1] == hidden
    assert after == [path.parent]


def test_nothing_is_drawn_from_the_generator_of_the_run(tmp_path):
    state = tensors()
    before = torch.get_rng_state()
    with Checkpoints(tmp_path, state, ARCH, 1) as checkpoints:
        checkpoints.self_test()
        checkpoints.save(1, {})
    assert torch.equal(torch.get_rng_state(), before)


# ---- meanwhile


def test_the_caller_goes_on_while_it_is_written(tmp_path, writing):
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert go_on.wait(60)
        return WRITE(*arguments)

    writing(slow)
    state, stored = tensors(), tensors()
    with Checkpoints(tmp_path, state, ARCH, keep=3) as checkpoints:
        checkpoints.save(1, {})
        for tensor in state.values():
            tensor.zero_()
        assert begun.wait(60)
        assert checkpoint.steps(tmp_path) == []
        assert not checkpoints.failed
        threading.Timer(0.2, go_on.set).start()
        checkpoints.save(2, {})  # waits for the one before
        assert 1 in checkpoint.steps(tmp_path)
        checkpoints.wait()
        assert checkpoint.steps(tmp_path) == [1, 2]
    assert_holds(tmp_path, 1, stored)
    assert_holds(tmp_path, 2, blank(stored))


def test_an_error_elsewhere_lets_the_write_end(tmp_path):
    def stumble():
        with Checkpoints(tmp_path, tensors(), ARCH, 1) as checkpoints:
            checkpoints.save(1, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stumble()
    assert_holds(tmp_path, 1, tensors())


@pytest.mark.parametrize("then", ["wait", "save", "leave"])
def test_what_fails_meanwhile_is_raised_when_the_caller_looks(tmp_path, writing, then):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writing(full)
    checkpoints = Checkpoints(tmp_path, tensors(), ARCH, 1)
    checkpoints.save(1, {})
    checkpoints._thread.shutdown()
    assert checkpoints.failed
    with pytest.raises(OpsinError, match="step-00000001: No space left on device; there is no earlier checkpoint"):
        {"wait": checkpoints.wait, "save": lambda: checkpoints.save(2, {}), "leave": lambda: leave(checkpoints)}[then]()
    assert not checkpoints.failed
    checkpoints.wait()  # said once
    assert names(tmp_path) == []


def leave(checkpoints):
    with checkpoints:
        pass


# ---- what must not be saved


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    state = tensors()
    save(tmp_path, 3, state, keep=1)
    state["weight"][2, 3] = torch.nan
    state["half"][0, 0] = torch.inf
    with pytest.raises(OpsinError) as refused:
        save(tmp_path, 6, state, keep=1)
    assert str(refused.value) == (
        "2 tensors of the run, such as weight, hold NaN or infinity after step 6: nothing was saved, and the last "
        "checkpoint is intact. Start again with a lower --schedule.rate in another --out."
    )
    assert names(tmp_path) == ["step-00000003"]
    assert_holds(tmp_path, 3, tensors())


@pytest.mark.parametrize("part", ["distcp", ".metadata", "backbone.safetensors"])
def test_what_goes_wrong_on_its_way_to_the_disk_is_noticed(tmp_path, writing, monkeypatch, part):
    save(tmp_path, 3, tensors(), keep=1)

    def harm(file: Path, place: int) -> None:
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)

    def flipping(writer, *arguments):
        done = WRITE(writer, *arguments)
        where = next(result for result in done.value() if result.index.fqn == "exact").storage_data
        file = Path(writer.path) / "__0_0.distcp"
        harm(file, file.read_bytes().index(tensors(6)["exact"].numpy().tobytes(), where.offset))
        return done

    finish, write = FileSystemWriter.finish, weights.save

    def finishing(writer, *arguments, **named):
        finish(writer, *arguments, **named)
        file = Path(writer.path) / ".metadata"
        harm(file, file.read_bytes().rindex(b"__0_0.distcp"))

    def saving(model, path, metadata):
        write(model, path, metadata)
        harm(path, -1)

    writing(flipping if part == "distcp" else WRITE)
    if part == ".metadata":
        monkeypatch.setattr(FileSystemWriter, "finish", finishing)
    if part == "backbone.safetensors":
        monkeypatch.setattr(weights, "save", saving)
    what = {"distcp": "'exact'", ".metadata": "its .metadata"}.get(part, "'pos_embed'")
    with pytest.raises(
        OpsinError, match=f": {what} reads back otherwise than it was written; the checkpoint of step 3"
    ):
        save(tmp_path, 6, tensors(6), keep=1)
    assert names(tmp_path) == ["step-00000003"]


# ---- disks


@pytest.fixture
def small_disk():
    """No file can grow beyond 100,000 bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def assert_too_large(refused: pytest.ExceptionInfo[OpsinError], path: Path, left: str) -> None:
    assert str(refused.value) == (
        f"cannot write the checkpoint {path}: File too large; {left}. Free some space or choose another --out, then "
        "give the same command again."
    )


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, small_disk):
    state = tensors()
    save(tmp_path, 3, state, keep=1)
    with pytest.raises(OpsinError) as refused:
        save(tmp_path, 6, state | {"large": torch.zeros(100_000)}, keep=1)
    path = checkpoint.folder(tmp_path)
    assert_too_large(refused, path / "step-00000006", "the checkpoint of step 3 is intact")
    assert names(tmp_path) == ["step-00000003"]
    assert_holds(tmp_path, 3, state)
    with (
        pytest.raises(OpsinError) as refused,
        Checkpoints(tmp_path, {**state, "large": torch.zeros(100_000)}, ARCH, 1) as checkpoints,
    ):
        checkpoints.self_test()
    assert_too_large(refused, path / ".self-test", "the checkpoint of step 3 is intact")
    assert names(tmp_path) == ["step-00000003"]


def test_a_disk_that_fills_up_with_the_backbone(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OpsinError) as refused:
        save(tmp_path, 6, tensors())
    assert_too_large(refused, checkpoint.folder(tmp_path) / "step-00000006", "there is no earlier checkpoint")
    assert names(tmp_path) == []


def test_a_folder_that_disappears_is_one_sentence(tmp_path, writing):
    save(tmp_path, 3, tensors())

    def removing(writer, *arguments):
        shutil.rmtree(writer.path)
        return WRITE(writer, *arguments)

    writing(removing)
    with pytest.raises(
        OpsinError, match="step-00000006: No such file or directory; the checkpoint of step 3 is intact"
    ):
        save(tmp_path, 6, tensors())


def test_an_unwritable_place_is_known_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with Checkpoints(tmp_path / "file", tensors(), ARCH, 1) as checkpoints:
        with pytest.raises(OpsinError) as refused:
            checkpoints.self_test()
        path = checkpoint.folder(tmp_path / "file") / ".self-test"
        assert str(refused.value) == (
            f"cannot write the checkpoint {path}: Not a directory; there is "
            "no earlier checkpoint. Free some space or choose another --out, then give the same command again."
        )
        checkpoints.save(1, {})
        with pytest.raises(OpsinError, match="step-00000001: Not a directory; there is no earlier checkpoint"):
            checkpoints.wait()


def test_the_self_test_reads_back_what_it_wrote_and_leaves_nothing(tmp_path, monkeypatch):
    state = tensors()
    with Checkpoints(tmp_path, state, ARCH, 3) as checkpoints:
        said = checkpoints.self_test()
        assert said.startswith("checkpoints work: each takes 0.1")
        assert said.endswith(" s to write and read back")
        assert names(tmp_path) == []
        assert {name: bits(tensor) for name, tensor in state.items()} == {n: bits(t) for n, t in tensors().items()}

        read = checkpoint.read_into

        def broken(reader, stored, into):
            read(reader, stored, into)
            if "weight" in into:
                into["weight"][0, 0] += 1

        monkeypatch.setattr(checkpoint, "read_into", broken)
        with pytest.raises(OpsinError, match="self-test: 'weight' reads back otherwise than it was written"):
            checkpoints.self_test()
        assert names(tmp_path) == []


@pytest.mark.parametrize(("there", "enough"), [(0, 4.1), (1, 3.1), (3, 1.1), (5, 1.1)])
def test_the_self_test_says_if_the_disk_will_not_do(tmp_path, monkeypatch, there, enough):
    """One more than `keep` is on the disk while one is being written."""
    for step in range(there):
        save(tmp_path, step, tensors(), keep=10)
    with Checkpoints(tmp_path, tensors(), ARCH, keep=3) as checkpoints:
        size = float(checkpoints.self_test().split()[4]) * 1e6
        usage = shutil.disk_usage(tmp_path)
        for room in (enough, enough - 0.2):
            free = int(room * size)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
            said = checkpoints.self_test()
            assert ("; but the disk of" in said) == (room < enough)
        assert said.endswith("for 3 and the one being written: free some space or lower --checkpoint.keep")


# ---- what is read


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extra": torch.zeros(1)}, "1 names differ, the first is 'extra'"),
        ({"weight": None, "count": None}, "2 names differ, the first is 'count'"),
        ({"weight": torch.zeros(5, 8)}, r"'weight' is \[5, 7\] torch.float32 there and \[5, 8\]"),
        ({"count": torch.zeros(())}, r"'count' is \[\] torch.int64 there and \[\] torch.float32 here"),
        ({"half": torch.zeros(3, 2)}, "torch.bfloat16 there and .* torch.float32 here"),
        # copy_ would spread one value over all of them
        ({"scale": torch.zeros(4)}, r"'scale' is \[\] torch.float32 there and \[4\]"),
    ],
)
def test_another_network_is_refused(tmp_path, changes, said):
    path = save(tmp_path, 3, tensors())
    target = {name: tensor for name, tensor in (blank(tensors()) | changes).items() if tensor is not None}
    with pytest.raises(OpsinError, match=f"{said}.*. Give the recipe it was made with, or another --out.") as refused:
        load(tmp_path, 3, target)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not any(bool(tensor.any()) for tensor in target.values())  # nothing was loaded


@pytest.mark.parametrize(
    "harm", ["cut", "rubbish", "no part", "no index", "index cut", "index rubbish", "no meta", "meta cut", "no folder"]
)
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, caplog, harm):
    path = save(tmp_path, 3, tensors())
    part, index, meta = path / "__0_0.distcp", path / ".metadata", path / "meta.json"
    harms = {
        "cut": lambda: part.write_bytes(part.read_bytes()[:-10]),
        "rubbish": lambda: part.write_bytes(bytes(range(256)) * 400),
        "no part": part.unlink,
        "no index": index.unlink,
        "index cut": lambda: index.write_bytes(index.read_bytes()[:-10]),
        "index rubbish": lambda: index.write_bytes(bytes(range(256))),
        "no meta": meta.unlink,
        "meta cut": lambda: meta.write_text(meta.read_text()[:-3]),
        "no folder": lambda: shutil.rmtree(path),
    }
    harms[harm]()
    with pytest.raises(OpsinError, match=r"cannot be read .*: remove this folder to go on from the one before") as said:
        load(tmp_path, 3, blank(tensors()))
    assert str(path) in str(said.value)
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 500 + len(str(path))
    assert caplog.records == []


def test_the_form_of_before_is_named(tmp_path):
    path = checkpoint.folder(tmp_path) / "step-00000003"
    path.mkdir(parents=True)
    (path / "state.safetensors").write_bytes(b"")
    (path / "meta.json").write_text("{}")
    with pytest.raises(OpsinError) as said:
        load(tmp_path, 3, tensors())
    assert str(said.value) == (
        f"the checkpoint {path} is of an earlier version of Opsin, which only that version can go on from: use it, or "
        "begin anew in another --out."
    )


# ---- kill -9

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_checkpoint as tests
from torch.distributed.checkpoint import FileSystemWriter
from opsin.backbone import weights
from opsin.pretrain import checkpoint

def kill_at(home, name, when=lambda *_: True, after=False):
    function = getattr(home, name)
    def killing(*arguments, **named):
        if after:
            function(*arguments, **named)
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return None if after else function(*arguments, **named)
    setattr(home, name, killing)

def half_removed(path, **named):
    if Path(path).name.endswith("-00000003.old") and Path(path).exists():
        next(Path(path).glob("*.distcp")).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    remove(path, **named)

remove = shutil.rmtree
stages = {
    "written": lambda: kill_at(FileSystemWriter, "write_data", after=True),
    "compared": lambda: kill_at(FileSystemWriter, "finish"),
    "indexed": lambda: kill_at(weights, "save"),
    "backbone": lambda: kill_at(weights, "save", after=True),
    "whole": lambda: kill_at(Path, "rename"),
    "named": lambda: kill_at(Path, "rename", lambda path, target: target.name == "step-00000006", after=True),
    "old renamed": lambda: kill_at(Path, "rename", lambda path, target: target.name.endswith(".old"), after=True),
    "old half removed": lambda: setattr(shutil, "rmtree", half_removed),
}
for stage, set_up in stages.items():
    out = Path(sys.argv[1]) / stage
    if pid := os.fork():
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, stage
        continue
    tests.save(out, 3, tests.tensors(3), keep=1)
    set_up()
    tests.save(out, 6, tests.tensors(6), keep=1)
    os._exit(1)
print(*stages, sep=",")
"""


def test_whenever_it_is_killed_what_has_a_name_is_whole(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    left = {}
    for stage in done.stdout.strip().split(","):
        out = tmp_path / stage
        left[stage] = checkpoint.steps(out)
        assert len(names(out)) > 1  # in the middle of something
        for step in left[stage]:
            assert_holds(out, step, tensors(step))
        assert names(out) == [f"step-{step:08d}" for step in left[stage]]  # tidied up by the next run
        save(out, 6, tensors(6), keep=1)
        assert names(out) == ["step-00000006"]
    assert set(left) >= {"written", "whole", "named", "old half removed"}
    assert left == {stage: {"named": [3, 6]}.get(stage, [6] if "old" in stage else [3]) for stage in left}


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    path = save(tmp_path, 3, tensors())
    for name in (".step-00000006", ".step-00000003.old", ".self-test", "mine", ".hidden"):
        (path.parent / name).mkdir()
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == [".hidden", "mine", "step-00000003"]
    assert checkpoint.steps(tmp_path) == [3]
    checkpoint.clean(tmp_path / "not there")
