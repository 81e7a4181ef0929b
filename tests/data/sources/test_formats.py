"""Annotations of many tools: where they lie, how they are written, and what is wrong with them."""
import json
import math
import re

import pytest
from odd_images import pixels
from PIL import Image

from data import DataError
from data.sources.formats import READERS, read_labelled

VOC = "<annotation>\n<filename>{name}</filename>\n{objects}</annotation>"
OBJECT = ("<object>\n<name>{label}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
          "</bndbox></object>\n")


def write(folder, files):
    """Texts, or bytes, and images (None), by their names below the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.fromarray(pixels(40, 80)).save(path, "JPEG")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def found(folder, kind, **options):
    """(class, x1, y1, x2, y2) of each box, by the image's name."""
    read = read_labelled(kind, folder, **options)
    for image in read.images:
        assert (read.image_folder / image.file_name).is_file()
    return {image.file_name: [tuple(box[:5]) for box in image.boxes] for image in read.images}


def voc(*boxes, name="a.jpg"):
    return VOC.format(name=name, objects="".join(
        OBJECT.format(label=label, x1=x1, y1=y1, x2=x2, y2=y2) for label, x1, y1, x2, y2 in boxes))


def labelme(*shapes, name="a.jpg"):
    listed = [{"label": label, "points": points, "shape_type": kind} for label, kind, points in shapes]
    return json.dumps({"shapes": listed, "imagePath": name, "imageData": "A" * 1000, "imageWidth": 80})


def cvat(*images):
    return '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n' + "".join(
        f'<image id="0" name="{name}" width="80" height="40" {more}>\n{shapes}\n</image>\n'
        for name, more, shapes in images) + "</annotations>"


# --- one format after the other ---


def test_labelme_shapes(tmp_path):
    write(tmp_path, {"a.jpg": None, "a.json": labelme(
        ("red fox", "rectangle", [[30, 20], [10, 5.5]]), ("cup, small", "polygon", [[1, 2], [9, 4], [5, 30]]),
        ("disc", "circle", [[20, 20], [23, 24]]), ("dot", "point", [[3, 3]]), ("way", "linestrip", [[1, 1], [2, 2]]))})
    read = read_labelled("labelme", tmp_path)
    assert found(tmp_path, "labelme") == {"a.jpg": [("red fox", 10, 5.5, 30, 20), ("cup, small", 1, 2, 9, 30),
                                                    ("disc", 15, 15, 25, 25)]}
    assert read.classes == ["cup, small", "disc", "red fox"]
    assert read.notes == ["2 shapes without a box (points and lines): left out"]


def test_labelme_in_folders_with_paths_of_windows_and_other_json(tmp_path):
    write(tmp_path, {"images/train/a.jpg": None, "images/val/a.jpg": None, "coco/train.json": '{"images": []}',
                     "json/train/a.json": labelme(("x", "rectangle", [[1, 1], [5, 5]]),
                                                  name=r"..\..\images\train\a.jpg"),
                     "json/val/a.json": labelme(("x", "rectangle", [[2, 2], [5, 5]]), name=r"C:\old\a.jpg")})
    read = read_labelled("labelme", tmp_path)
    assert {i.file_name.split("/")[-2]: (i.split, i.boxes[0].x1) for i in read.images} == {
        "train": ("train", 1), "val": ("val", 2)}
    assert read.notes == ["1 JSON file without shapes: left out"]


def test_labelme_whose_image_was_renamed_with_it(tmp_path):
    write(tmp_path, {"a.jpg": None, "a.json": labelme(name="old.jpg")})
    assert found(tmp_path, "labelme") == {"a.jpg": []}
    write(tmp_path, {"b.json": labelme(name="none.jpg")})
    with pytest.raises(DataError, match="b.json: there is no image with this name in "):
        read_labelled("labelme", tmp_path)


