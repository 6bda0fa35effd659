"""A curation's folder as its steps leave it, made up for what reads it: photos of packages with copies and junk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from opsin.curate.groups import size_histogram
from opsin.curate.heap import Heap
from opsin.curate.tables import STEP, Step, write_part

PART = 16
SETS = [
    {"set": "flowers", "mode": "as-is", "queries": 12, "retrieved": None, "collisions": 0, "chosen": 12},
    {"set": "cats & <dogs>", "mode": "sample", "queries": 5, "retrieved": 1_234_567, "collisions": 4, "chosen": 16},
]


@dataclasses.dataclass
class MadeUp:
    """What was written, and where."""

    out: Path
    photos: Path
    names: list[str]
    """Of the images, by their numbers."""
    dropped: dict[int, str]
    """Reasons of ingest."""
    groups: list[dict[str, Any]]
    cluster: list[int | None]
    chosen: list[bool]


def photos() -> list[np.ndarray]:
    """Some real photos, uint8 `[H, W, 3]`."""
    found = [getattr(skimage.data, name)() for name in ("astronaut", "cat", "coffee", "rocket")]
    return [*found, *load_sample_images().images]


def heap(folder: Path) -> tuple[list[str], dict[int, str], list[list[int]]]:
    """Write crops of photos, copies of some, and junk; names, reasons to drop and families of copies by number."""
    rng = np.random.default_rng(0)
    files: dict[str, tuple[Any, str | None, int | None]] = {}  # name → content, reason, family
    for i, photo in enumerate(photos()):
        for j in range(8):
            top, left = (int(rng.integers(0, side // 2)) for side in photo.shape[:2])
            crop = Image.fromarray(photo[top : top + photo.shape[0] // 2, left : left + photo.shape[1] // 2])
            files[f"photo{i}/{j}.jpg"] = crop, None, None
            if j < 2:
                family = 2 * i + j
                files[f"photo{i}/{j}.jpg"] = crop, None, family
                for k in range(11 if family == 0 else 2):
                    copy = crop.resize((crop.width * (9 - k % 5) // 10, crop.height * (9 - k % 5) // 10))
                    long = "_a_file_name_that_goes_on_and_on_without_any_space_" * (k == 1)
                    files[f"photo{i}/{j}-copy{long}{k}.{'png' if k else 'jpg'}"] = copy, None, family
    for i in range(10):
        files[f"junk/flat{i}.png"] = Image.new("RGB", (64, 48), (20 * i, 99, 30)), "near-constant", None
    files["junk/<b>&.jpg"] = b"no picture at all", "unreadable: not a JPEG, PNG, WebP, GIF, BMP or TIFF file", None
    files["junk/cut.jpg"] = b"", "unreadable: the file is empty", None
    files["tiny/last.png"] = Image.new("RGB", (9, 300)), "smaller than 32 pixels", None
    names = sorted(files, key=str.encode)
    for name, (content, _, _) in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    dropped = {i: reason for i, name in enumerate(names) if (reason := files[name][1])}
    families: dict[int, list[int]] = {}
    for i, name in enumerate(names):
        if (family := files[name][2]) is not None:
            families.setdefault(family, []).append(i)
    return names, dropped, list(families.values())


def parts(step: Step, columns: dict[str, list[Any]], schema: pa.Schema) -> None:
    """Write a table in parts of `PART` rows."""
    count = len(next(iter(columns.values())))
    for number, start in enumerate(range(0, count, PART)):
        rows = {name: values[start : start + PART] for name, values in columns.items()}
        write_part(step.part(number), pa.table(rows, schema))


def made_up(folder: Path) -> MadeUp:
    """All steps of a curation, finished."""
    data, out = folder / "photos", folder / "curated"
    names, dropped, families = heap(data)
    n = len(names)
    found, sources = Heap.scanned([str(data)], out / "images" / "listing")
    assert [sources[0].name(i) for i in range(n)] == names
    images = Step(out / "images", "ingest", {"min_side": 32, "part": PART})
    sizes: list[Any] = []
    for name in names:
        try:
            sizes.append(Image.open(data / name).size)
        except OSError:
            sizes.append((None, None))
    schema = pa.schema(
        [
            ("source", pa.int32()), ("index", pa.int64()), ("path", pa.string()), ("width", pa.int32()),
            ("height", pa.int32()), ("reason", pa.string()),
        ]
    )  # fmt: skip
    columns: dict[str, list[Any]] = {
        "source": [0] * n, "index": list(range(n)), "path": [str(data / name) for name in names],
        "width": [size[0] for size in sizes], "height": [size[1] for size in sizes],
        "reason": [dropped.get(i) for i in range(n)],
    }  # fmt: skip
    parts(images, columns, schema)
    counts = {"near-constant": 10, "unreadable": 2, "smaller than 32 pixels": 1}
    images.finish({"sources": found.facts(), "images": n, "kept": n - 13, "reasons": counts, "seconds": 2.5})

    Step(out / "vectors", "vectors", {"weights": "vit_small.safetensors", "size": 224}).finish(
        {"images": n, "embedded": n - 14, "reasons": {"vanished": 1}, "seconds": 30.25}
    )

    rng = np.random.default_rng(1)
    groups = [
        {
            "representative": family[0],
            "members": family[1:],
            "similarities": [None, *(round(float(s), 3) for s in -np.sort(-rng.uniform(0.62, 0.99, len(family) - 2)))],
            "size": len(family),
        }
        for family in families
    ]
    copies = sum(len(group["members"]) for group in groups)
    kept = [i for i in range(n) if i not in dropped]
    pairs = [
        {"a": kept[int(a)], "b": kept[int(b)], "similarity": float(s), "kept_apart": bool(s <= 0.6)}
        for (a, b), s in zip(rng.integers(0, len(kept), (24, 2)), rng.uniform(0.5, 0.7, 24), strict=True)
    ]
    duplicates = Step(out / "duplicates", "dedup", {"threshold": 0.6, "neighbours": 64})
    facts = {
        "dropped": {"exact duplicate": len(groups), "near-duplicate": copies - len(groups)},
        "threshold": 0.6,
        "seconds": 3.0,
    }
    fates = {number: "near-duplicate" for group in groups for number in group["members"]}
    fates |= {group["members"][0]: "exact duplicate" for group in groups}
    parts(duplicates, {"reason": [fates.get(i) for i in range(n)]}, pa.schema([("reason", pa.string())]))
    duplicates.finish(facts | {"groups": groups, "pairs": pairs})

    gone = dropped.keys() | {number for group in groups for number in group["members"]}
    cluster = [None if i in gone else int(names[i][5]) for i in range(n)]
    clusters = Step(out / "clusters", "cluster", {"levels": [6, 2]})
    columns = {"cluster": cluster, "distance": [None if c is None else float(rng.random()) for c in cluster]}
    parts(clusters, columns, pa.schema([("cluster", pa.int32()), ("distance", pa.float32())]))
    held = torch.tensor([cluster.count(c) for c in range(6)])
    save_file({"sizes.1": held, "centroids.1": torch.zeros(6, 4)}, out / "clusters" / "levels.safetensors")
    clusters.finish({"seconds": 1.0, "levels": [size_histogram(held.numpy())]})

    Step(out / "retrieved", "retrieve", {"sets": ["flowers"]}).finish(
        {"composition": SETS, "images": 14, "shared": 2, "seconds": 0.5}
    )

    chosen = [c is not None and i % 3 != 0 for i, c in enumerate(cluster)]
    sample = Step(out / "sample", "sample", {"images": 20})
    parts(sample, {"chosen": chosen}, pa.schema([("chosen", pa.bool_())]))
    level = {"before": size_histogram(held.numpy()), "after": size_histogram(held.numpy() - 2)}
    levels = [level | {"imbalance_before": 0.25, "imbalance_after": 0.125}]
    sample.finish({"chosen": sum(chosen), "levels": levels, "seconds": 0.1})
    return MadeUp(out, data, names, dropped, groups, cluster, chosen)


def alter(step: Path, **changes: Any) -> None:
    """Change what a step's folder says of itself; None takes it away."""
    path = step / STEP
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
