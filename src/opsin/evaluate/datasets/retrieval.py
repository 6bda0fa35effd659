"""Sets for retrieval, read as they are distributed: who is to be found by whom, and who does not count."""

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.functional import crop

from opsin.data.decode import decode, shown
from opsin.errors import OpsinError
from opsin.evaluate.ranking import Rule, average_precision, trapezoidal_precision
from opsin.evaluate.sets import ImageSet, in_classes_of, of_files, own
from opsin.evaluate.vectors import Resize

EXAMPLES = 3
"""Names that a message lists."""
IMAGES = (".jpg", ".jpeg", ".png")
"""Endings of AmsterTime's photographs."""
NONE = np.empty(0, dtype=np.int64)


class Judged(NamedTuple):
    """Database images that are right for a query, and those that count neither as right nor as wrong."""

    right: NDArray[np.int64]
    junk: NDArray[np.int64]


Judge = Callable[[int], Judged | None]
"""From a query to its judgement; None where this way of judging does not ask the query."""


@dataclass(frozen=True, eq=False)
class RetrievalSet:
    """Queries, and the database in which each has something to find."""

    database: ImageSet
    """What is searched."""
    queries: ImageSet | None
    """What is looked for; None if every image of the database is a query."""
    judges: Mapping[str, Judge]
    """Ways of judging, by the metric that each gives; the first is the headline."""
    rule: Rule
    """Average precision of one query."""


@dataclass(frozen=True, eq=False)
class MetSet:
    """The Met: exhibits to be recognised among 224,408, beside pictures of other things."""

    train: ImageSet
    """Photographs of exhibits, with their exhibit as label."""
    val: ImageSet
    """Visitors' photographs by which the classifier is tuned; label -1 for what is none of the exhibits."""
    test: ImageSet
    """The same, to measure on."""


@dataclass(frozen=True)
class Published:
    """A published set, and how its images are prepared."""

    title: str
    """How tables call it."""
    read: Callable[[Path], RetrievalSet | MetSet]
    """From where its files lie; an OpsinError says which file is missing and where it comes from."""
    resize: Resize
    """How DINOv3 (appendix D.8) resizes; the DINOv2 paper does not say."""
    size: int
    """In pixels."""
    whiten: bool
    """Whether vectors are whitened by PCA."""
    source: str
    """Where its files come from."""


class _Arrays(pickle.Unpickler):
    """Reads lists, dictionaries, text, numbers and NumPy arrays, and runs nothing else that a pickle may ask for."""

    def find_class(self, module: str, name: str) -> Any:
        """NumPy's ways to restore arrays."""
        arrays = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric")
        if arrays and name in ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 2's bytes are restored
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def groups(data: str, queries: str | None = None, channels: int = 3) -> RetrievalSet:
    """Images of one's own, a folder (or shard label) per group: images of a group are to find each other.

    Args:
        data: the images; without `queries` each is a query against all others.
        queries: the same for the queries, whose groups must all occur in `data`.
        channels: bands of the images.

    Raises:
        OpsinError: there are no groups, or one is empty; groups do not line up; no query has anything to find.
    """
    database = _without_empty(data, channels)
    assert database.labels is not None
    order = np.argsort(database.labels, kind="stable")
    bounds = np.searchsorted(database.labels[order], np.arange(len(database.classes) + 1))
    members = [order[low:high] for low, high in pairwise(bounds)]
    if queries is None:
        own_labels = database.labels
        if max(map(len, members)) < 2:
            raise OpsinError(
                f"every group of {database.where} has a single image, so no query has anything to find: put images "
                "that show the same thing into one folder."
            )

        def leave_one_out(query: int) -> Judged:
            group = members[own_labels[query]]
            return Judged(group[group != query], np.array([query]))

        return RetrievalSet(database, None, {"map": leave_one_out}, average_precision)
    asked = _without_empty(queries, channels)
    if asked.fingerprint == database.fingerprint:
        raise OpsinError(
            f"{asked.where} is given as data and as queries, so every image would find itself: leave out --queries."
        )
    strange = sorted(set(asked.classes) - set(database.classes))
    if strange:
        raise OpsinError(
            f"{_some(strange, 'group')} of the queries {asked.where} {'is' if len(strange) == 1 else 'are'} not in "
            f"{database.where}: name the folders alike in both."
        )
    labels = in_classes_of(asked, database)
    return RetrievalSet(database, asked, {"map": lambda query: Judged(members[labels[query]], NONE)}, average_precision)


