"""What the README shows runs as it stands there."""
import re

import pytest
import torch
from runs import ROOT
from small_models import make_batch, small_config

import kd.distiller
from kd import Method, build_distiller

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_method_of_the_readme(monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "(Method)" in block)
    scope = {"Method": Method}
    exec(code, scope)  # noqa: S102 our own README
    monkeypatch.setitem(kd.distiller.METHODS, "LogitMSE", scope["LogitMSE"])
    torch.manual_seed(0)
    cfg = {"model": small_config(), "distill": {"teacher": {"model": small_config(), "checkpoint": None},
                                                "methods": [{"type": "LogitMSE", "loss_weight": 2}]}}
    distiller = build_distiller(cfg)
    losses = distiller.train().loss(*make_batch(dtype=torch.float32))
    assert losses["loss_cls_kd"] > 0
    losses["loss_cls_kd"].backward()
    cfg["distill"]["methods"][0]["loss_weight"] = "much"
    with pytest.raises(ValueError, match="methods.0.loss_weight: must be a number"):
        build_distiller(cfg)


def test_what_the_readme_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links), links


def test_configurations_named_in_the_readme_exist():
    assert all((ROOT / name).exists() for name in re.findall(r"configs/[\w/]+\.yaml", README))
