"""FGD: masks compared with the original's loops, each part with its equation, levels and options."""
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import make_batch, small_config, small_detector

from kd import build_distiller
from kd.methods.fgd import FGD, FeatureLoss, attention, box_masks
from models import ConfigError

H, W = 20, 27
SIZES = [(150, 210), (160, 200)]  # smaller than the padded map stands for, 160 x 216


def slow_masks(boxes, sizes):
    """Box by box, as the original does: one over the area of the smallest box on a cell, and an even background."""
    fg, bg = torch.zeros(len(boxes), H, W, dtype=torch.float64), torch.ones(len(boxes), H, W, dtype=torch.float64)
    for i, (height, width) in enumerate(sizes):
        for x1, y1, x2, y2 in boxes[i].tolist():
            left, right = math.floor(x1 / width * W), math.ceil(x2 / width * W)
            top, bottom = math.floor(y1 / height * H), math.ceil(y2 / height * H)
            area = 1 / (bottom + 1 - top) / (right + 1 - left)
            fg[i, top:bottom + 1, left:right + 1] = fg[i, top:bottom + 1, left:right + 1].clamp(min=area)
        bg[i] = (fg[i] == 0).double()
        if bg[i].sum() > 0:
            bg[i] /= bg[i].sum()
    return fg, bg


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def random_boxes(n, seed):
    g = torch.Generator().manual_seed(seed)
    start = torch.rand(n, 2, generator=g, dtype=torch.float64) * torch.tensor([150, 110])
    return torch.cat([start, start + 1 + 40 * torch.rand(n, 2, generator=g, dtype=torch.float64)], dim=1)


BOXES = {
    "random": [random_boxes(6, 0), random_boxes(11, 1)],
    "many": [random_boxes(40, 2), random_boxes(3, 3)],
    "overlapping": [tensor([[10, 10, 120, 120], [30, 30, 60, 60], [40, 40, 50, 50]]), tensor([[0, 0, 99, 99]] * 2)],
    "on cells' borders": [tensor([[210 / 27 * 3, 150 / 20 * 4, 210 / 27 * 9, 150 / 20 * 8]]),
                          tensor([[200 / 27 * 5, 8 * 2, 200 / 27 * 6, 8 * 3]])],
    "touching the border": [tensor([[0, 0, 210, 20], [180, 100, 210, 150]]), tensor([[190, 0, 200, 160]])],
    "the whole image": [tensor([[0, 0, 210, 150]]), tensor([[5, 5, 6, 6]])],
    "within one cell": [tensor([[11, 11, 11.5, 11.5]]), tensor([[100, 50, 100.1, 50.1]])],
    "one image without": [tensor([]), random_boxes(4, 4)],
    "none": [tensor([]), tensor([])],
}


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("sizes", [SIZES, [(160, 216), (64, 216)]], ids=["padded", "other"])
def test_masks(boxes, sizes):
    if sizes is not SIZES:
        boxes = [b * torch.tensor([w / own_w, h / own_h] * 2, dtype=torch.float64)
                 for b, (h, w), (own_h, own_w) in zip(boxes, sizes, SIZES)]
    for mine, slow in zip(box_masks(boxes, sizes, torch.zeros(2, H, W, dtype=torch.float64)), slow_masks(boxes, sizes)):
        torch.testing.assert_close(mine, slow, rtol=1e-12, atol=0)


def test_masks_of_boxes_in_runs_are_those_of_all_at_once(monkeypatch):
    like = torch.zeros(2, H, W, dtype=torch.float64)
    expected = box_masks(BOXES["many"], SIZES, like)
    monkeypatch.setattr("kd.methods.fgd.MAX_CELLS", 7 * like.numel())  # 40 boxes in six runs
    assert all(torch.equal(mine, other) for mine, other in zip(box_masks(BOXES["many"], SIZES, like), expected))


def test_masks_weigh_the_smallest_box_and_share_out_the_background():
    fg, bg = box_masks(BOXES["overlapping"], SIZES, torch.zeros(2, H, W, dtype=torch.float64))
    assert len(fg[0].unique()) == 4  # three boxes and nothing
    torch.testing.assert_close(bg.sum((1, 2)), torch.ones(2).double())
    assert not ((fg > 0) & (bg > 0)).any()


def test_a_box_on_every_cell_leaves_no_background():
    fg, bg = box_masks(BOXES["the whole image"], SIZES, torch.zeros(2, H, W, dtype=torch.float64))
    assert (fg[0] > 0).all() and not bg[0].any() and bg.isfinite().all()


def test_boxes_are_divided_by_the_size_without_padding():
    box = [tensor([[0, 0, 50, 50]])]
    narrow, wide = (box_masks(box, [size], torch.zeros(1, H, W))[0][0, 0] > 0 for size in ((100, 100), (100, 200)))
    assert narrow.sum() == 15 and wide.sum() == 8  # ceil(27 / 2) + 1 and ceil(27 / 4) + 1 columns of the whole map