def _without_empty(spec: str, channels: int) -> ImageSet:
    images = own(spec, channels)
    if Path(spec).is_dir() and (folders := [path for path in Path(spec).iterdir() if path.is_dir()]):
        known = set(images.classes)
        names = sorted(shown(path.name) for path in folders if not path.name.startswith("."))
        empty = [name for name in names if name not in known]
        if empty and known.intersection(names):
            raise OpsinError(
                f"{_some(empty, 'group')} of {images.where} hold{'s' * (len(empty) == 1)} no image: remove the folder, "
                "or put its images in."
            )
    return images


def revisited(path: Path, name: str, title: str, source: str) -> RetrievalSet:
    """Revisited Oxford or Paris: the annotation `gnd_NAME.pkl`, and the photographs anywhere below `path`.

    Queries are cropped to their box, as the authors' script does. Easy: easy images are right, hard ones junk. Medium:
    both are right. Hard: hard ones are right, easy ones junk.

    Raises:
        OpsinError: the annotation or photographs are missing, or it is no such annotation.
    """
    at = _file(path, f"gnd_{name}.pkl", title, source)
    try:
        with at.open("rb") as file:
            facts = _Arrays(file, encoding="latin1").load()
        names, asked = ([str(one) for one in facts[key]] for key in ("imlist", "qimlist"))
        truth = [
            {key: np.asarray(one[key], dtype=np.int64).reshape(-1) for key in ("easy", "hard", "junk")}
            for one in facts["gnd"]
        ]
        boxes = np.array([np.asarray(one["bbx"], dtype=np.float64).reshape(4) for one in facts["gnd"]])
        outside = any(((v < 0) | (v >= len(names))).any() for one in truth for v in one.values())
        if outside or len(truth) != len(asked) or not len(asked):
            raise ValueError("its lists do not line up")
        if not (boxes[:, 2:] - boxes[:, :2] >= 1).all():  # of numbers that are none, too
            raise ValueError("a query's box has no area")
    except Exception as error:  # a damaged pickle may raise almost anything
        raise OpsinError(
            f"{shown(at)} is not the annotation of {title} ({type(error).__name__}: {error}): take the file from "
            f"{source}."
        ) from None
    places = {file.stem: file for file in sorted(path.rglob("*.jpg"), reverse=True)}
    missing = [one for one in dict.fromkeys(names + asked) if one not in places]
    if missing:
        raise OpsinError(
            f"{_some([f'{one}.jpg' for one in missing], 'photograph')} of {title} "
            f"{'is' if len(missing) == 1 else 'are'} not below {shown(path)}: unpack all images of {source} there."
        )
    database = of_files(shown(path), [places[one] for one in names], None, ())
    queries = _cropped(of_files(shown(path), [places[one] for one in asked], None, ()), boxes)

    def judge(right: Sequence[str], junk: Sequence[str]) -> Judge:
        return lambda query: Judged(*(np.concatenate([truth[query][key] for key in keys]) for keys in (right, junk)))

    judges = {
        "map_medium": judge(["easy", "hard"], ["junk"]),
        "map_hard": judge(["hard"], ["easy", "junk"]),
        "map_easy": judge(["easy"], ["hard", "junk"]),
    }
    return RetrievalSet(database, queries, judges, trapezoidal_precision)


def _cropped(images: ImageSet, boxes: NDArray[np.float64]) -> ImageSet:
    """The same images, each cropped to its box (left, upper, right, lower), rounded as Pillow's crop does."""
    rounded = [[round(side) for side in box] for box in boxes.tolist()]

    def read(index: int) -> Tensor:
        stored = images.open(index)
        left, top, right, bottom = rounded[index]
        assert not isinstance(stored, Tensor)
        pixels: Tensor = crop(decode(stored), top, left, bottom - top, right - left)
        return pixels

    digest = hashlib.sha256(images.fingerprint.encode() + boxes.tobytes()).hexdigest()
    return replace(images, open=read, fingerprint=digest)


