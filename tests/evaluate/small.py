"""What many tests of evaluation measure: a small backbone without training, and real digits as files."""

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.evaluate.model import wrap


def small(seed=0, **changes):
    """An untrained model of patch 8 and four blocks; the same for the same seed."""
    torch.manual_seed(seed)
    arch = {"width": 24, "depth": 4, "heads": 2, "patch": 8, "grid": 2, "layerscale": 0.1} | changes
    return wrap(VisionTransformer(Architecture(**arch)))


def write_digits(folder, classes, each):
    """`each` of scikit-learn's digits for each of the first `classes` digits, 16×16, a folder per digit."""
    found = load_digits()
    for label in range(classes):
        (folder / f"digit{label}").mkdir()
        for number, picture in enumerate(found.images[found.target == label][:each]):
            pixels = np.kron(np.uint8(picture * 15), np.ones((2, 2), np.uint8))
            Image.fromarray(pixels).convert("RGB").save(folder / f"digit{label}" / f"{number:02}.png")
    return folder


def images_in(folder, groups):
    """Images of noise, so many in a folder of each name."""
    rng = np.random.default_rng(0)
    for group, count in groups.items():
        (folder / group).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / group / f"{i}.png")
    return folder
