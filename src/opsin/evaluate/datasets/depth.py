"""Images with depth: NYU Depth V2, KITTI and SUN RGB-D as they are distributed, and pairs of folders of one's own."""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from opsin.data.decode import shown
from opsin.errors import OpsinError, unknown
from opsin.evaluate.datasets.layout import understood
from opsin.evaluate.dense import EXAMPLES, PairSet, matched
from opsin.evaluate.depth_loss import known
from opsin.evaluate.depth_views import Protocol
from opsin.evaluate.sets import ImageSet, of_files, stamp

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Endings of images in a folder of one's own."""
DEPTHS = (".png", ".npy", ".tif", ".tiff")
"""Endings of depth maps in a folder of one's own."""
LOOKED_AT = 16
"""Depth maps that are read at first to see whether their unit can be right."""


@dataclass(frozen=True)
class Published:
    """A published set with depth."""

    title: str
    """How tables call it."""
    read: Callable[[Path, str], PairSet]
    """Folder and part → pairs with depth in metres; an OpsinError says which file is missing and where to get it."""
    train: str
    """The part that trains; "" for a set that only tests."""
    test: str
    """The part that tests."""
    protocol: Protocol
    """How its images are treated and measured."""
    source: str
    """Where its files come from."""


def read_set(name: str, path: Path, part: str) -> PairSet:
    """A part of a published set whose files lie at `path`.

    Raises:
        OpsinError: the set has no such part, or a file is missing.
    """
    if name not in SETS:
        raise unknown("published set", name, SETS)
    if not part:
        raise OpsinError(
            f"{name} only tests heads, as the paper does: give --data nyu:PATH --test-data {name}:PATH, or a --head."
        )
    if not path.is_dir():
        raise OpsinError(f"there is no folder {shown(path)}: give {name}:PATH with {SETS[name].source}.")
    with understood(path, SETS[name].source):
        return SETS[name].read(path, part)


def pairs(
    images: Path,
    depths: Path,
    *,
    scale: float = 1.0,
    disparity: bool = False,
    focal_times_baseline: float | None = None,
    disparity_offset: float = 0.0,
) -> PairSet:
    """Images and depth maps in two folders, paired by their names but for the ending.

    Args:
        images: the folder of images; sub-folders count.
        depths: the folder of depth maps: 16-bit PNG, TIFF or .npy.
        scale: units of the files per metre (1000 for millimetres); for disparity, per pixel.
        disparity: the files hold the disparity of a stereo camera.
        focal_times_baseline: metres × pixels, by which disparity becomes depth.
        disparity_offset: pixels that are added to disparity before.

    Raises:
        OpsinError: a folder is missing, or files have no partner.
    """
    photos, maps = matched(images, depths, IMAGES, DEPTHS)
    read = _reader(scale, disparity, focal_times_baseline, disparity_offset)
    key = f"{scale} {disparity} {focal_times_baseline} {disparity_offset}"
    return _paired(shown(images), photos, maps, read, key)


def _reader(
    scale: float, disparity: bool, focal_times_baseline: float | None, offset: float
) -> Callable[[Path], Tensor]:
    def read(path: Path) -> Tensor:
        values = read_depth(path, scale, bytes_too=disparity)
        if not disparity or focal_times_baseline is None:
            return values
        return torch.where(values > 0, focal_times_baseline / (values + offset), 0.0)

    return read


def read_depth(path: Path, scale: float, *, bytes_too: bool = False) -> Tensor:
    """The values of a depth map divided by `scale`, float32 `[H, W]`; what is negative, infinite or NaN becomes 0.

    0 is "unknown" throughout.

    Args:
        path: a PNG, TIFF or .npy with one value per pixel.
        scale: units per metre.
        bytes_too: take 8-bit files, in which only disparity fits.

    Raises:
        OpsinError: the file is damaged, has several channels, or 8 bits.
    """
    values = _values(path)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values.squeeze(0 if values.shape[0] == 1 else 2)
    if values.ndim != 2:
        raise OpsinError(
            f"{shown(path)} has the shape {'×'.join(map(str, values.shape))} and no single value per pixel: give "
            "depth, not a picture of it."
        )
    if values.dtype.kind not in "uif" or (values.dtype.itemsize == 1 and not bytes_too):
        raise OpsinError(
            f"{shown(path)} has samples of type {values.dtype}, which cannot hold depth in metres: store 16-bit PNG, "
            "TIFF or .npy."
        )
    metres = torch.from_numpy(values.astype(np.float64) / scale).float()
    return torch.where(metres.isfinite() & (metres > 0), metres, 0.0)


