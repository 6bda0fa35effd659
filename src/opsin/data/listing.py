"""What a folder, a bucket, a pattern or a text list holds: images, shards, or neither."""

import fnmatch
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import get_ident
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from opsin.data.decode import shown, why
from opsin.data.files import File, Place, Store
from opsin.data.progress import progress as shown_progress
from opsin.errors import OpsinError

IMAGES: Final = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Endings, in any case, that make a file an image."""
ARRAYS: Final = (".npy",)
"""Endings, in any case, that make a file an image where no other images are: beside others it holds labels and such."""
SHARDS: Final = (".tar", ".parquet", ".arrow")
"""Endings, in any case, that make a file a shard of images."""
PACKED: Final = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
"""Endings of compressed tars, which cannot be read at an offset."""
MOST: Final = 1_000_000
"""Names that a pattern in braces may stand for."""


@dataclass
class Listing:
    """What a scan sees, and what tells later whether it still holds."""

    files: list[tuple[str, int]] = field(default_factory=list)
    """Path and size in bytes of every image."""
    stamps: list[tuple[str, int, int]] = field(default_factory=list)
    """Every folder with its modification time in ns and its number of entries; or the list file with time and size."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """Folders that could not be listed and links that lead nowhere, each with the reason."""
    others: Counter[str] = field(default_factory=Counter)
    """Endings of the files that are neither images nor shards."""
    shards: list[File] = field(default_factory=list)
    """The files that hold images."""
    arrays: list[tuple[str, int]] = field(default_factory=list)
    """Path and size in bytes of every NumPy array, until `settle`."""

    def add(self, file: File) -> None:
        """Sort a file in by its ending."""
        kind = ending(file.name)
        if kind in IMAGES:
            self.files.append((file.name, file.size))
        elif kind in SHARDS:
            self.shards.append(file)
        elif kind in ARRAYS:
            self.arrays.append((file.name, file.size))
        else:
            self.others[kind] += 1

    def settle(self) -> "Listing":
        """Decide once all files are known whether arrays are images, and return this listing."""
        if self.files or self.shards:
            self.others.update(ending(name) for name, _ in self.arrays)
        else:
            self.files = self.arrays
        self.arrays = []
        return self


def ending(name: str) -> str:
    """In lower case, that of a compressed tar whole."""
    name = name.lower()
    return next((packed for packed in PACKED if name.endswith(packed)), os.path.splitext(name)[1])


def is_image(name: str) -> bool:
    """Whether a path in a tar ends like an image, and none of its parts is hidden; arrays there are side files."""
    return ending(name) in IMAGES and not _hidden(name)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def list_store(store: Store) -> Listing:
    """All that lies below a folder of an object store, hidden entries left out."""
    listing = Listing()
    for file in store.list():
        if not _hidden(file.name):
            listing.add(file)
    return listing.settle()


def check_arrow(store: Store, listing: Listing) -> None:
    """Leave only those Arrow files that `datasets` counts to a data set on disk: it keeps others beside them.

    Raises:
        OpsinError: the folder holds several splits, or not all files of the data set.
    """
    if not any(ending(file.name) == ".arrow" for file in listing.shards):
        return
    splits = _json(store, "dataset_dict.json").get("splits")
    if splits:
        where = shown(store.root.shown)
        raise OpsinError(
            f"{where} holds a data set with the splits {', '.join(splits)}: give one of them, such as "
            f"{where}/{splits[0]}."
        )
    names = [file["filename"] for file in _json(store, "state.json").get("_data_files", [])]
    if not names:
        return
    there = {file.name for file in listing.shards}
    missing = [name for name in names if name not in there]
    if missing:
        raise OpsinError(
            f"{len(missing)} of the {len(names)} files that {shown(store.root.shown)}/state.json lists do not exist, "
            f"first '{missing[0]}': save or copy the data set again."
        )
    listing.shards = [file for file in listing.shards if file.name in names]


def _json(store: Store, name: str) -> dict[str, Any]:
    try:
        found = json.loads(store.whole(name))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise OpsinError(
            f"{shown(store.root.shown)}/{name} is damaged: save or copy the data set again, or give its .arrow files "
            "with a pattern."
        ) from None
    return found if isinstance(found, dict) else {}


def is_pattern(path: str) -> bool:
    """Whether `*`, `?`, `[…]` or `{…}` stands in it."""
    return bool(re.search(r"[*?\[{]", path))


def list_pattern(place: Place) -> tuple[Place, Listing]:
    """The files that a pattern stands for, and the folder that their names start from.

    `{000..127}` counts, with the digits that are given, `{a,b}` lists; `*`, `?` and `[…]` stand for any part of a
    file's name.

    Raises:
        OpsinError: a name in braces does not exist, or nothing matches.
    """
    where = shown(place.shown)
    names = list(_braces(place.path))
    common = re.match(r"[^*?\[{]*/", place.path)
    prefix = common.group() if common else ""
    root = place.at(prefix.rstrip("/") or "/")
    listing, listed, missing = Listing(), dict[str, dict[str, File]](), []
    for name in names:
        folder, _, base = name.removeprefix(prefix).rpartition("/")
        if re.search(r"[*?\[]", folder):
            raise OpsinError(f"{where} has a wildcard in a folder's name: put it into the name of the file.")
        if folder not in listed:
            store = Store(root.child(folder))
            listed[folder] = {file.name: file for file in store.list(recursive=False)}
        wild = is_pattern(base)
        found = [
            file
            for file in listed[folder].values()
            if (fnmatch.fnmatchcase(file.name, base) and not file.name.startswith(".") if wild else file.name == base)
        ]
        if not found and not wild:
            missing.append(name.removeprefix(prefix))
        for file in found:
            listing.add(file._replace(name=f"{folder}/{file.name}" if folder else file.name))
    listing.settle()
    if missing:
        raise OpsinError(
            f"{len(missing)} of the {len(names)} files that {where} names do not exist, first '{shown(missing[0])}': "
            "correct the pattern."
        )
    if not (listing.files or listing.shards or listing.others):
        raise OpsinError(f"no file matches {where}: correct the pattern.")
    return root, listing


def _braces(text: str) -> Iterator[str]:
    """All texts that the braces stand for, `MOST` at most."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if not found:
        yield text
        return
    first, last, listed = found.groups()
    if listed is None and int(last) - int(first) >= MOST:
        raise OpsinError(f"{{{first}..{last}}} stands for more than {MOST:,} names: give a wildcard.")
    if listed is None:
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = listed.split(",")
    for choice in choices:
        yield from _braces(text[: found.start()] + choice + text[found.end() :])


