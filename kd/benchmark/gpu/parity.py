"""Mixed precision compared with float32: losses and gradients of one batch."""
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.heads.fcos import FCOSHead

from ...build import build_model
from ...config import Config, parse_config
from ...distiller import Distiller
from ...engine.step import compute_losses, seed_step, to_device
from ...exceptions import TrainingError
from ..steps import make_batch, prepare
from ..workload import Workload

LOSS_SCALES = (2.0 ** 10, 2.0 ** 5, 1.0, 2.0 ** -5)  # in fp16: the first without overflow, as a GradScaler finds it
# The largest difference from float32: of each loss, in units of this loss, and of the whole gradient, in its norm.
BOUNDS = {"bf16": {"loss": 0.02, "gradient": 0.3}, "fp16": {"loss": 0.005, "gradient": 0.1}}


def with_methods(cfg: Config, *methods: dict) -> Config:
    """The configuration with more methods."""
    mapping = dict(cfg)
    mapping["distill"] = mapping["distill"] | {"methods": [*mapping["distill"]["methods"], *methods]}
    return parse_config(mapping)


def compare_precision(cfg: Config, work: Workload, device: torch.device, amp: str) -> dict:
    """How far losses and gradients of a configuration in mixed precision are from those in float32 (not TF32).

    The models have random weights; those of the heads are large enough that predictions differ as after training. The
    norms of the backbones should use the batch's statistics: without them, an untrained backbone enlarges every error.
    Returns:
        `losses`: the relative difference of each; `gradient`: the norm of the difference of the whole gradient, in
        units of its norm; `within`: whether all are within `BOUNDS`.
    Raises:
        TrainingError: a loss or a gradient is not finite.
    """
    torch.manual_seed(0)
    cfg = prepare(cfg, work)
    model = build_model(cfg).to(device).train()
    for detector in (model.student, *model.teachers) if isinstance(model, Distiller) else (model,):
        spread(detector.bbox_head)
    images, targets = make_batch(work, device, cfg.model.head["num_classes"])
    with without_tf32():
        exact_losses, exact = losses_and_gradients(model, images, targets, "none")
        for scale in LOSS_SCALES if amp == "fp16" else (1.0,):
            losses, gradients = losses_and_gradients(model, images, targets, amp, scale)
            if math.isfinite(norm(gradients)):
                break
    found = {name: float((value - exact_losses[name]).abs() / exact_losses[name].abs().clamp(min=1e-12))
             for name, value in losses.items()}
    difference = norm([g - e for g, e in zip(gradients, exact)]) / norm(exact)
    values = torch.tensor([*found.values(), difference])
    if not values.isfinite().all():
        raise TrainingError(f"{amp}: a loss or a gradient is not finite: losses {found}, gradient {difference}")
    bounds = BOUNDS[amp]
    return {"losses": found, "gradient": difference, "bounds": bounds,
            "within": max(found.values()) <= bounds["loss"] and difference <= bounds["gradient"]}


def losses_and_gradients(model: nn.Module, images: Tensor, targets: list[dict], amp: str, scale: float = 1.0
                         ) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Each loss, and the gradients of all trained parameters that have one, in float32; `scale` multiplies the loss
    before the backward pass."""
    seed_step(0, 0, 0)  # the same masks
    model.zero_grad(set_to_none=True)
    batch = to_device(images, targets, getattr(model, "student", model), images.device)
    losses, total, _ = compute_losses(model, *batch, images.device, amp)
    (scale * total).backward()
    return ({name: value.detach().float() for name, value in losses.items() if "loss" in name},
            [p.grad.float() / scale for p in model.parameters() if p.grad is not None])


def norm(tensors: Sequence[Tensor]) -> float:
    """The norm of all tensors together."""
    return float(nn.utils.get_total_norm(tensors))


@torch.no_grad()
def spread(head: nn.Module) -> None:
    """Give convolutions weights that keep the spread of their inputs (arXiv:1502.01852), and biases of either sign."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    if isinstance(head, FCOSHead):
        head.conv_reg.bias.add_(4)  # strides, or e^4 pixels: the loss of boxes without area has spikes


@contextmanager
def without_tf32() -> Iterator[None]:
    """A context in which float32 products on a GPU have all digits of float32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
