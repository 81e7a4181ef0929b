"""Small runs on generated scenes, for tests of the engine and of the scripts."""
import json
import os
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from processes import THREADS, context
from small_models import CLASSES as NUM_CLASSES
from small_models import enliven, without_weights

from data.sources.scenes import CLASSES
from kd import Distiller, build_distiller
from kd.config import load_config
from models import Detector, build_detector

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml")  # those that train
                 if path.parent.name != "_base_" and not path.stem.startswith("space_"))


def model(channels: int = 8, head: str = "GFLHead") -> dict:
    """A `model` section for a detector whose training step takes milliseconds."""
    norm = {"type": "GN", "num_groups": 4}
    return {"backbone": {"type": "ResNet", "depth": 18, "base_channels": channels, "norm_eval": False},
            "neck": {"type": "FPN", "out_channels": 16, "start_level": 1, "num_outs": 5,
                     "add_extra_convs": "on_output"},
            "head": {"type": head, "stacked_convs": 1, "feat_channels": 16, "norm_cfg": norm}}


def config(scenes: Path, epochs: int = 2, distill: dict | None = None, head: str = "GFLHead") -> dict:
    """A whole configuration for a folder that `generate_scenes` wrote."""
    def split(name: str) -> dict:
        return {"images": str(scenes / name), "annotations": str(scenes / "annotations" / f"{name}.json")}
    cfg = {"model": model(head=head), "optimizer": {"lr": 0.01}, "schedule": {"warmup_steps": 2, "milestones": [1]},
           "data": {"train": split("train"), "val": split("val"), "batch_size": 4, "workers": 0, "scale": [64, 64]},
           "train": {"epochs": epochs, "log_every": 1, "grad_clip": 35, "channels_last": True}}
    return cfg | ({"distill": distill} if distill else {})


def write_config(path: Path, cfg: dict) -> Path:
    path.write_text(yaml.safe_dump(cfg), encoding="utf-8")
    return path


def config_with(cfg: dict, **sections) -> dict:
    """A copy of the configuration with more keys in some sections."""
    return cfg | {name: cfg.get(name, {}) | section for name, section in sections.items()}


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    """Run a script in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    return caught.value.code


def write_checkpoint(path: Path, cfg: dict, classes: list[str] = CLASSES) -> Path:
    """Write a checkpoint of the configuration's detector, untrained, but it detects something everywhere."""
    torch.manual_seed(0)
    section = cfg["model"] | {"head": cfg["model"]["head"] | {"num_classes": len(classes)}}
    detector = enliven(build_detector(section))
    torch.save({"format": "densekd", "model": detector.state_dict(), "classes": list(classes)}, path)
    return path


def script(log: Path, name: str, *arguments: object) -> None:
    """Run a script in its own process, as the target of `processes.context.Process`. Its output goes to `log`."""
    os.setsid()  # so that a test may signal its process group
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(THREADS)
    sys.argv = [name, *map(str, arguments)]
    runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


def peak_memory(log: Path, result: Path, name: str, *arguments: object) -> None:
    """`script`, and write by how many bytes the peak memory of its process has grown."""
    from resource import RUSAGE_SELF, getrusage

    before = getrusage(RUSAGE_SELF).ru_maxrss
    try:
        script(log, name, *arguments)
    finally:
        unit = 1 if sys.platform == "darwin" else 1024
        result.write_text(str((getrusage(RUSAGE_SELF).ru_maxrss - before) * unit))


def shrunk(model: dict) -> dict:
    """The same model, but narrow and without weights to download."""
    model = without_weights(model)
    width = {"ResNet": {"base_channels": 4}, "ResNeXt": {"base_channels": 4, "groups": 2}}
    width = width.get(model["backbone"]["type"], {})
    return model | {"backbone": model["backbone"] | width, "neck": model["neck"] | {"out_channels": 32},
                    "head": model["head"] | {"feat_channels": 32, "num_classes": NUM_CLASSES}}


def shrunk_teacher(entry: dict) -> dict:
    """The same teacher, narrow and without weights; it knows some classes if it did, and otherwise all."""
    assert entry["checkpoint"]
    small = {"model": shrunk(load_config(ROOT / entry["cfg"])["model"]), "checkpoint": None}
    if "class_map" in entry:
        some = None in entry["class_map"]
        assert some or len(entry["class_map"]) == 80
        small["class_map"] = [0, None, 1] if some else list(range(NUM_CLASSES))
    return entry | small | {"cfg": None}


def without_size(cfg: dict) -> dict:
    """The `model` and `distill` sections of a configuration, shrunk and without weights."""
    found = {"model": shrunk(cfg["model"])}
    if cfg.get("distill"):
        said = cfg["distill"]["teacher"]
        teachers = [shrunk_teacher(entry) for entry in (said if isinstance(said, list) else [said])]
        found["distill"] = cfg["distill"] | {"teacher": teachers}
    return found


def built(cfg: dict) -> Distiller | Detector:
    """The detector or distiller of a configuration, shrunk and without weights."""
    cfg = without_size(cfg)
    return (build_distiller(cfg) if "distill" in cfg else build_detector(cfg["model"])).train()


def as_torchrun_does(environment: dict, *arguments) -> None:
    os.environ.update(environment)
    script(*arguments)


def start_processes(world: int, log: Path, *arguments: object) -> list:
    """Run a script in `world` processes with the environment that torchrun sets."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [context.Process(target=as_torchrun_does, args=(
        common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def assert_they_end(processes: list, code: int, log: Path) -> None:
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [code] * len(processes), log.read_text()


def assert_same(first, second, place=""):
    """Assert that two nested states are equal bit for bit, apart from the time and memory that they took."""
    assert type(first) is type(second), place
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first.keys() - {"seconds", "peak_memory"}:
            assert_same(first[key], second[key], f"{place}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), place
        for i, pair in enumerate(zip(first, second)):
            assert_same(*pair, f"{place}.{i}")
    else:
        assert torch.equal(first, second) if torch.is_tensor(first) else first == second, place



def steps_in(work_dir):
    """The steps and the evaluated epochs in metrics.jsonl, without a last line that is still being written."""
    lines = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().split("\n")[:-1]]
    return [line["step"] for line in lines if "loss" in line], [line["epoch"] for line in lines if "AP" in line]



def in_file(path, **entries):
    torch.save(torch.load(path, weights_only=True) | entries, path)
    return path
