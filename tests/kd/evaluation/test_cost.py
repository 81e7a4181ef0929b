"""The cost of detectors."""
import pytest
import torch
from runs import ROOT, config, run_script, write_config
from small_models import small_config, small_detector
from torch.utils.flop_counter import FlopCounterMode

from data import generate_scenes
from kd import build_distiller
from kd.config import load_config
from kd.evaluation.cost import (
    PARTS,
    brief,
    count_flops,
    count_parameters,
    measure,
    models_of,
    summarize,
    typical_size,
)
from models import build_detector

SIZE = (64, 96)
every_head = pytest.mark.parametrize("head", ["GFLHead", "RetinaHead", "ATSSHead", "FCOSHead"])
SWIN = {"backbone": {"type": "TorchvisionBackbone", "name": "swin_t", "nodes": ["features.3", "features.5"]}}


def run(detector, size):
    return detector.bbox_head(detector.extract_features(torch.zeros(1, 3, *size, dtype=torch.float64)))


@every_head
def test_operations_are_those_of_a_real_run(head):
    detector = small_detector(head)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(detector.eval(), SIZE)
    found = summarize(detector, SIZE)
    assert count_flops(detector, SIZE) == found.total_flops == counter.get_total_flops() > 1e6
    assert found.total_parameters == count_parameters(detector) == sum(p.numel() for p in detector.parameters())


@pytest.mark.parametrize("frozen", [-1, 1])
@pytest.mark.parametrize("norm_eval", [False, True])
def test_activations_are_what_a_real_run_keeps(frozen, norm_eval):
    detector = small_detector(backbone={"frozen_stages": frozen, "norm_eval": norm_eval}).train()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = run(detector, SIZE)
    for value in [*detector.parameters(), *detector.buffers()]:
        kept.pop(value.untyped_storage().data_ptr(), None)
    assert outputs is not None and measure(detector, SIZE)[1] == sum(kept.values()) > 1e5


def test_modules_sum_up_to_their_parts():
    found = summarize(small_detector("FCOSHead"), SIZE)
    for part in PARTS:
        inner = [f"{part}.{name}" for name in found.children[part]]
        assert len(inner) > 1 and found.flops[part] == sum(found.flops[name] for name in inner)
        assert 0 <= found.parameters[part] - sum(found.parameters[name] for name in inner) < 2000  # norms left out
    assert {"backbone.conv1", "backbone.layer4", "neck.lateral_convs", "bbox_head.reg_convs"} <= found.flops.keys()
    # two convolutions of 16 channels in each tower, on all five levels
    cells = sum(h * w for h, w in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1)))
    assert found.flops["bbox_head.cls_convs"] == 2 * 2 * 16 * 16 * 9 * cells
    assert found.weight_bytes == sum(v.nbytes for v in small_detector("FCOSHead").state_dict().values()) \
        + 6 * 8  # mean and std of pixels


def test_functions_that_are_no_modules_have_a_line():
    """Swin's attention is a function."""
    anchors = {"type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1}
    cfg = small_config(neck={"start_level": 0, "num_outs": 2, "add_extra_convs": "off"},
                       head={"anchor_generator": anchors | {"strides": [8, 16]}})
    cfg["backbone"] = {"type": "TorchvisionBackbone", "name": "swin_t", "nodes": ["features.3", "features.5"]}
    found = summarize(build_detector(cfg), SIZE)
    assert found.flops["backbone.functions"] > 1e6 and found.flops["backbone.features"] > 1e6
    assert found.flops["backbone"] == sum(found.flops[f"backbone.{name}"] for name in found.children["backbone"])


@every_head
def test_levels(head):
    found = summarize(small_detector(head), SIZE).levels
    assert [level.stride for level in found] == [8, 16, 32, 64, 128]
    assert [level.size for level in found] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    expected = {"GFLHead": "an anchor a cell of side 128 px", "ATSSHead": "an anchor a cell of side 128 px",
                "RetinaHead": "9 anchors a cell of side 64, 81, 102 px, height : width 0.5, 1, 2",
                "FCOSHead": "a point, learns distances from 64 to 128 px"}[head]
    assert found[1].anchors == expected


def test_the_detector_is_left_as_it_was():
    detector = small_detector(backbone={"norm_eval": True}).train()
    modes = [module.training for module in detector.modules()]
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    summarize(detector, SIZE)
    assert [module.training for module in detector.modules()] == modes and True in modes and False in modes
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())
    assert not any(module._forward_hooks for module in detector.modules())


def test_a_teacher_keeps_nothing_for_backward():
    distiller = build_distiller({"model": small_config(), "distill": {
        "teacher": {"model": small_config(), "checkpoint": None}, "methods": [{"type": "FGD"}]}})
    assert measure(distiller.teacher, SIZE)[1] is None
    assert "activations" in brief(distiller.student, SIZE) and "activations" not in brief(distiller.teacher, SIZE)


def test_size():
    assert typical_size((1333, 800)) == (800, 1344) and typical_size((240, 320)) == (256, 320)


def test_script(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert run_script(monkeypatch, "summary.py", "--cfg", "configs/crosskd/crosskd_r18_gfl_r50_1x.yaml", "--size", 60,
                      90, "model.head.num_classes=80") == 0
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[1:] for line in printed.splitlines() if line[:1].isalpha()}
    assert "on one image of 64 x 96" in printed and "levels of student and teacher" in printed
    models = models_of(load_config("configs/crosskd/crosskd_r18_gfl_r50_1x.yaml", ["model.head.num_classes=80"]))
    assert rows["all"][::2] == [f"{count_parameters(model) / 1e6:.3f}" for model in models.values()]
    assert float(rows["all"][1]) < float(rows["all"][3])


def test_script_without_a_class_count(tmp_path, monkeypatch, capsys):
    scenes = generate_scenes(tmp_path / "scenes", train=1, val=1, size=(64, 64))
    cfg = config(scenes, distill={"teacher": {"model": config(scenes)["model"], "checkpoint": "nowhere.pth"},
                                  "methods": [{"type": "FGD"}]})
    path = write_config(tmp_path / "cfg.yaml", cfg)
    assert run_script(monkeypatch, "summary.py", "--cfg", path) == 0  # six in the annotations; no weights are read
    assert "teacher" in capsys.readouterr().out
    assert run_script(monkeypatch, "summary.py", "--cfg", path, "data.val=null") == 2
    assert "give for example model.head.num_classes=80" in capsys.readouterr().err
