"""Checks of a configuration that need no detector, before anything is built, read or downloaded."""
from collections.abc import Sequence
from pathlib import Path

from data.errors import DataError, counted
from models import ConfigError, ModelConfig
from models.backbones.features import check_factory
from models.checkpoints.sources import check_file
from models.heads.dense import check_class_map
from models.weights import CheckpointError

from .config import Config, TeacherConfig, load_config
from .config.loggers import check_loggers
from .methods import METHODS


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
