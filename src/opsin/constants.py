"""Facts that several rooms of the house share."""

IMAGENET_MEAN: tuple[float, float, float] = (0.485, 0.456, 0.406)
"""Mean of ImageNet's pixels per channel (RGB, 0 to 1): what the released models were trained with."""
IMAGENET_STD: tuple[float, float, float] = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's pixels per channel (RGB, 0 to 1)."""


def normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, for values in 0 … 1, where nothing else is said.

    ImageNet's for RGB. One channel has their averages, others repeat them R, G, B, R, …: the order in which a stem for
    RGB is fitted to other channels, whose weights then see values about as they were trained on.
    """
    if channels == 1:
        return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
    return (
        tuple(IMAGENET_MEAN[channel % 3] for channel in range(channels)),
        tuple(IMAGENET_STD[channel % 3] for channel in range(channels)),
    )
