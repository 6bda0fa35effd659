import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from opsin.distill import cache as module
from opsin.distill.cache import TeacherCache, bytes_needed
from opsin.errors import OpsinError

ROWS, SHAPE = 12, (5, 6)


def features(rows, dtype=torch.float32, shape=SHAPE):
    """Records that tell their row."""
    rows = torch.as_tensor(np.asarray(rows))
    random = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(row))) for row in rows])
    return random.to(dtype)


def open_cache(path, dtype=torch.float32, key="a", rows=ROWS, shape=SHAPE):
    return TeacherCache(path, rows, shape, dtype, key)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_was_put_comes_back_bit_for_bit(tmp_path, dtype):
    cache, rows = open_cache(tmp_path / "c", dtype), np.array([7, 0, 11])
    given = features(rows, dtype)
    given[0, 0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    cache.put(rows, given)
    assert same(cache.get(rows), given)
    assert same(cache.get(rows[::-1]), given.flip(0))
    assert same(open_cache(tmp_path / "c", dtype).get(rows), given)
    size = sum((tmp_path / "c" / name).stat().st_size for name in ("features.bin", "present.bin"))
    assert size == bytes_needed(ROWS, SHAPE, dtype) == ROWS * (30 * dtype.itemsize + 1)


def test_rows_are_there_all_or_none(tmp_path):
    cache = open_cache(tmp_path)
    assert cache.get(np.array([1])) is None
    cache.put(np.array([1, 2]), features([1, 2]))
    assert cache.get(np.array([1, 3])) is None
    assert same(cache.get(np.array([2])), features([2]))


def test_a_row_that_is_there_is_never_written_again(tmp_path):
    """Else a process killed while it writes leaves half of it, and says that it is there."""
    cache = open_cache(tmp_path)
    cache.put(np.array([1]), features([1]))
    cache.put(np.array([1, 2]), features([5, 2]))
    assert same(cache.get(np.array([1, 2])), features([1, 2]))


def test_what_is_given_back_can_be_changed(tmp_path):
    cache, rows = open_cache(tmp_path), np.array([3])
    cache.put(rows, features(rows))
    cache.get(rows).zero_()
    assert same(cache.get(rows), features(rows))


def test_strided_tensors_with_gradients(tmp_path):
    cache, rows = open_cache(tmp_path), np.array([3, 4])
    cache.put(rows, features(rows).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_())
    assert same(cache.get(rows), features(rows))


def test_one_number_per_row(tmp_path):
    cache = open_cache(tmp_path, torch.bfloat16, shape=())
    cache.put(np.array([3, 4]), torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert cache.get(np.array([4, 3])).tolist() == [2, 1]


# ---- killed processes

WRITER = """
import os, signal, sys
from pathlib import Path
import numpy as np
import torch
from opsin.distill.cache import TeacherCache

def record(row):
    return torch.full((1, 1000), float(row)).to(torch.bfloat16)

def killed_at(fatal, path):
    "Put rows, and die at one of the calls to the system, in the middle of it if it writes."
    calls = 0
    def dying(call):
        def wrapped(file, *rest):
            nonlocal calls
            calls += 1
            if calls == fatal:
                if rest:
                    call(file, rest[0][: len(rest[0]) // 2], *rest[1:])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(file, *rest)
        return wrapped
    os.pwrite, os.fsync = dying(os.pwrite), dying(os.fsync)
    cache = TeacherCache(path, 6, (1000,), torch.bfloat16, "k")
    for first in (0, 2, 4):
        cache.put(np.arange(first, first + 2), torch.cat([record(first), record(first + 1)]))

folder, fatal, survived = Path(sys.argv[1]), 0, False
while not survived:
    fatal += 1
    child = os.fork()
    if not child:
        killed_at(fatal, folder / str(fatal))
        os._exit(0)
    survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(fatal)
"""


def test_killed_at_any_call_no_row_is_there_in_half(tmp_path):
    done = subprocess.run([sys.executable, "-c", WRITER, tmp_path], capture_output=True, text=True, check=True)
    calls, there = int(done.stdout), []
    assert calls == 4 + 3 * (2 + 1 + 2) + 1  # 4 files and folders to make; 2 records, the disk, 2 flags; survived
    for fatal in range(1, calls + 1):
        cache = TeacherCache(tmp_path / str(fatal), 6, (1000,), torch.bfloat16, "k")
        found = {row: cache.get(np.array([row])) for row in range(6)}
        for row, tensor in found.items():
            assert tensor is None or (tensor == row).all(), (fatal, row)
        there.append(sum(tensor is not None for tensor in found.values()))
        cache.put(np.arange(6), torch.arange(6.0).to(torch.bfloat16)[:, None].expand(-1, 1000))
        assert (cache.get(np.arange(6))[:, 0] == torch.arange(6.0)).all()
    assert there == sorted(there)
    assert there[-1] == 6


STEADY = """
import sys
from pathlib import Path
import numpy as np
import torch
from opsin.distill.cache import TeacherCache

cache = TeacherCache(Path(sys.argv[1]), 400, (100_000,), torch.float32, "k")
print("ready", flush=True)
for row in range(400):
    cache.put(np.array([row]), torch.full((1, 100_000), float(row)))
"""


def test_kill_9_at_some_moment(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", STEADY, tmp_path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "ready\n"
    cache = TeacherCache(tmp_path, 400, (100_000,), torch.float32, "k")
    until = time.monotonic() + 30
    while cache.get(np.arange(5)) is None and time.monotonic() < until:  # and what is read meanwhile is whole
        time.sleep(0.01)
    writer.kill()
    writer.wait()
    writer.stdout.close()
    found = [cache.get(np.array([row])) for row in range(400)]
    assert 5 <= sum(tensor is not None for tensor in found) < 400
    for row, tensor in enumerate(found):
        assert tensor is None or (tensor == row).all()


def test_records_reach_the_disk_before_their_flags(tmp_path, monkeypatch):
    """A power cut cannot be had in a test: the order of the calls can."""
    cache, calls, pwrite, fsync = open_cache(tmp_path), [], os.pwrite, os.fsync

    def name(file):
        return os.readlink(f"/proc/self/fd/{file}").rsplit("/", 1)[1]

    monkeypatch.setattr(os, "pwrite", lambda file, *rest: (calls.append(("write", name(file))), pwrite(file, *rest))[1])
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(("sync", name(file))), fsync(file))[1])
    cache.put(np.array([4, 2]), features([4, 2]))
    assert calls == [
        *[("write", "features.bin")] * 2, ("sync", "features.bin"), *[("write", "present.bin")] * 2,
    ]  # fmt: skip


# ---- several processes

SHARER = """
import sys
from pathlib import Path
import numpy as np
import torch
from opsin.distill.cache import TeacherCache

part = int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
cache = TeacherCache(Path(sys.argv[1]), 300, (100,), torch.float16, "k")
for row in range(part, 300, 2):
    cache.put(np.array([row]), torch.full((1, 100), float(row), dtype=torch.float16))
"""


def test_two_processes_make_one_cache_and_fill_it(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", SHARER, tmp_path / "c", str(i)], **pipes) for i in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=60)
    assert [process.returncode for process in both] == [0, 0]
    found = TeacherCache(tmp_path / "c", 300, (100,), torch.float16, "k").get(np.arange(300))
    assert torch.equal(found, torch.arange(300.0).half()[:, None].expand(-1, 100))


def test_a_cache_that_another_process_is_making_is_waited_for(tmp_path):
    open_cache(tmp_path / "made").put(np.array([5]), features([5]))
    (tmp_path / "c").mkdir()
    with ThreadPoolExecutor(1) as worker:
        with open(tmp_path / "c" / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            opening = worker.submit(open_cache, tmp_path / "c")
            time.sleep(0.1)
            assert not opening.done()
            for name in ("features.bin", "present.bin", "cache.json"):
                shutil.copy(tmp_path / "made" / name, tmp_path / "c" / name)
        assert same(opening.result(30).get(np.array([5])), features([5]))


def test_one_process_sees_what_another_puts(tmp_path):
    writer, reader = open_cache(tmp_path), open_cache(tmp_path)
    assert reader.get(np.array([5])) is None
    writer.put(np.array([5]), features([5]))
    assert same(reader.get(np.array([5])), features([5]))


# ---- mistakes


def refused(path, *parts, **other):
    with pytest.raises(OpsinError) as error:
        open_cache(path, **other)
    for part in (str(path), *parts):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_features_of_something_else_are_refused(tmp_path):
    open_cache(tmp_path).put(np.array([5]), features([5]))
    refused(
        tmp_path,
        "features of another teacher, of other images or of other crops, and which of them differs is not recorded: ",
        "remove the folder, or choose another.",
        key="b",
    )
    refused(tmp_path, "with rows 12 (now 13): remove the folder", rows=13)
    refused(tmp_path, "with shape [5, 6] (now [6, 5])", shape=(6, 5))
    refused(tmp_path, "with dtype torch.float32 (now torch.bfloat16)", dtype=torch.bfloat16)
    assert same(open_cache(tmp_path).get(np.array([5])), features([5]))


@pytest.mark.parametrize("name", ["features.bin", "present.bin"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damaged_files_are_refused(tmp_path, name, how):
    open_cache(tmp_path)
    if how == "cut":
        os.truncate(tmp_path / name, 5)
    else:
        (tmp_path / name).unlink()
    refused(tmp_path, "holds a damaged cache of teacher features: remove the folder, or choose another.")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"key": "a"})])
def test_a_damaged_description_is_refused(tmp_path, text):
    open_cache(tmp_path)
    (tmp_path / "cache.json").write_text(text)
    refused(tmp_path, "damaged cache")


def test_a_description_of_a_later_version_is_refused(tmp_path, monkeypatch):
    open_cache(tmp_path)
    monkeypatch.setattr(module, "FORMAT", 2)
    refused(tmp_path, "with format 1 (now 2)")


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "c", "cannot keep teacher features in", "Not a directory", "they take 0.0 GB in all")


