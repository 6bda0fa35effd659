"""Video clips: which there are, the frames of one that stand for it, and the pooled features of those frames.

A clip is a video file, decoded with PyAV (which brings FFmpeg along), or a folder of frame images in the order of the
numbers in their names.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from opsin.data.decode import DecodeError, decode, shown
from opsin.data.listing import IMAGES
from opsin.data.pipeline import prepared
from opsin.data.progress import progress
from opsin.errors import OpsinError
from opsin.evaluate.model import Model
from opsin.evaluate.pooled import BLOCKS, PART, Known, Pooled, check_crop, is_kept, keep, pool
from opsin.evaluate.sets import stamp
from opsin.evaluate.store import place
from opsin.evaluate.task import Run
from opsin.evaluate.transforms import Transform

VIDEOS = (".avi", ".mp4", ".webm", ".mkv", ".mov")
"""Endings of video files."""


@dataclass(frozen=True, eq=False)
class ClipSet:
    """Labelled clips in a fixed order."""

    where: str
    """Where they lie, for messages and tables."""
    paths: Sequence[Path]
    """Video files, or folders of frame images."""
    labels: NDArray[np.int64]
    """Class of every clip, as an index into `classes`, `[N]`."""
    classes: Sequence[str]
    """Names of the classes."""
    missing: Sequence[tuple[str, str]] = ()
    """Clips that an official list names and nobody can get any more, with the reason: they count nowhere."""

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def fingerprint(self) -> str:
        """Another value means other clips."""
        files = [(path, file) for path in self.paths for file in (frame_files(path) if path.is_dir() else [path])]
        return stamp([f"{path.name}/{file.name}" for path, file in files], [file for _, file in files])

    def part(self, indices: NDArray[np.int64]) -> "ClipSet":
        """Some of the clips, in the order of `indices`, with all class names."""
        return replace(self, paths=[self.paths[i] for i in indices.tolist()], labels=self.labels[indices])


def own_clips(folder: Path) -> ClipSet:
    """The clips of a folder per class: each holds video files, or a folder of frame images per clip.

    Raises:
        OpsinError: there is no such folder, or it has no clips in class folders.
    """
    if not folder.is_dir():
        raise OpsinError(f"there is no folder {shown(folder)}: give one that holds a folder of clips per class.")
    found = {
        place.name: [path for path in sorted(place.iterdir()) if path.is_dir() or path.suffix.lower() in VIDEOS]
        for place in sorted(folder.iterdir())
        if place.is_dir()
    }
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise OpsinError(
            f"{shown(folder)} has no clips: give a folder per class that holds videos ({', '.join(VIDEOS)}) or a "
            "folder of frame images per clip."
        )
    labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(paths) for paths in found.values()])
    return ClipSet(
        shown(folder), [path for paths in found.values() for path in paths], labels, [shown(name) for name in found]
    )


def centres(count: int, frames: int) -> NDArray[np.int64]:
    """Numbers of the frames at the centres of `frames` equal segments of a clip of `count`, in order.

    A clip of fewer frames than asked for gives some of them repeatedly.
    """
    return (2 * np.arange(frames, dtype=np.int64) + 1) * count // (2 * frames)


def frame_files(folder: Path) -> list[Path]:
    """The frame images of a folder in the order of the numbers in their names: frame2 comes before frame10."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGES]
    return sorted(files, key=_by_number)


def read_clip(path: Path, frames: int) -> list[Tensor]:
    """Frames at the centres of equal segments of a clip, uint8 `[3, H, W]` each, upright.

    Raises:
        DecodeError: nothing can be decoded, or there is no frame.
        OpsinError: PyAV is missing.
    """
    if not path.is_dir():
        return _read_video(path, frames)
    files = frame_files(path)
    if not files:
        raise DecodeError(path, f"the folder holds no frame images ({', '.join(IMAGES)})")
    images = {number: decode(files[number]) for number in dict.fromkeys(centres(len(files), frames).tolist())}
    return [images[number] for number in centres(len(files), frames).tolist()]


