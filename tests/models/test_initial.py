"""A detector that starts from another one: which weights and which rows of classes it takes, and what is refused."""
import copy

import pytest
import torch
from small_models import make_batch, small_config, small_detector

from models import ConfigError, build_detector
from models.checkpoints.classes import coco_classes, match_classes
from models.checkpoints.convert import to_mmdet, to_torchvision
from models.initial import load_initial
from models.weights import CheckpointError

HEADS = ["GFLHead", "RetinaHead", "ATSSHead", "FCOSHead"]
OURS, THEIRS = ["cat", "newt", "dog"], ["dog", "owl", "cat", "eel"]
FROM_CAT_AND_DOG = [2, None, 0]  # for each of ours, the number among theirs


def detector(kind="GFLHead", classes=3, seed=0, width=16, sections={}, **head):
    """A detector whose classifier has random weights and biases, so that no two rows are equal."""
    torch.manual_seed(seed)
    model = build_detector(small_config(kind, width=width, head={"num_classes": classes, **head}, **sections))
    conv = getattr(model.bbox_head, model.bbox_head.classifier)
    torch.nn.init.normal_(conv.weight, std=0.1)
    torch.nn.init.normal_(conv.bias)
    return model


def own(model, classes, **more):
    return {"format": "densekd", "model": model.state_dict(), "classes": classes, **more}


def rows(model):
    """The classifier's weights and biases: (anchors, classes, ...)."""
    conv = getattr(model.bbox_head, model.bbox_head.classifier)
    return [value.detach().unflatten(0, (-1, model.bbox_head.num_classes)) for value in (conv.weight, conv.bias)]


def check_rows(model, before, source, numbers):
    """Each class has the source's row of that number, at each anchor, and its own earlier row where that is None."""
    for now, old, theirs in zip(rows(model), rows(before), rows(source)):
        for k, number in enumerate(numbers):
            assert torch.equal(now[:, k], old[:, k] if number is None else theirs[:, number]), (k, number)


@pytest.mark.parametrize("kind", HEADS)
def test_weights_and_classes_of_our_own_checkpoint(kind):
    source, model = detector(kind, 4, seed=1), small_detector(kind, dtype=torch.float32)
    before = copy.deepcopy(model)
    report = load_initial(model, own(source, THEIRS), OURS)
    classifier = f"bbox_head.{model.bbox_head.classifier}."
    for name, value in model.state_dict().items():
        assert name.startswith(classifier) or torch.equal(value, source.state_dict()[name]), name
    check_rows(model, before, source, FROM_CAT_AND_DOG)
    assert rows(model)[0].shape[0] == (9 if kind == "RetinaHead" else 1)
    prior = torch.tensor(-4.59511985013459)
    assert torch.allclose(rows(model)[1][:, 1], prior) and rows(model)[0][:, 1].std() < 0.02  # as the head was built
    assert report.matched == {"cat": "cat", "dog": "dog"} and report.new == ["newt"] and not report.kept
    lines = str(report).splitlines()
    assert len(lines) == 3 and "tensors taken: backbone 100 of 100, neck 16 of 16, bbox_head" in lines[1]
    assert lines[2] == "  classes found among the checkpoint's names: 2 (cat, dog); new classes: 1 (newt)"


@pytest.mark.parametrize("kind", HEADS)
def test_predictions_are_the_same_under_other_numbers(kind):
    """The classes in another order: at every anchor the same boxes, and the logits in the new places."""
    source, model = detector(kind, seed=1).eval(), detector(kind).eval()
    load_initial(model, own(source, ["dog", "newt", "cat"]), OURS)
    with torch.no_grad():
        theirs, ours = (each.run(*make_batch(dtype=torch.float32)).outputs for each in (source, model))
    assert torch.equal(ours.cls, theirs.cls[..., [2, 1, 0]]) and not torch.equal(ours.cls, theirs.cls)
    assert torch.equal(ours.box, theirs.box)


def test_as_many_classes_are_still_matched_by_name():
    source, model = detector(seed=1), detector()
    before = copy.deepcopy(model)
    load_initial(model, own(source, ["dog", "newt", "owl"]), OURS)
    check_rows(model, before, source, [None, 1, 0])


