"""Images with a class per pixel: published sets as they are distributed, and folder pairs of one's own.

In targets a class is its index, and `IGNORED` says that a pixel counts nowhere. Masks are PNG files, gray of 8 or 16
bits or with a palette, whose values are read as they are stored: colours are never looked at.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from opsin.data.decode import DecodeError, header, shown
from opsin.data.pipeline import prepared
from opsin.data.progress import progress
from opsin.errors import OpsinError, unknown
from opsin.evaluate.datasets.archives import Files, files
from opsin.evaluate.datasets.layout import EXAMPLES, examples, find, missing, of_members, understood
from opsin.evaluate.dense import PairSet, matched
from opsin.evaluate.segmentation_head import IGNORED
from opsin.evaluate.sets import ImageSet
from opsin.evaluate.store import place, recalled, save
from opsin.evaluate.task import Run

STRANGE = -2
"""In a table of values: one that no mask may hold."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy")
"""Endings of image files in a folder pair."""
MASKS = (".png",)
"""Endings of mask files."""

ADE20K = "ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark, sceneparsing.csail.mit.edu"
CITYSCAPES = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of www.cityscapes-dataset.com"
VOC = "VOCtrainval_11-May-2012.tar of host.robots.ox.ac.uk/pascal/VOC"
VOC_AUG = "the Semantic Boundaries set joined with VOC 2012 (SegmentationClassAug and trainaug.txt)"

