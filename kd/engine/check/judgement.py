"""What a check found, in plain words and as data."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from data.errors import counted, listed, one_line
from data.tables import percent, points

from ...processes.memory import in_gib
from ..run import Run
from ..start import SUSPICIOUS
from .costs import Costs
from .influence import Influence
from .pixels import said
from .quality import Quality, compared
from .subjects import Subject

WEAK, STRONG = 0.01, 10.0  # a method's gradient over the student's own that is too small, and too large
# The same for a student that starts untrained: the gradient of its own losses is small then, and grows fast. On BCCD
# that of CrossKD, which pays there, is 116 times as large at first; that of FGD fell from 16 to 1.3 times in 20 steps.
STRONG_AT_FIRST = 1000.0
HARDLY = 0.1   # share of a class's objects below which a teacher hardly finds it
HALF = 0.5     # of all objects, below which a teacher is a weak one
SURE = 2.0     # standard errors by which one detector is better than another
LISTED = 5     # classes that are named
GOOD, COST, NOTE, WARNING = "good", "cost", "note", "WARNING"


@dataclass
class Judgement:
    """Lines for people, each with its kind, and all figures behind them."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    figures: dict = field(default_factory=dict)

    def add(self, kind: str, text: str) -> None:
        self.lines.append((kind, text))

    @property
    def warnings(self) -> int:
        return sum(kind == WARNING for kind, _ in self.lines)

    def __str__(self) -> str:
        end = f"{counted(self.warnings, 'warning')}: read {'it' if self.warnings == 1 else 'them'} before you train"
        return "\n".join(["", "JUDGEMENT", *(f"  {kind:<7}  {text}" for kind, text in self.lines),
                          f"  => {end if self.warnings else 'nothing looks wrong'}"])

    def content(self) -> dict:
        """For a JSON file."""
        return {"warnings": self.warnings, "lines": [{"kind": kind, "text": text} for kind, text in self.lines],
                **self.figures}


def judge_run(run: Run, subjects: Sequence[Subject], costs: Costs, acts: Mapping[str, Influence]) -> Judgement:
    """Judge what a check has found out.

    Args:
        subjects: from `look_at`, the student last.
        acts: from `influences`; empty without distillation.
    """
    judgement = Judgement()
    *teachers, student = subjects
    for teacher in teachers:
        judge_teacher(judgement, teacher, 0 if run.val_loader is None else len(run.val_loader.dataset))
    judge_start(judgement, student, teachers)
    for subject in subjects:
        judge_pixels(judgement, subject)
    judge_costs(judgement, run, costs)
    judge_methods(judgement, acts, "untrained" in student.without)
    judgement.figures = {
        "detectors": {each.name: {"no_ap_because": each.without or None, "quality": figures_of(each.quality),
                                  "preprocess": each.now, "preprocess_in_checkpoint": each.recorded,
                                  "other_preprocess": None if each.trial is None else asdict(each.trial)}
                      for each in subjects},
        "costs": asdict(costs) | {"training_seconds": costs.training(costs.run), "evaluation_seconds": costs.evaluation,
                                  "training_seconds_alone": costs.alone and costs.training(costs.alone)},
        "methods": {name: asdict(each) for name, each in acts.items()}}
    return judgement


def figures_of(quality: Quality | None) -> dict | None:
    """A quality as data, without the single images."""
    return None if quality is None else {key: value for key, value in asdict(quality).items() if key != "own"}


def judge_teacher(judgement: Judgement, teacher: Subject, of_images: int) -> None:
    """How good a teacher is, and what it finds; data.val has `of_images` images."""
    found = teacher.quality
    if found is None:
        judgement.add(WARNING if "untrained" in teacher.without else NOTE,
                      f"{teacher.name}: no AP, because {teacher.without}")
        return
    where = (f"all {counted(found.images, 'image')} of data.val" if found.images == of_images else
             f"the first {found.images} of {of_images} images of data.val (train.check_images)")
    name = teacher.name + teacher.knows
    if found.ap is None:
        judgement.add(NOTE, f"{name}: no AP, because there are no objects of its classes on {where}")
        return
    text = f"{name}: AP {points(found.ap)} on {where}{by_name(found.per_class, points)}"
    if found.ap < SUSPICIOUS:
        judgement.add(WARNING, f"{text}. It detects next to nothing: are its weights, the order of its classes and its "
                               "preprocess (means, channel order) those that it was trained with?")
    else:
        judgement.add(GOOD, text)
    missing = [name for name, share in found.found_by_class.items() if share is not None and share < HARDLY]
    sizes = ", ".join(f"{size} {percent(share)}" for size, share in found.found_by_size.items() if share is not None)
    text = (f"{teacher.name} finds {percent(found.found)} of {counted(found.objects, 'object')} (IoU 0.5, score "
            f"{found.lowest:g} or more){by_name(found.found_by_class, percent)}; {sizes}")
    if found.found < HALF:
        text += ". What it misses, the student may learn to miss: take a better teacher"
    elif missing:
        text += f". It hardly finds {listed(missing, ', ')}: a student learns little about them from it"
    judgement.add(WARNING if found.found < HALF or missing else GOOD, text)


def by_name(values: Mapping[str, float | None], form: Callable[[float], str]) -> str:
    """`; RBC 55.0, WBC 62.0`: the values of the classes that have any, of many the lowest; empty for one class."""
    known = {name: value for name, value in values.items() if value is not None}
    if len(known) < 2:
        return ""
    names = list(known) if len(known) <= LISTED else sorted(known, key=known.get)[:LISTED]
    few = "" if len(known) <= LISTED else f"the lowest of {len(known)} classes are "
    return f"; {few}{', '.join(f'{one_line(name, 40)} {form(known[name])}' for name in names)}"


