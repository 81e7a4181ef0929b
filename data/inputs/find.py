"""Finds images and videos in files, folders and globs."""
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError, counted, listed

# The file types that are searched for in a folder. An image that cannot be read is reported, not skipped silently.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}


class Source(NamedTuple):
    """An input file."""

    path: Path
    name: str  # relative to the given folder, with / between folders

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def files_in(folder: Path, suffixes: set[str]) -> list[Path]:
    """The files in a folder and its subfolders whose names have one of these endings, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and not file.is_dir())


def find_images(folder: str | Path) -> list[Source]:
    """The images of a folder and its subfolders, see `find_files`; the names start from the folder.

    Raises DataError if it is not a folder, or holds videos or no image.
    """
    if not Path(folder).is_dir():
        raise DataError(f"input {folder} is not a folder: give the folder that the images' names start from")
    found = find_files([folder])
    if videos := [source.name for source in found if source.is_video]:
        raise DataError(f"input {folder} holds {counted(len(videos), 'video')} ({listed(videos, ', ')}), and only "
                        "images can be labelled: save frames as images, or give a folder without videos")
    return found


def find_files(inputs: Sequence[str | Path]) -> list[Source]:
    """The images and videos of files, folders (with all subfolders) and globs, sorted by name within each input.

    Raises DataError if an input has no image or video, or if two files have the same name.
    """
    found: list[Source] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            files = files_in(path, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
            root = path
        else:
            files = [path] if path.exists() else sorted(map(Path, glob.glob(str(given), recursive=True)))
            files = [file for file in files if file.is_file()]
            root = os.path.commonpath([file.parent for file in files]) if files else path
        if not files:
            what = "holds no image or video" if path.is_dir() else "does not exist, and as a glob it matches no file"
            raise DataError(f"input {given} {what}: give a file, a folder or a glob in quotes")
        found += [Source(file, file.relative_to(root).as_posix()) for file in files]
    by_name: dict[str, Path] = {}
    for path, name in found:
        if name in by_name:
            raise DataError(f"inputs {by_name[name]} and {path} are both called {name}: give them in separate runs")
        by_name[name] = path
    return found
