"""Entries of `methods` for every method, for tests of what all methods have in common."""
from kd import METHODS
from kd.config.load import parse_yaml

SETTINGS = {"CrossKD": {"reused_teacher_head_idx": 1}, "LD": {"vlr_weight": 0.25}}


def entry_of(kind: str, setting: str | None = None) -> dict:
    """An entry of `methods`; `setting` is a key of `needs_with`, such as "on: logits"."""
    more = {} if setting is None else parse_yaml(setting, "needs_with")
    return {"type": kind} | SETTINGS.get(kind, {}) | more


def shown(value: object) -> str:
    """The name of a test's case."""
    return "-".join(map(str, value.values())) if isinstance(value, dict) else ""


# Every method with what it says that it needs, and again for each setting of `needs_with`.
STATED = [(entry_of(kind), method.needs) for kind, method in METHODS.items()]
STATED += [(entry_of(kind, setting), needs) for kind, method in METHODS.items()
           for setting, needs in method.needs_with.items()]
NEED_LABELS = [entry for entry, _ in STATED if METHODS[entry["type"]].needs_labels]
NEED_NONE = [entry for entry, _ in STATED if not METHODS[entry["type"]].needs_labels]
