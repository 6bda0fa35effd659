"""Patch norms with and without registers: two small backbones that differ in nothing else, or any files of weights.

python benchmarks/registers.py [--steps 700] [--seeds 0 1 2] [--registers 4] [--data PHOTOS] [--out runs/registers]
python benchmarks/registers.py --weights dinov2_vitg14_pretrain.pth dinov2_vitg14_reg4_pretrain.pth [--side 518]

The first form trains both from scratch on the quickstart's tiles, a pair per seed, and takes the quickstart's measure
(which photo does an unseen tile come from, in gray, by nearest neighbours) and the norms of the patches of its photos.
The second one trains nothing. Both write OUT/report.html and print what they found as JSON.

Darcet et al. (2309.16588) see outliers among the patch norms of large transformers that trained long, and none in small
ones: with the first form there should be none to remove, and the script says what it found. What it can show is that
registers do no harm. The setting was fixed before it was run.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from common import finish
from scipy.stats import t as student  # comes with the quickstart's packages
from torch import Tensor

import opsin
from opsin import story
from opsin.backbone.features import FeatureExtractor
from opsin.backbone.probe import OUTLIER, Outliers, knn_accuracy, outliers
from opsin.constants import IMAGENET_MEAN, IMAGENET_STD
from opsin.errors import OpsinError
from opsin.pretrain.phases import pretrain
from opsin.pretrain.recipe import Recipe
from opsin.quickstart import NEIGHBOURS, SIDE, Tiles, changed, cut, own_photos, recipe, save, shipped_photos
from opsin.report.page import write_report

PHOTO = 4 * SIDE
"""Side in pixels at which the photos are looked through, as in the quickstart's pictures."""


