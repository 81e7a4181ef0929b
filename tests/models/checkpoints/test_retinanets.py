"""RetinaNets for torchvision and detectron2: they compute the same there, and what differs is refused."""
import copy
import re

import pytest
import torch
from runs import ROOT
from small_models import enliven
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from models import build_detector
from models.checkpoints.convert import convert_checkpoint, to_detectron2, to_torchvision
from models.checkpoints.retinanets import remarks
from models.weights import CheckpointError, load_weights, open_checkpoint

SCALES = [2 ** (i / 3) for i in range(3)]
RATIOS, STRIDES = [0.5, 1.0, 2.0], [8, 16, 32, 64, 128]
ANCHORS = {  # of the other projects, and of mmdet
    "torchvision": {"type": "AnchorGenerator", "base_sizes": [32, 64, 128, 256, 512], "scales": SCALES},
    "detectron2": {"type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 3},
    "mmdet": {"type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 3}}
FEW = {"norm_cfg": {"type": "GN", "num_groups": 4}}
GROUPS = {"norm_cfg": {"type": "GN", "num_groups": 32}}


def section(project="torchvision", anchors=None, classes=4, backbone=None, neck=None, head=None, width=256, offset=0.0,
            **more):
    """A `model` section that the project has, too."""
    source, style = ("on_output", "pytorch") if project == "torchvision" else ("on_input", "caffe")
    anchors = anchors or project
    generator = ANCHORS[anchors] | {"ratios": RATIOS, "strides": STRIDES, "style": anchors,
                                    "center_offset": offset}
    return {"backbone": {"type": "ResNet", "depth": 18, "style": style} | (backbone or {}),
            "neck": {"type": "FPN", "out_channels": width, "start_level": 1, "num_outs": 5, "add_extra_convs": source,
                     "relu_before_extra_convs": True} | (neck or {}),
            "head": {"type": "RetinaHead", "num_classes": classes, "feat_channels": width,
                     "anchor_generator": generator} | (head or {}), **more}


def lively(model, seed=0):
    """A detector in float64 with values everywhere, also in its norms."""
    torch.manual_seed(seed)
    detector = enliven(build_detector(model)).double().eval()
    with torch.no_grad():
        for name, value in detector.state_dict().items():
            if name.endswith(("running_mean", "running_var", "bn1.bias", "gn.bias")):
                value.uniform_(0.5, 1.5)
        # Scores that are neither saturated nor equal, and boxes near their anchors.
        sizes = [{"image_size": (128, 128), "original_size": (128, 128)}]
        for conv, spread, bias in ((detector.bbox_head.retina_cls, 1, -2), (detector.bbox_head.retina_reg, 0.2, 0)):
            outputs = []
            hook = conv.register_forward_hook(lambda module, inputs, output, outputs=outputs: outputs.append(output))
            detector.predict(torch.randn(1, 3, 128, 128, dtype=torch.float64), sizes)
            hook.remove()
            conv.weight.mul_(spread / torch.cat([output.flatten() for output in outputs]).std())
            conv.bias.fill_(bias)
    return detector


def file_of(folder, detector, model):
    path = folder / "last.pth"
    torch.save({"format": "densekd", "model": detector.state_dict(), "config": {"model": model},
                "classes": list("abcd")}, path)
    return path


def theirs_torchvision(state, norm, p6):
    """torchvision's RetinaNet with a ResNet-18, loaded strictly."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d,
                                   returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(p6, 256))
    model = RetinaNet(backbone, num_classes=4, head=RetinaNetHead(256, 9, 4, norm_layer=norm), min_size=128,
                      max_size=192, detections_per_img=100)
    model.double().load_state_dict(state, strict=True)
    return model.eval()


def same_detections(ours, theirs, size=(128, 192), most=1e-6):
    """Whether both detect the same on a picture that neither resizes: pixels, and scores in thousandths."""
    torch.manual_seed(1)
    picture = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    targets = [{"image_size": size, "original_size": size}]
    with torch.no_grad():
        found, = ours.predict(ours.preprocess(picture[None].clone(), targets, torch.float64), targets)
        expected, = theirs([picture.double() / 255])
    sized = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(1)  # torchvision keeps boxes without an area
    rows, others = (torch.cat([d["boxes"], 1e3 * d["scores"][:, None], 1e3 * d["labels"][:, None]], 1)
                    for d in (found, expected))
    assert sized.sum() > 20
    return (others[sized][:, None] - rows).abs().amax(2).amin(1).max() < most


@pytest.mark.parametrize("norm, source", [(False, "on_output"), (True, "on_input")])
def test_torchvision_detects_the_same(tmp_path, norm, source):
    model = section(head=GROUPS if norm else {}, neck={"add_extra_convs": source})
    ours = lively(model)
    line = convert_checkpoint(file_of(tmp_path, ours, model), "torchvision", tmp_path / "out.pth")
    assert line.endswith("give torchvision the pixel mean [123.675, 116.28, 103.53] and deviation [58.395, 57.12, "
                         "57.375], RGB")
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    norm = (lambda channels: torch.nn.GroupNorm(32, channels)) if norm else None
    theirs = theirs_torchvision(state, norm, 256 if source == "on_output" else 512)
    assert same_detections(ours, theirs)
    back = lively(model, seed=1)
    load_weights(back, tmp_path / "out.pth")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("anchors", ["mmdet", "detectron2"])
def test_torchvision_with_other_anchors(tmp_path, monkeypatch, anchors):
    """The code in docs/shipping.md gives it the anchors, because its own are rounded; their order is changed."""
    model = section(anchors=anchors, classes=3)
    ours = lively(model)
    monkeypatch.chdir(tmp_path)
    line = convert_checkpoint(file_of(tmp_path, ours, model), "torchvision", "student_torchvision.pth")
    assert "give it the anchors of this model, which torchvision rounds (docs/shipping.md)" in line
    page = (ROOT / "docs" / "shipping.md").read_text(encoding="utf-8")
    code, scope = re.search(r"^```python\n(.*?)^```", page, re.S | re.M)[1], {}
    exec(compile(code, "<page>", "exec"), scope)  # noqa: S102 our own page
    theirs = scope["model"]
    theirs.transform.min_size, theirs.transform.max_size = (128,), 192  # the picture keeps its size
    theirs.detections_per_img = 100
    # The page loads in float32, and gives anchors in it.
    theirs.double().load_state_dict(torch.load("student_torchvision.pth", weights_only=True))
    assert same_detections(ours, theirs.eval(), (128, 128), 1e-4)


def tiny(**more):
    """For detectron2, whose ResNets with bottlenecks may have any width."""
    return section("detectron2", backbone={"depth": 50, "base_channels": 8}, width=32, **more)


@pytest.mark.parametrize("anchors, head", [("detectron2", {}), ("mmdet", {}), ("detectron2", FEW)])
def test_detectron2_and_back(tmp_path, anchors, head):
    """Our reader of detectron2's files gives the same detections with its order of anchors."""
    model = tiny(anchors=anchors, head=head)
    ours = lively(model)
    convert_checkpoint(file_of(tmp_path, ours, model), "detectron2", tmp_path / "out.pth")
    label, checkpoint = open_checkpoint(tmp_path / "out.pth")
    assert checkpoint.format == "detectron2"
    back = lively(tiny(head=head), seed=1)
    report = load_weights(back, tmp_path / "out.pth")
    assert report.matched == report.total
    # detectron2's towers have a bias before a norm, too, which is zero.
    assert len(report.unexpected) == (8 if head else 0)
    assert not any(checkpoint.weights[name].any() for name in report.unexpected)
    if anchors == "detectron2":
        names = [name for name in ours.state_dict() if not name.endswith("num_batches_tracked")]
        assert all(torch.equal(ours.state_dict()[name], back.state_dict()[name]) for name in names)
    targets = [{"image_size": (64, 64), "original_size": (64, 64)}]
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        found, expected = (each.predict(image, targets)[0] for each in (back, ours))
    assert len(expected["scores"]) > 20 and torch.allclose(found["scores"], expected["scores"], rtol=1e-12)
    assert torch.equal(found["labels"], expected["labels"])
    assert torch.allclose(found["boxes"], expected["boxes"], atol=1e-9)


def test_the_names_are_detectron2s():
    """Those of its model zoo's RetinaNet, whose names are in the golden file."""
    from golden_cases import load, under

    theirs = under(load("detectron2_retinanet_smooth_l1")[0], "state_dict")
    model = tiny(classes=6)
    ours = lively(model)
    state = to_detectron2(ours.state_dict(), ours)
    unused = {"pixel_mean", "pixel_std"} | {name for name in theirs if "cell_anchors" in name}
    assert state.keys() == theirs.keys() - unused
    assert all(tuple(value.shape) == theirs[name].shape for name, value in state.items())


def test_detectron2_itself(tmp_path):
    """Its model loads the file without a missing or unexpected weight, and detects the same."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.model_zoo import get_config_file
    from detectron2.modeling import build_model

    model = section("detectron2", backbone={"depth": 50, "norm_cfg": {"type": "FrozenBN"}}, preprocess={
        "mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "channel_order": "bgr"}, test={"clip": "after"})
    ours = lively(model)
    convert_checkpoint(file_of(tmp_path, ours, model), "detectron2", tmp_path / "out.pth")
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.DEVICE = 4, "cpu"
    theirs = build_model(cfg).eval()
    found = DetectionCheckpointer(theirs).load(str(tmp_path / "out.pth"))
    assert not found.get("matching_heuristics")
    picture = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)
    targets = [{"image_size": (128, 128), "original_size": (128, 128)}]
    with torch.no_grad():
        expected = theirs([{"image": picture.flip(0), "height": 128, "width": 128}])[0]["instances"]
        own, = ours.float().predict(ours.preprocess(picture[None].clone(), targets), targets)
    assert torch.allclose(own["scores"], expected.scores, atol=1e-4)
    assert torch.allclose(own["boxes"], expected.pred_boxes.tensor, atol=1e-2)


REFUSED = {  # project, changes of the section, and what the error names
    "relu": ("torchvision", {"neck": {"relu_before_extra_convs": False}}, "relu_before_extra_convs: false"),
    "source": ("torchvision", {"neck": {"add_extra_convs": "on_lateral"}}, "add_extra_convs: on_lateral"),
    "caffe": ("torchvision", {"backbone": {"depth": 50, "style": "caffe"}}, "model.backbone.style: caffe"),
    "narrow": ("torchvision", {"backbone": {"base_channels": 16}}, "a ResNet that starts with 16 channels"),
    "towers": ("torchvision", {"head": {"stacked_convs": 3}}, "a head with 3 convolutions in a tower"),
    "wide head": ("torchvision", {"head": {"feat_channels": 128}}, "a head that is not as wide as the FPN"),
    "pooling": ("torchvision", {"neck": {"add_extra_convs": "off"}}, "0 extra levels of the FPN"),
    "neck norm": ("torchvision", {"neck": GROUPS}, "neck.lateral_convs.0.gn.weight"),
    "upsampling": ("torchvision", {"neck": {"upsample_cfg": {"mode": "bilinear"}}}, "upsample_cfg.mode: bilinear"),
    "activation": ("torchvision", {"neck": {"act_cfg": "ReLU"}}, "model.neck.act_cfg"),
    "coder": ("torchvision", {"head": {"bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_stds": [
        0.1, 0.1, 0.2, 0.2]}}}, "bbox_coder"),
    "offset": ("torchvision", {"anchors": "mmdet", "offset": 0.5}, "anchor_generator.center_offset"),
    "d2 source": ("detectron2", {"neck": {"add_extra_convs": "on_output"}}, "add_extra_convs: on_output"),
    "d2 narrow": ("detectron2", {"backbone": {"base_channels": 16}}, "a ResNet that starts with 16 channels"),
    "d2 eps": ("detectron2", {"backbone": {"norm_cfg": {"type": "FrozenBN", "eps": 1e-3}}}, "norm_cfg.eps: 0.001"),
    "d2 anchors": ("detectron2", {"anchors": "torchvision"}, "anchor_generator.style: torchvision")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_counterpart_is_refused(tmp_path, case):
    project, changes, expected = REFUSED[case]
    model = section(project, width=32, **copy.deepcopy(changes))
    detector = build_detector(model)
    path = tmp_path / "last.pth"
    torch.save({"format": "densekd", "model": detector.state_dict(), "config": {"model": model}}, path)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(path, project, tmp_path / "out.pth")
    message = str(caught.value)
    assert message.startswith(f"checkpoint {path}: {project}'s RetinaNet has no counterpart of ")
    assert expected in message and len(message.splitlines()) == 1 and not (tmp_path / "out.pth").exists()


def test_without_a_configuration(tmp_path):
    """What the weights show is checked; the order of anchors must be known from the format."""
    model = tiny()
    ours = lively(model)
    state, out = ours.state_dict(), tmp_path / "out.pth"
    line = convert_checkpoint({"format": "densekd", "model": state}, "detectron2", out)
    assert line.endswith("its settings are not known, so they were not compared, and anchors are in the same order as "
                         "before: --cfg gives the settings")
    with pytest.raises(CheckpointError, match="detectron2 orders anchors otherwise than mmdet2, .* give --cfg"):
        convert_checkpoint({"meta": {}, "state_dict": state}, "detectron2", out)
    with pytest.raises(CheckpointError, match="torchvision orders anchors otherwise than detectron2, .* give --cfg"):
        convert_checkpoint(out, "torchvision", tmp_path / "no.pth")
    convert_checkpoint({"meta": {}, "state_dict": state}, "detectron2", out, config={"model": model})
    with pytest.raises(CheckpointError, match="the configuration is not the one of .*other shapes or are missing"):
        convert_checkpoint(out, "detectron2", tmp_path / "no.pth", config={"model": tiny(head={"stacked_convs": 2})})
    with pytest.raises(CheckpointError, match=r"the configuration of .* cannot be used \(.*\): give --cfg"):
        convert_checkpoint(out, "detectron2", tmp_path / "no.pth", config={"model": {"backbone": 3}})
    assert not (tmp_path / "no.pth").exists()


def test_what_the_other_model_must_be_given():
    def said(project, **changes):
        return remarks(build_detector(tiny(**changes)), project)

    pixels = "give detectron2 the pixel mean [123.675, 116.28, 103.53] and deviation [58.395, 57.12, 57.375], RGB"
    assert said("detectron2") == said("detectron2", anchors="mmdet") == [pixels]
    assert said("detectron2", offset=0.5)[1:] == ["give it the sizes, ratios and offset of this model's anchors, which "
                                                  "are not its own"]
    norm = {"depth": 50, "style": "pytorch", "norm_cfg": {"type": "FrozenBN", "eps": 0.0}}
    found = remarks(build_detector(section("detectron2", backbone=norm | {"base_channels": 8}, width=32)), "detectron2")
    assert found[1:] == ["give its batch norms the eps 0", "set MODEL.RESNETS.STRIDE_IN_1X1 to False"]
    assert len(remarks(build_detector(section(width=32)), "torchvision")) == 1


def test_only_retinanets():
    gfl = {"bbox_head.gfl_cls.weight": torch.ones(1)}
    for project, convert in (("torchvision", to_torchvision), ("detectron2", to_detectron2)):
        with pytest.raises(CheckpointError, match=f"only a RetinaNet can be converted to {project}"):
            convert(gfl)
        for name in ("mask_head.weight", "backbone.features.0.0.weight", "backbone.layer1.0.attn.q.weight",
                     "neck.downsample_convs.0.conv.weight"):
            with pytest.raises(CheckpointError, match=f"no counterpart of {name}"):
                convert({"bbox_head.retina_cls.weight": torch.ones(1), name: torch.ones(1)})
