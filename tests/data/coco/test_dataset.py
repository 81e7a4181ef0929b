import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data import CocoDataset, find_data

SHARED = Path(__file__).parents[3].parent / "shared" / "data"


def test_relative_paths_start_from_the_data_folder(monkeypatch):
    monkeypatch.delenv("DENSEKD_DATA", raising=False)
    assert find_data("coco/val.json") == Path("datasets/coco/val.json")
    monkeypatch.setenv("DENSEKD_DATA", os.path.join(os.sep, "mnt", "sets"))
    assert find_data("coco/val.json") == Path("/mnt/sets/coco/val.json")
    assert find_data("/elsewhere/val.json") == Path("/elsewhere/val.json")


def test_labels_number_the_category_ids_and_lead_back(write_coco):
    categories = ((90, "toothbrush"), (3, "car"), (17, "cat"))
    boxes = [(10, 17, [1, 1, 9, 9], {}), (10, 90, [2, 2, 9, 9], {}), (10, 3, [3, 3, 9, 9], {})]
    dataset = CocoDataset(*write_coco([(40, 40)], boxes, categories), training=False)
    assert dataset.classes == ["car", "cat", "toothbrush"]
    assert dataset.category_ids == [3, 17, 90]
    assert dataset.num_classes == 3
    _, target = dataset[0]
    assert target["labels"].dtype == torch.int64
    assert [dataset.category_ids[label] for label in target["labels"]] == [17, 90, 3]


def test_crowds_are_ignored_and_degenerate_boxes_dropped_and_counted(write_coco):
    boxes = [
        (10, 1, [5, 6, 10, 12], {}),
        (10, 1, [0, 0, 30, 30], {"iscrowd": 1}),
        (10, 1, [5, 5, 0.9, 9], {}),  # thinner than a pixel
        (10, 1, [40, 5, 9, 9], {}),  # right of the image
        (10, 1, [5, -9, 9, 9], {}),  # above it, touching
        (10, 1, [5, 5, 9, 9], {"area": 0}),
        (10, 1, [5, 5, 9, 9], {"ignore": 1}),
        (10, 2, [35, -2, 10, 10], {}),  # partly outside: kept
    ]
    dataset = CocoDataset(*write_coco([(40, 40)], boxes), training=False, scale=(40, 40))
    assert dataset.num_dropped_boxes == 5
    assert dataset.boxes[0].tolist() == [[5, 6, 15, 18], [35, -2, 45, 8]]
    _, target = dataset[0]
    assert target["boxes"].tolist() == [[5, 6, 15, 18], [35, 0, 40, 8]]  # clipped on resizing
    assert target["labels"].tolist() == [0, 1]
    assert target["ignored_boxes"].tolist() == [[0, 0, 30, 30]]


def test_a_sliver_that_rounding_leaves_nothing_of_is_no_box(write_coco):
    sliver = [-8, 5, 8 + 1e-7, 9]  # it is so thin in the image that both edges are equal in float32 after the flip
    source = write_coco([(40, 60)], [(10, 1, sliver, {}), (10, 2, [5, 5, 9, 9], {})])
    for flip in (0.0, 1.0):
        _, target = CocoDataset(*source, training=True, scale=(60, 40), flip=flip)[0]
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        assert len(target["boxes"]) == len(target["labels"]) and target["labels"][-1] == 1
    assert len(target["boxes"]) == 1


def test_images_without_boxes_are_kept_unless_skipped_in_training(write_coco):
    source = write_coco([(40, 40)] * 3, [(11, 1, [1, 1, 9, 9], {}), (12, 1, [1, 1, 9, 9], {"iscrowd": 1})])
    kept = CocoDataset(*source, training=True)
    assert kept.image_ids == [10, 11, 12]
    _, target = kept[0]
    assert (
        target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and target["ignored_boxes"].shape == (0, 4)
    )
    skipped = CocoDataset(*source, training=True, skip_empty=True)
    assert skipped.image_ids == [11] and skipped.num_skipped_images == 2
    assert skipped[0][1]["image_id"] == 11
    assert CocoDataset(*source, training=False, skip_empty=True).image_ids == [10, 11, 12]


