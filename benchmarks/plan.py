"""`opsin plan`: its memory against measured peaks, its speed against measured steps, and its projections.

    python benchmarks/plan.py [--only memory speed projections]

memory        every point is an `opsin bench step` in a fresh process on this machine: its peak beside the prediction
speed         the model of a step's time beside the measurements that it was calibrated on, and others that it was not
projections   what `opsin plan` and `opsin plan curation` print for the cases of interest
"""

import argparse
import subprocess
from dataclasses import replace

import torch
from common import OPSIN, bench_step, device

from opsin.bench.step import recipe_of
from opsin.plan.devices import find
from opsin.plan.memory import step_memory
from opsin.plan.speed import step_time, work_of
from opsin.pretrain.parallel import Spread
from opsin.pretrain.presets import preset

GIB = 2**30
POINTS = [
    ("vit_nano8", 8, "fp32", 1024, 224),
    ("vit_nano8", 32, "fp32", 1024, 112),
    ("vit_micro8", 8, "bf16", 4096, 224),
    ("dinov2_vits14", 8, "fp32", 16384, 224),
    ("dinov2_vits14", 4, "fp32", 65536, 224),
    ("dinov2_vits14", 8, "bf16", 65536, 224),
    ("dinov2_vits14", 16, "bf16", 65536, 224),
    ("dinov2_vits14", 4, "bf16", 131072, 224),
    ("dinov2_vitb14", 4, "bf16", 16384, 224),
    ("dinov2_vitb14", 2, "fp32", 65536, 224),
]
"""Backbone, batch, precision, prototypes of each of two heads, side of a global crop."""
PROTOTYPE = [("dinov2_vits14", 128, 72.5), ("dinov2_vitl14", 64, 264.7)]
"""Backbone, batch, and milliseconds of a step without heads of the prototype on one H100."""
PEERS = [("dinov2_vits14", 128, 180.0), ("dinov2_vitb14", 64, 180.0), ("dinov2_vitl14", 64, 322.0)]
"""The same for the better of the reference trainers dinov2 and dinov3, with heads."""
REFERENCE = [("vitl16-short", "a100-80", 32, 93.0), ("vitl14", "a100-80", 96, 70.0), ("vitg14", "a100-40", 256, 24.0)]
"""Recipe, GPU, number, and images per second of each that the reference's published run times imply."""
PROJECTIONS = [
    "plan --recipe vitg14 --gpu a100-40 --gpus 256 --grid 0.385",
    "plan --recipe vitg14 --gpu h100 --gpus 64",
    "plan --recipe vitl14 --gpu a100-80 --gpus 96",
    "plan --recipe vitl14 --gpu rtx4090",
    "plan --recipe vits14-one-gpu --gpu t4 --precision fp16",
    "plan curation --images 1.2e9 --gpu v100-32 --gpus 160",
    "plan curation --images 1.2e9 --gpu h100 --gpus 64",
]


def memory() -> None:
    """Peaks of steps on this machine beside their predictions."""
    print("| backbone | batch | precision | prototypes | crop | measured GiB | predicted GiB | ratio |")
    print("| --- " * 8 + "|")
    ratios = []
    for point in POINTS:
        names = ("--backbone", "--batch", "--precision", "--prototypes", "--global-size")
        result = bench_step(
            *(part for pair in zip(names, map(str, point), strict=True) for part in pair), "--steps", "1"
        )
        cells = " | ".join(map(str, point))
        if "failed" in result:
            print(f"| {cells} | {result['failed']} | | |")
            continue
        backbone, batch, precision, prototypes, size = point
        recipe = recipe_of(backbone, batch, precision, prototypes, size)  # type: ignore[arg-type]
        predicted = step_memory(recipe, "cuda" if device().type == "cuda" else "cpu").total
        ratios.append(predicted / result["peak_bytes"])
        print(
            f"| {cells} | {result['peak_bytes'] / GIB:.2f} | {predicted / GIB:.2f} | {ratios[-1]:.2f} |",
            flush=True,
        )
    print(f"\npredicted over measured: {min(ratios):.2f} to {max(ratios):.2f}")


def speed() -> None:
    """The model of a step's time beside measured steps."""
    h100 = find("h100", "bf16")
    print("| on one H100, bf16 | batch | measured ms | predicted ms |\n| --- | --- | --- | --- |")
    for what, points in (("prototype, no heads, calibrated on it", PROTOTYPE), ("reference trainers", PEERS)):
        for backbone, batch, measured in points:
            recipe = recipe_of(backbone, batch, "bf16", 65536, 224)
            parts = step_time(recipe, work_of(recipe), h100, Spread(), 8, 25e9)
            seconds = parts.seconds
            if points is PROTOTYPE:
                seconds = replace(parts, loss=parts.loss.map(lambda _: 0.0)).seconds
            fast, slow = 1e3 * seconds.fast, 1e3 * seconds.slow
            print(f"| {what}: {backbone} | {batch} | {measured:.0f} | {fast:.0f} to {slow:.0f} |")
    print("\n| reference's published runs | GPUs | implied images/s of each | predicted |\n| --- | --- | --- | --- |")
    for name, gpu, count, implied in REFERENCE:
        recipe = preset(name)
        spread = Spread(count // 8, 8) if name == "vitg14" else Spread(count, 1)
        seconds = step_time(recipe, work_of(recipe), find(gpu, "bf16"), spread, 8, 25e9).seconds
        slow, fast = (recipe.batch.size / count / end for end in seconds)
        print(f"| {name} | {count} × {gpu} | {implied:.0f} | {slow:.0f} to {fast:.0f} |")


def projections() -> None:
    """What the commands print."""
    for line in PROJECTIONS:
        done = subprocess.run([*OPSIN, *line.split()], capture_output=True, text=True)
        print(f"$ opsin {line}\n{done.stdout}{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"memory": memory, "speed": speed, "projections": projections}
    parser.add_argument("--only", nargs="+", choices=list(sections), default=list(sections))
    print(f"torch {torch.__version__}\n")
    for name in parser.parse_args().only:
        sections[name]()
        print()


if __name__ == "__main__":
    main()
