"""distill.cache: answers are the teacher's to the last bit, or as close as fp16 is."""
import itertools

import pytest
import torch
from caches import CROSSKD, FLOAT, SETS, caching, losses_of, run_config, without_teacher
from small_models import HEADS, falls, make_batch, same_losses, small_distiller, teacher_entry

from data.digests import digest, mirror_batch
from kd import METHODS
from kd.config import parse_config
from kd.engine.train import train
from models import ConfigError

CPU = torch.device("cpu")


def entry_of(method: str) -> dict:
    return {"type": method} | ({"reused_teacher_head_idx": 1} if method == "CrossKD" else {})


@pytest.mark.parametrize("name", SETS)
def test_runs_with_and_without_a_cache_are_equal(name, scenes, tmp_path):
    """While it is filled, while it is read, and without one; batches of two sizes, flips, and several epochs."""
    found = {}
    for run, more in (("plain", {}), ("filling", {"cache": str(tmp_path / "answers")}),
                      ("reading", {"cache": {"dir": str(tmp_path / "answers")}})):
        cfg = run_config(tmp_path, scenes, SETS[name], **more)
        train(parse_config(cfg), tmp_path / run, CPU)
        found[run] = losses_of(tmp_path / run)
    assert len(found["plain"]) == 4 and found["plain"] == found["filling"] == found["reading"]
    states = [torch.load(tmp_path / run / "last.pth", weights_only=True)["model"] for run in found]
    assert all(torch.equal(states[0][key], state[key]) for state in states[1:] for key in state)
    text = (tmp_path / "reading" / "train.log").read_text()
    assert "epoch 2: the teacher has answered for 0 images so far, and 12 answers were read" in text
    text = (tmp_path / "filling" / "train.log").read_text()
    assert "epoch 1: the teacher has answered for 12 images so far, and 0 answers were read" in text
    assert "KiB for an image of" in text and "as often in 2 epochs as without distill.cache" in text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", HEADS)
def test_every_method_gets_what_it_needs(method, head, tmp_path):
    batch, arguments = make_batch(**FLOAT), {"head": head, "teacher": teacher_entry(head)}
    try:
        plain = small_distiller(entry_of(method), **FLOAT, **arguments)
    except ConfigError as error:
        pytest.skip(str(error))  # not every method works on every head
    torch.manual_seed(0)
    expected = plain.loss(*batch)
    distiller = caching(entry_of(method), folder=tmp_path, **arguments)
    for _ in range(2):
        torch.manual_seed(0)  # of MGD's masks
        assert same_losses(distiller.loss(*batch), expected)
        without_teacher(distiller)
    assert distiller.caches[0].read == 2


def test_gradients_are_the_same_and_losses_fall(tmp_path):
    found = []
    batch = make_batch(**FLOAT)
    for make in (small_distiller, lambda *m, **k: caching(*m, folder=tmp_path, **k)):
        distiller = make(*SETS["all"], **FLOAT)
        for _ in range(2):
            distiller.zero_grad()
            sum(distiller.loss(*batch).values()).backward()
            [cache.finish() for cache in distiller.caches]
        found.append([p.grad for p in distiller.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))
    falls(without_teacher(distiller))


@pytest.mark.parametrize("images", [2, 3, 4])
def test_an_answer_depends_neither_on_the_place_in_the_batch_nor_on_the_other_images(images):
    """What equal bits rest on: only the number of images and the size of the batch count."""
    distiller = small_distiller(CROSSKD, **FLOAT)
    batch, targets = make_batch(((64, 96),) * images, (2,) * images, **FLOAT)
    others = torch.randn(batch.shape)

    def answers(pictures: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            seen = distiller.teacher.run(pictures, targets, cuts=(1,))
        return [*seen.features, *itertools.chain(*seen.outputs.cuts[1]), seen.outputs.cls, seen.outputs.box]

    first, turned = answers(batch), answers(batch.flip(0))
    mixed = answers(torch.cat([others[:-1], batch[:1]]))
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(first, turned))
    assert all(torch.equal(a[0], b[-1]) for a, b in zip(first, mixed))


def test_mirrored_batches_are_those_that_training_shows():
    images, targets = make_batch(**FLOAT)
    mirrored = mirror_batch(images, targets)
    for image, other, target in zip(images, mirrored, targets):
        height, width = target["image_size"]
        assert torch.equal(other[:, :height, :width], image[:, :height, :width].flip(-1))
        assert not other[:, height:].any() and not other[..., width:].any()
        assert digest(image, (height, width)) != digest(other, (height, width))
        assert digest(image, (height, width)) != digest(image, (height, width - 1))


