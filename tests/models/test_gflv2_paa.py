"""GFLv2 and PAA: their published parameter names, GFLv2's quality, and PAA's scores, against plain transcriptions."""
import pytest
import torch
import torch.nn.functional as F
from runs import ROOT
from small_models import enliven, make_batch, small_config, small_detector, small_distiller, teacher_entry

from kd.config import load_config
from models import ConfigError, build_detector
from models.heads.gfl import product_logit
from models.weights import CheckpointError, load_weights


def tower(name, channels=256):
    for i in range(4):
        yield f"bbox_head.{name}.{i}.conv.weight", (channels, channels, 3, 3)
        yield from ((f"bbox_head.{name}.{i}.gn.{part}", (channels,)) for part in ("weight", "bias"))


def conv(name, out, channels=256, kernel=3):
    return [(f"bbox_head.{name}.weight", (out, channels, kernel, kernel)), (f"bbox_head.{name}.bias", (out,))]


COMMON = [*tower("cls_convs"), *tower("reg_convs"), *((f"bbox_head.scales.{i}.scale", ()) for i in range(5))]
# The tensors of the heads in GFocal_R_50_FPN_1x and in paa_r50_fpn_1x_coco, after the authors' code and mmdet's.
PUBLISHED = {
    "gfl/gflv2_r50_1x": COMMON + conv("gfl_cls", 80) + conv("gfl_reg", 68) + conv("reg_conf.0", 64, 20, 1)
    + conv("reg_conf.2", 1, 64, 1) + [("bbox_head.integral.project", (17,))],
    "atss/paa_r50_1x": COMMON + conv("atss_cls", 80) + conv("atss_reg", 4) + conv("atss_centerness", 1)}


def published(path):
    """A detector with a narrow backbone, and a checkpoint in mmdet's form: random weights, published names."""
    cfg = load_config(ROOT / "configs" / f"{path}.yaml")["model"]
    cfg["backbone"] = {"type": "ResNet", "depth": 18, "base_channels": 8}
    model = build_detector(cfg)
    state = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("bbox_head.")}
    state |= {name: torch.randn(shape) for name, shape in PUBLISHED[path]}
    return model, {"meta": {"mmdet_version": "2.6.0"}, "state_dict": state}


@pytest.mark.parametrize("path", PUBLISHED)
def test_published_names_and_shapes_load(path, tmp_path):
    model, content = published(path)
    torch.save(content, tmp_path / "published.pth")
    report = load_weights(model, tmp_path / "published.pth")
    assert report.matched == report.total > 140 and not report.unexpected
    for name, value in model.state_dict().items():
        assert torch.equal(value, content["state_dict"][name]), name


def test_a_gfl_is_no_gflv2(tmp_path):
    model, content = published("gfl/gflv2_r50_1x")
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if "reg_conf" not in k}
    torch.save(content, tmp_path / "gfl.pth")
    with pytest.raises(CheckpointError, match="reg_conf"):
        load_weights(model, tmp_path / "gfl.pth")


# --- GFLv2 ---

@pytest.mark.parametrize("add_mean", [True, False])
def test_scores_are_class_times_quality(add_mean):
    model = enliven(small_detector("GFLv2", head={"add_mean": add_mean, "reg_topk": 3}))
    images, _ = make_batch()
    feature, head = model.extract_features(images)[0], model.bbox_head
    x = y = feature
    for c, r in zip(head.cls_convs, head.reg_convs):
        x, y = c(x), r(y)
    plain, box = F.conv2d(x, head.gfl_cls.weight, head.gfl_cls.bias, padding=1), head.gfl_reg(y) * head.scales[0].scale
    first, last = head.reg_conf[0], head.reg_conf[2]
    found, found_box, _ = head.run_level(feature, 0)
    assert torch.equal(found_box, box)
    for row, column in ((0, 0), (3, 7), (7, 11)):
        statistics = []
        for side in range(4):
            probabilities = box[1, 9 * side:9 * side + 9, row, column].softmax(0)
            largest = sorted(probabilities.tolist())[:-4:-1]
            statistics += largest + ([sum(largest) / 3] if add_mean else [])
        hidden = (first.weight[:, :, 0, 0] @ torch.tensor(statistics, dtype=torch.float64) + first.bias).clamp(min=0)
        quality = (last.weight[0, :, 0, 0] @ hidden + last.bias[0]).sigmoid()
        torch.testing.assert_close(found[1, :, row, column].sigmoid(), plain[1, :, row, column].sigmoid() * quality)


