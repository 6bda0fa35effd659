"""Find images: folders, buckets, lists and shards of them.

No label file, no metadata step: `scan` lists what is there in an order that is the same on every machine, and
`summarise` says what it is. docs/data.md shows everything that can be given, by example.
"""

import hashlib
import logging
import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from opsin.data import listing as listings
from opsin.data.decode import DecodeError, Header, header, shown, why
from opsin.data.files import File, Place, Store, joined, locate
from opsin.data.listing import ARRAYS, IMAGES, PACKED, SHARDS, Listing, ending
from opsin.data.manifest import Kept, Manifest, read_manifest
from opsin.data.order import Order
from opsin.data.progress import progress as shown_progress
from opsin.data.shards import Policy, index_shards
from opsin.errors import OpsinError

PLACES, RUN = 10, 100
"""Where a summary of shards looks: at so many evenly spaced places, at so many successive images."""

log = logging.getLogger(__name__)


class Images(Protocol):
    """What gives the images of a source, one by one, to any number of threads."""

    @property
    def kind(self) -> str:
        """What they are stored in, for a person."""

    @property
    def order(self) -> Order:
        """The order in which an epoch visits them."""

    def name(self, index: int) -> str:
        """Of an image, relative to the source's root."""

    def open(self, index: int) -> Path | bytes:
        """The file of an image, or its content; raises DecodeError if it has none."""


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a folder, bucket, list or set of shards, in a fixed order."""

    root: str
    """Absolute path or URI that names start from: the scanned folder, or the one that holds the list or the shards."""
    images: Images
    """Where the images are."""
    count: int
    """Number of images."""
    labels: NDArray[np.int64] | None
    """Index into `classes` of every image: its first-level folder, if all images lie in sub-folders, or what shards say
    of all of theirs; None otherwise."""
    classes: list[str]
    """Names of the classes that have images, folders sorted by their bytes, labels by number; empty without labels."""
    fingerprint: str
    """SHA-256 over names, file sizes and the members of shards: another value means other data."""
    total_bytes: int
    """Sum of the sizes of the files or shards."""
    unreadable: list[tuple[str, str]]
    """Folders that could not be listed, links that lead nowhere, and damaged shards that were left out, relative to
    `root`, each with the reason."""

    def __len__(self) -> int:
        return self.count

    @property
    def order(self) -> Order:
        """The order in which an epoch visits the images."""
        return self.images.order

    def name(self, index: int) -> str:
        """The path of image `index` relative to `root`; in a shard, the shard's and the member's or row's name."""
        return self.images.name(index)

    def place(self, index: int) -> str:
        """The same with `root`."""
        name = self.name(index)
        return name if "://" in name else os.path.join(self.root, name)  # a manifest names whole URIs

    def open(self, index: int) -> Path | bytes:
        """The file of image `index`, or its content.

        Raises:
            DecodeError: this image cannot be had.
            OpsinError: the connection is lost, or a shard is damaged and the run is to stop.
        """
        return self.images.open(index)


class ImageFiles:
    """Images that are files of their own."""

    kind = "image files"

    def __init__(self, store: Store, paths: list[str]) -> None:
        self._store, self._paths = store, paths

    @property
    def order(self) -> Order:
        """Any image can follow any."""
        return Order(len(self._paths))

    def name(self, index: int) -> str:
        """The path relative to the root; a list may give absolute ones."""
        return self._paths[index]

    def open(self, index: int) -> Path | bytes:
        """A local path, or what the object store holds."""
        if self._store.root.local:
            return Path(self._store.root.path, self._paths[index])
        try:
            return self._store.whole(self._paths[index])
        except FileNotFoundError as error:
            raise DecodeError(os.path.join(self._store.root.shown, self._paths[index]), why(error)) from error


