"""Commands that pages show, run as they stand there, in miniature."""
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from glob import glob
from pathlib import Path

import pytest
from runs import ROOT

from data import generate_scenes
from data.images import read_image
from kd.benchmark.run import run_benchmark

TINY = ["train.epochs=1", "train.log_every=1", "train.check_images=2", "data.batch_size=4", "data.workers=0",
        "data.scale=[64, 64]", "data.train.first=8", "data.val.first=2", "schedule.warmup_steps=1"]
CONFIGURED = ("train", "eval", "predict", "export", "summary", "visualize", "analyze", "sweep", "check_data")
EXTRA = {f"{name}.py": TINY for name in CONFIGURED} | {
    "summary.py": ["data.scale=[64, 64]"], "predict.py": TINY[-5:], "label.py": TINY[-5:],
    "demo.py": ["--images", "8", *TINY[:6]],
    "export.py": [*TINY, "--fixed", "batch=1", "height=64", "width=96"],  # fixed sizes take half the time
    "sweep.py": ["--seeds", "0", *TINY],
    "generate_data.py": ["--train", "8", "--val", "4", "--size", "64", "64"],
    "benchmark.py": ["--rounds", "1", "--size", "64", "64", "--batch", "1", "--eval-images", "4", "--cfg",
                     "configs/bccd/student_gfl_r18w16.yaml", "model.head.num_classes=3"]}
SHELL = ("echo", "ln", "mkdir", "cp")
# What a configuration's full size is made of, and what there is in its place.
NARROW = ((r"weights: torchvision://\w+", "base_channels: 8"), (r"(out|feat)_channels: 256", r"\1_channels: 64"),
          (r"checkpoint: zoo:\w+", "checkpoint: null"), (r"epochs: \d+", "epochs: 1"))


def commands(text: str) -> list[str]:
    """The command lines of a page: all that stands in fenced blocks that name no language, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    lines = [re.sub(r"\s+#.*", "", line) for language, block in blocks if not language for line in block.splitlines()]
    return [line.strip() for line in lines if line.strip()]


def make_workspace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose configurations are narrow, with small data in the places that pages name, to run commands in."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DENSEKD_DATA", "datasets")
    for path in (ROOT / "configs").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        for pattern, narrow in NARROW:
            text = re.sub(pattern, narrow, text)
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    monkeypatch.setattr("kd.experiments.sweep.start", lambda job, slot, at_once, device: RunHere(job.command(device),
                                                                                            monkeypatch))
    monkeypatch.setattr("data.sources.download.prepare_coco", download_nothing)
    monkeypatch.setattr("kd.benchmark.run.run_benchmark", lambda paths, device, work, *rest, **options: run_benchmark(
        paths, device, replace(work, warmup=1, profiled=1, input_images=2), *rest, **options))
    scenes = generate_scenes(folder / "generated", train=8, val=4, size=(64, 96))
    write_coco(scenes, folder / "datasets" / "coco")
    write_voc(scenes, folder / "datasets" / "BCCD_Dataset" / "BCCD")
    write_yolo(scenes, folder / "photos")
    return folder


def download_nothing(out: Path, *options: object) -> list[str]:
    """In place of COCO's 19 GiB, which lie there in miniature."""
    assert out == Path("datasets/coco") and out.is_dir()
    return ["unpacked before"]


def contents(scenes: Path):
    """Split, file, its boxes (class, x, y, w, h), of each image."""
    for split in ("train", "val"):
        content = json.loads((scenes / "annotations" / f"{split}.json").read_text())
        for image in content["images"]:
            yield split, scenes / split / image["file_name"], [
                (a["category_id"], *a["bbox"]) for a in content["annotations"] if a["image_id"] == image["id"]]


def write_coco(scenes: Path, folder: Path) -> None:
    """Generated scenes under COCO's names, with 80 classes."""
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(scenes / split, folder / f"{split}2017")
        content = json.loads((scenes / "annotations" / f"{split}.json").read_text())
        content["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def write_voc(scenes: Path, folder: Path) -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    lists = {"train": [], "val": [], "test": []}
    for split, path, boxes in contents(scenes):
        stem = f"{split}{path.stem}"
        lists["test" if split == "val" and len(lists["val"]) == 2 else split].append(stem)
        shutil.copy(path, folder / "JPEGImages" / f"{stem}.jpg")
        objects = "".join(f"<object><name>shape{k % 3}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
                          f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>" for k, x, y, w, h in boxes)
        (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    for split, stems in lists.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))


def write_yolo(scenes: Path, folder: Path) -> None:
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for split, path, boxes in contents(scenes):
        stem = f"{split}{path.stem}"
        shutil.copy(path, folder / "images" / f"{stem}.jpg")
        height, width = read_image(path).shape[1:]
        (folder / "labels" / f"{stem}.txt").write_text("".join(
            f"{k % 3} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"
            for k, x, y, w, h in boxes))
    (folder / "classes.txt").write_text("disc\nring\nstar\n")


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line as one would type it: scripts in this process with overrides that make them fast, `torchrun` as one
    process, and of `make` and `pip` whether what they name exists."""
    words = shlex.split(line)
    if words[0] == "torchrun":
        words = ["python", *words[[i for i, word in enumerate(words) if word.endswith(".py")][0]:]]
    if words[0] in SHELL:
        subprocess.run(line, shell=True, check=True)  # noqa: S602 our own page
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif words[:2] == ["pip", "install"]:
        extra = re.search(r"\[(\w+)\]", line)
        assert extra is None or f'"{extra[1]}": [' in (ROOT / "setup.py").read_text(encoding="utf-8"), line
    elif words[0] == "git":
        assert words[1] == "clone" and words[2].startswith("https://"), line
    elif words[0] == "python":
        script, arguments = words[1], words[2:]
        arguments = [path for word in arguments for path in sorted(glob(word)) or [word]]
        arguments = [*EXTRA.get(Path(script).name, []), *arguments]
        if Path(script).name in ("benchmark.py", "demo.py", "generate_data.py", "sweep.py"):  # their last ones win
            arguments = [*words[2:], *EXTRA[Path(script).name]]
        code = run_here(ROOT / script, arguments, monkeypatch)
        assert not code, f"{line}: exit code {code}"
    else:
        raise AssertionError(f"{line}: tests/commands.py does not know how to run {words[0]}")


def run_here(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Run a script in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code


class RunHere:
    """A run of sweep.py in this process, in place of one of its own: what `sweep.start` returns."""

    def __init__(self, command: list[str], monkeypatch: pytest.MonkeyPatch):
        self.returncode = run_here(Path(command[1]), command[2:], monkeypatch) or 0

    def poll(self) -> int:
        return self.returncode

    def kill(self) -> None:
        pass
