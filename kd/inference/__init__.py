"""Using a detector: loading, detecting, drawing, exporting."""
