"""What a method says that it needs is true, and the table of all methods shows it."""
import re
from dataclasses import replace

import pytest
import torch
from method_entries import NEED_LABELS, NEED_NONE, STATED, shown
from runs import ROOT, run_script
from small_models import make_batch, small_distiller, teacher_entry

from kd import METHODS
from kd.distiller import seen_by
from kd.methods.base import Method
from kd.methods.table import method_table
from models import ConfigError

said = pytest.mark.parametrize("entry, needs", [each for each in STATED if each[1]], ids=shown)


def value_of(model, student, teacher) -> float:
    torch.manual_seed(0)
    method, = model.methods[0]
    return sum(method(*seen_by(method, student, teacher)).values()).item()


@said
def test_what_it_compares(entry, needs):
    """Its losses depend on these outputs of the teacher, and on no others."""
    model = small_distiller(entry, head="GFLHead")
    student, (teacher,), _ = model.passes(*make_batch(counts=(6, 4)), with_heads=True)
    before = value_of(model, student, teacher)
    noise = torch.Generator().manual_seed(1)

    def changed(x):
        return x + torch.randn(x.shape, generator=noise, dtype=x.dtype)

    others = {"features": replace(teacher, features=[changed(x) for x in teacher.features]),
              "scores": replace(teacher, outputs=replace(teacher.outputs, cls=changed(teacher.outputs.cls))),
              "boxes": replace(teacher, outputs=replace(teacher.outputs, box=changed(teacher.outputs.box)))}
    if entry["type"] == "CrossKD":  # the features of the teacher's towers give only the scale of the student's
        assert teacher.outputs.cuts
    assert {what for what, other in others.items() if value_of(model, student, other) != before} == {
        what for what in needs if what in others}


@said
@pytest.mark.parametrize("need, teacher", [("same heads", {"head": "RetinaHead"}),
                                           ("same classes", {"head_": {"num_classes": 7}})])
def test_which_pairs_it_takes(entry, needs, need, teacher):
    if need in needs:
        with pytest.raises(ConfigError, match="do not mean the same|give the teacher a class_map"):
            small_distiller(entry, teacher=teacher_entry(**teacher))
    else:
        losses = small_distiller(entry, teacher=teacher_entry(**teacher))(*make_batch())
        assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("entry", NEED_LABELS, ids=shown)
def test_those_that_need_labels_depend_on_them(entry):
    model, (images, targets) = small_distiller(entry), make_batch()
    student, (teacher,), _ = model.passes(images, targets)
    before = value_of(model, student, teacher)
    for target in targets:
        target |= {"boxes": target["boxes"][:0], "labels": target["labels"][:0]}
    student, (teacher,), _ = model.passes(images, targets)
    assert value_of(model, student, teacher) != before


@pytest.mark.parametrize("entry", NEED_NONE, ids=shown)
def test_those_that_need_none_do_without(entry):
    """Without a target of the unlabelled image and without what was assigned to its anchors."""
    model, (images, targets) = small_distiller(entry), make_batch()
    targets[1] = {"image_size": targets[1]["image_size"], "unlabelled": True}
    student, (teacher,), _ = model.passes(images, targets)
    before = value_of(model, student, teacher)
    assignment = student.assignment
    for name in ("matched", "labels", "box_targets"):
        getattr(assignment, name)[1] = 0
    assert not assignment.positive[1].any()
    assert value_of(model, student, teacher) == before


def test_a_method_that_says_nothing(monkeypatch):
    class Silent(Method):
        pass

    monkeypatch.setitem(METHODS, "Silent", Silent)
    header, rows = method_table()
    assert header[:2] == ["method", "labels"] and rows[-1] == ["Silent", "yes", *"?????"]


def test_the_command(monkeypatch, capsys):
    assert run_script(monkeypatch, "summary.py", "--methods") == 0
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["method", *(row[0] for row in method_table()[1])]
    assert ["CrossKD", "no", "no", "yes", "yes", "no", "yes"] in lines
    assert ["FGD", "yes", "yes", "no", "no", "no", "no"] in lines
    assert ["CWD, on: logits", "no", "no", "yes", "no", "yes", "yes"] in lines


def test_the_page_says_the_same():
    """Each row of the table in docs/methods.md ends with whether its methods need labels."""
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|.*\| ([^|]+) \|$", (ROOT / "docs" / "methods.md").read_text(
        encoding="utf-8"), re.M)
    stated = {kind: text for kinds, text in rows for kind in re.findall(r"\w+", kinds) if kind in METHODS}
    for kind, text in stated.items():
        said = "yes" in text if "`" not in text else f"`{kind}` yes" in text
        assert said == METHODS[kind].needs_labels, kind
    assert len(stated) >= 10
