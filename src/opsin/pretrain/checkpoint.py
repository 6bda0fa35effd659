"""Checkpoints: all tensors of a run, written together by all its processes, whole or not at all.

    OUT/checkpoints/step-00001000/.metadata, *.distcp   student, its average, moments, centres, loss scale
    OUT/checkpoints/step-00001000/backbone.safetensors  the average's backbone, for `opsin.load`
    OUT/checkpoints/step-00001000/meta.json             step and what the run was made of

The training waits only while its tensors are copied to host memory; a thread writes the copies. They go into a hidden
folder, are synced to disk, read back and compared bit for bit, and then the folder gets its name: one with a proper
name is complete, whatever killed the run.

The tensors are in the form of torch.distributed.checkpoint, so any number of processes reads what any other number
wrote, however weights are sharded. Its `.metadata` is a pickle, which can run code when it is read: go on from
checkpoints of your own runs only, and give others the backbone's safetensors, which cannot.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as futures_wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from opsin import ranks
from opsin.backbone import weights
from opsin.backbone.vit import Architecture
from opsin.errors import OpsinError

AVERAGE = "average.backbone."
"""How the names of the tensors of `backbone.safetensors` begin in a run."""
PATIENCE = timedelta(hours=2)
"""How long one process waits for the others to write their parts."""

MOMENT = 60.0
"""Seconds for which a write in flight may hold up a run that ends with an error."""

T = TypeVar("T")


def folder(out: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return out / "checkpoints"


def steps(out: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    found = (path.name.removeprefix("step-") for path in folder(out).glob("step-*") if path.is_dir())
    return sorted(int(step) for step in found if step.isdecimal())


def remove_after(out: Path, last: int) -> None:
    """Remove the checkpoints of later steps than `last`, which other runs that go on with this one do not have."""
    for step in steps(out):
        if step > last:
            _remove(folder(out) / f"step-{step:08d}")


def what_is_left(out: Path) -> str:
    """For a sentence about a run that ended: what it can go on from."""
    done = steps(out)
    return f"the checkpoint of step {done[-1]} is intact" if done else "there is no checkpoint yet"


def clean(out: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for path in folder(out).glob(".*"):
        if path.name.startswith((".step-", ".self-test")):
            shutil.rmtree(path, ignore_errors=True)


class Checkpoints:
    """The checkpoints of one run: of `tensors`, which are written from where they are and read to where they are.

    All processes of the run make it, and call its methods, together and in the same order; what fails in one of them
    is raised in all. A tensor is a DTensor of which each process holds a shard, or is equal in all processes, which
    then share the work. As a context, it ends the write in flight when it is left.

    Args:
        out: folder of the run, on a disk that all processes see.
        tensors: by name; the same ones for the whole run, those of the average's backbone as `average.backbone.…`.
        arch: of that backbone.
        keep: the latest checkpoints that stay.
    """

    def __init__(self, out: Path, tensors: Mapping[str, Tensor], arch: Architecture, keep: int) -> None:
        self.out, self.tensors, self.keep = out, dict(tensors), keep
        # Its own, so that nothing of the thread mixes with what the training sends.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if ranks.count() > 1 else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._sums: dict[str, int] = {}
        if ranks.first():
            clean(out)
            self._backbone = weights.empty(arch).to(self.tensors[AVERAGE + "cls_token"].dtype)
        self._planner = _Copies(self.tensors)
        plans, self._metadata = self._planner.create_global_plan(self._gather(self._planner.create_local_plan()))
        self._plan = FileSystemWriter(folder(out)).prepare_global_plan(plans)[ranks.rank()]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
            elif self._writing is not None:  # processes that it waits for may be gone
                futures_wait([self._writing], timeout=MOMENT)
        finally:
            self._thread.shutdown(wait=kind is None)

    def save(self, step: int, meta: Mapping[str, Any]) -> None:
        """Copy the tensors as they are now, then write them as the checkpoint of `step` finished steps meanwhile.

        Once it is there, all but the latest `keep` are removed.

        Raises:
            OpsinError: the write before this one failed, see `wait`.
        """
        self.wait()
        self._copy()
        self._writing = self._thread.submit(self._save, step, meta)

    def wait(self) -> None:
        """Until what `save` began is written.

        Raises:
            OpsinError: it could not be written or read back, or holds NaN or infinity. Earlier checkpoints are intact.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @property
    def failed(self) -> bool:
        """Whether what `save` began has failed already in this process; `wait` raises it in all."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def load(self, step: int) -> dict[str, Any]:
        """Copy the checkpoint of `step` into the tensors; returns its meta.

        Raises:
            OpsinError: it is damaged, or its names, shapes or types are not exactly those of the tensors.
        """
        path = folder(self.out) / f"step-{step:08d}"
        meta: dict[str, Any] = {}
        with self._agreed(lambda error: _unreadable(path, error)):
            _check_form(path)
            meta = json.loads((path / "meta.json").read_text())
            reader = FileSystemReader(path)
            stored = reader.read_metadata()
            _check_same(path, stored, self.tensors)
            read_into(reader, stored, self.tensors)
        return meta

    def self_test(self) -> str:
        """Write a checkpoint and read it back into the tensors, so that what cannot work fails now and not after hours.

        Returns:
            How large a checkpoint is and how long that took, and whether the disk will hold all that are to be kept.

        Raises:
            OpsinError: as `wait`.
        """
        began = time.perf_counter()
        path = folder(self.out) / ".self-test"
        said = partial(self._unwritable, path)
        self._copy()
        self._fill(path, said, 0, {})
        size = 0
        try:
            with self._agreed(said):
                reader = FileSystemReader(path)
                read_into(reader, reader.read_metadata(), self.tensors)
                _check_bits(self._planner.copies, lambda name: _local(self.tensors[name]))
                size = sum(file.stat().st_size for file in path.iterdir())
        finally:
            if ranks.first():
                shutil.rmtree(path, ignore_errors=True)
        return self._sizes(size, time.perf_counter() - began)

    def _sizes(self, size: int, seconds: float) -> str:
        said = f"checkpoints work: each takes {_gigabytes(size)}, and {seconds:.1f} s to write and read back"
        room = shutil.disk_usage(self.out).free
        needed = (self.keep + 1 - min(len(steps(self.out)), self.keep)) * size
        if room < needed:
            said += (
                f"; but the disk of {self.out} has {_gigabytes(room)} left and will need {_gigabytes(needed)}, for "
                f"{self.keep} and the one being written: free some space or lower --checkpoint.keep"
            )
        return said

    @torch.no_grad()
    def _copy(self) -> None:
        """Copy what this process is to write; the copies stay, so that a run never needs more memory than at first."""
        if self._group is not None:
            held = {name: _sum_of_bits(t) for name, t in self.tensors.items() if not isinstance(t, DTensor)}
            self._sums = dict(zip(held, torch.stack(list(held.values())).tolist(), strict=True))
        for item in self._plan.items:
            name = item.index.fqn
            mine = _local(self.tensors[name])
            if name not in self._planner.copies:
                self._planner.copies[name] = torch.empty(mine.shape, dtype=mine.dtype)
            self._planner.copies[name].copy_(mine)

    def _save(self, step: int, meta: Mapping[str, Any]) -> None:
        """In the thread: write what was copied, and give the folder its name."""
        final = folder(self.out) / f"step-{step:08d}"
        hidden = final.with_name("." + final.name)
        said = partial(self._unwritable, final)
        self._check_same_everywhere()
        self._fill(hidden, said, step, meta)
        with self._agreed(said):
            if ranks.first():
                if final.exists():
                    _remove(final)
                hidden.rename(final)
                _sync(final.parent)
                for old in steps(self.out)[: -self.keep]:
                    with contextlib.suppress(OSError):
                        _remove(folder(self.out) / f"step-{old:08d}")

    def _fill(self, path: Path, said: Callable[[Exception], str], step: int, meta: Mapping[str, Any]) -> None:
        """Write a checkpoint into a new folder, all of it synced and compared with what it was written from."""
        self._check_finite(step)
        try:
            with self._agreed(said):
                if ranks.first():
                    shutil.rmtree(path, ignore_errors=True)
                    path.mkdir(parents=True)
            # Before torch 2.14 it syncs all but the end of a file, so that is done here; nothing comes from a GPU.
            writer = FileSystemWriter(path, sync_files=False, per_thread_copy_ahead=0)
            written: list[WriteResult] = []
            with self._agreed(said):
                if not path.is_dir():
                    raise ValueError("it does not see the folder that process 0 made: all must share the disk of --out")
                writer.set_up_storage_writer(ranks.first())
                written = writer.write_data(self._plan, self._planner).value()
                self._verify(path, written)
            written_by_all = self._gather(written)
            with self._agreed(said):
                if ranks.first():
                    self._finish(writer, path, written_by_all, {"step": step, **meta})
        except OpsinError:
            if ranks.first():
                shutil.rmtree(path, ignore_errors=True)
            raise

    def _verify(self, path: Path, written: list[WriteResult]) -> None:
        """Compare what this process has written with what it was to write."""
        for file in path.glob(f"__{ranks.rank()}_*"):
            _sync(file)
        reader, comparison = FileSystemReader(path), _Comparison(self._planner.copies)
        mine = {result.index: result.storage_data for result in written}
        reader.set_up_storage_reader(Metadata({}, storage_data=mine), ranks.first())
        items = [
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=index,
                dest_offsets=torch.Size([0] * self._planner.copies[index.fqn].ndim),
                storage_index=index,
                storage_offsets=torch.Size([0] * self._planner.copies[index.fqn].ndim),
                lengths=self._planner.copies[index.fqn].shape,
            )
            for index in mine
        ]
        reader.read_data(LoadPlan(items), comparison)

    def _finish(
        self, writer: FileSystemWriter, path: Path, written: list[list[WriteResult]], meta: Mapping[str, Any]
    ) -> None:
        """Write what there is one of: the index of all parts, the backbone and the meta."""
        writer.finish(self._metadata, written)
        _sync(path / ".metadata")
        reader = FileSystemReader(path)
        stored = reader.read_metadata()
        places = {result.index: result.storage_data for results in written for result in results}
        if stored.storage_data != places or stored.state_dict_metadata != self._metadata.state_dict_metadata:
            raise ValueError("its .metadata reads back otherwise than it was written")
        # From the parts that all have written, so that no process needs to gather the weights from the others.
        read_into(reader, stored, {AVERAGE + name: tensor for name, tensor in self._backbone.state_dict().items()})
        file = path / "backbone.safetensors"
        weights.save(self._backbone, file, {"step": str(meta["step"])})
        _sync(file)
        with safe_open(file, framework="pt") as backbone:
            _check_bits(self._backbone.state_dict(), backbone.get_tensor)
        (path / "meta.json").write_text(json.dumps(meta, indent=1))
        _sync(path / "meta.json")
        _sync(path)

    def _check_same_everywhere(self) -> None:
        """Nothing in a run tells processes apart, so what is whole in each is equal bit for bit in all."""
        everywhere = self._gather(self._sums)
        for rank, sums in enumerate(everywhere):
            other = [name for name, total in sums.items() if total != everywhere[0][name]]
            if other:
                raise OpsinError(
                    f"process {rank} has other weights than the first: {len(other)} tensors, such as {other[0]}. "
                    "Nothing was saved, and the last checkpoint is intact. Give all processes the same kind of "
                    "device and the same version of torch; if they have, a device is faulty."
                )

    def _check_finite(self, step: int) -> None:
        bad = [name for name, copied in self._planner.copies.items() if not bool(copied.isfinite().all())]
        anywhere = set().union(*self._gather(bad))
        if anywhere:
            first = next(name for name in self.tensors if name in anywhere)
            raise OpsinError(
                f"{len(anywhere)} tensors of the run, such as {first}, hold NaN or infinity after step {step}: nothing "
                "was saved, and the last checkpoint is intact. Start again with a lower --schedule.rate in another "
                "--out."
            )

    def _unwritable(self, path: Path, error: Exception) -> str:
        done = steps(self.out)
        left = f"the checkpoint of step {done[-1]} is intact" if done else "there is no earlier checkpoint"
        return (
            f"cannot write the checkpoint {path}: {_reason(error)}; {left}. Free some space or choose another --out, "
            "then give the same command again."
        )

    def _gather(self, value: T) -> list[T]:
        """The value that every process has."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * ranks.count()
        try:
            dist.all_gather_object(values, value, cast(dist.ProcessGroup, self._group))
        except RuntimeError as error:
            raise OpsinError(
                f"the processes of the run lost one another at a checkpoint ({_reason(error)}): see what the first of "
                "them to stop said, then give the same command again to go on from the last checkpoint."
            ) from None
        return values

    @contextlib.contextmanager
    def _agreed(self, said: Callable[[Exception], str]) -> Iterator[None]:
        """Something that all processes do, each its part; if it fails in one, all of them say why, in its words."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = said(error)
        for failed in self._gather(failure):
            if failed is not None:
                raise OpsinError(failed) from None


class _Copies(DefaultSavePlanner):
    """Plans with the tensors, writes the copies; where all have the same, each process gets a part of the work."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self.copies: dict[str, Tensor] = {}
        self.set_up_planner(dict(tensors), is_coordinator=ranks.first())

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.copies[index.fqn]


