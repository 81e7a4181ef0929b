"""Converts annotated images in other formats to COCO-format files with splits, and checks them like any data set."""
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.check import SplitCheck, check_split
from data.config import Split
from data.errors import MAX_LISTED, DataError, UnreadableImage, counted
from data.inputs.images import read_image
from data.output import write_text
from data.problems import drop_reason, find_problems, image_problems
from data.sources.formats import LabelledFolder, LabelledImage, raise_problems

HEADER = "# The data that prepare_data.py has written; a configuration inherits it with _base_."
EXPLAINED = "# The first path of each list that exists is used; ./ is the folder of this file. The folder can be moved."
DEFAULT_SHARES = {"train": 0.8, "val": 0.2}  # if neither the format nor the caller assigns the images


class _Sizes(Dataset):
    """For each index: the (h, w) of the upright image, or the problem with it."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, int] | str:
        try:
            return tuple(read_image(self.paths[index]).shape[1:])
        except UnreadableImage as error:
            return str(error)


def as_it_is(item: tuple[int, int] | str) -> tuple[int, int] | str:
    return item


def prepare(folder: LabelledFolder, out: Path, shares: dict[str, float] | None = None, seed: int = 0,
            skip_unreadable: bool = False, workers: int = 2) -> list[SplitCheck]:
    """Write `out/NAME.json` for every split, and `out/data.yaml`, the `data` section to inherit; images stay in place.

    Args:
        folder: the annotated images, see `data.sources.formats`.
        shares: fraction of the images per split; they sum up to 1. Default: the format's splits, or `DEFAULT_SHARES`.
        seed: seed of the random split.
        skip_unreadable: leave out images that cannot be read.
        workers: number of processes that decode all images to get their sizes.
    Returns: the check of each split; see `format_check`.
    Raises DataError, in one line and before anything is written, if images cannot be read or have names that lead out
    of their folder, if boxes are wrong, or if a split has no images.
    """
    section = out / "data.yaml"
    if section.exists() and not section.read_text(encoding="utf-8", errors="replace").startswith(HEADER):
        raise DataError(f"{section} is not from prepare_data.py and would be overwritten: give another --out")
    problems = [p.text for i in folder.images for p in image_problems(_entry(i.file_name, i.file_name, (1, 1)))]
    raise_problems(f"images of {folder.image_folder} cannot be used", problems)
    splits, notes = split_images(folder.images, shares, seed)
    used = [image for images in splits.values() for image in images]
    sizes, unreadable = read_sizes([folder.image_folder / image.file_name for image in used], workers)
    if not skip_unreadable:
        raise_problems("images cannot be used; --skip-unreadable leaves them out", unreadable)
    notes = folder.notes + notes + [f"left out: {line}" for line in unreadable]
    size_of = dict(zip((image.file_name for image in used), sizes))
    contents = {name: to_coco(images, folder, size_of) for name, images in splits.items()}
    for name, content in contents.items():
        if not content["images"]:
            raise DataError(f"split {name} has no images: give it a larger share, or more images")
        raise_problems(f"split {name} cannot be used", [problem.text for problem in find_problems(content)])
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_text(out / f"{name}.json", json.dumps(content))
    write_text(section, data_section(folder.image_folder, out, list(contents)))
    checks = [check_split(name, split_of(folder.image_folder, out, name), decode=False) for name in contents]
    checks[0].notes += notes
    for check, name in zip(checks, contents):
        check.notes += left_out(contents[name], [box.place for image in splits[name] if size_of[image.file_name]
                                                 for box in image.boxes])
    return checks


def split_images(images: Sequence[LabelledImage], shares: dict[str, float] | None,
                 seed: int) -> tuple[dict[str, list[LabelledImage]], list[str]]:
    """Images by split, in the order of their names, and notes for the user.

    A random split depends only on the seed and the images' names.
    Raises DataError if the shares are not above 0 or do not sum up to 1.
    """
    images = sorted(images, key=lambda image: image.file_name)
    own = {name: [i for i in images if i.split == name] for name in ("train", "val", "test")}
    own = {name: listed for name, listed in own.items() if listed}
    if shares is None and own:
        left = len(images) - sum(map(len, own.values()))
        text = f"image is in none of the splits {', '.join(own)} and is left out"
        return own, [counted(left, text, text.replace("image is", "images are").replace("and is", "and are"))][:left]
    shares = shares or DEFAULT_SHARES
    if not (min(shares.values()) > 0 and abs(sum(shares.values()) - 1) <= 1e-6):  # nor nan
        given = " ".join(f"{name}={share:g}" for name, share in shares.items())
        raise DataError(f"shares {given} must be above 0 and sum up to 1")
    order = np.random.default_rng(seed).permutation(len(images))
    bounds = np.rint(np.cumsum([0, *shares.values()]) * len(images)).astype(int)
    ranges = zip(shares, bounds, bounds[1:])
    drawn = {name: [images[i] for i in sorted(order[start:end])] for name, start, end in ranges}
    return drawn, ["the splits that come with the data are not used"] * bool(own)


def read_sizes(paths: list[Path], workers: int) -> tuple[list[tuple[int, int] | None], list[str]]:
    """The (h, w) of each image, or None if it cannot be read, and the problems of the unreadable images."""
    sizes, unreadable = [], []
    loader = DataLoader(_Sizes(paths), batch_size=None, num_workers=workers, collate_fn=as_it_is)
    for found in tqdm(loader, "images", leave=False, disable=None):
        sizes.append(None if isinstance(found, str) else found)
        unreadable += [found] if isinstance(found, str) else []
    return sizes, unreadable


def to_coco(images: Sequence[LabelledImage], folder: LabelledFolder,
            size_of: dict[str, tuple[int, int] | None]) -> dict:
    """The content of a COCO-format file; images without a size are left out."""
    label_of = {name: label for label, name in enumerate(folder.classes, start=1)}
    content = {"images": [], "annotations": [], "categories": [{"id": k, "name": n} for n, k in label_of.items()]}
    for image in images:
        size = size_of[image.file_name]
        if size is None:
            continue
        entry = _entry(len(content["images"]) + 1, image.file_name, size)
        content["images"].append(entry)
        across, down = (size[1], size[0]) if folder.relative else (1, 1)
        for box in image.boxes:
            x, y, w, h = box.x1 * across, box.y1 * down, (box.x2 - box.x1) * across, (box.y2 - box.y1) * down
            content["annotations"].append({
                "id": len(content["annotations"]) + 1, "image_id": entry["id"], "category_id": label_of[box.name],
                "bbox": [x, y, w, h], "area": w * h, "iscrowd": int(box.crowd)})
    return content


def left_out(content: dict, places: Sequence[str]) -> list[str]:
    """A note for each of the boxes that training leaves out, from the content and the place of each annotation."""
    image_of = {image["id"]: image for image in content["images"]}
    reasons = [drop_reason(annotation, image_of[annotation["image_id"]]) for annotation in content["annotations"]]
    notes = [f"left out of training: {place} is {reason}" for place, reason in zip(places, reasons) if reason]
    more = len(notes) - MAX_LISTED
    return [*notes[:MAX_LISTED], f"left out of training: {counted(more, 'more box')}"] if more > 0 else notes


def _entry(number: int | str, file_name: str, size: tuple[int, int]) -> dict:
    return {"id": number, "file_name": file_name, "width": size[1], "height": size[0]}


def split_of(image_folder: Path, out: Path, name: str) -> Split:
    return Split(str(image_folder.resolve()), str((out / f"{name}.json").resolve()))


def data_section(image_folder: Path, out: Path, names: Sequence[str]) -> str:
    """A configuration file with the `data` section: train on the split train (or the first split), evaluate on val.

    It has each path twice, absolute and from its own folder. So it can be moved, alone, with the annotations or with
    annotations and images. Annotations beside it come first: a copy of the folder uses its own.
    """
    known = [name for name in ("train", "val") if name in names] or names[:1]
    images, out = image_folder.resolve(), out.resolve()
    below = [f"./{Path(os.path.relpath(images, out)).as_posix()}"] if images.anchor == out.anchor else []
    section = {key: {"images": [str(images), *below], "annotations": [f"./{name}.json", str(out / f"{name}.json")]}
               for key, name in zip(("train", "val"), known)}
    lines = [HEADER, EXPLAINED]
    if "test" in names:
        lines.append(f"# Evaluate on the test split: eval.py ... data.val.annotations={out / 'test.json'}")
    return "\n".join(lines) + "\n" + yaml.safe_dump({"data": section}, allow_unicode=True, sort_keys=False, width=10000)
