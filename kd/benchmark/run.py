"""The benchmark; `run_benchmark` lists what is timed, in order."""
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from data.errors import counted
from data.tables import text_table

from ..config import load_config
from ..distiller import Distiller
from ..processes.memory import in_gib, in_mib, peak_resident
from ..processes.timing import Call, interleave, medians_ms
from . import steps
from .against import STEP, shown
from .busy import BusyWatch
from .data import time_evaluation, time_input
from .launches import count_launches
from .timing import machine, matmul_call, peak_gpu_memory, shares, with_flops
from .workload import Workload

YARDSTICK = "torchvision retinanet_resnet50_fpn"
MATMUL = "bf16 matrix products"
CACHED = "teacher's answers cached"
INFERENCE, PARTS, INPUT, EVALUATION = "inference: ", "part: ", "input: ", "evaluation: "


def run_benchmark(paths: Sequence[str], device: torch.device, work: Workload, overrides: Sequence[str] = (),
                  note: Callable[[str], None] = lambda text: None) -> dict:
    """Time the models of configurations, with random weights, on random images.

    Args:
        paths: configuration files.
        overrides: `key=value` settings for all of them.
        note: called with a line on what is being done.
    Returns:
        Medians over rounds, in milliseconds, and the machine; `format_report` shows most of it.
    """
    torch.manual_seed(0)
    configs = dict(zip(names(paths), (steps.prepare(load_config(path, overrides), work) for path in paths)))
    images, targets = steps.make_batch(work, device, min(cfg.model.head["num_classes"] for cfg in configs.values()))
    report = {"kind": "steps", "machine": machine(device), "workload": asdict(work), "overrides": list(overrides),
              "yardstick": {"name": YARDSTICK}, "configs": {name: {} for name in configs}, "layouts": {},
              "rounds_ms": {}}
    busy = BusyWatch()

    def timed(prefix: str, calls: dict[str, Call]) -> dict[str, float]:
        """The medians of calls in milliseconds; all rounds go into the report."""
        with busy:
            seconds = interleave(calls, work.rounds, work.warmup)
        report["rounds_ms"] |= {prefix + name: [1e3 * value for value in values] for name, values in seconds.items()}
        return medians_ms(seconds)

    subjects, calls = {}, {}
    for name, entry in entries(report).items():
        note(f"building {name}")
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        if name == YARDSTICK:
            calls[name] = steps.yardstick_step(images, targets, work)
        else:
            subjects[name] = steps.build_subject(configs[name], device, work)
            report["layouts"][name] = subjects[name].layout.names()
            for line in subjects[name].layout.describe():
                note(line)
            calls[name] = steps.training_step(subjects[name], images, targets)
        if device.type == "cuda":
            entry["peak_memory_bytes"] = peak_gpu_memory(calls[name]) - before
    with TemporaryDirectory() as folder:
        for name, subject in subjects.items():
            if isinstance(subject.model, Distiller):
                calls[f"{name}: {CACHED}"] = steps.cached_step(subject, images, targets, Path(folder) / name)
        time_steps(report, calls, device, work, timed, note)
    for name, subject in subjects.items():
        report["configs"][name]["answer_bytes"] = subject.stored

    note("timing inference")
    for subject in subjects.values():
        subject.model.eval()
        steps.set_typical_threshold(subject, images, targets)
    predictions = {name: steps.predict_call(subject, images, targets) for name, subject in subjects.items()}
    times = timed(INFERENCE, predictions)
    for name, subject in subjects.items():
        note(f"timing the parts of {name}")
        parts = timed(f"{PARTS}{name}: ", steps.part_calls(subject, images, targets))
        report["configs"][name] |= {"predict_ms": times[name], "parts_ms": parts}

    note("timing the input pipeline")
    data = next(iter(configs.values())).input
    report["input"] = time_input(data.scale, work.batch, work.rounds, work.input_images, data.train_augment)
    note("timing the evaluation")
    report["evaluation"] = time_evaluation(work.eval_images)
    for what, entry in ((INPUT, report["input"]), (EVALUATION, report["evaluation"])):
        report["rounds_ms"] |= {what + name: values for name, values in entry.pop("rounds_ms").items()}
    report["busy"] = busy.record()
    report["peak_resident_bytes"] = peak_resident()
    return report


