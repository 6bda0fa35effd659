"""Find images: a folder of any depth, ImageNet's layouts, or a text list.

No label file, no metadata step: `scan` lists the files in an order that is the same on every machine, and `summarise`
says what they are.
"""

import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from opsin.data.decode import DecodeError, Header, header, shown, why
from opsin.data.order import Order
from opsin.errors import OpsinError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Endings, in any case, that make a file in a folder an image."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a folder or list, in a fixed order."""

    root: Path
    """Absolute folder that `paths` start from: the scanned folder, or the one that holds the list."""
    paths: list[str]
    """Paths relative to `root` (a list may hold absolute ones), sorted by their bytes."""
    labels: NDArray[np.int64] | None
    """Index into `classes` of every image, if all images of a folder lie in sub-folders; None otherwise."""
    classes: list[str]
    """Names of the first-level folders that hold images, sorted by their bytes; empty without labels."""
    fingerprint: str
    """SHA-256 over paths and file sizes: another value means other data."""
    total_bytes: int
    """Sum of the file sizes."""
    unreadable: list[tuple[str, str]]
    """Folders that could not be listed and links that lead nowhere, relative to `root`, each with the reason."""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def order(self) -> Order:
        """Any image can follow any."""
        return Order(len(self))

    def path(self, index: int) -> Path:
        """Where image `index` lies."""
        return self.root / self.paths[index]


@dataclass
class _Listing:
    """What a scan sees, and what tells later whether it still holds."""

    files: list[tuple[str, int]]
    """Path and size in bytes."""
    stamps: list[tuple[str, int, int]]
    """Every folder with its modification time in ns and its number of entries; or the list file with time and size."""
    unreadable: list[tuple[str, str]]
    others: Counter[str]
    """Endings of the files that are not images."""


def scan(spec: str | Path, cache: Path | None = None, progress: bool = True) -> Source:
    """List the images of `spec`.

    Args:
        spec: a folder, searched to any depth: hidden entries are skipped, links to folders followed, and a folder that
            can be reached in several ways is listed once. If every image lies in a sub-folder, the first-level folder
            is its label: point at ImageNet's `train`. Or a `.txt` list: one path per line, relative to the list's
            folder or absolute, without labels; empty lines and lines that begin with `#` are skipped, a path given
            twice counts twice.
        cache: folder (in the run's output, never beside the data) that keeps the listing. It is reused if every folder
            has the modification time and number of entries that were recorded, or the list its time and size. This
            check cannot see a file that was overwritten in place, linked files and files of a list that changed or
            vanished, and a renaming within the tick of the file system's clock.
        progress: show a counter if stderr is a terminal.

    Raises:
        OpsinError: there is nothing at `spec`, it is neither folder nor list, it holds no image, a listed file is
            missing, or the cache cannot be written.
    """
    root = Path(os.path.abspath(spec))
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except OSError as error:
        raise OpsinError(
            f"no data at {shown(root)} ({why(error)}): give a folder of images or a .txt list of them."
        ) from error
    if not is_folder and root.suffix.lower() != ".txt":
        raise OpsinError(f"{shown(root)} is neither a folder nor a .txt list of image paths: give one of these.")
    kept = None if cache is None else cache / f"listing-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.parquet"
    listing = None if kept is None else _recall(kept, root)
    if listing is None:
        listing = _walk(root, progress) if is_folder else _read_list(root)
        if kept is not None and listing.files and not listing.unreadable:  # a folder may become readable unnoticed
            _keep(listing, kept)
    if not listing.files:
        raise _no_images(root, listing)
    if listing.unreadable:
        where, reason = listing.unreadable[0]
        log.warning("%d entries could not be read, first %s (%s)", len(listing.unreadable), shown(root / where), reason)
    return _source(root, listing, is_folder)


def _source(root: Path, listing: _Listing, is_folder: bool) -> Source:
    listing.files.sort(key=lambda file: os.fsencode(file[0]))
    digest = hashlib.sha256()
    for path, size in listing.files:
        digest.update(b"%b\0%d\n" % (os.fsencode(path), size))
    paths = [path for path, _ in listing.files]
    labels, classes = None, []
    if is_folder and all("/" in path for path in paths):
        names = [path.partition("/")[0] for path in paths]
        classes = sorted(set(names), key=os.fsencode)
        index = {name: i for i, name in enumerate(classes)}
        labels = np.array([index[name] for name in names], dtype=np.int64)
    return Source(
        root=root if is_folder else root.parent,
        paths=paths,
        labels=labels,
        classes=classes,
        fingerprint=digest.hexdigest(),
        total_bytes=sum(size for _, size in listing.files),
        unreadable=listing.unreadable,
    )


