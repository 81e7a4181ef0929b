"""Reference values of the original code: reads them, converts their configurations to ours, and measures deviations."""
import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models import HEADS, DenseHead, Detector, HeadOutputs, build_detector

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [torch.float64, torch.float32]


@cache
def load(name: str) -> tuple[dict, dict]:
    """A golden file: its arrays by path, and its meta."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    return arrays, meta


def cases(prefix: str) -> list[str]:
    """Names of the golden files that start with `prefix`."""
    return sorted(path.stem for path in GOLDEN.glob(f"{prefix}*.npz"))


def under(arrays: dict, prefix: str) -> dict:
    """The arrays whose key starts with `prefix/`; the new keys are without it."""
    return {k[len(prefix) + 1:]: v for k, v in arrays.items() if k.startswith(prefix + "/")}


def weights(name: str) -> dict:
    return tensors(under(load(name)[0], "state_dict"))


def tensors(arrays: dict) -> dict[str, Tensor]:
    return {k: torch.from_numpy(v) for k, v in arrays.items()}


def batch(arrays: dict, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[dict]]:
    """Images and targets of a case."""
    images = torch.from_numpy(arrays["images"]).to(dtype)
    targets = []
    for i in range(len(images)):
        part = under(arrays, f"targets/{i}")
        target = {"boxes": torch.from_numpy(part["boxes"]).to(dtype), "labels": torch.from_numpy(part["labels"])}
        for size in ("image_size", "pad_size", "original_size"):
            target[size] = (int(part[f"{size}/0"]), int(part[f"{size}/1"]))
        targets.append(target)
    return images, targets


def has_head(reference: dict) -> bool:
    """Whether the reference's head is one of ours."""
    return reference["bbox_head"]["type"] in HEADS or reference["bbox_head"]["type"] == "LDHead"


def model_config(reference: dict) -> dict:
    """Our `model` section for a reference's configuration."""
    head = dict(reference["bbox_head"])
    if head["type"] == "LDHead":
        head = {k: v for k, v in head.items() if k != "loss_ld"} | {"type": "GFLHead"}
    train, test = reference["train_cfg"], reference["test_cfg"]
    if train is not None:
        head |= {"assigner": train["assigner"], "allowed_border": train["allowed_border"],
                 "pos_weight": train["pos_weight"]}
    return {
        "backbone": reference["backbone"], "neck": reference["neck"], "head": head,
        "test": {"score_thr": test["score_thr"], "nms_pre": test["nms_pre"], "min_bbox_size": test["min_bbox_size"],
                 "nms_iou_threshold": test["nms"]["iou_threshold"], "max_per_img": test["max_per_img"]}}


def load_exactly(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights. The keys must be the same, except for counters that older files do not have."""
    wrong = module.load_state_dict(state, strict=False)
    assert not [key for key in wrong.missing_keys + wrong.unexpected_keys if "num_batches_tracked" not in key]


def detector(reference: dict, state: str, dtype: torch.dtype) -> Detector:
    """The reference's detector with its weights."""
    model = build_detector(model_config(reference))
    load_exactly(model, weights(state))
    return model.to(dtype)


def relative(value: Tensor | float, reference: np.ndarray | float, scale: float | None = None) -> float:
    """Largest deviation, divided by the reference's largest magnitude or by `scale`."""
    value = value.detach().double().numpy() if isinstance(value, Tensor) else value
    assert np.shape(value) == np.shape(reference)
    scale = np.abs(reference).max() if scale is None else scale
    return float(np.abs(value - reference).max(initial=0) / scale)


def gradient_deviation(module: nn.Module, norms: dict) -> float:
    """Largest deviation of a parameter's gradient norm, divided by the norm of the whole gradient.

    Exactly the parameters in `norms` must have a gradient.
    """
    own = {name: p.grad.double().norm().item() for name, p in module.named_parameters() if p.grad is not None}
    assert own.keys() == norms.keys()
    whole = np.sqrt(sum(float(norm) ** 2 for norm in norms.values()))
    return max(abs(own[name] - float(norm)) for name, norm in norms.items()) / whole


def assign_in_float64(head: DenseHead, monkeypatch) -> None:
    """Let a head assign in float64, independent of its own precision.

    All anchors with a box's best overlap become low-quality matches. RetinaNet's regular anchors often have nearly the
    same overlap, and then its last bit decides. So float32 gives other anchors than float64, also in the original, and
    losses could not be compared.
    """
    assign = head.assign

    def exact(outputs, targets):
        wide = HeadOutputs(outputs.cls.double(), outputs.box.double(), None, outputs.sizes)
        found = assign(wide, [t | {"boxes": t["boxes"].double()} for t in targets])
        dtype = outputs.box.dtype
        cast = {f.name: getattr(found, f.name).to(dtype) for f in fields(found)
                if isinstance(getattr(found, f.name), Tensor) and getattr(found, f.name).is_floating_point()}
        priors = found.priors
        return replace(found, **cast, priors=priors._replace(
            boxes=priors.boxes.to(dtype), cells=priors.cells.to(dtype), strides=priors.strides.to(dtype)))

    monkeypatch.setattr(head, "assign", exact)
