"""Nothing in a training step waits for the GPU."""
import copy

import pytest
import torch
from pretended_gpu import on_gpu, pretended_gpu
from small_models import HEADS, VARIANTS, make_batch, small_config, small_distiller, teacher_entry

from kd import METHODS, Distiller, build_distiller
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


def on_pretended_gpu(cfg: dict) -> Distiller:
    with torch.device("cuda"):
        return build_distiller(cfg).train()


def config(method: str, head: str, **more: object) -> dict:
    head, _, other = head.partition(" <- ")
    teacher = teacher_entry(other or head, preprocess={"channel_order": "bgr"}) | more
    return {"model": small_config(head), "distill": {"teacher": teacher, "methods": [entry(method)]}}


@pytest.mark.parametrize("method, head, more", [
    *((*case, {}) for case in CASES),
    *((method, "GFLHead", {"class_map": [1, None, 2]}) for method in ("CrossKD", "Mimic", "KD", "DKD", "LD", "CWD"))])
def test_losses_do_not_wait(method, head, more):
    with pretended_gpu() as found:
        distiller = on_pretended_gpu(config(method, head, **more))
        images, targets = make_batch(dtype=torch.float32, ignored=1)
        images, targets = images.to("cuda"), on_gpu(targets)
        found.clear()
        with torch.no_grad():
            losses = distiller.loss(images, targets)
        assert all(value.device.type == "cuda" for value in losses.values())
    assert not found


@pytest.mark.parametrize("method, head", [("Mimic", head) for head in HEADS] + [
    ("FGD", "GFLHead"), ("CrossKD", "GFLHead")])
def test_unlabelled_images_do_not_make_it_wait(method, head):
    with pretended_gpu() as found:
        distiller = on_pretended_gpu(config(method, head))
        images, targets = make_batch(dtype=torch.float32, ignored=1)
        images, targets = images.to("cuda"), on_gpu([targets[0], targets[1] | {"unlabelled": True}])
        found.clear()
        with torch.no_grad():
            distiller.loss(images, targets)
    assert not found


def test_measured_weights_do_not_wait():
    """The gradients themselves need a driver; here is what becomes of their norms."""
    cfg = config("FGD", "GFLHead")
    cfg["distill"]["methods"][0]["weight"] = {"gradient_share": 0.3}
    with pretended_gpu() as found:
        shares = on_pretended_gpu(cfg).gradient_shares
        norms = torch.ones(2, device="cuda")
        found.clear()
        shares.update(norms)
        assert shares.weigh("FGD0", 0.3).device.type == "cuda"
    assert not found


def test_the_average_of_the_weights_does_not_wait(monkeypatch):
    with pretended_gpu() as found:
        student, other = (on_pretended_gpu(config("FGD", "GFLHead")).student for _ in range(2))
        monkeypatch.setattr(copy, "deepcopy", lambda _: other)  # a fake tensor cannot be copied
        average = WeightAverage(student, 0.9)
        found.clear()
        for _ in range(2):
            average.update(student)
    assert not found


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(),
                                  lambda x: torch.equal(x, x), lambda x: x.new_tensor([1.0]), lambda x: x.cpu(),
                                  lambda x: torch.tensor([1.0], device="cuda"), lambda x: x[torch.tensor([0, 1])],
                                  lambda x: x + torch.zeros(4)])
def test_the_watch_sees_waiting(wait):
    """The test above would fail for any of these."""
    with pretended_gpu() as found:
        x = torch.randn(4, device="cuda")
        try:
            wait(x)
        except Exception as error:
            found.append(type(error).__name__)
    assert found


@pytest.mark.gpu
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
