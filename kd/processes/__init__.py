"""Several processes, signals to them, and their memory."""
