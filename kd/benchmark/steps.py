"""The calls that the benchmark times for a model: a training step, inference, and their parts."""
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn

from data.digests import digest
from models import Detector, DetectorPass
from models.postprocess import postprocess

from ..build import build_model
from ..cache import TeacherCache, needs_of
from ..config import Config, TrainConfig, parse_config
from ..distiller import Distiller
from ..engine.layout import Layout, choose_layout
from ..engine.step import compute_losses, random_batch, to_device
from ..inference.precision import autocast
from ..optim import build_optimizer, clip_gradients, lr_factor
from ..processes.timing import Call
from .workload import Workload


@dataclass
class Subject:
    """A model and what trains it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    settings: TrainConfig
    layout: Layout | None = None
    stored: float | None = None  # bytes of the teachers' answers for an image, if they were stored

    @property
    def student(self) -> Detector:
        return self.model.student if isinstance(self.model, Distiller) else self.model


def make_batch(work: Workload, device: torch.device, classes: int) -> tuple[Tensor, list[dict]]:
    """Images and targets as the loader gives them, on the device."""
    return random_batch(work.size, work.batch, work.boxes, classes, device)


def prepare(cfg: Config, work: Workload) -> Config:
    """The configuration without downloads, with a class count and with the workload's precision."""
    mapping = dict(cfg.with_num_classes(work.classes))
    backbone = {key: value for key, value in mapping["model"]["backbone"].items() if key != "weights"}
    mapping["model"] = mapping["model"] | {"backbone": backbone}
    if work.amp:
        mapping["train"] = mapping.get("train", {}) | {"amp": work.amp}
    if cfg.distill:
        said = mapping["distill"]["teacher"]
        teachers = [teacher | {"checkpoint": None} for teacher in (said if isinstance(said, list) else [said])]
        mapping["distill"] = mapping["distill"] | {"teacher": teachers, "cache": None}  # random answers are of no use
    return parse_config(mapping)


def build_subject(cfg: Config, device: torch.device, work: Workload, state: dict | None = None) -> Subject:
    """A configuration's model in training, at the small learning rate of the first step, so that it hardly changes.

    Args:
        state: its `layout` holds memory layouts that were chosen before.
    """
    model = build_model(cfg).to(device).train()
    layout = choose_layout(model, cfg, device, work.size, work.batch, state)
    if cfg.train.compile:
        model.compile()
    optimizer = build_optimizer(cfg.optimizer, model, work.batch)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_factor(cfg.schedule, 0, 1)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.train.amp == "fp16")
    return Subject(model, optimizer, scaler, cfg.train, layout)


def training_step(subject: Subject, images: Tensor, targets: list[dict]) -> Call:
    """A call like `train.train_step` on a batch on the device, without logging; it returns the loss."""

    def step() -> Tensor:
        batch = to_device(images, targets, subject.student, images.device)
        total = compute_losses(subject.model, *batch, images.device, subject.settings.amp).total
        update(subject, total)
        return total.detach()

    return step


def cached_step(subject: Subject, images: Tensor, targets: list[dict], folder: Path) -> Call:
    """`training_step` that reads the teachers' answers, see `distill.cache`; they are stored here.

    They are read from files while the student runs. In training they are read earlier, while the step before runs.
    """
    settings = subject.settings
    shown = [target | {"digest": digest(image, target["image_size"])} for image, target in zip(images, targets)]
    step, caches = training_step(subject, images, shown), []
    for i, teacher in enumerate(subject.model.teachers):
        caches.append(TeacherCache(folder / str(i), subject.student, teacher,
                                   needs_of(subject.model.methods[i], teacher), {}, amp=settings.amp))

    def cached() -> Tensor:
        subject.model.caches = caches
        try:
            subject.model.read_ahead(shown, 1, 1)
            return step()
        finally:
            subject.model.caches = []

    cached()
    for cache in caches:
        cache.finish()
    subject.stored = sum(cache.store.size / cache.store.entries for cache in caches)
    return cached


def update(subject: Subject, total: Tensor) -> None:
    """Backward and the optimiser, as in `train.train_step`."""
    subject.optimizer.zero_grad(set_to_none=True)
    subject.scaler.scale(total).backward()
    subject.scaler.unscale_(subject.optimizer)
    clip_gradients(subject.model, subject.settings.grad_clip)
    subject.scaler.step(subject.optimizer)
    subject.scaler.update()