def _values(path: Path) -> NDArray[Any]:
    try:
        if path.suffix.lower() == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        with Image.open(path) as image:
            return np.array(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it is damaged or no depth map"
        raise OpsinError(f"cannot read the depth {shown(path)}: {reason}.") from None


def _paired(
    where: str, photos: Sequence[Path], maps: Sequence[Path], read: Callable[[Path], Tensor], key: str
) -> PairSet:
    """Image files with depth files; the fingerprint knows both."""
    images = of_files(where, photos, None, ())
    facts = f"{images.fingerprint} {stamp([path.name for path in maps], maps)} {key}"
    fingerprint = hashlib.sha256(facts.encode()).hexdigest()
    return PairSet(replace(images, fingerprint=fingerprint), lambda index: read(maps[index]))


def check_unit(given: PairSet, name: str, min_depth: float, max_depth: float, hint: str) -> None:
    """See whether depths can be metres, by up to 16 maps that are spread over the set.

    Args:
        given: the pairs.
        name: how the message calls them.
        min_depth: metres.
        max_depth: metres.
        hint: what the message advises.

    Raises:
        OpsinError: nothing is known, nothing lies within the range, or most of it is beyond.
    """
    indices = np.unique(np.linspace(0, len(given) - 1, min(len(given), LOOKED_AT)).astype(int)).tolist()
    values = torch.cat([target[known(target)] for target in map(given.target, indices)]).numpy()
    if not len(values):
        raise OpsinError(
            f"{len(indices)} depth maps of {name}, such as that of {given.images.name(0)}, hold no value above 0, and "
            "0, negative, infinite and NaN mean unknown: give maps with values."
        )
    if np.median(values) > max_depth or not ((values > min_depth) & (values < max_depth)).any():
        raise OpsinError(
            f"the depths of {name} have a median of {np.median(values):g} m and go from {values.min():g} to "
            f"{values.max():g} m, where {min_depth:g} to {max_depth:g} m are expected: {hint}."
        )


def _list(root: Path, names: Sequence[str], source: str) -> list[tuple[str, str]]:
    """Image and depth of the lines of the first list that exists; lines whose depth is "None" are left out."""
    for name in names:
        if (root / name).is_file():
            lines = [line.split() for line in (root / name).read_text().splitlines() if line.strip()]
            if not lines:
                raise OpsinError(f"{shown(root / name)} is empty: take it from {source}.")
            if any(len(line) < 2 for line in lines):
                raise OpsinError(f"{shown(root / name)} has lines without image and depth: take it from {source}.")
            return [(line[0].lstrip("/"), line[1].lstrip("/")) for line in lines if line[1] != "None"]
    raise OpsinError(f"{shown(root)} holds no {' or '.join(names)}: take the list from {source}.")


def _found(root: Path, folders: Sequence[str], names: Sequence[str], source: str) -> list[Path]:
    """Each file in the first of the folders that holds it, with .jpg for .png where images were converted."""
    found, missing = [], []
    for name in names:
        tries = [root / folder / name for folder in folders]
        tries += [path.with_suffix(".jpg") for path in tries if path.suffix == ".png"]
        there = next((path for path in tries if path.is_file()), None)
        found += [] if there is None else [there]
        missing += [name] if there is None else []
    if missing:
        raise OpsinError(
            f"{len(missing)} of {len(names)} files of the list are not in {shown(root)}, such as "
            f"{', '.join(missing[:EXAMPLES])}: take them from {source}."
        )
    return found


def _nyu(root: Path, part: str) -> PairSet:
    """NYU Depth V2: the lists and folders of BTS (24,231 training images), or the official .mat (795)."""
    official = root / "nyu_depth_v2_labeled.mat"
    lists = [f"nyu_{part}.txt", f"nyudepthv2_{part}_files_with_gt.txt"]
    if official.is_file() and not any((root / name).is_file() for name in lists):
        return _nyu_official(official, part)
    source = SETS["nyu"].source
    entries = _list(root, lists, source)
    folders = ["", "sync", "official_splits/test"]
    photos, maps = (_found(root, folders, [entry[i] for entry in entries], source) for i in (0, 1))
    return _paired("NYU Depth V2", photos, maps, lambda path: read_depth(path, 1000.0), "1000")


def _nyu_official(path: Path, part: str) -> PairSet:
    """The 1,449 labelled frames of the official file and the split beside it (795 train, 654 test).

    As BTS's script extracts them, from which the files of published tables come: raw depth in whole millimetres, not
    the filled one, and the white frame of the photographs in black.
    """
    try:
        h5py = importlib.import_module("h5py")
    except ModuleNotFoundError:
        raise OpsinError(f"{shown(path)} is read with h5py, which is missing: pip install 'opsin[eval]'.") from None
    splits = _mat(path.with_name("splits.mat"), "the official page of NYU Depth V2")
    key = {"train": "trainNdxs", "test": "testNdxs"}[part]
    chosen = np.asarray(splits[key], dtype=np.int64).ravel() - 1  # MATLAB counts from 1

    def frame(name: str, index: int) -> NDArray[Any]:
        with understood(path, SETS["nyu"].source), h5py.File(path, "r") as file:  # each its own: threads share none
            return np.asarray(file[name][int(chosen[index])])

    def photo(index: int) -> Tensor:
        pixels = torch.from_numpy(frame("images", index)).transpose(1, 2)  # MATLAB stores columns first: [3, W, H]
        framed = torch.zeros_like(pixels, memory_format=torch.contiguous_format)
        framed[:, 7:474, 7:632] = pixels[:, 7:474, 7:632]
        return framed

    def metres(index: int) -> Tensor:
        millimetres = (frame("rawDepths", index) * 1000).astype(np.uint16)
        return torch.from_numpy(millimetres.astype(np.float32) / 1000).T.contiguous()

    facts = f"{stamp([path.name], [path])} {chosen.tolist()} rawDepths"
    return PairSet(
        ImageSet(
            where="NYU Depth V2",
            count=len(chosen),
            open=photo,
            name=lambda index: f"{shown(path)} frame {chosen[index] + 1}",
            fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
        ),
        metres,
    )


def _kitti(root: Path, part: str) -> PairSet:
    """KITTI: raw images and annotated depth, by Eigen's lists (23,158 and 652 pairs with depth)."""
    source = SETS["kitti"].source
    entries = _list(root, [f"kitti_eigen_{part}.txt", f"eigen_{part}_files_with_gt.txt"], source)
    photos = _found(root, ["", "raw", "input", "raw_data"], [image for image, _ in entries], source)
    folders = [f"{base}{half}" for base in ("data_depth_annotated/", "gt_depth/", "") for half in ("", "train", "val")]
    maps = _found(root, folders, [depth for _, depth in entries], source)
    return _paired("KITTI", photos, maps, lambda path: read_depth(path, 256.0), "256")


def _sunrgbd(root: Path, part: str) -> PairSet:
    """SUN RGB-D: the official folders and split (5,285 and 5,050 images).

    Depth is what the camera saw (`depth`, not the filled `depth_bfx`), as the list of published tables has it. It is
    stored as millimetres rotated left by three bits: metres = ((d >> 3) | (d << 13)) / 1000 in 16 bits, as the official
    toolbox decodes them.
    """
    source = SETS["sunrgbd"].source
    where = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
    split = _mat(root / where, source)
    scenes = [str(np.asarray(cell).item()) for cell in np.asarray(split[f"all{part}"]).ravel()]
    photos, maps, missing = [], [], []
    for scene in scenes:
        folder = root / "SUNRGBD" / scene.partition("SUNRGBD/")[2].strip("/")
        inside = [sorted((folder / kind).glob(f"*{ending}")) for kind, ending in (("image", "jpg"), ("depth", "png"))]
        if not all(inside):
            missing.append(str(folder.relative_to(root)))
            continue
        photos.append(inside[0][0])
        maps.append(inside[1][0])
    if missing:
        raise OpsinError(
            f"{len(missing)} of {len(scenes)} scenes lack image/*.jpg or depth/*.png in {shown(root)}, such as "
            f"{', '.join(missing[:EXAMPLES])}: take them from {source}."
        )

    def read(path: Path) -> Tensor:
        stored = _values(path)
        if stored.ndim != 2:
            raise OpsinError(f"{shown(path)} is no depth map of SUN RGB-D: take it from {source}.")
        stored = stored.astype(np.uint16)
        return torch.from_numpy(((stored >> 3) | (stored << 13)).astype(np.float32) / 1000)

    return _paired("SUN RGB-D", photos, maps, read, "sunrgbd raw")


def _mat(path: Path, source: str) -> dict[str, Any]:
    """The variables of a MATLAB file of version 5."""
    if not path.is_file():
        raise OpsinError(f"there is no {shown(path)}: take it from {source}.")
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise OpsinError(f"{shown(path)} is read with scipy, which is missing: pip install 'opsin[eval]'.") from None
    try:
        variables: dict[str, Any] = loadmat(path)
    except Exception:  # a damaged file makes scipy raise almost anything
        raise OpsinError(f"{shown(path)} is damaged or no MATLAB file: take it from {source}.") from None
    return variables


SETS: dict[str, Published] = {
    "nyu": Published(
        "NYU Depth V2",
        _nyu,
        "train",
        "test",
        Protocol(max_depth=10.0, border="nyu", crop=(416, 544), area="eigen", brightness=0.25),
        "the sync folders and nyudepthv2_train/test_files_with_gt.txt of github.com/cleinc/bts (also as nyu_train.txt "
        "and nyu_test.txt), or nyu_depth_v2_labeled.mat and splits.mat of cs.nyu.edu/~fergus/datasets",
    ),
    "kitti": Published(
        "KITTI",
        _kitti,
        "train",
        "test",
        Protocol(max_depth=80.0, border="kb", crop=(352, 704), area="garg", brightness=0.1),
        "the raw recordings and data_depth_annotated.zip of cvlibs.net/datasets/kitti, and kitti_eigen_train.txt and "
        "kitti_eigen_test.txt of github.com/zhyever/Monocular-Depth-Estimation-Toolbox",
    ),
    "sunrgbd": Published(
        "SUN RGB-D",
        _sunrgbd,
        "",
        "test",
        # 640 high and 480 wide: the configuration of the released heads gives (480, 640) to a resize that takes the
        # width first, and so their figures are of images that are stretched to this.
        Protocol(max_depth=10.0, size=(640, 480), area="sun", cap=8.0),
        "SUNRGBD.zip and SUNRGBDtoolbox.zip of rgbd.cs.princeton.edu",
    ),
}
"""By the name that `--data NAME:PATH` gives."""
