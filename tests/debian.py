"""Real files out of Debian packages, which `make debian` unpacks into .debian: photos, clips and labels for tests."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / ".debian"
SKIMAGE = "usr/lib/python3/dist-packages/skimage/data"
"""In python3-skimage: a stereo pair with its disparity."""
LABELME = "usr/share/doc/labelme-examples/examples"
"""In labelme-examples: three photos of VOC with masks and boxes, in VOC's form."""
OPENCV = "usr/share/doc/opencv-doc/examples/data"
"""In opencv-doc: clips, and photos of which some show the same thing."""


def debian(place: str) -> Path:
    """A file or folder of the packages; without it the test is skipped with the command that brings it."""
    if not (FOLDER / place).exists():
        pytest.skip(f"{place} is missing: run make debian, which takes it from Debian's packages")
    return FOLDER / place
