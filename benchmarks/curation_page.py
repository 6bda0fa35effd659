"""The page that README shows: a heap of tiles of sample photos, some of them copied, curated.

    python benchmarks/curation_page.py --weights FILE [--out runs/curation-page]

FILE is the backbone of `benchmarks/focus.py`. The photos come with scikit-image and scikit-learn.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from opsin.cli import main as opsin
from opsin.curate.copies import KINDS, copy_of

SIDE, STEP = 128, 64
NAMES = ("astronaut", "chelsea", "coffee", "rocket")
SETTINGS = (
    "--embed.size 112 --calibrate.sample 40 --calibrate.precision 0.9 --calibrate.reference-precision 0.8 "
    "--sample.images 80 --cluster.levels 20 5 --accept"
)


def make(folder: Path) -> int:
    """Write the heap and return its number of images."""
    folder.mkdir(parents=True, exist_ok=True)
    photos: list[NDArray[Any]] = [np.asarray(getattr(skimage.data, name)()) for name in NAMES]
    random, number = np.random.default_rng(0), 0
    for photo in [*photos, *load_sample_images().images]:
        for top in range(0, photo.shape[0] - SIDE + 1, STEP):
            for left in range(0, photo.shape[1] - SIDE + 1, STEP):
                tile = np.ascontiguousarray(photo[top : top + SIDE, left : left + SIDE])
                if tile.std() < 25 or random.random() < 0.4:
                    continue
                Image.fromarray(tile).save(folder / f"{number:03}.png")
                if random.random() < 0.25:
                    kind = KINDS[int(random.integers(len(KINDS)))]
                    copy = copy_of(torch.from_numpy(tile).permute(2, 0, 1), kind, 0, number)
                    Image.fromarray(copy.permute(1, 2, 0).numpy()).save(folder / f"{number:03}-{kind}.png")
                number += 1
    Image.new("RGB", (90, 90), "gray").save(folder / "gray.png")
    Image.fromarray(photos[0][:SIDE, :20]).save(folder / "narrow.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no")
    return len(list(folder.iterdir()))


def main() -> None:
    """Read options, make the heap, curate it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/curation-page"))
    a = parser.parse_args()
    print(f"{make(a.out / 'photos')} images")
    given = ["--data", str(a.out / "photos"), "--embed.weights", str(a.weights), "--out", str(a.out / "curated")]
    raise SystemExit(opsin(["curate", *given, *SETTINGS.split()]))


if __name__ == "__main__":
    main()
