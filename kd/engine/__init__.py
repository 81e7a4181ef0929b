"""The training loop, the check before it, and the replay of a failed step."""