def main() -> None:
    """Train or load, measure, write the page, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, nargs="+", help="compare these files and train nothing")
    parser.add_argument("--data", help="a folder of photos, instead of those that come with packages")
    parser.add_argument("--side", type=int, help=f"pixels of a photo for its norms ({PHOTO}; with --weights 518)")
    parser.add_argument("--out", type=Path, default=Path("runs/registers"))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--registers", type=int, default=4)
    parser.add_argument("--device", help="cuda, mps or cpu")
    a = parser.parse_args()
    if a.registers < 1:
        parser.error("--registers must be 1 or more: without any there is nothing to compare.")
    try:
        photos = own_photos(a.data) if a.data else shipped_photos()
        if a.weights:
            compare_weights(a.weights, photos, a.side or 518, a.out, a.device)
        else:
            compare_training(photos, a.side or PHOTO, a.out, a.steps, a.seeds, a.registers, a.device)
    except OpsinError as error:
        sys.exit(str(error))


def compare_weights(files: Sequence[Path], photos: dict[str, Tensor], side: int, out: Path, device: str | None) -> None:
    """The picture of weights that are there already."""
    images = list(photos.values())
    norms = {  # one model in memory at a time
        name: story.patch_norms(images, opsin.load(path, device=device).backbone, side)
        for name, path in zip(labels(files), files, strict=True)
    }
    found = {name: outliers(values) for name, values in norms.items()}
    page: dict[str, Any] = {
        "title": "Patch norms of given weights",
        "subtitle": f"{len(photos)} photos, {', '.join(photos)}.",
        "says": {
            "shows": [f"{name}: {sentence(o)}" for name, o in found.items()],
            "shows_not": [f"More than {len(photos)} photos can show, or other rules for what an outlier is."],
        },
        "norms": story.norm_pictures(images, norms, side),
    }
    write_report(out / "report.html", page)
    finish("registers-weights", {name: o._asdict() for name, o in found.items()} | {"report": str(out / "report.html")})


def compare_training(
    photos: dict[str, Tensor],
    side: int,
    out: Path,
    steps: int,
    seeds: Sequence[int],
    registers: int,
    device: str | None,
) -> None:
    """A pair of runs per seed."""
    images = list(photos.values())
    trained_on, held_out = cut(photos)
    save(out / "tiles", trained_on, list(photos))
    names = {0: "no registers", registers: f"{registers} registers"}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names.values()}
    pictured: dict[str, Tensor] = {}
    for seed in seeds:
        for count, name in names.items():
            folder = out / f"seed{seed}-{count}"
            if pretrain(setting(seed, steps, count), out / "tiles", folder, device=device).stopped_by is not None:
                sys.exit("stopped: the same command goes on.")
            model = opsin.load(folder / "backbone.safetensors", device=device)
            accuracy = knn(model, trained_on, held_out, seed, len(photos))
            norms = story.patch_norms(images, model.backbone, side)
            runs[name].append({"knn": accuracy, **outliers(norms)._asdict()})
            pictured.setdefault(name, norms)
    without, with_ = runs.values()
    difference = [b["knn"] - a["knn"] for a, b in zip(without, with_, strict=True)]
    results = {
        "steps": steps,
        "seeds": list(seeds),
        **runs,
        "knn_difference": difference,
        "found": finding([run["share"] for run in without], [run["share"] for run in with_], difference),
    }
    page: dict[str, Any] = {
        "title": f"A small backbone with and without {registers} registers",
        "subtitle": f"Trained from scratch for {steps} steps on {len(trained_on.images)} tiles of {len(photos)} "
        f"photos; nothing else differs. Seeds {', '.join(map(str, seeds))}.",
        "table": {
            "headers": ["", "kNN accuracy", "Outliers", "Largest norm / median"],
            "rows": [
                [name, *(over_seeds(form, [run[key] for run in found]) for key, form in COLUMNS.items())]
                for name, found in runs.items()
            ],
            "note": "Mean and, of several seeds, standard deviation. kNN: which photo does an unseen tile come from, "
            f"in gray and changed in light? {NEIGHBOURS} neighbours, chance {1 / len(photos):.3f}. Outliers: share "
            f"of patches with a norm above {OUTLIER:g} medians.",
        },
        "says": {
            "shows": [results["found"]],
            "shows_not": [
                "What registers do for a large backbone: this script compares any files of weights, too.",
                "General features: the tiles are few and the steps are minutes of a processor.",
            ],
        },
        "norms": story.norm_pictures(images, pictured, side),
    }
    page["norms"]["table"]["note"] += f" Seed {seeds[0]}."
    write_report(out / "report.html", page)
    finish("registers", results | {"report": str(out / "report.html")})


def setting(seed: int, steps: int, registers: int) -> Recipe:
    """The quickstart's recipe; both backbones resample positions as the released ones with registers do."""
    settings = recipe(seed)
    backbone = replace(settings.backbone, registers=registers, position_offset=0.0, position_antialias=True)
    schedule = replace(settings.schedule, warmup_steps=min(settings.schedule.warmup_steps, steps // 2))
    return replace(settings, steps=steps, backbone=backbone, schedule=schedule)


def knn(model: FeatureExtractor, trained_on: Tiles, held_out: Tiles, seed: int, photos: int) -> float:
    """The quickstart's accuracy: changed held-out tiles among the tiles trained on."""
    gallery = torch.stack([model.preprocess(tile, SIDE) for tile in trained_on.images])
    queries, asked = changed(held_out, seed)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    tokens = [
        torch.cat([model.features(part).cls.cpu() for part in batch.split(256)])
        for batch in ((queries - mean) / std, gallery)
    ]
    accuracy = knn_accuracy(tokens[0], tokens[1], trained_on.labels, asked, (NEIGHBOURS,), num_classes=photos)
    return next(iter(accuracy.values()))


COLUMNS = {"knn": "{:.3f}", "share": "{:.2%}", "peak": "{:.2f}"}


def over_seeds(form: str, values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
    return form.format(fmean(values)) + spread


def sentence(found: Outliers) -> str:
    """What the norms of one model say."""
    if not found.share:
        return f"no outliers: the largest norm is {found.peak:.2f} medians, and an outlier has more than {OUTLIER:g}."
    return f"{found.share:.2%} of the patches are outliers, the largest of {found.peak:.1f} medians."


def finding(without: Sequence[float], with_: Sequence[float], knn_difference: Sequence[float]) -> str:
    """What the pairs of runs say, in words that follow from the figures alone."""
    if not any(without) and not any(with_):
        text = "No outliers with or without registers, as the paper sees in small models: nothing to remove here."
    else:
        fewer = sum(b < a for a, b in zip(without, with_, strict=True))
        text = (
            f"{fmean(without):.2%} of the patches are outliers without registers and {fmean(with_):.2%} with them "
            f"(fewer in {fewer} of {len(without)} pairs)."
        )
    mean = fmean(knn_difference)
    if len(knn_difference) < 2:
        return f"{text} kNN is {mean:+.3f} with registers; one pair says nothing of the spread."
    pairs = len(knn_difference)
    half = float(student.ppf(0.975, pairs - 1)) * stdev(knn_difference) / math.sqrt(pairs)
    verdict = "no change that these seeds could tell" if abs(mean) <= half else "a change"
    return (
        f"{text} kNN is {mean:+.3f} with registers, 95 % interval {mean - half:+.3f} to {mean + half:+.3f} over "
        f"{pairs} pairs: {verdict}."
    )


def labels(files: Sequence[Path]) -> list[str]:
    """Short names of files: their own, those of their folders (runs), or whole paths, whichever tell them apart."""
    short = [path.stem.removesuffix("_pretrain") for path in files]
    for names in (short, [path.parent.name for path in files]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in files]


if __name__ == "__main__":
    main()