def test_cvat_shapes_and_subsets(tmp_path):
    write(tmp_path, {"images/sub/a.jpg": None, "images/b.jpg": None, "annotations.xml": cvat(
        ("sub/a.jpg", 'subset="Train"',
         '<box label="red fox" occluded="1" xtl="1.5" ytl="2" xbr="30.25" ybr="20"><attribute name="n">1</attribute>'
         "</box>"
         '<polygon label="cup" points="5,6;9.5,7;8,30"/><points label="dot" points="1,1"/><tag label="day"/>'
         '<mask label="cup" rle="1, 2" left="3" top="4" width="10" height="6"/>'),
        ("b.jpg", 'subset="Validation"',
         '<box label="cup" xtl="20" ytl="10" xbr="40" ybr="14" rotation="90"/>'
         '<ellipse label="cup" cx="20" cy="10" rx="6" ry="3"/>'))})
    boxes = found(tmp_path, "cvat")
    assert boxes["sub/a.jpg"] == [("red fox", 1.5, 2, 30.25, 20), ("cup", 5, 6, 9.5, 30), ("cup", 3, 4, 13, 10)]
    assert [box[1:] for box in boxes["b.jpg"]] == [pytest.approx([28, 2, 32, 22]), pytest.approx([14, 7, 26, 13])]
    read = read_labelled("cvat", tmp_path)
    assert {image.file_name: image.split for image in read.images} == {"sub/a.jpg": "train", "b.jpg": "val"}
    assert read.notes == ["2 shapes without a box (polyline, points, tag, cuboid, skeleton): left out"]
    assert found(tmp_path / "annotations.xml", "cvat") == boxes  # the file alone


@pytest.mark.parametrize("name, stated", [
    ("a.jpg", "a"), ("a.JPG", "a.jpg"), ("my.photo.1.jpg", "my.photo.1"), ("b.jpg", "b"), ("b.jpg", "b.png"),
    ("b.JPG", r"C:\photos\b.JPG"), ("a.jpg", "")])
def test_voc_finds_the_image_by_the_name_of_the_xml_or_the_stated_one(tmp_path, name, stated):
    xml = "my.photo.1.xml" if name.startswith("my") else "a.XML"
    write(tmp_path, {f"JPEGImages/{name}": None, f"Annotations/{xml}": voc(("x", 1.5, 2.25, 30.5, 20), name=stated)})
    assert found(tmp_path, "voc") == {name: [("x", 0.5, 1.25, 30.5, 20)]}


def test_voc_of_roboflow_has_folders_for_splits(tmp_path):
    write(tmp_path, {f"{split}/a.{ending}": content for split in ("train", "valid") for ending, content in (
        ("jpg", None), ("xml", voc(("x", 1 if split == "train" else 2, 2, 30, 20))))})
    read = read_labelled("voc", tmp_path)
    assert {i.file_name: (i.split, i.boxes[0].x1) for i in read.images} == {
        "train/a.jpg": ("train", 0), "valid/a.jpg": ("val", 1)}


@pytest.mark.parametrize("text", [
    "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,80,40,red fox,1,2,30,20\n",  # Roboflow
    '"image","xmin","ymin","xmax","ymax","label"\r\n"a.jpg","1","2","30","20","red fox"\r\n',  # VoTT
    "image;xmin;ymin;xmax;ymax;label\n\n;;;;;\n'a.jpg';1,0;2;30;20,0;red fox\n\n".replace("'", '"'),
    "sep=\t\nImage\tXMin\tYMin\tXMax\tYMax\tLabel\r\na.jpg\t1\t2\t30\t20\tred fox\r\n   \r\n",
    "\ufefffile_name,x_min,y_min,x_max,y_max,name\nC:\\photos\\a.jpg,1,2,30,20,red fox"],
    ids=["Roboflow", "VoTT", "semicolons", "tabs", "Windows paths"])
def test_tables_of_other_tools(tmp_path, text):
    write(tmp_path, {"a.jpg": None, "boxes.csv": text})
    assert found(tmp_path, "csv") == {"a.jpg": [("red fox", 1, 2, 30, 20)]}


def test_a_class_name_with_a_comma_in_a_table(tmp_path):
    write(tmp_path, {"a.JPG": None, "boxes.csv": 'file,x1,y1,x2,y2,class\na.JPG,1,2,30,20,"fox, red"\n'})
    assert found(tmp_path, "csv") == {"a.JPG": [("fox, red", 1, 2, 30, 20)]}


