"""The check of a whole data set: its counts, its notes, and that it finds all problems."""

import json

import pytest
from odd_images import pixels, write_rotated

from data import DataConfig, DataError, Split
from data.coco.check import check_data, format_check


def section(train, val=None, workers=0):
    splits = [None if source is None else Split(*map(str, source)) for source in (train, val)]
    return DataConfig(*splits, workers=workers)


def change(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.fixture
def source(write_coco):
    """Three images of 200 x 300, with boxes of every size, a crowd, and boxes that are left out."""
    boxes = [
        (10, 1, [0, 0, 32, 32], {"area": 32**2}),  # small: up to and including 32^2
        (10, 1, [0, 0, 32, 33], {"area": 32 * 33}),
        (10, 2, [0, 0, 300, 200], {"area": 96**2 + 1}),
        (10, 2, [0, 0, 300, 200], {"area": 500}),  # the object's area counts, not the box's
        (11, 2, [250, 0, 60, 20], {}),
        (11, 2, [0, 0, 60, 20], {"iscrowd": 1}),
        (11, 1, [400, 0, 60, 20], {}),
        (11, 1, [4, 0, 0.5, 20], {}),
        (11, 1, [5, 0, 0.5, 20], {}),
    ]
    return write_coco([(200, 300)] * 3, boxes)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sound_data_set(source, write_coco, workers):
    other = write_coco([(20, 30)], [(10, 1, [1, 1, 9, 9], {})], name="other")
    train, val = check_data(section(source, other, workers))
    assert train.problems == val.problems == []
    assert (train.num_images, train.num_empty, train.num_crowds) == (3, 1, 1)
    assert train.boxes == {("cat", "small"): 1, ("cat", "medium"): 1, ("dog", "large"): 1, ("dog", "small"): 2}
    assert train.dropped == {"thinner than a pixel": 2, "outside the image": 1}
    assert train.notes == ["1 box reaches more than a pixel beyond its image: it is clipped"]
    text = format_check(train)
    assert "3 images, 1 of them without boxes" in text and "5 boxes, 1 crowd\n" in text and "no problems" in text
    assert "left out of training: 2 thinner than a pixel, 1 outside the image" in text
    ids = [a["id"] for a in json.loads(source[1].read_text())["annotations"]]
    assert f"  thinner than a pixel: annotation {ids[7]}, {ids[8]}\n  outside the image: annotation {ids[6]}\n" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["cat", "1", "1", "0", "2"] in rows and ["dog", "2", "0", "1", "3"] in rows


def test_every_problem_is_found_and_none_hides_another(source):
    folder, file = source
    (folder / "0.png").write_bytes(b"")
    (folder / "1.png").unlink()
    change(file, lambda c: c["images"][2].update(width=299))
    change(file, lambda c: [annotation.update(bbox=[1, 1, -2, 3]) for annotation in c["annotations"]])
    (check,) = check_data(section(source))
    assert [kind for kind, _ in check.problems] == (
        ["boxes"] * 9 + ["images that cannot be read"] * 2 + ["images whose size is not the annotated size"]
    )
    text = format_check(check)
    assert all(problem.text in text for problem in check.problems)
    assert "boxes: 9 problems" in text and "images whose size is not the annotated size: 1 problem\n" in text
    assert "no problems" not in text and "boxes are counted only if the annotations are correct" in text


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (lambda c: c["annotations"][0].pop("bbox"), "missing keys"),
        (lambda c: c["annotations"][0].update(category_id=9), "unknown ids"),
        (lambda c: c["annotations"][0].update(id=1), "ids"),
        (lambda c: c["categories"][0].update(name="dog"), "class names"),
        (lambda c: c["images"].__setitem__(0, 5), "missing keys"),
        (lambda c: c["images"][0].update(file_name="../0.png"), "file names"),
        (lambda c: c["images"][0].update(height=-1), "image sizes"),
        (lambda c: c["annotations"].clear(), "boxes"),
    ],
)
def test_kinds_of_problems(source, edit, kind):
    change(source[1], edit)
    (check,) = check_data(section(source))
    assert [problem.kind for problem in check.problems] == [kind]


def test_images_are_decoded_though_annotations_are_wrong(source):
    change(source[1], lambda c: c["images"].__setitem__(0, 5))
    (source[0] / "2.png").write_bytes(b"damaged")
    (check,) = check_data(section(source))
    assert [problem.kind for problem in check.problems] == ["missing keys", "images that cannot be read"]


def test_files_that_cannot_be_used_at_all(source, tmp_path):
    source[1].write_text("{")
    (check,) = check_data(section(source))
    assert check.problems[0].kind == "annotation file" and "not valid JSON" in format_check(check)
    with pytest.raises(DataError, match="no data section"):
        check_data(None)


def test_a_missing_image_folder(source, tmp_path):
    (check,) = check_data(section((tmp_path / "none", source[1])))
    assert [problem.kind for problem in check.problems] == ["image folder"] and check.num_images == 3


def test_what_is_worth_knowing_is_noted(source):
    for number, orientation in [(0, 3), (1, 2), (2, 1)]:
        write_rotated(source[0] / f"{number}.png", pixels(200, 300), orientation)
    change(source[1], lambda c: c["images"].append(c["images"][0] | {"id": 99}))
    train, val = check_data(section(source, source))
    assert train.problems == val.problems == []
    assert train.notes[1:] == [
        "1 image has the same file as another image",
        "3 images are turned by their EXIF orientation: boxes must be those of the upright image",
    ]
    assert val.notes[-1] == "3 images are also in data.train: results on them say little"


def test_other_classes_in_evaluation_are_a_problem(source, write_coco):
    other = write_coco([(20, 30)], [(10, 1, [1, 1, 9, 9], {})], categories=((1, "cat"), (2, "cow")), name="other")
    _, val = check_data(section(source, other))
    assert [problem.kind for problem in val.problems] == ["classes"]


@pytest.mark.parametrize("box, extra, reason", [
    ([50, 50, 0, 20], {}, "without area"), ([50, 50, 20, 0], {}, "without area"),
    ([400, 50, 0, 20], {}, "without area"),
    ([50, 50, 20, 20], {"area": 0}, "without area"), ([300, 50, 20, 20], {}, "outside the image"),
    ([50, 50, 20, 0.5], {}, "thinner than a pixel"), ([50, 50, 20, 20], {"ignore": 1}, 'marked "ignore"')])
def test_the_reason_for_leaving_a_box_out(write_coco, box, extra, reason):
    source = write_coco([(200, 300)], [(10, 1, [0, 0, 9, 9], {}), (10, 1, box, {"area": box[2] * box[3]} | extra)])
    (check,) = check_data(section(source))
    assert check.dropped == {reason: 1}
