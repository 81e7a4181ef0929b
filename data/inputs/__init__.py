"""Images and videos without annotations."""
