"""Files of a folder, a zip or a tar, named and read alike: archives of images are used without unpacking them.

A zip has a directory and a tar a header in front of each member, so an image is read by its byte range. A tar that is
compressed as a whole has to be unpacked, but for small lists, which `packed_file` takes out of it.
"""

import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from opsin.data.decode import DecodeError, shown, why
from opsin.data.files import ranged
from opsin.data.listing import PACKED, ending
from opsin.data.pieces import Damage
from opsin.data.tars import Member, members
from opsin.errors import OpsinError


@dataclass(frozen=True, eq=False)
class Files:
    """Files in a fixed order. Reading is safe from many threads: each read opens for itself."""

    where: Path
    """The folder or archive."""
    names: Sequence[str]
    """Path of each within it, parts separated by "/", sorted by their bytes."""
    sizes: Sequence[int]
    """Bytes of each, as they are stored."""
    open: Callable[[int], Path | bytes]
    """The path or the content of one; raises `DecodeError` if it cannot be had."""


class Piece(NamedTuple):
    """Where a file lies in an archive."""

    name: str
    """Path within the archive."""
    archive: Path
    """The archive."""
    offset: int
    """Of the header of the file in a zip, of its first byte in a tar."""
    size: int
    """Bytes as stored."""
    method: int = 0
    """How a zip compressed it."""
    checksum: int = 0
    """CRC-32 of the content, in a zip."""


