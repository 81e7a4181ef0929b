import pytest

from data import generate_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Six images: batches of four and of two."""
    return generate_scenes(tmp_path_factory.mktemp("scenes"), 6, 1, (48, 96))
