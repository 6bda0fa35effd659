"""How time and memory of our step grow with the batch, the prototypes, the image size and the model.

    python benchmarks/growth.py [--steps 3] [--only batch prototypes size model]

Every point is an `opsin bench step` in a fresh process: ViT-S/14 in bf16 with 8 images a step on a processor, 64 on a
GPU, and one setting changed at a time. Prints a Markdown table of each.
"""

import argparse
from typing import Any

from common import bench_step, device, finish

ON_GPU = device().type == "cuda"
BASE = {"backbone": "dinov2_vits14", "batch": "64" if ON_GPU else "8"}
SERIES = {
    "batch": ("batch", ["16", "32", "64", "128", "256"] if ON_GPU else ["4", "8", "16"]),
    "prototypes": ("prototypes", ["16384", "32768", "65536", "131072", "262144"]),
    "size": ("global-size", ["224", "336", "448", "518"]),
    "model": (
        "backbone",
        ["dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14"] if ON_GPU else ["vit_nano8", "vit_micro8", "dinov2_vits14"],
    ),
}
"""The option that grows, and its values."""
COLUMNS = ("ms per step", "quartiles", "images/s", "TFLOP/s", "peak GiB")


def points(option: str, values: list[str], steps: int) -> dict[str, dict[str, Any]]:
    """What `opsin bench step` says at each value of one option."""
    results = {}
    for value in values:
        settings = {**BASE, option: value, "steps": str(steps)}
        results[value] = bench_step(*(part for name, given in settings.items() for part in (f"--{name}", given)))
    return results


def table(option: str, results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table with a row for each value."""
    lines = [f"| {option} | {' | '.join(COLUMNS)} |", "| --- " * (1 + len(COLUMNS)) + "|"]
    for value, r in results.items():
        if "failed" in r:
            lines.append(f"| {value} | {r['failed']} |" + " |" * (len(COLUMNS) - 1))
            continue
        step = r["step"]
        cells = (
            f"{step['median']:,.1f}",
            f"{step['lower_quartile']:,.1f} to {step['upper_quartile']:,.1f}",
            f"{r['images_per_second']:,.1f}",
            f"{r['tera_flop_per_second']:,.2f}",
            f"{r['peak_bytes'] / 2**30:,.2f}",
        )
        lines.append(f"| {value} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="measured at each point")
    parser.add_argument("--only", nargs="+", choices=list(SERIES), default=list(SERIES))
    a = parser.parse_args()
    results, tables = {}, []
    for name in a.only:
        option, values = SERIES[name]
        results[name] = points(option, values, a.steps)
        tables.append(table(option, results[name]))
    finish("growth", {"base": BASE, **results})
    print("", *tables, sep="\n\n")


if __name__ == "__main__":
    main()
