"""What is drawn depends only on the seed, the epoch and the image; and what the settings do."""
import json
import re
import shutil
from dataclasses import asdict, replace
from typing import get_args

import pytest
import torch
from runs import ROOT

from data import CocoDataset, DataConfig, DataError, Split, build_dataset, build_loader
from data.augment import AUGMENTATIONS, PRESETS, at_epoch, build_augmentations
from data.augment.emptied import EmptiedImages
from data.augment.sample import random_draws
from data.coco.check import check_augmentation
from data.config import Augmentation
from data.images import read_image
from data.transforms import flip_image, resize_image
from kd.config.load import parse_yaml
from models.build import ConfigError, read_section

EVERYTHING = [{"type": kind, "p": 0.7} for kind in AUGMENTATIONS]


@pytest.fixture
def source(write_coco):
    sizes = [(40, 60), (60, 40), (50, 60)] * 4
    boxes = [(10 + i, 1 + i % 2, [i, 2, 20, 30], {}) for i in range(12)]
    return write_coco(sizes, boxes + [(11, 1, [2, 3, 9, 9], {"iscrowd": 1})])


def loader_of(source, choice, workers=0, rank=0, world=1):
    dataset = CocoDataset(*source, training=True, multi_scale=[(60, 40), (90, 60)], seed=3,
                          augment=build_augmentations(choice), epochs=10)
    return build_loader(dataset, 4 // world, training=True, workers=workers, seed=3, rank=rank, world=world)


def samples_of(loader, epoch=0, start=0):
    """For every step a dictionary from image to everything that the detector gets."""
    loader.batch_sampler.epoch, loader.batch_sampler.start = epoch, start
    return [{target["image_id"]: json.dumps([target | {name: target[name].tolist() for name in (
        "boxes", "labels", "ignored_boxes")}, image[:, :target["image_size"][0], :target["image_size"][1]].tolist()])
        for image, target in zip(images, targets)} for images, targets in loader]


@pytest.mark.parametrize("choice", ["strong", EVERYTHING])
def test_batches_depend_neither_on_workers_nor_ranks_nor_resumption(source, choice):
    loaders = [loader_of(source, choice, workers) for workers in (0, 1, 2)]
    for epoch in (0, 3):
        state, device_seed = torch.random.get_rng_state(), torch.cuda.initial_seed if torch.cuda.is_available() else int
        seed = device_seed()
        single, one, two = (samples_of(loader, epoch) for loader in loaders)
        assert single == one == two
        assert torch.equal(torch.random.get_rng_state(), state) and device_seed() == seed
        ranks = [samples_of(loader_of(source, choice, rank=rank, world=2), epoch) for rank in (0, 1)]
        assert single == [a | b for a, b in zip(*ranks, strict=True)]
        assert samples_of(loader_of(source, choice, 2), epoch, start=1) == single[1:]
    other = loader_of(source, choice)
    other.dataset.seed = 4
    assert samples_of(other, 3) != single and samples_of(loaders[0], 4) != single


# Before there was more augmentation: (h, w), and whether the image was flipped, in epochs 0 to 3 of images 10 to 12.
AS_BEFORE = [[((30, 45), True), ((60, 40), False), ((40, 40), True)], [((60, 90), False), ((60, 40), False),
             ((40, 40), True)], [((40, 60), False), ((90, 60), True), ((40, 40), False)],
             [((40, 60), False), ((90, 60), True), ((40, 40), False)]]


def test_without_augmentation_images_are_what_they_were(write_coco):
    boxes = [(10, 1, [0, 6, 20, 10], {}), (10, 1, [50, 6, 10, 10], {"iscrowd": 1}),
             (11, 2, [3.5, 4.25, 20, 40.5], {}), (12, 2, [-3, 4, 20, 9], {})]
    source = write_coco([(40, 60), (48, 32), (30, 30)], boxes)
    config = DataConfig(Split(*map(str, source)), scale=(60, 40), multi_scale=[(60, 40), (90, 64), (45, 40)])
    dataset = build_dataset(config, "train", training=True, seed=7)
    assert dataset.augment == []
    for epoch, drawn in enumerate(AS_BEFORE):
        for index, (size, flipped) in enumerate(drawn):
            image, target = dataset[epoch, index]
            expected = resize_image(read_image(source[0] / f"{index}.png"), size)
            assert torch.equal(image, flip_image(expected) if flipped else expected)
            assert target["image_size"] == size and "emptied" not in target
    assert dataset[0, 0][1]["boxes"].tolist() == [[30.0, 4.5, 45.0, 12.0]]
    assert dataset[0, 0][1]["ignored_boxes"].tolist() == [[0.0, 4.5, 7.5, 12.0]]
    assert dataset[0, 2][1]["boxes"].tolist() == [[17.333332061767578, 5.333333492279053, 40.0, 17.33333396911621]]


def test_evaluation_is_not_augmented(source):
    config = DataConfig(Split(*map(str, source)), scale=(60, 40), train_augment="strong")
    plain, strong = (build_dataset(each, "train", training=False)
                     for each in (replace(config, train_augment="none"), config))
    assert all(torch.equal(plain[i][0], strong[i][0]) for i in range(len(plain)))


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 1}, {"index": 3}])
def test_seed_epoch_and_image_each_change_the_draws(write_coco, change):
    """All images are the same, and neither their scale nor a flip is drawn."""
    source = write_coco([(40, 60)] * 4, [(10 + i, 1, [5, 5, 30, 30], {}) for i in range(4)])
    for i in range(4):
        shutil.copy(source[0] / "0.png", source[0] / f"{i}.png") if i else None

    def drawn(seed=3, epoch=0, index=0):
        augment = build_augmentations([{"type": "RandomCrop", "p": 1.0}, {"type": "ColorJitter", "p": 1.0}])
        dataset = CocoDataset(*source, training=True, scale=(60, 40), flip=0.0, seed=seed, augment=augment)
        return dataset[epoch, index][0]

    image, other = drawn(), drawn(**change)
    assert torch.equal(image, drawn()) and (image.shape != other.shape or not torch.equal(image, other))


