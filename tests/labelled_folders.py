"""Generated scenes as a folder in each format that prepare_data.py reads, the run of the script, and what it wrote."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
from runs import run_script

from data.sources.scenes import CLASSES

SIZE = (64, 96)  # of the images


def write_voc(folder, scenes, splits=None):
    images, boxes = scenes
    shutil.copytree(images, folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for name, objects in boxes.items():
        rows = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
            f"<ymax>{y2}</ymax></bndbox></object>" for label, x1, y1, x2, y2 in objects)
        # the name that is stated is often another tool's
        (folder / "Annotations" / f"{Path(name).stem}.xml").write_text(
            f"<annotation><filename>whatever.png</filename>{rows}</annotation>")
    for split, stems in (splits or {}).items():
        (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")


def write_yolo(folder, scenes, place=lambda name: ("", ""), names="yaml"):
    """`place` gives the folders above and below images/ and labels/ for an image."""
    images, boxes = scenes
    for name, objects in boxes.items():
        above, below = place(name)
        for kind in ("images", "labels"):
            (folder / above / kind / below).mkdir(parents=True, exist_ok=True)
        shutil.copy(images / name, folder / above / "images" / below / name)
        rows = [f"{CLASSES.index(label)} {(x1 + x2) / 2 / SIZE[1]} {(y1 + y2) / 2 / SIZE[0]} {(x2 - x1) / SIZE[1]} "
                f"{(y2 - y1) / SIZE[0]}" for label, x1, y1, x2, y2 in objects]
        if rows:
            (folder / above / "labels" / below / f"{Path(name).stem}.txt").write_text("\n".join(rows) + "\n")
    if names == "yaml":
        listed = "".join(f"  {k}: {name}\n" for k, name in enumerate(CLASSES))
        (folder / "data.yaml").write_text(f"nc: 6\nnames:\n{listed}")
    else:
        (folder / "classes.txt").write_text("\n".join(CLASSES))


def write_csv(folder, scenes, files=("boxes.csv",), delimiter=",", place="."):
    images, boxes = scenes
    shutil.copytree(images, folder / place, dirs_exist_ok=True)
    for number, file in enumerate(files):
        rows = [["file", "note", "x1", "y1", "x2", "y2", "class"]]
        for name, objects in list(boxes.items())[number::len(files)]:
            rows += [[name, "n", *map(str, corners), label] for label, *corners in objects] or [[name] + [""] * 6]
        (folder / file).write_text("\n".join(map(delimiter.join, rows)), encoding="utf-8-sig")


def write_labelme(folder, scenes):
    images, boxes = scenes
    shutil.copytree(images, folder)
    for name, objects in boxes.items():
        shapes = [{"label": label, "shape_type": "rectangle", "points": [[x2, y1], [x1, y2]]}
                  for label, x1, y1, x2, y2 in objects]
        (folder / f"{Path(name).stem}.json").write_text(json.dumps({"shapes": shapes, "imagePath": name}))


def write_cvat(folder, scenes):
    images, boxes = scenes
    shutil.copytree(images, folder / "images")
    rows = [f'<image name="{name}">' + "".join(f'<box label="{label}" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}"/>'
                                               for label, x1, y1, x2, y2 in objects) + "</image>"
            for name, objects in boxes.items()]
    (folder / "annotations.xml").write_text(f"<annotations>{''.join(rows)}</annotations>")


def prepare(monkeypatch, capsys, kind, source, out, *arguments):
    code = run_script(monkeypatch, "prepare_data.py", kind, "--input", source, "--out", out, "--workers", 0, *arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err.strip().splitlines()


def read_back(out):
    """The boxes of all splits by file name, and the file names in each split."""
    boxes, names = {}, {}
    for file in out.glob("*.json"):
        content = json.loads(file.read_text())
        images = {image["id"]: image for image in content["images"]}
        classes = {category["id"]: category["name"] for category in content["categories"]}
        names[file.stem] = {Path(image["file_name"]).name for image in images.values()}
        boxes |= {Path(image["file_name"]).name: [] for image in images.values()}
        assert all((image["height"], image["width"]) == SIZE for image in images.values())
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            boxes[Path(images[annotation["image_id"]]["file_name"]).name].append(
                (classes[annotation["category_id"]], x, y, x + w, y + h))
    return boxes, names


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, objects in expected.items():
        assert [label for label, *_ in found[name]] == [label for label, *_ in objects]
        np.testing.assert_allclose([c for _, *c in found[name]], [c for _, *c in objects], atol=1e-6)


def edit(path, pattern, text):
    content = path.read_text(encoding="utf-8-sig")
    assert re.search(pattern, content)
    path.write_text(re.sub(pattern, text, content, count=1), encoding="utf-8")
