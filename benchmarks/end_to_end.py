"""A real run from JPEG files: images per second, and the share of the time that training waits for images.

    python benchmarks/end_to_end.py [--batch 128] [--steps 60] [--images 2048] [--precision bf16] [--device cuda]

`opsin pretrain` trains ViT-S/14 on 500×375 JPEGs with the crops, heads and drop path of the reference, as a user would.
Medians over the records after the first third of the steps.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from common import finish, pretrain

from opsin.bench.input import make_photos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default=None)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        images, out = Path(name) / "photos", Path(name) / "run"
        make_photos(images, a.images)
        records = pretrain(
            images,
            out,
            batch=a.batch,
            steps=a.steps,
            precision=a.precision,
            device=a.device,
            environment=dict(os.environ),
        )
    warm = [record for record in records if record["step"] > a.steps / 3]
    finish(
        "end-to-end",
        {
            "batch": a.batch,
            "precision": a.precision,
            "images_per_second": statistics.median(r["images_per_second"] for r in warm),
            "share_of_time_waiting_for_images": statistics.median(r["data_seconds"] / r["step_seconds"] for r in warm),
        },
    )


if __name__ == "__main__":
    main()
