"""The sub-commands of `opsin curate`: the whole curation, and each of its steps with Parquet in and out."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from opsin.curate.calibrate import Calibrate
from opsin.curate.cluster import Cluster
from opsin.curate.dedup import Dedup, TooManyError
from opsin.curate.embed import Embed
from opsin.curate.engine import Engine
from opsin.curate.fetch import Fetch
from opsin.curate.fit import FitCopies
from opsin.curate.ingest import Ingest
from opsin.curate.recipe import Curation, named, numbered
from opsin.curate.retrieve import Retrieve
from opsin.curate.sample import Sample
from opsin.curate.tables import Table as Vectors
from opsin.errors import OpsinError

Out = Annotated[Path, tyro.conf.arg(metavar="PATH")]
Table = Annotated[Path, tyro.conf.arg(metavar="TABLE")]


def curate(defaults: Curation) -> Callable[..., int]:
    """The `curate` command, with the fields of `defaults` as its options and their defaults."""

    def command(
        out: Out,
        recipe: Path | None = None,  # read before the other options, whose defaults it gives: see cli.py
        settings: Annotated[Curation, tyro.conf.arg(name="")] = defaults,
        accept: bool = False,
        report: bool = True,
    ) -> int:
        """Make a balanced training set without copies of a heap of images. The same command goes on after a stop.

        Args:
            out: folder of the curation: a folder for every step, manifest.parquet, report.html.
            recipe: a recipe.yaml of an earlier curation; the defaults shown for the other options are its values.
            settings: what goes in, and the settings of every step.
            accept: go on although suspiciously many images would be dropped as copies.
            report: write report.html at the end.
        """
        from opsin.curate.pipeline import MANIFEST
        from opsin.curate.pipeline import curate as run
        from opsin.heap_story import tell

        try:
            run(settings, out, accept=accept, say=print)
        except TooManyError as error:
            raise OpsinError(f"{str(error).rstrip('.')}; {tell(out)} shows them.") from None
        if report:
            print(f"report: {tell(out)}")
        print(f"manifest: {out / MANIFEST}")
        return 0

    return command


def fetch(
    data: tuple[str, ...],
    out: Out,
    settings: Annotated[Fetch, tyro.conf.arg(name="")] = Fetch(),  # noqa: B008
    engine: Annotated[Engine, tyro.conf.arg(name="")] = Engine(),  # noqa: B008
) -> int:
    """Download images, or change them with a hook such as face blurring, into tar shards.

    Args:
        data: .txt files with a URL per line, Parquet files with a column `url`, or any images for a hook to change.
        out: folder of the shards, which then is a source of images.
        settings: how images are fetched and changed.
        engine: where it runs.
    """
    from opsin.curate.fetch import fetch as run

    return _told(out, run(engine, data, out, settings))


def ingest(
    data: tuple[str, ...],
    out: Out,
    settings: Annotated[Ingest, tyro.conf.arg(name="")] = Ingest(),  # noqa: B008
    engine: Annotated[Engine, tyro.conf.arg(name="")] = Engine(),  # noqa: B008
) -> int:
    """List images with hash, size and sharpness, and drop what is unreadable, tiny, extreme or near-constant.

    Args:
        data: folders, lists, shards or URIs, as for pretraining.
        out: folder of the table of images.
        settings: what is dropped.
        engine: where it runs.
    """
    from opsin.curate.ingest import ingest as run

    return _told(out, run(engine, data, out, settings))


def embed(
    images: Table,
    out: Out,
    settings: Annotated[Embed, tyro.conf.arg(name="")] = Embed(""),  # noqa: B008
    engine: Annotated[Engine, tyro.conf.arg(name="")] = Engine(),  # noqa: B008
) -> int:
    """Compute the vectors of images by a backbone, and by a network for copy detection if one is given.

    Args:
        images: folder of `opsin curate ingest`.
        out: folder of the table of vectors.
        settings: networks and sizes.
        engine: where it runs.
    """
    from opsin.curate.embed import embed as run
    from opsin.curate.ingest import images_table

    if not settings.weights:
        raise OpsinError("opsin curate embed needs --weights: a backbone's file, or another network's.")
    return _told(out, run(engine, images_table(images), out, settings))


def calibrate(
    images: Table,
    vectors: Table,
    out: Out,
    settings: Annotated[Calibrate, tyro.conf.arg(name="")] = Calibrate(),  # noqa: B008
    copies: Annotated[Dedup, tyro.conf.arg(name="dedup")] = Dedup(),  # noqa: B008
    engine: Annotated[Engine, tyro.conf.arg(name="")] = Engine(),  # noqa: B008
) -> int:
    """Find the threshold above which two images are copies, with copies that are made for it.

    Args:
        images: folder of `opsin curate ingest`.
        vectors: folder of `opsin curate embed`.
        out: folder of the result.
        settings: how many copies, and how precise.
        copies: how the vectors are read: column and whitening.
        engine: where it runs.
    """
    from opsin.curate.calibrate import calibrate as run
    from opsin.curate.dedup import column_of
    from opsin.curate.ingest import images_table

    table = Vectors(vectors)
    column = column_of(engine, table, copies, out.with_name("neighbours"))
    facts = run(engine, images_table(images), table, out, settings, column=column)
    for name in ("threshold", "reference_threshold", "precision", "recall"):
        print(f"{name:20} {facts[name]:.4f}")
    for kind, recall in facts["recall_by_kind"].items():
        print(f"recall of {kind:10} {recall:.3f}")
    return 0


def fit_copies(
    data: str,
    weights: str,
    out: Out,
    model: str | None = None,
    settings: Annotated[FitCopies, tyro.conf.arg(name="")] = FitCopies(),  # noqa: B008
    device: str | None = None,
    workers: int = os.cpu_count() or 1,
) -> int:
    """Train a head that finds copies, over a backbone that stays as it is: for --embed.copies.

    Args:
        data: images, as for pretraining; some thousands of the heap will do.
        weights: the backbone: a file of ours, an official .pth, a Hugging Face folder or a timm file.
        out: the head's file (.safetensors).
        model: name of the architecture, where the file does not tell it.
        settings: copies, head and training.
        device: cuda, mps or cpu; by default the first of these that is there.
        workers: threads that decode and copy images.
    """
    from opsin.curate.fit import fit_copies as run
    from opsin.data.progress import progress
    from opsin.machine import pick_device

    with progress("images and steps", None, "done", show=True) as advance:
        facts = run(
            data, weights, model, out, settings, device=str(pick_device(device)), workers=workers, advance=advance
        )
    return _told(out, facts)


def dedup(
    vectors: Table,
    out: Out,
    images: Table | None = None,
    references: tuple[str, ...] = (),
    neighbours: Path | None = None,
    settings: Annotated[Dedup, tyro.conf.arg(name="")] = Dedup(),  # noqa: B008
    engine: Annotated[Engine, tyro.conf.arg(name="")] = Engine(),  # noqa: B008
    accept: bool = False,
) -> int:
    """Drop copies of other images, and whatever is near an evaluation set.

    Args:
        vectors: folder of `opsin curate embed`, or any Parquet with a column of vectors.
        out: folder of the result.
        images: folder of `opsin curate ingest`: without it only vectors decide, and the first of several copies stays.
        references: evaluation sets, each as NAME=TABLE of vectors.
        neighbours: folder of the neighbours, used again for other thresholds; by default `neighbours` beside `out`.
        settings: thresholds and search.
        engine: where it runs.
        accept: go on although suspiciously many images would be dropped as copies.
    """
    from opsin.curate.dedup import dedup as run
    from opsin.curate.ingest import images_table

    facts = run(
        engine,
        Vectors(vectors),
        out,
        settings,
        graph=neighbours or out.with_name("neighbours"),
        images=None if images is None else images_table(images),
        references={name: Vectors(Path(spec)) for name, spec in named(references, "references").items()},
        accept=accept,
    )
    return _told(out, facts)


def cluster(
    vectors: Table,
    out: Out,
    kept: Table | None = None,
    settings: Annotated[Cluster, tyro.conf.arg(name="")] = Cluster(),  # noqa: B008
    engine: Annotated[Engine, tyro.conf.arg(name="")] = Engine(),  # noqa: B008
) -> int:
    """Cluster images by hierarchical k-means.

    Args:
        vectors: folder of `opsin curate embed`, or any Parquet with a column of vectors.
        out: folder of the result: the cluster of every image, and the tree.
        kept: folder of `opsin curate dedup`: only what it keeps is clustered.
        settings: levels and k-means.
        engine: where it runs.
    """
    from opsin.curate.cluster import cluster as run

    return _told(out, run(engine, Vectors(vectors), out, settings, None if kept is None else Vectors(kept)))


def retrieve(
    vectors: Table,
    out: Out,
    nearest: tuple[str, ...] = (),
    by_cluster: tuple[str, ...] = (),
    clusters: Table | None = None,
    kept: Table | None = None,
    settings: Annotated[Retrieve, tyro.conf.arg(name="")] = Retrieve(),  # noqa: B008
    engine: Annotated[Engine, tyro.conf.arg(name="")] = Engine(),  # noqa: B008
) -> int:
    """Retrieve images that resemble those of query sets.

    Args:
        vectors: folder of `opsin curate embed` of the heap, or any Parquet with a column of vectors.
        out: folder of the result.
        nearest: query sets, each as NAME=TABLE or NAME:N=TABLE of vectors, whose images retrieve their N nearest each.
        by_cluster: query sets, each as NAME=TABLE of vectors, whose images choose clusters.
        clusters: folder of `opsin curate cluster`, for --by-cluster.
        kept: folder of `opsin curate dedup`: only what it keeps is retrieved.
        settings: how much is retrieved.
        engine: where it runs.
    """
    from opsin.curate.retrieve import Query
    from opsin.curate.retrieve import retrieve as run

    queries = [
        Query(name, Vectors(Path(spec)), "sample", count)
        for given, spec in named(nearest, "nearest").items()
        for name, count in [numbered(given)]
    ]
    queries += [Query(name, Vectors(Path(spec)), "cluster") for name, spec in named(by_cluster, "by-cluster").items()]
    chosen = None if clusters is None else Vectors(clusters)
    left = None if kept is None else Vectors(kept)
    return _told(out, run(engine, Vectors(vectors), queries, out, settings, clusters=chosen, kept=left))


def sample(
    clusters: Table,
    out: Out,
    settings: Annotated[Sample, tyro.conf.arg(name="")] = Sample(),  # noqa: B008
    engine: Annotated[Engine, tyro.conf.arg(name="")] = Engine(),  # noqa: B008
) -> int:
    """Choose images from clusters, balanced from the top level down.

    Args:
        clusters: folder of `opsin curate cluster`.
        out: folder of the result.
        settings: how many, and how they are chosen.
        engine: where it runs.
    """
    from opsin.curate.sample import sample as run

    return _told(out, run(engine, Vectors(clusters), out, settings))


def report(out: Out) -> int:
    """Write report.html of what a curation has done so far.

    Args:
        out: folder of the curation.
    """
    from opsin.heap_story import tell

    print(f"report: {tell(out)}")
    return 0


def _told(out: Path, facts: dict[str, Any]) -> int:
    """Print the numbers among what a step found, and where its table is."""
    for name, value in facts.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            print(f"{name:20} {value:,}" if isinstance(value, int) else f"{name:20} {value:.4g}")
    print(f"{'written to':20} {out}")
    return 0
