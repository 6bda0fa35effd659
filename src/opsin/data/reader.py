"""Decode the images of a source in threads, and get past files that are broken.

Threads, not processes: JPEG and PNG decoding leave the interpreter to other threads, and pixels are never copied
between processes.
"""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from torch import Tensor

from opsin.data.decode import DecodeError, Reduction, Scale, decode_reduced, shown, whole, why
from opsin.data.shards import Unreadable
from opsin.data.sources import Source
from opsin.errors import OpsinError

TRIES = 100
"""Files that are tried for one image: the one asked for and those that follow it."""
TOLERATED = 10
"""Fewer bad files than this never stop a run, whatever their share."""


class PendingImages:
    """Images that are being decoded."""

    def __init__(self, images: list[Future[tuple[Tensor, Scale]]]) -> None:
        self._images = images

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return all(image.done() for image in self._images)

    def result(self) -> list[Tensor]:
        """Wait for the images, in the order in which they were asked for; raises what their decoding raised."""
        return [image for image, _ in self.scaled()]

    def scaled(self) -> list[tuple[Tensor, Scale]]:
        """As `result`, each image with what it is a fraction of."""
        try:
            return [image.result() for image in self._images]
        except BaseException:
            for image in self._images:
                image.cancel()
            raise


class ImageReader:
    """Images of a source by index, each `[C, H, W]` of its own size: uint8 RGB, or other channels (see `decode`).

    A file that cannot be decoded is replaced by the next readable one (index + 1, + 2, … around the end), one in a
    damaged part of a shard by the next behind that part. So what an index gives depends on the files alone: not on
    threads, nor on what was read before. It is logged and counted once.
    """

    def __init__(
        self,
        source: Source,
        *,
        workers: int,
        channels: int = 3,
        max_bad_fraction: float = 0.01,
        log: Path | None = None,
        max_pixels: int = 200_000_000,
    ) -> None:
        """Start `workers` threads.

        Args:
            source: where the images are.
            workers: threads that decode.
            channels: see `decode`; a file with other bands counts as bad.
            max_bad_fraction: the largest tolerated share of bad files among those tried.
            log: file to which a JSON line with index, path and reason is appended for each bad file.
            max_pixels: see `decode`.
        """
        self.source = source
        self.max_bad_fraction = max_bad_fraction
        self.bad: dict[int, str] = {}
        """Index and reason of the bad files met so far."""
        self._next: dict[int, int] = {}
        """The image that is tried in place of a bad one."""
        self._log = log
        self._channels, self._max_pixels = channels, max_pixels
        self._good = bytearray(len(source))
        self._good_count = 0
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def read(self, index: int) -> Tensor:
        """The image at `index`, or the one that replaces it; raises what `read_reduced` does."""
        return self.read_reduced(index, whole)[0]

    def read_reduced(self, index: int, reduction: Reduction) -> tuple[Tensor, Scale]:
        """The image at `index`, or the one that replaces it, at the fraction of its size that `reduction` chooses.

        Raises:
            OpsinError: more than `max_bad_fraction` of the files tried, and at least 10, are bad; or none of the 100
                files from `index` on can be decoded; or a package that reads them is missing.
        """
        count = len(self.source)
        if not 0 <= index < count:
            raise IndexError(f"image {index} of a source with {count}")
        candidate = index
        for _ in range(min(TRIES, count)):
            if candidate in self.bad:
                candidate = self._next[candidate]
                continue
            try:
                image = decode_reduced(
                    self.source.open(candidate), reduction, channels=self._channels, max_pixels=self._max_pixels
                )
            except DecodeError as error:
                behind = error.end if isinstance(error, Unreadable) else candidate + 1
                self._count_bad(candidate, error.reason, behind % count)
                candidate = self._next[candidate]
            else:
                self._count_good(candidate)
                return image
        raise self._too_many(f"none of {min(TRIES, count)} successive files can be decoded")

    def read_many(self, indices: Sequence[int]) -> list[Tensor]:
        """The images at `indices`, in that order, decoded in parallel."""
        return self.submit(indices).result()

    def submit(self, indices: Sequence[int], reductions: Sequence[Reduction] | None = None) -> PendingImages:
        """Start decoding the images at `indices`, each at the fraction its reduction chooses, and return at once."""
        chosen = [whole] * len(indices) if reductions is None else reductions
        pairs = zip(indices, chosen, strict=True)
        return PendingImages([self._pool.submit(self.read_reduced, index, reduction) for index, reduction in pairs])

    def close(self) -> None:
        """Drop what has not begun and wait for the rest."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _count_good(self, index: int) -> None:
        with self._lock:
            self._good_count += not self._good[index]
            self._good[index] = 1

    def _count_bad(self, index: int, reason: str, behind: int) -> None:
        with self._lock:
            if index not in self.bad:  # another thread may have met it meanwhile
                self._write(index, reason)
                self._next[index] = behind
                self.bad[index] = reason
            bad = len(self.bad)
            tried = bad + self._good_count
        if bad >= TOLERATED and bad > self.max_bad_fraction * tried:
            raise self._too_many(
                f"{bad} of the {tried} files tried cannot be decoded, more than data.max_bad_fraction = "
                f"{self.max_bad_fraction:g} allows",
                ", or allow more with --data.max-bad-fraction",
            )

    def _write(self, index: int, reason: str) -> None:
        if self._log is None:
            return
        line = json.dumps({"index": index, "path": shown(self.source.place(index)), "reason": reason})
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OpsinError(
                f"cannot log a bad file in {shown(self._log)} ({why(error)}): choose another output folder or free "
                "some space."
            ) from error

    def _too_many(self, finding: str, instead: str = "") -> OpsinError:
        with self._lock:
            examples = [f"{shown(self.source.name(i))} ({reason})" for i, reason in sorted(self.bad.items())[:3]]
        listed = "" if self._log is None else f" ({shown(self._log)} lists all)"
        return OpsinError(
            f"{finding}, for example {', '.join(examples)}: mend or remove the bad files of "
            f"{shown(self.source.root)}{listed}{instead}."
        )
