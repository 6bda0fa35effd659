"""Images with boxes around their objects: VOC as it is distributed, and any COCO-style JSON file."""

import hashlib
import json
from collections import Counter, defaultdict
from math import isfinite
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor

from opsin.data.decode import shown, why
from opsin.errors import OpsinError
from opsin.evaluate.sets import ImageSet, named, of_files

VOC = {"voc2007": "VOC2007", "voc2012": "VOC2012"}
"""Published sets by the name that `--data NAME:PATH` gives, and their folders in VOCdevkit; their trainval parts count,
as in the papers that measure CorLoc (LOST, TokenCut)."""
EXAMPLES = 3


def read_boxes(data: str, boxes: Path | None) -> tuple[ImageSet, list[Tensor]]:
    """Images, and for each the boxes `[M, 4]` (left, top, right, bottom, in pixels) of all its objects.

    Args:
        data: voc2007:PATH, voc2012:PATH, or a folder of images with `boxes`.
        boxes: COCO-style JSON: `images` (id, file_name relative to the folder), `annotations` (image_id, bbox).

    Raises:
        OpsinError: a file is missing or says something else, or no image has a box.
    """
    name, path = named(data, VOC)
    if name is not None and boxes is not None:
        raise OpsinError(f"{name} brings its own boxes: leave out --boxes.")
    if name is not None:
        paths, found = _voc(Path(path), VOC[name])
    elif boxes is None:
        raise OpsinError(f"{shown(data)} has no boxes: give --boxes FILE in COCO's form, or voc2007:PATH.")
    else:
        paths, found = _coco(Path(path), boxes)
    kept = [i for i, some in enumerate(found) if len(some)]
    if not kept:
        raise OpsinError(f"no image of {shown(path)} has a box: look at the annotations.")
    images = of_files(name or shown(path), [paths[i] for i in kept], None, ())
    return images, [found[i] for i in kept]


def fingerprint_of(boxes: list[Tensor]) -> str:
    """SHA-256 over all boxes."""
    return hashlib.sha256(torch.cat(boxes).numpy().tobytes()).hexdigest()


def _voc(path: Path, folder: str) -> tuple[list[Path], list[Tensor]]:
    places = [path, path / folder, path / "VOCdevkit" / folder]
    root = next((place for place in places if (place / "ImageSets").is_dir()), None)
    if root is None:
        raise OpsinError(
            f"there is no VOCdevkit/{folder}/ImageSets below {shown(path)}: unpack the archive of {folder} from "
            "host.robots.ox.ac.uk/pascal/VOC there."
        )
    names = _text(root / "ImageSets" / "Main" / "trainval.txt").split()
    paths, found = [], []
    for name in names:
        try:
            tree = ElementTree.fromstring(_text(root / "Annotations" / f"{name}.xml"))
            sides = [
                [float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")]
                for box in tree.iterfind("object/bndbox")
            ]
        except (ElementTree.ParseError, ValueError) as error:
            raise OpsinError(f"the annotation {name}.xml of {folder} is damaged ({error}): unpack it again.") from None
        # VOC counts pixels from 1, and the last one belongs to the box.
        if any(right < left or bottom < top for left, top, right, bottom in sides):
            raise OpsinError(f"the annotation {name}.xml of {folder} has a box without area: unpack it again.")
        found.append(torch.tensor(sides).reshape(-1, 4) - torch.tensor([1.0, 1.0, 0.0, 0.0]))
        paths.append(root / "JPEGImages" / f"{name}.jpg")
    return _there(paths), found


def _coco(folder: Path, boxes: Path) -> tuple[list[Path], list[Tensor]]:
    try:
        tree = json.loads(_text(boxes))
        sides = defaultdict(list)
        for one in tree["annotations"]:
            if isinstance(one["bbox"], str):  # whose four letters may be digits
                raise TypeError(f"the box '{one['bbox']}' of image {one['image_id']} is text")
            left, top, width, height = map(float, one["bbox"])
            if not all(map(isfinite, (left, top, width, height))) or min(width, height) <= 0:
                raise ValueError(f"the box {one['bbox']} of image {one['image_id']} has no area")
            sides[one["image_id"]].append([left, top, left + width, top + height])
        images = [(image["id"], folder / image["file_name"]) for image in tree["images"]]
        if twice := [number for number, count in Counter(number for number, _ in images).items() if count > 1]:
            raise ValueError(f"several images have the id {twice[0]}")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise OpsinError(
            f"{shown(boxes)} is not in COCO's form ({type(error).__name__}: {error}): it must hold images (id, "
            "file_name) and annotations (image_id, bbox)."
        ) from None
    strange = sorted(map(str, sides.keys() - {number for number, _ in images}))
    if strange:
        raise OpsinError(
            f"{shown(boxes)} has boxes of images that it does not list, such as {', '.join(strange[:EXAMPLES])}: "
            "mend it."
        )
    return _there([path for _, path in images]), [torch.tensor(sides[number]).reshape(-1, 4) for number, _ in images]


def _there(paths: list[Path]) -> list[Path]:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise OpsinError(
            f"{len(missing)} of {len(paths)} images with annotations are not there, such as "
            f"{', '.join(shown(path) for path in missing[:EXAMPLES])}: give the folder that holds them."
        )
    return paths


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = why(error) if isinstance(error, OSError) else "it is not text"
        raise OpsinError(f"cannot read {shown(path)} ({reason}): unpack the set there, or give another file.") from None
