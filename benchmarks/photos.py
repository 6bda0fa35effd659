"""The photos of `benchmarks/copies.py`: what the head is fitted on, and the heap with planted and real families.

They come from Debian packages, fetched with `apt-get download` where they are not there; none goes into the repository.
"""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from opsin.curate.copies import KINDS, copy_of
from opsin.curate.looks import picture

SIDE, SPREAD, SEED = 320, 15.0, 1
PLANTED = tuple(kind for kind in KINDS if kind != "strong")
FITTED = ("ufoai-textures", "lomiri-wallpapers-16.04")
MEASURED = {
    "mate-backgrounds": "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood "
    "YellowFlower",
    "opencv-doc": "aero1 apple baboon board box building butterfly chicky_512 fruits home.jpg licenseplate_motion "
    "messi5 orange smarties squirrel_cls starry_night stuff sudoku text_defocus text_motion input_images/plant "
    "hfs/data/000 hfs/data/001 hfs/data/002 reg/home dnn_superres/butterfly scenetext01 scenetext02 scenetext03 "
    "scenetext04 scenetext05 scenetext06 scenetext_segmented_word01 scenetext_segmented_word02 "
    "scenetext_segmented_word03 scenetext_segmented_word04 scenetext_segmented_word05 227943776_1 230501201_1 "
    "astra_color asymetricalPattern bicubicOutput boat bus_det calib_pattern cat_det "
    "checkershadow_illusion4med corridor_fld detect_test1 detect_test2 fusion_mertens julia_facedetect_sample "
    "motion_original newspaper opencv_bus_res pattern_img period_input person_multi_det random_pattern realsense "
    "retina_TreeHdr_retina singlemarkersoriginal studentsSample_input yolo",
    "python3-skimage": "astronaut brick camera cell chelsea clock_motion coffee coins grass gravel hubble_deep_field "
    "ihc moon page retina rocket text",
    "darknet": "dog eagle giraffe horses kite person scream",
    "labelme-examples": "classification/data_annotated/0001 classification/data_annotated/0002 tutorial/apc2016_obj3",
}
"""Photos by package: the end of their paths, without the extension where that is plain."""
TILED = {"mate-backgrounds": (4, 3)}
REAL = (
    ("encodings", "libjxl-testdata", r"jxl/(flower)/[^/]*\.(?:png|jpg)$"),
    ("encodings", "opencv-doc", r"data/(ela)_\w+\.jpg$"),
    ("encodings", "labelme-examples", r"(?:data_annotated|JPEGImages)/(2011_\d+)\.jpg$"),
    ("sizes", "mate-backgrounds", r"abstract/(Elephants)\w*\.jpg$"),
    ("sizes", "plasma-workspace-wallpapers", r"wallpapers/(\w+)/contents/(?:images/\d+x\d+|screenshot)\.(?:png|jpg)$"),
    ("colour spaces", "libjxl-testdata", r"wesaturate/\d+px/([^_]+)_\w+\.png$"),
    ("colour spaces", "libjxl-testdata", r"raw.pixls/([\w-]+?)_\w+\.png$"),
    ("views", "opencv-doc", r"data/(graf|leuven|aloe|rubberwhale|basketball)(?:[AB]|[LR]|\d)\.(?:png|jpg)$"),
    ("views", "opencv-doc", r"data/(?:left|right)\.jpg$"),
    ("views", "opencv-doc", r"html/(ambush_5)_(?:left|right)\.jpg$"),
    ("views", "python3-skimage", r"(motorcycle)_(?:left|right)\.png$"),
    ("views", "labelme-examples", r"video_annotation/data_annotated/(\d{6})\d\d\.jpg$"),
)
"""Real families: group, package, and a pattern whose group names the family; without one all files are one family."""


def unpacked(package: str, folder: Path) -> Path | None:
    """The files of a Debian package, fetched if they are not there; None, and a message, if they cannot be had."""
    out = folder / package
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
            archive = next(folder.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive.name, f"{package}.partial"], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError, StopIteration):
            print(f"left out: the Debian package {package} (apt-get download {package})", file=sys.stderr)
            return None
        out.with_name(f"{package}.partial").rename(out)
    return out


def tiles(photo: Image.Image, grid: tuple[int, int]) -> Iterator[Image.Image]:
    """Columns × rows of a photo (rows × columns of an upright one): the middle 0.8 × 0.8 of each cell."""
    across, down = grid if photo.width >= photo.height else grid[::-1]
    wide, high = photo.width / across, photo.height / down
    for y in range(down):
        for x in range(across):
            left, right = round((x + 0.1) * wide), round((x + 0.9) * wide)
            yield photo.crop((left, round((y + 0.1) * high), right, round((y + 0.9) * high)))


