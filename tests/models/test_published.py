"""Configurations reproduce detectron2's and torchvision's RetinaNet from their own weights."""
import copy

import numpy as np
import pytest
import torch
from golden_cases import load, under
from runs import ROOT
from small_models import without_weights

from data import collate
from kd.config import load_config
from models import build_detector
from models.checkpoints.formats import parse_checkpoint
from models.weights import load_weights

GIOU = {"loss_bbox": {"type": "GIoULoss", "eps": 1e-7}, "reg_decoded_bbox": True}


def detectron2_case(name: str, head: dict):
    """The golden case's detector with its weights loaded, its batch, and its arrays and meta."""
    arrays, meta = load(f"detectron2_retinanet_{name}")
    cfg = without_weights(load_config(ROOT / "configs/detectron2/retinanet_r50_1x.yaml")["model"])
    cfg = copy.deepcopy(cfg)
    cfg["backbone"]["base_channels"] = 8
    cfg["neck"]["out_channels"] = 32
    cfg["head"] |= {"num_classes": 6, "feat_channels": 32} | head
    detector = build_detector(cfg)
    weights = under(load("detectron2_retinanet_smooth_l1")[0], "state_dict")
    load_weights(detector, {"model": weights, "__author__": "detectron2"})
    images, targets = [torch.from_numpy(arrays[f"images/{i}"]) for i in range(2)], []
    for i, image in enumerate(images):
        targets.append({"boxes": torch.from_numpy(arrays[f"gt_boxes/{i}"]), "image_size": tuple(image.shape[1:]),
                        "labels": torch.from_numpy(arrays[f"gt_labels/{i}"]),
                        "original_size": tuple(meta["original_sizes"][i])})
    shape = [max(image.shape[side] for image in images) for side in (1, 2)]
    batch = torch.zeros(2, 3, *[-(-side // 32) * 32 for side in shape])
    for padded, image in zip(batch, images):
        padded[:, :image.shape[1], :image.shape[2]] = image
    return detector, detector.preprocess(batch.flip(1), targets), targets, arrays  # the files hold BGR, data are RGB


# Largest deviations measured: losses 1.3e-7, gradient norms 7.3e-8 of the whole, boxes 1.8e-4 pixel, scores 3.3e-7.
@pytest.mark.parametrize("name, head, normalizer", [("smooth_l1", {}, 115.3), ("giou", GIOU, 119.4)])
def test_detectron2(name, head, normalizer):
    detector, images, targets, arrays = detectron2_case(name, head)
    losses = detector.train().loss(images, targets)
    assert losses["loss_cls"].item() == pytest.approx(float(arrays["losses/loss_cls"]), rel=1e-4)
    assert losses["loss_bbox"].item() == pytest.approx(float(arrays["losses/loss_box_reg"]), rel=1e-4)
    assert float(detector.bbox_head.loss_normalizer) == pytest.approx(normalizer, rel=1e-6)

    sum(losses.values()).backward()
    # Each norm has the number of dimensions of its parameter, a kernel or a vector, so that its name is translated.
    norms = {k: torch.tensor(v).reshape([1] * (4 if k.endswith("weight") else 1))
             for k, v in under(arrays, "grad_norm").items()}
    norms = parse_checkpoint({"model": norms, "__author__": "detectron2"}, None).weights
    whole = np.sqrt(sum(float(v) ** 2 for v in norms.values()))
    ours = {k: p.grad.norm() for k, p in detector.named_parameters() if p.grad is not None}
    assert ours.keys() == norms.keys()
    assert max(abs(float(ours[k]) - float(norms[k])) for k in norms) < 1e-3 * whole

    with torch.no_grad():
        found = detector.eval().predict(images, targets)
    for i, detections in enumerate(found):
        expected = under(arrays, f"detections/{i}")
        assert detections["labels"].tolist() == expected["labels"].tolist()
        assert np.abs(detections["boxes"].numpy() - expected["boxes"]).max() < 1e-2
        assert np.abs(detections["scores"].numpy() - expected["scores"]).max() < 1e-4


def test_torchvision():
    """A whole detector with random weights gives torchvision's detections, also if a stride is not the nominal one."""
    from torchvision.models.detection import retinanet_resnet50_fpn
    torch.manual_seed(0)
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, min_size=160, max_size=224).eval().double()
    with torch.no_grad():  # so that scores are neither saturated nor equal
        theirs.head.classification_head.cls_logits.weight.normal_(std=0.002)
        theirs.head.classification_head.cls_logits.bias.fill_(-2)
    cfg = load_config(ROOT / "configs/torchvision/retinanet_r50.yaml", ["model.backbone.norm_cfg.eps=1e-5"])
    ours = build_detector(cfg["model"]).eval().double()
    report = load_weights(ours, theirs.state_dict())
    assert report.matched == report.total and not report.unexpected

    pictures = [torch.randint(0, 256, (3, 160, 224), dtype=torch.uint8),
                torch.randint(0, 256, (3, 160, 200), dtype=torch.uint8)]
    targets = [{"image_size": tuple(p.shape[1:]), "original_size": tuple(p.shape[1:])} for p in pictures]
    batch, _ = collate(list(zip(pictures, targets)))
    with torch.no_grad():
        expected = theirs([picture.double() / 255 for picture in pictures])
        found = ours.predict(ours.preprocess(batch, targets, torch.float64), targets)
    for detections, reference in zip(found, expected):
        assert len(reference["scores"]) == len(detections["scores"]) > 50
        mine, others = (torch.cat([d["boxes"], 1e3 * d["scores"][:, None], 1e3 * d["labels"][:, None]], 1)
                        for d in (detections, reference))
        off = (mine[:, None] - others).abs().amax(2)
        # torchvision keeps boxes that lie outside of the image and so have no area; ours are others in their place.
        sized = (reference["boxes"][:, 2:] > reference["boxes"][:, :2]).all(1)
        off = off[:sized.sum(), sized]  # in pixels and thousandths
        assert off.amin(0).max() < 1e-6 and off.amin(1).max() < 1e-6
