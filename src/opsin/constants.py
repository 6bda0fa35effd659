"""Facts that several rooms of the house share."""

IMAGENET_MEAN: tuple[float, float, float] = (0.485, 0.456, 0.406)
"""Mean of ImageNet's pixels per channel (RGB, 0 to 1): what the released models were trained with."""
IMAGENET_STD: tuple[float, float, float] = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's pixels per channel (RGB, 0 to 1)."""