CITYSCAPES_CLASSES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""The 19 classes that count, in their order, by their value in labelIds files."""
CITYSCAPES_VALUES = 34
"""Values 0 to 33 of labelIds files; a licence plate, -1, is stored as 255."""
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
"""The 21 classes of VOC 2012."""


@dataclass(frozen=True)
class Published:
    """A published set."""

    title: str
    """How tables call it."""
    read: Callable[[Path, str, int], PairSet]
    """Folder, part and bands of the images → pairs; an OpsinError says which file is missing and where it is from."""
    train: str
    """The part that trains."""
    test: str
    """The part that tests."""


def read_mask(stored: Path | bytes | Tensor, name: str) -> NDArray[Any]:
    """The values of a mask `[H, W]`, uint8 or uint16, as they are stored in a file or its content.

    Raises:
        OpsinError: it cannot be read, or it is a colour picture; `name` is how the message calls it.
    """
    assert not isinstance(stored, Tensor)  # masks are files
    try:
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored, formats=["PNG"]) as image:
            mode = image.mode
            if mode in ("P", "L", "1", "I", "I;16", "I;16B"):
                values = np.asarray(image)
                values = values.astype(np.uint16 if values.dtype.itemsize > 1 else np.uint8)
                if mode == "L" and (bits := _bits(stored)) < 8:  # Pillow spreads grays of few bits over 0 to 255
                    values //= np.uint8(255 // (2**bits - 1))
                return values
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is no PNG file" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise OpsinError(f"the mask {name} cannot be read: {reason}. Replace the file.") from None
    raise OpsinError(
        f"the mask {name} is a colour picture ({mode}), and a mask holds the number of a class in each pixel: replace "
        "every colour by its class and save that as a gray PNG (in Python: Image.fromarray(array of uint8))."
    )


def _bits(stored: Path | bytes) -> int:
    """Bits of a sample of a PNG file: its byte 24."""
    if isinstance(stored, bytes):
        return stored[24]
    with stored.open("rb") as file:
        return file.read(25)[24]


def table_of(values: dict[int, int]) -> NDArray[np.int64]:
    """A table from values of masks to classes or `IGNORED`; values that are not named are `STRANGE`."""
    table = np.full(max(values) + 1, STRANGE, dtype=np.int64)
    table[list(values)] = list(values.values())
    return table


def pairs(
    images: ImageSet, masks: ImageSet, table: NDArray[np.int64], classes: Sequence[str], channels: int
) -> PairSet:
    """Images with their masks, whose values `table` translates.

    A target raises an OpsinError where its mask holds a value that is `STRANGE` or beyond the table.
    """
    ignored = np.flatnonzero(table == IGNORED).tolist()

    def target(index: int) -> Tensor:
        values = read_mask(masks.open(index), named(masks, index))
        wrong = values >= len(table)
        wrong |= table[np.where(wrong, 0, values)] == STRANGE
        if wrong.any():
            others = f" and {', '.join(map(str, ignored))} for none" if 0 < len(ignored) <= 3 else ""
            raise OpsinError(
                f"the mask {named(masks, index)} holds the value {values[wrong][0]} in {wrong.sum()} pixels, and "
                f"the set has {len(classes)} classes{others}: it is not the mask of this set, replace it."
            )
        return torch.from_numpy(table[values])

    facts = f"{images.fingerprint} {masks.fingerprint} {table.tolist()}"
    fingerprint = hashlib.sha256(facts.encode()).hexdigest()
    return PairSet(replace(images, fingerprint=fingerprint, channels=channels), target, classes)


def named(masks: ImageSet, index: int) -> str:
    """How messages call a mask."""
    return f"{masks.name(index)} of {masks.where}"


@dataclass(frozen=True)
class Folders:
    """A folder of images and one of masks, matched and looked through."""

    images: ImageSet
    """The images."""
    masks: ImageSet
    """The mask of each."""
    largest: list[int]
    """Largest value of each mask but the ignored one; -1 where there is none."""
    present: list[int]
    """All values in any mask but the ignored one, in order."""

    def pairs(self, count: int, ignore: int, channels: int, indices: Sequence[int] | None = None) -> PairSet:
        """Its pairs, or some of them, with classes 0 … `count` - 1.

        Raises:
            OpsinError: a mask holds a larger value.
        """
        wrong = [i for i, value in enumerate(self.largest) if value >= count]
        if wrong:
            examples = ", ".join(f"{self.largest[i]} in {self.masks.name(i)}" for i in wrong[:EXAMPLES])
            raise OpsinError(
                f"{len(wrong)} of {len(self.masks)} masks of {self.masks.where} hold values that are no class, such as "
                f"{examples}: there are {count} classes, 0 to {count - 1}, and {ignore} is ignored; say with --classes "
                "how many there are, with --ignore which value is none, or mend the masks."
            )
        table = table_of({value: value for value in range(count)} | {ignore: IGNORED})
        chosen = np.asarray(range(len(self.images)) if indices is None else indices, dtype=np.int64)
        classes = [str(i) for i in range(count)]
        return pairs(self.images.part(chosen), self.masks.part(chosen), table, classes, channels)


def look_through(images: Path, masks: Path, ignore: int, channels: int, run: Run) -> Folders:
    """Match the files of two folders by name and read every mask once; what is found is kept until a file changes.

    The masks' fingerprint is of their values: masks that are mended often keep their size, and a head that was trained
    on the old ones must not be taken for theirs.

    Raises:
        OpsinError: a file has no partner, a mask cannot be read, or it has another size than its image.
    """
    both = matched(images, masks, IMAGES, MASKS)
    pictures, answers = (_files(folder, paths) for folder, paths in zip((images, masks), both, strict=True))
    times = hashlib.sha256(str([path.stat().st_mtime_ns for paths in both for path in paths]).encode()).hexdigest()
    facts = {"images": pictures.fingerprint, "masks": answers.fingerprint, "times": times, "ignore": ignore}
    kept = place(run.cache, "masks", **facts) / "values.json"
    known = recalled(kept)
    if known is None:
        found: list[tuple[list[int], str]] = []
        single = [[index] for index in range(len(answers))]
        look = partial(_values, pictures, answers, ignore, channels)
        with (
            closing(prepared(look, single, workers=run.workers, ahead=run.workers)) as ready,
            progress("masks", len(answers), "masks", run.progress) as advance,
        ):
            for one in ready:
                found += one
                advance(1)
        values = [held for held, _ in found]
        known = {
            "largest": [max(held, default=-1) for held in values],
            "present": sorted(set().union(*values)),
            "digest": hashlib.sha256("".join(digest for _, digest in found).encode()).hexdigest(),
        }
        save(kept, known)
    return Folders(pictures, replace(answers, fingerprint=known["digest"]), known["largest"], known["present"])


def _files(folder: Path, paths: Sequence[Path]) -> ImageSet:
    names = [os.fspath(path.relative_to(folder)) for path in paths]
    held = Files(folder, names, [path.stat().st_size for path in paths], paths.__getitem__)
    return of_members(held, range(len(paths)), None, ())


def _values(images: ImageSet, masks: ImageSet, ignore: int, channels: int, index: int) -> tuple[list[int], str]:
    """What a mask holds but the ignored value, and its digest; its size is that of its image."""
    mask, stored = read_mask(masks.open(index), named(masks, index)), images.open(index)
    assert not isinstance(stored, Tensor)
    try:
        size = header(stored, channels)
    except DecodeError:  # which is told when the image is read
        size = None
    if size is not None and (size.height, size.width) != mask.shape:
        raise OpsinError(
            f"{images.name(index)} of {images.where} has {size.width}×{size.height} pixels, and its mask "
            f"{named(masks, index)} has {mask.shape[1]}×{mask.shape[0]}: they must be of one size."
        )
    found: list[int] = np.flatnonzero(np.bincount(mask.ravel())).tolist()
    digest = hashlib.sha256(f"{mask.shape} {mask.dtype}".encode() + mask.tobytes()).hexdigest()
    return [value for value in found if value != ignore], digest


def read_set(name: str, path: Path, part: str, channels: int) -> PairSet:
    """A part of a published set whose files lie at `path`.

    Raises:
        OpsinError: there is no such set, or a file is missing.
    """
    if name not in SETS:
        raise unknown("published set", name, SETS)
    with understood(path, f"the site of {SETS[name].title}"):
        return SETS[name].read(path, part, channels)


def _by_stem(held: Files, start: str, end: str, source: str) -> dict[str, int]:
    """Index of the files `…/start/STEM end` by STEM, in order; an OpsinError if there is none."""
    pattern = re.compile(rf"(?:.*/)?{re.escape(start)}/(.+){re.escape(end)}")
    found = {match[1]: i for i, name in enumerate(held.names) if (match := pattern.fullmatch(name))}
    if not found:
        raise missing(held.where, f"{start}/*{end}", source)
    return found


def _joined(
    images: Files, pictures: dict[str, int], masks: Files, answers: dict[str, int], stems: Sequence[str], source: str
) -> tuple[ImageSet, ImageSet]:
    """The images and masks of some stems; an OpsinError if one is not there."""
    for held, known, what in ((images, pictures, "images"), (masks, answers, "masks")):
        absent = [stem for stem in stems if stem not in known]
        if absent:
            raise OpsinError(
                f"{shown(held.where)} lacks {len(absent)} of {len(stems)} {what}, such as {examples(absent)}: they "
                f"come from {source}."
            )
    return (
        of_members(images, [pictures[stem] for stem in stems], None, ()),
        of_members(masks, [answers[stem] for stem in stems], None, ()),
    )


def _ade20k(path: Path, part: str, channels: int) -> PairSet:
    places = [".", "ADEChallengeData2016", "ADEChallengeData2016.zip"]
    held = files(find(path, places, "images", f"images/{part}", ADE20K))
    pictures = _by_stem(held, f"images/{part}", ".jpg", ADE20K)
    answers = _by_stem(held, f"annotations/{part}", ".png", ADE20K)
    images, masks = _joined(held, pictures, held, answers, sorted(pictures.keys() | answers.keys()), ADE20K)
    names = [f"class {i}" for i in range(1, 151)]
    for line in _text(held, "objectInfo150.txt").splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if cells[0].isdigit() and 1 <= int(cells[0]) <= len(names):
            names[int(cells[0]) - 1] = cells[-1]
    table = table_of({0: IGNORED} | {i: i - 1 for i in range(1, 151)})
    return pairs(images, masks, table, names, channels)


def _cityscapes(path: Path, part: str, channels: int) -> PairSet:
    photos, answers = (
        files(find(path, [kind, f"{kind}_trainvaltest.zip"], "*", kind, CITYSCAPES))
        for kind in ("leftImg8bit", "gtFine")
    )
    pictures = _by_stem(photos, part, "_leftImg8bit.png", CITYSCAPES)
    trained = any(name.endswith("_gtFine_labelTrainIds.png") and f"{part}/" in name for name in answers.names)
    kind = "labelTrainIds" if trained else "labelIds"
    known = _by_stem(answers, part, f"_gtFine_{kind}.png", CITYSCAPES)
    images, masks = _joined(photos, pictures, answers, known, list(pictures), CITYSCAPES)
    counted = range(len(CITYSCAPES_CLASSES)) if trained else CITYSCAPES_CLASSES
    values = dict.fromkeys([255] if trained else [*range(CITYSCAPES_VALUES), 255], IGNORED)
    values |= {value: i for i, value in enumerate(counted)}
    return pairs(images, masks, table_of(values), list(CITYSCAPES_CLASSES.values()), channels)


def _voc2012(path: Path, part: str, channels: int) -> PairSet:
    places = [".", "VOC2012", "VOCdevkit/VOC2012", "VOCtrainval_11-May-2012.tar"]
    held = files(find(path, places, "JPEGImages", "JPEGImages", VOC))
    source, folder = (VOC_AUG, "SegmentationClassAug") if part == "trainaug" else (VOC, "SegmentationClass")
    listed = f"ImageSets/Segmentation/{part}.txt"
    # Some lists of the extended set give the paths of image and mask in place of the name.
    stems = [Path(line.split()[0]).stem for line in _text(held, listed).splitlines() if line.strip()]
    if not stems:
        raise missing(held.where, listed, source)
    pictures, answers = _by_stem(held, "JPEGImages", ".jpg", VOC), _by_stem(held, folder, ".png", source)
    images, masks = _joined(held, pictures, held, answers, stems, source)
    table = table_of({i: i for i in range(len(VOC_CLASSES))} | {255: IGNORED})
    return pairs(images, masks, table, VOC_CLASSES, channels)


def _text(held: Files, end: str) -> str:
    """The text of the file whose path ends so, "" if there is none."""
    for i, name in enumerate(held.names):
        if f"/{name}".endswith(f"/{end}"):
            stored = held.open(i)
            return (stored if isinstance(stored, bytes) else stored.read_bytes()).decode("utf-8", "replace")
    return ""


SETS = {
    "ade20k": Published("ADE20K", _ade20k, "training", "validation"),
    "cityscapes": Published("Cityscapes", _cityscapes, "train", "val"),
    "voc2012": Published("PASCAL VOC 2012", _voc2012, "train", "val"),
    "voc2012-aug": Published("PASCAL VOC 2012, trained on trainaug", _voc2012, "trainaug", "val"),
}
"""By the name that `--data NAME:PATH` gives."""
