"""Every kind of bad data gives one clear line that names the file."""

import json
import math

import pytest
import torch

from data import CocoDataset, DataConfig, DataError, Split, build_dataset, build_loader
from data.images import read_image, write_picture


def assert_one_line(caught, *parts):
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 2500
    for part in parts:
        assert str(part) in message


@pytest.fixture
def source(write_coco):
    """A correct data set: two images with one box each."""
    return write_coco([(20, 30), (20, 30)], [(10, 1, [1, 1, 9, 9], {}), (11, 2, [1, 1, 9, 9], {})])


def change(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def assert_rejected(source, *parts):
    with pytest.raises(DataError) as caught:
        CocoDataset(*source, training=True)
    assert_one_line(caught, source[1], *parts)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"images": [{"id"', "not valid JSON"),
        ("\xff\xfe", "not valid JSON"),
        ("[1, 2]", "it holds a list"),
        ('{"images": [], "annotations": []}', "no list categories"),
        ('{"shapes": []}', "no list images, annotations, categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}', "has no images"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "x"}]}', "no file_name, width"),
        ('{"images": [5], "annotations": [], "categories": [{"id": 1, "name": "x"}]}', "images[0] is not an object"),
    ],
)
def test_not_a_coco_file(source, text, part):
    source[1].write_bytes(text.encode("latin-1"))
    assert_rejected(source, part)


def test_missing_annotation_file_and_image_folder(source, tmp_path):
    with pytest.raises(DataError) as caught:
        CocoDataset(source[0], tmp_path / "none.json", training=True)
    assert_one_line(caught, tmp_path / "none.json", "does not exist", "DENSEKD_DATA")
    with pytest.raises(DataError) as caught:
        CocoDataset(source[0], tmp_path, training=True)
    assert_one_line(caught, tmp_path, "cannot be read")
    with pytest.raises(DataError) as caught:
        CocoDataset(tmp_path / "none", source[1], training=True)
    assert_one_line(caught, tmp_path / "none", "does not exist")


@pytest.mark.parametrize(
    ("section", "key", "value", "part"),
    [
        ("annotations", "bbox", [1, math.nan, 5, 5], "annotation 1 has bbox [1, nan, 5, 5]"),
        ("annotations", "bbox", [1, 1, math.inf, 5], "not four finite numbers: its width is not a number"),
        ("annotations", "bbox", [1, 1, 1e300, 5], "not four finite numbers: its width is too large"),
        ("annotations", "bbox", [1, 1, 5], "not four finite numbers"),
        ("annotations", "bbox", "1 1 5 5", "not four finite numbers"),
        ("annotations", "bbox", None, "not four finite numbers"),
        ("annotations", "bbox", [True, 1, 5, 5], "not four finite numbers: its x is not a number"),
        ("annotations", "bbox", ["x" * 10_000], "xxx..., not four finite numbers"),
        ("annotations", "bbox", [9, 9, -3, 5], "annotation 1 has bbox [9, 9, -3, 5] with negative width"),
        ("annotations", "bbox", [9, 9, 5, -0.1], "are corners swapped?"),
        ("annotations", "area", "big", "annotation 1 has wrong area 'big'"),
        ("annotations", "area", math.nan, "annotation 1 has wrong area nan"),
        ("annotations", "area", 10**400, "annotation 1 has wrong area 1000"),
        ("annotations", "iscrowd", "0", "annotation 1 has iscrowd '0', not 0 or 1"),
        ("annotations", "ignore", None, "annotation 1 has ignore None, not 0 or 1"),
        ("annotations", "category_id", 7, "annotation 1 has the unknown category_id 7"),
        ("annotations", "image_id", 99, "annotation 1 has the unknown image_id 99"),
        ("annotations", "image_id", [], "annotation 1 has the unknown image_id []"),
        ("annotations", "id", 0, "annotations id 0 occurs 2 times"),
        ("images", "id", 10, "images id 10 occurs 2 times"),
        ("images", "id", None, "images id None is not an id"),
        ("images", "width", 0, "image 11 has wrong width and height (0, 20)"),
        ("images", "height", "20", "image 11 has wrong width and height (30, '20')"),
        ("images", "width", 30.5, "image 11 has wrong width and height (30.5, 20)"),
        ("images", "width", math.nan, "image 11 has wrong width and height (nan, 20)"),
        ("images", "file_name", 3, "image 11 has wrong file_name 3"),
        ("images", "file_name", "a\nb.png", "image 11 has wrong file_name 'a\\nb.png'"),
        ("images", "file_name", "a\0.png", "image 11 has wrong file_name"),
        ("images", "file_name", "\ud83d.png", "image 11 has wrong file_name '\\ud83d.png'"),
        ("images", "file_name", "../secret.png", "leads out of the image folder"),
        ("images", "file_name", "deep/../../secret.png", "leads out of the image folder"),
        ("images", "file_name", "..\\secret.png", "leads out of the image folder"),
        ("images", "file_name", "/etc/secret.png", "leads out of the image folder"),
        ("images", "file_name", "C:\\secret.png", "leads out of the image folder"),
        ("annotations", "id", ["x" * 10_000], "xxx... is not an id"),
        ("categories", "id", 1, "categories id 1 occurs 2 times"),
        ("categories", "id", "2", "categories id '2' is not an id"),
        ("categories", "name", "cat", "categories name 'cat' occurs 2 times"),
        ("categories", "name", "two\nlines", "category 2: wrong name 'two\\nlines'"),
        ("categories", "name", None, "category 2: wrong name None"),
    ],
)
def test_bad_entry(source, section, key, value, part):
    change(source[1], lambda content: content[section][1].update({key: value}))
    assert_rejected(source, part)


def test_ten_problems_are_listed_and_the_rest_counted(source):
    def edit(content):
        content["annotations"] = [{**content["annotations"][0], "id": i, "category_id": 5} for i in range(25)]

    change(source[1], edit)
    assert_rejected(source, "25 problems", "annotation 9 ", "and 15 more")


def test_nothing_left_after_skipping_empty_images(source):
    change(source[1], lambda content: content["annotations"].clear())
    with pytest.raises(DataError) as caught:
        CocoDataset(*source, training=True, skip_empty=True)
    assert_one_line(caught, source[1], "no image with a usable box")


@pytest.mark.parametrize(
    ("cut", "part"), [(None, "does not exist"), (0, "it is empty"), (60, "cannot be read"), (300, "cannot be read")]
)
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_missing_and_damaged_images(source, kind, cut, part):
    path = source[0] / "0.png"
    write_picture(source[0] / f"0.{kind}", torch.randint(0, 256, (3, 20, 30)).to(torch.uint8))
    (source[0] / f"0.{kind}").replace(path)  # what it holds decides, not its name
    if cut is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError) as caught:
        CocoDataset(*source, training=False)[0]
    assert_one_line(caught, path, part)


def test_an_unknown_image_format_is_named_as_such(source):
    (source[0] / "0.png").write_bytes(b"XX" + bytes(100))
    with pytest.raises(DataError) as caught:
        CocoDataset(*source, training=False)[0]
    assert_one_line(caught, source[0] / "0.png", "not a JPEG, PNG, WebP, BMP, TIFF or GIF")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_size_that_differs_from_the_annotations_is_one_line_from_a_worker_too(source, workers):
    change(source[1], lambda content: content["images"][1].update(width=20, height=30))
    loader = build_loader(CocoDataset(*source, training=False), 1, training=False, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert_one_line(caught, source[0] / "1.png", "is 30 x 20 pixels", "but 20 x 30 in", source[1])
    assert str(caught.value).startswith("image ")


def test_kinds_of_images_that_are_read(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    pixels = torch.randint(0, 256, (20, 30, 4)).to(torch.uint8).numpy()
    rgb = image_module.fromarray(pixels[..., :3])
    rotated = image_module.Exif()
    rotated[0x0112] = 6
    rgb.save(tmp_path / "exif.jpg", exif=rotated)
    assert read_image(tmp_path / "exif.jpg").shape == (3, 30, 20)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image_module.fromarray(pixels).save(tmp_path / "alpha.png")
    image_module.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    image_module.fromarray(pixels[..., 0].astype("uint16") * 256).save(tmp_path / "sixteen.png")
    rgb.save(tmp_path / "bäume 木.png")
    for name in ("cmyk.jpg", "alpha.png", "grey.png", "sixteen.png", "bäume 木.png"):
        image = read_image(tmp_path / name)
        assert image.shape == (3, 20, 30) and image.dtype == torch.uint8, name
    assert torch.equal(read_image(tmp_path / "alpha.png"), torch.from_numpy(pixels[..., :3]).permute(2, 0, 1))
    assert torch.equal(read_image(tmp_path / "sixteen.png"), read_image(tmp_path / "grey.png"))
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[rgb.rotate(90)])
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "moving.gif")
    assert_one_line(caught, tmp_path / "moving.gif", "animated")


def test_a_split_that_is_not_set(source):
    with pytest.raises(DataError) as caught:
        build_dataset(DataConfig(train=Split(*map(str, source))), "val", training=False)
    assert_one_line(caught, "data.val is not set")
