from collections import Counter

import pytest

from data import EvalBatchSampler, TrainBatchSampler

LANDSCAPE, PORTRAIT, SQUARE = (30, 40), (40, 30), (40, 40)
SIZES = [LANDSCAPE] * 23 + [PORTRAIT] * 11 + [SQUARE] * 3


def indices(batches):
    return [index for batch in batches for _, index in batch]


def test_groups_keep_aspects_apart_and_lose_no_image():
    sampler = TrainBatchSampler(SIZES, batch_size=4, seed=0)
    batches = list(sampler)
    assert sorted(indices(batches)) == list(range(len(SIZES)))
    assert len(batches) == len(sampler) == 10
    assert [len(batch) for batch in batches] == [4] * 9 + [1]
    portrait = [{SIZES[index] == PORTRAIT for _, index in batch} for batch in batches]
    # 26 landscape or square images fill 6 batches, 11 portrait images fill 2; the last two batches are mixed.
    assert all(len(kinds) == 1 for kinds in portrait[:8])
    assert portrait[:8].count({True}) == 2
    mixed = [len({SIZES[i] == PORTRAIT for _, i in batch}) for batch in TrainBatchSampler(SIZES, 4, 0, False)]
    assert mixed.count(2) > 2


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = TrainBatchSampler(SIZES, 4, seed)
        sampler.epoch = epoch
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert {epoch for batch in order(0, 3) for epoch, _ in batch} == {3}
    assert indices(order(0, 3)) != indices(order(0, 4))
    assert indices(order(0, 3)) != indices(order(1, 3))
    assert indices(order(0, 3)) != list(range(len(SIZES)))


@pytest.mark.parametrize("world", [1, 2])
def test_start_continues_an_epoch_once(world):
    sampler = TrainBatchSampler(SIZES, 4, seed=0, rank=world - 1, world=world)
    whole = list(sampler)
    sampler.start = 3
    assert list(sampler) == whole[3:]
    assert sampler.start == 0
    assert list(sampler) == whole
    assert len(sampler) == len(whole)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 37])
def test_processes_share_the_batches_of_one(world, count):
    sizes = (SIZES[::-1] * 2)[:count]
    shards = [list(TrainBatchSampler(sizes, 2, seed=5, rank=rank, world=world)) for rank in range(world)]
    single = list(TrainBatchSampler(sizes, 2 * world, seed=5))
    steps = list(zip(*shards, strict=True))  # strict: every process has the same number of batches
    assert len(steps) == len(single) == len(TrainBatchSampler(sizes, 2, seed=5, world=world))
    for step, batch in zip(steps[:-1], single[:-1], strict=True):
        assert sorted(indices(step)) == sorted(indices([batch]))
    assert all(len({len(batch) for batch in step}) == 1 for step in steps)
    seen = Counter(indices(indices_of for shard in shards for indices_of in [[*batch] for batch in shard]))
    assert set(seen) == set(range(count))
    assert sum(seen.values()) == count + -count % world


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_sees_every_image_once_in_batches_of_one_size(world, batch_size):
    sizes = [(240, 320), (250, 300), (320, 240), (257, 320)] * 7  # the first two are padded to the same size
    samplers = [EvalBatchSampler(sizes, batch_size, rank, world) for rank in range(world)]
    batches = [batch for sampler in samplers for batch in sampler]
    assert sorted(indices(batches)) == list(range(len(sizes)))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]
    kinds = [0, 0, 1, 2]
    assert all(len({kinds[index % 4] for _, index in batch}) == 1 for batch in batches)
    assert max(len(batch) for batch in batches) == batch_size
    assert len(batches) == (4 + 2 + 2 if batch_size == 4 else 28)
    alone = {tuple(batch) for batch in EvalBatchSampler(sizes, batch_size)}
    assert {tuple(batch) for batch in batches} == alone  # the same batches for any number of processes
