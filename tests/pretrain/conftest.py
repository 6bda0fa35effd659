from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 small photos in two classes; read only."""
    tmp_path = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "photos" / ("rough" if i % 2 else "smooth")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (6 if i % 2 else 40, 7 if i % 2 else 44, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((44, 40)).save(folder / f"{i:02d}.png")
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options that make the cpu recipe a matter of seconds."""
    options = {
        "steps": 12,
        "batch.size": 8,
        "batch.group": 4,
        "crops.global-size": 16,
        "crops.local-size": 8,
        "crops.local-count": 2,
        "backbone.depth": 2,
        "backbone.width": 16,
        "backbone.heads": 2,
        "backbone.grid": 2,
        "heads.dino-prototypes": 32,
        "heads.ibot-prototypes": 32,
        "heads.hidden": 16,
        "drop-path": 0.2,
        "checkpoint.every": 3,
        "schedule.warmup-steps": 3,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]
