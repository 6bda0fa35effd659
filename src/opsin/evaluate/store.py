"""What evaluations keep on disk: features and trained heads, found by the content of what they were made of.

Everything here can be computed again: the folder may be deleted at any time.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from opsin.errors import OpsinError
from opsin.output import write

VERSION = 1
"""Counts up when what is kept changes its meaning."""


def recalled(path: Path) -> Any:
    """What a JSON file of the store says; None if there is none or it is damaged, and then it is to be made again."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def save(path: Path, found: Any) -> None:
    """Write what `recalled` gives back.

    Raises:
        OpsinError: nothing can be written there.
    """
    try:
        write(path, json.dumps(found))
    except OSError as error:
        raise OpsinError(f"cannot keep results in {path.parent}: {error.strerror}. Choose another --cache.") from None


def place(cache: Path, kind: str, **facts: Any) -> Path:
    """A folder for what `facts` (JSON-able) determine; made with facts.json in it, which says what it is.

    Raises:
        OpsinError: nothing can be written there.
    """
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True, indent=1)
    folder = cache / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "facts.json").exists():
            write(folder / "facts.json", text)
    except OSError as error:
        raise OpsinError(f"cannot keep features in {cache}: {error.strerror}. Choose another --cache.") from None
    return folder
