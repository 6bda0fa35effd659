"""Folders that commands write into: who may, and files that are whole or not there."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opsin.errors import OpsinError


def make_folder(out: Path) -> Path:
    """Make the folder, or say why nothing can be written into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OpsinError(f"cannot write into --out {out}: {error.strerror}. Choose another folder.") from None
    return out


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Hold the run's folder: two runs would write into each other's checkpoints."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OpsinError(
                f"another run is writing into {out}: wait for it, stop it, or choose another --out."
            ) from None
        yield


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def check_file(out: Path | None) -> None:
    """Refuse a file that cannot be written before the work rather than after it."""
    if out is not None and (out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK)):
        raise OpsinError(f"cannot write --out {out}: give the name of a file in a folder that exists.")


def write_json(out: Path | None, result: Any) -> None:
    """Write a result where it was asked for, if it was."""
    if out is None:
        return
    try:
        out.write_text(json.dumps(result, indent=1))
    except OSError as error:
        raise OpsinError(f"cannot write {out}: {error.strerror}. Choose another --out.") from None
