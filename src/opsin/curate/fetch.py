"""Copy images into tar shards of one's own: those that lie behind URLs, and those that a hook of the user's edits.

The shards are `part-00000000.tar`, …; the folder can be given wherever images are wanted, and `log/` says of every
image where it came from and which member it is, or why it is not there. A shard appears whole or not at all, and its
log after it, so the same command goes on where it was stopped.
"""

import hashlib
import io
import json
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import torch
from torch import Tensor

from opsin.curate.download import LOST, SCHEMES, download
from opsin.curate.engine import Engine, Task
from opsin.curate.heap import Heap, kind_of
from opsin.curate.hooks import call_hook, load_hook
from opsin.curate.looks import eight_bits, picture
from opsin.curate.tables import Step, Table, read
from opsin.data.decode import DecodeError, decode, header, shown, why
from opsin.data.pipeline import prepared
from opsin.errors import OpsinError, within
from opsin.output import make_folder

BATCH: Final = 65_536
"""URLs in a record batch of the kept list."""
FEW: Final = 8
"""Lost connections, and no answer at all, in a shard of more images than this mean that the network is down."""
_ENDINGS: Final = {"jpeg": ".jpg", "tiff": ".tif"}


@dataclass(frozen=True)
class Fetch:
    """How images are copied."""

    part: int = 4096
    """Images in a shard: what an interruption can cost, and the piece that a worker takes."""
    connections: int = 16
    """Downloads at a time, for each worker."""
    timeout: float = 20.0
    """Seconds that a download may take."""
    retries: int = 2
    """New attempts after a lost connection or an overloaded server, after 1, 2, 4, … seconds."""
    max_bytes: int = 50_000_000
    """Larger files are not downloaded."""
    edit_hook: str | None = None
    """`module:function`, a change of your own such as blurred faces, called as `function(image: Tensor) -> Tensor`,
    both uint8 `[3, H, W]`, of any size. Images that it leaves as they are keep their bytes, others become JPEG."""
    quality: int = 95
    """Of the JPEGs of edited images, 1 to 100."""

    def __post_init__(self) -> None:
        within(self, "", part=(1, 1e7))
        within(
            self,
            "",
            connections=(1, 1024),
            timeout=(0.1, 86400),
            retries=(0, 20),
            max_bytes=(1, 2**31),
            quality=(1, 100),
        )


@dataclass(frozen=True)
class _List:
    """The URLs of a spec, kept as an Arrow file."""

    file: Path
    count: int

    def url(self, index: int) -> str:
        batch = _batches(self.file).get_batch(index // BATCH)
        return str(batch["url"][index % BATCH].as_py() or "")


@lru_cache(maxsize=64)
def _batches(file: Path) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(file)))


