"""Notices an augmentation that removes the boxes of most images."""
from collections.abc import Iterable

FIRST = 50  # images with annotated boxes that are looked at


class EmptiedImages:
    """Counts, among the first training images with annotated boxes, those without a box after augmentation."""

    def __init__(self):
        self.seen = self.emptied = 0

    def note(self, targets: Iterable[dict]) -> str | None:
        """Count the targets of training images, and remove their `emptied`.

        Returns: the warning, see `warning`, at the call that completes the first images; otherwise None.
        """
        due = self.seen < FIRST
        for target in targets:
            emptied = target.pop("emptied", False)
            if self.seen < FIRST:
                self.emptied += emptied
                self.seen += emptied or len(target["boxes"]) > 0
        return self.warning() if due and self.seen == FIRST else None

    def warning(self) -> str | None:
        """One line if more than half of the images have lost all boxes."""
        if 2 * self.emptied <= self.seen:
            return None
        return (f"WARNING: data.train_augment leaves no box in {self.emptied} of {self.seen} images that have boxes: "
                "make it milder; scripts/check_data.py --pictures DIR shows what it does")
