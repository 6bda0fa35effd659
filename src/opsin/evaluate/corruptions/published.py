"""How ImageNet-C is counted: errors against those of AlexNet (Hendrycks and Dietterich 2019, section 4)."""

from collections.abc import Mapping, Sequence

ALEXNET: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (69.528, 82.542, 93.554, 98.138, 99.452),
    "shot_noise": (71.224, 85.108, 93.574, 98.182, 99.146),
    "impulse_noise": (78.374, 89.808, 94.870, 98.720, 99.548),
    "defocus_blur": (65.624, 73.202, 85.036, 91.364, 94.714),
    "glass_blur": (64.308, 75.054, 88.806, 91.622, 93.344),
    "motion_blur": (58.430, 70.048, 82.108, 89.750, 92.638),
    "zoom_blur": (70.008, 76.992, 80.784, 84.198, 87.198),
    "snow": (71.726, 88.392, 86.468, 91.870, 94.952),
    "frost": (61.390, 79.734, 88.790, 89.942, 93.430),
    "fog": (67.474, 76.050, 84.378, 87.260, 94.500),
    "brightness": (45.140, 48.502, 54.048, 62.166, 72.440),
    "contrast": (64.548, 76.150, 88.874, 97.760, 99.270),
    "elastic_transform": (52.596, 70.116, 55.686, 64.076, 80.554),
    "pixelate": (52.218, 54.620, 73.728, 87.092, 91.262),
    "jpeg_compression": (51.002, 54.718, 57.294, 65.458, 74.778),
    "speckle_noise": (66.192, 74.440, 90.246, 94.548, 97.268),
    "gaussian_blur": (54.732, 70.444, 82.574, 89.864, 95.940),
    "spatter": (47.196, 62.194, 75.052, 84.132, 90.182),
    "saturate": (59.342, 65.514, 51.174, 70.834, 82.260),
}
"""Errors of AlexNet on ImageNet-C in percent, by severity, as the reference evaluation carries them."""


def corruption_errors(errors: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """By kind the mean error over severities as a share of AlexNet's on the same ones.

    Args:
        errors: kind → severity (1 to 5) → error, from 0 to 1.
    """
    found = {}
    for kind, by_severity in errors.items():
        theirs = [ALEXNET[kind][severity - 1] / 100 for severity in by_severity]
        found[kind] = sum(by_severity.values()) / sum(theirs)
    return found


def mean(values: Sequence[float]) -> float:
    """Their mean: of terms of `corruption_errors` it is the mean corruption error (mCE)."""
    return sum(values) / len(values)
