"""Reads CSV tables."""
import csv
import io
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError

from .shared import (
    Box,
    ImageIndex,
    ImageList,
    LabelledFolder,
    Source,
    make_box,
    raise_problems,
    sorted_classes,
    split_in,
)

# Each column, and the names that tools give it.
COLUMNS = {"file": ("file", "filename", "file_name", "image", "image_name", "image_path", "path"),
           "x1": ("x1", "xmin", "x_min"), "y1": ("y1", "ymin", "y_min"), "x2": ("x2", "xmax", "x_max"),
           "y2": ("y2", "ymax", "y_max"), "class": ("class", "label", "class_name", "name")}


def read_csv(source: Source) -> LabelledFolder:
    """Read a CSV file, or a folder of CSV files, with columns file, x1, y1, x2, y2 and class, in pixels from 0.

    The columns may also have the names that other tools give them, see `COLUMNS`; further columns are ignored. Commas,
    semicolons or tabs separate them. Each row is a box; a row with only a file is an image without objects. Images are
    in the folder of the CSV file or in its subfolders. CSV files named train, val (or valid) and test are splits, and
    so are CSV files in folders with these names.
    """
    files = source.annotation_files("CSV", ".csv")
    # A table can be given alone: its folder has the images.
    index = ImageIndex(source.images or (source.folder if source.folder.is_dir() else files[0].parent))
    found, problems = ImageList(), []
    for file in files:
        below = source.below(file)
        split = split_in([below.stem, *below.parts[:-1]])
        names: dict[str, str] = {}  # by what the table calls the image, because a table has many rows for each
        for line, values in _read_rows(file, source.read(file), problems):
            place = f"{below} line {line}"
            try:
                stated, box = _read_row(values, place)
                if stated not in names:
                    # An image that is not there keeps its name: it is reported with those that cannot be read.
                    names[stated] = (None if ".." in stated else index.find(stated, file)) or stated
                found.add(names[stated], [box] if box else [], stated, split)
            except ValueError as error:
                problems.append(f"{place}: {error}")
    raise_problems(f"tables in {files[0].parent} cannot be used", problems)
    images = found.to_list()
    return LabelledFolder(index.folder, images, sorted_classes(images))


def _read_rows(file: Path, text: str, problems: list[str]) -> Iterator[tuple[int, list[str]]]:
    """The line and the values of `COLUMNS` of each row that is not empty. Raises DataError: a column is missing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    delimiter = max(",;\t", key=lines[lines[0].lower().startswith("sep=") and len(lines) > 1].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    places = None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells) or (places is None and cells[0].lower().startswith("sep=")):  # Excel's line
                continue
            if places is None:
                places = _find_columns([cell.lower() for cell in cells], file)
                continue
            values = [cells[place] if place < len(cells) else "" for place in places]
            if delimiter != ",":  # where it is not a separator, a comma can be a decimal point
                values[1:5] = [value.replace(",", ".") for value in values[1:5]]
            yield reader.line_num, values
    except csv.Error as error:  # a field of more than 131072 characters: a quotation mark is not closed
        problems.append(f"{file.name} line {reader.line_num}: {error}")
    if places is None and not problems:
        _find_columns([], file)


def _find_columns(header: list[str], file: Path) -> list[int]:
    places = {column: next((header.index(name) for name in names if name in header), None)
              for column, names in COLUMNS.items()}
    if missing := [column for column, place in places.items() if place is None]:
        raise DataError(f"{file} has no column {', '.join(missing)}: its first line must name them")
    return list(places.values())


def _read_row(values: list[str], place: str) -> tuple[str, Box | None]:
    """The file and its box, or None without a box, from the values of `COLUMNS`. Raises ValueError."""
    stated, *corners, label = values
    if not stated:
        raise ValueError("it has no file")
    if not label and not any(corners):
        return stated, None
    if not label or not all(corners):
        raise ValueError("it must have a class and four corners, or only a file")
    return stated, make_box(label, corners, place, keys=("x1", "y1", "x2", "y2"))
