"""Checks a data set before training: all annotations, and every image by decoding it."""
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.augment.emptied import FIRST, EmptiedImages
from data.coco.annotations import SIZES, load_coco_json
from data.coco.dataset import CocoDataset, read_annotated_image
from data.coco.joined import unite_classes
from data.coco.problems import Problem, drop_reason, find_problems, image_problems
from data.coco.unlabelled import evaluated_too, image_files, shared_files, videos_note
from data.config import DataConfig, Split, find_data
from data.errors import DataError, UnreadableImage, counted, listed
from data.images import read_image
from data.tables import text_table


@dataclass
class SplitCheck:
    """The content of one split, and its problems."""

    name: str  # the key in the configuration
    annotation_file: Path | str  # of data.unlabelled: its folders
    num_images: int = 0
    num_empty: int = 0  # images without a box to learn
    classes: list[str] = field(default_factory=list)
    boxes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by class and size; no crowds, no dropped boxes
    num_crowds: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # boxes that training leaves out, by reason
    dropped_ids: dict[str, list[int | str]] = field(default_factory=dict)  # their annotations, by reason
    notes: list[str] = field(default_factory=list)  # useful to know, but no correction is needed
    problems: list[Problem] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    annotated: bool = True  # False for data.unlabelled


class _ImageChecks(Dataset):
    """For each index: the problem with the image or None, and whether its EXIF orientation turns the image."""

    def __init__(self, folder: Path, annotation_file: Path, images: list[dict]):
        self.folder, self.annotation_file, self.images = folder, annotation_file, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Problem | None, bool]:
        entry = self.images[index]
        path = self.folder / entry["file_name"]
        try:
            image = read_annotated_image(path, (int(entry["height"]), int(entry["width"])), self.annotation_file)
        except UnreadableImage as error:
            return Problem("images that cannot be read", str(error)), False
        except DataError as error:
            return Problem("images whose size is not the annotated size", str(error)), False
        content = path.read_bytes()
        has_exif = b"Exif\0\0" in content or b"eXIf" in content
        return None, has_exif and not torch.equal(image, read_image(path, upright=False))