def files(path: Path) -> Files:
    """What a folder, at any depth, a `.zip` or a `.tar` holds; hidden files are left out.

    An archive is indexed once per process, as long as its size and time are the same.

    Raises:
        OpsinError: it is none of these, it is damaged, or it is compressed as a whole.
    """
    try:
        about = path.stat()
        if path.is_dir():
            return _folder(path)
        kind = ending(path.name)
        if kind in PACKED:
            raise OpsinError(
                f"{shown(path)} is compressed as a whole, so no file in it can be reached without unpacking all before "
                f"it: unpack it and give the folder, or unpack it to .tar, which for images is no larger."
            )
        if kind not in (".zip", ".tar"):
            raise OpsinError(f"{shown(path)} is neither a folder nor a .zip nor a .tar: give one of these.")
        return _archive(path, about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise OpsinError(f"cannot read {shown(path)} ({why(error)}): check that it is there.") from error


def tars_of_classes(path: Path) -> Files:
    """The images of a tar of tars, or of a folder of tars, each named after a class: `n01440764/n01440764_18.JPEG`.

    The inner tars stay where they are. This is how the training images of ImageNet are distributed.

    Raises:
        OpsinError: as `files`.
    """
    try:
        return _tars_of_classes(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise OpsinError(f"cannot read {shown(path)} ({why(error)}): check that it is there.") from error


def packed_file(path: Path, name: str) -> bytes | None:
    """The content of the file in a zip or tar, compressed or not, whose path is `name` or ends in "/" and it.

    The archive is read from its start, so this is for lists and labels.

    Raises:
        OpsinError: the archive is damaged.
    """
    try:
        if ending(path.name) == ".zip":
            with zipfile.ZipFile(path) as archive:
                found = next((held for held in archive.namelist() if _is(held, name)), None)
                return None if found is None else archive.read(found)
        with tarfile.open(path, "r:*") as tar:
            for held in tar:
                if held.isfile() and _is(held.name, name) and (file := tar.extractfile(held)) is not None:
                    return file.read()
        return None
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise OpsinError(f"{shown(path)} is damaged ({_line(error)}): copy it again.") from error


def _is(held: str, name: str) -> bool:
    return f"/{held}".endswith(f"/{name}")


def _folder(path: Path) -> Files:
    found: list[tuple[str, int]] = []
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(path / below) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = below + entry.name
                if entry.is_dir():
                    waiting.append(name + "/")
                else:
                    found.append((name, entry.stat().st_size))
    found.sort(key=lambda file: os.fsencode(file[0]))
    names = [name for name, _ in found]
    return Files(path, names, [size for _, size in found], lambda index: path / names[index])


@lru_cache(maxsize=32)
def _archive(path: Path, size: int, _mtime_ns: int) -> Files:
    """The index of an archive; the time is there for the cache only."""
    if ending(path.name) == ".zip":
        return _indexed(path, _zip_pieces(path), _read_zip)
    with path.open("rb") as file:
        return _indexed(path, [_piece(path, member) for member in _members(path, file, size)], _read_tar)


@lru_cache(maxsize=2)
def _tars_of_classes(path: Path, _mtime_ns: int) -> Files:
    if path.is_dir():
        tars = [Piece(tar.name, tar, 0, tar.stat().st_size) for tar in sorted(path.glob("*.tar"))]
    else:
        held = files(path)
        tars = [Piece(name, path, at, size) for name, at, size in _places(held) if name.endswith(".tar")]
    pieces: list[Piece] = []
    for name, archive, offset, size, *_ in tars:
        with archive.open("rb") as file:
            inner = ranged(partial(_part, file, offset), size)
            for member in _members(archive, inner, size):
                piece = _piece(archive, member)
                pieces.append(piece._replace(name=f"{Path(name).stem}/{piece.name}", offset=offset + piece.offset))
    return _indexed(path, pieces, _read_tar)


def _part(file: BinaryIO, start: int, offset: int, length: int) -> bytes:
    file.seek(start + offset)
    return file.read(length)


def _places(held: Files) -> Iterable[tuple[str, int, int]]:
    """Name, offset and size of the members of an indexed tar."""
    assert isinstance(held.open, _Reader)
    return [(piece.name, piece.offset, piece.size) for piece in held.open.pieces]


class _Reader:
    """Reads the pieces of archives by their number."""

    def __init__(self, pieces: list[Piece], read: Callable[[BinaryIO, Piece], bytes]) -> None:
        self.pieces, self._read = pieces, read

    def __call__(self, index: int) -> bytes:
        piece = self.pieces[index]
        try:
            with piece.archive.open("rb") as file:
                return self._read(file, piece)
        except (OSError, ValueError, zlib.error, struct.error) as error:
            raise DecodeError(f"{piece.archive}/{piece.name}", _line(error)) from error


def _indexed(path: Path, pieces: list[Piece], read: Callable[[BinaryIO, Piece], bytes]) -> Files:
    pieces = [piece for piece in pieces if not any(part.startswith(".") for part in piece.name.split("/"))]
    pieces.sort(key=lambda piece: os.fsencode(piece.name))
    return Files(path, [piece.name for piece in pieces], [piece.size for piece in pieces], _Reader(pieces, read))


def _piece(archive: Path, member: Member) -> Piece:
    return Piece(member.name, archive, member.offset, member.length)


def _members(path: Path, tar: BinaryIO, size: int) -> list[Member]:
    try:
        return list(members(tar, size))
    except Damage as damage:
        raise OpsinError(f"{shown(path)} is damaged ({damage.reason}): copy it again.") from None


def _zip_pieces(path: Path) -> list[Piece]:
    try:
        with zipfile.ZipFile(path) as archive:
            held = [info for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise OpsinError(f"{shown(path)} is damaged ({_line(error)}): copy it again.") from error
    strange = next(
        (i for i in held if i.flag_bits & 1 or i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)), None
    )
    if strange is not None:
        raise OpsinError(
            f"{shown(path)} is encrypted or compressed by another method than Deflate, for example "
            f"{shown(strange.filename)}: unpack it and give the folder."
        )
    return [
        Piece(info.filename, path, info.header_offset, info.compress_size, info.compress_type, info.CRC)
        for info in held
    ]


def _read_tar(file: BinaryIO, piece: Piece) -> bytes:
    file.seek(piece.offset)
    data = file.read(piece.size)
    if len(data) < piece.size:
        raise ValueError("the tar has become shorter since it was indexed")
    return data


def _read_zip(file: BinaryIO, piece: Piece) -> bytes:
    file.seek(piece.offset)
    header = file.read(30)
    if header[:4] != b"PK\3\4":
        raise ValueError("the zip has no file where its directory says so")
    name, extra = struct.unpack("<HH", header[26:30])
    file.seek(name + extra, os.SEEK_CUR)
    data = file.read(piece.size)
    if piece.method == zipfile.ZIP_DEFLATED:
        data = zlib.decompress(data, -zlib.MAX_WBITS)
    if zlib.crc32(data) != piece.checksum:
        raise ValueError("its checksum in the zip is another")
    return data


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return why(error)
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
