"""Published sets of video clips, read by their official lists: UCF101, Kinetics-400, Something-Something v2."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from opsin.data.decode import shown
from opsin.errors import OpsinError
from opsin.evaluate.clips import VIDEOS, ClipSet

Combine = Literal["average", "concatenate"]
"""What a classifier of clips sees: the mean of the frames' features, or all of them in order."""
EXAMPLES = 3
"""Names that a message lists."""


@dataclass(frozen=True)
class PublishedClips:
    """A published set of clips."""

    title: str
    """How tables call it."""
    read: Callable[[Path, str], ClipSet]
    """Folder and part ("train" or "test") → clips; an OpsinError says which file is missing and where it comes from."""
    combine: Combine
    """How the paper combines the features of its frames (section 7.2)."""


def _ucf101(folder: Path, part: str) -> ClipSet:
    """The first of its three official splits."""
    source = "UCF101TrainTestSplits-RecognitionTask.zip of https://www.crcv.ucf.edu/data/UCF101.php"
    found = _first(folder, ("ucfTrainTestlist/{}list01.txt", "{}list01.txt"), part, source)
    lines = [line.split()[0] for line in found.read_text().splitlines() if line.strip()]
    place = _folder(folder, ("UCF-101", "."), "UCF101.rar of https://www.crcv.ucf.edu/data/UCF101.php")
    return _clip_set(VIDEO_SETS["ucf101"].title, place, [(line, line.split("/")[0]) for line in lines])


def _k400(folder: Path, part: str) -> ClipSet:
    """Tested on its validation part, as its own test labels were long unpublished."""
    name, source = {
        "train": ("train", "https://github.com/cvdfoundation/kinetics-dataset"),
        "test": ("val", "https://github.com/cvdfoundation/kinetics-dataset"),
    }[part]
    names = (f"{name}.csv", f"annotations/{name}.csv", f"kinetics400/{'validate' if name == 'val' else name}.csv")
    found = _first(folder, names, part, source)
    with found.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    wanted = ("label", "youtube_id", "time_start", "time_end")
    if not rows or not set(wanted) <= rows[0].keys():
        raise OpsinError(
            f"{shown(found)} is not Kinetics' list of clips with columns {', '.join(wanted)}: see {source}."
        )
    place = _folder(folder, (name,), source)
    entries = [
        (f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}", row["label"]) for row in rows
    ]
    return _clip_set(VIDEO_SETS["k400"].title, place, entries, lost="not among the files: its video may be unavailable")


def _ssv2(folder: Path, part: str) -> ClipSet:
    """Tested on its validation part: the labels of its test part came late, and published tables are on validation."""
    name = {"train": "train", "test": "validation"}[part]
    source = "https://www.qualcomm.com/developer/software/something-something-v-2-dataset"
    found = _first(folder, (f"something-something-v2-{name}.json", f"labels/{name}.json"), part, source)
    names = _first(folder, ("something-something-v2-labels.json", "labels/labels.json"), part, source)
    rows, numbers = _json(found, source), _json(names, source)
    try:
        # Templates mark what varies by brackets, names of classes do not.
        entries = [(str(row["id"]), row["template"].replace("[", "").replace("]", "")) for row in rows]
        classes = sorted(numbers, key=lambda name: int(numbers[name]))
    except (KeyError, TypeError, ValueError):
        raise OpsinError(f"{shown(found)} is not a list of clips of Something-Something v2: see {source}.") from None
    strange = sorted({label for _, label in entries} - set(classes))
    if strange:
        raise OpsinError(f"{shown(names)} lacks classes of {shown(found)}, such as '{strange[0]}': see {source}.")
    place = _folder(folder, ("20bn-something-something-v2",), source)
    return _clip_set(VIDEO_SETS["ssv2"].title, place, entries, classes=classes)


VIDEO_SETS = {
    "ucf101": PublishedClips("UCF101 (split 1)", _ucf101, "average"),
    "k400": PublishedClips("Kinetics-400", _k400, "average"),
    "ssv2": PublishedClips("Something-Something v2", _ssv2, "concatenate"),
}
"""By the name that `--data NAME:PATH` gives."""


def _first(folder: Path, names: Sequence[str], part: str, source: str) -> Path:
    paths = [folder / name.format(part) for name in names]
    for path in paths:
        if path.is_file():
            return path
    raise OpsinError(f"{shown(paths[0])} is missing: it comes from {source}.")


def _folder(folder: Path, names: Sequence[str], source: str) -> Path:
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise OpsinError(f"{shown(folder / names[0])} is missing, the folder of the clips: it comes from {source}.")


def _json(path: Path, source: str) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise OpsinError(f"{shown(path)} is not JSON: get it again from {source}.") from None


def _clip_set(
    title: str,
    place: Path,
    entries: Iterable[tuple[str, str]],
    *,
    classes: Sequence[str] | None = None,
    lost: str | None = None,
) -> ClipSet:
    """Clips of a list of names (with or without folder and ending) and labels; `lost` says why a clip may be absent."""
    there = {path.stem: path for path in place.rglob("*") if path.suffix.lower() in VIDEOS}  # layouts differ
    folded = {stem.lower(): path for stem, path in there.items()}  # so does UCF101's case, from its lists
    entries = list(entries)
    names = sorted({label for _, label in entries}) if classes is None else list(classes)
    number = {name: i for i, name in enumerate(names)}
    paths, labels, missing = [], [], []
    for name, label in entries:
        stem = Path(name).stem if Path(name).suffix.lower() in VIDEOS else Path(name).name
        if (found := there.get(stem) or folded.get(stem.lower())) is None:
            missing.append(name)
        else:
            paths.append(found)
            labels.append(number[label])
    if missing and (lost is None or not paths):
        examples = ", ".join(missing[:EXAMPLES])
        raise OpsinError(
            f"{len(missing)} of {len(entries)} clips of {title}'s list are not in {shown(place)}, such as {examples}: "
            "unpack all of its archives there."
        )
    reasons = [(name, lost or "") for name in missing]
    return ClipSet(title, paths, np.array(labels, dtype=np.int64), names, reasons)