def scan(spec: str | Path, cache: Path | None = None, progress: bool = True, bad_shards: Policy = "skip") -> Source:
    """List the images of `spec`, which is on this machine or a URI such as `s3://bucket/folder` (see `files.locate`).

    Args:
        spec: what it is shows in what is there:
            - A folder of images, searched to any depth: hidden entries are skipped, links to folders followed, and a
              folder that can be reached in several ways is listed once. If every image lies in a sub-folder, the
              first-level folder is its label: point at ImageNet's `train`. NumPy arrays (`.npy`) are images where
              no other images are; beside others they are left alone.
            - A `.txt` list on this machine: one path per line, relative to the list's folder or absolute, without
              labels; empty lines and lines that begin with `#` are skipped, a path given twice counts twice.
            - Shards: `.tar` (see `tars`), `.parquet` or `.arrow` (see `columns`), a single one, a folder of them, or a
              data set that `datasets` saved.
            - A pattern of files of one kind, such as `shards-{000..127}.tar` or `*.parquet`.
            - The manifest of a curation: the images that it kept, where they lie, without labels.
        cache: folder (in the run's output, never beside the data) that keeps the listing of images or the index of
            shards. A listing is reused if every folder has the modification time and number of entries that were
            recorded, or the list its time and size. This check cannot see a file that was overwritten in place, linked
            files and files of a list that changed or vanished, and a renaming within the tick of the file system's
            clock. The index of a shard, or the rows of a manifest, are reused while its size and time are the same.
        progress: show a counter if stderr is a terminal.
        bad_shards: leave out damaged shards, and name them, or stop.

    Raises:
        OpsinError: there is nothing at `spec`, it is nothing of these or several at once, it holds no image, a listed
            file is missing, a shard is damaged and `bad_shards` is "stop", the cache cannot be written, an object store
            does not answer, or a source of a manifest is not what it was.
    """
    place = locate(os.fspath(spec))
    if ending(place.path) == ".parquet" and not listings.is_pattern(place.path):
        manifest = read_manifest(place, cache)
        if manifest is not None:
            return _curated(manifest, [scan(one["spec"], cache, progress, bad_shards) for one in manifest.sources])
    root, listing, is_folder = (_local if place.local else _remote)(place, cache, progress)
    store = Store(root)
    listings.check_arrow(store, listing)
    if listing.unreadable:
        where, reason = listing.unreadable[0]
        first = shown(joined(root.shown, where))
        log.warning("%d entries could not be read, first %s (%s)", len(listing.unreadable), first, reason)
    kinds = Counter(ending(file.name) for file in listing.shards)
    if len(kinds) + bool(listing.files) > 1:
        held = [f"{len(listing.files):,} image files"] * bool(listing.files)
        held += [f"{count:,} {kind} shards" for kind, count in _most(kinds)]
        raise OpsinError(
            f"{shown(place.shown)} holds {' and '.join(held)}: give a folder of one kind, or a pattern such as "
            f"{shown(root.shown)}/*{next(iter(kinds))}."
        )
    packed = [kind for kind in PACKED if kind in listing.others]
    if packed and not listing.files:
        raise OpsinError(
            f"{shown(place.shown)} holds {packed[0]} files, in which no image can be reached without unpacking all "
            "before it: unpack them to .tar, which for images is no larger."
        )
    if not kinds and not listing.files:
        raise _no_images(place, listing)
    if not kinds:
        return _source(store, listing, is_folder)
    files = sorted(listing.shards, key=lambda file: os.fsencode(file.name))
    _check_names(root, files)
    kept = None if cache is None else cache / f"shards-{_digest(place)}.arrow"
    shards = index_shards(store, next(iter(kinds)), files, kept, bad_shards, progress)
    labels, classes = shards.labels()
    return Source(
        root=root.shown,
        images=shards,
        count=len(shards),
        labels=labels,
        classes=classes,
        fingerprint=shards.fingerprint,
        total_bytes=shards.total_bytes,
        unreadable=listing.unreadable + shards.left_out,
    )


