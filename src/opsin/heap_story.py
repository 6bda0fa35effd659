"""The report of a curation: reads what its steps left behind, looks at some images, hands dictionaries to `report`.

The page of a billion images is no larger than that of some thousand.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from opsin.curate.album import EXAMPLES, Cluster, Look, cluster_examples, dropped_examples, evenly, look, rows_of
from opsin.curate.heap import kind_of
from opsin.curate.tables import STEP, Table, read, read_step
from opsin.data.decode import shown
from opsin.errors import OpsinError
from opsin.report.curation_pictures import cluster_sizes, thumbnail
from opsin.report.page import write_report

STEPS: Final = {
    "images": "Ingest",
    "vectors": "Embed",
    "calibration": "Calibrate",
    "duplicates": "De-duplicate",
    "clusters": "Cluster",
    "retrieved": "Retrieve",
    "sample": "Sample",
}
"""Folders of the steps in a curation's folder, in their order, and what the page calls them."""
GROUPS: Final = 20
"""Groups of duplicates that are shown."""
PAIRS: Final = 40
"""Pairs around the threshold that are shown."""


def tell(folder: Path) -> Path:
    """Write FOLDER/report.html for what is there of a curation and return its path.

    Steps that are missing or not finished are left out. An image that cannot be read any more has a box in place of
    its picture, and the reason.

    Raises:
        OpsinError: the folder is not that of a curation, a table in it is damaged, or the page cannot be written.
    """
    folder = Path(folder)
    made = {name: read_step(folder / name) for name in STEPS if (folder / name / STEP).exists()}
    if not made:
        raise OpsinError(
            f"{shown(folder)} is not the folder of a curation, since it holds none of {', '.join(STEPS)}: give the "
            "--out of opsin curate."
        )
    facts = {name: step["facts"] for name, step in made.items() if step.get("done")}
    rows = flow(facts, _manifest(folder / "manifest.parquet"))
    report: dict[str, Any] = {
        "title": "A curated heap of images",
        "steps": _steps(made, rows),
        "versions": _versions(made),
        "settings": yaml.safe_dump(
            {name: step["settings"] for name, step in made.items()}, sort_keys=False, allow_unicode=True
        ),
    }
    if (folder / "recipe.yaml").exists():
        report["recipe"] = (folder / "recipe.yaml").read_text()
    if "images" in facts:
        report["subtitle"] = _named([source["spec"] for source in facts["images"]["sources"]])
        report["summary"] = _summary(rows)
        report |= _examples(folder, made)
    if facts.get("retrieved", {}).get("composition"):
        report["composition"] = _composition(facts["retrieved"])
    levels = facts.get("sample", {}).get("levels") or [
        {"before": level} for level in facts.get("clusters", {}).get("levels", [])
    ]
    if levels:
        report["sizes"] = [_level(number, level) for number, level in enumerate(levels, start=1)]
    path = folder / "report.html"
    write_report(path, report)
    return path


class Flow(NamedTuple):
    """What a step did to the number of images."""

    entered: int
    """Images that came into it."""
    left: int
    """Images that it left."""
    reasons: dict[str, int]
    """Why the others were dropped, and how many each."""


def flow(facts: Mapping[str, Mapping[str, Any]], manifest: Mapping[str | None, int] | None) -> dict[str, Flow]:
    """The images in and out of every finished step, none without `images`.

    An image goes into training if it was sampled or retrieved, so neither step by itself says how many are left: the
    manifest does, or the sample where nothing was retrieved.

    Args:
        facts: of the finished steps.
        manifest: number of its rows by the kind of their reason, None for those that are kept.
    """
    rows: dict[str, Flow] = {}
    entered = int(facts["images"]["images"]) if "images" in facts else 0
    told: Counter[str] = Counter()
    for name in ("images", "vectors", "duplicates"):
        if name in facts and "images" in facts:
            counts = facts[name]["dropped" if name == "duplicates" else "reasons"]
            reasons = Counter({reason: int(count) for reason, count in counts.items() if count})
            rows[name] = Flow(entered, entered - reasons.total(), dict(reasons))
            entered, told = rows[name].left, told + reasons
    if rows and manifest is not None:
        # What no step before it has told: images that were not selected, and of the sets that go in whole.
        reasons = Counter({reason: count for reason, count in manifest.items() if reason is not None}) - told
        rows["manifest"] = Flow(manifest.get(None, 0) + reasons.total(), manifest.get(None, 0), dict(reasons))
    elif rows and "sample" in facts and "retrieved" not in facts:
        left = int(facts["sample"]["chosen"])
        rows["sample"] = Flow(entered, left, {"not sampled": entered - left} if left < entered else {})
    return rows