def yardstick_step(images: Tensor, targets: list[dict], work: Workload) -> Call:
    """A training step of torchvision's RetinaNet-R50, with all layers trained, on the same images and boxes."""
    device, settings = images.device, TrainConfig(amp=work.amp or "none")
    model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81, min_size=min(work.size),
                                   max_size=max(work.size)).to(device).train()
    subject = Subject(model, torch.optim.SGD(model.parameters(), 1e-5, momentum=0.9, weight_decay=1e-4),
                      torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16"), settings)
    height, width = work.size
    inputs = list((images[:, :, :height, :width] / 255).contiguous())
    truth = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]  # 0 is background there

    def step() -> Tensor:
        with autocast(device, settings.amp):
            total = sum(model(inputs, truth).values())
        update(subject, total)
        return total.detach()

    return step


def predict_call(subject: Subject, images: Tensor, targets: list[dict]) -> Call:
    """A call from the batch on the device to detections, as in `evaluate.detect`."""

    @torch.no_grad()
    def predict() -> list[dict]:
        batch = subject.student.preprocess(images, targets)
        with autocast(images.device, subject.settings.amp):
            return subject.student.predict(batch, targets)

    return predict


def part_calls(subject: Subject, images: Tensor, targets: list[dict]) -> dict[str, Call]:
    """Calls of the parts of a step and of inference, each on outputs that are computed here once.

    Losses and methods run forward, and backward to the student's features and predictions and a method's own weights;
    a method that reuses the teacher's head runs it. Anchors are those of a shape seen before.
    """
    model, student = subject.model, subject.student
    head, amp = student.bbox_head, autocast(images.device, subject.settings.amp)
    plan = model.plan() if isinstance(model, Distiller) else []
    wanted = [entry.method for _, entries in plan for entry in entries]
    images, targets = to_device(images, targets, student, images.device)
    with torch.no_grad(), amp:
        own = model.run_student(images, targets, plan) if plan else student.run(images, targets, assign=True)
    own, leaves = cut_off(own)
    trained = leaves + [p for method in wanted for p in method.parameters()]

    def under_amp(call: Call, train: bool = False) -> Call:
        def run() -> None:
            with amp, torch.set_grad_enabled(train):
                result = call()
            if train:
                torch.autograd.grad(sum(result.values()), trained, allow_unused=True)
        return run

    calls = {"anchors": under_amp(lambda: head.priors(own.outputs)),
             "assignment": under_amp(lambda: head.assign(own.outputs, targets)),
             "losses": under_amp(lambda: head.losses(own.outputs, own.assignment), train=True)}
    for i, (teacher, entries) in enumerate(plan):
        suffix = f" {i}" if len(plan) > 1 else ""
        calls[f"teacher{suffix}"] = under_amp(lambda t=teacher, e=entries: model.run_teacher(t, e, images, targets))
        with amp:
            seen = model.run_teacher(teacher, entries, images, targets)
        for method, label, _ in entries:
            calls[f"method {label}"] = under_amp(lambda m=method, s=seen: m(own, s), train=True)
    return calls | {"post-processing": under_amp(lambda: postprocess(head, own.outputs, targets, student.test))}


@torch.no_grad()
def set_typical_threshold(subject: Subject, images: Tensor, targets: list[dict]) -> None:
    """Set a threshold that one score in a thousand passes, as with a trained detector; random scores are lower."""
    with autocast(images.device, subject.settings.amp):
        outputs = subject.student.run(subject.student.preprocess(images, targets), targets).outputs
    scores = subject.student.bbox_head.candidate_scores(outputs.cls, outputs.centerness).flatten()
    subject.student.test.score_thr = scores.topk(max(1, len(scores) // 1000)).values[-1].item()


def cut_off(run: DetectorPass) -> tuple[DetectorPass, list[Tensor]]:
    """A copy of a pass whose features and outputs are leaves that require gradients, and these leaves."""
    leaves = []

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]
        if is_dataclass(value):
            return replace(value, **{field.name: cut(getattr(value, field.name)) for field in fields(value)})
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        return type(value)(map(cut, value)) if isinstance(value, (list, tuple)) else value

    return replace(run, features=cut(run.features), outputs=cut(run.outputs), modules=cut(run.modules)), leaves
