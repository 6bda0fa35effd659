"""Opsin learns visual features from images without labels: the DINOv2 system, complete, fast and tested."""

__version__ = "0.1.0"
