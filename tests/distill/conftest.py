from pathlib import Path

import lessons
import numpy as np
import pytest
from PIL import Image

from opsin.pretrain.objective import Network


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 16 small photos in two classes; read only."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    random = np.random.default_rng(0)
    for i in range(16):
        name = folder / ("rough" if i % 2 else "smooth") / f"{i:02d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        side = 6 if i % 2 else 40
        Image.fromarray(random.integers(0, 256, (side, side + 4, 3), dtype=np.uint8)).resize((44, 40)).save(name)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, as far as a distillation reads it; read only."""
    return lessons.save(lessons.network(), tmp_path_factory.mktemp("teachers") / "run")


@pytest.fixture(scope="session")
def network(teacher: Path) -> Network:
    """What the teacher's folder holds."""
    return lessons.network()