def test_methods_that_pause_and_stop(scenes, tmp_path):
    methods = [CROSSKD | {"stop_epoch": 1}, {"type": "FGD", "every": 2}]
    for run, more in (("plain", {}), ("cached", {"cache": str(tmp_path / "answers")})):
        cfg = run_config(tmp_path, scenes, methods, **more)
        cfg["train"]["accumulate"] = 2
        train(parse_config(cfg), tmp_path / run, CPU)
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "cached")


def test_two_teachers_with_a_folder_each(scenes, tmp_path):
    cached = {"cache": str(tmp_path / "a")}
    for run, more in (("plain", {}), ("filling", cached), ("read", cached)):
        cfg = run_config(tmp_path, scenes, [CROSSKD, {"type": "LD"}], **more)
        first = cfg["distill"]["teacher"]
        cfg["distill"]["teacher"] = [first, first | {"precision": "bf16", "weight": 0.5}]
        train(parse_config(cfg), tmp_path / run, CPU)
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "filling") == losses_of(tmp_path / "read")
    assert len([path for path in (tmp_path / "a").iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_answers_of_mixed_precision_are_stored_as_they_are(precision, tmp_path):
    batch, found = make_batch(**FLOAT), []
    distiller = caching(*SETS["all"], folder=tmp_path, precision=precision)
    distiller.caches[0].amp = "bf16"
    with torch.autocast("cpu", torch.bfloat16):
        plain = small_distiller(*SETS["all"], **FLOAT).loss(*batch)
        for _ in range(2):
            found.append(distiller.loss(*batch))
            without_teacher(distiller)
        seen = distiller.answers(distiller.teacher, [], *batch)
    assert same_losses(plain, found[0]) and same_losses(plain, found[1])
    assert all(each.dtype == torch.bfloat16 for each in [*seen.features, seen.outputs.cls, *seen.outputs.cuts[1][0]])


@pytest.mark.parametrize("methods", [[{"type": "FGD"}], [{"type": "FGD"}, CROSSKD]], ids=["labelled", "all"])
def test_a_batch_with_unlabelled_images(methods, tmp_path):
    """The teacher answers for the labelled images alone if all methods need labels, otherwise for all of them."""
    images, targets = make_batch(((64, 96),) * 3, (4, 2, 1), **FLOAT)
    targets[2] |= {"unlabelled": True}
    expected = small_distiller(*methods, **FLOAT).loss(images, targets)
    distiller = caching(*methods, folder=tmp_path)
    for _ in range(2):
        assert same_losses(distiller.loss(images, targets), expected)
        without_teacher(distiller)
    assert distiller.caches[0].read == (2 if len(methods) == 1 else 3)


# --- fp16 ---

def test_fp16_rounds_within_its_bound(tmp_path):
    batch = make_batch(**FLOAT)
    distiller = caching(*SETS["all"], folder=tmp_path, precision="fp16")
    exact, (teacher,), _ = distiller.passes(*batch)
    losses = distiller.loss(*batch)
    assert same_losses(losses, without_teacher(distiller).loss(*batch))  # rounded when it is computed, too
    found = distiller.answers(distiller.teacher, [], *batch)
    pairs = list(zip([teacher.outputs.cls, teacher.outputs.box, *teacher.features],
                     [found.outputs.cls, found.outputs.box, *found.features]))
    for a, b in pairs:
        assert b.dtype == a.dtype and b.stride() == a.stride()
        assert ((a - b).abs() <= a.abs() * 2 ** -11 + 2 ** -25).all()
    assert any(not torch.equal(a, b) for a, b in pairs)
    plain = small_distiller(*SETS["all"], **FLOAT).loss(*batch)
    for name, value in plain.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-3, atol=1e-6)


def test_values_beyond_fp16_are_not_rounded_and_not_stored(tmp_path, reported):
    batch = make_batch(**FLOAT)
    distiller = caching({"type": "FitNet"}, folder=tmp_path, precision="fp16")
    with torch.no_grad():
        distiller.teacher.neck.fpn_convs[0].conv.bias.fill_(1e6)
    exact = distiller.run_teacher(distiller.teacher, distiller.plan()[0][1], *batch)
    found = distiller.answers(distiller.teacher, [], *batch)
    assert torch.equal(found.features[0], exact.features[0])
    distiller.caches[0].finish()
    assert distiller.caches[0].store.entries == 0 and reported().count("set distill.cache.precision to fp32") == 1
