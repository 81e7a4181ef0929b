"""Builds student, teachers and methods from a configuration."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from models import ConfigError, Detector, ModelConfig, build_detector
from models.backbones.features import (
    FeatureMaps,
    check_torchvision,
    factory_code,
    factory_features,
    torchvision_features,
    torchvision_name,
)
from models.build import build, check_arguments, read_section, split_options
from models.initial import InitialReport, load_initial
from models.postprocess import TestConfig
from models.preprocess import Preprocess
from models.weights import CheckpointError, load_weights, log, summary

from .cache import TeacherCache, architecture, needs_of
from .checks import check_teacher_file, check_teachers, check_teachers_map, teacher_model
from .config import Config, TeacherConfig, parse_config
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
    with torch.random.fork_rng(devices=[]):
        networks = [factory_network(entry) for entry in cfg.teachers]
    check_combination(cfg, pretrained, networks)
    student, teachers, methods = build_parts(cfg.model, cfg.teachers, networks, distill.methods, pretrained)
    for own in methods:
        log_unpaired(student, own, [entry["type"] for entry in distill.methods])
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


def check_combination(cfg: Config, pretrained: bool, networks: list[FeatureMaps | None]) -> None:
    """Raise ConfigError for methods that cannot work with this pair, before weights are downloaded and read.

    Student and teachers are built once without weights. `networks` are those of `factory_network`.
    """
    entries = [replace(entry, checkpoint=None) for entry in cfg.teachers]
    if pretrained and cfg.model.backbone.get("weights") or entries != cfg.teachers:
        with torch.random.fork_rng(devices=[]):
            build_parts(cfg.model, entries, networks, cfg.distill.methods, False)


def build_parts(model: ModelConfig, entries: list[TeacherConfig], networks: list[FeatureMaps | None],
                methods: list[dict], pretrained: bool) -> tuple[Detector, list[Detector], list[list[Method]]]:
    """Student, teachers, and for each teacher the methods. `networks` are those of `factory_network`."""
    student = build_detector(model, pretrained)
    teachers = [build_teacher(entry, student.bbox_head.num_classes, network)
                for entry, network in zip(entries, networks)]
    return student, teachers, [build_methods(methods, student, teacher) for teacher in teachers]


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


def factory_network(entry: TeacherConfig) -> FeatureMaps | None:
    """The network of a teacher with a `factory`, whose code runs; None for other teachers."""
    if entry.factory is None:
        return None
    return factory_features(entry.factory, entry.arguments or {}, "distill.teacher.factory")


def build_teacher(entry: TeacherConfig, num_classes: int, network: FeatureMaps | None = None) -> Detector:
    """Build a teacher and load its weights; unless its configuration gives a class count, it has the student's.

    Args:
        network: that of `factory_network`, if there is one; by default it is built here.
    """
    if entry.features_only:
        teacher = build_features_teacher(entry, network)
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


def build_features_teacher(entry: TeacherConfig, network: FeatureMaps | None = None) -> Detector:
    """Build a teacher without a head, from `torchvision` or `factory`, and load its weights."""
    if entry.torchvision is not None:
        backbone, own = torchvision_features(entry.torchvision, entry.source, "distill.teacher.torchvision")
    else:
        backbone = network or factory_network(entry)
        own = getattr(backbone.model, "preprocess", None)
    if own is None and entry.preprocess is None:
        raise ConfigError("distill.teacher.preprocess", f"missing: give the mean and std (in 0..255) and channel_order "
                          f"that the network of {entry.factory} was trained with, here or as its attribute preprocess")
    statistics = check_arguments(Preprocess, own or {}, f"{entry.factory}: attribute preprocess")
    if entry.checkpoint is not None:
        load_teacher(backbone.model, entry, torchvision_name if entry.torchvision is not None else str)
    return Detector(backbone, None, None, Preprocess(**statistics | (entry.preprocess or {})), TestConfig())


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
        found.append(method)
    return found


def log_unpaired(student: Detector, methods: list[Method], types: list[str]) -> None:
    """Say in the log which levels of the student have none in the teacher of its stride."""
    for i, (method, name) in enumerate(zip(methods, types)):
        if hasattr(method, "pairs") and method.pairs.unpaired:
            log.info(f"distill.methods.{i}: {name} compares maps of strides "
                     f"{[student.strides[level] for level in method.pairs.levels]}; the teacher has none of the "
                     f"student's strides {method.pairs.unpaired}")
