"""The original code's own files: each loads completely, with the values in the golden weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models import build_detector
from models.weights import load_weights

GOLDEN = Path(__file__).parents[4] / "shared" / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"
pytestmark = pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="../shared/golden/checkpoints is not here")


def detector(head, depth=18, width=8, channels=32, classes=6, extra="on_output", **backbone):
    neck = {"type": "FPN", "out_channels": channels, "start_level": 1, "num_outs": 5, "add_extra_convs": extra}
    return build_detector(
        {
            "backbone": {"type": "ResNet", "depth": depth, "base_channels": width, "stem_channels": width, **backbone},
            "neck": neck,
            "head": {"type": head, "num_classes": classes, "stacked_convs": 4, "feat_channels": channels},
        }
    )


CAFFE = {"style": "caffe", "norm_cfg": {"type": "FrozenBN"}, "extra": "on_input"}
CASES = {  # file, part, model, golden weights, format, tensors
    "mmdet3": ("mmdet3_gfl_tiny.pth", None, ("GFLHead", {}), "weights_gfl_student", "mmdet3", 149),
    "mmdet2": ("mmdet2_retinanet_tiny.pth", None, ("RetinaHead", {}), "weights_retinanet_student", "mmdet2", 136),
    "fgd-student": ("fgd_gfl_tiny.pth", "student", ("GFLHead", {}), "weights_gfl_student", "fgd", 149),
    "fgd-teacher": ("fgd_gfl_tiny.pth", "teacher", ("GFLHead", {"depth": 50}), "weights_gfl_teacher", "fgd", 314),
    "detectron2": (
        "detectron2_retinanet_tiny.pkl",
        None,
        ("RetinaHead", {"depth": 50, **CAFFE}),
        "detectron2_retinanet_smooth_l1",
        "detectron2",
        301,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loads_whole(case):
    name, part, (head, options), golden, format_name, count = CASES[case]
    model = detector(head, **options)
    report = load_weights(model, CHECKPOINTS / name, part=part)
    assert (report.format, report.matched, report.total) == (format_name, count, count)
    assert not report.unexpected
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    listed = np.load(GOLDEN / f"{golden}.npz")
    values = {key.removeprefix("state_dict/"): listed[key] for key in listed if key.startswith("state_dict/")}
    if case != "detectron2":
        assert state.keys() == values.keys()
        for key, value in state.items():
            assert np.array_equal(value.numpy(), values[key]), key
        return
    # The names are different there: a few are checked by hand, and all as a collection.
    pairs = {
        "backbone.layer1.0.downsample.1.running_mean": "backbone.bottom_up.res2.0.shortcut.norm.running_mean",
        "backbone.bn1.weight": "backbone.bottom_up.stem.conv1.norm.weight",
        "neck.lateral_convs.1.conv.bias": "backbone.fpn_lateral4.bias",
        "neck.fpn_convs.3.conv.weight": "backbone.top_block.p6.weight",
        "bbox_head.reg_convs.3.conv.weight": "head.bbox_subnet.6.weight",
        "bbox_head.retina_cls.bias": "head.cls_score.bias",
    }
    for ours, theirs in pairs.items():
        assert np.array_equal(state[ours].numpy(), values[theirs]), ours
    sums = sorted(float(np.float64(value).sum()) for value in values.values())
    assert sorted(float(value.double().sum()) for value in state.values()) == pytest.approx(sums, rel=1e-9, abs=1e-9)


def test_checkpoint_of_a_real_run():
    model = detector("GFLHead", width=32, channels=64, classes=3)
    report = load_weights(model, CHECKPOINTS / "mmdet3_gfl_r18w32_bccd.pth")
    assert report.matched == report.total == 149 and not report.unexpected
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
