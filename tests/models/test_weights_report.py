"""Checkpoints that do not fit: no partial loads, and no part stays untrained unless the caller allows it."""

import pytest
import torch
from torch import nn

from models.weights import CheckpointError, load_weights


class Detector(nn.Module):
    """A module with only the names that matter, not a whole detector."""

    def __init__(self, classes=3):
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.add_module("conv1", nn.Conv2d(3, 4, 3))
        self.backbone.add_module("bn1", nn.BatchNorm2d(4))
        self.neck = nn.Sequential()
        self.neck.add_module("lateral_convs", nn.Conv2d(4, 4, 1))
        self.bbox_head = nn.Sequential()
        self.bbox_head.add_module("retina_cls", nn.Conv2d(4, classes, 3))


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def refused(model, source, **options):
    """The message of the error; checks that it is one line and that the model has not changed."""
    before = copy_of(model)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, source, **options)
    assert_unchanged(model, before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_names_are_an_error(tmp_path):
    state = copy_of(Detector())
    del state["backbone.bn1.running_var"], state["neck.lateral_convs.weight"]
    path = tmp_path / "partial.pth"
    torch.save({"meta": {}, "state_dict": state}, path)
    message = refused(Detector(), path)
    assert message.startswith(f"mmdet2 checkpoint {path} does not fit the model, 8 of 10 tensors match")
    assert "missing 2 (backbone.bn1.running_var, neck.lateral_convs.weight)" in message
    assert "allow_missing" in message


def test_other_shapes_are_an_error():
    message = refused(Detector(classes=3), copy_of(Detector(classes=80)))
    assert "other shapes for 2 (bbox_head.retina_cls.weight (model (3, 4, 3, 3), file (80, 4, 3, 3)), " in message


def test_another_model_is_an_error():
    message = refused(Detector(), {"encoder.weight": torch.ones(2)})
    assert "0 of 10 tensors match" in message and "in the file only 1 (encoder.weight)" in message


def test_allow_missing_covers_missing_and_other_shapes(reported):
    model, other = Detector(classes=3), Detector(classes=80)
    before, state = copy_of(model), copy_of(other)
    del state["neck.lateral_convs.bias"]
    report = load_weights(model, state, allow_missing=["bbox_head.retina_cls.*", "neck.*.bias"])
    assert (report.matched, report.total, report.missing) == (7, 10, ["neck.lateral_convs.bias"])
    assert report.mismatched[1] == ("bbox_head.retina_cls.bias", (3,), (80,))
    for name, value in model.state_dict().items():
        kept = name in ("neck.lateral_convs.bias", "bbox_head.retina_cls.weight", "bbox_head.retina_cls.bias")
        assert torch.equal(value, before[name] if kept else state[name]), name
    assert "7 of 10 tensors; left as they were: 3 (neck.lateral_convs.bias" in reported()


def test_allow_missing_must_cover_all():
    state = copy_of(Detector())
    del state["neck.lateral_convs.bias"], state["bbox_head.retina_cls.bias"]
    message = refused(Detector(), state, allow_missing="bbox_head.*")
    assert "missing 1 (neck.lateral_convs.bias)" in message


def test_counters_never_count():
    state = {name: value for name, value in copy_of(Detector()).items() if "num_batches" not in name}
    report = load_weights(Detector(), state)
    assert report.matched == report.total == 10
    report = load_weights(Detector(), {**state, "backbone.other.num_batches_tracked": torch.tensor(1)})
    assert not report.unexpected


def test_backbone_file_onto_a_detector():
    model, source = Detector(), Detector()
    before = copy_of(model)
    state = source.backbone.state_dict()
    message = refused(model, state)
    assert "6 of 10 tensors match: missing 4 (neck.lateral_convs.weight" in message
    report = load_weights(model, state, allow_missing=["neck.*", "bbox_head.*"])
    assert report.matched == 6 and not report.unexpected
    assert torch.equal(model.backbone.conv1.weight, source.backbone.conv1.weight)
    assert torch.equal(model.neck.lateral_convs.weight, before["neck.lateral_convs.weight"])


@pytest.mark.parametrize("part", ["backbone", "neck", "bbox_head"])
def test_detector_file_onto_a_part(part):
    source, model = Detector(), Detector()
    report = load_weights(getattr(model, part), copy_of(source))
    assert report.matched == report.total
    for name, value in getattr(model, part).state_dict().items():
        assert torch.equal(value, getattr(source, part).state_dict()[name])
    assert report.unexpected and not any(name.startswith(f"{part}.") for name in report.unexpected)


@pytest.mark.parametrize("content", [{}, {"meta": {}}, {"state_dict": {}}, {"model": {"a": "text"}}, [1, 2]])
def test_file_without_weights(tmp_path, content):
    path = tmp_path / "empty.pth"
    torch.save(content, path)
    assert f"checkpoint {path}: holds" in refused(Detector(), path)


def test_names_in_messages_stay_on_one_line():
    state = copy_of(Detector())
    del state["neck.lateral_convs.bias"]
    refused(Detector(), {**state, "a\nb\x1b[31m": torch.ones(1), "c" * 5000: torch.ones(1)})


def test_two_names_for_one_tensor():
    state = {
        **copy_of(Detector()),
        "bbox_head.fcos_cls.weight": torch.ones(1),
        "bbox_head.conv_cls.weight": torch.ones(1),
    }
    assert "two of its tensors have the same name bbox_head.conv_cls.weight" in refused(Detector(), state)


def test_mmdet1_names_of_fcos():
    state = {"bbox_head.fcos_centerness.weight": torch.ones(1), **copy_of(Detector())}
    assert load_weights(Detector(), state).unexpected == ["bbox_head.conv_centerness.weight"]
