"""The names of a checkpoint's classes, and which of them are those of some data."""
from collections import Counter
from collections.abc import Mapping, Sequence

from data.names import folded

from .formats import Checkpoint

# Formats whose published detectors were trained on COCO.
_OF_COCO = ("mmdet2", "mmdet3", "fgd", "detectron2", "torchvision")


def checkpoint_classes(meta: Mapping) -> list[str] | None:
    """The names of the classes in the metadata of our checkpoints and mmdet's, or None if there are none."""
    inner = meta.get("dataset_meta")
    inner = inner if isinstance(inner, Mapping) else {}
    for found in (meta.get("classes"), inner.get("classes"), inner.get("CLASSES"), meta.get("CLASSES")):
        if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
            return list(found)
    return None


def coco_classes(count: int) -> list[str | None] | None:
    """COCO's names for a classifier of 80 classes, or of 91 as torchvision's, where a class's number is its category id
    and None stands for numbers without a class. None for another count."""
    from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights  # here, because few checkpoints need it

    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    names = [None if name in ("__background__", "N/A") else name for name in names]
    return {91: names, 80: [name for name in names if name is not None]}.get(count)


def known_classes(checkpoint: Checkpoint, count: int) -> tuple[list[str | None], str] | None:
    """The names of the `count` classes that a checkpoint's classifier has, and where they are from; None if they are
    not known."""
    own = checkpoint_classes(checkpoint.meta)
    if own is not None:
        return (own, "the checkpoint's names") if len(own) == count else None
    names = coco_classes(count) if checkpoint.format in _OF_COCO else None
    return None if names is None else (names, "COCO's names")


def match_classes(wanted: Sequence[str], given: Sequence[str | None]) -> list[int | None]:
    """For each wanted class, the number of the given class with the same name, or None.

    Names that differ only in case, spaces, `-` and `_` are the same, where just one wanted and one given class, which
    have no equal name, are so.
    """
    counts, places = Counter(given), {name: number for number, name in enumerate(given)}
    found = [places[name] if counts[name] == 1 else None for name in wanted]
    rest = [folded(name) for name, number in zip(wanted, found) if number is None]
    free = [folded(name) if name is not None and number not in found else None for number, name in enumerate(given)]
    for i, name in enumerate(map(folded, wanted)):
        if found[i] is None and rest.count(name) == 1 and free.count(name) == 1:
            found[i] = free.index(name)
    return found
