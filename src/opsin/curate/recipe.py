"""The recipe of a curation: what goes in, and the settings of every step, each defined beside the step."""

from dataclasses import dataclass, field
from pathlib import Path

from opsin.curate.calibrate import Calibrate
from opsin.curate.cluster import Cluster
from opsin.curate.dedup import Dedup
from opsin.curate.embed import Embed
from opsin.curate.engine import Engine
from opsin.curate.fetch import Fetch
from opsin.curate.ingest import Ingest
from opsin.curate.retrieve import Retrieve
from opsin.curate.sample import Sample
from opsin.errors import OpsinError
from opsin.settings import parsed, text_of


@dataclass(frozen=True)
class Curation:
    """From a heap of images to a training set."""

    data: tuple[str, ...] = ()
    """The heap: folders, lists, shards or URIs as for pretraining, and files of URLs (see docs/curate.md)."""
    references: tuple[str, ...] = ()
    """Evaluation sets, each as NAME=SRC: images of the heap that are near one of theirs are dropped."""
    as_is: tuple[str, ...] = ()
    """Sets that go into the result as they are, each as NAME=SRC."""
    nearest: tuple[str, ...] = ()
    """Query sets, each as NAME=SRC or NAME:N=SRC, of whose images every one retrieves its N nearest in the heap (large
    sets; N is retrieve.neighbours if it is not given)."""
    by_cluster: tuple[str, ...] = ()
    """Query sets, each as NAME=SRC, whose images choose clusters of the heap (small sets)."""
    fetch: Fetch = field(default_factory=Fetch)
    """Downloads, and hooks that change images."""
    ingest: Ingest = field(default_factory=Ingest)
    """What is looked at in every image, and what is dropped for it."""
    embed: Embed = field(default_factory=lambda: Embed(""))
    """Which networks compute the vectors."""
    calibrate: Calibrate = field(default_factory=Calibrate)
    """How the threshold of copies is found, where none is given or known."""
    dedup: Dedup = field(default_factory=Dedup)
    """How copies are found."""
    cluster: Cluster = field(default_factory=Cluster)
    """The clusters."""
    retrieve: Retrieve = field(default_factory=Retrieve)
    """How much query sets retrieve."""
    sample: Sample = field(default_factory=Sample)
    """How many images are chosen from the clusters, balanced from the top level down. What query sets retrieve comes on
    top. With neither, all that is left after de-duplication is kept."""
    engine: Engine = field(default_factory=Engine)
    """Where it runs, and with how much memory."""


def read(path: Path) -> Curation:
    """The recipe of a YAML file; unknown keys and wrong types are errors."""
    return parsed(text_of(path, "Give the recipe.yaml of a curation."), str(path), Curation)


def numbered(name: str) -> tuple[str, int | None]:
    """The name of a query set that may be given as NAME:N, and N.

    Raises:
        OpsinError: N is no number.
    """
    name, colon, number = name.partition(":")
    if colon and not (number.isdecimal() and int(number)):
        raise OpsinError(
            f"--nearest {name}:{number} gives no number of neighbours: write {name}:32=SRC, or {name}=SRC."
        )
    return name, int(number) if colon else None


def named(sets: tuple[str, ...], option: str) -> dict[str, str]:
    """Name → source of sets that are given as NAME=SRC.

    Raises:
        OpsinError: one has no name, or two have one.
    """
    found: dict[str, str] = {}
    for each in sets:
        name, equals, spec = each.partition("=")
        if not (name and equals and spec) or "/" in name:
            raise OpsinError(
                f"--{option} {each} has no name: give NAME=SRC, such as --{option} imagenet=/data/imagenet."
            )
        if found.setdefault(name, spec) != spec:
            raise OpsinError(f"--{option} names two sets '{name}': give each a name of its own.")
    return found
