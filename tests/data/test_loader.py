import pytest
import torch

from data import CocoDataset, DataConfig, DataError, Split, build_dataset, build_loader, collate


@pytest.fixture
def source(write_coco):
    sizes = [(40, 60), (60, 40), (50, 60)] * 4
    return write_coco(sizes, [(10 + i, 1 + i % 2, [i, 2, 20, 30], {}) for i in range(12)])


def training_loader(source, workers, worker_start=None):
    dataset = CocoDataset(*source, training=True, multi_scale=[(60, 40), (90, 60)], seed=3)
    return build_loader(dataset, 2, training=True, workers=workers, seed=3, worker_start=worker_start)


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for (images, targets), (other_images, other_targets) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images)
        assert [target["image_id"] for target in targets] == [target["image_id"] for target in other_targets]
        for target, other in zip(targets, other_targets, strict=True):
            assert torch.equal(target["boxes"], other["boxes"])


def test_collate_pads_with_zeros_to_a_multiple_of_32():
    small, large = torch.full((3, 20, 70), 7, dtype=torch.uint8), torch.full((3, 33, 40), 9, dtype=torch.uint8)
    images, targets = collate([(small, {"image_id": 1}), (large, {"image_id": 2})])
    assert images.shape == (2, 3, 64, 96) and images.dtype == torch.uint8
    assert torch.equal(images[0, :, :20, :70], small) and torch.equal(images[1, :, :33, :40], large)
    assert images.sum() == small.sum() + large.sum()  # the rest is zero
    assert [target["image_id"] for target in targets] == [1, 2]


def test_batches_depend_neither_on_workers_nor_on_the_global_random_state(source):
    loaders = [training_loader(source, workers) for workers in (0, 1, 2)]
    for epoch in (0, 1):  # the workers of the first epoch also work in the second
        epochs = []
        for loader in loaders:
            torch.manual_seed(len(epochs))
            loader.batch_sampler.epoch = epoch
            before = torch.random.get_rng_state()
            epochs.append(list(loader))
            assert torch.equal(torch.random.get_rng_state(), before)
        assert_same(epochs[0], epochs[1])
        assert_same(epochs[0], epochs[2])
        if epoch == 0:
            first = epochs[0]
    assert [t["image_id"] for _, ts in first for t in ts] != [t["image_id"] for _, ts in epochs[0] for t in ts]


@pytest.mark.parametrize("worker_start", ["fork", "spawn"])
def test_batches_do_not_depend_on_how_workers_start(source, worker_start):
    loader, plain = training_loader(source, 1, worker_start), training_loader(source, 0)
    for epoch, start in ((0, 0), (3, 2)):
        for one in (loader, plain):
            one.batch_sampler.epoch, one.batch_sampler.start = epoch, start
        assert_same(list(loader), list(plain))
    assert loader.multiprocessing_context.get_start_method() == worker_start


def test_a_way_to_start_workers_that_the_system_lacks(source, monkeypatch):
    monkeypatch.setattr("data.loader.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(DataError) as caught:
        training_loader(source, 1, "fork")
    assert str(caught.value) == "data.worker_start=fork does not exist on this system: remove it"
    monkeypatch.setattr("data.loader.sys.platform", "darwin")
    assert training_loader(source, 1).multiprocessing_context.get_start_method() == "spawn"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_yields_the_same_batches(source, workers):
    whole = training_loader(source, workers)
    whole.batch_sampler.epoch = 4
    batches = list(whole)
    resumed = training_loader(source, workers)
    resumed.batch_sampler.epoch, resumed.batch_sampler.start = 4, 2
    assert_same(batches[2:], list(resumed))
    assert_same(batches, list(resumed))  # and the next epoch is whole again


def test_resharding_shows_the_same_images(source):
    """Two processes get the same images as one process, in any order within a step."""

    def images(rank, world):
        dataset = CocoDataset(*source, training=True, seed=3)
        loader = build_loader(dataset, 4 // world, training=True, workers=0, seed=3, rank=rank, world=world)
        return [{t["image_id"]: t["boxes"].tolist() for t in targets} for _, targets in loader]

    single, first, second = images(0, 1), images(0, 2), images(1, 2)
    assert single == [a | b for a, b in zip(first, second, strict=True)]


def test_evaluation_yields_every_image_once_unpadded_by_others(source):
    dataset = CocoDataset(*source, training=False, scale=(60, 40))
    batches = list(build_loader(dataset, 3, training=False, workers=0))
    assert sorted(t["image_id"] for _, targets in batches for t in targets) == dataset.image_ids
    for images, targets in batches:
        assert {target["pad_size"] for target in targets} == {tuple(images.shape[-2:])}


def test_build_dataset_takes_what_the_section_says(source):
    folder, file = str(source[0]), str(source[1])
    section = DataConfig(train=Split(folder, file), scale=(90, 60), flip=0.0, batch_size=4)
    config = DataConfig(train=Split(folder, file), val=Split(folder, file), scale=(90, 60), flip=0.0)
    from_section = build_dataset(section, "train", training=True, seed=1)
    from_config = build_dataset(config, "val", training=True, seed=1)
    assert torch.equal(from_section[0][0], from_config[0][0])
    assert from_section[0][1]["image_size"] == (60, 90)
    assert from_section.seed == 1
