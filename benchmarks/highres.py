"""Does a short high-resolution phase improve dense features? Three seeds, from scratch.

    python benchmarks/highres.py [--folder DIR] [--out runs/highres]

Every seed trains at low resolution, and goes on from there in two ways: at high resolution with the position grid
resampled, and, as the control, for the same number of steps at low resolution. The dense measure of `evidence.py` is
taken before and after, each with low and with high input. Settings were fixed before it was run.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from common import OPSIN, finish, run, threads
from evidence import FOLDER, LOW, SEEDS, STEPS, Measured, dense, paired, prepare, recipe, spread, table

from opsin.pretrain.recipe import Phase, to_yaml

HIGH = 2 * LOW
"""Side of a global crop and of the input, in pixels."""
EXTRA = STEPS // 5
"""Steps of the second phase."""
GENTLE = {
    "schedule.rate": 2e-3,
    "schedule.momentum": [0.99, 1.0],
}
"""Of the second phase, at either resolution."""
SECOND = {
    "high resolution": {"crops.global_size": HIGH, "crops.local_size": HIGH // 2, "backbone.grid": HIGH // 8},
    "low resolution": {},
}
"""What the second phase changes besides."""
AT = {f"{LOW} px": LOW, f"{HIGH} px": HIGH}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="images of evidence.py")
    parser.add_argument("--out", type=Path, default=Path("runs/highres"))
    a = parser.parse_args()
    paths = prepare(a.folder)
    a.out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[str, list[Measured]]] = {way: {at: [] for at in AT} for way in ("before", *SECOND)}
    for seed in SEEDS:
        for way, change in SECOND.items():
            name = f"{seed}-{way.split()[0]}"
            phases = (
                Phase("first", f"{STEPS} steps"),
                Phase("second", f"{EXTRA} steps", {**GENTLE, **change}, ("optimiser",)),
            )
            file = a.out / f"{name}.yaml"
            file.write_text(to_yaml(replace(recipe(seed), phases=phases)))
            command = [
                *OPSIN,
                "pretrain",
                "--recipe",
                file,
                "--data",
                paths.large,
                "--out",
                a.out / name,
                "--no-report",
            ]
            run([str(part) for part in command], threads(1))
            for at, size in AT.items():
                measured[way][at].append(dense(a.out / name / "backbone.safetensors", size, paths))
                if way == "high resolution":  # the first phase is the same in both
                    measured["before"][at].append(dense(a.out / name / "1-first/backbone.safetensors", size, paths))
    figures = {way: {at: [one.figures for one in found] for at, found in by.items()} for way, by in measured.items()}
    rows = [
        (way, at, *(spread([one.figures[figure] for one in measured[way][at]]) for figure in ("dense", "miou")))
        for way in measured
        for at in AT
    ]
    differences = {
        f"high resolution − {other}, {at}": paired(measured["high resolution"][at], measured[other][at])
        for other in ("before", "low resolution")
        for at in AT
    }
    finish(
        "highres",
        {
            "steps": [STEPS, EXTRA],
            "figures": figures,
            "differences": {name: asdict(difference) for name, difference in differences.items()},
        },
    )
    print("", table(("second phase", "input", "right pixels", "mIoU"), rows), sep="\n")
    print("", table(("difference in right pixels", "mean, 95 % intervals"), list(differences.items())), sep="\n")


if __name__ == "__main__":
    main()
