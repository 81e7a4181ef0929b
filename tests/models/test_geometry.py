"""Anchors, box coders and assigners agree with the original code's values and with values computed by hand."""
import math

import pytest
import torch
from golden_cases import load, relative

from models.anchors import PRIORS, AnchorGenerator
from models.assigners import ASSIGNERS, IGNORED, NEGATIVE
from models.build import ConfigError, build
from models.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder, clip_boxes

ARRAYS, META = load("geometry")
CPU = torch.device("cpu")


def array(key):
    return torch.from_numpy(ARRAYS[key])


def golden_priors(name):
    return build(META[name]["config"], PRIORS, "anchor_generator")(META[name]["feature_sizes"], torch.float64, CPU)


# --- golden values ---

@pytest.mark.parametrize("name", [name for name in META if name.startswith("anchors")])
def test_golden_anchors(name):
    priors = golden_priors(name)
    for level, boxes in enumerate(priors.boxes.split(priors.level_sizes)):
        reference = ARRAYS[f"{name}/{level}"]
        assert boxes.shape == reference.shape
        assert abs(boxes.numpy() - reference).max() < 1e-12  # pixels; measured 1.2e-13


@pytest.mark.parametrize("name", [name for name in META if name.startswith("assign")])
def test_golden_assignment(name):
    priors = golden_priors(META[name]["anchors"])
    boxes, ignored = array(f"{name}/gt_boxes"), array(f"{name}/ignore_boxes")
    padded, real = torch.zeros(1, len(boxes) + 2, 4, dtype=torch.float64), torch.zeros(1, len(boxes) + 2).bool()
    padded[0, :len(boxes)], real[0, :len(boxes)] = boxes, True
    assigner = build(META[name]["config"], ASSIGNERS, "assigner")
    matched = assigner(priors, torch.ones(1, len(priors.boxes)).bool(), padded, real, ignored[None],
                       torch.ones(1, len(ignored)).bool())[0]
    expected = array(f"{name}/gt_inds").long()  # 0 background, -1 ignored, i + 1 a box
    expected = torch.where(expected > 0, expected - 1, torch.where(expected == 0, NEGATIVE, IGNORED))
    assert torch.equal(matched, expected)


def test_golden_delta_coder():
    case, size = "coder_delta", META["image_size_hw"]
    coder, anchors = DeltaXYWHBBoxCoder(**META[case]), array(f"{case}/anchors")
    assert relative(coder.encode(anchors, array(f"{case}/gt")), ARRAYS[f"{case}/encoded"]) < 1e-12
    decoded = coder.decode(anchors, array(f"{case}/deltas"))
    assert relative(decoded, ARRAYS[f"{case}/decoded"]) < 1e-12
    assert relative(clip_boxes(decoded, size), ARRAYS[f"{case}/decoded_clipped"]) < 1e-12


def test_golden_distance_coder():
    case, size = "coder_distance", META["image_size_hw"]
    coder, points, limits = DistancePointBBoxCoder(), array("coder_distance/points"), META["coder_distance"]
    encoded = coder.encode(points, array(f"{case}/gt"), limits["max_dis"], limits["eps"])
    assert relative(encoded, ARRAYS[f"{case}/encoded"]) < 1e-12
    decoded = coder.decode(points, array(f"{case}/distances"))
    assert relative(decoded, ARRAYS[f"{case}/decoded"]) < 1e-12
    assert relative(clip_boxes(decoded, size), ARRAYS[f"{case}/decoded_clipped"]) < 1e-12


# --- anchors ---

def test_anchors_by_hand():
    generator = AnchorGenerator([8, 16], [0.5, 2.0], octave_base_scale=2, scales_per_octave=2)
    sizes = [(2, 3), (1, 2)]
    priors = generator(sizes, torch.float64, CPU)
    expected, cells = [], []
    for stride, (height, width) in zip((8, 16), sizes):
        for y in range(height):
            for x in range(width):
                for ratio in (0.5, 2.0):
                    for scale in (2, 2 * math.sqrt(2)):
                        w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
                        cells.append([x * stride, y * stride])
                        cx, cy = cells[-1]
                        expected.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    torch.testing.assert_close(priors.boxes, torch.tensor(expected, dtype=torch.float64))
    assert priors.cells.tolist() == cells
    assert priors.level_sizes == (24, 8) and priors.strides.tolist() == [8] * 24 + [16] * 8


def test_anchors_ordered_by_size_then_ratio():
    ratio_first = AnchorGenerator([8], [0.5, 2.0], scales=[1, 4])
    scale_first = AnchorGenerator([8], [0.5, 2.0], scales=[1, 4], style="detectron2")
    assert torch.equal(scale_first.base_anchors(0), ratio_first.base_anchors(0)[[0, 2, 1, 3]])


