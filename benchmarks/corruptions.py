"""Corruptions batched on the device against the package imagecorruptions, which makes one image at a time.

    python benchmarks/corruptions.py --package-python old/bin/python [--images 8] [--rounds 3] [--severity 3]

The package does not run with current libraries: how its environment `old` is made stands in corruption_fixtures.py.
Without it, only ours is timed. Both use the machine's cores as they do by themselves. Rounds alternate; images per
second are medians, the ratio is the median of the ratios within a round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import device, finish, run, threads

from opsin.evaluate.corruptions import EXTRA, KINDS, corrupt, missing


def ours(images: torch.Tensor, severity: int, kinds: list[str]) -> dict[str, float]:
    """Images per second by kind."""
    rates = {}
    for kind in kinds:
        corrupt(images[:1], kind, severity, 0, [0])
        start = time.perf_counter()
        corrupt(images, kind, severity, 0, range(len(images))).cpu()
        rates[kind] = len(images) / (time.perf_counter() - start)
    return rates


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package-python", type=Path)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--severity", type=int, default=3)
    args = parser.parse_args()
    kinds = [kind for kind in KINDS + EXTRA if kind not in missing()]
    pixels = np.random.default_rng(0).integers(0, 256, (args.images, 3, 224, 224), dtype=np.uint8)
    images = torch.from_numpy(pixels).to(device())
    peer = [str(args.package_python), str(Path(__file__).with_name("corruption_peer.py"))]
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(args.rounds):
        rates = {"ours": ours(images, args.severity, kinds)}
        if args.package_python:
            told = run([*peer, str(args.images), str(args.severity), *kinds], threads(torch.get_num_threads()))
            rates["package"] = json.loads(told.splitlines()[-1])
        rounds.append(rates)
    found: dict[str, Any] = {}
    for kind in kinds:
        found[kind] = {f"{who}_per_s": statistics.median(one[who][kind] for one in rounds) for who in rounds[0]}
        if args.package_python:
            found[kind]["ratio"] = statistics.median(one["ours"][kind] / one["package"][kind] for one in rounds)
    finish("corruptions", {"images": args.images, "severity": args.severity, "left_out": missing(), "kinds": found})


if __name__ == "__main__":
    main()