def test_tables_in_folders_of_splits(tmp_path):
    header = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
    write(tmp_path, {f"{split}/{name}": content for split in ("train", "valid") for name, content in (
        ("a.jpg", None), ("_annotations.csv", f"{header}a.jpg,80,40,x,{len(split)},2,30,20\n"))})
    read = read_labelled("csv", tmp_path)
    assert {i.file_name: (i.split, i.boxes[0].x1) for i in read.images} == {
        "train/a.jpg": ("train", 5), "valid/a.jpg": ("val", 5)}


def test_yolo_lines(tmp_path):
    write(tmp_path, {"images/a.JPG": None, "labels/classes.txt": "red fox\ncup, small\n", "labels/a.txt":
                     "\ufeff0 0.5 0.5 0.2 0.4\r\n1 0.1 0.1 0.3 0.1 0.2 0.5\r\n1\t0.5 0.5 0.2 0.4 0.93\r\n\r\n"})
    read = read_labelled("yolo", tmp_path)
    boxes = read.images[0].boxes
    assert [box.name for box in boxes] == ["red fox", "cup, small", "cup, small"]
    assert [box[1:5] for box in boxes] == [pytest.approx(c) for c in (
        (0.4, 0.3, 0.6, 0.7), (0.1, 0.1, 0.3, 0.5), (0.4, 0.3, 0.6, 0.7))]
    assert read.notes == ["1 line with a confidence: it is not used"]


def test_yolo_folders_in_capital_letters(tmp_path):
    write(tmp_path, {"Images/Train/a.JPG": None, "Labels/Train/a.TXT": "0 0.5 0.5 0.2 0.4", "classes.txt": "x"})
    read = read_labelled("yolo", tmp_path)
    assert [(i.file_name, i.split, len(i.boxes)) for i in read.images] == [("Images/Train/a.JPG", "train", 1)]


def test_voc_splits_in_small_letters_and_names_that_differ_in_case(tmp_path):
    write(tmp_path, {"JPEGImages/a.jpg": None, "JPEGImages/A.jpg": None, "imagesets/main/train.txt": "a\n",
                     "imagesets/main/val.txt": "A\n", "Annotations/a.xml": voc(("x", 1, 1, 9, 9), name=""),
                     "Annotations/A.xml": voc(("y", 1, 1, 9, 9), name="")})
    if len(list((tmp_path / "JPEGImages").iterdir())) == 1:
        pytest.skip("this file system does not distinguish upper and lower case")
    read = read_labelled("voc", tmp_path)
    assert {i.file_name: (i.split, i.boxes[0].name) for i in read.images} == {"a.jpg": ("train", "x"),
                                                                              "A.jpg": ("val", "y")}


# --- places ---


PLACED = {"voc": ("a.xml", voc(("x", 1, 1, 30, 20))), "yolo": ("a.txt", "0 0.5 0.5 0.2 0.4"),
          "csv": ("boxes.csv", "file,x1,y1,x2,y2,class\na.jpg,1,2,30,20,x\n"),
          "labelme": ("a.json", labelme(("x", "rectangle", [[1, 1], [5, 5]]))),
          "cvat": ("all.xml", cvat(("a.jpg", "", '<box label="x" xtl="1" ytl="2" xbr="3" ybr="4"/>')))}


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("kind", READERS)
def test_folders_with_other_names_and_in_other_places(tmp_path, kind, elsewhere):
    name, text = PLACED[kind]
    top = tmp_path / ("other" if elsewhere else "in")
    write(tmp_path / "in", {"classes.txt": "x\n"})
    write(top, {"pics/a.jpg": None, f"marks/{name}": text})
    places = (top / "marks", top / "pics") if elsewhere else ("marks", "pics")  # names below the input do, too
    options = dict(zip(("annotations", "images"), map(type(tmp_path), places)))
    read = read_labelled(kind, tmp_path / "in", **options)
    assert read.image_folder == top / "pics" and [image.file_name for image in read.images] == ["a.jpg"]
    assert [box.name for box in read.images[0].boxes] == ["x"]
    for option in options:
        with pytest.raises(DataError, match=f"--{option} none does not exist, nor does .*none: correct the path"):
            read_labelled(kind, tmp_path / "in", **options | {option: type(tmp_path)("none")})


