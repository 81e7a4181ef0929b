"""Annotations as arrays: the same content and the same errors as from reading entry by entry."""
import json
import random

import numpy as np
import pytest

from data.coco import stream
from data.coco.annotations import load_coco_json, read_annotations
from data.coco.problems import drop_reason, find_problems
from data.errors import DataError, counted, listed

# What may stand in the place of a value, correct or not.
VALUES = [0, 1, 7, -3, 2.0, 0.5, 1e9, 2 ** 70, 10 ** 18 - 1, 10 ** 18, 10 ** 400, True, False, None, float("nan"),
          "1", "é", "", [], {}, [1, 2, 3, 4], [1, 2, -1, 4], [1, 2, 3, None], [0, 0, 0.5, 9.25], [1, 2, 3, True],
          "../a.jpg", "a/b c.png",
          "C:\\a.png", "a\nb", "0.jpg"]
DELETE = object()


def made(seed):
    """A correct file's content; ids are numbers, or texts as well."""
    rng = random.Random(seed)
    ids = rng.choice([range(3, 9), [5, 900000000, 7, -2, 11, 12], ["a", 3, "3", "é", 2 ** 70, -1]])
    images = [{"id": i, "file_name": f"{k}.jpg", "width": rng.choice([40, 41.0]), "height": 30}
              for k, i in enumerate(ids)]
    categories = [{"id": k, "name": f"c{k}"} for k in rng.choice([(4, 2, 9), (2 ** 65, 1, 3)])]
    annotations = []
    for number in range(rng.randrange(25)):
        box = [rng.choice([-5, 0, 3.25, 20.1, 39.5, 60]), rng.uniform(-10, 35), rng.choice([0, 0.5, 1, 7.7, 50]),
               rng.uniform(0, 9)]
        annotations.append({"id": number, "image_id": rng.choice(list(ids)), "bbox": box,
                            "category_id": rng.choice(categories)["id"]})
        for key, values in (("area", [0, 5, 70.5, True]), ("iscrowd", [0, 1, True, 1.0]), ("ignore", [0, 0, 1])):
            if rng.random() < 0.4:
                annotations[-1][key] = rng.choice(values)
    content = {"images": images, "annotations": annotations, "categories": categories, "info": {"x": []}}
    return {key: content[key] for key in rng.sample(list(content), 4)}


def spoiled(content, seed):
    """The same with a wrong, odd or missing value somewhere."""
    rng = random.Random(seed)
    for _ in range(rng.choice([1, 1, 2])):
        entries = content[rng.choice(["images", "annotations", "annotations", "categories"])]
        if entries:
            entry = rng.choice(entries)
            if rng.random() < 0.05 or not isinstance(entry, dict):
                entries[entries.index(entry)] = rng.choice(VALUES)
            elif "bbox" in entry and rng.random() < 0.2 and isinstance(entry["bbox"], list) and entry["bbox"]:
                entry["bbox"][rng.randrange(len(entry["bbox"]))] = rng.choice(VALUES)
            else:
                another = rng.choice(entries)
                values = VALUES + [another["id"]] * (isinstance(another, dict) and "id" in another)
                entry[rng.choice([*entry, "area", "iscrowd", "ignore"])] = rng.choice(values)
                if rng.random() < 0.2:
                    del entry[rng.choice(list(entry))]
    return content


def plain(content):
    """Boxes, labels, ignored boxes and truth by image id, and how many boxes are dropped, entry by entry."""
    label_of = {key: label for label, key in enumerate(sorted(category["id"] for category in content["categories"]))}
    image_of = {image["id"]: image for image in content["images"]}
    found = {image_id: ([], [], [], []) for image_id in image_of}
    dropped = 0
    for each in content["annotations"]:
        boxes, labels, ignored, truth = found[each["image_id"]]
        x, y, w, h = each["bbox"]
        truth.append([x, y, w, h, each.get("area", w * h), label_of[each["category_id"]], bool(each.get("iscrowd"))])
        if drop_reason(each, image_of[each["image_id"]]):
            dropped += 1
        elif each.get("iscrowd"):
            ignored.append((x, y, x + w, y + h))
        else:
            boxes.append((x, y, x + w, y + h))
            labels.append(label_of[each["category_id"]])
    return found, dropped