def judge_start(judgement: Judgement, student: Subject, teachers: Sequence[Subject]) -> None:
    """What the student can do before training, and whether a teacher can do more."""
    found = student.quality
    if found is None:
        if "untrained" in student.without:
            judgement.add(NOTE, f"{student.name}: it starts untrained, so it has no AP yet")
        elif teachers or student.source:
            judgement.add(NOTE, f"{student.name}: no AP of its start, because {student.without}")
        return
    ap = "no objects to measure it on" if found.ap is None else f"AP {points(found.ap)} before training"
    judgement.add(NOTE, f"{student.name}: {ap}{student.knows}{by_name(found.per_class, points)}")
    for teacher in (each for each in teachers if each.quality is not None):
        gain, error, _ = compared(teacher.quality.own, found.own)
        if gain < -SURE * error:
            judgement.add(WARNING, f"{teacher.name} is worse than the {student.name} is before training: its AP of "
                                   f"single images is {points(-gain)} points lower (standard error {points(error)}). "
                                   "Take a better teacher")
        elif gain <= SURE * error:
            judgement.add(NOTE, f"{teacher.name} is not clearly better than the {student.name} is before training: "
                                "there may be little to learn from it")


def judge_pixels(judgement: Judgement, subject: Subject) -> None:
    """Whether the pixel statistics look right."""
    trial, name = subject.trial, subject.name
    if subject.disagrees:
        judgement.add(WARNING, f"{name}: its checkpoint was trained with {said(subject.recorded)}, and {subject.where} "
                               f"is {said(subject.now)}: make them equal")
    elif trial is not None and trial.better is not None:
        judgement.add(WARNING, f"{name}: its pixel statistics or channel order look wrong. With {said(trial.better)} "
                               f"its AP of {counted(trial.images, 'image')} is {points(trial.gain)} points higher on "
                               f"average (standard error {points(trial.error)}) than with {said(subject.now)}: change "
                               f"{subject.where}")
    elif trial is not None and not trial.untested:
        judgement.add(GOOD, f"{name}: its pixel statistics and channel order look right: none of {trial.tried} others "
                            f"is clearly better on {counted(trial.images, 'image')}")
    elif subject.recorded is not None:
        judgement.add(GOOD, f"{name}: its pixel statistics and channel order are those in its checkpoint")
    elif subject.source is not None and (trial is not None or not subject.quality):
        judgement.add(NOTE, f"{name}: other pixel statistics were {trial.untested if trial else 'not tried'}")


def judge_costs(judgement: Judgement, run: Run, costs: Costs) -> None:
    """The time and memory of the run, and of the same run without distillation."""
    whole, lasts = costs.training(costs.run), f"all {counted(costs.steps, 'step')} take about "
    step, without = f"a step of {counted(costs.images, 'image')} takes", ""
    if costs.alone is not None:
        judgement.add(COST, f"{step} {costs.run.step / costs.alone.step:.1f} times one without distillation "
                            f"({costs.run.step:.3g} s and {costs.alone.step:.3g} s)")
        without = f", {in_words(costs.training(costs.alone))} without distillation"
    else:
        judgement.add(COST, f"{step} {costs.run.step:.3g} s")
    more = f"; evaluations add {in_words(costs.evaluation)}" if costs.evaluation else ""
    stored = "; less where distill.cache has answers" if run.distiller and run.distiller.caches else ""
    judgement.add(COST, f"{lasts}{in_words(whole)}{without}{more}{stored}")
    memory = f"peak memory {in_gib(costs.run.memory)}"
    if costs.alone is not None:
        memory += f", about {in_gib(costs.alone.memory)} without distillation"
    judgement.add(COST, memory)
    if costs.busy:
        judgement.add(NOTE, "this machine was busy with other work, so the times are too long")
    if costs.loading is not None and costs.workers and costs.loading > costs.run.step:
        judgement.add(WARNING, f"loading the images of a step takes {costs.loading:.3g} s, longer than the step: use "
                               "more data.workers, or resize the images to data.scale beforehand")


def judge_methods(judgement: Judgement, acts: Mapping[str, Influence], untrained: bool) -> None:
    """How strongly each method acts on the student, which may start untrained."""
    for name, each in acts.items():
        text = f"{name}: {exact_percent(each.loss)} of the loss after a few steps"
        if each.gradient is None:
            judgement.add(NOTE, f"{text}; its gradient does not reach the student's neck, or is not finite, so its "
                                "effect cannot be judged")
            continue
        text += f", its gradient is {ratio(each.gradient)} the student's own"
        if each.chosen:
            judgement.add(NOTE, f"{text}, as its weight says")
        elif each.gradient < WEAK:
            judgement.add(WARNING, f"{text}: it hardly changes the student. Set its weight: {{gradient_share: 0.3}}")
        elif each.gradient > (STRONG_AT_FIRST if untrained else STRONG):
            judgement.add(WARNING, f"{text}: the student hardly learns from its labels. Set its weight: "
                                   "{gradient_share: 0.3}, or a smaller number")
        elif each.gradient > STRONG:
            judgement.add(NOTE, f"{text}, which is small while a student is untrained")
        else:
            judgement.add(GOOD, text)


def ratio(gradient: float) -> str:
    """A gradient in words, beside the student's own."""
    return f"{gradient:.3g} times" if gradient >= 2 else exact_percent(gradient) + " of"


def exact_percent(share: float) -> str:
    """A share in percent with two digits, so that small ones can be told apart."""
    return f"{100 * share:.2g}%" if abs(share) < 0.995 else f"{100 * share:.0f}%"


def in_words(seconds: float) -> str:
    """A time for people: `40 s`, `25 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
