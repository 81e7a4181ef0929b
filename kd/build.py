"""Builds student, teachers and methods from a configuration."""
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data.errors import DataError, counted
from models import ConfigError, Detector, ModelConfig, build_detector
from models.build import build, split_options
from models.checkpoints.sources import check_file
from models.initial import InitialReport, load_initial
from models.weights import CheckpointError, load_weights, log, summary

from .cache import TeacherCache, architecture, needs_of
from .config import Config, TeacherConfig, load_config, parse_config
from .distiller import Distiller
from .methods import METHODS
from .methods.base import Method, MethodOptions


def build_model(cfg: Config, pretrained: bool = True) -> Detector | Distiller:
    """Build a distiller, or a detector if there is no `distill` section; `pretrained` loads `backbone.weights`."""
    return build_distiller(cfg, pretrained) if cfg.distill else build_detector(cfg.model, pretrained)


def build_distiller(cfg: Mapping, pretrained: bool = True) -> Distiller:
    """Build student, teachers and methods from the `model` and `distill` sections of a configuration.

    Raises:
        ConfigError: a wrong key, or a method that cannot work with this pair of detectors.
        CheckpointError: the weights of a teacher do not load completely.
    """
    cfg = parse_config(cfg)
    distill = cfg.distill
    if distill is None:
        raise ConfigError("distill", "missing: which teachers and methods?")
    student = build_detector(cfg.model, pretrained)
    teachers = [build_teacher(entry, student.bbox_head.num_classes) for entry in cfg.teachers]
    methods = [build_methods(distill.methods, student, teacher) for teacher in teachers]
    common = [MethodOptions(**split_options(entry, MethodOptions)[0]) for entry in distill.methods]
    of_methods = unique_names([own.name for own in common], [entry["type"] for entry in distill.methods],
                              "distill.methods")
    of_teachers = unique_names([entry.name for entry in cfg.teachers], ["teacher"] * len(teachers), "distill.teacher")
    options = [[replace(own, name=name if len(teachers) == 1 else f"{teacher}/{name}", weight=own.weight * entry.weight)
                for own, name in zip(common, of_methods)] for teacher, entry in zip(of_teachers, cfg.teachers)]
    if distill.init_student:
        inherit(student, teachers[0])
    model = Distiller(student, teachers, methods, options, distill.eval_teacher)
    if distill.cache is not None:
        model.caches = [build_cache(cfg, entry, student, teacher, own)
                        for entry, teacher, own in zip(cfg.teachers, teachers, methods)]
    return model


def build_cache(cfg: Config, entry: TeacherConfig, student: Detector, teacher: Detector, methods: list[Method]
                ) -> TeacherCache:
    """The cache of a teacher's answers (`distill.cache`); its folder is opened when it is first used."""
    settings, data, chosen = cfg.train, cfg.input, cfg.distill.cache
    given = {"model": architecture(teacher_model(entry)),
             "data": {"scale": data.scale, "antialias": data.antialias},
             "numbers": {"stored": chosen.precision, "amp": settings.amp, "compile": settings.compile,
                         "channels_last": settings.channels_last}}
    return TeacherCache(Path(chosen.dir), student, teacher, needs_of(methods, teacher), given, chosen.precision,
                        settings.amp)


@torch.no_grad()
def inherit(student: Detector, teacher: Detector) -> None:
    """Copy the teacher's neck and head into the student (FGD's inheriting strategy, arXiv:2111.11837, section 4.1).

    Tensors that the teacher lacks or has in another shape are not changed; the log names them.
    """
    wanted = {name: value for name, value in student.state_dict().items() if not name.startswith("backbone.")}
    given = teacher.state_dict()
    kept = []
    for name, value in wanted.items():
        if name in given and given[name].shape == value.shape:
            value.copy_(given[name])
        else:
            kept.append(name)
    line = f"the student's neck and head start from the teacher's weights: {len(wanted) - len(kept)} of {len(wanted)}"
    log.info(f"{line} tensors" + (f"; left as they were: {summary(kept)}" if kept else ""))


def unique_names(said: list[str | None], kinds: list[str], key: str) -> list[str]:
    """The name of each entry: the one in the configuration, otherwise its type and number.

    Raises:
        ConfigError: two names are equal, so the losses of one entry would replace those of the other.
    """
    names = [name or f"{kind}{i}" for i, (name, kind) in enumerate(zip(said, kinds))]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"{key}.{i}.name", f'two entries have the name "{name}"; give each its own')
    return names


