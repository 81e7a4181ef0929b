"""The benchmark: time and memory of a step and its parts."""