def clip_features(model: Model, clips: ClipSet, frames: int, combine: str, transform: Transform, run: Run) -> Known:
    """Pooled features of clips, from the store or computed and kept there; an interrupted computation goes on.

    Those of every frame are kept, so both ways to combine them share one pass over the clips.

    Args:
        model: the frozen backbone of width D.
        clips: N of them.
        frames: per clip.
        combine: "average" (features of width D) or "concatenate" (of width frames · D, the first frame first).
        transform: of each frame, to one size.
        run: how to compute.

    Raises:
        OpsinError: features are not finite, no clip can be read, PyAV is missing, or the store cannot be written.
    """
    check_crop(model, transform)
    folder = place(
        run.cache,
        "clips",
        weights=model.digest,
        clips=clips.fingerprint,
        frames=frames,
        transform=transform.name,
        part=PART,
    )
    step = max(1, PART // frames)
    parts = [range(start, min(start + step, len(clips))) for start in range(0, len(clips), step)]
    missing = [part for part in parts if not is_kept(folder, part.start)]
    if missing:
        with progress("features", sum(map(len, missing)), "clips", run.progress) as advance:
            for part in missing:
                pooled, bad = _extract(model, clips, part, frames, transform, run, advance)
                if not (pooled.cls.isfinite().all() and pooled.mean.isfinite().all()):
                    raise OpsinError(
                        "the backbone's features are not finite: its weights are damaged, or training diverged."
                    )
                keep(folder, part.start, pooled, bad, model)
    found: list[Pooled] = []
    left_out: dict[int, str] = {}
    for part in parts:  # one by one: all frames of all clips may not fit into memory, their average does
        kept = load_file(folder / f"{part.start}.safetensors")
        found.append(combined(Pooled(kept["cls"].float(), kept["mean"].float()), combine))
        left_out |= {int(i): why for i, why in json.loads((folder / f"{part.start}.json").read_text()).items()}
    if len(left_out) == len(clips):
        raise OpsinError(
            f"no clip of {clips.where} can be decoded ({next(iter(left_out.values()))}): replace the damaged files."
        )
    return Known(Pooled(torch.cat([one.cls for one in found]), torch.cat([one.mean for one in found])), left_out)


def combined(pooled: Pooled, combine: str) -> Pooled:
    """Features per clip, of width D (average) or frames · D, from class tokens `[N, frames, blocks, D]` and means
    `[N, frames, D]`."""
    if combine == "average":
        return Pooled(pooled.cls.mean(1), pooled.mean.mean(1))
    return Pooled(pooled.cls.transpose(1, 2).flatten(2), pooled.mean.flatten(1))


def _extract(
    model: Model,
    clips: ClipSet,
    part: range,
    frames: int,
    transform: Transform,
    run: Run,
    advance: Callable[[int], object],
) -> tuple[Pooled, dict[int, str]]:
    on = model.device if model.device.type == "cuda" else torch.device("cpu")
    blocks, width = min(BLOCKS, model.arch.depth), model.arch.width
    found = Pooled(torch.zeros(len(part), frames, blocks, width), torch.zeros(len(part), frames, width))
    bad: dict[int, str] = {}

    def prepare(index: int) -> Tensor | str:
        try:
            read = read_clip(clips.paths[index], frames)
        except DecodeError as error:
            return error.reason
        return torch.stack([transform(frame.to(on)) for frame in read])

    size = max(1, run.batch_size // frames)
    batches = [part[start : start + size] for start in range(0, len(part), size)]
    with closing(prepared(prepare, batches, workers=run.workers, ahead=1)) as ready:
        for batch, items in zip(batches, ready, strict=True):
            bad |= {index: item for index, item in zip(batch, items, strict=True) if isinstance(item, str)}
            good = [(index, item) for index, item in zip(batch, items, strict=True) if isinstance(item, Tensor)]
            if good:
                rows = [index - part.start for index, _ in good]
                pooled = pool(model, torch.cat([item for _, item in good]))
                found.cls[rows] = pooled.cls.cpu().float().unflatten(0, (len(rows), frames))
                found.mean[rows] = pooled.mean.cpu().float().unflatten(0, (len(rows), frames))
            advance(len(batch))
    return found, bad


def _read_video(path: Path, frames: int) -> list[Tensor]:
    av = pyav()
    try:
        count = _packets(av, path)
        found, decoded = _decoded(av, path, frames, count)
        if decoded != count:  # packets without a frame of their own, damage at the end: count what decodes
            found, _ = _decoded(av, path, frames, decoded)
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DecodeError(path, f"not a video that FFmpeg can decode ({reason})") from None
    return found


def _packets(av: Any, path: Path) -> int:
    """How many frames a video has in all likelihood, without decoding it: what its header says is often wrong."""
    with av.open(str(path)) as container:
        return sum(1 for packet in container.demux(_stream(container, path)) if packet.size)


def _decoded(av: Any, path: Path, frames: int, count: int) -> tuple[list[Tensor], int]:
    """The frames at the centres of a video of `count` frames, and how many it has in truth."""
    wanted = centres(count, frames).tolist()
    kept: dict[int, Tensor] = {}
    decoded = 0
    with av.open(str(path)) as container:
        stream = _stream(container, path)
        stream.codec_context.thread_count = 1  # clips are decoded side by side
        for frame in container.decode(stream):
            if decoded in wanted:
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))  # as phones record
                kept[decoded] = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
            decoded += 1
    if not decoded:
        raise DecodeError(path, "it has no frame")
    return ([kept[number] for number in wanted] if decoded >= count else []), decoded


def _stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise DecodeError(path, "it has no pictures, only other streams")
    return container.streams.video[0]


def pyav() -> Any:
    """The package that decodes videos.

    Raises:
        OpsinError: it is missing.
    """
    try:
        import av
    except ImportError:
        raise OpsinError("reading videos needs PyAV, which is missing: pip install 'opsin[eval]'.") from None
    return av


def _by_number(path: Path) -> tuple[list[str | int], str]:
    pieces = _NUMBER.split(path.name)  # text and digits in turn
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], path.name


_NUMBER = re.compile(r"(\d+)")
