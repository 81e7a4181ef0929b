"""Several data sets as one, repeats, and oversampling of rare classes."""
import json
from collections import Counter
from math import sqrt

import numpy as np
import pytest
import torch

from data import CocoDataset, DataConfig, DataError, Split, TrainBatchSampler, build_dataset, build_loader
from data.coco.check import check_data
from data.coco.joined import oversample, unite_classes

A, B = ((1, "cat"), (2, "dog")), ((3, "dog"), (7, "cow"), (9, "cat"))


def split(source, **more):
    return Split(*map(str, source), **more)


@pytest.fixture
def two(write_coco):
    """Two data sets with the same image ids; the second has the classes in another order, and one more."""
    first = write_coco([(40, 60)] * 3, [(10, 1, [0, 0, 9, 9], {}), (11, 2, [1, 1, 9, 9], {})], A, "first")
    second = write_coco([(60, 40)] * 2, [(10, 7, [2, 2, 9, 9], {}), (10, 3, [3, 3, 9, 9], {}),
                                         (11, 9, [4, 4, 9, 9], {}), (11, 9, [4, 4, 0, 9], {})], B, "second")
    return first, second


def test_classes_are_united_by_name(two):
    joined = build_dataset(DataConfig([split(source) for source in two]), "train", training=True)
    assert joined.classes == ["cat", "dog", "cow"] and joined.num_classes == 3
    assert [labels.tolist() for labels in joined.labels] == [[0], [1], [], [2, 1], [0]]
    assert joined.image_ids == [10, 11, 12, "1/10", "1/11"] and len(joined) == 5
    assert (joined.num_dropped_boxes, joined.num_skipped_images) == (1, 0)
    image, target = joined[0, 3]
    assert target["image_id"] == "1/10" and target["original_size"] == (60, 40) and target["labels"].tolist() == [2, 1]
    own = CocoDataset(*two[1], training=False)
    assert torch.equal(build_dataset(DataConfig([split(source) for source in two]), "train", False)[0, 3][0], own[0][0])


def test_each_data_set_has_its_own_first_and_its_own_errors(two):
    (two[1][0] / "0.png").unlink()
    joined = build_dataset(DataConfig([split(two[0], first=1), split(two[1])]), "train", training=True)
    assert joined.image_ids == [10, "1/10", "1/11"]
    with pytest.raises(DataError, match=f"image {two[1][0] / '0.png'} does not exist"):
        joined[0, 1]
    config = DataConfig([split(two[0], first=1), split(two[1])], skip_empty=True, skip_unreadable=True)
    assert build_dataset(config, "train", training=True)[0, 1][1]["image_id"] == "1/11"


def test_a_list_of_one_is_the_same_as_no_list(two):
    alone, listed = (build_loader(build_dataset(DataConfig(train), "train", True, seed=4), 2, True, workers=0, seed=4)
                     for train in (split(two[1]), [split(two[1])]))
    for (images, targets), (others, same) in zip(alone, listed, strict=True):
        assert torch.equal(images, others) and str(targets) == str(same)
    assert alone.dataset.classes == listed.dataset.classes == ["dog", "cow", "cat"]
    assert alone.dataset.annotation_file == listed.dataset.annotation_file == two[1][1]


@pytest.mark.parametrize("others", [["Cat"], ["CAT", "dog"], ["d o-g"], ["cow", "_dog"]])
def test_two_spellings_of_a_name_are_refused(others):
    known = {name.casefold().translate({ord(c): None for c in " -_"}): name for name in others}
    name = known.get("cat") or known["dog"]
    with pytest.raises(DataError) as caught:
        unite_classes({"data.train.0 (a.json)": ["cat", "dog"], "data.train.1 (b.json)": others})
    other = "cat" if "cat" in known else "dog"
    assert str(caught.value) == (f'data.train.1 (b.json) has the class "{name}", and data.train.0 (a.json) has '
                                 f'"{other}": spell the name in the same way in both files')


def test_names_that_one_file_tells_apart_stay_apart():
    assert unite_classes({"a": ["A", "a", "b"], "b": ["b", "a"], "c": ["c"]}) == ["A", "a", "b", "c"]


def test_the_check_of_a_list(two, write_coco):
    val = write_coco([(20, 30)], [(10, 1, [1, 1, 9, 9], {})], ((1, "cow"),), "val")
    first, second, evaluated = check_data(DataConfig([split(source) for source in two], split(val), workers=0))
    assert (first.name, second.name, evaluated.name) == ("data.train.0", "data.train.1", "data.val")
    assert not first.problems + second.problems + evaluated.problems
    content = json.loads(two[1][1].read_text())
    content["categories"][2]["name"] = "Cat"
    two[1][1].write_text(json.dumps(content))
    _, second, _ = check_data(DataConfig([split(source) for source in two], split(val), workers=0))
    assert [problem.kind for problem in second.problems] == ["classes"] and '"Cat"' in second.problems[0].text
    shared = check_data(DataConfig([split(source) for source in two], split(two[1]), workers=0))[-1]
    assert shared.notes[-1] == "2 images are also in data.train: results on them say little"