def check(file, content):
    problems = find_problems(content)
    if problems:
        with pytest.raises(DataError) as caught:
            read_annotations(file)
        texts = listed([problem.text for problem in problems])
        assert str(caught.value) == (f"annotation file {file} has {counted(len(problems), 'problem')}: {texts}; "
                                     "correct the file").strip().splitlines()[-1]
        return False
    read, (found, dropped) = read_annotations(file), plain(content)
    assert read.num_dropped_boxes == dropped and len(read) == len(found)
    for place, (image, own) in enumerate(zip(content["images"], found.values(), strict=True)):
        image_id = read.image_ids[place]
        assert image_id == image["id"] and type(image_id) is type(image["id"])
        assert read.file_names[place] == image["file_name"] and read.sizes[place] == (image["height"], image["width"])
        values = (read.boxes[place], read.labels[place], read.ignored_boxes[place], read.truth_of(place))
        for got, rows, dtype in zip(values, own, (np.float32, np.int64, np.float32, np.float64)):
            expected = np.array(rows, dtype).reshape(-1, *got.shape[1:])
            assert got.dtype == dtype and np.array_equal(got, expected)
    return True


@pytest.mark.parametrize("large", [False, True])
def test_the_content_is_that_of_reading_entry_by_entry(tmp_path, monkeypatch, large):
    monkeypatch.setattr(stream, "WHOLE", 0 if large else 2 ** 23)
    monkeypatch.setattr(stream, "BLOCK", 300)  # several pieces a list
    file = tmp_path / "a.json"
    good = 0
    for seed in range(250):
        content = made(seed)
        if seed > 60:
            content = spoiled(content, seed)
        file.write_text(json.dumps(content, ensure_ascii=seed % 2, indent=seed % 3 or None))
        good += check(file, json.loads(file.read_text()))
    assert 90 < good < 200


BROKEN = ["", "{", '{"images": [', '{"images": [{}', '{"images": [{}}', '{"images" []}', '{"images": [1 2]}',
          '{"a": 1} x', '{"annotations": [{"id": 1}, {"id": 2,}]}', '{"annotations": [\n{"id": 1},\n{"é": tru}]}',
          '{"annotations": ["abc', "{,}", '{"images": [12.5e]}', '{"images": 1, 2}', '{"images": {}, "images": [}']


@pytest.mark.parametrize("block", [1, 5, 4096])
def test_a_broken_file_is_named_with_its_place_as_by_json(tmp_path, monkeypatch, block):
    monkeypatch.setattr(stream, "WHOLE", 0)
    monkeypatch.setattr(stream, "BLOCK", block)
    file = tmp_path / "a.json"
    for text in BROKEN:
        file.write_bytes(text.encode())
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(text)
        with pytest.raises(DataError) as caught:
            load_coco_json(file)
        text = f"annotation file {file} is not valid JSON ({expected.value}): write or download it again"
        assert str(caught.value) == text


@pytest.mark.parametrize("whole", [0, 2 ** 23])
def test_of_a_key_that_is_there_twice_the_last_one_counts(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(stream, "WHOLE", whole)
    content = made(3)
    text = json.dumps(content)
    (tmp_path / "a.json").write_text('{"images": [{"id": 1}], "annotations": [7], ' + text[1:])
    assert check(tmp_path / "a.json", content)
    (tmp_path / "a.json").write_text(text[:-1] + ', "annotations": [7]}')
    assert not check(tmp_path / "a.json", content | {"annotations": [7]})


def test_lists_of_a_large_file_are_parsed_again_when_they_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "WHOLE", 0)
    monkeypatch.setattr(stream, "BLOCK", 50)
    content = made(3)
    (tmp_path / "a.json").write_text(json.dumps(content | {"é": 1}, ensure_ascii=False))
    loaded = load_coco_json(tmp_path / "a.json")
    for key in ("images", "annotations"):
        assert isinstance(loaded[key], stream.Entries) and len(loaded[key]) == len(content[key])
        assert list(loaded[key]) == list(loaded[key]) == content[key]
    assert loaded["categories"] == content["categories"]
