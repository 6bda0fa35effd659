"""Times the package imagecorruptions, one image at a time: the other side of corruptions.py, in its own environment.

    old/bin/python benchmarks/corruption_peer.py IMAGES SEVERITY [KIND ...]

How `old` is made stands in corruption_fixtures.py. Prints a line of JSON, images per second by kind.
"""

import json
import sys
import time

import numpy as np
from imagecorruptions import corrupt


def main() -> None:
    """Time every kind on random images of 224 × 224."""
    count, severity, kinds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    images = np.random.RandomState(0).randint(0, 256, (count, 224, 224, 3)).astype(np.uint8)
    rates = {}
    for kind in kinds:
        corrupt(images[0], corruption_name=kind, severity=severity)  # what is compiled or read at first
        start = time.perf_counter()
        for image in images:
            corrupt(image, corruption_name=kind, severity=severity)
        rates[kind] = count / (time.perf_counter() - start)
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