# --- the loss ---

def make_loss(student_channels=6, teacher_channels=6, **weights):
    torch.manual_seed(0)
    loss = FeatureLoss(student_channels, teacher_channels, **weights).double()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return loss


def maps(channels=6):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, c, H, W, generator=g, dtype=torch.float64) for c in (channels, 6)]


def test_attention_by_its_equations():
    x = maps()[0]
    spatial, channel = attention(x, 0.5)
    for n in range(2):
        expected = torch.tensor([[x[n, :, i, j].abs().mean() / 0.5 for j in range(W)] for i in range(H)]).double().exp()
        torch.testing.assert_close(spatial[n], H * W * expected / expected.sum())
        expected = torch.stack([x[n, c].abs().mean() / 0.5 for c in range(6)]).exp()
        torch.testing.assert_close(channel[n], 6 * expected / expected.sum())


def test_terms_by_their_equations():
    loss, (student, teacher), boxes = make_loss(), maps(), BOXES["random"]
    terms = loss.terms(student, teacher, boxes, SIZES)
    fg, bg = slow_masks(boxes, SIZES)
    spatial, channel = attention(teacher, 0.5)
    own_spatial, own_channel = attention(student, 0.5)
    error = (student - teacher) ** 2 * spatial[:, None] * channel[:, :, None, None]
    torch.testing.assert_close(terms["fg"], (error * fg[:, None]).sum() / 2)
    torch.testing.assert_close(terms["bg"], (error * bg[:, None]).sum() / 2)
    torch.testing.assert_close(
        terms["mask"], ((own_spatial - spatial).abs().sum() + (own_channel - channel).abs().sum()) / 2)

    def related(x, mask, add):
        weight = mask(x).flatten(1).softmax(1).view(2, 1, H, W)
        return x + add((x * weight).sum((2, 3), keepdim=True))

    own, other = related(student, loss.conv_mask_s, loss.channel_add_conv_s), related(
        teacher, loss.conv_mask_t, loss.channel_add_conv_t)
    torch.testing.assert_close(terms["relation"], ((own - other) ** 2).sum() / 2)


WEIGHTS = {"fg": "alpha_fgd", "bg": "beta_fgd", "mask": "gamma_fgd", "relation": "lambda_fgd"}


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_weight_of_zero_leaves_its_part_out(part):
    full, (student, teacher), boxes = make_loss(), maps(), BOXES["random"]
    terms = full.terms(student, teacher, boxes, SIZES)
    less = FeatureLoss(6, 6, **{WEIGHTS[part]: 0.0}).double()
    less.load_state_dict({k: v for k, v in full.state_dict().items() if k in less.state_dict()})
    found = less.terms(student, teacher, boxes, SIZES)
    assert found.keys() == terms.keys() - {part}
    assert all(torch.equal(found[key], terms[key]) for key in found)
    weight = getattr(full, WEIGHTS[part])
    value = full(student, teacher, boxes, SIZES) - weight * terms[part]
    torch.testing.assert_close(less(student, teacher, boxes, SIZES), value)
    assert (list(less.parameters()) == []) == (part == "relation")


def test_only_one_part():
    (student, teacher), boxes = maps(), BOXES["random"]
    loss = FeatureLoss(6, 6, alpha_fgd=0.0, beta_fgd=0.0, lambda_fgd=0.0, gamma_fgd=2.0)
    assert torch.equal(loss(student, teacher, boxes, SIZES), 2 * loss.terms(student, teacher, boxes, SIZES)["mask"])


def test_a_student_of_other_width_is_aligned():
    loss, (student, teacher) = make_loss(4), maps(4)
    aligned = F.conv2d(student, loss.align.weight, loss.align.bias)
    same = make_loss()
    same.load_state_dict({k: v for k, v in loss.state_dict().items() if not k.startswith("align")})
    torch.testing.assert_close(loss(student, teacher, BOXES["random"], SIZES),
                               same(aligned, teacher, BOXES["random"], SIZES))
    assert make_loss().align is None


def test_initialisation():
    torch.manual_seed(0)
    loss = FeatureLoss(256, 256)
    for mask, add in ((loss.conv_mask_s, loss.channel_add_conv_s), (loss.conv_mask_t, loss.channel_add_conv_t)):
        assert mask.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.2) and not mask.bias.any()
        assert not add[-1].weight.any() and not add[-1].bias.any() and add[0].weight.any()
    (student, teacher) = (torch.randn(1, 256, 4, 4) for _ in range(2))
    relation = loss.terms(student, teacher, [tensor([])], [(32, 32)])["relation"]
    torch.testing.assert_close(relation, ((student - teacher) ** 2).sum())  # nothing is added at first