def small(photo: Image.Image) -> Image.Image:
    """At most `SIDE` pixels on the shorter side."""
    share = min(1.0, SIDE / min(photo.size))
    return photo.resize((round(photo.width * share), round(photo.height * share)), Image.Resampling.LANCZOS)


def varied(photo: Image.Image) -> bool:
    """Whether there is something to see."""
    return bool(np.asarray(photo.convert("L")).std() >= SPREAD)


def fitted_photos(packages: Path, out: Path) -> None:
    """Write what the head is fitted on: textures as they are, and tiles."""
    folders = {name: unpacked(name, packages) for name in FITTED}
    if None in folders.values():
        sys.exit("the packages that the head is fitted on are missing")
    textures, wallpapers = (Path(str(folders[name])) for name in FITTED)
    seen = set()
    with zipfile.ZipFile(textures / "usr/share/games/ufoai/base/0textures.pk3") as files:
        for name in sorted(files.namelist()):
            stem = re.sub(r"\d*[a-z]?\.\w+$", "", name)
            # maps of normals and the like are no photos
            if re.search(r"\.(jpg|png)$", name) and not re.search(r"_([nsgr]m|norm|g|gl)\.", name) and stem not in seen:
                seen.add(stem)
                (out / f"{len(seen):04}{Path(name).suffix}").write_bytes(files.read(name))
    for file in sorted(wallpapers.rglob("*.jpg")):
        for number, tile in enumerate(tiles(Image.open(file).convert("RGB"), (6, 4))):
            if varied(tile):
                small(tile).save(out / f"{file.stem}-{number:02}.png", compress_level=1)


def heap_photos(packages: Path, heap: Path, originals: Path) -> list[str]:
    """Write the heap, and its originals alone; returns the packages and photos that are missing.

    `heap/planted/PHOTO/TILE.KIND.png` and `heap/GROUP/FAMILY/FILE`.
    """
    names = sorted({*MEASURED, *(package for _, package, _ in REAL)})
    there = {name: unpacked(name, packages) for name in names}
    found = {
        name: sorted(f for f in folder.rglob("*.*") if f.is_file()) if folder else [] for name, folder in there.items()
    }
    count, missing = 0, [name for name in names if there[name] is None]
    for package, photos in MEASURED.items():
        for photo in photos.split():
            ends = tuple(f"/{photo}{suffix}" for suffix in ("", ".jpg", ".png"))
            file = next((f for f in found[package] if str(f).endswith(ends) and f.suffix in (".jpg", ".png")), None)
            if file is None:
                missing += [f"{photo} of {package}"] * (package not in missing)
                continue
            image = Image.open(file).convert("RGB")
            parts = list(tiles(image, TILED[package])) if package in TILED else [image]
            folder = heap / "planted" / f"{package}-{photo.replace('/', '-')}"
            folder.mkdir(parents=True)
            for number, part in enumerate(map(small, filter(varied, parts))):
                pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)
                part.save(folder / f"{number:02}.original.png", compress_level=1)
                shutil.copy(folder / f"{number:02}.original.png", originals / f"{count:04}.png")
                for kind in PLANTED:
                    copied = picture(copy_of(pixels, kind, SEED, count))
                    copied.save(folder / f"{number:02}.{kind}.png", compress_level=1)
                count += 1
    for group, package, pattern in REAL:
        for file in found[package]:
            match = re.search(pattern, str(file))
            if match and not file.is_symlink():
                family = match[1] if match.groups() else "pair"
                folder = heap / group / family
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder / "-".join(file.parts[-4:]))
    return missing


def prepared(name: str, folder: Path, packages: Path) -> Path:
    """The folder `fit` (with `photos/`) or `measured` (with `heap/`, `originals/` and `missing.json`), written once."""
    out, partial = folder / name, folder / f"{name}.partial"
    if out.exists():
        return out
    shutil.rmtree(partial, ignore_errors=True)
    if name == "fit":
        (partial / "photos").mkdir(parents=True)
        fitted_photos(packages, partial / "photos")
    else:
        for part in ("heap", "originals"):
            (partial / part).mkdir(parents=True)
        missing = heap_photos(packages, partial / "heap", partial / "originals")
        (partial / "missing.json").write_text(json.dumps(missing))
    return partial.rename(out)
