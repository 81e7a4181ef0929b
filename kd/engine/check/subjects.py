"""The detectors that a check looks at: the teachers, and the student as it starts."""
from dataclasses import dataclass, field
from functools import cache, partial

from models import Detector

from ...inference.detectors import knowledge
from ...processes import distributed
from ..run import Run
from ..start import first_of_val, starts_trained, without_ap
from .pixels import Trial, recorded, section, try_others
from .quality import Quality, measure


@dataclass
class Subject:
    """A detector of a run, and what the check found out about it."""

    name: str                       # "teacher 0", "student", or "detector" in plain training
    detector: Detector
    where: str                      # where its pixel statistics are set
    source: str | None = None       # its checkpoint
    part: str | None = None
    without: str = ""               # why it has no AP
    knows: str = ""                 # the classes that it knows, if these are not all
    labels: list[int] = field(default_factory=list)  # their numbers
    quality: Quality | None = None
    recorded: dict | None = None    # the pixel statistics in its checkpoint's own configuration
    trial: Trial | None = None      # of other pixel statistics

    @property
    def now(self) -> dict:
        """Its pixel statistics."""
        return section(self.detector.preprocess)

    @property
    def disagrees(self) -> bool:
        """Whether its checkpoint was trained with other pixel statistics, as its own configuration says."""
        return self.recorded is not None and self.recorded != self.now


def look_at(run: Run) -> list[Subject]:
    """The teachers and the student, with what they find on the first images of data.val."""
    cfg, classes, most = run.cfg, run.train_loader.dataset.classes, run.cfg.train.check_images
    subjects = [*teachers_of(run), student_of(run)]
    for subject in subjects:
        if subject.source is not None and distributed.rank() == 0:
            subject.recorded = recorded(subject.source, subject.part, subject.detector)
    if run.val_loader is None or not most:
        reason = "there is no data.val" if run.val_loader is None else "train.check_images is 0"
        for subject in subjects:
            subject.without = subject.without or reason
        return subjects
    first_images = cache(lambda count: first_of_val(cfg, classes, min(count, most)))
    for subject in (subject for subject in subjects if not subject.without):
        look = partial(measure, subject.detector, cfg, labels=subject.labels, device=run.device)
        subject.quality = look(first_images(most))
        if subject.source is not None:
            subject.trial = try_others(subject.detector, subject.quality, first_images, look)
    return subjects


def teachers_of(run: Run) -> list[Subject]:
    """The teachers of a run; none in plain training."""
    classes, found = run.train_loader.dataset.classes, []
    for i, entry in enumerate(run.cfg.teachers):
        detector = run.distiller.teachers[i]
        known = None if detector.bbox_head is None else detector.bbox_head.known
        where = f"model.preprocess in {entry.cfg}" if entry.cfg else "distill.teacher.model.preprocess"
        reason = without_ap(detector, len(classes))
        found.append(Subject(
            f"teacher {i}", detector, where, None if entry.features_only else entry.checkpoint, entry.part,
            reason or ("it is untrained (checkpoint: null)" if entry.checkpoint is None else ""),
            knowledge(detector, classes), list(range(len(classes)) if known is None else known.numbers)))
    return found


def student_of(run: Run) -> Subject:
    """The student, or the detector of plain training, as it starts."""
    classes, start = run.train_loader.dataset.classes, run.start
    name = "student" if run.distiller else "detector"
    subject = Subject(name, run.student, "model.preprocess", run.cfg.train.init, labels=list(range(len(classes))))
    if not starts_trained(run.cfg):
        subject.without = "it starts untrained"
    elif start is not None:
        subject.labels = [k for k, own in enumerate(classes) if own in start.matched]
        if not subject.labels:
            subject.without = "train.init knows none of the data's classes"
        elif start.new:
            subject.knows = f", of {len(subject.labels)} of {len(classes)} classes that train.init knows"
    return subject