def test_draws_leave_the_global_generator_alone_and_repeat():
    before = torch.random.get_rng_state()
    with random_draws(1, 2, 3):
        first = torch.rand(4)
    with random_draws(1, 2, 3):
        assert torch.equal(torch.rand(4), first)
    for other in ((1, 2, 4), (2, 1, 3), (0, 2, 3)):
        with random_draws(*other):
            assert not torch.equal(torch.rand(4), first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_page_shows_the_presets():
    page = (ROOT / "docs" / "augmentation.md").read_text("utf-8")
    shown = [parse_yaml(text, "page")["data"]["train_augment"] for text in re.findall(r"```yaml\n(.*?)```", page, re.S)]
    assert json.dumps(shown[:2]) == json.dumps([PRESETS["light"], PRESETS["strong"]])
    assert all(f"| `{kind}` |" in page for kind in AUGMENTATIONS)
    assert all(build_augmentations(entries) for entries in shown)


def test_presets_are_lists_that_a_configuration_takes(source):
    names, _ = get_args(Augmentation)
    assert set(PRESETS) == set(get_args(names))
    for name, entries in PRESETS.items():
        as_written = json.loads(json.dumps(entries)) or "none"  # tuples become lists, as in YAML
        section = {"train": {"images": str(source[0]), "annotations": str(source[1])}, "train_augment": as_written}
        built = build_augmentations(read_section(DataConfig, section, "data").train_augment)
        assert json.dumps([asdict(each) for each in built]) == json.dumps(
            [asdict(each) for each in build_augmentations(name)])


@pytest.mark.parametrize(("choice", "key", "problem"), [
    ("ligth", "data.train_augment", 'must be one of none, light, strong, not text (\'ligth\'), or must be a list'),
    ([{"type": "Mosaik"}], "data.train_augment.0.type", 'unknown type "Mosaik"; did you mean "Mosaic"?'),
    ([{"type": "RandomCrop", "scales": [0.5, 1]}], "data.train_augment.0.scales", 'did you mean "scale"?'),
    ([{"type": "MixUp", "p": 1.5}], "data.train_augment.0.p", "from 0 to 1"),
    ([{"type": "Mosaic"}, {"type": "RandomCrop", "scale": [0.9, 0.5]}], "data.train_augment.1",
     "the first number of scale must not be larger than the second, but it is [0.9, 0.5]")])
def test_a_wrong_choice_is_one_line(choice, key, problem):
    section = {"train": {"images": "images", "annotations": "file"}, "train_augment": choice}
    with pytest.raises(ConfigError) as caught:
        read_section(DataConfig, section, "data")
    text = str(caught.value)
    assert text.startswith(f"{key}: ") and problem in text and "\n" not in text and caught.value.exit_code == 2


def test_mixing_stops_for_the_last_tenth_of_the_epochs_or_when_it_is_told_to():
    choice = [{"type": "Mosaic"}, {"type": "MixUp", "stop_epoch": 3}, {"type": "RandomCrop"}, {"type": "ColorJitter"}]

    def used(epoch, epochs):
        before, after = at_epoch(build_augmentations(choice), epoch, epochs)
        assert [type(each).__name__ for each in before] == ["RandomCrop"]
        return [type(each).__name__ for each in after]

    assert used(2, 20) == ["Mosaic", "MixUp", "ColorJitter"] and used(3, 20) == ["Mosaic", "ColorJitter"]
    assert used(17, 20) == ["Mosaic", "ColorJitter"] and used(18, 20) == ["ColorJitter"]
    assert used(9, 12) == ["Mosaic", "ColorJitter"] and used(10, 12) == ["ColorJitter"]
    assert used(0, 1) == ["MixUp", "ColorJitter"] and used(99, None) == ["Mosaic", "ColorJitter"]


def test_the_data_set_stops_mixing(source):
    config = DataConfig(Split(*map(str, source)), scale=(60, 40), train_augment=[{"type": "Mosaic", "p": 1.0}])
    plain, mixed = (build_dataset(each, "train", training=True, epochs=10)
                    for each in (replace(config, train_augment="none"), config))
    same = [all(torch.equal(plain[epoch, i][0], mixed[epoch, i][0]) for i in range(12)) for epoch in (0, 8, 9)]
    assert same == [False, False, True]


def test_unreadable_images_in_a_mosaic_are_skipped_or_refused(source):
    (source[0] / "3.png").write_bytes(b"no image")
    config = DataConfig(Split(*map(str, source)), scale=(60, 40), train_augment=[{"type": "Mosaic", "p": 1.0}])
    dataset = build_dataset(replace(config, skip_unreadable=True), "train", training=True)
    targets = [dataset[epoch, 0][1] for epoch in range(12)]
    noted = [target["skipped"] for target in targets if "skipped" in target]
    assert 0 < len(noted) < 12 and all("3.png" in line for lines in noted for line in lines)
    assert {target["image_id"] for target in targets} == {10}
    with pytest.raises(DataError, match="3.png cannot be read .* or set data.skip_unreadable=true"):
        refusing = build_dataset(config, "train", training=True)
        [refusing[epoch, 0] for epoch in range(12)]


def targets_of(emptied, kept, empty):
    kinds = [({"emptied": True}, 0)] * emptied + [({}, 1)] * kept + [({}, 0)] * empty
    return [{"boxes": torch.ones(count, 4), **extra} for extra, count in kinds]


def test_most_images_without_a_box_are_warned_of_once():
    watch = EmptiedImages()
    assert watch.note(targets_of(20, 5, 300)) is None  # images that never had a box do not count
    warning = watch.note(targets_of(6, 30, 0))
    assert warning.startswith("WARNING: data.train_augment leaves no box in 26 of 50 images") and "\n" not in warning
    assert watch.note(targets_of(100, 0, 0)) is None
    watch = EmptiedImages()
    assert watch.note(targets_of(25, 25, 0)) is None and watch.warning() is None
    (target,) = targets_of(1, 0, 0)
    EmptiedImages().note([target])
    assert "emptied" not in target


def test_an_augmentation_that_hides_everything_is_noticed(source):
    config = DataConfig(Split(*map(str, source)), scale=(60, 40), train_augment=[
        {"type": "RandomAffine", "p": 1.0, "scale": [0.01, 0.02]}])
    dataset = build_dataset(config, "train", training=True)
    assert "leaves no box in 12 of 12 images" in check_augmentation(dataset)
    assert check_augmentation(build_dataset(replace(config, train_augment="strong"), "train", training=True)) is None
    assert check_augmentation(build_dataset(replace(config, train_augment="none"), "train", training=True)) is None
