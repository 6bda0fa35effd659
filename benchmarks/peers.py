"""Other trainers and ours in alternation, in one run on one machine.

    python benchmarks/peers.py --lightly-python PATH [--rounds 3] [--steps 4]
    python benchmarks/peers.py --peer-command COMMAND OPTIONS [--peer-command COMMAND OPTIONS …] [--rounds 3]

With the interpreter of an environment that has lightly-train 0.18, its `pretrain` with method dinov2 and our `opsin
pretrain` train ViT-S/14 on a processor: the same JPEGs, crops, drop path, heads and threads, in fp32 and in bf16.

COMMAND is any trainer of yours that prints a line `RESULT {json}` with `img_s` and `peak_gib`, given ready crops; it
alternates with `opsin bench step OPTIONS`. For example, on a GPU:

    --peer-command 'python step.py dinov2 vit_small 128' '--backbone dinov2_vits14 --batch 128'
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import bench_step, finish, last_line, pretrain, run, threads

from opsin.bench.input import make_photos
from opsin.bench.timing import cores

WARM_UP = 2
"""Steps of each process that do not count."""
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
"""Our name of a precision, and Lightning's."""


def printed(output: str, command: str) -> dict[str, Any]:
    """The JSON of the line `RESULT {json}`."""
    for line in output.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    sys.exit(f"{command} printed no line RESULT {{json}}: its last was '{last_line(output)}'")


def lightly_seconds(python: Path, images: Path, precision: str, batch: int, steps: int) -> tuple[str, float]:
    """Version of lightly-train and median seconds of its step."""
    script = Path(__file__).with_name("lightly_step.py")
    with tempfile.TemporaryDirectory() as out:
        settings = [str(images), out, PRECISIONS[precision], str(batch), str(WARM_UP + steps), str(cores())]
        output = run([str(python), str(script), *settings], threads(cores()) | {"HF_HUB_OFFLINE": "1"})
    result = printed(output, script.name)
    return str(result["version"]), statistics.median(result["step_seconds"][WARM_UP:])


def opsin_seconds(images: Path, precision: str, batch: int, steps: int) -> float:
    """Median seconds of a step of `opsin pretrain`."""
    with tempfile.TemporaryDirectory() as out:
        records = pretrain(
            images,
            Path(out),
            batch=batch,
            steps=WARM_UP + steps,
            precision=precision,
            device="cpu",
            environment=threads(cores()),
        )
    seconds: list[float] = [record["step_seconds"] for record in records[WARM_UP:]]
    return statistics.median(seconds)


def compare_with_lightly(python: Path, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds a step by round, and how many times longer lightly-train takes."""
    version = "unknown"
    seconds: dict[str, dict[str, list[float]]] = {p: {"lightly": [], "opsin": []} for p in PRECISIONS}
    with tempfile.TemporaryDirectory() as name:
        images = Path(name) / "photos"
        make_photos(images, batch * (WARM_UP + steps + 2))  # one epoch, so that no step starts workers
        for _ in range(rounds):
            for precision, of in seconds.items():
                version, peer = lightly_seconds(python, images, precision, batch, steps)
                of["lightly"].append(peer)
                of["opsin"].append(opsin_seconds(images, precision, batch, steps))
    medians = {p: {who: statistics.median(times) for who, times in of.items()} for p, of in seconds.items()}
    best = {who: min(of[who] for of in medians.values()) for who in ("lightly", "opsin")}
    equal = {p: [a / b for a, b in zip(of["lightly"], of["opsin"], strict=True)] for p, of in seconds.items()}
    return {
        "version": version,
        "batch": batch,
        "steps_per_round": steps,
        "seconds_per_step": seconds,
        "median_seconds_per_step": medians,
        "ratio_at_equal_precision": {p: {"median": statistics.median(r), "rounds": r} for p, r in equal.items()},
        "ratio_at_best_precision": best["lightly"] / best["opsin"],
        "ratio_of_our_best_to_their_fp32": medians["fp32"]["lightly"] / best["opsin"],
    }


def compare_with_command(command: str, options: str, rounds: int) -> dict[str, Any]:
    """Images per second and peak memory by round, and their ratios."""
    theirs: list[dict[str, float]] = []
    ours: list[dict[str, float]] = []
    for _ in range(rounds):
        theirs.append(printed(run(shlex.split(command), dict(os.environ)), command))
        result = bench_step(*shlex.split(options))
        if "failed" in result:
            sys.exit(f"opsin bench step {options} failed: {result['failed']}")
        images = {
            "img_s": result["images_per_second_without_crops"],
            "img_s_with_crops": result["images_per_second"],
        }
        ours.append({**images, "peak_gib": result["peak_bytes"] / 2**30})
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "command": command,
        "options": options,
        "theirs": theirs,
        "ours": ours,
        "speed_ratio": statistics.median([o["img_s"] / t["img_s"] for o, t in pairs]),
        "speed_ratio_with_our_crops": statistics.median([o["img_s_with_crops"] / t["img_s"] for o, t in pairs]),
        "memory_ratio": statistics.median([o["peak_gib"] / t["peak_gib"] for o, t in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lightly-python", type=Path, help="interpreter that has lightly-train")
    parser.add_argument("--batch", type=int, default=8, help="images a step, against lightly-train")
    parser.add_argument("--steps", type=int, default=4, help="steps that count in each process, against lightly-train")
    parser.add_argument("--peer-command", nargs=2, action="append", default=[], metavar=("COMMAND", "OPTIONS"))
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    if a.lightly_python is None and not a.peer_command:
        parser.error("give --lightly-python, --peer-command, or both")
    results: dict[str, Any] = {}
    if a.lightly_python is not None:
        results["lightly-train"] = compare_with_lightly(a.lightly_python, a.batch, a.steps, a.rounds)
    results["commands"] = [compare_with_command(command, options, a.rounds) for command, options in a.peer_command]
    finish("peers", results)


if __name__ == "__main__":
    main()