def _manifest(path: Path) -> Counter[str | None] | None:
    """Rows of a manifest by the kind of their reason, read part by part; None without one."""
    if not path.exists():
        return None
    counts = Counter[str | None]()
    for part in Table(path).parts:
        for told in read(part, ["reason"])["reason"].value_counts().to_pylist():
            reason = told["values"]
            counts[None if reason is None else kind_of(reason)] += told["counts"]
    return counts


def _steps(made: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Flow]) -> dict[str, Any]:
    table: list[list[Any]] = []
    for name, title in {**STEPS, "manifest": "Manifest"}.items():
        if name not in made and name not in rows:
            continue
        step = made.get(name, {"done": True, "facts": {}})
        cells: list[Any] = [title, "", "", [] if step.get("done") else ["not finished"], ""]
        if name in rows:
            row = rows[name]
            told = [f"{reason}: {count:,}" for reason, count in sorted(row.reasons.items(), key=lambda item: -item[1])]
            cells[1:] = [f"{row.entered:,}", f"{row.entered - row.left:,}", told, f"{row.left:,}"]
        elif name in ("sample", "retrieved") and step.get("done"):
            what, count = ("chosen", "chosen") if name == "sample" else ("retrieved", "images")
            cells[3] = [f"{what}: {step['facts'][count]:,}"]
        seconds, speed = (step.get("facts", {}).get(key) for key in ("seconds", "images_per_second"))
        cells.append("" if seconds is None else f"{seconds:,.1f}")
        cells.append("" if speed is None else f"{speed:,.0f}")
        table.append(cells)
    headers = ["Step", "Images in", "Dropped", "Why", "Images left", "Seconds", "Images/s"]
    used = [i for i in range(len(headers)) if i < 5 or any(row[i] for row in table)]
    return {"headers": [headers[i] for i in used], "rows": [[row[i] for i in used] for row in table], "words": [3]}


def _summary(rows: Mapping[str, Flow]) -> list[dict[str, str]]:
    entered = rows["images"].entered
    if "manifest" in rows:  # it can hold sets that go in whole as well
        entered += rows["manifest"].entered - list(rows.values())[-2].left
    left = list(rows.values())[-1].left
    return [
        {"label": "Images kept", "value": f"{left:,}"},
        {"label": "Images in", "value": f"{entered:,}"},
        {"label": "Dropped", "value": f"{entered - left:,}"},
        {"label": "Share kept", "value": f"{left / max(entered, 1):.1%}"},
    ]


