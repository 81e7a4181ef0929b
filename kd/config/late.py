"""Settings of the schedule and of methods that a run does not reach, because it ends before."""
from data.errors import counted, listed

from .config import Config


def never_reached(cfg: Config, steps_per_epoch: int) -> list[str]:
    """A line for each of them: the key, its value, and what does not happen."""
    epochs, schedule, lines = cfg.train.epochs, cfg.schedule, []
    steps, ends = epochs * steps_per_epoch, f"training ends after {counted(epochs, 'epoch')}"
    if schedule.warmup_steps >= steps:
        lines.append(f"schedule.warmup_steps {schedule.warmup_steps:g}: training ends after {counted(steps, 'step')}, "
                     "before the learning rate has risen")
    late = [f"{milestone:g}" for milestone in sorted(schedule.milestones) if milestone >= epochs]
    if schedule.type == "step" and late:
        lines.append(f"schedule.milestones: {ends}, so the learning rate does not fall at {listed(late, ', ')}")
    for i, method in enumerate(cfg.distill.methods if cfg.distill else []):
        rise, stop = method.get("warmup_epochs", 0), method.get("stop_epoch")
        if stop is not None and stop > epochs:
            lines.append(f"distill.methods.{i}.stop_epoch {stop:g}: {ends}, so the method does not stop")
        if stop is not None and stop < min(rise, epochs):
            lines.append(f"distill.methods.{i}.warmup_epochs {rise:g}: the method stops at stop_epoch {stop:g}, before "
                         "its weight has risen")
        elif rise > epochs:
            lines.append(f"distill.methods.{i}.warmup_epochs {rise:g}: {ends}, before its weight has risen")
    return lines
