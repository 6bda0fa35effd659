"""The whole curation, one step after the other, in one folder.

    OUT/images        what was found of every image, and why some are dropped at once
    OUT/sets/NAME     the same, and vectors, of every evaluation and query set
    OUT/vectors       what networks see in the images
    OUT/calibration   the threshold, if none is given or known
    OUT/neighbours    the nearest neighbours of every image
    OUT/duplicates    which images are copies of others, or near an evaluation set
    OUT/clusters      the tree of clusters
    OUT/retrieved     what query sets retrieve
    OUT/sample        what a balanced sample chooses
    OUT/manifest.parquet

A step that is done is passed over, one that was stopped goes on: the same command always ends with the same files.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from opsin.curate.calibrate import calibrate
from opsin.curate.cluster import cluster
from opsin.curate.dedup import Dedup, column_of, dedup, threshold_known
from opsin.curate.embed import embed
from opsin.curate.fetch import fetch, is_urls
from opsin.curate.ingest import images_table, ingest
from opsin.curate.manifest import write_manifest
from opsin.curate.recipe import Curation, named, numbered
from opsin.curate.retrieve import Mode, Query, retrieve
from opsin.curate.sample import sample
from opsin.curate.tables import Table, read_step
from opsin.errors import OpsinError
from opsin.output import make_folder, only_run, write
from opsin.settings import dumped

RECIPE = "recipe.yaml"
"""In the folder of a curation: its recipe."""
MANIFEST = "manifest.parquet"
"""In the folder of a curation: its result."""


def curate(
    recipe: Curation, out: Path, *, accept: bool = False, say: Callable[[str], object] = lambda _: None
) -> dict[str, Any]:
    """Run all steps that `recipe` asks for, in `out`, and return the facts of the manifest.

    Args:
        recipe: see `Curation`.
        out: the folder of the curation.
        accept: go on although suspiciously much would be dropped (see `dedup`).
        say: called with one line for every step.

    Raises:
        OpsinError: the recipe does not fit together, another curation works in `out`, or what a step raises.
    """
    sets = {option: named(getattr(recipe, option), option.replace("_", "-")) for option in SETS}
    count = dict(numbered(name) for name in sets["nearest"])
    sets["nearest"] = {numbered(name)[0]: spec for name, spec in sets["nearest"].items()}
    _check(recipe, sets)
    with only_run(make_folder(out)):
        write(out / RECIPE, dumped(recipe))
        images = _ingested(recipe, out, say)
        tables = {name: _set(recipe, name, spec, out, say) for name, spec in _every(sets).items()}
        vectors = _embedded(recipe, images, out / "vectors", say)
        copies = _calibrated(recipe, images, vectors, out, say)
        settings = replace(recipe, dedup=copies)
        references = {name: tables[name] for name in sets["references"]}
        facts = dedup(
            recipe.engine,
            vectors,
            out / "duplicates",
            settings.dedup,
            graph=out / "neighbours",
            images=images,
            references=references,
            accept=accept,
        )
        duplicates = Table(out / "duplicates")
        say(f"duplicates: {facts['images'] - facts['kept']:,} dropped, {facts['kept']:,} left{_seconds(facts)}")
        clusters = retrieved = chosen = None
        if recipe.sample.images is not None or sets["by_cluster"]:
            facts = cluster(recipe.engine, vectors, out / "clusters", recipe.cluster, duplicates)
            clusters = Table(out / "clusters")
            say(f"clusters: {len(facts['levels'])} levels{_seconds(facts)}")
        if sets["as_is"] or sets["nearest"] or sets["by_cluster"]:
            queries = [
                Query(name, tables[name], mode, count[name] if mode == "sample" else None)
                for option, mode in MODES
                for name in sets[option]
            ]
            facts = retrieve(
                recipe.engine,
                vectors,
                queries,
                out / "retrieved",
                recipe.retrieve,
                clusters=clusters,
                kept=duplicates,
            )
            retrieved = Table(out / "retrieved")
            say(f"retrieved: {facts['images']:,} images for {len(queries)} sets{_seconds(facts)}")
        if recipe.sample.images is not None and clusters is not None:
            facts = sample(recipe.engine, clusters, out / "sample", recipe.sample)
            chosen = Table(out / "sample")
            say(f"sample: {facts['chosen']:,} images, balanced{_seconds(facts)}")
        only_as_is = retrieved is not None and not (sets["nearest"] or sets["by_cluster"])
        facts = write_manifest(
            out / MANIFEST,
            images,
            vectors=vectors,
            duplicates=duplicates,
            clusters=clusters,
            retrieved=None if only_as_is else retrieved,
            sample=chosen,
            steps={name: read_step(out / name)["settings"] for name in STEPS if (out / name).exists()},
            as_is={name: images_table(out / "sets" / name / "images") for name in sets["as_is"]},
        )
        say(f"manifest: {facts['kept']:,} images kept in {out / MANIFEST}")
        return facts


SETS = ("references", "as_is", "nearest", "by_cluster")
"""Fields of the recipe that name sets."""
MODES: tuple[tuple[str, Mode], ...] = (("as_is", "as-is"), ("nearest", "sample"), ("by_cluster", "cluster"))
"""What the sets of a field retrieve."""
STEPS = ("images", "vectors", "calibration", "duplicates", "clusters", "retrieved", "sample")
"""Folders of the steps whose settings the manifest keeps."""


def _check(recipe: Curation, sets: Mapping[str, Mapping[str, str]]) -> None:
    if not recipe.data:
        raise OpsinError("there is nothing to curate: give --data, one or more folders, lists or shards.")
    if not recipe.embed.weights:
        raise OpsinError("no network is named: give --embed.weights, a backbone's file or run folder's weights.")
    for name in {name for each in sets.values() for name in each}:
        specs = {each[name] for each in sets.values() if name in each}
        if len(specs) > 1:
            raise OpsinError(f"the set '{name}' is given with different sources: {' and '.join(sorted(specs))}.")
    for name in sets["nearest"]:
        if name in sets["by_cluster"]:
            raise OpsinError(f"the set '{name}' is given in --nearest and --by-cluster: choose one, or two names.")


def _every(sets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {name: spec for each in sets.values() for name, spec in each.items()}


def _ingested(recipe: Curation, out: Path, say: Callable[[str], object]) -> Table:
    """The images of the heap, downloaded or changed first where that is asked for."""
    data = recipe.data
    if recipe.fetch.edit_hook is not None or any(is_urls(spec) for spec in data):
        changed = [spec for spec in data if recipe.fetch.edit_hook is not None or is_urls(spec)]
        facts = fetch(recipe.engine, changed, out / "fetched", recipe.fetch)
        say(f"fetched: {facts['images']:,} images{_seconds(facts)}")
        data = (*(spec for spec in data if spec not in changed), str(out / "fetched"))
    facts = ingest(recipe.engine, data, out / "images", recipe.ingest)
    say(f"images: {facts['images']:,}, of which {facts['images'] - facts['kept']:,} dropped at once{_seconds(facts)}")
    return images_table(out / "images")


def _set(recipe: Curation, name: str, spec: str, out: Path, say: Callable[[str], object]) -> Table:
    """The vectors of an evaluation or query set, whose images are all taken as they are but for unreadable ones."""
    folder = make_folder(out / "sets" / name)
    ingest(recipe.engine, [spec], folder / "images", replace(recipe.ingest, drop_hook=None))
    return _embedded(recipe, images_table(folder / "images"), folder / "vectors", say, name)


def _embedded(recipe: Curation, images: Table, out: Path, say: Callable[[str], object], name: str = "vectors") -> Table:
    facts = embed(recipe.engine, images, out, recipe.embed)
    say(f"{name}: {facts['embedded']:,} images embedded{_seconds(facts, facts['embedded'])}")
    return Table(out)


def _calibrated(recipe: Curation, images: Table, vectors: Table, out: Path, say: Callable[[str], object]) -> Dedup:
    """The settings of de-duplication, with thresholds found by planted copies where none is given or known."""
    if recipe.dedup.threshold is not None or threshold_known(vectors, recipe.dedup):
        return recipe.dedup
    column = column_of(recipe.engine, vectors, recipe.dedup, out / "neighbours")
    facts = calibrate(recipe.engine, images, vectors, out / "calibration", recipe.calibrate, column=column)
    say(f"calibration: copies are above {facts['threshold']:.3f}, precision {facts['precision']:.3f}{_seconds(facts)}")
    low = recipe.dedup.reference_threshold
    return replace(
        recipe.dedup,
        threshold=facts["threshold"],
        reference_threshold=facts["reference_threshold"] if low is None else low,
    )


def _seconds(facts: Mapping[str, Any], images: int | None = None) -> str:
    """How long a step took, and how fast it was."""
    seconds = facts.get("seconds")
    if seconds is None:
        return ""
    return f", {seconds:,.0f} s" + (f" ({images / seconds:,.0f} images/s)" if images and seconds else "")
