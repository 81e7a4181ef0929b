"""`train.prefetch` and `distill.teacher_stream`, which change when something is computed, and not what."""
import pytest
import torch
from runs import config, config_with
from small_models import make_batch, small_distiller, teacher_entry

from data.sources.scenes import generate_scenes
from kd.config import parse_config
from kd.engine.prefetch import prefetched
from kd.engine.run import build_run
from models import ConfigError


@pytest.mark.parametrize("key", ["train.prefetch", "distill.teacher_stream"])
def test_they_need_cuda(tmp_path, key):
    scenes = generate_scenes(tmp_path / "scenes", train=1, val=1, size=(64, 64))
    section, name = key.split(".")
    distill = {"teacher": teacher_entry(), "methods": [{"type": "PKD"}]}
    cfg = config_with(config(scenes, distill=distill), **{section: {name: True}})
    with pytest.raises(ConfigError, match=f"{key}: needs CUDA: remove it"):
        build_run(parse_config(cfg), tmp_path, torch.device("cpu"))


def test_a_sharded_teacher_has_no_stream_of_its_own():
    with pytest.raises(ConfigError, match="distill.teacher_stream: does not work with distill.teacher.shard"):
        small_distiller({"type": "PKD"}, teacher=teacher_entry() | {"shard": True}, teacher_stream=True)


@pytest.mark.gpu
def test_prefetched_images_are_the_loaders():
    images, targets = make_batch(dtype=torch.float32)
    steps = [[(images + i, targets)] for i in range(5)]
    pinned = ([(x.pin_memory(), t) for x, t in batches] for batches in steps)
    sums = []
    for (x, t), in prefetched(pinned, torch.device("cuda")):
        assert x.is_cuda and t is targets
        sums.append(x.sum())
    assert [float(x) for x in sums] == pytest.approx([float(x.sum()) for (x, _), in steps], rel=1e-4)


@pytest.mark.gpu
def test_a_teacher_on_its_own_stream_gives_the_same_losses():
    distiller = small_distiller({"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "FGD"}).cuda()
    images, targets = make_batch()
    batch = images.cuda(), [{k: v.cuda() if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]
    expected = distiller(*batch)
    distiller.stream = torch.cuda.Stream()
    for _ in range(3):
        torch.testing.assert_close(distiller(*batch), expected, rtol=1e-9, atol=0)
