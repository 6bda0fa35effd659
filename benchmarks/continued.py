"""Does continued pretraining lose what the weights knew? With heads warmed up on a frozen backbone, and without.

    python benchmarks/continued.py --weights FILE [--folder DIR] [--out runs/continued]

FILE is a ViT-S/14, such as `benchmarks/focus.py` writes. Both ways have the same steps at the same rates with all of
the backbone learning, on the same images; one lets the heads learn first while the backbone stays as it is, the other
begins with random heads. Curves are of the teacher on the training tiles, whose folders name their photos: kNN, each
left out of its own vote, and drift of the features from where they started. The rate was chosen by pairs of runs with
seed 9 (`--pilot RATE`), which are not among those reported; RESULTS.md says which.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import OPSIN, finish, run, threads
from evidence import FOLDER, SEEDS, Measured, knn, paired, prepare, spread, table

from opsin.data.stream import BatchRecipe
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.presets import continued
from opsin.pretrain.recipe import Phase, Recipe, to_yaml

SIZE = 56
"""Side of a global crop and of the input, in pixels."""
HEADS, STEPS, EVERY = 60, 80, 20
"""Steps of the heads alone, steps of all, steps between looks at the probe set."""
BATCH = 16
PROBE = 340
"""Tiles that the curves are of: all."""
RATE = 2e-3
"""At a batch of 1024; with the square-root rule 2.5e-4 at this one. Ten times that of the named recipe, so that eighty
steps can do the harm that thousands do."""


def settings(seed: int, warmed: bool, rate: float) -> Recipe:
    """The named recipe in small, with or without its first phase."""
    named = continued()
    heads, everything = named.phases
    change = {
        **everything.change,
        "schedule.rate": rate,
        "schedule.warmup_steps": 5,
        "schedule.teacher_temperature": [0.04, 0.04],
    }
    phases = (replace(heads, length=f"{HEADS} steps"), Phase("continue", f"{STEPS} steps", change))
    return replace(
        named,
        seed=seed if warmed else seed + 1,  # a second phase draws with the next seed: so both see the same images
        batch=BatchRecipe(size=BATCH, group=BATCH),
        crops=replace(named.crops, global_size=SIZE, local_size=SIZE // 2, local_count=2, local_scale=(0.15, 0.5)),
        heads=HeadRecipe(
            dino_prototypes=1024, dino_bottleneck=128, ibot_prototypes=1024, ibot_bottleneck=128, hidden=512
        ),
        schedule=replace(named.schedule, warmup_steps=5, teacher_temperature=(0.04, 0.04), teacher_temperature_steps=0),
        monitor=replace(named.monitor, probe_every=EVERY, probe_images=PROBE),
        checkpoint=replace(named.checkpoint, every=HEADS + STEPS, keep=1),
        phases=phases if warmed else phases[1:],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="a ViT-S/14, as benchmarks/focus.py writes it")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="images of evidence.py")
    parser.add_argument("--out", type=Path, default=Path("runs/continued"))
    parser.add_argument("--pilot", type=float, metavar="RATE", help="a pair of runs by which the rate was chosen")
    a = parser.parse_args()
    paths = prepare(a.folder)
    a.out.mkdir(parents=True, exist_ok=True)
    ways = {"heads first": True, "random heads": False}
    begun = knn(a.weights, SIZE)
    curves: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in ways}
    ends: dict[str, list[Measured]] = {way: [] for way in ways}
    seeds = (9,) if a.pilot else SEEDS
    for seed in seeds:
        for way, warmed in ways.items():
            name = f"{seed}-{way.replace(' ', '-')}"
            file = a.out / f"{name}.yaml"
            file.write_text(to_yaml(settings(seed, warmed, a.pilot or RATE)))
            command = [*OPSIN, "pretrain", "--init", "dinov2_vits14", "--weights", a.weights, "--recipe", file]
            command += ["--data", paths.train, "--out", a.out / name, "--no-report"]
            run([str(part) for part in command], threads(1))
            folder = a.out / name / ("2-continue" if warmed else "1-continue")
            curves[way].append(curve(folder / "metrics.jsonl"))
            ends[way].append(knn(folder / "backbone.safetensors", SIZE))
    differences = {f"{way} − start": paired(found, [begun] * len(seeds)) for way, found in ends.items()}
    differences["heads first − random heads"] = paired(ends["heads first"], ends["random heads"])
    figures = {way: [one.figures["knn"] for one in found] for way, found in ends.items()}
    finish(
        "continued",
        {
            "steps": [HEADS, STEPS],
            "knn": {"start": begun.figures["knn"], **figures},
            "differences": {name: asdict(difference) for name, difference in differences.items()},
            "curves": curves,
        },
    )
    columns = [(way, measure) for way in ways for measure in ("probe.knn", "probe.drift")]
    if a.pilot:
        return
    rows = [
        (at["step"], *(spread([found[number][measure] for found in curves[way]]) for way, measure in columns))
        for number, at in enumerate(curves["heads first"][0])
    ]
    print("", table(("step", *(f"{way}, {measure}" for way, measure in columns)), rows), sep="\n")
    rows = [("start", f"{begun.figures['knn']:.3f}"), *((way, spread(found)) for way, found in figures.items())]
    print("", table(("weights", "kNN of evidence.py"), rows), sep="\n")
    print("", table(("difference in kNN", "mean, 95 % intervals"), list(differences.items())), sep="\n")


def curve(metrics: Path) -> list[dict[str, Any]]:
    """The looks at the probe set of a run."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [
        {name: record[name] for name in ("step", "probe.knn", "probe.drift")}
        for record in records
        if "probe.knn" in record
    ]


if __name__ == "__main__":
    main()
