"""From configuration to detector: errors name the wrong key and the nearest valid name."""
from collections.abc import Sequence
from typing import Literal, get_args

import pytest
import torch
from small_models import make_batch, small_config, small_detector

from data.ranges import Some
from losses import LOSSES
from models import HEADS, ConfigError, build_detector
from models.build import build, check_arguments, check_value, nearest, parameters
from models.coders import DistancePointBBoxCoder


def change(path, value):
    """The small configuration with one entry changed, or removed if it is "DROP"."""
    cfg = small_config()
    *parents, last = path.split(".")
    section = cfg
    for name in parents:
        section = section.setdefault(name, {})
    if value == "DROP":
        del section[last]
    else:
        section[last] = value
    return cfg


UNKNOWN = [
    ("bakbone", {}, "backbone"), ("backbone.detph", 18, "depth"), ("backbone.type", "ResNt", "ResNet"),
    ("neck.out_chanels", 8, "out_channels"), ("neck.type", "FPM", "FPN"), ("head.num_class", 3, "num_classes"),
    ("head.type", "GFLHeads", "GFLHead"), ("head.stacked_conv", 4, "stacked_convs"),
    ("head.assigner", {"type": "ATSAssigner"}, "ATSSAssigner"),
    ("head.assigner", {"type": "ATSSAssigner", "top_k": 9}, "topk"),
    ("head.loss_cls", {"type": "QualityFocalLos"}, "QualityFocalLoss"),
    ("head.loss_bbox", {"type": "GIoULoss", "loss_wight": 2.0}, "loss_weight"),
    ("head.anchor_generator", {"type": "AnchorGenerator", "strides": [8], "ratio": [1.0]}, "ratios"),
    ("test.score_threshold", 0.1, "score_thr"), ("preprocess.maen", [0, 0, 0], "mean"),
]


@pytest.mark.parametrize("path, value, valid", UNKNOWN)
def test_unknown_keys_and_types_name_the_nearest(path, value, valid):
    with pytest.raises(ConfigError) as error:
        build_detector(change(path, value))
    assert error.value.key.startswith(f"model.{path}") and f'did you mean "{valid}"?' in str(error.value)
    assert "\n" not in str(error.value)


WRONG = [
    ("backbone.depth", "18", "one of 18, 34"), ("backbone.depth", 18.0, "one of 18, 34"),
    ("backbone.depth", True, "one of 18, 34"), ("backbone.groups", True, "an integer"),
    ("backbone.norm_eval", 1, "true or false"),
    ("backbone.style", "tensorflow", "pytorch, caffe"),
    ("backbone.out_indices", 3, "a list"), ("backbone.out_indices", [0, "1"], "an integer"),
    ("neck.add_extra_convs", "on_outputs", "on_output"), ("neck.num_outs", None, "an integer"),
    ("neck", "FPN", "a mapping"), ("backbone", None, "a mapping"), ("head.loss_cls", "FocalLoss", "a mapping"),
    ("head.pos_weight", "1", "a number"), ("head.reg_max", [16], "an integer"), ("test.nms_pre", 1.5, "an integer"),
    ("test", [], "a mapping"), ("test.clip", "later", "before, after"),
    ("preprocess.channel_order", "bgrr", "rgb, bgr"), ("preprocess.mean", [1, 2, "3"], "a number"),
    ("head.assigner.neg_iou_thr", 0.4, "type"),
]


@pytest.mark.parametrize("path, value, wanted", WRONG)
def test_wrong_types_are_refused(path, value, wanted):
    with pytest.raises(ConfigError) as error:
        build_detector(change(path, value))
    message = str(error.value)
    assert error.value.key.startswith("model." + path.rsplit(".neg_iou_thr")[0]) and wanted in message, message


@pytest.mark.parametrize("path", ["backbone", "head", "backbone.depth", "neck.num_outs", "neck.out_channels",
                                  "head.num_classes", "head.type", "backbone.type"])
def test_missing_keys_are_named(path):
    with pytest.raises(ConfigError) as error:
        build_detector(change(path, "DROP"))
    key = f"model.{path}"
    assert str(error.value).startswith(key.removesuffix(".type"))


def test_a_whole_number_is_a_number():
    assert build_detector(change("head.pos_weight", 2)).bbox_head.pos_weight == 2