def test_evaluation_data_take_the_numbers_of_the_training_classes(two, write_coco):
    boxes = [(10, 4, [1, 1, 9, 9], {}), (10, 5, [1, 1, 9, 9], {})]
    val = write_coco([(20, 30)], boxes, ((4, "cow"), (5, "cat")), "val")
    config = DataConfig([split(source) for source in two], split(val))
    found = build_dataset(config, "val", False, classes=["cat", "dog", "cow"])
    assert found.classes == ["cat", "dog", "cow"] and found.labels[0].tolist() == [2, 0]
    assert found.category_ids == [5, 6, 4]  # dog, which the file lacks, has a new one
    with pytest.raises(DataError) as caught:
        build_dataset(config, "val", False, classes=["cat", "dog"])
    assert str(caught.value) == "data.val: needs the classes of data.train, ['cat', 'dog'], not ['cow', 'cat']"


def test_what_a_section_cannot_say(two):
    with pytest.raises(DataError, match="^data.train: must not be an empty list"):
        DataConfig([])
    with pytest.raises(DataError, match="^data.val.repeat: evaluation shows each image once: remove it$"):
        DataConfig(split(two[0]), split(two[0], repeat=2))


def test_repeat_factors_are_those_of_lvis():
    """Of 8 images, class 0 is in 8, class 1 in 2, class 2 in 1: with t = 0.5, r = 1, sqrt(2), 2."""
    labels = [np.array(each, dtype=np.int64) for each in [[0]] * 4 + [[0, 0, 1], [0, 1], [0, 2, 2], []]]
    factors = oversample(labels, [1.0] * 8, 0.5)
    assert factors == pytest.approx([1, 1, 1, 1, sqrt(2), sqrt(2), 2, 1])
    assert oversample(labels, [1.0] * 8, 0.0).tolist() == [1.0] * 8
    # Shown twice, the image with class 2 is two of nine images.
    assert oversample(labels, [1.0] * 6 + [2.0, 1.0], 0.5)[6] == pytest.approx(2 * sqrt(0.5 * 9 / 2))


def epoch_of(repeats, epoch=0, batch_size=4, world=1, start=0):
    """All keys of an epoch, of all processes, and its number of steps."""
    keys, steps, sizes = [], set(), [(30, 40), (40, 30)] * (len(repeats) // 2)
    for rank in range(world):
        sampler = TrainBatchSampler(sizes, batch_size, 7, True, rank, world, repeats)
        sampler.epoch, sampler.start = epoch, start
        batches = list(sampler)
        assert len(batches) == len(sampler) - start
        keys.append(batches)
        steps.add(len(sampler))
    return [[key for batches in step for key in batches] for step in zip(*keys, strict=True)], *steps


def test_whole_repeats_are_exact():
    steps, number = epoch_of([1, 2, 3, 1])
    keys = [key for step in steps for key in step]
    assert sorted(keys) == [(0, 0), (0, 1), (0, 1, 1), (0, 2), (0, 2, 1), (0, 2, 2), (0, 3)] and number == 2
    assert epoch_of([1.0] * 6) == epoch_of([1] * 6)  # and without repeats, keys have two numbers
    assert {len(key) for step in epoch_of([1] * 6)[0] for key in step} == {2}


@pytest.mark.parametrize("repeats", [[1.3] * 20, [1, 1.5] * 10, [2.2, 1.05] * 13, [1.0] * 9 + [1.6], [1.1] * 4])
def test_fractional_repeats_hold_on_average_and_epochs_are_equally_long(repeats):
    total = sum(int(r) for r in repeats) + round(sum(r % 1 for r in repeats))
    counts, epochs = Counter(), 1500
    for epoch in range(epochs):
        sampler = TrainBatchSampler([(30, 40)] * len(repeats), 4, 1, repeats=repeats)
        sampler.epoch = epoch
        assert sampler.shown == len(images := sampler._images()) == total
        times = Counter(index for index, *_ in images)
        assert all(int(r) <= times[i] <= int(r) + 1 for i, r in enumerate(repeats))
        counts += times
    rest = sum(r % 1 for r in repeats)
    for i, r in enumerate(repeats):  # a rest that is not a whole number is rounded
        assert counts[i] / epochs == pytest.approx(int(r) + r % 1 * round(rest) / rest, abs=0.06)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_and_a_resumed_epoch_share_what_is_drawn(world):
    repeats = [1.5, 1.2, 2.7, 1.0] * 5
    whole, number = epoch_of(repeats, 3, batch_size=6)
    steps, same = epoch_of(repeats, 3, batch_size=6 // world, world=world)
    assert number == same == 6 and [sorted(step) for step in steps[:-1]] == [sorted(step) for step in whole[:-1]]
    assert epoch_of(repeats, 3, 6 // world, world, start=2)[0] == steps[2:]
    assert epoch_of(repeats, 4, batch_size=6)[0] != whole


def test_an_image_that_is_shown_again_is_augmented_anew(two):
    config = DataConfig([split(two[0], repeat=6), split(two[1])], repeat_factor=0.9,
                        multi_scale=[(30 + 7 * k, 30 + 7 * k) for k in range(9)])
    dataset = build_dataset(config, "train", training=True, seed=2)
    assert dataset.repeats[2] == 6 and dataset.repeats[0] > 6 and dataset.repeats[3] > 1  # the third has no box
    sizes = {dataset[0, 0, k][1]["image_size"] if k else dataset[0, 0][1]["image_size"] for k in range(8)}
    assert len(sizes) > 3
    assert torch.equal(dataset[0, 0, 5][0], dataset[0, 0, 5][0])
    batches = list(build_loader(dataset, 2, True, workers=0, seed=2))
    assert sum(len(targets) for _, targets in batches) == round(sum(dataset.repeats))
    assert all(r == 1 for r in build_dataset(DataConfig(split(two[0])), "train", False).repeats)