class _ImageFiles(Dataset):
    """For each index: the problem with the image file, or None."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Problem | None:
        try:
            read_image(self.files[index])
        except UnreadableImage as error:
            return Problem("images that cannot be read", str(error))


def check_data(config: DataConfig | None) -> list[SplitCheck]:
    """Check the splits of a configuration's `data` section and all their images, with a progress bar.

    Raises DataError if the section is missing. The result contains the problems of the data.
    """
    if config is None:
        raise DataError("the configuration has no data section: add one with the data set to check")
    several = isinstance(config.train, list)
    checks = [check_split(f"data.train.{k}" if several else "data.train", part, config.workers)
              for k, part in enumerate(config.parts("train"))]
    classes = unite_checked(checks)
    if config.val is not None:
        val = check_split("data.val", config.val, config.workers)
        if all(check.classes for check in checks) and not set(val.classes) <= set(classes):
            text = f"data.train has classes {classes}, but data.val has {val.classes}"
            val.problems.append(Problem("classes", text))
        if shared := len(set().union(*(check.files for check in checks)) & val.files):
            val.notes.append(f"{counted(shared, 'image is', 'images are')} also in data.train: results on "
                             f"{'it' if shared == 1 else 'them'} say little")
        checks.append(val)
    if config.unlabelled is not None:
        checks.append(check_unlabelled(config, checks))
    return checks


def check_unlabelled(config: DataConfig, checks: list[SplitCheck]) -> SplitCheck:
    """Check data.unlabelled: every image by decoding it, and whether those in `checks` are among them."""
    folders = config.unlabelled.folders
    check = SplitCheck("data.unlabelled", listed(list(map(str, folders)), ", "), annotated=False)
    try:
        files = [file for folder in folders for file in image_files(folder)]
    except DataError as error:
        check.problems.append(Problem("image folder", str(error)))
        return check
    check.num_images, check.notes = len(files), videos_note(folders)
    loader = DataLoader(_ImageFiles(files), batch_size=None, num_workers=config.workers)
    for problem in tqdm(loader, check.name, leave=False, disable=None):
        check.problems += [problem] if problem else []
    annotated = {split: [Path(file) for each in checks if each.name.startswith(split) for file in sorted(each.files)]
                 for split in ("data.train", "data.val")}
    if shared := len(shared_files(files, annotated["data.train"])):
        check.notes.append(f"{counted(shared, 'image is', 'images are')} also in data.train, with labels")
    if warning := evaluated_too(files, annotated["data.val"]):
        check.notes.append(warning)
    return check


def unite_checked(checks: list[SplitCheck]) -> list[str]:
    """The classes of all parts of data.train; a clash of names becomes a problem of the last part."""
    try:
        return unite_classes({f"{check.name} ({check.annotation_file})": check.classes for check in checks})
    except DataError as error:
        checks[-1].problems.append(Problem("classes", str(error)))
        return list(dict.fromkeys(name for check in checks for name in check.classes))


def check_split(name: str, split: Split, workers: int = 0, decode: bool = True) -> SplitCheck:
    """Check one split; without `decode`, check only its annotations."""
    file, folder = find_data(split.annotations), find_data(split.images)
    check = SplitCheck(name, file)
    try:
        content = load_coco_json(file)
    except DataError as error:
        check.problems.append(Problem("annotation file", str(error)))
        return check
    check.num_images = len(content["images"])
    check.problems += find_problems(content)
    if not check.problems:
        _count_boxes(check, content)
    if not folder.is_dir():
        check.problems.append(Problem("image folder", f"{folder} does not exist"))
        return check

    needed = {"id", "file_name", "width", "height"}
    images = [i for i in content["images"] if isinstance(i, dict) and needed <= i.keys() and not image_problems(i)]
    names = [os.path.abspath(folder / image["file_name"]) for image in images]
    check.files = set(names)
    images = images if decode else []
    if repeated := len(names) - len(check.files):
        check.notes.append(f"{counted(repeated, 'image has', 'images have')} the same file as another image")
    num_turned = 0
    loader = DataLoader(_ImageChecks(folder, file, images), batch_size=None, num_workers=workers)
    for problem, turned in tqdm(loader, name, leave=False, disable=None):
        check.problems += [problem] if problem else []
        num_turned += turned
    if num_turned:
        are = counted(num_turned, "image is turned by its", "images are turned by their")
        check.notes.append(f"{are} EXIF orientation: boxes must be those of the upright image")
    return check


def _count_boxes(check: SplitCheck, content: dict) -> None:
    """Fill in the counts, for content without problems."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    check.classes = [str(category["name"]) for category in categories]
    class_of = {category["id"]: name for category, name in zip(categories, check.classes)}
    image_of = {image["id"]: image for image in content["images"]}
    with_boxes, beyond = set(), 0
    for annotation in content["annotations"]:
        image = image_of[annotation["image_id"]]
        if reason := drop_reason(annotation, image):
            check.dropped[reason] += 1
            check.dropped_ids.setdefault(reason, []).append(annotation["id"])
            continue
        x, y, w, h = annotation["bbox"]
        # a rounded coordinate is not an error
        beyond += min(x, y) < -1 or x + w > image["width"] + 1 or y + h > image["height"] + 1
        if annotation.get("iscrowd"):
            check.num_crowds += 1
            continue
        with_boxes.add(annotation["image_id"])
        area = annotation.get("area", w * h)
        check.boxes[class_of[annotation["category_id"]], list(SIZES)[(area > 32**2) + (area > 96**2)]] += 1
    check.num_empty = len(image_of) - len(with_boxes)
    if beyond:
        check.notes.append(counted(beyond, "box reaches more than a pixel beyond its image: it is clipped",
                                   "boxes reach more than a pixel beyond their image: they are clipped"))
    if not check.boxes:
        check.problems.append(Problem("boxes", "no image has a box to learn"))


def check_augmentation(dataset: CocoDataset) -> str | None:
    """A warning, in one line, if augmentation leaves no box in most of the first images of a training set."""
    counted_images = EmptiedImages()
    counted_images.note(dataset[index][1] for index in range(min(FIRST, len(dataset)) if dataset.augment else 0))
    return counted_images.warning()


def format_check(check: SplitCheck) -> str:
    """A readable summary of a split: counts, notes, and the problems of each kind under a heading."""
    lines = [f"{check.name}: {check.annotation_file}"]
    if check.classes:
        crowds = f", {counted(check.num_crowds, 'crowd')}" if check.num_crowds else ""
        lines += [f"{counted(check.num_images, 'image')}, {check.num_empty} of them without boxes",
                  f"{counted(check.boxes.total(), 'box')}{crowds}", "", _box_table(check)]
        if check.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in check.dropped.most_common())
            lines += ["", f"left out of training: {reasons}"]
            lines += [f"  {reason}: annotation {listed(list(map(str, check.dropped_ids[reason])), ', ')}"
                      for reason, _ in check.dropped.most_common()]
    elif not check.annotated:
        lines.append(counted(check.num_images, "image"))
    elif check.num_images:
        lines.append(f"{counted(check.num_images, 'image')}; boxes are counted only if the annotations are correct")
    lines += ["", *(f"note: {note}" for note in check.notes)] if check.notes else []
    by_kind: dict[str, list[str]] = {}
    for kind, text in check.problems:
        by_kind.setdefault(kind, []).append(text)
    for kind, texts in by_kind.items():
        lines += ["", f"{kind}: {counted(len(texts), 'problem')}"]
        lines += [f"  {text}" for text in texts]
    return "\n".join(lines if by_kind else [*lines, "", "no problems"])


def _box_table(check: SplitCheck) -> str:
    counts = [[check.boxes[name, size] for size in SIZES] for name in check.classes]
    rows = [[name, *map(str, row), str(sum(row))] for name, row in zip(check.classes, counts)]
    return text_table(["class", *SIZES, "all"], rows)
