"""Checkpoints of every format, read safely."""
