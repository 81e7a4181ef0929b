"""What a resumed run does with a setting that differs from its checkpoint's: one rule for every key."""
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from .config import Config
from .hints import with_defaults

Rule = Literal["take", "warn", "refuse"]
TAKE: Rule = "take"      # use the new value; it changes neither what is learned nor what is measured
WARN: Rule = "warn"      # use the new value, and log it with the old one
REFUSE: Rule = "refuse"  # the checkpoint would not fit, or would silently mean something else

# `a.b.*` holds for everything below a.b that has no rule of its own. List entries are not numbered here.
RULES: dict[str, Rule] = {
    "model.*": REFUSE,                      # the weights were trained for this architecture and these pixel values
    "model.backbone.weights": WARN,         # is not used: the checkpoint's weights replace these
    "model.backbone.norm_eval": WARN,
    "model.head.assigner.*": WARN,          # what the outputs learn, but not what they mean
    "model.head.loss_cls.*": WARN,
    "model.head.loss_bbox.*": WARN,
    "model.head.loss_dfl.*": WARN,
    "model.head.loss_centerness.*": WARN,
    "model.head.pos_weight": WARN,
    "model.head.allowed_border": WARN,
    "model.head.restrict_to_pad": WARN,
    "model.head.center_sampling": WARN,
    "model.head.center_sample_radius": WARN,
    "model.head.regress_ranges": WARN,
    "model.test.*": WARN,                   # the best AP so far was measured with the old value

    "data.train.images": WARN,              # files may have moved; other numbers of images or classes are refused
    "data.train.annotations": WARN,
    "data.train": REFUSE,                   # the number of data sets
    "data.train.repeat": REFUSE,
    "data.repeat_factor": REFUSE,
    "data.train.first": REFUSE,             # the order of the images, and so the place in the epoch
    "data.val": WARN,                       # the best AP so far was measured without it
    "data.val.images": WARN,
    "data.val.annotations": WARN,
    "data.val.first": WARN,
    "data.val.repeat": TAKE,                # is for training
    "data.unlabelled": WARN,                # which images are shown next, and what is learned from them
    "data.unlabelled.images": WARN,
    "data.unlabelled_ratio": WARN,
    "data.batch_size": REFUSE,              # the place in the epoch; it counts over all processes, see `changes`
    "data.workers": TAKE,
    "data.worker_start": TAKE,
    "data.scale": WARN,
    "data.multi_scale": WARN,
    "data.flip": WARN,
    "data.train_augment": WARN,
    "data.train_augment.*": WARN,
    "data.skip_empty": REFUSE,              # the order of the images
    "data.skip_unreadable": TAKE,           # the log names every image that is skipped
    "data.antialias": WARN,
    "data.group_by_aspect": REFUSE,         # the order of the images

    "distill": REFUSE,                      # plain training or distillation
    "distill.teacher": REFUSE,              # the number of teachers
    "distill.teacher.checkpoint": WARN,     # files may have moved
    "distill.teacher.cfg": WARN,
    "distill.teacher.model.*": WARN,        # adapters that do not fit are refused
    "distill.teacher.torchvision": WARN,
    "distill.teacher.factory": WARN,
    "distill.teacher.arguments.*": WARN,
    "distill.teacher.preprocess.*": WARN,
    "distill.teacher.part": WARN,
    "distill.teacher.name": WARN,
    "distill.teacher.weight": WARN,
    "distill.teacher.class_map": WARN,
    "distill.teacher.precision": WARN,
    "distill.teacher.shard": TAKE,
    "distill.methods": REFUSE,              # their number: the checkpoint has the adapters of each
    "distill.methods.*": WARN,
    "distill.methods.weight.gradient_share": WARN,  # what was measured so far holds for the new share, too
    "distill.methods.weight.gradient_share_every": WARN,
    "distill.methods.type": REFUSE,
    "distill.methods.levels": REFUSE,       # these decide which adapters there are
    "distill.methods.student_modules": REFUSE,
    "distill.methods.teacher_modules": REFUSE,
    "distill.methods.adapter_kernel": REFUSE,
    "distill.methods.on": REFUSE,
    "distill.methods.reused_teacher_head_idx": REFUSE,
    "distill.methods.tower_convs": REFUSE,
    "distill.eval_teacher": WARN,
    "distill.teacher_stream": TAKE,
    "distill.cache": WARN,
    "distill.cache.dir": TAKE,
    "distill.cache.precision": WARN,
    "distill.init_student": REFUSE,         # has an effect only at the start

    "optimizer.type": REFUSE,               # momentum and the like of one mean nothing to the other
    "optimizer.lr": WARN,
    "optimizer.lr.per_image": WARN,
    "optimizer.base_batch_size": WARN,
    "optimizer.momentum": WARN,
    "optimizer.nesterov": WARN,
    "optimizer.betas": WARN,
    "optimizer.weight_decay": WARN,
    "optimizer.decay_norm_and_bias": WARN,  # buffers are loaded by the parameters' names, whatever their groups
    "optimizer.bias_lr_mult": WARN,
    "optimizer.bias_decay_mult": WARN,
    "optimizer.norm_decay_mult": WARN,

    "schedule.warmup_steps": WARN,
    "schedule.warmup_factor": WARN,
    "schedule.warmup": WARN,
    "schedule.type": WARN,
    "schedule.milestones": WARN,
    "schedule.gamma": WARN,
    "schedule.min_factor": WARN,

    "train.epochs": WARN,                   # decay of a method's weight ends with the last epoch
    "train.seed": REFUSE,                   # the order of the images
    "train.init": TAKE,                     # a resumed run does not load it again
    "train.init_classes": TAKE,
    "train.amp": WARN,
    "train.channels_last": TAKE,
    "train.compile": TAKE,
    "train.prefetch": TAKE,
    "train.grad_clip": WARN,
    "train.accumulate": REFUSE,             # the place in the epoch
    "train.ema": REFUSE,                    # which weights are evaluated, and what their average means
    "train.sync_bn": WARN,
    "train.checkpoint_every": TAKE,
    "train.keep": TAKE,
    "train.patience": TAKE,
    "train.log_every": TAKE,
    "train.check_images": TAKE,
    "train.grad_norm_every": TAKE,
    "train.loggers": TAKE,
    "train.tensorboard": TAKE,
    "train.vis_period": TAKE,

    "eval.every": TAKE,
    "eval.batch_size": TAKE,
    "eval.class_map": WARN,
    "eval.tta.*": TAKE,                     # not used while a run trains
}

