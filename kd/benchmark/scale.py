"""How data sets of millions of boxes start, what a loader worker holds of them, and what their evaluation takes.

Each row is measured in a process of its own, with generated annotations and without image files.
"""
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from data import CocoDataset, build_loader
from data.errors import counted
from data.output import writing
from data.tables import text_table

from ..evaluation.coco import coco_api, coco_figures, read_truth
from ..processes.memory import in_gib, in_mib, peak_resident
from .data import IMAGE_SIZE
from .timing import machine

# By name: images, boxes and classes, about those of COCO's train2017 and of Objects365.
SIZES = {"coco": (118_000, 860_000, 80), "objects365": (1_700_000, 15_000_000, 365)}
EVALUATED = {"coco": [(5000, 80), (40_000, 80)], "objects365": [(5000, 365), (40_000, 365)]}
STARTS = ("fork", "spawn")  # of workers
DETECTIONS = 100  # of each image
SEEN = 300     # images that each worker prepares before its memory is measured,
AROUND = 200   # and for each of them it reads the annotations of so many
ROWS = 50_000  # entries that are written at a time


def measure_scale(name: str, note: Callable[[str], None] = lambda text: None) -> dict:
    """Measure the sizes of one data set.

    Returns:
        `starts`, with seconds until the first batch is chosen, and `workers`, their memory in bytes; `evaluations`.
    """
    report = {"machine": machine(torch.device("cpu")), "name": name, "starts": {}, "workers": {}, "evaluations": []}
    before = os.environ.get("DENSEKD_CACHE")
    with TemporaryDirectory() as folder:
        os.environ["DENSEKD_CACHE"] = folder
        try:
            file, small = Path(folder) / "annotations.json", Path(folder) / "small.json"
            note(f"writing annotations of {counted(SIZES[name][0], 'image')}")
            write_annotations(file, *SIZES[name])
            write_annotations(small, 100, 800, SIZES[name][2])
            report["megabytes"] = file.stat().st_size / 1e6
            time.sleep(2.5)  # only then its times say that it has not changed
            for row in ("first", "second"):
                note(f"the {row} start")
                report["starts"][row] = alone(time_start, file)
            for start in STARTS:
                note(f"workers that start by {start}")
                report["workers"][start] = {"data": alone(worker_memory, file, start),
                                            "without": alone(worker_memory, small, start)}
        finally:
            os.environ.pop("DENSEKD_CACHE")
            os.environ |= {} if before is None else {"DENSEKD_CACHE": before}
    for images, classes in EVALUATED[name]:
        note(f"an evaluation of {counted(images, 'image')} and {counted(classes, 'class')}")
        report["evaluations"].append(alone(time_figures, images, classes))
    return report


def alone(call: Callable, *args: object) -> dict:
    """The result of a call in a new process with one thread."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return pool.submit(call, *args).result()


def write_annotations(file: Path, images: int, boxes: int, classes: int) -> None:
    """Write a COCO file of generated boxes, in a random order, as those of COCO and Objects365 are."""
    rng = np.random.default_rng(0)
    height, width = IMAGE_SIZE
    image = '{"id": %d, "file_name": "%012d.jpg", "width": ' + f'{width}, "height": {height}}}'
    box = '{"id": %d, "image_id": %d, "category_id": %d, "bbox": [%.2f, %.2f, %.2f, %.2f], "area": %.4f, "iscrowd": 0}'
    with writing(file) as partial, open(partial, "w", encoding="utf-8") as opened:
        opened.write('{"images": [')
        for start in range(1, images + 1, ROWS):
            numbers = range(start, min(start + ROWS, images + 1))
            opened.write((", " if start > 1 else "") + ", ".join([image % (i, i) for i in numbers]))
        opened.write('], "annotations": [')
        for start in range(1, boxes + 1, ROWS):
            count = min(ROWS, boxes + 1 - start)
            sides = np.exp(rng.uniform(np.log(8), np.log(height / 2), (count, 2)))
            corners = rng.uniform(0, 1, (count, 2)) * ([width, height] - sides)
            columns = (np.arange(start, start + count), rng.integers(1, images + 1, count),
                       rng.integers(1, classes + 1, count), *corners.T, *sides.T, sides.prod(1))
            rows = zip(*(column.tolist() for column in columns))
            opened.write((", " if start > 1 else "") + ", ".join([box % row for row in rows]))
        names = [{"id": k + 1, "name": f"class {k}"} for k in range(classes)]
        opened.write(f'], "categories": {json.dumps(names)}}}')


class Blank(CocoDataset):
    """A data set whose images are black, and need no files."""

    def _read_image(self, index: int) -> Tensor:
        for other in range(index, min(index + AROUND, len(self))):
            self.image_ids[other], self.file_names[other], self._sample(Tensor(), other)
        return torch.zeros(3, *self.sizes[index], dtype=torch.uint8)


def open_data(file: Path) -> Blank:
    return Blank(file.parent, file, training=True, scale=(64, 48))


def time_start(file: Path) -> dict:
    """Seconds until the first batch is chosen, of the clock and of the CPU, and the peak memory of the process."""
    empty, clock, cpu = peak_resident(), time.perf_counter(), time.process_time()
    loader = build_loader(open_data(file), 2, training=True, workers=0)
    next(iter(loader.batch_sampler))
    return {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": peak_resident(), "empty_bytes": empty}


def worker_memory(file: Path, start: str, workers: int = 2) -> dict:
    """Bytes of a worker, on average, after it has prepared SEEN images: `dirty`, its own copies; `private`, with pages
    of files that no other process has in memory."""
    loader = build_loader(open_data(file), 2, training=True, workers=workers, worker_start=start)
    batches = iter(loader)
    for _ in range(SEEN * workers // 2):
        if next(batches, None) is None:
            batches = iter(loader)
    found = [memory_of(worker.pid) for worker in batches._workers]
    return {key: sum(each[key] for each in found) / len(found) for key in found[0]}


def memory_of(process: int) -> dict[str, int]:
    """The private memory of a process, in bytes; Linux only."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"dirty": 1024 * kib["Private_Dirty"], "private": 1024 * (kib["Private_Dirty"] + kib["Private_Clean"])}