def test_losses_are_those_of_the_authors_on_probabilities():
    """Quality focal loss of the product itself, as in the authors' code, and the gradient of every parameter."""
    model, (images, targets) = enliven(small_detector("GFLv2")).train(), make_batch()
    run = model.run(images, targets, assign=True)
    found, assignment = model.losses(run), run.assignment
    product = run.outputs.cls.sigmoid()
    boxes, truth = model.bbox_head.boxes(run.outputs, assignment.priors).detach(), assignment.box_targets
    low, high = torch.maximum(boxes[..., :2], truth[..., :2]), torch.minimum(boxes[..., 2:], truth[..., 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    iou = inter / ((boxes[..., 2:] - boxes[..., :2]).prod(-1) + (truth[..., 2:] - truth[..., :2]).prod(-1) - inter)
    target = F.one_hot(assignment.labels, 4)[..., :3] * (iou * assignment.positive).unsqueeze(-1)
    loss = F.binary_cross_entropy(product, target, reduction="none") * (product - target).abs() ** 2
    expected = (loss.sum(-1) * assignment.label_weights).sum() / assignment.avg_factor
    assert found["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = list(model.bbox_head.parameters())
    grads = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
             for value in (found["loss_cls"], expected)]
    norm = torch.cat([g.flatten() for g in grads[1] if g is not None]).norm()
    assert all((a is None) == (b is None) and (a is None or (a - b).norm() < 1e-6 * norm) for a, b in zip(*grads))
    assert (model.bbox_head.reg_conf[0].weight.grad is None) and norm > 0


def test_the_product_in_logits():
    values = torch.tensor([-800.0, -90.0, -3.0, 0.0, 0.5, 20.0, 700.0], dtype=torch.float64)
    a, b = (x.flatten().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    found = product_logit(a, b)
    wanted = -torch.stack([-a, -b, -a - b]).logsumexp(0)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sigmoid(), a.sigmoid() * b.sigmoid(), rtol=1e-9, atol=0)
    for own, other in zip(*(torch.autograd.grad(x.sum(), (a, b)) for x in (found, wanted))):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
    assert product_logit(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("head, message", [
    ({"reg_topk": 10}, "model.head.reg_topk: must be at most reg_max . 1, 9, not 10"),
    ({"reg_topk": 0}, "model.head.reg_topk"),
    ({"reg_topk": None}, "model.head.reg_topk: is missing: reg_channels and add_mean are of no use without it"),
    ({"reg_topk": None, "reg_channels": 64, "add_mean": False}, "model.head.reg_topk: is missing")])
def test_what_gflv2_refuses(head, message):
    with pytest.raises(ConfigError, match=message):
        build_detector(small_config("GFLv2", head=head))


# --- PAA ---

def test_paas_score_is_the_root_of_class_times_iou():
    model = enliven(small_detector("PAA", test={"score_thr": 0.55, "nms_pre": 40})).eval()
    plain = small_detector("ATSSHead").eval()
    plain.load_state_dict(model.state_dict())
    images, targets = make_batch()
    with torch.no_grad():
        outputs = model.run(images, targets).outputs
        found = model.predict(images, targets, rescale=False, with_nms=False)
    scores = (outputs.cls.sigmoid() * outputs.centerness.sigmoid().unsqueeze(-1)).sqrt()
    counts = [h * w for h, w in outputs.sizes]
    for image, one in zip(scores, found):
        expected = [value for level in image.split(counts)
                    for value in sorted((v for v in level.flatten().tolist() if v > 0.55), reverse=True)[:40]]
        assert len(expected) > 20 and len(one["scores"]) <= len(expected)  # boxes outside of the image are dropped
        assert {round(v, 12) for v in one["scores"].tolist()} <= {round(v, 12) for v in expected}
        assert len(one["scores"]) > 0.5 * len(expected)
    with torch.no_grad():  # the same boxes have another score in an ATSS
        assert not set(found[0]["scores"].tolist()) & set(plain.predict(images, targets)[0]["scores"].tolist())


def test_paas_third_output_learns_the_iou():
    model, (images, targets) = enliven(small_detector("PAA")).train(), make_batch()
    run = model.run(images, targets, assign=True)
    found, assignment, total = model.losses(run), run.assignment, {"box": 0.0, "third": 0.0, "iou": 0.0}
    boxes = model.bbox_head.boxes(run.outputs, assignment.priors)
    rows = assignment.positive.nonzero().tolist()
    for i, p in rows:
        (x1, y1, x2, y2), (X1, Y1, X2, Y2) = boxes[i, p].tolist(), assignment.box_targets[i, p].tolist()
        inter = max(min(x2, X2) - max(x1, X1), 0) * max(min(y2, Y2) - max(y1, Y1), 0)
        union = (x2 - x1) * (y2 - y1) + (X2 - X1) * (Y2 - Y1) - inter
        hull = (max(x2, X2) - min(x1, X1)) * (max(y2, Y2) - min(y1, Y1))
        iou, third = inter / union, run.outputs.centerness[i, p].detach()
        total["iou"] += iou
        total["box"] += iou * (1 - iou + (hull - union) / hull)
        total["third"] -= float(iou * F.logsigmoid(third) + (1 - iou) * F.logsigmoid(-third))
    assert len(rows) > 10
    assert found["loss_bbox"].item() == pytest.approx(2.0 * total["box"] / max(total["iou"], 1), rel=1e-6)
    assert found["loss_centerness"].item() == pytest.approx(total["third"] / float(assignment.avg_factor), rel=1e-6)


def test_centerness_and_iou_are_not_compared():
    """CrossKD compares two outputs of the teacher's head; Mimic would compare a centerness with an IoU."""
    crosskd = {"type": "CrossKD", "reused_teacher_head_idx": 1}
    for method, student, compared in (({"type": "Mimic"}, "ATSSHead", False), ({"type": "Mimic"}, "PAA", True),
                                      (crosskd, "ATSSHead", True)):
        model = small_distiller(method, head=student, teacher=teacher_entry("PAA"))
        assert ("loss_center_kd" in model.loss(*make_batch())) == compared
    with pytest.raises(ConfigError, match="loss_center_kd: centerness is not predicted by both detectors .*IoU"):
        small_distiller({"type": "Mimic", "loss_center_kd": {"type": "CrossEntropyLoss"}}, head="ATSSHead",
                        teacher=teacher_entry("PAA"))
