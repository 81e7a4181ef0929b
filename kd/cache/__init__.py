"""Frozen answers: what the methods need of a frozen teacher, stored for each image and read back."""
from .answers import TeacherCache
from .fingerprint import architecture
from .needs import Needs, needs_of

__all__ = ["Needs", "TeacherCache", "architecture", "needs_of"]
