"""The benchmark of exported files: size, AP, and the time from pixels to detections, beside the detector in PyTorch."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import collate
from data.errors import counted
from data.inputs.files import Sample
from data.tables import points, text_table

from ..config import Config
from ..deploy.agreement import pad_together
from ..deploy.export import check_samples
from ..deploy.exported import ExportedDetector, open_with_data
from ..deploy.recipe import Recipe
from ..deploy.runtimes import ExportedFile, bytes_of, kind_of, open_exported
from ..evaluation.evaluate import evaluate_checkpoint, evaluate_exported
from ..inference.detectors import load_named
from ..inference.precision import place
from ..processes.timing import Call, interleave
from .busy import BusyWatch
from .timing import machine

CPU = torch.device("cpu")
IMAGES = 8      # of data.val, or of noise
TORCH, COMPILED = "torch", "torch compiled"


@dataclass
class Subject:
    """One row of the table."""

    path: Path | str                    # an exported file, or a checkpoint
    detector: ExportedDetector | nn.Module
    about: Recipe | None = None         # of an exported file
    compiled: bool = False
    openvino: bool = False              # an ONNX file that OpenVINO runs

    @property
    def batch(self) -> int:
        """Images at a time."""
        return self.about.batch or 1 if self.about else 1

    def call(self, sample: Sample) -> Call:
        """A call from the padded pixels of one image to its detections; a file for several images gets it several
        times."""
        if self.about:
            images, targets = pad_together([sample] * self.batch, self.about)
        else:
            images, targets = collate([(sample.views[0], sample.targets[0])])

        @torch.no_grad()
        def run() -> list[dict]:
            return self.detector.predict(self.detector.preprocess(images, targets), targets)
        return run


def run_exported(cfg: Config, files: Sequence[Path], checkpoint: str | None = None, compiled: bool = False,
                 with_ap: bool = True, openvino: bool = False, rounds: int = 9, warmup: int = 2,
                 note: Callable[[str], None] = lambda text: None) -> dict:
    """Compare exported files of one detector on the CPU, with one thread and with all.

    Args:
        cfg: its data.val gives the images to time on (otherwise noise), and the AP.
        checkpoint: also times the detector in PyTorch with these weights; with `compiled`, also by torch.compile.
        with_ap: compute the AP, if there is a data.val.
        openvino: also run each ONNX file with OpenVINO.
        rounds, warmup: see `interleave`. In each round, each takes its turn on every image.
        note: called with a line on what is being done.
    Returns:
        The machine, and for each row its `bytes`, `AP` or None, and by number of threads the milliseconds of an image:
        `p50`, `p95` and `mean`.
    Raises:
        ExportedFileError, ConfigError, DataError, CheckpointError: bad input.
    """
    all_threads = torch.get_num_threads()
    threads = sorted({1, all_threads})
    report = {"kind": "exported", "machine": machine(CPU), "rounds": rounds, "threads": threads, "rows": {},
              "rounds_ms": {}}
    busy = BusyWatch()
    with_ap = with_ap and cfg.data is not None and bool(cfg.data.parts("val"))
    for path in files if with_ap else ():
        open_with_data(cfg, path)  # files of other classes are refused before the timing
    first = open_exported(files[0]).about
    detector = None if checkpoint is None else load_named(cfg, checkpoint, CPU, names=first.classes)[0]
    try:
        for count in threads:
            torch.set_num_threads(count)
            if detector is not None:
                place(detector, CPU, cfg.train)  # its kernels depend on the threads
            subjects = in_torch(detector, checkpoint, compiled) | open_all(files, openvino)
            samples = {name: check_samples(cfg, subject.about or first, [], IMAGES)
                       for name, subject in subjects.items()}
            note(f"timing {counted(len(subjects), 'detector')} with {counted(count, 'thread')}")
            calls = {(name, i): subject.call(sample) for name, subject in subjects.items()
                     for i, sample in enumerate(samples[name])}
            with busy:
                seconds = interleave(calls, rounds, warmup)
            for name, subject in subjects.items():
                ms = 1e3 * np.concatenate([seconds[name, i] for i in range(len(samples[name]))]) / subject.batch
                row = report["rows"].setdefault(name, {"bytes": size(subject), "AP": None, "ms": {}})
                report["rounds_ms"][f"{name}, {counted(count, 'thread')}"] = ms.tolist()
                row["ms"][count] = {"p50": float(np.median(ms)), "p95": float(np.percentile(ms, 95)),
                                    "mean": float(ms.mean())}
    finally:
        torch.set_num_threads(all_threads)
    report |= {"images": len(samples[name]), "busy": busy.record()}
    if with_ap:
        for name, subject in subjects.items():
            note(f"computing the AP of {name}")
            if subject.compiled:
                figures = {"AP": report["rows"][TORCH]["AP"]}  # the same computation
            elif subject.about:
                figures = evaluate_exported(cfg, subject.path, CPU, openvino=subject.openvino)
            else:
                figures = evaluate_checkpoint(cfg, subject.path, CPU)
            report["rows"][name]["AP"] = figures["AP"]
    return report


def in_torch(detector: nn.Module | None, checkpoint: str | None, compiled: bool) -> dict[str, Subject]:
    """The rows by name of a detector in PyTorch, if there is one."""
    if detector is None:
        return {}
    rows = {TORCH: Subject(checkpoint, detector)}
    if compiled:
        torch._dynamo.reset()  # what was compiled is for another number of threads
        detector.compile()
        rows[COMPILED] = Subject(checkpoint, Compiled(detector), compiled=True)
    return rows


def open_all(files: Sequence[Path], openvino: bool) -> dict[str, Subject]:
    """The rows by name of exported files, with `openvino` ONNX files twice. Their runtimes use the number of threads
    that PyTorch has now."""
    opened = [(open_exported(path), False) for path in files]
    if openvino:
        opened += [(open_exported(path, openvino=True), True) for path in files if kind_of(path) == "onnx"]
    return {label(file, by): Subject(file.path, ExportedDetector(file), file.about, openvino=by) for file, by in opened}


class Compiled(nn.Module):
    """A detector whose `forward` is compiled; the detector's own `predict` is not."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector, self.preprocess = detector, detector.preprocess

    def predict(self, images: Tensor, targets: list[dict]) -> list[dict]:
        return self.detector(images, targets)