def test_an_image_that_could_be_two_is_told(tmp_path):
    write(tmp_path, {"JPEGImages/1/a.jpg": None, "JPEGImages/2/a.jpg": None, "Annotations/a.xml": voc()})
    with pytest.raises(DataError, match="a.xml: 'a.jpg' can be 1/a.jpg or 2/a.jpg: give images names of their own"):
        read_labelled("voc", tmp_path)


def test_two_files_for_one_image_are_told(tmp_path):
    write(tmp_path, {"JPEGImages/a.jpg": None, "Annotations/a.xml": voc(), "Annotations/b.xml": voc()})
    with pytest.raises(DataError, match="b.xml: a.xml is about the same image, a.jpg: leave one of them out"):
        read_labelled("voc", tmp_path)


# --- encodings ---


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "latin-1", "utf-16-le"])
@pytest.mark.parametrize("kind", ["voc", "yolo", "csv", "labelme"])
def test_other_encodings_are_read_where_they_are_named(tmp_path, kind, encoding):
    label = "狐狸" if encoding == "gbk" else "grün"
    texts = {"voc": ("a.xml", voc((label, 1, 1, 30, 20))), "yolo": ("a.txt", "0 0.5 0.5 0.2 0.4"),
             "csv": ("boxes.csv", f"file,x1,y1,x2,y2,class\na.jpg,1,2,30,20,{label}\n"),
             "labelme": ("a.json", json.dumps({"shapes": [{"label": label, "points": [[1, 1], [5, 5]]}],
                                               "imagePath": "a.jpg"}, ensure_ascii=False))}
    name, text = texts[kind]
    write(tmp_path, {"a.jpg": None, name: text.encode(encoding), "classes.txt": f"{label}\n".encode(encoding)})
    assert [boxes[0][0] for boxes in found(tmp_path, kind, encoding=encoding).values()] == [label]
    if encoding != "utf-16-le":
        with pytest.raises(DataError, match=r"line \d is not in UTF-8: name its encoding with --encoding, for example "
                                            "cp1252, gbk or latin-1"):
            read_labelled(kind, tmp_path)


@pytest.mark.parametrize("declared, real", [("windows-1252", "cp1252"), ("GB2312", "gbk"), ("ISO-8859-1", "latin-1"),
                                            ("UTF-16", "utf-16"), ("utf-16", "utf-8"), ("Shift_JIS", "shift_jis")])
def test_an_xml_file_says_its_encoding(tmp_path, declared, real):
    label = {"gbk": "狐狸", "shift_jis": "きつね"}.get(real, "grün")
    text = f'<?xml version="1.0" encoding="{declared}"?>\n' + voc((label, 1, 1, 30, 20))
    write(tmp_path, {"a.jpg": None, "a.xml": text.encode(real)})
    for encoding in (None, "latin-1" if real != "utf-8" else None):  # what the file says comes first
        assert found(tmp_path, "voc", encoding=encoding) == {"a.jpg": [(label, 0, 0, 30, 20)]}


def test_a_wrong_encoding_is_one_line(tmp_path):
    write(tmp_path, {"a.jpg": None, "a.xml": '<?xml version="1.0" encoding="klingon"?>' + voc()})
    with pytest.raises(DataError, match="a.xml is in the encoding klingon, which is not known: save the file in UTF-8"):
        read_labelled("voc", tmp_path)
    write(tmp_path, {"a.xml": voc(("grün", 1, 1, 2, 2)).encode("latin-1")})
    with pytest.raises(DataError, match="a.xml line 4 is not in ASCII: name another encoding with --encoding"):
        read_labelled("voc", tmp_path, encoding="ascii")


# --- wrong boxes ---