def _versions(made: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = [{"label": "opsin", "value": ", ".join(sorted({str(step["opsin"]) for step in made.values()}))}]
    for source in made.get("images", {}).get("facts", {}).get("sources", []):
        told = f"{shown(source['spec'])}: {_images(source['images'])}, fingerprint {source['fingerprint'][:16]}"
        rows.append({"label": "Source", "value": told})
    return rows


def _composition(facts: Mapping[str, Any]) -> dict[str, Any]:
    def number(value: int | None) -> str:
        return "–" if value is None else f"{value:,}"

    numbers = ("queries", "retrieved", "collisions", "chosen")
    table = [[row["set"], [row["mode"]], *(number(row.get(key)) for key in numbers)] for row in facts["composition"]]
    return {
        "headers": ["Set", "Mode", "Queries", "Retrieved", "Collisions", "Final"],
        "rows": table,
        "words": [1],
        "note": "Retrieved: images found, as often as they were found. Collisions: those that the same set had found "
        f"before. In all, {_images(facts['images'])} of the heap; counted set by set, {facts['shared']:,} more.",
    }


def _named(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return "From " + ", ".join(shown(name) for name in names[:most]) + more


def _examples(folder: Path, made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sections with pictures: every number is collected first, so that no part is read or image decoded twice."""
    images = Table(folder / "images")
    # De-duplication that stopped because it would drop too much has found pairs too: they are to show why.
    duplicates = made.get("duplicates", {})
    found = duplicates.get("facts") or duplicates.get("found", {})
    groups = found.get("groups", [])[:GROUPS]
    pairs = evenly(sorted(found.get("pairs", []), key=lambda pair: -pair["similarity"]), PAIRS)
    dropped = dropped_examples(images)
    clusters, sample = (
        Table(folder / name) if made.get(name, {}).get("done") else None for name in ("clusters", "sample")
    )
    clustered = [] if clusters is None else cluster_examples(clusters, sample)
    fates: dict[int, dict[str, Any]] = {}
    if groups and duplicates.get("done"):
        of_groups = [number for group in groups for number in [group["representative"], *group["members"][:EXAMPLES]]]
        fates = rows_of(Table(folder / "duplicates"), of_groups, ["reason"])
    wanted = {number for numbers in dropped.values() for number in numbers}
    wanted |= {number for group in groups for number in [group["representative"], *group["members"][:EXAMPLES]]}
    wanted |= {pair[side] for pair in pairs for side in "ab"}
    wanted |= {number for cluster in clustered for number in cluster.numbers}
    looks = look(images, wanted)
    sections = {
        "clusters": [_cluster(cluster, looks) for cluster in clustered],
        "duplicates": [_group(group, looks, fates) for group in groups],
        "pairs": _pairs(pairs, found["threshold"], looks) if pairs else None,
        "dropped": [
            {
                "title": reason,
                "notes": [_images(count)],
                "shots": [_shot(looks[number], without=reason) for number in dropped.get(reason, [])],
            }
            for reason, count in made["images"]["facts"]["reasons"].items()
        ],
    }
    return {name: section for name, section in sections.items() if section}


def _images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def _shot(image: Look, *notes: str, without: str = "", **more: Any) -> dict[str, Any]:
    """An image as the page shows it; its reason is left out if it is `without`."""
    size = [] if image.width is None else [f"{image.width} × {image.height}"]
    reason = [image.reason] if image.reason and image.reason != without else []
    return {
        "image": None if image.pixels is None else thumbnail(image.pixels.permute(1, 2, 0).numpy()),
        "label": image.place.rstrip("/").rpartition("/")[2],
        "place": image.place,
        "notes": [*notes, *size, *reason],
        **more,
    }


def _group(
    group: Mapping[str, Any], looks: Mapping[int, Look], fates: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    members, hidden = group["members"][:EXAMPLES], group["size"] - 1 - len(group["members"][:EXAMPLES])

    def fate(number: int) -> list[str]:
        reason = fates.get(number, {}).get("reason")
        return [] if reason in (None, "near-duplicate") else [reason]  # what a similarity says already

    shots = []
    for number, similarity in zip(members, group["similarities"], strict=False):
        near = [] if similarity is None else [f"{similarity:.3f}"]
        shots.append(_shot(looks[number], *near, *fate(number)))
    notes = [f"{group['size']:,} in the group", *[f"{hidden:,} not shown"] * (hidden > 0)]
    kept = group["representative"]
    return {"kept": _shot(looks[kept], *fate(kept)), "notes": notes, "shots": shots}


def _pairs(pairs: Sequence[Mapping[str, Any]], threshold: float, looks: Mapping[int, Look]) -> dict[str, Any]:
    told: dict[str, Any] = {"threshold": f"{threshold:g}", "above": [], "below": []}
    for pair in pairs:
        fate = "kept apart" if pair["kept_apart"] else "one group"
        told["above" if pair["similarity"] > threshold else "below"].append(
            {
                "similarity": f"{pair['similarity']:.3f}, {fate}",
                "shots": [_shot(looks[pair[side]]) for side in "ab"],
            }
        )
    return told


def _cluster(cluster: Cluster, looks: Mapping[int, Look]) -> dict[str, Any]:
    notes = [_images(cluster.size)]
    if None not in cluster.chosen:
        part = "" if cluster.seen == cluster.size else f" of {cluster.seen:,} looked at"
        notes.append(f"{cluster.taken:,}{part} chosen")
    shots = [_shot(looks[image], match=chosen) for image, chosen in zip(cluster.numbers, cluster.chosen, strict=True)]
    return {"title": f"Cluster {cluster.number:,}", "notes": notes, "shots": shots}


def _level(number: int, level: Mapping[str, Any]) -> dict[str, str]:
    """The picture of a level's cluster sizes, before balancing and after it if that was done."""
    title = f"Level {number}: {level['before']['clusters']:,} clusters"
    if "after" in level:
        title += f", {level['imbalance_before']:.3f} → {level['imbalance_after']:.3f} nats from balance"
    histograms = {
        name: (level[key]["edges"], level[key]["bins"])
        for key, name in (("before", "before balancing"), ("after", "after"))
        if "edges" in level.get(key, {})
    }
    return {"title": title, "png": cluster_sizes(histograms)}
