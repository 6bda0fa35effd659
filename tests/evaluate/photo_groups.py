"""Real photographs as groups: crops of one photograph belong together."""

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs():
    """Six photographs, uint8 RGB, by name."""
    china, flower = load_sample_images().images
    named = {"astronaut": skimage.data.astronaut(), "coffee": skimage.data.coffee(), "rocket": skimage.data.rocket()}
    return {**named, "chelsea": skimage.data.chelsea(), "china": china, "flower": flower}


def crops(pixels, count, seed=0):
    """Random crops of four fifths of each side, at 64 pixels."""
    rng = np.random.default_rng(seed)
    height, width = (side * 4 // 5 for side in pixels.shape[:2])
    made = []
    for _ in range(count):
        top, left = (rng.integers(0, whole - part) for whole, part in zip(pixels.shape, (height, width), strict=False))
        image = Image.fromarray(pixels[top : top + height, left : left + width])
        made.append(image.resize((64, 64 * height // width)))
    return made


def write_groups(folder: Path, count=3, seed=0):
    """A folder per photograph with some of its crops."""
    for name, pixels in photographs().items():
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(crops(pixels, count, seed)):
            image.save(folder / name / f"{name}{seed}{i}.png")
    return folder
