"""Builds student, teachers and methods from a configuration."""
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from data.errors import DataError, counted
from models import ConfigError, Detector, ModelConfig, build_detector
from models.backbones.features import (
    check_factory,
    check_torchvision,
    factory_code,
    factory_features,
    torchvision_features,
    torchvision_name,
)
from models.build import build, check_arguments, read_section, split_options
from models.checkpoints.sources import check_file
from models.heads.dense import check_class_map
from models.initial import InitialReport, load_initial
from models.postprocess import TestConfig
from models.preprocess import Preprocess
from models.weights import CheckpointError, load_weights, log, summary

from .cache import TeacherCache, architecture, needs_of
from .config import Config, TeacherConfig, load_config, parse_config
from .config.loggers import check_loggers
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
    check_teachers(cfg)
    for entry in cfg.teachers:
        if entry.torchvision is not None:
            check_torchvision(entry.torchvision, "distill.teacher.torchvision")
    student = build_detector(cfg.model, pretrained)
    teachers = [build_teacher(entry, student.bbox_head.num_classes) for entry in cfg.teachers]
    methods = [build_methods(distill.methods, student, teacher) for teacher in teachers]
    common = [read_section(MethodOptions, split_options(entry, MethodOptions)[0], f"distill.methods.{i}")
              for i, entry in enumerate(distill.methods)]
    of_methods = unique_names([own.name for own in common], [entry["type"] for entry in distill.methods],
                              "distill.methods")
    of_teachers = unique_names([entry.name for entry in cfg.teachers], ["teacher"] * len(teachers), "distill.teacher")
    options = [[own.times(entry.weight, name if len(teachers) == 1 else f"{teacher}/{name}")
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
    if entry.factory is not None:
        model = {"factory": entry.factory, "arguments": entry.arguments, "code": factory_code(entry.factory)}
    elif entry.torchvision is not None:
        model = {"torchvision": entry.torchvision}
    else:
        model = architecture(teacher_model(entry))
    given = {"model": model,
             "data": {"scale": data.scale, "antialias": data.antialias},
             "numbers": {"stored": chosen.precision, "amp": settings.amp, "compile": settings.compile}}
    return TeacherCache(Path(chosen.dir), student, teacher, needs_of(methods, teacher), given, chosen.precision,
                        settings.amp)


@torch.no_grad()
def inherit(student: Detector, teacher: Detector) -> None:
    """Copy the teacher's neck and head into the student (FGD's inheriting strategy, arXiv:2111.11837, section 4.1).

    Tensors that the teacher lacks or has in another shape are not changed, nor are the scores of classes that it does
    not know; the log names them.
    """
    wanted = {name: value for name, value in student.state_dict().items() if not name.startswith("backbone.")}
    given, head = teacher.state_dict(), teacher.bbox_head
    of_classes = (f"bbox_head.{head.classifier}.",) if head.known is not None else ()
    kept = []
    for name, value in wanted.items():
        if name not in given or given[name].shape != value.shape:
            kept.append(name)
        elif name.startswith(of_classes):
            ours, theirs = (x.unflatten(0, (-1, head.num_classes)) for x in (value, given[name]))
            ours[:, head.known.columns] = theirs[:, head.known.columns]
        else:
            value.copy_(given[name])
    line = f"the student's neck and head start from the teacher's weights: {len(wanted) - len(kept)} of {len(wanted)}"
    some = f"; of {head.classifier} only the classes that the teacher knows" if of_classes else ""
    log.info(f"{line} tensors{some}" + (f"; left as they were: {summary(kept)}" if kept else ""))


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
    if entry.features_only:
        teacher = build_features_teacher(entry)
    else:
        model = teacher_model(entry)
        check_teachers_map(entry, model, num_classes)
        teacher = build_detector(model.with_num_classes(num_classes), pretrained=False)
        if entry.checkpoint is not None:
            load_teacher(teacher, entry)
        if entry.class_map is not None:
            teacher.bbox_head.select_classes(entry.class_map)
    teacher.precision = entry.precision
    return teacher


def build_features_teacher(entry: TeacherConfig) -> Detector:
    """Build a teacher without a head, from `torchvision` or `factory`, and load its weights."""
    if entry.torchvision is not None:
        backbone, own = torchvision_features(entry.torchvision, entry.source, "distill.teacher.torchvision")
    else:
        backbone = factory_features(entry.factory, entry.arguments or {}, "distill.teacher.factory")
        own = getattr(backbone.model, "preprocess", None)
    if own is None and entry.preprocess is None:
        raise ConfigError("distill.teacher.preprocess", f"missing: give the mean and std (in 0..255) and channel_order "
                          f"that the network of {entry.factory} was trained with, here or as its attribute preprocess")
    statistics = check_arguments(Preprocess, own or {}, f"{entry.factory}: attribute preprocess")
    if entry.checkpoint is not None:
        load_teacher(backbone.model, entry, torchvision_name if entry.torchvision is not None else str)
    return Detector(backbone, None, None, Preprocess(**statistics | (entry.preprocess or {})), TestConfig())


def check_teachers(cfg: Config) -> None:
    """Raise ConfigError for a teacher that cannot teach this student in this way, before anything is downloaded."""
    for i, entry in enumerate(cfg.teachers):
        if not entry.features_only:
            check_teachers_map(entry, teacher_model(entry), cfg.model.head.get("num_classes"))
            continue
        if entry.factory is not None:
            check_factory(entry.factory, "distill.teacher.factory")
        what = f"teacher {i}, {entry.torchvision or entry.factory}, gives feature maps only"
        for number, method in enumerate(cfg.distill.methods):
            if METHODS[method["type"]].compares_predictions(method):
                others = ", ".join(name for name, each in METHODS.items() if not each.teacher_head)
                raise ConfigError(f"distill.methods.{number}", f"{method['type']} needs predictions of a teacher, and "
                                                               f"{what}: use a method on feature maps ({others})")
        if cfg.distill.init_student and i == 0:
            raise ConfigError("distill.init_student", f"{what}, no neck and head for the student: remove it")


def check_teachers_map(entry: TeacherConfig, model: ModelConfig, num_classes: int | None) -> None:
    """Raise ConfigError if a teacher's class map does not fit its model, or the student's class count if it is known.
    """
    class_map, count, key = entry.class_map, model.head.get("num_classes"), "distill.teacher.class_map"
    if class_map is None:
        return
    if num_classes is not None and len(class_map) != num_classes:
        raise ConfigError(key, f"has {counted(len(class_map), 'entry', 'entries')} for the student's "
                               f"{counted(num_classes, 'class')}: give one for each")
    if count is None and (None in class_map or sorted(class_map) != list(range(len(class_map)))):
        raise ConfigError(key, "needs the teacher's own class count: set model.head.num_classes in its configuration")
    check_class_map(class_map, count or len(class_map), key)


def check_files(cfg: Config, needed: Sequence[str] = (), checkpoint: str | Path | None = None) -> None:
    """Raise DataError or CheckpointError for a file that does not exist, before anything is built: a teacher's, those
    that are `needed`, or another checkpoint; and MissingExtra for a logger of a run that is not installed. Nothing is
    read or downloaded.

    Args:
        needed: "train" and "val" for these parts of the data, "init" for `train.init`.
    """
    check_teachers(cfg)
    if cfg.distill and cfg.distill.cache and Path(cfg.distill.cache.dir).exists() and not Path(
            cfg.distill.cache.dir).is_dir():
        raise DataError(f"distill.cache: {cfg.distill.cache.dir} is not a folder: name a folder, or one to be made")
    for entry in cfg.teachers:
        if entry.checkpoint is not None:
            check_teacher_file(entry)
    if "train" in needed:
        check_loggers(cfg.train.all_loggers)
    if "train" in needed and cfg.data and cfg.data.unlabelled:
        check_unlabelled(cfg)
        cfg.data.unlabelled.check_paths()
    for part in (part for split in ("train", "val") if cfg.data and split in needed for part in cfg.data.parts(split)):
        part.check_paths()
    if "init" in needed and cfg.train.init is not None:
        try:
            check_file(cfg.train.init)
        except CheckpointError as error:
            raise CheckpointError(f"train.init: {error}") from None
    if checkpoint is not None:
        check_file(checkpoint)


def check_unlabelled(cfg: Config) -> None:
    """Raise ConfigError if nothing in a training run can learn from its unlabelled images."""
    if cfg.data is None or cfg.data.unlabelled is None:
        return
    if cfg.distill is None:
        raise ConfigError("data.unlabelled", "images without labels teach nothing without a teacher: add distill, or "
                                             "set data.unlabelled=null")
    used = list(dict.fromkeys(entry["type"] for entry in cfg.distill.methods))
    if all(METHODS[name].needs_labels for name in used):
        able = ", ".join(name for name, method in METHODS.items() if not method.needs_labels)
        need = f"{', '.join(used)} need{'s' if len(used) == 1 else ''} labels" if used else "there is no method"
        raise ConfigError("data.unlabelled", f"no method here learns from images without labels ({need}): add one of "
                                             f"{able}, or set data.unlabelled=null")


def check_teacher_file(entry: TeacherConfig) -> None:
    """Raise CheckpointError if a teacher's checkpoint is not there; it says whether the teacher is to be trained first.
    """
    path = entry.source
    if entry.cfg and Path(path).name in ("last.pth", "best.pth") and not Path(path).exists():
        raise CheckpointError(f"distill.teacher.checkpoint: {path} does not exist. Train the teacher first (python "
                              f"scripts/train.py --cfg {entry.cfg} --work-dir {Path(path).parent}), or give the "
                              "checkpoint that you have")
    try:
        check_file(path)
    except CheckpointError as error:
        raise CheckpointError(f"distill.teacher: {error}") from None


def load_teacher(teacher: nn.Module, entry: TeacherConfig, names: Callable[[str], str] | None = None) -> None:
    """Load a teacher's weights; CheckpointError if they are not complete, or if the teacher is to be trained first.

    Args:
        names: see `load_weights`.
    """
    check_teacher_file(entry)
    try:
        load_weights(teacher, entry.source, entry.part, names=names)
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
    found = []
    for i, entry in enumerate(entries):
        key, arguments = f"distill.methods.{i}", split_options(entry, MethodOptions)[1]
        method = build({"type": entry["type"]} | arguments, METHODS, key, student=student, teacher=teacher)
        known = None if teacher.bbox_head is None else teacher.bbox_head.known
        if method.teacher_head and known is not None and not method.some_classes:
            raise ConfigError(key, f"{entry['type']} compares all classes, and distill.teacher.class_map has null for "
                                   "some: use another method, or a teacher that knows all")
        if hasattr(method, "pairs") and method.pairs.unpaired:
            log.info(f"{key}: {entry['type']} compares maps of strides "
                     f"{[student.strides[level] for level in method.pairs.levels]}; the teacher has none of the "
                     f"student's strides {method.pairs.unpaired}")
        found.append(method)
    return found