def _local(place: Place, cache: Path | None, progress: bool) -> tuple[Place, Listing, bool]:
    """The root, what lies there, and whether `place` is the folder rather than something in it."""
    path, where = Path(place.path), shown(place.shown)
    try:
        about = path.stat()
    except (OSError, ValueError) as error:
        if listings.is_pattern(place.path):
            return *listings.list_pattern(place), False
        reason = why(error) if isinstance(error, OSError) else str(error)
        raise OpsinError(f"no data at {where} ({reason}): give a folder of images or a .txt list of them.") from error
    is_folder, kind = stat.S_ISDIR(about.st_mode), ending(place.path)
    if not is_folder and kind in SHARDS + PACKED:
        listing = Listing()
        listing.add(File(place.base, about.st_size, about.st_mtime_ns))
        return place.folder(), listing, False
    if not is_folder and kind != ".txt":
        raise OpsinError(
            f"{where} is neither a folder nor a .txt list of image paths nor a shard ({', '.join(SHARDS)}): give one "
            "of these."
        )
    kept = None if cache is None else cache / f"listing-{_digest(place)}.parquet"
    known = None if kept is None else listings.recall(kept, path)
    listing = known or (listings.walk(path, progress) if is_folder else listings.read_list(path))
    if kept is not None and known is None and listing.files and not (listing.unreadable or listing.shards):
        listings.keep(listing, kept)  # not if a folder is unreadable: it may become readable unnoticed
    return place if is_folder else place.folder(), listing, is_folder


def _remote(place: Place, cache: Path | None, progress: bool) -> tuple[Place, Listing, bool]:  # noqa: ARG001
    """As `_local`, in an object store, where listing anew is the only way to know whether a listing holds."""
    if listings.is_pattern(place.path):
        return *listings.list_pattern(place), False
    found = Store(place.folder()).find(place.base) if "/" in place.path else None
    if found is not None:
        if ending(found.name) not in SHARDS + PACKED:
            raise OpsinError(
                f"{shown(place.shown)} is not a shard ({', '.join(SHARDS)}): give one, or a folder of images or shards."
            )
        listing = Listing()
        listing.add(found)
        return place.folder(), listing, False
    return place, listings.list_store(Store(place)), True


def _digest(place: Place) -> str:
    return hashlib.sha256(os.fsencode(place.shown)).hexdigest()[:16]


def _check_names(root: Place, files: list[File]) -> None:
    for file in files:
        try:
            (root.path + file.name).encode()
        except UnicodeEncodeError:
            raise OpsinError(
                f"the name of the shard {shown(os.path.join(root.shown, file.name))} is not UTF-8: rename it."
            ) from None


def _source(store: Store, listing: Listing, is_folder: bool) -> Source:
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
        root=store.root.shown,
        images=ImageFiles(store, paths),
        count=len(paths),
        labels=labels,
        classes=classes,
        fingerprint=digest.hexdigest(),
        total_bytes=sum(size for _, size in listing.files),
        unreadable=listing.unreadable,
    )


def _curated(manifest: Manifest, sources: list[Source]) -> Source:
    """The images that a manifest keeps of these sources."""
    digest = hashlib.sha256(manifest.digest.encode())
    for source in sources:
        digest.update(source.fingerprint.encode())
    return Source(
        root=manifest.where,
        images=Kept(manifest, sources),
        count=len(manifest),
        labels=None,
        classes=[],
        fingerprint=digest.hexdigest(),
        total_bytes=manifest.total_bytes,
        unreadable=[(joined(source.root, where), told) for source in sources for where, told in source.unreadable],
    )


def _no_images(place: Place, listing: Listing) -> OpsinError:
    where = shown(place.shown)
    if listing.unreadable:
        path, reason = listing.unreadable[0]
        return OpsinError(
            f"found no images in {where}, and {len(listing.unreadable)} of its entries cannot be read, first "
            f"{shown(joined(place.shown, path))} ({reason}): check the permissions."
        )
    if listing.others:
        seen = ", ".join(f"{count} {shown(ending) or 'without an ending'}" for ending, count in _most(listing.others))
        return OpsinError(
            f"{where} holds files but no images (seen: {seen}): give a folder with {' '.join(IMAGES + ARRAYS)} files."
        )
    return OpsinError(f"{where} is empty: give a folder with images in it, or a .txt list that names some.")