def label(file: ExportedFile, openvino: bool) -> str:
    """A file's row: how it computes, and its path."""
    path, about = file.path, file.about
    kind = {".pt2": "torch.export", ".xml": "OpenVINO"}.get(path.suffix, "ONNX int8" if about.int8 else "ONNX float")
    return (f"{kind} {path}" + (f", {about.batch} at a time" if about.batch and about.batch > 1 else "")
            + (", by OpenVINO" if openvino else ""))


def size(subject: Subject) -> int:
    """Bytes of a file with its weights beside it, or of a detector's parameters and buffers."""
    if subject.about is None:
        return sum(value.numel() * value.element_size() for value in subject.detector.state_dict().values())
    return bytes_of(subject.path)


def format_exported(report: dict) -> str:
    """The report as a table for people."""
    on = report["machine"]
    header = ["", "MB", "AP"]
    for count in report["threads"]:
        header += [f"{counted(count, 'thread')}: p50 ms", "p95 ms", "images/s"]
    rows = []
    for name, row in report["rows"].items():
        rows.append([name, f"{row['bytes'] / 1e6:.1f}", points(row["AP"])])
        for count in report["threads"]:
            ms = row["ms"][count]
            rows[-1] += [f"{ms['p50']:.1f}", f"{ms['p95']:.1f}", f"{1e3 / ms['mean']:.1f}"]
    return (f"{on['device']}, torch {on['torch']}; {counted(report['images'], 'image')}, one at a time, "
            f"{counted(report['rounds'], 'round')}; from padded pixels to detections, with decoding and NMS\n"
            + "".join(f"{line}\n" for line in filter(None, [report["busy"]["warning"]])) + "\n"
            + text_table(header, rows))
