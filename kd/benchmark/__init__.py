"""What a step and its parts take."""