@pytest.mark.parametrize("wanted, given, found", [
    (["cat", "dog"], ["dog", "cat"], [1, 0]),
    (["Traffic_Light", "HOTDOG"], ["hot dog", "traffic light"], [1, 0]),
    (["car", "Car"], ["car"], [0, None]),                    # the equal name is taken, and none is left
    (["CAR"], ["car", "Car"], [None]), (["CAR", "caR"], ["car"], [None, None]),  # it is not clear which
    (["a"], ["a", "a"], [None]), (["none"], [None, "other"], [None]), (["a"], [], [None])])
def test_matching(wanted, given, found):
    assert match_classes(wanted, given) == found


def test_coco_names_of_known_formats():
    """mmdet's and detectron2's 80 classes count on; torchvision's 91 are category ids."""
    names = ["toothbrush", "person", "STOP SIGN", "newt"]
    assert [coco_classes(80).index(name) for name in ("person", "stop sign", "toothbrush")] == [0, 11, 79]
    assert [coco_classes(91).index(name) for name in ("person", "stop sign", "toothbrush")] == [1, 13, 90]
    assert coco_classes(91).count(None) == 11 and coco_classes(90) is None
    for count, numbers in ((80, [79, 0, 11, None]), (91, [90, 1, 13, None])):
        # torchvision always has 64 channels at the start of the ResNet, and four convolutions in a tower.
        start = {"backbone": {"base_channels": 64}} if count == 91 else {}
        towers = {"stacked_convs": 4} if count == 91 else {}
        source, model = (detector("RetinaHead", n, seed=seed, sections=start, **towers)
                         for n, seed in ((count, 1), (4, 0)))
        before, weights = copy.deepcopy(model), source.state_dict()
        content = to_torchvision(weights) if count == 91 else to_mmdet(weights)
        report = load_initial(model, content, names)
        check_rows(model, before, source, numbers)
        assert report.matched["STOP SIGN"] == "stop sign" and "STOP SIGN from stop sign" in str(report)
        assert "COCO's names" in str(report)


@pytest.mark.parametrize("count, content", [
    (80, lambda model: model.state_dict()), (6, lambda model: to_mmdet(model.state_dict())),
    (3, lambda model: {"format": "densekd", "model": model.state_dict()}),
    (3, lambda model: own(model, ["cat", "dog"]))])
def test_classes_that_nothing_names_are_new(count, content):
    source, model = detector(classes=count, seed=1), detector()
    before = copy.deepcopy(model)
    report = load_initial(model, content(source), OURS)
    check_rows(model, before, source, [None] * 3)
    assert report.new == OURS and f"the checkpoint does not name its {count} classes, give their names" in str(report)
    assert torch.equal(model.bbox_head.gfl_reg.weight, source.bbox_head.gfl_reg.weight)


def test_one_class_is_not_called_1_classes():
    source = {"format": "densekd", "model": detector(classes=1, seed=1).state_dict()}
    report = str(load_initial(detector(), source, OURS))
    assert "the checkpoint does not name its class, give its name with train.init_classes" in report


def test_names_that_are_said_win():
    source, model = detector(classes=4, seed=1), detector()
    before = copy.deepcopy(model)
    report = load_initial(model, own(source, THEIRS), OURS, ["newt", "a", "b", "cat"])
    check_rows(model, before, source, [3, 0, None])
    assert "classes found among the names in train.init_classes: 2 (cat, newt)" in str(report)
    with pytest.raises(ConfigError, match="train.init_classes: has 3 names, and the checkpoint 4 classes: give one"):
        load_initial(model, own(source, THEIRS), OURS, OURS)
    with pytest.raises(ConfigError, match="train.init_classes: has 1 name, and the checkpoint 4 classes: give one"):
        load_initial(model, own(source, THEIRS), OURS, ["cat"])
    with pytest.raises(ConfigError, match="cannot be used, the checkpoint has no bbox_head.gfl_cls"):
        load_initial(model, own(detector("RetinaHead"), OURS), OURS, OURS)


def test_mmdets_own_names():
    source, model = detector(classes=4, seed=1), detector()
    before = copy.deepcopy(model)
    load_initial(model, to_mmdet(source.state_dict(), {"classes": THEIRS}), OURS)
    check_rows(model, before, source, FROM_CAT_AND_DOG)


def test_of_two_parts_the_student():
    parts = {"student": detector(classes=4, seed=1), "teacher": detector(classes=4, seed=2)}
    content = {"state_dict": {f"{part}.{name}": value for part, each in parts.items()
                              for name, value in each.state_dict().items()}, "meta": {"CLASSES": tuple(THEIRS)}}
    model = detector()
    before = copy.deepcopy(model)
    load_initial(model, content, OURS)
    check_rows(model, before, parts["student"], FROM_CAT_AND_DOG)
    assert torch.equal(model.backbone.conv1.weight, parts["student"].backbone.conv1.weight)