def _walk(root: Path, progress: bool) -> _Listing:
    """Every image below `root`.

    Links to folders wait until all that is reachable without them is listed, and are then followed in sorted order: so
    which of several ways to a folder counts does not depend on the order in which the file system lists names.
    """
    listing = _Listing([], [], [], Counter())
    seen: set[tuple[int, int]] = set()
    pending, links = [""], list[str]()
    with _progress("scanning", None, progress) as advance:
        while pending:
            folder = pending.pop()
            try:
                about = os.stat(root / folder)
                if (about.st_dev, about.st_ino) not in seen:
                    seen.add((about.st_dev, about.st_ino))
                    known = len(listing.files)
                    entries = _list_folder(root, folder, listing, pending, links)
                    listing.stamps.append((folder, about.st_mtime_ns, entries))
                    advance(len(listing.files) - known)
            except OSError as error:
                listing.unreadable.append((folder, why(error)))
            if not pending and links:
                links.sort(key=os.fsencode, reverse=True)
                pending.append(links.pop())
    return listing


def _list_folder(root: Path, folder: str, listing: _Listing, folders: list[str], links: list[str]) -> int:
    """Add what lies directly in `folder`; returns the number of its entries."""
    entries = 0
    with os.scandir(root / folder) as scanned:
        for entry in scanned:
            entries += 1
            if entry.name.startswith("."):
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                    continue
                extension = os.path.splitext(entry.name)[1].lower()
                if extension not in EXTENSIONS:
                    listing.others[extension] += 1
                    continue
                about = entry.stat()
                if stat.S_ISREG(about.st_mode):
                    listing.files.append((path, about.st_size))
            except OSError as error:
                listing.unreadable.append((path, why(error)))
    return entries


def _read_list(path: Path) -> _Listing:
    """The files that a text list names."""
    try:
        about, content = path.stat(), path.read_bytes()
    except OSError as error:
        raise OpsinError(f"cannot read the list {shown(path)} ({why(error)}): check its permissions.") from error
    lines = [line.strip() for line in content.removeprefix(b"\xef\xbb\xbf").splitlines()]
    names = [os.fsdecode(line) for line in lines if line and not line.startswith(b"#")]
    listing = _Listing([], [("", about.st_mtime_ns, about.st_size)], [], Counter())
    missing: list[str] = []
    for name in names:
        try:
            file = os.stat(path.parent / name)
        except (OSError, ValueError):  # ValueError: a zero byte, the list is not text
            missing.append(name)
        else:
            if stat.S_ISREG(file.st_mode):
                listing.files.append((name, file.st_size))
            else:
                missing.append(name)
    if missing:
        raise OpsinError(
            f"{len(missing)} of the {len(names)} files that {shown(path)} lists do not exist, first "
            f"'{shown(missing[0])}': correct the paths (relative ones start from the list's folder)."
        )
    return listing


def _recall(kept: Path, root: Path) -> _Listing | None:
    """The listing in `kept`, if nothing seems to have changed since."""
    try:
        table = pq.read_table(kept)
        paths = [os.fsdecode(path) for path in table["path"].to_pylist()]
        sizes, times = table["size"].to_pylist(), table["mtime_ns"].to_pylist()
    except (OSError, KeyError, pa.ArrowException):  # none yet, or damaged: scan again
        return None
    rows = list(zip(paths, sizes, times, strict=True))
    stamps = [(path, time, size) for path, size, time in rows if time is not None]
    for path, time, size in stamps:
        try:
            about = os.stat(root / path)
            found = len(os.listdir(root / path)) if stat.S_ISDIR(about.st_mode) else about.st_size
        except OSError:
            return None
        if (about.st_mtime_ns, found) != (time, size):
            return None
    return _Listing([(path, size) for path, size, time in rows if time is None], stamps, [], Counter())


