"""Nothing in a training step waits for the GPU."""
import copy
from contextlib import contextmanager

import pytest
import torch
from small_models import HEADS, VARIANTS, make_batch, small_config, small_distiller, teacher_entry
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kd import METHODS, build_distiller
from kd.engine.average import WeightAverage

ON_ALL_HEADS = ("CrossKD", "Mimic", "FGD", "PKD", "MGD", "CWD", "FitNet", "KD", "BCKD", "GI", "PGD", "FRS")
CASES = [(method, head) for method in ON_ALL_HEADS for head in HEADS] + [("LD", "GFLHead"), ("DKD", "GFLHead")]
CASES += [("CrossKD", head) for head in (*VARIANTS, "GFLHead <- RetinaHead", "RetinaHead <- ATSSHead")]


def entry(method: str) -> dict:
    kl = {"type": "KnowledgeDistillationKLDivLoss", "loss_weight": 10, "T": 2}
    options = {"CrossKD": {"reused_teacher_head_idx": 1}, "BCKD": {"only_levels_with_positives": True},
               "LD": {"vlr_weight": 0.25, "loss_kd": kl, "loss_kd_vlr": kl}}
    return {"type": method} | options.get(method, {})


def test_no_method_is_forgotten():
    assert {method for method, _ in CASES} == METHODS.keys()


class CopiesThatWait(TorchDispatchMode):
    """Counts copies between CPU and GPU that the CPU waits for. FakeTensorMode itself raises for what reads a value on
    the GPU: item(), nonzero(), a mask as index."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function)
        if name.startswith("aten._to_copy") and "device" in kwargs:
            moved = torch.device(kwargs["device"]).type != args[0].device.type
        else:
            moved = name.startswith("aten.copy_") and args[0].device.type != args[1].device.type
        if moved and not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
            self.found.append(name)
        return function(*args, **kwargs)


@contextmanager
def pretended_gpu():
    """A GPU on which nothing is computed; yields the copies that the CPU waited for."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), CopiesThatWait() as copies:
        yield copies.found


def on_gpu(targets: list[dict]) -> list[dict]:
    return [{k: v.to("cuda", non_blocking=True) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]


def config(method: str, head: str, **more: object) -> dict:
    head, _, other = head.partition(" <- ")
    teacher = teacher_entry(other or head, preprocess={"channel_order": "bgr"}) | more
    return {"model": small_config(head), "distill": {"teacher": teacher, "methods": [entry(method)]}}


@pytest.mark.parametrize("method, head, more", [
    *((*case, {}) for case in CASES),
    *((method, "GFLHead", {"class_map": [1, None, 2]}) for method in ("CrossKD", "Mimic", "KD", "DKD", "LD", "CWD"))])
def test_losses_do_not_wait(method, head, more):
    with pretended_gpu() as found:
        distiller = build_distiller(config(method, head, **more)).train()
        images, targets = make_batch(dtype=torch.float32, ignored=1)
        images, targets = images.to("cuda"), on_gpu(targets)
        with torch.no_grad():  # no backward without a driver
            distiller.loss(images, targets)  # anchors are made for the first batch of a shape
            found.clear()
            losses = distiller.loss(images, targets)
        assert all(value.device.type == "cuda" for value in losses.values())
    assert not found


@pytest.mark.parametrize("method, head", [("Mimic", head) for head in HEADS] + [
    ("FGD", "GFLHead"), ("CrossKD", "GFLHead")])
def test_unlabelled_images_do_not_make_it_wait(method, head):
    with pretended_gpu() as found:
        distiller = build_distiller(config(method, head)).train()
        images, targets = make_batch(dtype=torch.float32, ignored=1)
        images, targets = images.to("cuda"), on_gpu([targets[0], targets[1] | {"unlabelled": True}])
        with torch.no_grad():
            distiller.loss(images, targets)
            found.clear()
            distiller.loss(images, targets)
    assert not found


def test_measured_weights_do_not_wait():
    """The gradients themselves need a driver; here is what becomes of their norms."""
    cfg = config("FGD", "GFLHead")
    cfg["distill"]["methods"][0]["weight"] = {"gradient_share": 0.3}
    with pretended_gpu() as found:
        shares = build_distiller(cfg).gradient_shares
        norms = torch.ones(2, device="cuda")
        found.clear()
        shares.update(norms)
        assert shares.weigh("FGD0", 0.3).device.type == "cuda"
    assert not found


def test_the_average_of_the_weights_does_not_wait(monkeypatch):
    with pretended_gpu() as found:
        student, other = (build_distiller(config("FGD", "GFLHead")).student for _ in range(2))
        monkeypatch.setattr(copy, "deepcopy", lambda _: other)  # a fake tensor cannot be copied
        average = WeightAverage(student, 0.9)
        found.clear()
        for _ in range(2):
            average.update(student)
    assert not found


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(),
                                  lambda x: torch.equal(x, x), lambda x: x.new_tensor([1.0]), lambda x: x.cpu(),
                                  lambda x: torch.tensor([1.0], device="cuda")])
def test_the_watch_sees_waiting(wait):
    """The test above would fail for any of these."""
    with pretended_gpu() as found:
        x = torch.randn(4, device="cuda")
        try:
            wait(x)
        except Exception as error:
            found.append(type(error).__name__)
    assert found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method, head", CASES)
def test_a_step_does_not_wait_on_a_gpu(method, head):
    head, _, other = head.partition(" <- ")
    distiller = small_distiller(entry(method), head=head, teacher=teacher_entry(other or head)).float().cuda().train()
    images, targets = make_batch(dtype=torch.float32)
    images, targets = images.cuda(), on_gpu(targets)
    optimizer = torch.optim.SGD(distiller.parameters(), 1e-4, momentum=0.9, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        sum(distiller(images, targets).values()).backward()
        optimizer.step()

    step()  # anchors, cuDNN's choices, the optimiser's state
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