def test_the_average_of_the_weights_is_taken():
    source, last, model = detector(seed=1), detector(seed=2), detector()
    load_initial(model, own(source, OURS, training=last.state_dict()), OURS)
    assert torch.equal(model.backbone.conv1.weight, source.backbone.conv1.weight)


@pytest.mark.parametrize("kind, changes, counts, problem", [
    ("RetinaHead", {}, {"neck": (16, 16), "bbox_head": (4, 19)}, "no class: the checkpoint has no bbox_head.gfl_cls"),
    ("GFLHead", {"width": 32}, {"neck": (0, 16)},
     "no class: bbox_head.gfl_cls is (4, 32, 3, 3) in the checkpoint and (3, 16, 3, 3) in the model"),
    ("GFLHead", {"reg_max": 4}, {"neck": (16, 16), "bbox_head": (17, 19)}, None)])
def test_what_fits_is_taken_from_another_head(kind, changes, counts, problem):
    source, model = detector(kind, 4, seed=1, **changes), detector()
    report = load_initial(model, own(source, THEIRS), OURS)
    assert report.taken["backbone"] == (100, 100)
    assert {part: report.taken[part] for part in counts} == counts
    assert report.new == (["newt"] if problem is None else OURS)
    text = str(report)
    assert (problem or "the checkpoint's names") in text and "not in the checkpoint, or of another shape: " in text
    assert len(text.splitlines()) <= 5


def test_another_number_of_anchors():
    three = {"type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 1, "ratios": [0.5, 1.0, 2.0],
             "strides": [8, 16, 32, 64, 128]}
    model = detector("RetinaHead")
    before = copy.deepcopy(model)
    source = detector("RetinaHead", 5, seed=1, anchor_generator=three)
    report = load_initial(model, own(source, [*THEIRS, "ant"]), OURS)
    assert report.new == OURS and "has 15 rows, no multiple of this head's 9 anchors" in str(report)
    check_rows(model, before, source, [None] * 3)
    six = own(detector("RetinaHead", 6, seed=1, anchor_generator=three), [*THEIRS, "ant", "bee"])
    assert load_initial(model, six, OURS).new == OURS  # 18 rows would be 2 classes


def test_a_deeper_backbone_takes_what_there_is():
    torch.manual_seed(0)
    source, model = detector(seed=1), build_detector(small_config(depth=34))
    report = load_initial(model, own(source, OURS), OURS)
    assert report.taken["backbone"] == (100, 180) and "backbone.layer1.2.conv1.weight" in report.kept
    assert torch.equal(model.backbone.layer4[1].conv2.weight, source.backbone.layer4[1].conv2.weight)


def renamed(model):
    return {name.replace("backbone.", "backbone.stem."): value for name, value in model.state_dict().items()}


def broken(model):
    weights = model.state_dict()
    weights["bbox_head.gfl_cls.bias"][1] = float("nan")
    return own(model, OURS)


@pytest.mark.parametrize("content, message", [
    (lambda: own(build_detector(small_config(backbone={"base_channels": 16})), OURS),
     r"densekd checkpoint \(given as a dict\) has a backbone of another architecture or width, 100 of 100 tensors .*: "
     r"backbone.conv1.weight is \(8, 3, 7, 7\) in the model and \(16, 3, 7, 7\) in the file; set model.backbone as"),
    (lambda: own(build_detector(small_config(depth=50)), OURS),
     r"another architecture or width, 23 of 100 tensors have another shape: backbone.layer1.0.conv1.weight is "
     r"\(8, 8, 3, 3\) in the model and \(8, 8, 1, 1\) in the file"),
    (lambda: renamed(detector()), r"has no weight for this model's backbone: the model has backbone.conv1.weight "
     r"\(8, 3, 7, 7\), the file backbone.stem.bn1.bias \(8,\); set model.backbone"),
    (lambda: broken(detector()), r"NaN or infinite values in 1 \(bbox_head.gfl_cls.bias\)")])
def test_refused_before_anything_is_changed(content, message):
    model = detector(seed=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        load_initial(model, content(), OURS)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_backbone_alone():
    source, model = detector(seed=1), detector()
    report = load_initial(model, source.backbone.state_dict(), OURS)
    assert report.taken["backbone"] == (100, 100) and report.taken["neck"] == (0, 16) and report.new == OURS
