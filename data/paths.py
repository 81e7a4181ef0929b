"""Where data sets lie."""

import os
from pathlib import Path


def find_data(path: str | Path) -> Path:
    """Return an absolute path as it is, and a relative one below `$DENSEKD_DATA` (default: `datasets/`).

    Whether anything exists there is for the caller to check.
    """
    return Path(os.environ.get("DENSEKD_DATA") or "datasets") / path
