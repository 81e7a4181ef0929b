"""Images without annotations: which ones a batch gets, what their targets say, and what is checked."""
import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

from data import DataConfig, DataError, Split, build_dataset, build_loader
from data.coco.check import check_data, format_check
from data.coco.unlabelled import evaluated_too
from data.config import Unlabelled
from data.images import read_image, write_picture
from data.samplers import TrainBatchSampler
from kd.config.load import load_config
from models.build import ConfigError, read_section


@pytest.fixture
def config(write_coco, tmp_path):
    """Six labelled images, and five unlabelled ones in two folders and a subfolder."""
    train = write_coco([(40, 60)] * 6, [(10 + i, 1 + i % 2, [i, 2, 20, 30], {}) for i in range(6)])
    for i, name in enumerate(("a/0.png", "a/1.PNG", "a/deep/er/0.png", "b/0.png", "b/1.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (3, 48, 40 + 4 * i), generator=torch.Generator().manual_seed(i))
        write_picture(tmp_path / name, pixels.to(torch.uint8))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    return DataConfig(Split(*map(str, train)), unlabelled=Unlabelled([str(tmp_path / "a"), str(tmp_path / "b")]),
                      batch_size=2, workers=0, scale=(64, 64), train_augment="strong")


NAMES = ["0.png", "1.PNG", "deep/er/0.png", "1/0.png", "1/1.png"]


def loader_of(config, workers=0, rank=0, world=1, ratio=1.0):
    return build_loader(build_dataset(config, "train", True, seed=3, epochs=10), 4 // world, True, workers, seed=3,
                        rank=rank, world=world, unlabelled_ratio=ratio)


def samples_of(loader, epoch=0, start=0):
    """Of every step the ids, each with everything that the detector gets of its image, sorted."""
    loader.batch_sampler.epoch, loader.batch_sampler.start = epoch, start
    steps = []
    for images, targets in loader:
        content = [json.dumps([image[:, :t["image_size"][0], :t["image_size"][1]].tolist(), t["boxes"].tolist()])
                   for image, t in zip(images, targets)]
        steps.append(sorted(zip([str(t["image_id"]) for t in targets], content)))
    return steps


def test_all_images_of_all_folders(config):
    found = build_dataset(config, "train", True).unlabelled
    assert found.image_ids == NAMES and len(found) == 5
    assert build_dataset(config, "train", training=False).unlabelled is None
    alone = replace(config, unlabelled=Unlabelled(config.unlabelled.images[0]))
    assert build_dataset(alone, "train", True).unlabelled.image_ids == NAMES[:3]


def test_targets_are_marked(config, tmp_path):
    dataset = build_dataset(replace(config, train_augment="none", flip=0.0), "train", True)
    image, target = dataset[0, 6 + 3]
    assert target["unlabelled"] is True and target["image_id"] == "1/0.png"
    assert target["boxes"].shape == target["ignored_boxes"].shape == (0, 4) and target["labels"].dtype == torch.int64
    assert target["original_size"] == (48, 52) and target["image_size"] == (59, 64) == tuple(image.shape[1:])
    assert torch.equal(dataset[0, 5][0], dataset[5][0]) and "unlabelled" not in dataset[0, 5][1]
    native = replace(config, train_augment="none", flip=0.0, scale=(52, 52))
    assert torch.equal(build_dataset(native, "train", True)[0, 9][0], read_image(tmp_path / "b" / "0.png"))


def test_batches_depend_neither_on_workers_nor_ranks_nor_resumption(config):
    for epoch in (0, 3):
        single = samples_of(loader_of(config), epoch)
        assert [len(step) for step in single] == [8, 4]
        assert single == samples_of(loader_of(config, 2), epoch)
        ranks = [samples_of(loader_of(config, rank=rank, world=2), epoch) for rank in (0, 1)]
        assert single == [sorted(a + b) for a, b in zip(*ranks, strict=True)]
        assert samples_of(loader_of(config), epoch, start=1) == single[1:]
    assert samples_of(loader_of(config), 4) != single


def test_labelled_images_are_what_they_are_without_the_others(config):
    plain = samples_of(loader_of(replace(config, unlabelled=None)), 2)
    mixed = samples_of(loader_of(config), 2)
    assert [[entry for entry in step if "." not in entry[0]] for step in mixed] == plain


def test_an_image_more_in_the_folder_changes_no_other(config, tmp_path):
    before = build_dataset(config, "train", True, seed=3)
    shutil.copy(tmp_path / "b" / "0.png", tmp_path / "a" / "00.png")
    after = build_dataset(replace(config), "train", True, seed=3)
    config = replace(config, train_augment="none", multi_scale=[(64, 64), (80, 80)])
    before, after = before.unlabelled, after.unlabelled
    for index, name in enumerate(before.image_ids):
        other = after.image_ids.index(name)
        assert before._draw_augmentation(4, index) == after._draw_augmentation(4, other)


@pytest.mark.parametrize("ratio, world, expected", [(1.0, 1, [4, 4, 2]), (0.5, 1, [2, 2, 1]), (0.01, 1, [1, 1, 1]),
                                                    (2.5, 2, [10, 10, 6]), (0.1, 2, [2, 2, 2])])
def test_the_ratio(ratio, world, expected):
    samplers = [TrainBatchSampler([(40, 60)] * 10, 4 // world, 0, rank=rank, world=world, unlabelled=7,
                                  unlabelled_ratio=ratio) for rank in range(world)]
    steps = [[key for batch in batches for key in batch if key[1] >= 10] for batches in zip(*map(list, samplers))]
    assert [len(step) for step in steps] == expected
    assert all(len({len(batch) for batch in batches}) == 1 for batches in zip(*map(list, samplers)))


def test_every_image_is_shown_before_any_is_shown_again():
    sampler, shown = TrainBatchSampler([(40, 60)] * 10, 4, 0, unlabelled=7), []
    for sampler.epoch in range(7):
        keys = [key for batch in sampler for key in batch if key[1] >= 10]
        assert len(set(keys)) == len(keys)  # an image that an epoch shows again has a third number
        assert [key[0] for key in keys] == [sampler.epoch] * 10
        shown += [key[1] for key in keys]
    for i in range(0, 70, 7):
        assert Counter(shown[i:i + 7]) == Counter(range(10, 17))
    assert shown[:7] != shown[7:14]


def test_mosaics_are_of_one_kind(config, tmp_path):
    """Black labelled images, white unlabelled ones."""
    for path in [*config_files(config), *(tmp_path / name for name in ("a/0.png", "a/1.PNG", "a/deep/er/0.png",
                                                                       "b/0.png", "b/1.png"))]:
        white = "set" not in path.parts
        write_picture(path, torch.full((3, 40, 60), 255 * white, dtype=torch.uint8))
    mosaic = [{"type": "Mosaic", "p": 1.0, "scale": (1.0, 1.0)}, {"type": "MixUp", "p": 1.0}]
    dataset = build_dataset(replace(config, train_augment=mosaic), "train", True)
    for epoch in range(3):
        for index in range(6 + 5):
            values = set(dataset[epoch, index][0].flatten().tolist())
            assert (0 in values) == (index < 6) and (255 in values) == (index >= 6)


def config_files(config):
    dataset = build_dataset(config, "train", True)
    return [dataset.image_folder / name for name in dataset.file_names]


def test_damaged_images_are_handled_as_labelled_ones(config, tmp_path):
    (tmp_path / "a" / "1.PNG").write_bytes(b"nothing")
    dataset = build_dataset(replace(config, train_augment="none"), "train", True)
    with pytest.raises(DataError, match=r"1\.PNG cannot be read .* or set data.skip_unreadable=true"):
        dataset[0, 7]
    dataset = build_dataset(replace(config, train_augment="none", skip_unreadable=True), "train", True)
    target = dataset[0, 7][1]
    assert target["image_id"] == "deep/er/0.png" and len(target["skipped"]) == 1 and target["unlabelled"]


def test_bad_folders(config, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, part in ((tmp_path / "none", "none does not exist"), (tmp_path / "empty", "hold no image"),
                         (tmp_path / "a" / "notes.txt", "notes.txt is not a folder")):
        with pytest.raises(DataError, match=part):
            build_dataset(replace(config, unlabelled=Unlabelled(str(folder))), "train", True)
    for folders, part in ((["a", "b", "a/../a"], "a is named twice"), (["b", "a/deep", "a"], "deep is in .*a, so its")):
        with pytest.raises(DataError, match=f"^data.unlabelled.images: .*{part}.*: remove it$"):
            Unlabelled([str(tmp_path / folder) for folder in folders]).check_paths()
    config.unlabelled.check_paths()
    section = {"train": {"images": "a", "annotations": "b"}}
    for more, part in (({"unlabelled": {}}, "data.unlabelled.images"), ({"unlabelled": {"images": []}}, "at least one"),
                       ({"unlabelled": {"images": "a", "annotations": "b"}}, "annotations"),
                       ({"unlabelled": {"images": "a"}, "unlabelled_ratio": 0}, "data.unlabelled_ratio: must be above"),
                       ({"unlabelled_ratio": 2.0}, "data.unlabelled_ratio: is of use only with data.unlabelled")):
        with pytest.raises((ConfigError, DataError), match=part):
            read_section(DataConfig, section | more, "data")


def test_the_data_check(config, tmp_path):
    val = tmp_path / "set2"
    val.mkdir()
    for i in range(2):
        shutil.copy(tmp_path / "b" / f"{i}.png", val / f"{i}.png")
    shutil.copy(tmp_path / "set" / "5.png", tmp_path / "a" / "5.png")  # also in data.train
    content = json.loads((tmp_path / "set.json").read_text())
    content["images"] = [{"id": i, "file_name": f"{i}.png", "width": 52 + 4 * i, "height": 48} for i in range(2)]
    content["annotations"] = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 9, 9]}]
    (tmp_path / "val.json").write_text(json.dumps(content))
    (tmp_path / "b" / "film.mp4").write_bytes(b"")
    config = replace(config, val=Split(str(val), str(tmp_path / "val.json")))
    *_, check = check_data(config)
    text = format_check(check)
    assert "data.unlabelled: " in text and "6 images\n" in text and "no problems" in text
    assert "WARNING: 2 images of data.unlabelled are also in data.val" in text
    assert "1 image is also in data.train, with labels" in text and "1 video is not used" in text
    (tmp_path / "a" / "0.png").write_bytes(b"nothing")
    *_, check = check_data(config)
    assert [problem.kind for problem in check.problems] == ["images that cannot be read"]
    *_, check = check_data(replace(config, unlabelled=Unlabelled(str(tmp_path / "none"))))
    assert "does not exist" in check.problems[0].text