SMALL = '<image name="a.jpg"><box label="x" xtl="{}" ytl="2" xbr="{}" ybr="4"/></image>'
WRONG = {
    "voc nan": ("voc", voc(("x", 1, 1, 2, 2), ("fox", "nan", 1, 3, 3)),
                "a.xml line 5: object 2, fox: xmin 'nan' is not a number"),
    "voc inf": ("voc", voc(("fox", 1, 1, "inf", 3)), "a.xml line 3: object 1, fox: xmax 'inf' is not a number"),
    "voc swapped": ("voc", voc(("fox", 9, 1, 5, 3)), "a.xml line 3: object 1, fox: xmax 5 is less than xmin 9"),
    "voc upside down": ("voc", voc(("fox", 1, 7, 5, 3)), "object 1, fox: ymax 3 is less than ymin 7"),
    "voc large": ("voc", voc(("fox", 1, 1, "1e12", 3)), "xmax 1e12 is too large: no image has this position"),
    "csv nan": ("csv", "file,x1,y1,x2,y2,class\n\na.jpg,1,nan,3,3,x\n", "a.csv line 3: y1 'nan' is not a number"),
    "csv inf": ("csv", "file,x1,y1,x2,y2,class\na.jpg,1,1,inf,3,x\n", "a.csv line 2: x2 'inf' is not a number"),
    "csv swapped": ("csv", "file,x1,y1,x2,y2,class\na.jpg,9,1,3,3,x\n", "a.csv line 2: x2 3 is less than x1 9"),
    "yolo nan": ("yolo", "\n0 nan 0.5 0.1 0.1\n", "a.txt line 2: value 'nan' is not a number"),
    "yolo word": ("yolo", "fox 0.5 0.5 0.1 0.1\n", "a.txt line 1: value 'fox' is not a number"),
    "yolo negative": ("yolo", "0 0.5 0.5 -0.1 0.1\n", "a.txt line 1: width -0.1 is negative"),
    "labelme nan": ("labelme", labelme(("x", "point", [[1, 1]]), ("x", "rectangle", [[1, math.nan], [2, 2]])),
                    "a.json: shape 2: y 'nan' is not a number"),
    "labelme text": ("labelme", labelme(("x", "rectangle", [[1, "a"], [2, 2]])), "shape 1: y 'a' is not a number"),
    "labelme points": ("labelme", labelme(("x", "rectangle", [1, 2, 3, 4])), "shape 1: it has no list of points"),
    "labelme label": ("labelme", labelme((None, "rectangle", [[1, 1], [2, 2]])), "a.json: shape 1: it has no label"),
    "labelme cut": ("labelme", '{"shapes": [', "a.json: Expecting value: line 1"),
    "cvat swapped": ("cvat", SMALL.format(9, 5), "a.xml line 1: image a.jpg, object 1: xbr 5 is less than xtl 9"),
    "cvat nan": ("cvat", SMALL.format("nan", 5), "a.xml line 1: image a.jpg, object 1: xtl 'nan' is not a number"),
    "cvat polygon": ("cvat", '<image name="a.jpg">\n<polygon label="x" points="1,2;3"/></image>',
                     "a.xml line 2: image a.jpg, object 1: its points are not of the form x,y;x,y"),
    "cvat missing": ("cvat", '<image name="b.jpg"/>', "a.xml line 1: image 'b.jpg': there is no image with this name"),
    "cvat tracks": ("cvat", '<track id="0"/>', "tracks of a video: export it as CVAT for images 1.1"),
    "cvat doctype": ("cvat", '<!DOCTYPE a [<!ENTITY b "c">]>', "a.xml: it declares a document type"),
}
ENDINGS = {"voc": "xml", "cvat": "xml", "csv": "csv", "yolo": "txt", "labelme": "json"}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_box_is_named_by_place_and_reason(tmp_path, case):
    kind, text, part = WRONG[case]
    if kind == "cvat":
        text = f"{text}<annotations/>" if "DOCTYPE" in text else f"<annotations>{text}</annotations>"
    write(tmp_path, {"a.jpg": None, "classes.txt": "x\n", f"a.{ENDINGS[kind]}": text})
    with pytest.raises(DataError, match=re.escape(part)) as caught:
        read_labelled(kind, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
