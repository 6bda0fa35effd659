"""Makes the fixtures of tests/evaluate/test_corruptions.py with the package imagecorruptions, in an old environment.

    python3.11 -m venv old
    old/bin/pip install numpy==1.26.4 scikit-image==0.19.3 scipy==1.10.1 opencv-python-headless==4.8.1.78 \
        numba==0.58.1 Pillow==9.5.0 "setuptools<81"
    old/bin/pip install --no-deps imagecorruptions==1.1.2
    old/bin/python benchmarks/corruption_fixtures.py tests/evaluate/corruption_fixtures.npz

The package does not run with current ones. The image is a formula that the test repeats. Kinds that are random draw
from numpy's old generator with the seed 7, whose stream is the same in every version, so that the test can draw the
same and compare pixels. Kept is every fifth row and fourth column, severities 1, 3 and 5.
"""

import sys

import numpy as np
from imagecorruptions import corrupt
from numpy.typing import NDArray

KINDS = (
    *("gaussian_noise", "speckle_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "fog"),
    *("brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "spatter", "saturate"),
)


def image(side: int = 224) -> NDArray[np.uint8]:
    """Waves of different directions in three colours, a disk and squares with sharp edges, uint8 `[H, W, 3]`."""
    y, x = np.mgrid[:side, :side].astype(np.float64)
    waves = [np.sin(x / 9 + y / 23), np.sin(x / 31 - y / 7), np.cos((x - 60) * (y - 90) / 900)]
    pixels = np.stack(waves, axis=-1) * 100 + 128
    pixels[(x - 150) ** 2 + (y - 70) ** 2 < 1600] = [250, 240, 20]
    pixels[(x // 8 + y // 8) % 2 * (y > 180) > 0] = [5, 5, 5]
    pixels[(x < 40) & (y > 150)] = [128, 128, 128]
    found: NDArray[np.uint8] = np.floor(pixels).astype(np.uint8)
    return found


if __name__ == "__main__":
    found = {"image": image()[1::5, 2::4]}
    for kind in KINDS:
        for severity in (1, 3, 5):
            np.random.seed(7)  # noqa: NPY002 (it is what the package draws from)
            found[f"{kind}-{severity}"] = corrupt(image(), corruption_name=kind, severity=severity)[1::5, 2::4]
    np.savez_compressed(sys.argv[1], **found)  # type: ignore[arg-type]