class _Comparison(DefaultLoadPlanner):
    """Takes what is read only to compare it, one tensor at a time."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return torch.empty_like(self.copies[read_item.dest_index.fqn])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        _check_bits({read_item.dest_index.fqn: self.copies[read_item.dest_index.fqn]}, lambda _: tensor)


def read_into(reader: FileSystemReader, stored: Metadata, tensors: Mapping[str, Tensor]) -> None:
    """Copy into `tensors` what they are to hold, of what processes of any number have written."""
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), stored, ranks.first())
    reader.set_up_storage_reader(stored, ranks.first())
    reader.read_data(planner.create_local_plan(), planner)


def _check_form(path: Path) -> None:
    if (path / "state.safetensors").exists():
        raise OpsinError(
            f"the checkpoint {path} is of an earlier version of Opsin, which only that version can go on from: use it, "
            "or begin anew in another --out."
        )


def _check_same(path: Path, stored: Metadata, tensors: Mapping[str, Tensor]) -> None:
    there = stored.state_dict_metadata
    odd = sorted(there.keys() ^ tensors.keys())
    if odd:
        raise OpsinError(
            f"the checkpoint {path} is of another network: {len(odd)} names differ, the first is '{odd[0]}'. "
            "Give the recipe it was made with, or another --out."
        )
    for name, target in tensors.items():
        found = there[name]
        assert isinstance(found, TensorStorageMetadata)
        size, dtype = found.size, found.properties.dtype
        if size != target.shape or dtype != target.dtype:
            raise OpsinError(
                f"the checkpoint {path} is of another network: '{name}' is {list(size)} {dtype} there and "
                f"{list(target.shape)} {target.dtype} here. Give the recipe it was made with, or another --out."
            )


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, OpsinError):
        return str(error)
    return f"the checkpoint {path} cannot be read ({_reason(error)}): remove this folder to go on from the one before."


def _check_bits(written: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    for name, tensor in written.items():
        if not torch.equal(_bits(tensor), _bits(read(name).cpu())):
            raise ValueError(f"'{name}' reads back otherwise than it was written")


def _bits(tensor: Tensor) -> Tensor:
    """As whole numbers: -0 is not 0 then."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _sum_of_bits(tensor: Tensor) -> Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().reshape(-1).view(whole).sum(dtype=torch.int64)


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    detached: Any = tensor.detach()
    local: Tensor = detached.to_local() if isinstance(detached, DTensor) else detached
    return local


def _remove(path: Path) -> None:
    """Remove a checkpoint; at no moment has half of one a proper name."""
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sync(path: Path) -> None:
    """Put a file or folder on the disk, and let the system drop its copy: what is read next comes from there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """Why, in the words of the system where it has some, and the process it happened to if there are several."""
    where = f"process {ranks.rank()}: " if ranks.count() > 1 else ""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return where + cause.strerror
        cause = cause.__cause__ or cause.__context__
    return where + (" ".join(str(error).split())[:300] or type(error).__name__)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.3g} GB" if count >= 1e9 else f"{count / 1e6:,.3g} MB"
