"""Data sets in COCO format: annotations, their checks, and images with their boxes."""
