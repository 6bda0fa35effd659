import pytest
from small import small


@pytest.fixture(scope="module")
def model():
    """An untrained model; tests that change it make one of their own."""
    return small()