def is_urls(spec: str) -> bool:
    """Whether `spec` is a list of URLs: a `.txt` whose first line is one, or Parquet with a column `url` of text."""
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".txt" and path.is_file():
        first = next(_lines(path), "")
        return first.lower().startswith(SCHEMES)
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return False
    try:
        schema = pa.parquet.read_schema(path)
    except (OSError, pa.ArrowException):
        return False  # whoever reads it as images will say what is wrong
    kind = schema.field("url").type if "url" in schema.names else None
    return kind is not None and bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def fetch(engine: Engine, data: Sequence[str], out: Path, settings: Fetch) -> dict[str, Any]:
    """Copy the images of `data` into tar shards in `out`.

    Args:
        engine: where it runs.
        data: lists of URLs (see `is_urls`) and, with an edit hook, sources as `opsin.data.sources.scan` takes them.
        out: folder of the shards, and of `log/part-00000000.jsonl`, …, a line per image: `from` (URL or place),
            `member` (name in the tar, or null), `bytes`, and `reason` (why it is not there, or null).
        settings: see `Fetch`.

    Returns:
        `images`, `fetched`, `bytes` and `reasons` (number of images that are not there, by reason).

    Raises:
        OpsinError: a source is no list of URLs and nothing edits it, nothing could be fetched, the network is down, the
            hook is no such function, or the folder holds another fetch or cannot be written.
    """
    lists = [spec for spec in data if is_urls(spec)]
    others = [spec for spec in data if spec not in lists]
    if settings.edit_hook is not None:
        load_hook(settings.edit_hook)
    elif others:
        raise OpsinError(
            f"{shown(others[0])} is no list of URLs, and no edit hook changes its images: curate it as it is."
        )
    if not data:
        raise OpsinError("no list of URLs is given: name one or more with --data.")
    out = Path(out).absolute()
    # The listing is hidden from a scan of the shards, whose index is Arrow.
    heap = Heap.scanned(others, out / ".listing")[0] if others else Heap((), (), (), out)
    digests = [[spec, _digest(Path(spec).expanduser())] for spec in lists]
    step = Step(out, "fetch", asdict(settings) | {"sources": heap.facts(), "urls": digests})
    if step.done:
        return step.facts
    urls = tuple(_kept(Path(spec).expanduser(), step.scratch / f"urls-{i}.arrow") for i, spec in enumerate(lists))
    work = _Fetch(urls, heap, settings, out)
    logs = make_folder(out / "log")
    parts = range(-(-len(work) // settings.part))
    tasks = [{"part": number} for number in parts if not _log(logs, number).exists()]
    todo = sum(min(settings.part, len(work) - task["part"] * settings.part) for task in tasks)
    for _ in engine.run("fetching images", work, tasks, total=todo):
        pass
    reasons, sizes, first = Counter[str](), 0, None
    for line in (json.loads(line) for number in parts for line in _log(logs, number).read_text().splitlines()):
        if line["reason"] is None:
            sizes += line["bytes"]
        else:
            reasons[kind_of(line["reason"])] += 1
            first = first or line
    fetched = len(work) - reasons.total()
    if not fetched:
        told = f", first {first['from']} ({first['reason']})" if first else ""
        raise OpsinError(
            f"none of the {len(work):,} images could be fetched{told}: correct the list, remove {shown(out)}, and give "
            "the command again."
        )
    return step.finish(
        {"images": len(work), "fetched": fetched, "bytes": sizes, "reasons": dict(reasons.most_common())}
    )


@dataclass(frozen=True)
class _Fetch:
    """Writes one shard and its log."""

    urls: tuple[_List, ...]
    heap: Heap
    settings: Fetch
    out: Path

    def __len__(self) -> int:
        return sum(found.count for found in self.urls) + len(self.heap)

    def __call__(self, task: Task, engine: Engine) -> dict[str, Any]:
        first = task["part"] * self.settings.part
        numbers = range(first, min(first + self.settings.part, len(self)))
        workers = self.settings.connections if self.urls else engine.threads
        batches = [numbers[start : start + workers] for start in range(0, len(numbers), workers)]
        shard = self.out / f"part-{task['part']:08d}.tar"
        partial_shard, lines, lost = shard.with_name(shard.name + ".partial"), list[dict[str, Any]](), 0
        try:
            with (
                tarfile.open(partial_shard, "w", format=tarfile.GNU_FORMAT) as tar,
                closing(prepared(self._content, batches, workers=workers, ahead=1)) as ready,
            ):
                for number, (place, content, reason) in zip(
                    numbers, (one for many in ready for one in many), strict=True
                ):
                    lost += reason is not None and reason.startswith(LOST)
                    lines.append(self._add(tar, number, place, content, reason))
            if FEW < lost == len(lines):
                raise OpsinError(
                    f"none of {lost:,} servers answers, first {lines[0]['from']} ({lines[0]['reason']}): check the "
                    "network, then give the same command again: finished shards stay."
                )
            if any(line["reason"] is None for line in lines):  # otherwise there is nothing to read in it
                partial_shard.replace(shard)
            log = _log(self.out / "log", task["part"])
            partial_log = log.with_name(log.name + ".partial")
            partial_log.write_text("".join(json.dumps(line) + "\n" for line in lines))
            partial_log.replace(log)
        except OSError as error:
            raise OpsinError(
                f"cannot write {shown(shard)} ({why(error)}): free some space and give the same command again: "
                "finished shards stay."
            ) from error
        finally:
            partial_shard.unlink(missing_ok=True)
        return {"done": len(numbers)}

    def _content(self, number: int) -> tuple[str, bytes, str | None]:
        """Where an image lies, its bytes, and why there are none."""
        ends = list(accumulate(found.count for found in self.urls))
        at = bisect_right(ends, number)
        place = ""
        try:
            if at < len(ends):
                place = self.urls[at].url(number - ends[at] + self.urls[at].count)
                limits = {name: getattr(self.settings, name) for name in ("timeout", "retries", "max_bytes")}
                return place, download(place, **limits), None
            source_number, index = self.heap.at(number - (ends[-1] if ends else 0))
            source = self.heap.source(source_number)
            place = shown(source.place(index))
            found = source.open(index)
            return place, found if isinstance(found, bytes) else found.read_bytes(), None
        except (DecodeError, OSError) as error:
            return place, b"", error.reason if isinstance(error, DecodeError) else why(error)

    def _add(self, tar: tarfile.TarFile, number: int, place: str, content: bytes, reason: str | None) -> dict[str, Any]:
        """Write the image into the shard; returns its line of the log."""
        line: dict[str, Any] = {"from": place, "member": None, "bytes": None, "reason": reason}
        if reason is not None:
            return line
        try:
            kind = header(content).format
            if self.settings.edit_hook is not None:
                content, kind = self._edited(content, kind, place)
        except DecodeError as error:
            return line | {"reason": f"no image: {error.reason}"}
        about = tarfile.TarInfo(f"{number:012d}{_ENDINGS.get(kind, '.' + kind)}")
        about.size = len(content)
        tar.addfile(about, io.BytesIO(content))
        return line | {"member": about.name, "bytes": about.size}

    def _edited(self, content: bytes, kind: str, place: str) -> tuple[bytes, str]:
        """What the hook makes of an image, and its format."""
        pixels = eight_bits(decode(content)).contiguous()
        edited = call_hook(str(self.settings.edit_hook), pixels.clone(), place)
        if not (
            isinstance(edited, Tensor)
            and edited.dtype == torch.uint8
            and edited.ndim == 3
            and edited.shape[0] == 3
            and edited.numel()
        ):
            found = f"{edited.dtype} {list(edited.shape)}" if isinstance(edited, Tensor) else type(edited).__name__
            raise OpsinError(
                f"the hook '{self.settings.edit_hook}' returned {found} for {place}: return an image, uint8 [3, H, W]."
            )
        edited = edited.cpu()
        if kind != "npy" and torch.equal(edited, pixels):
            return content, kind
        file = io.BytesIO()
        picture(edited).save(file, "JPEG", quality=self.settings.quality, subsampling=0)
        return file.getvalue(), "jpeg"


def _lines(path: Path) -> Iterator[str]:
    """The lines of a list that are neither empty nor begin with #."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            stripped = (line.strip() for line in file)
            yield from (line for line in stripped if line and not line.startswith("#"))
    except OSError as error:
        raise OpsinError(f"cannot read the list {shown(path)} ({why(error)}): check its permissions.") from error


def _urls(path: Path) -> Iterator[list[str | None]]:
    """The URLs of a list, many at a time."""
    if path.suffix.lower() == ".parquet":
        table = Table(path)
        for part in table.parts:
            yield read(part, ["url"])["url"].to_pylist()
    else:
        lines = _lines(path)
        while some := list(islice(lines, BATCH)):
            yield list(some)


def _kept(path: Path, file: Path) -> _List:
    """The URLs of a list as an Arrow file in batches of `BATCH`."""
    schema, waiting, count = pa.schema([("url", pa.string())]), list[str | None](), 0
    partial_file = file.with_suffix(".partial")
    with pa.OSFile(str(partial_file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:

        def write(urls: list[str | None]) -> None:
            writer.write_batch(pa.record_batch([pa.array(urls, pa.string())], schema=schema))

        for some in _urls(path):
            count += len(some)
            waiting += some
            while len(waiting) >= BATCH:
                write(waiting[:BATCH])
                del waiting[:BATCH]
        if waiting:
            write(waiting)
    partial_file.replace(file)
    return _List(file, count)


def _digest(path: Path) -> str:
    """SHA-256 of a list."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for piece in iter(partial(file.read, 1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def _log(folder: Path, part: int) -> Path:
    return folder / f"part-{part:08d}.jsonl"