def time_figures(images: int, classes: int) -> dict:
    """Seconds and peak memory of the COCO figures of DETECTIONS generated detections per image."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "annotations.json"
        write_annotations(file, images, 7 * images, classes)
        dataset = CocoDataset(folder, file, training=False)
        results = list(zip(dataset.image_ids, generate_detections(dataset)))
        before, clock, cpu = peak_resident(), time.perf_counter(), time.process_time()
        figures = coco_figures(results, dataset)
        return {"images": images, "classes": classes, "by": coco_api()[0].__module__.partition(".")[0],
                "seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu,
                "peak_bytes": peak_resident(), "before_bytes": before, "AP": figures["AP"]}


def generate_detections(dataset: CocoDataset) -> np.ndarray:
    """Detections (N, DETECTIONS, 6), most of them near a box, the others of a class near that of the box."""
    rng, (truth, lengths) = np.random.default_rng(0), read_truth(dataset)
    ends = np.append(0, np.cumsum(lengths))
    box = ends[:-1, None] + (rng.random((len(lengths), DETECTIONS)) * lengths[:, None]).astype(int)
    near = truth[np.minimum(box, len(truth) - 1)]
    found = near[:, :, :4] * rng.normal(1, 0.1, (*box.shape, 4))
    others = (near[:, :, 5] + rng.integers(1, 4, box.shape)) % dataset.num_classes
    labels = np.where(rng.random(box.shape) < 0.3, others, near[:, :, 5])
    return np.concatenate([found, rng.random((*box.shape, 1)) ** 2, labels[:, :, None]], axis=2)


def format_scale(report: dict) -> str:
    """The report as tables for people."""
    images, boxes, classes = SIZES[report["name"]]
    lines = [f"{counted(images, 'image')}, {counted(boxes, 'box')}, {counted(classes, 'class')}: a file of "
             f"{report['megabytes']:.0f} MB; {report['machine']['device']}", ""]
    rows = [[f"{name} start", f"{each['seconds']:.1f}", f"{each['cpu_seconds']:.1f}", in_gib(each["peak_bytes"]),
             in_gib(each["empty_bytes"])] for name, each in report["starts"].items()]
    lines += [text_table(["until the first batch", "seconds", "CPU seconds", "peak memory", "before"], rows), ""]
    rows = [[start, *(in_mib(each[which][key]) for which in ("data", "without") for key in ("dirty", "private"))]
            for start, each in report["workers"].items()]
    lines += [text_table(["a worker's memory", "own copies", "private", "own copies, 100 images", "private"], rows), ""]
    rows = [[counted(each["images"], "image"), counted(each["classes"], "class"), each["by"], f"{each['seconds']:.1f}",
             f"{each['cpu_seconds']:.1f}", in_gib(each["peak_bytes"]), in_gib(each["before_bytes"])]
            for each in report["evaluations"]]
    lines.append(text_table(["evaluation", "", "by", "seconds", "CPU seconds", "peak memory", "before"], rows))
    return "\n".join(lines)
