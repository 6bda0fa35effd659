"""Where the parts of a published set lie below the folder that a user gives, and what to say if one is missing."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.data.decode import DecodeError, shown, why
from opsin.data.listing import ending, is_image
from opsin.data.sources import scan
from opsin.errors import OpsinError
from opsin.evaluate.datasets.archives import Files, files, packed_file
from opsin.evaluate.sets import ImageSet, of_source, stamp

EXAMPLES = 3
"""Names that a message lists."""


def missing(path: Path, needed: str, source: str) -> OpsinError:
    """The error for a file or folder `needed` that is not below `path`; `source` says where it comes from."""
    if not path.exists():
        return OpsinError(f"there is nothing at {shown(path)}: give the folder that holds the files of {source}.")
    return OpsinError(f"{shown(path)} has no {needed}: it comes from {source}.")


def no_part(name: str, part: str, parts: Sequence[str]) -> OpsinError:
    """The error for a part that a set has not."""
    return OpsinError(f"{name} has no part '{part}': give one of {', '.join(parts)}.")


def find(path: Path, places: Sequence[str], holds: str, needed: str, source: str) -> Path:
    """The first of `places` below `path` that is an archive, or a folder with something that matches `holds`.

    Args:
        path: what the user gives: a folder, or the archive itself.
        places: relative paths, "." for `path` itself.
        holds: a pattern that tells the folder, such as "n[0-9]*".
        needed: how a message calls what is missing.
        source: where it comes from.

    Raises:
        OpsinError: there is none.
    """
    for place in places:
        candidate = path / place
        if candidate.is_file() and ending(candidate.name) in (".zip", ".tar"):
            return candidate
        if candidate.is_dir() and next(candidate.glob(holds), None) is not None:
            return candidate
    raise missing(path, needed, source)


def content(path: Path, name: str, folders: Sequence[str], packs: Sequence[str], source: str) -> bytes:
    """A list or labels: the file `name` in one of `folders` below `path`, or in one of the archives `packs` there.

    Raises:
        OpsinError: it is in none of them, or cannot be read.
    """
    for folder in folders:
        file = path / folder / name
        if file.is_file():
            try:
                return file.read_bytes()
            except OSError as error:
                raise OpsinError(f"cannot read {shown(file)} ({why(error)}): check its permissions.") from error
    for pack in packs:
        if (path / pack).is_file():
            found = packed_file(path / pack, name)
            if found is not None:
                return found
    raise missing(path, os.path.join(folders[0], name).removeprefix("./"), source)


def rows(text: bytes, name: str, fields: int, source: str) -> list[list[str]]:
    """The lines of a list, without the empty ones, each split at spaces into `fields`; the last may hold spaces.

    Raises:
        OpsinError: a line has fewer, or there is none.
    """
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines()]
    found = [line.split(None, fields - 1) for line in lines if line]
    for number, (line, parts) in enumerate(zip(filter(None, lines), found, strict=True), 1):
        if len(parts) < fields:
            raise OpsinError(
                f"{name} is not the official list: line {number}, '{line[:60]}', has {len(parts)} of {fields} fields; "
                f"take it from {source}."
            )
    if not found:
        raise OpsinError(f"{name} is empty: take it from {source}.")
    return found


def whole(text: str, name: str, source: str) -> int:
    """The whole number that a list gives as `text`, 0 or more; an OpsinError otherwise."""
    if not text.isascii() or not text.isdigit():
        raise OpsinError(f"{name} holds '{text[:40]}' where a number should be: take it from {source}.")
    return int(text)


def by_folder(place: Path, source: str) -> ImageSet:
    """The images of a folder per class, at `place` or in an archive; the class is the name of the folder.

    Raises:
        OpsinError: images lie outside of class folders, or there are none.
    """
    if place.is_dir():
        found = scan(place, progress=False)
        if found.labels is None:
            raise OpsinError(f"{shown(place)} has images outside of class folders: leave it as it is in {source}.")
        return of_source(found)
    return in_class_folders(files(place))


def in_class_folders(held: Files, below: str = "") -> ImageSet:
    """The images among files, by the name of the folder that each lies in, sorted.

    Args:
        held: the files.
        below: only those in this folder, wherever it lies.

    Raises:
        OpsinError: there is none.
    """
    wanted = f"/{below}/" if below else "/"
    chosen = [index for index, name in enumerate(held.names) if is_image(name) and wanted in f"/{name}"]
    folders = [os.path.basename(os.path.dirname(held.names[index])) for index in chosen]
    if not chosen or not all(folders):
        where = shown(held.where) + (f", in {below}," if below else "")
        raise OpsinError(f"{where} holds no folders of images, one per class: copy it again.")
    classes = sorted(set(folders), key=os.fsencode)
    number = {name: i for i, name in enumerate(classes)}
    return of_members(held, chosen, np.array([number[folder] for folder in folders], dtype=np.int64), classes)


def of_members(
    held: Files, chosen: Sequence[int], labels: NDArray[np.int64] | None, classes: Sequence[str]
) -> ImageSet:
    """Some of the files, in the order of `chosen`."""
    names, sizes = [held.names[index] for index in chosen], [held.sizes[index] for index in chosen]
    # Of a folder's files the times count, too; of an archive's its own.
    files = [held.where / name for name in names] if held.where.is_dir() else [held.where] * len(names)
    return ImageSet(
        where=shown(held.where),
        count=len(chosen),
        open=lambda index: held.open(chosen[index]),
        name=lambda index: shown(names[index]),
        fingerprint=hashlib.sha256(f"{sizes} {stamp(names, files)}".encode()).hexdigest(),
        labels=labels,
        classes=classes,
    )


def listed(
    place: Path, names: Sequence[str], labels: NDArray[np.int64], classes: Sequence[str], by: str, source: str
) -> ImageSet:
    """The images that an official list names, relative to the folder `place`, in the list's order.

    Args:
        place: the folder.
        names: path of every image in it.
        labels: `[N]` or `[N, K]`.
        classes: names of the classes.
        by: how a message calls the list.
        source: where list and images come from.

    Raises:
        OpsinError: the list is empty, or images are not there; examples are listed.
    """
    if not names:
        raise OpsinError(f"{by} of {shown(place)} lists no image: take it from {source}.")
    root = os.fspath(place)
    files = [f"{root}/{name}" for name in names]  # strings, not paths: Places205 has 2.5 million
    absent = [name for name, file in zip(names, files, strict=True) if not os.path.exists(file)]
    if absent:
        raise OpsinError(
            f"{len(absent):,} of the {len(names):,} images that {by} lists are not in {shown(place)}, such as "
            f"{examples(absent)}: they come from {source}."
        )
    return ImageSet(
        where=shown(place),
        count=len(names),
        open=lambda index: Path(files[index]),
        name=lambda index: shown(names[index]),
        fingerprint=stamp(names, files),
        labels=labels,
        classes=classes,
    )


def in_memory(where: str, pixels: NDArray[np.uint8], labels: NDArray[np.int64], classes: Sequence[str]) -> ImageSet:
    """Images `[N, H, W, 3]` that lie in memory; their content is the fingerprint."""
    from torch import Tensor, from_numpy

    def read(index: int) -> Tensor:
        return from_numpy(pixels[index]).permute(2, 0, 1)

    digest = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
    return ImageSet(where, len(pixels), read, lambda index: f"image {index}", digest, labels, classes)


def examples(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    more = f" and {len(names) - EXAMPLES:,} more" if len(names) > EXAMPLES else ""
    return ", ".join(shown(name) for name in names[:EXAMPLES]) + more


def matlab(data: bytes, name: str, source: str) -> dict[str, Any]:
    """The variables of a MATLAB file.

    Raises:
        OpsinError: scipy is missing, or it cannot read the file.
    """
    import io

    loadmat = needs_scipy(name)
    try:
        found: dict[str, Any] = loadmat(io.BytesIO(data), squeeze_me=True)
    except Exception as error:  # a damaged file makes scipy raise almost anything
        raise OpsinError(
            f"{name} is no MATLAB file ({' '.join(str(error).split())}): take it from {source}."
        ) from error
    return found


def needs_scipy(name: str) -> Callable[..., dict[str, Any]]:
    """scipy's reader of MATLAB files, for the file `name`; an OpsinError if scipy is missing."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise OpsinError(f"{name} needs scipy, which is missing: pip install 'opsin[eval]'.") from error
    reader: Callable[..., dict[str, Any]] = loadmat
    return reader


@contextlib.contextmanager
def understood(path: Path, source: str) -> Iterator[None]:
    """Reads the lists of a published set: those that are others than expected make readers raise almost anything."""
    try:
        yield
    except (OpsinError, MemoryError):
        raise
    except Exception as error:
        raise damaged(path, error, source) from error


def damaged(path: Path, error: Exception, source: str) -> OpsinError:
    """The error for lists that cannot be understood."""
    reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
    kind = "" if isinstance(error, OSError | DecodeError) else f"{type(error).__name__}: "
    return OpsinError(
        f"the lists of {shown(path)} are not the official ones ({kind}{reason}): take them from {source}."
    )
