"""Kernels, waits and bytes of a call; and ceilings for the kernels of CrossKD's training steps."""
import pytest
import torch
from torch import nn

from kd import build_distiller, load_config
from kd.benchmark.launches import Launches, count_launches
from kd.benchmark.steps import make_batch, prepare
from kd.benchmark.timing import with_flops
from kd.benchmark.workload import Workload
from kd.optim import build_optimizer
from losses import total_loss

NARROW = {"backbone": {"base_channels": 8, "frozen_stages": 1}, "neck": {"out_channels": 32},
          "head": {"in_channels": 32, "feat_channels": 32}}
WORK = Workload(size=(96, 128), batch=2, boxes=3)


def test_views_and_allocation_are_no_kernels():
    x = torch.ones(4, 6)
    assert count_launches(lambda: x.t()[1:].reshape(-1).detach().unsqueeze(0)) == Launches(1, 0, 160)  # a copy
    assert count_launches(lambda: torch.empty(3)) == Launches(0, 0, 0)
    assert count_launches(lambda: x + x) == Launches(1, 0, 3 * 96)


def test_waits():
    x = torch.ones(4)
    assert count_launches(lambda: float(x.sum())).waits == 1
    assert count_launches(lambda: x[x > 0]).waits == 1
    assert count_launches(lambda: x.nonzero()).waits == 1
    assert count_launches(lambda: x[torch.tensor([0, 1])]).waits == 0


def test_backward_counts_and_bytes_of_convolutions_do_not():
    conv, x = nn.Conv2d(2, 3, 3), torch.ones(1, 2, 5, 5)
    assert count_launches(lambda: conv(x)) == Launches(1, 0, 0)
    assert count_launches(lambda: conv(x).sum().backward()).kernels > 3


def test_operations_of_fused_convolutions_count():
    from models.backbones.resnet import ResNet

    backbone, x = ResNet(50, base_channels=8).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        fused = with_flops(lambda: backbone(x))[1]
    assert fused == with_flops(lambda: backbone(x))[1] > 0  # with gradients nothing is fused


@pytest.mark.parametrize("path, most", [("configs/crosskd/crosskd_r18_gfl_r50_1x.yaml", 1500),
                                        ("configs/crosskd/crosskd_r18_retinanet_r50_1x.yaml", 1300)])
def test_ceiling_of_a_step(path, most):
    """The number of kernels does not depend on the width, so the networks here are narrow."""
    cfg = narrow(path)
    model = build_distiller(cfg).train()
    images, targets = make_batch(WORK, torch.device("cpu"), 80)
    images = model.student.preprocess(images, targets)
    optimizer = build_optimizer(cfg.optimizer, model, 2)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        total_loss(model.loss(images, targets)).backward()
        optimizer.step()

    step()
    found = count_launches(step)
    assert found.kernels <= most and found.waits <= 1


def narrow(path: str) -> object:
    """A configuration with narrow networks and without weights."""
    cfg = prepare(load_config(path), WORK)
    teacher = cfg.teachers[0]
    made = load_config(teacher.cfg).model if teacher.model is None else teacher.model
    for section in (cfg.model, made):
        for part, values in NARROW.items():
            getattr(section, part).update(values)
        section.backbone.pop("weights", None)
        section.head["num_classes"] = 80
    teacher.cfg, teacher.model = None, made
    return cfg
