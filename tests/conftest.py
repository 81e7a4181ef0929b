"""Makes the helpers next to this file importable: pytest's importlib mode does not change sys.path."""
import logging
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # last, because folders here have the names of packages
# One thread, also in processes that tests start: the models are tiny, and on a busy machine threads mostly wait.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
# Large annotation files are stored here, and not in the home of whoever runs the tests.
os.environ["DENSEKD_CACHE"] = str(Path(tempfile.gettempdir()) / "densekd-tests")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def restore_log():
    """The project's log as it was: scripts and runs give it handlers."""
    log = logging.getLogger("densekd")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate, log.level = before


@pytest.fixture
def reported(caplog):
    """What libraries report, as one text: call it."""
    with caplog.at_level(logging.INFO, "densekd"):
        yield lambda: "".join(f"{record.getMessage()}\n" for record in caplog.records)


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """The exported files that tests share, see exports.py."""
    from exports import Shared

    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "exports"
    root.mkdir(exist_ok=True)
    return Shared(root)