def test_images_that_are_evaluated_too(tmp_path):
    for name, content in (("a/0.png", "same"), ("b/0.png", "same"), ("a/1.png", "one"), ("b/1.png", "other")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    own = [tmp_path / "a" / name for name in ("0.png", "1.png")]
    other = [tmp_path / "b" / name for name in ("0.png", "1.png", "missing.png")]
    assert "1 image of data.unlabelled is also in data.val, so its figures say less: 0.png" in evaluated_too(own, other)
    assert evaluated_too(own[1:], other) is None


@pytest.mark.parametrize("images, expected", [("./x", "{0}/x"), ("y", "y"), (["./x", "y"], ["{0}/x", "y"]),
                                              (["./x"], "{0}/x")])
def test_paths_start_from_the_configuration(tmp_path, images, expected):
    (tmp_path / "cfg.yaml").write_text(json.dumps({
        "model": {"backbone": {"type": "ResNet", "depth": 18}, "head": {"type": "GFLHead"}},
        "data": {"train": {"images": "a", "annotations": "b"}, "unlabelled": {"images": images}}}))
    found = load_config(tmp_path / "cfg.yaml").data.unlabelled.images
    assert found == ([each.format(tmp_path) for each in expected] if isinstance(expected, list)
                     else expected.format(tmp_path))