@pytest.mark.parametrize("name", ["none", "one image without", "the whole image"])
def test_finite_without_boxes_or_background(name):
    loss, (student, teacher) = make_loss(), maps()
    value = loss(student.requires_grad_(), teacher, BOXES[name], SIZES)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def test_half_precision_is_promoted():
    (student, teacher), boxes = (x.half() for x in maps()), [b.float() for b in BOXES["random"]]
    loss = FeatureLoss(6, 6, lambda_fgd=0.0)
    value, wide = loss(student, teacher, boxes, SIZES), loss(student.float(), teacher.float(), boxes, SIZES)
    assert value.dtype == torch.float32 and torch.equal(value, wide)


# --- the method ---

@pytest.mark.parametrize("levels", [None, [0], [1, 3]])
def test_levels_add_up(levels):
    student, teacher = small_detector(seed=0), small_detector("RetinaHead", seed=1)
    images, targets = make_batch()
    runs = [model.run(images, targets, with_head=False) for model in (student, teacher)]
    method = FGD(student, teacher, levels=levels).double()
    used = range(5) if levels is None else levels
    assert len(method.losses) == len(used)
    boxes, sizes = [t["boxes"] for t in targets], [t["image_size"] for t in targets]
    expected = sum(loss(runs[0].features[level], runs[1].features[level], boxes, sizes)
                   for level, loss in zip(used, method.losses))
    assert method(*runs) == {"loss_fgd": expected}
    assert expected > 0


@pytest.mark.parametrize("teacher, levels, message", [
    ({}, [5], "0..4"), ({}, [-1], "0..4"), ({}, [0, 0], "each once, not .0, 0."), ({}, [], "names no level"),
    ({"neck": {"num_outs": 4}}, [4], "level 4 has stride 128 in the student, and the teacher's strides are .8, 16")])
def test_refuses(teacher, levels, message):
    head = {"anchor_generator": {"type": "AnchorGenerator", "ratios": [1.0], "scales": [8], "strides": [8, 16, 32, 64]}}
    teacher = small_detector(**teacher, **({"head": head} if teacher else {}))
    with pytest.raises(ConfigError, match=message):
        FGD(small_detector(), teacher, levels=levels)


# --- by module name ---

def make(**arguments):
    torch.manual_seed(0)
    teacher = {"model": small_config(), "checkpoint": None}
    distill = {"teacher": teacher, "methods": [{"type": "FGD", **arguments}]}
    return build_distiller({"model": small_config(), "distill": distill}).double().train()


def by_name(**arguments):
    model = make(**arguments)
    for loss in model.methods[0][0].losses:  # the same weights however many losses were made before
        torch.manual_seed(0)
        for parameter in loss.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_modules_by_name_are_the_levels_that_they_give():
    names = ["neck.fpn_convs.1.conv", "neck.fpn_convs.3.conv"]
    images, targets = make_batch()
    levels = by_name(levels=[1, 3]).loss(images, targets)["loss_fgd"]
    modules = by_name(student_modules=names, teacher_modules=names).loss(images, targets)["loss_fgd"]
    assert torch.equal(levels, modules)
    backbone = by_name(student_modules=["backbone.layer3"]).loss(images, targets)["loss_fgd"]
    assert backbone.isfinite() and backbone > 0


@pytest.mark.parametrize("arguments, message", [
    ({"student_modules": ["neck.fpn_conv.0"]}, 'no module "neck.fpn_conv.0"; did you mean "neck.fpn_convs.0"'),
    ({"student_modules": ["backbone.relu"]}, "no convolution"),
    ({"student_modules": ["backbone.layer3"], "levels": [0]}, "give these or levels, not both"),
    ({"teacher_modules": ["backbone.layer3"]}, "teacher_modules: .* add student_modules"),
    ({"student_modules": ["backbone.layer3"], "teacher_modules": ["backbone.layer2", "backbone.layer3"]}, "each"),
])
def test_modules_that_cannot_be_distilled(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(**arguments)


def test_maps_of_other_size_are_refused():
    model = by_name(student_modules=["backbone.layer2"], teacher_modules=["backbone.layer3"])
    with pytest.raises(ConfigError, match=r"layer2 of the student.*layer3 of the teacher.*one size"):
        model.loss(*make_batch())


def test_a_module_that_gives_several_maps_is_refused():
    model = by_name(student_modules=["neck"])
    with pytest.raises(ConfigError, match="neck of the student is a list and neck of the teacher a list: maps"):
        model.loss(*make_batch())


def test_a_module_that_is_never_called_is_refused():
    model = by_name(student_modules=["neck.fpn_convs"])
    with pytest.raises(ConfigError, match='"neck.fpn_convs" only holds other modules'):
        model.loss(*make_batch())