def amstertime(path: Path) -> RetrievalSet:
    """AmsterTime: folders new and old with files of the same number; each finds its partner in the other folder.

    As in the authors' code, all photographs of both folders are queries; old and new ones alone are told besides.

    Raises:
        OpsinError: a folder is missing or empty, or a photograph has no partner.
    """
    if not ((path / "new").is_dir() and (path / "old").is_dir()):
        lacking = " and ".join(name for name in ("new", "old") if not (path / name).is_dir())
        raise OpsinError(
            f"{shown(path)} has no folder {lacking}: unpack AmsterTime there, from {SETS['amstertime'].source}."
        )
    files = [
        {file.stem: file for file in sorted((path / half).iterdir()) if file.suffix.lower() in IMAGES}
        for half in ("new", "old")
    ]
    lonely = sorted(files[0].keys() ^ files[1].keys())
    if lonely or not files[0]:
        what = f"{_some(lonely, 'number')} in one of new and old only" if lonely else "no photographs in new and old"
        raise OpsinError(f"{shown(path)} has {what}: unpack all of AmsterTime, from {SETS['amstertime'].source}.")
    new, old = (list(half.values()) for half in (files[0], {stem: files[1][stem] for stem in files[0]}))
    count = len(new)
    halves = np.arange(count), np.arange(count, 2 * count)

    def judge(asked: Sequence[int]) -> Judge:
        def of(query: int) -> Judged | None:
            half = query // count
            if half not in asked:
                return None
            return Judged(np.array([(query + count) % (2 * count)]), halves[half])

        return of

    judges = {"map": judge([0, 1]), "map_old": judge([1]), "map_new": judge([0])}
    return RetrievalSet(of_files(shown(path), new + old, None, ()), None, judges, average_precision)


def met(path: Path, database: str) -> MetSet:
    """The Met data set: its ground truth (also in ground_truth/), and MET/, test_met/… (also in images/).

    Raises:
        OpsinError: a list or photographs are missing, or a list is none.
    """
    title, source = SETS["met"].title, SETS["met"].source
    root = path / "images" if (path / "images").is_dir() else path

    def part(file: str, key: str) -> ImageSet:
        at = _file(path, file, title, source, "ground_truth")
        try:
            entries = json.loads(at.read_text())
            files = [root / str(entry["path"]) for entry in entries]
            labels = np.array([int(entry.get(key, -1)) for entry in entries], dtype=np.int64)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OpsinError(
                f"{shown(at)} is not a list of {title} ({type(error).__name__}: {error}): take it from {source}."
            ) from None
        missing = [shown(one.relative_to(root)) for one in files if not one.is_file()]
        if missing:
            raise OpsinError(
                f"{_some(missing, 'photograph')} of {file} {'is' if len(missing) == 1 else 'are'} not in {shown(root)}"
                f": unpack MET, test_met, test_other and test_noart there, from {source}."
            )
        if not (labels >= 0).any():
            raise OpsinError(f"{shown(at)} names no exhibit ({key}): take it from {source}.")
        return of_files(shown(path), files, labels, ())

    return MetSet(part(database, "id"), part("valset.json", "MET_id"), part("testset.json", "MET_id"))


def _file(path: Path, name: str, title: str, source: str, folder: str = "") -> Path:
    for at in (path / name, path / folder / name):
        if at.is_file():
            return at
    raise OpsinError(f"{shown(path)} has no file {name} of {title}: take it from {source}.")


def _some(names: Sequence[str], what: str) -> str:
    """As in "3 photographs (a.jpg, b.jpg, c.jpg)"."""
    told = ", ".join(names[:EXAMPLES]) + (", …" if len(names) > EXAMPLES else "")
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({told})"


_REVISITED = "cmp.felk.cvut.cz/revisitop"
_MET = "cmp.felk.cvut.cz/met"

SETS: dict[str, Published] = {
    "roxford": Published(
        "Revisited Oxford",
        lambda path: revisited(path, "roxford5k", "Revisited Oxford", _REVISITED),
        "padded", 224, False, _REVISITED,
    ),
    "rparis": Published(
        "Revisited Paris",
        lambda path: revisited(path, "rparis6k", "Revisited Paris", _REVISITED),
        "padded", 224, False, _REVISITED,
    ),
    "met": Published("The Met", lambda path: met(path, "MET_database.json"), "longer", 508, True, _MET),
    "met-mini": Published(
        "The Met (mini)", lambda path: met(path, "mini_MET_database.json"), "longer", 508, True, _MET
    ),
    "amstertime": Published("AmsterTime", amstertime, "centre", 224, False, "doi.org/10.4121/19580806"),
}  # fmt: skip
"""By the name that `--data NAME:PATH` gives."""