@pytest.mark.parametrize("image", [(64, 96), (96, 32)])
def test_anchors_of_torchvision(image):
    """Also if a map's size is rounded up, so that its stride is less than the nominal one: 96 / 2 = 48."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator as Theirs
    from torchvision.models.detection.image_list import ImageList
    scales = [1, 2 ** (1 / 3), 2 ** (2 / 3)]
    strides, base_sizes = [8, 16, 32, 64], [32, 64, 128, 256]
    sizes = [tuple(-(-side // stride) for side in image) for stride in strides]
    theirs = Theirs(tuple(tuple(int(x * s) for s in scales) for x in base_sizes), ((0.5, 1.0, 2.0),) * 4)
    maps = [torch.zeros(1, 1, *size) for size in sizes]
    expected = theirs(ImageList(torch.zeros(1, 3, *image), [image]), maps)[0]
    ours = AnchorGenerator(strides, [0.5, 1.0, 2.0], scales=scales, base_sizes=base_sizes, style="torchvision")
    assert torch.equal(ours(sizes, torch.float32, CPU).boxes, expected)


def test_center_offset_shifts_by_a_part_of_the_stride():
    plain, shifted = AnchorGenerator([8], [1.0], scales=[4]), AnchorGenerator([8], [1.0], scales=[4], center_offset=0.5)
    args = [(3, 3)], torch.float64, CPU
    assert torch.equal(shifted(*args).boxes, plain(*args).boxes + 4)
    assert torch.equal(shifted(*args).cells, plain(*args).cells)  # cells do not move


def test_anchors_in_float32_are_the_float64_ones_rounded():
    generator = AnchorGenerator([8], [0.5, 1.0], octave_base_scale=4, scales_per_octave=3)
    exact, single = (generator([(5, 7)], dtype, CPU).boxes for dtype in (torch.float64, torch.float32))
    assert single.dtype == torch.float32 and torch.equal(exact.float(), single)


@pytest.mark.parametrize("args, key", [
    ({}, "scales"), ({"scales": [1], "octave_base_scale": 4, "scales_per_octave": 1}, "scales"),
    ({"octave_base_scale": 4}, "scales"), ({"scales": [1], "base_sizes": [8]}, "base_sizes")])
def test_anchor_generator_refuses(args, key):
    with pytest.raises(ConfigError, match=key):
        AnchorGenerator([8, 16], [1.0], **args)


def test_levels_must_fit_the_features():
    with pytest.raises(ConfigError, match="gives 1 level, but the features have 2"):
        AnchorGenerator([8], [1.0], scales=[1])([(2, 2), (1, 1)], torch.float32, CPU)


# --- coders ---

def random_boxes(n=50, dtype=torch.float64):
    torch.manual_seed(0)
    corner = 100 * torch.rand(n, 2, dtype=dtype)
    return torch.cat([corner, corner + 2 + 60 * torch.rand(n, 2, dtype=dtype)], dim=1)


def test_delta_coder_round_trip_with_means_and_stds():
    coder = DeltaXYWHBBoxCoder([0.1, 0.0, -0.1, 0.2], [0.1, 0.1, 0.2, 0.2])
    anchors, boxes = random_boxes(), random_boxes().flip(0)
    deltas = coder.encode(anchors, boxes)
    torch.testing.assert_close(coder.decode(anchors, deltas), boxes)
    plain = DeltaXYWHBBoxCoder().encode(anchors, boxes)
    torch.testing.assert_close(deltas * torch.tensor([0.1, 0.1, 0.2, 0.2]) + torch.tensor([0.1, 0.0, -0.1, 0.2]), plain)


def test_delta_coder_limits_sizes():
    anchor = torch.tensor([0.0, 0, 10, 20], dtype=torch.float64)
    for sign in (1, -1):
        box = DeltaXYWHBBoxCoder().decode(anchor, torch.tensor([0, 0, 100.0 * sign, 100.0 * sign]).double())
        factor = (1000 / 16) ** sign
        torch.testing.assert_close(box[2:] - box[:2], torch.tensor([10 * factor, 20 * factor]).double())


def test_distance_coder_round_trip_and_limits():
    coder, boxes = DistancePointBBoxCoder(), random_boxes()
    points = (boxes[:, :2] + boxes[:, 2:]) / 2 + 1
    distances = coder.encode(points, boxes)
    torch.testing.assert_close(coder.decode(points, distances), boxes)
    assert torch.equal(coder.encode(points, boxes, 8), distances.clamp(0, 8 - 0.1))
    outside = coder.encode(boxes[:, :2] - 1, boxes)
    assert (outside[:, :2] == -1).all() and (coder.encode(boxes[:, :2] - 1, boxes, 8)[:, :2] == 0).all()


def test_clip_boxes_to_height_and_width():
    boxes = torch.tensor([[-5.0, -6, 200, 300], [10, 20, 30, 40]])
    assert clip_boxes(boxes, (100, 50)).tolist() == [[0, 0, 50, 100], [10, 20, 30, 40]]
