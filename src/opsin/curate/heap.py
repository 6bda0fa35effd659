"""The heap that a curation starts from: its sources, by specs that hold on every machine, and the images' numbers."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from opsin.curate.tables import STEP, read_step
from opsin.data.decode import shown
from opsin.data.files import locate
from opsin.data.sources import Source, scan
from opsin.errors import OpsinError


@dataclass(frozen=True)
class Heap:
    """Images of several sources, numbered one source after the other; small, and can be sent to workers."""

    specs: tuple[str, ...]
    """Of the sources, as `absolute` gives them."""
    fingerprints: tuple[str, ...]
    """Of the sources (see `Source.fingerprint`)."""
    counts: tuple[int, ...]
    """Images in each source."""
    listing: Path
    """Folder that keeps listings and indices (`cache` of `scan`)."""

    @classmethod
    def scanned(cls, data: Sequence[str], listing: Path) -> tuple["Heap", list[Source]]:
        """Scan every source, in the given order.

        Raises:
            OpsinError: no source is given, one is a folder that a fetch has not finished, or what `scan` raises.
        """
        if not data:
            raise OpsinError("no images are given: name one or more folders, lists or shards with --data.")
        specs = tuple(absolute(spec) for spec in data)
        for spec in specs:
            if os.path.exists(os.path.join(spec, STEP)) and not read_step(Path(spec)).get("done"):
                raise OpsinError(f"{shown(spec)} is not finished: give the command that writes it again, it goes on.")
        sources = [scan(spec, listing) for spec in specs]
        prints, counts = (source.fingerprint for source in sources), (len(source) for source in sources)
        return cls(specs, tuple(prints), tuple(counts), listing), sources

    def __len__(self) -> int:
        return sum(self.counts)

    def at(self, number: int) -> tuple[int, int]:
        """The source of image `number`, and its index there."""
        ends = list(accumulate(self.counts))
        source = bisect_right(ends, number)
        return source, number - ends[source] + self.counts[source]

    def source(self, number: int) -> Source:
        """Source `number`, opened once per process.

        Raises:
            OpsinError: it is not what it was when the heap was scanned.
        """
        return _opened(self.specs[number], self.fingerprints[number], self.listing)

    def facts(self) -> list[dict[str, Any]]:
        """Spec, fingerprint and number of images of every source, for a table's facts and the manifest."""
        rows = zip(self.specs, self.fingerprints, self.counts, strict=True)
        return [{"spec": spec, "fingerprint": told, "images": count} for spec, told, count in rows]


@lru_cache(maxsize=64)
def _opened(spec: str, fingerprint: str, listing: Path) -> Source:
    source = scan(spec, listing, progress=False)
    if source.fingerprint != fingerprint:
        raise OpsinError(
            f"{shown(spec)} changed while it was being read, or is not the same on all machines: leave the images "
            "alone until the step is done, remove its folder, and give the command again."
        )
    return source


def absolute(spec: str) -> str:
    """The same source, found from any working directory; the options of a URI stay, since workers need them.

    Raises:
        OpsinError: the URI holds a password, which would be written into every table.
    """
    scheme, separator, rest = spec.partition("://")
    login, at, where = rest.partition("@")
    if separator and at and "/" not in login:
        bare = shown(f"{scheme}://{where.partition('?')[0]}")
        raise OpsinError(
            f"{bare} was given with credentials, which tables would show: give them in the environment, as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    place = locate(os.path.expanduser(spec))
    return place.path if place.local else spec


def kind_of(reason: str) -> str:
    """What reasons are counted by: the part before a colon, behind which stands what differs from image to image."""
    return reason.partition(":")[0]