def _keep(listing: _Listing, kept: Path) -> None:
    """Write a listing as one table: a row with a time is a folder (or the list), one without is an image."""
    rows: list[tuple[str, int, int | None]] = [(path, size, time) for path, time, size in listing.stamps]
    rows += [(path, size, None) for path, size in listing.files]
    table = pa.table(
        {
            # Binary, because a file name need not be UTF-8.
            "path": pa.array([os.fsencode(row[0]) for row in rows], pa.binary()),
            "size": pa.array([row[1] for row in rows], pa.int64()),
            "mtime_ns": pa.array([row[2] for row in rows], pa.int64()),
        }
    )
    partial = kept.with_suffix(f".{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, partial)
        partial.replace(kept)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OpsinError(
            f"cannot keep the list of images in {shown(kept.parent)} ({why(error)}): choose another output folder or "
            "free some space."
        ) from error


def _no_images(root: Path, listing: _Listing) -> OpsinError:
    where = shown(root)
    if listing.unreadable:
        path, reason = listing.unreadable[0]
        return OpsinError(
            f"found no images in {where}, and {len(listing.unreadable)} of its entries cannot be read, first "
            f"{shown(root / path)} ({reason}): check the permissions."
        )
    if listing.others:
        seen = ", ".join(f"{count} {shown(ending) or 'without an ending'}" for ending, count in _most(listing.others))
        return OpsinError(
            f"{where} holds files but no images (seen: {seen}): give a folder with {' '.join(EXTENSIONS)} files."
        )
    return OpsinError(f"{where} is empty: give a folder with images in it, or a .txt list that names some.")


@dataclass(frozen=True)
class Summary:
    """What a source holds, by the headers of its files; `str()` gives a short table."""

    root: Path
    """Where the source lies."""
    images: int
    """Images in the source."""
    classes: int
    """Labels in the source; 0 without."""
    total_bytes: int
    """Bytes of all files."""
    read: int
    """Files whose headers were read: all, or an evenly spaced sample."""
    formats: dict[str, int]
    """Readable files per format, the most frequent first."""
    width: tuple[int, int, int]
    """Smallest, median and largest width in pixels (zeros if nothing is readable)."""
    height: tuple[int, int, int]
    """The same of the height."""
    unreadable: list[tuple[str, str]]
    """Files without a readable header, relative to `root`, each with the reason."""

    def __str__(self) -> str:
        labels = f" in {self.classes:,} classes" if self.classes else ""
        lines = [
            f"{shown(self.root)}: {self.images:,} images{labels}, {_bytes(self.total_bytes)}",
            "  formats     " + (", ".join(f"{name} {n:,}" for name, n in self.formats.items()) or "none"),
            f"  width       {self.width[0]:,} to {self.width[2]:,}, median {self.width[1]:,}",
            f"  height      {self.height[0]:,} to {self.height[2]:,}, median {self.height[1]:,}",
            f"  unreadable  {len(self.unreadable):,}",
        ]
        lines += [f"    {shown(path)}: {reason}" for path, reason in self.unreadable[:3]]
        if len(self.unreadable) > 3:
            lines.append(f"    and {len(self.unreadable) - 3:,} more")
        if self.read < self.images:
            lines.append(f"  Formats, sizes and unreadable files are of a sample: {self.read:,} evenly spaced images.")
        return "\n".join(lines)


def summarise(source: Source, workers: int, limit: int | None = None, progress: bool = True) -> Summary:
    """Read the headers of `source` in `workers` threads.

    A damaged file with a sound header is not noticed here, but when it is decoded.

    Args:
        source: what `scan` found.
        workers: threads.
        limit: read at most this many files, evenly spaced over the source.
        progress: show a bar if stderr is a terminal.
    """
    count = len(source) if limit is None else min(limit, len(source))
    indices = [i * len(source) // count for i in range(count)]
    formats: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    unreadable: list[tuple[str, str]] = []

    def read(some: list[int]) -> list[Header | tuple[str, str]]:
        found: list[Header | tuple[str, str]] = []
        for index in some:
            try:
                found.append(header(source.path(index)))
            except DecodeError as error:
                found.append((source.paths[index], error.reason))
        return found

    # Many files per task: a future for each of millions would need gigabytes.
    tasks = [indices[start : start + 256] for start in range(0, count, 256)]
    with ThreadPoolExecutor(workers) as pool, _progress("reading headers", count, progress) as advance:
        for results in pool.map(read, tasks):
            for result in results:
                if isinstance(result, Header):
                    formats[result.format] += 1
                    sizes.append((result.width, result.height))
                else:
                    unreadable.append(result)
            advance(len(results))
    spread = np.array(sizes or [(0, 0)], dtype=np.int64)
    low, middle, high = spread.min(0), np.sort(spread, axis=0)[len(spread) // 2], spread.max(0)
    return Summary(
        root=source.root,
        images=len(source),
        classes=len(source.classes),
        total_bytes=source.total_bytes,
        read=count,
        formats=dict(_most(formats)),
        width=(int(low[0]), int(middle[0]), int(high[0])),
        height=(int(low[1]), int(middle[1]), int(high[1])),
        unreadable=unreadable,
    )


@contextmanager
def _progress(what: str, total: int | None, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that counts images on, visibly if stderr is a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("images"))
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda images: bar.advance(task, images)


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first, equally frequent ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