LONGEST = 80  # characters of a value in a message


class Change(NamedTuple):
    """A setting that differs, with its rule. Its text is `optimizer.lr was 0.01 and is 0.001`."""

    key: str
    old: Any
    new: Any

    @property
    def rule(self) -> Rule:
        return rule_of(self.key) or WARN  # without one: a key that only an earlier version had

    def __str__(self) -> str:
        name = "data.batch_size times the number of processes" if self.key == "data.batch_size" else self.key
        old, new = (json.dumps(types_of(value), default=str) for value in (self.old, self.new))
        old, new = (text if len(text) <= LONGEST else f"{text[:LONGEST]}..." for text in (old, new))
        return f"{name} was {old} and is {new}"


def types_of(value: Any) -> Any:
    """The types of a list of sections that have one, which is shorter than the list; other values as they are."""
    if isinstance(value, list) and all(isinstance(each, Mapping) and "type" in each for each in value):
        return [each["type"] for each in value]
    return value


def rule_of(key: str) -> Rule | None:
    """The rule of a key, whose list entries may be numbered; None for a section that is always there."""
    key = re.sub(r"\.\d+(?=\.|$)", "", key)
    if key in RULES:
        return RULES[key]
    while key:
        if f"{key}.*" in RULES:
            return RULES[f"{key}.*"]
        key = key.rpartition(".")[0]
    return None


def changes(before: Mapping, after: Mapping, processes: tuple[int, int] = (1, 1)) -> list[Change]:
    """All settings that differ between two configurations as written; one that states a default is no change.

    Args:
        processes: the number of processes before and after: `data.batch_size` is compared over all of them.
    """
    trees = [with_defaults(Config, cfg) for cfg in (before, after)]
    for tree, count in zip(trees, processes):
        if tree["data"]:
            tree["data"]["batch_size"] *= count
    return list(_differences("", *trees))


def _differences(key: str, old: Any, new: Any) -> list[Change]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if old.get("type") != new.get("type"):  # their other keys do not mean the same
            return [Change(f"{key}.type", old.get("type"), new.get("type"))]
        names = {name: f"{key}.{name}" if key else name for name in [*old, *new]}
        return [change for name, path in names.items() for change in _differences(path, old.get(name), new.get(name))]
    several = [value if isinstance(value, list) else [value] for value in (old, new)]  # one teacher, or a list of them
    if len(several[0]) == len(several[1]) and all(isinstance(each, Mapping) for each in sum(several, [])):
        return [change for i, pair in enumerate(zip(*several)) for change in _differences(f"{key}.{i}", *pair)]
    return [] if old == new else [Change(key, old, new)]
