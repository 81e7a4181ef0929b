"""Where the time of a training step goes, and its floor: `benchmark.py --where`."""
