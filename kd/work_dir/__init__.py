"""The folder of a run: writing and reading its files."""