def test_rows_and_tensors_that_do_not_fit_are_refused(tmp_path):
    cache = open_cache(tmp_path)
    for rows in ([0, ROWS], [-1, 0]):
        with pytest.raises(OpsinError, match=f"has rows 0 to 11, not {rows[0]} to {rows[1]}"):
            cache.get(np.array(rows))
        with pytest.raises(OpsinError, match="has rows 0 to 11"):
            cache.put(np.array(rows), features([0, 1]))
    for wrong in (features([0, 1]), features([0]).double(), features([0])[:, :4]):
        with pytest.raises(OpsinError, match=r"takes 1 rows of \[5, 6\] in torch.float32, not a tensor "):
            cache.put(np.array([0]), wrong)
    assert cache.get(np.array([0])) is None


# ---- disks


@pytest.fixture
def limit():
    """Lets no file grow beyond a number of bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_cannot_be_made_so_large(tmp_path, limit):
    limit(10_000)
    refused(tmp_path / "c", "cannot keep teacher features in", "File too large", "0.8 GB in all", shape=(16_000_000,))
    limit(10**9)
    open_cache(tmp_path / "c", shape=(16_000_000,))  # what is left of the first try does no harm


def test_a_disk_that_fills_while_rows_are_put(tmp_path, limit):
    cache = open_cache(tmp_path)
    cache.put(np.array([0]), features([0]))
    limit(120 * 2 + 60)  # row 2 fits in half
    with pytest.raises(OpsinError, match=r"cannot keep teacher features in .*File too large.* in all; free some space"):
        cache.put(np.array([1, 2]), features([1, 2]))
    assert cache.get(np.array([1])) is None
    assert cache.get(np.array([2])) is None
    assert same(cache.get(np.array([0])), features([0]))
    limit(10**6)
    cache.put(np.array([1, 2]), features([1, 2]))
    assert same(cache.get(np.array([0, 1, 2])), features([0, 1, 2]))


def test_a_disk_without_room_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    free = 1_000_000_000
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    sizes = {"shape": (10_000_000,), "dtype": torch.bfloat16}
    refused(tmp_path / "large", "need 1.2 GB more and its disk has 1.0 GB free", rows=60, **sizes)
    open_cache(tmp_path / "fits", rows=50, **sizes)
    assert sum(file.stat().st_blocks for file in (tmp_path / "fits").iterdir()) * 512 < 100_000  # sparse
    open_cache(tmp_path / "full").put(np.arange(ROWS), features(range(ROWS)))
    free = 0
    assert same(open_cache(tmp_path / "full").get(np.array([3])), features([3]))  # needs no more room
