import pytest
from small import small

from opsin.evaluate.task import Run


@pytest.fixture(scope="module")
def model():
    """An untrained model; tests that change it make one of their own."""
    return small()


@pytest.fixture
def at(tmp_path):
    """How tests compute, with a store of their own."""
    return Run(batch_size=4, workers=1, cache=tmp_path / "kept", progress=False)
