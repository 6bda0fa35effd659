"""Seconds of training steps of lightly-train's DINOv2 on a processor. Run by peers.py, in lightly-train's interpreter.

    LIGHTLY_PYTHON benchmarks/lightly_step.py IMAGES OUT PRECISION BATCH STEPS WORKERS

Written for lightly-train 0.18. The work is that of `opsin bench step`: 2 × 224 and 8 × 98 pixel crops, drop path 0.3,
two heads of 65,536 prototypes, Sinkhorn–Knopp. Nothing is downloaded, nothing is reported. Prints a line `RESULT
{"version": …, "step_seconds": […]}`; a step lasts from a moment in it to the same in the next: waiting for data counts.
"""

import json
import os
import sys
import time
from importlib import import_module
from itertools import pairwise
from typing import Any

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"

# by name, since our own environment, in which this file is checked, may have neither
lightly_train, lightning = import_module("lightly_train"), import_module("pytorch_lightning")


def main() -> None:
    images, out, precision, batch, steps, workers = sys.argv[1:]
    moments: list[float] = []

    def note(*_: Any) -> None:
        moments.append(time.perf_counter())

    # lightly-train takes no callbacks of its users; this hook of Lightning runs once in every step and is empty there
    lightning.LightningModule.on_before_zero_grad = note
    lightly_train.pretrain(
        out=out,
        data=images,
        model="dinov2/vits14-noreg-notpretrained",
        method="dinov2",
        method_args={"ibot_separate_head": True, "center_method": "sinkhorn_knopp"},
        model_args={"drop_path_rate": 0.3},
        transform_args={"local_view": {"num_views": 8, "view_size": (98, 98)}},
        batch_size=int(batch),
        epochs=1,
        accelerator="cpu",
        devices=1,
        num_workers=int(workers),
        precision=precision,
        overwrite=True,
        trainer_args={"max_steps": int(steps) + 1},
    )
    seconds = [after - before for before, after in pairwise(moments)]
    print("RESULT", json.dumps({"version": lightly_train.__version__, "step_seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