def build_teacher(entry: TeacherConfig, num_classes: int) -> Detector:
    """Build a teacher and load its weights; unless its configuration gives a class count, it has the student's."""
    model, class_map = teacher_model(entry), entry.class_map
    if class_map is not None:
        if len(class_map) != num_classes:
            raise ConfigError("distill.teacher.class_map", f"has {counted(len(class_map), 'entry', 'entries')} for the "
                              f"student's {counted(num_classes, 'class')}: give one for each")
        if model.head.get("num_classes") is None and sorted(class_map) != list(range(num_classes)):
            raise ConfigError("distill.teacher.class_map", "needs the teacher's own class count: set "
                                                           "model.head.num_classes in its configuration")
    teacher = build_detector(model.with_num_classes(num_classes), pretrained=False)
    if entry.checkpoint is not None:
        load_teacher(teacher, entry)
    if class_map is not None:
        try:
            teacher.bbox_head.select_classes(class_map)
        except ConfigError as error:
            raise ConfigError("distill.teacher.class_map", error.problem) from None
    teacher.precision = entry.precision
    return teacher


def check_files(cfg: Config, needed: Sequence[str] = (), checkpoint: str | Path | None = None) -> None:
    """Raise DataError or CheckpointError for a file that does not exist, before anything is built: a teacher's, those
    that are `needed`, or another checkpoint. Nothing is read or downloaded.

    Args:
        needed: "train" and "val" for these parts of the data, "init" for `train.init`.
    """
    if cfg.distill and cfg.distill.cache and Path(cfg.distill.cache.dir).exists() and not Path(
            cfg.distill.cache.dir).is_dir():
        raise DataError(f"distill.cache: {cfg.distill.cache.dir} is not a folder: name a folder, or one to be made")
    for entry in cfg.teachers:
        teacher_model(entry)
        if entry.checkpoint is not None:
            check_teacher_file(entry)
    for part in (part for split in ("train", "val") if cfg.data and split in needed for part in cfg.data.parts(split)):
        part.check_paths()
    if "init" in needed and cfg.train.init is not None:
        try:
            check_file(cfg.train.init)
        except CheckpointError as error:
            raise CheckpointError(f"train.init: {error}") from None
    if checkpoint is not None:
        check_file(checkpoint)


def check_teacher_file(entry: TeacherConfig) -> None:
    """Raise CheckpointError if a teacher's checkpoint is not there; it says whether the teacher is to be trained first.
    """
    path = entry.checkpoint
    if entry.cfg and Path(path).name in ("last.pth", "best.pth") and not Path(path).exists():
        raise CheckpointError(f"distill.teacher.checkpoint: {path} does not exist. Train the teacher first (python "
                              f"scripts/train.py --cfg {entry.cfg} --work-dir {Path(path).parent}), or give the "
                              "checkpoint that you have")
    try:
        check_file(path)
    except CheckpointError as error:
        raise CheckpointError(f"distill.teacher: {error}") from None


def load_teacher(teacher: Detector, entry: TeacherConfig) -> None:
    """Load a teacher's weights; CheckpointError if they are not complete, or if the teacher is to be trained first."""
    check_teacher_file(entry)
    try:
        load_weights(teacher, entry.checkpoint, entry.part)
    except CheckpointError as error:
        raise CheckpointError(f"distill.teacher: {error}") from None


def teacher_model(entry: TeacherConfig) -> ModelConfig:
    """The `model` section of a teacher; its `cfg` is looked up in the current folder, then in the project's folder."""
    if (entry.cfg is None) == (entry.model is None):
        raise ConfigError("distill.teacher", "give either cfg, a configuration file, or model, the section itself")
    if entry.model is not None:
        return entry.model
    project = Path(__file__).resolve().parents[1]
    try:
        return load_config(entry.cfg if Path(entry.cfg).exists() else project / entry.cfg).model
    except ConfigError as error:
        raise ConfigError("distill.teacher.cfg", str(error)) from None


def start_student(student: Detector, cfg: Config, classes: Sequence[str]) -> InitialReport:
    """Give a student, or a detector that is trained alone, the weights of `train.init`.

    Args:
        classes: the names of its classes.
    Raises:
        ConfigError, CheckpointError: see `load_initial`.
    """
    try:
        return load_initial(student, cfg.train.init, classes, cfg.train.init_classes)
    except CheckpointError as error:
        raise CheckpointError(f"train.init: {error}") from None


def build_methods(entries: list[dict], student: Detector, teacher: Detector) -> list[Method]:
    """The methods of one student-teacher pair."""
    return [build({"type": entry["type"]} | split_options(entry, MethodOptions)[1], METHODS, f"distill.methods.{i}",
                  student=student, teacher=teacher) for i, entry in enumerate(entries)]