def walk(root: Path, progress: bool) -> Listing:
    """Every image and shard below `root`.

    Links to folders wait until all that is reachable without them is listed, and are then followed in sorted order: so
    which of several ways to a folder counts does not depend on the order in which the file system lists names.
    """
    listing = Listing()
    seen: set[tuple[int, int]] = set()
    pending, links = [""], list[str]()
    with shown_progress("scanning", None, "images", progress) as advance:
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
    return listing.settle()


def _list_folder(root: Path, folder: str, listing: Listing, folders: list[str], links: list[str]) -> int:
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
                if ending(entry.name) not in IMAGES + ARRAYS + SHARDS:
                    listing.others[ending(entry.name)] += 1
                    continue
                about = entry.stat()
                if stat.S_ISREG(about.st_mode):
                    listing.add(File(path, about.st_size, about.st_mtime_ns))
            except OSError as error:
                listing.unreadable.append((path, why(error)))
    return entries


def read_list(path: Path) -> Listing:
    """The files that a text list names."""
    try:
        about, content = path.stat(), path.read_bytes()
    except OSError as error:
        raise OpsinError(f"cannot read the list {shown(path)} ({why(error)}): check its permissions.") from error
    lines = [line.strip() for line in content.removeprefix(b"\xef\xbb\xbf").splitlines()]
    names = [os.fsdecode(line) for line in lines if line and not line.startswith(b"#")]
    listing = Listing(stamps=[("", about.st_mtime_ns, about.st_size)])
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


def recall(kept: Path, root: Path) -> Listing | None:
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
    return Listing([(path, size) for path, size, time in rows if time is None], stamps)


def keep(listing: Listing, kept: Path) -> None:
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
    partial = kept.with_suffix(f".{os.getpid()}-{get_ident()}")  # threads open sources, too
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