def test_a_list_or_a_number():
    for value in (0.4, (0.1, 0.4), [0.1, 0.4]):
        cfg = small_config("RetinaHead", head={"assigner": {"type": "MaxIoUAssigner", "neg_iou_thr": value}})
        assert build_detector(cfg).bbox_head.assigner.neg_iou_thr[1] == 0.4
    cfg = small_config("RetinaHead", head={"assigner": {"type": "MaxIoUAssigner", "neg_iou_thr": [0.1, 0.2, 0.4]}})
    with pytest.raises(ConfigError, match="neg_iou_thr.*2 entries, not 3"):
        build_detector(cfg)


@pytest.mark.parametrize("path, value, message", [
    ("head.in_channels", 99, "model.head.in_channels: is 99 and the features have 16"),
    ("neck", None, "one width"),
    ("head.stacked_convs", -1, "stacked_convs"), ("head.num_classes", 0, "num_classes"),
    ("head.norm_cfg", {"type": "GN", "num_groups": 5}, "16 channels.*5 groups"),
    ("head.anchor_generator", {"type": "AnchorGenerator", "strides": [8], "ratios": [0.5, 1.0], "scales": [4]},
     "one scale and one ratio"),
])
def test_parts_that_do_not_fit(path, value, message):
    with pytest.raises(ConfigError, match=message):
        build_detector(change(path, value))


@pytest.mark.parametrize("path, value", [("neck.in_channels", [8, 16, 32]), ("neck.in_channels", [8, 16, 32, 65])])
def test_a_neck_that_does_not_fit_its_backbone_is_refused_at_once(path, value):
    with pytest.raises(ConfigError, match="in_channels"):
        build_detector(change(path, value))


POINTS = [[-1, 64], [64, 128], [128, 256], [256, 512], [512, 9999]]
CROSSED = [
    ("FCOSHead", "head", {"strides": [8, 16, 32]}, "head.regress_ranges: must have one entry per stride, 3"),
    ("FCOSHead", "head", {"strides": [4, 8, 16, 32, 64]}, "head.strides: are [4, 8, 16, 32, 64], and the feat"),
    ("FCOSHead", "head", {"regress_ranges": [*POINTS[:4], [512, 512]]}, "head.regress_ranges: must each go from a "),
    ("RetinaHead", "head", {"assigner": {"type": "MaxIoUAssigner", "neg_iou_thr": 0.6}},
     "head.assigner.neg_iou_thr: 0.6 must not be above pos_iou_thr 0.5"),
    ("RetinaHead", "head", {"assigner": {"type": "MaxIoUAssigner", "neg_iou_thr": [0.4, 0.1]}},
     "head.assigner.neg_iou_thr: [0.4, 0.1] must be a lower bound and an upper bound"),
    ("GFLHead", "neck", {"num_outs": 4}, "head.anchor_generator.strides: are [8, 16, 32, 64, 128], and the features"),
    ("GFLHead", "neck", {"start_level": 4}, "neck.start_level: levels 4..3 are not among the backbone's 0..3"),
    ("GFLHead", "neck", {"end_level": 7}, "neck.end_level: levels 1..7 are not among the backbone's 0..3"),
    ("GFLHead", "neck", {"upsample": {"scale_factor": 3}}, "neck.upsample_cfg.scale_factor: is 3, and the backbone's"),
]


@pytest.mark.parametrize("head, part, section, message", CROSSED)
def test_values_that_do_not_fit_each_other(head, part, section, message):
    with pytest.raises(ConfigError) as error:
        build_detector(small_config(head, **{"head": {}, part: section}))
    assert str(error.value).startswith(f"model.{message}")


def test_a_head_with_fewer_levels_than_there_are_features():
    anchors = {"type": "AnchorGenerator", "strides": [8, 16, 32], "ratios": [1.0], "scales": [8]}
    with pytest.raises(ConfigError, match="strides"):
        build_detector(change("head.anchor_generator", anchors))


def test_short_spellings():
    cfg = small_config(neck={"norm": "BN", "act": "ReLU", "upsample": {"mode": "bilinear"}}, head={"norm": "BN"})
    del cfg["head"]["norm_cfg"]
    model = build_detector(cfg)
    assert model.neck.upsample.mode == "bilinear" and "bbox_head.cls_convs.0.bn.weight" in model.state_dict()
    assert isinstance(model.neck.fpn_convs[0].activate, torch.nn.ReLU)