def time_steps(report: dict, calls: dict[str, Call], device: torch.device, work: Workload,
               timed: Callable[[str, dict[str, Call]], dict[str, float]], note: Callable[[str], None]) -> None:
    """Put the training steps' times, shares and operations into the report."""
    note(f"timing {counted(len(calls), 'training step')}, {work.warmup} + {counted(work.rounds, 'round')}")
    products = None
    if device.type == "cuda":
        matmul, products = matmul_call(device)
        calls = calls | {MATMUL: matmul}
    medians = timed(STEP, calls)
    report["steps_ms"] = {name: report["rounds_ms"][STEP + name] for name in calls}
    if device.type == "cuda":
        report["matmul_flops_per_second"] = products / medians[MATMUL] * 1e3
    for name, entry in entries(report).items():
        note(f"profiling a training step of {name}")
        loss, flops = with_flops(calls[name])
        cached = medians.get(f"{name}: {CACHED}")
        entry |= {} if cached is None else {"cached_ms": cached}
        entry |= {"step_ms": medians[name], "ratio": medians[name] / medians[YARDSTICK], "loss": float(loss),
                  "flops": flops, "flops_per_second": flops / medians[name] * 1e3,
                  "shares": shares(calls[name], work.profiled, device),
                  "launches": count_launches(calls[name])._asdict()}
        if device.type == "cuda":
            entry["utilisation"] = entry["flops_per_second"] / report["matmul_flops_per_second"]


def entries(report: dict) -> dict[str, dict]:
    """The report's entry for each model that trains, the yardstick first."""
    return {YARDSTICK: report["yardstick"]} | report["configs"]


def names(paths: Sequence[str]) -> list[str]:
    """Short names of configuration files; the path if two have the same name."""
    stems = [Path(path).stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths)]


def format_report(report: dict) -> str:
    """The report as tables for people."""
    on, work, data, evaluation = (report[key] for key in ("machine", "workload", "input", "evaluation"))
    (height, width), rounds = work["size"], report["rounds_ms"]
    lines = [f"{on['device']}, {counted(on['threads'], 'thread')}, torch {on['torch']}; "
             f"{counted(work['batch'], 'image')} of {height} x {width} a step, {counted(work['boxes'], 'box')} an "
             f"image; medians of {counted(work['rounds'], 'round')}, in brackets the middle half of them"]
    lines += [f"{name}: {', '.join(f'{who} {layout}' for who, layout in layouts.items())}"
              for name, layouts in report["layouts"].items()]
    lines += [*filter(None, [report["busy"]["warning"]]), ""]
    on_gpu = "matmul_flops_per_second" in report
    header = ["training step", "ms", "ratio", "overhead", "GFLOP/s", "inference ms",
              *["of matmul", "GPU busy", "peak GiB"] * on_gpu]
    rows = []
    for name, entry in entries(report).items():
        rows.append([name, shown(report["steps_ms"][name]), f"{entry['ratio']:.3f}",
                     f"{entry['shares']['overhead']:.1%}", f"{entry['flops_per_second'] / 1e9:.0f}",
                     shown(rounds[INFERENCE + name]) if "predict_ms" in entry else "-"])
        if on_gpu:
            rows[-1] += [f"{entry['utilisation']:.1%}", f"{entry['shares']['device_ms'] / entry['step_ms']:.1%}",
                         f"{entry['peak_memory_bytes'] / 2 ** 30:.2f}"]
        if "cached_ms" in entry:
            ratio = entry["cached_ms"] / report["yardstick"]["step_ms"]
            cached = f"{name}: {CACHED}"
            rows.append([cached, shown(report["steps_ms"][cached]), f"{ratio:.3f}", *"-" * (len(header) - 3)])
    lines.append(text_table(header, rows))
    rows = [[name, str(found["kernels"]), str(found["waits"]), f"{found['bytes'] / 1e9:.2f}"]
            for name, entry in entries(report).items() for found in [entry["launches"]]]
    lines += ["", text_table(["a step on the device", "kernels", "waits", "GB outside convolutions"], rows), ""]
    lines += [f"{name}: the answers take {in_mib(entry['answer_bytes'])} for an image"
              for name, entry in report["configs"].items() if entry["answer_bytes"]]
    lines += ["", "Overhead is what is neither convolution nor norm; most of it:"]
    for name, entry in entries(report).items():
        largest = list(entry["shares"]["largest"].items())[:6]
        lines.append(f"{name}: " + ", ".join(f"{part.removeprefix('aten::')} {share:.1%}" for part, share in largest))
    rows = [[f"{name}: {part}", shown(rounds[f"{PARTS}{name}: {part}"]),
             "-" if part == "post-processing" else f"{ms / entry['step_ms']:.2%}"]
            for name, entry in report["configs"].items() for part, ms in entry["parts_ms"].items()]
    lines += ["", text_table(["part", "ms", "of a step"], rows), ""]
    rows = [[part, shown(rounds[INPUT + part])] for part in data["ms"]]
    lines += [text_table(["input, of an image", "ms"], rows), ""]
    rows = [[part, shown(rounds[EVALUATION + part])] for part in evaluation["ms"]]
    lines += [text_table([f"evaluation of {counted(evaluation['images'], 'image')}", "ms"], rows), "",
              f"peak memory of the process: {in_gib(report['peak_resident_bytes'])}"]
    if on_gpu:
        lines.append(f"bf16 matrix products: {report['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s")
    return "\n".join(lines)