def test_a_sample_follows_the_contract(write_coco):
    dataset = CocoDataset(*write_coco([(48, 64)], [(10, 1, [16, 12, 32, 24], {})]), training=False, scale=(100, 90))
    image, target = dataset[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 75, 100)
    assert target["image_size"] == (75, 100) and target["pad_size"] == (96, 128)
    assert target["original_size"] == (48, 64) and target["image_id"] == 10
    assert target["boxes"].dtype == torch.float32
    np.testing.assert_allclose(target["boxes"], [[25, 18.75, 75, 56.25]])


def test_training_flips_image_and_boxes_together(write_coco):
    source = write_coco([(40, 60)], [(10, 1, [0, 6, 20, 10], {}), (10, 1, [50, 6, 10, 10], {"iscrowd": 1})])
    plain, plain_target = CocoDataset(*source, training=True, scale=(60, 40), flip=0.0)[0]
    flipped, flipped_target = CocoDataset(*source, training=True, scale=(60, 40), flip=1.0)[0]
    assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)
    assert plain_target["boxes"].tolist() == [[0, 6, 20, 16]]
    assert flipped_target["boxes"].tolist() == [[40, 6, 60, 16]]
    assert flipped_target["ignored_boxes"].tolist() == [[0, 6, 10, 16]]
    assert torch.equal(CocoDataset(*source, training=False, scale=(60, 40), flip=1.0)[0][0], plain)


def test_draws_vary_with_epoch_seed_and_image_and_with_nothing_else(write_coco):
    scales = [(60, 40), (90, 60), (120, 80)]
    source = write_coco([(40, 60)] * 12, [(10, 1, [0, 6, 20, 10], {})])

    def draws(seed, epoch, order):
        dataset = CocoDataset(*source, training=True, multi_scale=scales, seed=seed)
        return {i: (dataset[epoch, i][1]["image_size"], dataset._draw_augmentation(epoch, i)[1]) for i in order}

    first = draws(0, 0, range(12))
    assert {size for size, _ in first.values()} == {(40, 60), (60, 90), (80, 120)}
    assert {flip for _, flip in first.values()} == {False, True}
    assert draws(0, 0, reversed(range(12))) == first
    assert draws(0, 1, range(12)) != first
    assert draws(1, 0, range(12)) != first
    dataset = CocoDataset(*source, training=False, multi_scale=scales, scale=(60, 40))
    assert {dataset[0, i][1]["image_size"] for i in range(12)} == {(40, 60)}


def test_changing_a_target_leaves_the_data_set_as_it_is(write_coco):
    dataset = CocoDataset(*write_coco([(40, 40)], [(10, 2, [1, 2, 9, 9], {})]), training=False, scale=(40, 40))
    _, target = dataset[0]
    target["boxes"] += 5
    target["labels"] += 1
    assert dataset[0][1]["boxes"].tolist() == [[1, 2, 10, 11]]
    assert dataset[0][1]["labels"].tolist() == [1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data (BCCD), which is not part of the project")
@pytest.mark.parametrize(("split", "count"), [("train", 205), ("val", 87), ("test", 72)])
def test_bccd(split, count):
    file = SHARED / "bccd" / "annotations" / f"{split}.json"
    dataset = CocoDataset(SHARED / "bccd" / "images", file, training=False, scale=(320, 240))
    assert len(dataset) == count
    assert dataset.classes == ["RBC", "WBC", "Platelets"]
    image, target = dataset[0]
    assert image.shape == (3, 240, 320) and target["pad_size"] == (256, 320) and len(target["boxes"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data (coco128), which is not part of the project")
def test_coco128():
    folder = SHARED / "coco128"
    dataset = CocoDataset(folder / "val2017", folder / "annotations" / "instances_val2017.json", training=False)
    assert len(dataset) == 128 and dataset.num_classes == 80
    assert dataset.classes[79] == "toothbrush"
    for index in range(0, 128, 16):
        image, target = dataset[index]
        assert image.shape[1:] == target["image_size"] and max(image.shape) <= 1333
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
