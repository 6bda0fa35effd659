"""Files on this machine or in an object store, read by byte ranges through pyarrow.fs.

Everything that lies in shards or in a bucket is read here, so what a lost connection or a missing credential means is
said in one place. Safe to use from many threads.
"""

import io
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import parse_qs, quote

import pyarrow as pa
from pyarrow import fs

from opsin.data.decode import shown, why
from opsin.errors import OpsinError

T = TypeVar("T")

WAITS: Final = (1.0, 4.0)
"""Seconds before each new attempt after a lost connection; the store's own client has tried three times by then."""
OPEN_FILES: Final = 256
"""Files that are kept open."""
_REFUSALS: Final = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED", "INVALID_CLIENT")
_REFUSED_STATUS: Final = ("HTTP status 401", "HTTP status 403")


class File(NamedTuple):
    """A file as a listing gives it."""

    name: str
    """Path relative to the store's root."""
    size: int
    """Bytes."""
    mtime_ns: int
    """When it was written."""


@dataclass(frozen=True)
class Place:
    """What a `--data` that names files points at: a file system and a path in it."""

    shown: str
    """The absolute path or URI, without credentials and options: fit for a message."""
    path: str
    """The path in the file system."""
    system: fs.FileSystem
    """Where the path lies."""
    local: bool
    """Whether it is this machine's file system."""

    def at(self, path: str) -> "Place":
        """Another path of the same file system."""
        return Place(self.shown[: len(self.shown) - len(self.path)] + path, path, self.system, self.local)

    def folder(self) -> "Place":
        """The folder that holds it."""
        return self.at(self.path.rpartition("/")[0] or "/")

    def child(self, name: str) -> "Place":
        """A path below it."""
        return self.at(joined(self.path, name))

    @property
    def base(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


def locate(spec: str) -> Place:
    """The place that a local path or a URI such as `s3://bucket/folder` names.

    A URI may carry the options of its file system, `s3://bucket/folder?endpoint_override=localhost:9000&scheme=http`;
    AWS_ENDPOINT_URL does the same for all. Credentials come from the environment, as for any AWS tool.

    Raises:
        OpsinError: the URI is not one of those that pyarrow.fs knows.
    """
    if spec.startswith("file://"):
        spec = spec.removeprefix("file://").partition("?")[0]
    if "://" not in spec:
        path = os.path.abspath(spec)
        return Place(path, path, fs.LocalFileSystem(), True)
    scheme, _, rest = spec.partition("://")
    rest, _, options = rest.partition("?")
    authority, _, path = rest.partition("/")
    path = path.strip("/")
    name = joined(f"{scheme}://{authority.rpartition('@')[2]}", path)
    if not authority:
        raise OpsinError(f"{scheme}://{rest} names no bucket: write {scheme}://bucket/folder.")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint and "endpoint_override" not in parse_qs(options):
        options += "&" * bool(options) + f"endpoint_override={quote(endpoint, safe='')}"
    try:
        system, base = fs.FileSystem.from_uri(f"{scheme}://{authority}" + f"?{options}" * bool(options))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise OpsinError(
            f"cannot use {name} ({_line(error)}): give a local path, or a URI that pyarrow.fs takes, such as "
            "s3://bucket/folder."
        ) from error
    return Place(name, joined(base, path), system, False)


class Store:
    """The files below one folder."""

    def __init__(self, root: Place) -> None:
        self.root = root
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = Lock()

    def list(self, recursive: bool = True) -> list[File]:
        """All files, in no order; a folder that is not there has none.

        Raises:
            OpsinError: there is no such bucket, access is refused, or the connection is lost.
        """
        selector = fs.FileSelector(self.root.path, recursive=recursive)
        try:
            found = self._try("", lambda: self.root.system.get_file_info(selector))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OpsinError(
                f"cannot list {shown(self.root.shown)} ({_line(error)}): check its permissions."
            ) from error
        prefix = len(self.root.path.rstrip("/")) + 1
        return [
            File(info.path[prefix:], info.size, info.mtime_ns or 0) for info in found if info.type == fs.FileType.File
        ]

    def find(self, name: str) -> File | None:
        """The file of this name, or None if there is none; raises what `list` does."""
        info = self._try(name, lambda: self.root.system.get_file_info(joined(self.root.path, name)))
        return File(name, info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else None

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes `offset` to `offset + length` of a file, in one request, fewer if it ends before.

        Raises:
            OSError: the file is gone or, on this machine, cannot be read.
            OpsinError: access is refused, or the connection is lost.
        """

        def attempt() -> bytes:
            file = self._file(name)
            return bytes(file.read_at(max(0, min(length, file.size() - offset)), offset))

        return self._try(name, attempt)

    def whole(self, name: str) -> bytes:
        """All bytes of a file; raises what `read` does."""

        def attempt() -> bytes:
            with self.root.system.open_input_file(joined(self.root.path, name)) as file:
                return bytes(file.read())

        return self._try(name, attempt)

    def reader(self, name: str) -> io.BufferedReader:
        """The file, to seek and read in: small steps are read ahead, more so where a request takes long."""
        size = self._try(name, lambda: int(self._file(name).size()))
        return ranged(partial(self.read, name), size, 1 << (13 if self.root.local else 16))

    def view(self, name: str, offset: int, length: int) -> pa.Buffer:
        """As `read`, but of a file on this machine the bytes are mapped, not read."""
        if not self.root.local:
            return pa.py_buffer(self.read(name, offset, length))
        with pa.memory_map(joined(self.root.path, name)) as mapped:  # the buffer keeps the map
            return mapped.read_buffer().slice(offset, length)

    def _file(self, name: str) -> Any:
        """The file, opened once for reading at any offset; the last `OPEN_FILES` stay open."""
        with self._lock:
            if name in self._open:
                self._open.move_to_end(name)
                return self._open[name]
        opened = self.root.system.open_input_file(joined(self.root.path, name))
        with self._lock:
            self._open[name] = opened
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)  # not closed here: a thread may be reading from it
        return opened

    def _try(self, name: str, job: Callable[[], T]) -> T:
        for wait in (*WAITS, None):
            try:
                return job()
            except FileNotFoundError:
                raise
            except OSError as error:
                if self.root.local:
                    raise

                self._refused(name, str(error))
                if wait is None:
                    raise OpsinError(
                        f"lost the connection to {shown(joined(self.root.shown, name))} and got no answer in "
                        f"{len(WAITS) + 1} attempts ({_line(error)}): check the network and the endpoint, then give "
                        "the same command again."
                    ) from error
                with self._lock:
                    self._open.pop(name, None)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _refused(self, name: str, text: str) -> None:
        where = shown(joined(self.root.shown, name))
        if "NO_SUCH_BUCKET" in text:
            raise OpsinError(f"there is no bucket for {where}: check its name, the region and the endpoint.")
        if any(mark in text.upper() for mark in _REFUSALS) or any(mark in text for mark in _REFUSED_STATUS):
            raise OpsinError(
                f"access to {where} is refused: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to "
                "credentials that may list and read it."
            )


def ranged(read: Callable[[int, int], bytes], size: int, ahead: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    """What is read by ranges as a file, to seek and read in: a file of a store, a part of another file.

    Args:
        read: offset and length → bytes, fewer if it ends before.
        size: bytes in all.
        ahead: bytes that are read at once.
    """
    return io.BufferedReader(_Ranges(read, size), ahead)


class _Ranges(io.RawIOBase):
    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        found = self._read(self._at, max(0, min(len(into), self._size - self._at)))
        into[: len(found)] = found
        self._at += len(found)
        return len(found)


def joined(root: str, name: str) -> str:
    """A path below another; the root itself for no name."""
    return os.path.join(root, name) if name else root


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return why(error)
    return " ".join(str(error).split())[:300].rstrip(".")
