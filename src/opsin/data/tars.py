"""Tar shards, in particular those of the WebDataset layout: `key.jpg`, `key.cls`, `key.json`, … one after the other.

Every member that ends like an image is one. Its label, if there is one, is the number in `key.cls`, where the key is
the path up to the first dot of the file name. Headers are 512 bytes in front of each member: the index hops from one to
the next, and an image is read by its byte range.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from opsin.data.files import File, Store
from opsin.data.listing import is_image
from opsin.data.pieces import Contents, Damage, pieces

BLOCK = 512
PADDING = 1 << 20
"""Most zeros at the end of a tar; GNU tar fills up 10 KiB unless told otherwise."""


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    """Path, with bytes that are not UTF-8 as surrogates."""
    offset: int
    """Of its first byte in the tar."""
    length: int
    """Bytes."""


def index(store: Store, file: File) -> Contents:
    """Where the images of a tar lie.

    Raises:
        Damage: it is cut short, or something else stands where a header should be.
    """
    images: list[Member] = []
    numbers: dict[str, int] = {}
    with store.reader(file.name) as tar:
        try:
            for member in members(tar, file.size):
                if is_image(member.name):
                    images.append(member)
                elif member.name.endswith(".cls") and member.length < BLOCK:
                    tar.seek(member.offset)
                    text = tar.read(member.length).strip()
                    if text.isdigit() and int(text) < 2**31:
                        numbers[_key(member.name)] = int(text)
        except Damage as damage:
            raise Damage(damage.reason, len(images)) from None
    labels = [numbers.get(_key(image.name)) for image in images]
    return Contents(
        pieces(
            list(range(len(images))),
            [image.offset for image in images],
            [image.length for image in images],
            [os.fsencode(image.name) for image in images],
            [None if label is None else [label] for label in labels],
        ),
        samples=len(images),
        column="",
        classes=[],
    )


def members(tar: BinaryIO, size: int) -> Iterator[Member]:
    """The regular files of a tar of `size` bytes: old, ustar, GNU and PAX headers; `./` before a name is dropped.

    Raises:
        Damage: as `index`.
    """
    at, long_name, records = 0, None, dict[str, str]()
    while True:
        tar.seek(at)
        block = tar.read(BLOCK)
        if len(block) < BLOCK:
            raise Damage(f"it is cut short: it ends at byte {size:,} without the mark of an end")
        if not block.strip(b"\0"):
            _check_end(tar, size - at)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            length = int(records.get("size", info.size))
            data = at + BLOCK
            at = data + -(-length // BLOCK) * BLOCK
            if length < 0 or data + length > size:
                raise Damage(f"it is cut short: {size:,} of at least {data + length:,} bytes are there")
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = os.fsdecode(tar.read(length).rstrip(b"\0"))
            elif info.type == tarfile.XHDTYPE:
                records = _records(tar.read(length))
            elif info.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                name = records.get("path") or long_name or info.name
                if info.isreg() and info.type != tarfile.GNUTYPE_SPARSE:
                    yield Member(name.removeprefix("./"), data, length)
                long_name, records = None, {}
        except (tarfile.HeaderError, ValueError) as error:
            raise Damage(f"there is no tar header at byte {at:,}") from error


def read(store: Store, name: str, offset: int, length: int) -> bytes:
    """The bytes of a member; raises `Damage` if the tar has become shorter."""
    found = store.read(name, offset, length)
    if len(found) < length:
        raise Damage("it has become shorter since it was indexed")
    return found


def _check_end(tar: BinaryIO, left: int) -> None:
    if left > PADDING or (tar.read(left).strip(b"\0")):
        raise Damage(f"zeros stand where a header should be, {left:,} bytes before its end")


def _records(data: bytes) -> dict[str, str]:
    """Of a PAX header: lines of length, space, key, equals sign, value."""
    found = {}
    while data.strip(b"\0"):
        length = int(data[: data.index(b" ")])
        key, _, value = data[data.index(b" ") + 1 : length - 1].partition(b"=")
        if length < 5:
            raise ValueError("a PAX record of no length")
        found[os.fsdecode(key)] = os.fsdecode(value)
        data = data[length:]
    return found


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
