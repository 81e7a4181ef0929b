"""The settings that decide what a teacher answers; answers of other settings are in another folder."""
import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

import models
from models import Detector, ModelConfig

from .needs import Needs

LAYOUT = 1  # raise it if other code writes other files
NOT_ASKED = ("assigner", "loss_cls", "loss_bbox", "loss_dfl", "loss_centerness", "weights", "pos_weight",
             "allowed_border", "restrict_to_pad", "center_sampling", "center_sample_radius", "regress_ranges")


def weights_hash(detector: Detector) -> str:
    """A hash of all parameters and buffers with their names."""
    found = hashlib.sha256()
    for name, value in sorted(detector.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:32]


@cache
def code_hash() -> str:
    """A hash of the code that computes answers: all of `models` except its readers of checkpoints."""
    found, folder = hashlib.sha256(), Path(models.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if name.parts[0] != "checkpoints":
            found.update(f"{name.as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()} ".encode())
    return found.hexdigest()[:32]


def architecture(model: ModelConfig) -> dict:
    """The parts of a `model` section that decide what a detector answers: without training, and without `test`."""
    parts = {"backbone": model.backbone, "neck": model.neck, "head": model.head}
    return {name: part and {key: plain(value) for key, value in part.items() if key not in NOT_ASKED}
            for name, part in parts.items()}


def plain(value: object) -> object:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def in_channels_last(detector: Detector) -> bool:
    """Whether a detector's convolutions are in the memory layout channels_last, which changes the last digits."""
    return any(weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
               for weight in detector.parameters() if weight.dim() == 4)


def all_settings(given: Mapping, student: Detector, teacher: Detector, needs: Needs) -> dict:
    """The settings of a teacher's answers.

    Args:
        given: what the configuration says: `model`, `data` and `numbers`.
    """
    numbers = {**given.get("numbers", {}), "channels_last": in_channels_last(teacher)}
    weight = next(teacher.parameters())
    pixels = {who: {"statistics": detector.preprocess.statistics, "order": detector.preprocess.channel_order}
              for who, detector in (("student", student), ("teacher", teacher))}
    return plain({"layout": LAYOUT, "code": code_hash(), "weights": weights_hash(teacher), **given, "numbers": numbers,
                  "preprocess": pixels,
                  "precision": teacher.precision, "device": weight.device.type,
                  "dtype": str(weight.dtype).removeprefix("torch."), "needs": needs._asdict()})


def machine(device: torch.device) -> dict:
    """What the last digits of answers depend on besides the settings."""
    if device.type == "cuda":
        return {"torch": torch.__version__, "device": torch.cuda.get_device_name(device)}
    return {"torch": torch.__version__, "threads": torch.get_num_threads(),
            "device": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
