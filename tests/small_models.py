"""Small detectors and batches for tests."""
import copy

import torch

from kd import Distiller, build_distiller
from models import build_detector

CLASSES = 3
GROUPS = {"norm_cfg": {"type": "GN", "num_groups": 4}}
VARIANTS = {"GFLv2": {"type": "GFLHead", **GROUPS, "reg_max": 8, "reg_topk": 4, "reg_channels": 8},
            "PAA": {"type": "ATSSHead", **GROUPS, "quality": "iou"}}
HEADS = {"GFLHead": GROUPS | {"reg_max": 8}, "RetinaHead": {}, "ATSSHead": GROUPS, "FCOSHead": GROUPS}


def small_config(kind="GFLHead", depth=18, width=16, **sections) -> dict:
    """A `model` section; `backbone`, `neck`, `head`, `test` and `preprocess` add to it; `neck=None` removes it.

    `kind` is a key of HEADS or VARIANTS.
    """
    cfg = {
        "backbone": {"type": "ResNet", "depth": depth, "base_channels": 8},
        "neck": {"type": "FPN", "out_channels": width, "start_level": 1, "num_outs": 5,
                 "add_extra_convs": "on_output"},
        "head": {"type": kind, "num_classes": CLASSES, "stacked_convs": 2, "feat_channels": width,
                 **(HEADS | VARIANTS)[kind]}}
    for name, section in copy.deepcopy(sections).items():
        cfg[name] = None if section is None else cfg.get(name, {}) | section
    return cfg


def without_weights(cfg: dict) -> dict:
    """A `model` section whose backbone has no weights to download."""
    return cfg | {"backbone": {key: value for key, value in cfg["backbone"].items() if key != "weights"}}


def small_detector(kind="GFLHead", seed=0, dtype=torch.float64, **sections):
    torch.manual_seed(seed)
    return build_detector(small_config(kind, **sections)).to(dtype)


def enliven(model, seed=0):
    """Give a head larger random weights and biases, so that it detects something everywhere without training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.bbox_head.named_parameters():
            if name.endswith("weight") and value.dim() == 4:
                value.copy_(0.1 * torch.randn(value.shape, generator=g))
            elif name.endswith("bias"):
                value.copy_(0.1 * torch.randn(value.shape, generator=g))
    return model


def make_batch(sizes=((64, 96), (50, 70)), counts=(4, 2), dtype=torch.float64, seed=0, ignored=0):
    """Images (N, 3, H, W), zero beyond each size, and targets. Originals have twice the height, 3 times the width."""
    g = torch.Generator().manual_seed(seed)
    height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes))
    images, targets = torch.zeros(len(sizes), 3, height, width, dtype=dtype), []

    def boxes(n, h, w):
        start = torch.rand(n, 2, generator=g) * torch.tensor([w, h]) * 0.6
        return torch.cat([start, start + 6 + torch.rand(n, 2, generator=g) * torch.tensor([w, h]) * 0.3], 1).to(dtype)

    for image, (h, w), n in zip(images, sizes, counts):
        image[:, :h, :w] = torch.randn(3, h, w, generator=g).to(dtype)
        targets.append({"boxes": boxes(n, h, w), "labels": torch.randint(0, CLASSES, (n,), generator=g),
                        "image_size": (h, w), "original_size": (2 * h, 3 * w)})
        if ignored:
            targets[-1]["ignored_boxes"] = boxes(ignored, h, w)
    return images, targets


def same_losses(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def gradients(model, losses: dict) -> dict:
    """The gradient of the sum of the losses for each parameter, or None."""
    model.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def teacher_entry(head: str = "GFLHead", name: str | None = None, head_: dict | None = None, **sections) -> dict:
    """An entry of `distill.teacher` for an untrained small detector; `head_` adds to its head's section."""
    if head_ is not None:
        sections["head"] = head_
    return {"model": small_config(head, **sections), "checkpoint": None} | ({} if name is None else {"name": name})


def small_distiller(*methods: dict, head: str = "GFLHead", teacher: dict | list | None = None, seed: int = 0,
                    dtype: torch.dtype = torch.float64, student: dict | None = None, **distill) -> Distiller:
    """A distiller in training mode; all its detectors have heads that detect something (see `enliven`)."""
    torch.manual_seed(seed)
    teacher = teacher_entry(head) if teacher is None else teacher
    model = build_distiller({"model": small_config(head, **(student or {})),
                             "distill": {"teacher": teacher, "methods": list(methods), **distill}})
    for i, detector in enumerate([model.student, *model.teachers]):
        if detector.bbox_head is not None:
            enliven(detector, seed + i)
    return model.to(dtype).train()


def falls(model: Distiller, share: float = 0.96) -> dict:
    """Twenty steps on only the methods' losses (an untrained teacher contradicts the boxes) lower their sum.

    The decrease depends on the method; for CWD and for boxes of an untrained teacher it is only a few per cent.
    """
    batch = make_batch(dtype=torch.float32)
    before = [copy.deepcopy(teacher.state_dict()) for teacher in model.teachers]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.002)
    history = []
    for step in range(20):
        model.advance(step, 10, 2)
        torch.manual_seed(0)  # the same mask of MGD in every step
        losses = model(*batch)
        total = sum(sum(values) for values in model.by_method(losses).values())
        history.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert sum(history[-3:]) / 3 < share * max(history[:3]), history
    for teacher, state in zip(model.teachers, before):
        assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    return losses
