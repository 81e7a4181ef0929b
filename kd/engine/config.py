"""`load_config` under the name that it had first."""
from ..config import load_config

__all__ = ["load_config"]