@dataclass(frozen=True)
class Summary:
    """What a source holds, by the headers of its files; `str()` gives a short table."""

    root: str
    """Where the source lies."""
    kind: str
    """What the images are stored in."""
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
    """Images without a readable header, relative to `root`, each with the reason."""
    left_out: list[tuple[str, str]]
    """See `Source.unreadable`."""

    def __str__(self) -> str:
        labels = f" in {self.classes:,} classes" if self.classes else ""
        lines = [
            f"{shown(self.root)}: {self.images:,} images{labels}, {_bytes(self.total_bytes)}",
            f"  stored in   {self.kind}",
            "  formats     " + (", ".join(f"{name} {n:,}" for name, n in self.formats.items()) or "none"),
            f"  width       {self.width[0]:,} to {self.width[2]:,}, median {self.width[1]:,}",
            f"  height      {self.height[0]:,} to {self.height[2]:,}, median {self.height[1]:,}",
            f"  unreadable  {len(self.unreadable):,}",
        ]
        lines += _first(self.unreadable)
        if self.left_out:
            lines += [f"  left out    {len(self.left_out):,}", *_first(self.left_out)]
        if self.read < self.images:
            lines.append(f"  Formats, sizes and unreadable files are of a sample: {self.read:,} of the images.")
        return "\n".join(lines)


def summarise(
    source: Source, workers: int, limit: int | None = None, progress: bool = True, channels: int = 3
) -> Summary:
    """Read the headers of `source` in `workers` threads.

    A damaged file with a sound header is not noticed here, but when it is decoded. Of shards, which are slow to look
    into at many places, a sample is read.

    Args:
        source: what `scan` found.
        workers: threads.
        limit: read at most this many images, evenly spaced over the source.
        progress: show a bar if stderr is a terminal.
        channels: bands that images are to have; files with others count as unreadable.

    Raises:
        OpsinError: a package that reads the files is missing, or an object store does not answer.
    """
    if limit is None and source.order.block > 1 and len(source) > PLACES * RUN:
        starts = [i * (len(source) - RUN) // (PLACES - 1) for i in range(PLACES)]
        indices = [start + i for start in starts for i in range(RUN)]
    else:
        count = len(source) if limit is None else min(limit, len(source))
        indices = [i * len(source) // count for i in range(count)]
    count = len(indices)
    formats: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    unreadable: list[tuple[str, str]] = []

    def read(some: list[int]) -> list[Header | tuple[str, str]]:
        found: list[Header | tuple[str, str]] = []
        for index in some:
            try:
                found.append(header(source.open(index), channels))
            except DecodeError as error:
                found.append((source.name(index), error.reason))
        return found

    # Many files per task: a future for each of millions would need gigabytes.
    tasks = [indices[start : start + 256] for start in range(0, count, 256)]
    with ThreadPoolExecutor(workers) as pool, shown_progress("reading headers", count, "images", progress) as advance:
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
        kind=source.images.kind,
        images=len(source),
        classes=len(source.classes),
        total_bytes=source.total_bytes,
        read=count,
        formats=dict(_most(formats)),
        width=(int(low[0]), int(middle[0]), int(high[0])),
        height=(int(low[1]), int(middle[1]), int(high[1])),
        unreadable=unreadable,
        left_out=source.unreadable,
    )


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first, equally frequent ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _first(found: list[tuple[str, str]]) -> list[str]:
    lines = [f"    {shown(path)}: {reason}" for path, reason in found[:3]]
    return lines + [f"    and {len(found) - 3:,} more"] * (len(found) > 3)
