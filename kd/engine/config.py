"""`load_config` under its first name."""
from ..config import load_config

__all__ = ["load_config"]
