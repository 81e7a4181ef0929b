"""Every configuration builds a model, has finite gradients, and has the losses of its head and methods."""
from pathlib import Path

import pytest
import torch
from runs import CONFIGS, ROOT, built
from small_models import make_batch

from kd import METHODS
from kd.config import load_config

HEAD_LOSSES = {"GFLHead": {"loss_dfl"}, "ATSSHead": {"loss_centerness"}, "FCOSHead": {"loss_centerness"},
               "RetinaHead": set()}
METHOD_LOSSES = {"CrossKD": {"loss_cls_kd", "loss_reg_kd"}, "Mimic": {"loss_cls_kd", "loss_reg_kd"},
                 "FGD": {"loss_fgd"}, "PKD": {"loss_feat_kd"}, "LD": {"loss_ld"}, "MGD": {"loss_mgd"},
                 "CWD": {"loss_cwd"}, "BCKD": {"loss_cls_kd", "loss_reg_kd"}, "PGD": {"loss_pgd_cls", "loss_pgd_reg"},
                 "FRS": {"loss_frs_feat", "loss_frs_cls"}}


def expected_losses(cfg: dict) -> set[str]:
    expected = {"loss_cls", "loss_bbox"} | HEAD_LOSSES[cfg["model"]["head"]["type"]]
    distill = cfg.get("distill", {"teacher": {}, "methods": []})
    several = [teacher["name"] for teacher in distill["teacher"]] if isinstance(distill["teacher"], list) else []
    for i, method in enumerate(distill["methods"]):
        found = METHOD_LOSSES[method["type"]] | ({"loss_center_kd"} & method.keys())
        found |= {"loss_kd", "loss_kd_vlr"} & method.keys() if method["type"] == "LD" else set()
        found |= {"loss_ld_vlr"} if method.get("vlr_weight") else set()
        expected |= {f"{loss}/{name}/{method['type']}{i}" for name in several for loss in found} if several else found
    return expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_config(path):
    cfg = load_config(path)
    if cfg["model"]["backbone"]["type"] == "TimmBackbone":
        pytest.importorskip("timm", reason="needs the extra timm")
    expected, model = expected_losses(cfg), built(cfg)
    images, targets = make_batch(dtype=torch.float32)
    losses = model.loss(images, targets)
    assert set(losses) == expected
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_the_readme_of_the_configurations_names_each_folder():
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    folders = {path.parent.name for path in CONFIGS}
    assert all(f"`{folder}/" in text for folder in folders)


def test_published_pairs_are_as_in_the_papers():
    configs = ROOT / "configs"
    cfg = load_config(configs / "crosskd/crosskd_r18_gfl_r50_1x.yaml")
    assert cfg["model"]["backbone"]["depth"] == 18 and cfg["train"]["epochs"] == 12
    assert cfg["distill"]["methods"][0]["loss_reg_kd"] == {
        "type": "KnowledgeDistillationKLDivLoss", "class_reduction": "sum", "T": 1, "loss_weight": 4.0}
    cfg = load_config(configs / "fgd/fgd_r50_retinanet_r101_2x.yaml")
    assert cfg["train"]["epochs"] == 24 and cfg["schedule"]["milestones"] == [16, 22]
    assert load_config(Path(ROOT, cfg["distill"]["teacher"]["cfg"]))["model"]["backbone"]["depth"] == 101
    assert set(METHODS) >= {"CrossKD", "FGD"}
    for depth in (18, 34, 50):
        bckd, ld = (load_config(configs / f"{name}_r{depth}_gfl_r101_1x.yaml")
                    for name in ("bckd/bckd", "ld/ld_kd_vlr"))
        for cfg in (bckd, ld):
            assert cfg["model"]["backbone"]["depth"] == depth and cfg["train"]["epochs"] == 12
            assert cfg["distill"]["teacher"]["checkpoint"] == "zoo:gfl_r101_2x"
        assert bckd["data"]["batch_size"] == 2 and bckd["distill"]["methods"][0]["loss_score_kd"]["loss_weight"] == 4.0
        without = load_config(configs / f"ld/ld_vlr_r{depth}_gfl_r101_1x.yaml")["distill"]["methods"][0]
        assert ld["distill"]["methods"] == [without | {
            "loss_kd": {"type": "KnowledgeDistillationKLDivLoss", "loss_weight": 10, "T": 2}}]
