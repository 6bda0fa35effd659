"""Steps per second on one process and on two, of the same global batch: what sharing a step costs.

Every process computes with one thread, so two processes have twice the cores of one. Runs alternate, so that a change
of the machine's speed meets all of them. On a machine with GPUs each process takes one.

    python benchmarks/scaling.py [--processes 2] [--rounds 3] [--batch 8] [--backbone dinov2_vits14]
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import finish, run, threads

from opsin import ranks
from opsin.backbone.registry import architecture
from opsin.bench.step import VALUES, WARM_UP
from opsin.bench.timing import synchronise
from opsin.data.stream import Batch, BatchRecipe, Share
from opsin.machine import pick_device
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.parallel import ParallelRecipe, choose
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.step import Step


@dataclass(frozen=True)
class Options:
    """What is compared."""

    processes: int = 2
    rounds: int = 2
    steps: int = 3
    batch: int = 8
    group: int = 4
    backbone: str = "dinov2_vits14"
    precision: str = "bf16"
    prototypes: int = 4096


def work(options: Options, mode: str, out: Path) -> None:
    """In every process: some steps on images that lie in memory; the first writes their seconds."""
    recipe = Recipe(
        backbone=architecture(options.backbone),
        heads=HeadRecipe(dino_prototypes=options.prototypes, ibot_prototypes=options.prototypes),
        precision=options.precision,  # type: ignore[arg-type]
        batch=BatchRecipe(size=options.batch, group=options.group),
        parallel=ParallelRecipe(mode=mode),  # type: ignore[arg-type]
    )
    device = pick_device(None)
    with ranks.started(device, 600):
        share = Share(ranks.rank(), ranks.count())
        spread = choose(recipe.parallel, lambda _: 0, share.ranks, ranks.on_this_node(), None)
        train, seconds = Step(recipe, device, spread), []
        for number in range(WARM_UP[device.type] + options.steps):
            images = [torch.randint(0, 256, (3, 375, 500), dtype=torch.uint8)] * (options.batch // share.ranks)
            batch = Batch(recipe.stream(), number, images, device, train.dtype, share=share)
            batch.crops("global", 0)
            batch.crops("local", 0)
            ranks.sum_(torch.zeros(1))  # all begin together
            synchronise(device)
            began = time.perf_counter()
            train(batch, VALUES)
            synchronise(device)
            seconds.append(time.perf_counter() - began)
        if ranks.first():
            held = sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in train.state().values())
            out.write_text(json.dumps({"seconds": seconds[WARM_UP[device.type] :], "state_bytes": held}))


def compare(options: Options) -> None:
    """Run one process and several, replicated and sharded, in turn."""
    cases = {"one": (1, "replicate"), "replicate": (options.processes, "replicate")}
    cases["shard"] = (options.processes, "shard")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    held: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, (processes, mode) in cases.items():
                out = Path(folder) / f"{name}.json"
                start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
                told = {"OPSIN_SCALING": json.dumps([mode, str(out)])}
                run([sys.executable, *start, *sys.argv], {**threads(1), **told})
                found: dict[str, Any] = json.loads(out.read_text())
                seconds[name] += found["seconds"]
                held[name] = found["state_bytes"]
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    finish(
        "scaling",
        {
            "options": vars(options),
            "step_seconds": middle,
            "step_seconds_all": seconds,
            "speedup": {name: middle["one"] / value for name, value in middle.items()},
            "efficiency": {name: middle["one"] / value / cases[name][0] for name, value in middle.items()},
            "bytes of weights and moments in a process": held,
        },
    )


if __name__ == "__main__":
    given = tyro.cli(Options, description=__doc__)
    if "OPSIN_SCALING" in os.environ:
        asked_mode, asked_out = json.loads(os.environ["OPSIN_SCALING"])
        work(given, asked_mode, Path(asked_out))
    else:
        compare(given)
