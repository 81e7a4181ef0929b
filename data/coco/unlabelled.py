"""Training images without annotations, from folders."""
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.coco.columns import Joined, Repeated, Texts
from data.coco.dataset import CocoDataset
from data.config import check_there
from data.errors import DataError, counted, listed
from data.inputs.find import IMAGE_SUFFIXES, VIDEO_SUFFIXES, files_in


def unlabelled_images(folders: Sequence[Path], labelled: CocoDataset) -> CocoDataset:
    """The images in folders and their subfolders, prepared and augmented as those of a labelled training set.

    They are sorted by folder and name. Their ids are their names in the folder, after the first folder "k/name". The
    images that a Mosaic or MixUp adds to an unlabelled image are unlabelled, too. Their sizes are not known before they
    are read, so they are not grouped by their shape.

    Raises DataError if a folder does not exist or holds no image.
    """
    found = copy.copy(labelled)
    found.labelled, found.unlabelled = False, None
    parts = {name: [] for name in ("origins", "file_names", "image_ids")}
    for k, folder in enumerate(folders):
        names = [file.relative_to(folder).as_posix() for file in image_files(folder)]
        parts["origins"].append(Repeated((folder, None), len(names)))
        parts["file_names"].append(Texts.of(names))
        parts["image_ids"].append(Texts.of([f"{k}/{name}" for name in names]) if k else parts["file_names"][0])
    found.origins, found.file_names, found.image_ids = map(Joined, parts.values())
    count = len(found.image_ids)
    found.sizes, found.repeats = Repeated(None, count), Repeated(1.0, count)
    found.boxes = found.ignored_boxes = Repeated(np.zeros((0, 4), np.float32), count)
    found.labels, found.truth = Repeated(np.zeros(0, np.int64), count), Repeated(np.zeros((0, 7)), count)
    found.num_dropped_boxes = found.num_skipped_images = 0
    return found


def image_files(folder: Path, suffixes: set[str] = IMAGE_SUFFIXES) -> list[Path]:
    """The images in a folder and its subfolders, by their names' endings, sorted; DataError if there is none."""
    check_there("folder of data.unlabelled", folder, folder=True)
    files = files_in(folder, suffixes)
    if not files:
        raise DataError(f"data.unlabelled: {folder} and its subfolders hold no image: give a folder with images")
    return files


def videos_note(folders: Sequence[Path]) -> list[str]:
    """A note about videos in these folders, which are not used, if there are any."""
    count = sum(len(files_in(folder, VIDEO_SUFFIXES)) for folder in folders)
    return [f"{counted(count, 'video is', 'videos are')} not used: save their frames as images"] if count else []


def evaluated_too(unlabelled: Sequence[Path], val: Sequence[Path]) -> str | None:
    """A warning, in one line, if unlabelled images are also in data.val: files of the same name and length.

    A detector that was trained on them looks better than it is.
    """
    both = shared_files(unlabelled, val)
    if not both:
        return None
    return (f"WARNING: {counted(len(both), 'image')} of data.unlabelled {'is' if len(both) == 1 else 'are'} also in "
            f"data.val, so its figures say less: {listed([path.name for path in both], ', ')}")


def shared_files(files: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    """The files that are among the others: of the same name and length."""
    named: dict[str, list[Path]] = {}
    for path in others:
        named.setdefault(path.name, []).append(path)
    return [path for path in files if any(length(path) == length(other) for other in named.get(path.name, ()))]


def length(path: Path) -> int | None:
    """The bytes of a file; None if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def paths_of(dataset: CocoDataset) -> list[Path]:
    """The files of a data set's images."""
    return [folder / name for (folder, _), name in zip(dataset.origins, dataset.file_names)]