def test_an_argument_with_a_short_name_is_meant_itself():
    def call(norm: bool = False):
        return norm

    assert check_arguments(call, {"norm": True}, "key") == {"norm": True}
    assert build({"type": "call", "norm": True}, {"call": call}, "key") is True


def test_what_follows_from_another_part_may_be_said():
    cfg = small_config(neck={"in_channels": [8, 16, 32, 64]}, head={"in_channels": 16})
    assert build_detector(cfg).state_dict().keys() == build_detector(small_config()).state_dict().keys()


def test_nearest():
    assert nearest("depht", ["depth", "style"]) == 'did you mean "depth"?'
    assert nearest("xyz", ["depth", "style"]) == "valid: depth, style"


@pytest.mark.parametrize("value, hint, fits", [
    (1, float, True), (True, float, False), ("1e-3", float, False), (None, int | None, True), (None, int, False),
    ([1, 2], list[int], True), ((1, 2), list[int], True), ([1, 2], tuple[int, int], True),
    ([1], tuple[int, int], False), (1, Sequence[int], False), (["1"], Sequence[int], False),
    (1, Literal[1, 3], True), (True, Literal[1, 3], False), (1.0, Literal[1, 3], False), (2, Literal[1, 3], False),
    ([1], Some[int], True), ([], Some[int], False), ([1, 2, 3], tuple[int, ...], True),
    ("a", str | dict, True), ({}, str | dict, True), (1, str | dict, False)])
def test_check_value(value, hint, fits):
    if fits:
        check_value(value, hint, "key")
    else:
        with pytest.raises(ConfigError, match="^key"):
            check_value(value, hint, "key")


def test_a_type_without_arguments_takes_none():
    assert check_arguments(DistancePointBBoxCoder, {}, "coder") == {}
    with pytest.raises(ConfigError, match="coder.args: unknown key"):
        check_arguments(DistancePointBBoxCoder, {"args": 1}, "coder")


MISFITS = [
    ("RetinaHead", {"loss_bbox": {"type": "GIoULoss"}}, "loss_bbox", "GIoULoss compares boxes, and here numbers"),
    ("RetinaHead", {"loss_cls": {"type": "GIoULoss"}}, "loss_cls", "use FocalLoss"),
    ("RetinaHead", {"loss_cls": {"type": "QualityFocalLoss"}}, "loss_cls", "use FocalLoss"),
    ("GFLHead", {"loss_cls": {"type": "FocalLoss"}}, "loss_cls", "use QualityFocalLoss"),
    ("GFLHead", {"loss_dfl": {"type": "KnowledgeDistillationKLDivLoss"}}, "loss_dfl", "use DistributionFocalLoss"),
    ("GFLHead", {"loss_bbox": {"type": "DistributionFocalLoss"}}, "loss_bbox", "use L1Loss, SmoothL1Loss, IoULoss"),
    ("ATSSHead", {"loss_centerness": {"type": "L1Loss"}}, "loss_centerness", "use CrossEntropyLoss"),
    ("FCOSHead", {"loss_bbox": {"type": "CrossEntropyLoss"}}, "loss_bbox", "compares logits and probabilities"),
]


@pytest.mark.parametrize("head, section, key, part", MISFITS)
def test_a_loss_that_takes_something_else_is_refused(head, section, key, part):
    with pytest.raises(ConfigError) as error:
        build_detector(small_config(head, head=section))
    assert error.value.key == f"model.head.{key}.type" and part in error.value.problem


@pytest.mark.parametrize("head", ["RetinaHead", "GFLHead", "ATSSHead", "FCOSHead"])
def test_every_loss_of_every_head_takes_what_it_is_given(head):
    """Each loss that is not refused trains: its value and its gradients are finite, and the value is not negative."""
    images, targets = make_batch()
    keys = [name for name in parameters(HEADS[head]) if name.startswith("loss_")]
    assert all(get_args(parameters(HEADS[head])[key][0])[1].takes for key in keys) and len(keys) >= 2
    built = 0
    for key in keys:
        for name in LOSSES:
            try:
                model = small_detector(head, head={key: {"type": name}}).train()
            except ConfigError:
                continue
            built += 1
            losses = model.loss(images, targets)
            sum(losses.values()).backward()
            assert losses[key].isfinite() and losses[key] >= 0, (key, name)
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), (key, name)
    assert built >= len(keys) + 1
