"""Where the time of training steps goes, and how near they come to their convolutions alone (benchmark.py --where)."""
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from data.errors import counted
from data.tables import text_table

from ...config import load_config
from ...exceptions import UsageError
from ...processes.timing import interleave, medians_ms
from .. import steps
from ..against import STEP, shown
from ..busy import BusyWatch
from ..run import YARDSTICK, names
from ..timing import machine
from ..workload import Workload
from .floor import LAYOUTS, build_floor
from .onednn import run_in_process
from .parts import where

FLOOR = "floor: "
LISTED = 12  # rows of a table


def run_where(paths: Sequence[str], device: torch.device, work: Workload, overrides: Sequence[str] = (),
              note: Callable[[str], None] = lambda text: None) -> dict:
    """Profile training steps, and time them beside their convolutions alone.

    Args:
        paths, overrides, note: as in `run_benchmark`.
    Raises:
        UsageError: train.compile, whose code has no single operators.
    """
    torch.manual_seed(0)
    configs = dict(zip(names(paths), (steps.prepare(load_config(path, overrides), work) for path in paths)))
    if compiled := [name for name, cfg in configs.items() if cfg.train.compile]:
        raise UsageError(f"--where shows single operators, and {compiled[0]} is compiled: add train.compile=false")
    images, targets = steps.make_batch(work, device, min(cfg.model.head["num_classes"] for cfg in configs.values()))
    report = {"kind": "where", "machine": machine(device), "workload": asdict(work), "overrides": list(overrides),
              "yardstick": {"name": YARDSTICK}, "layouts": {}, "configs": {}}
    calls = {STEP + YARDSTICK: steps.yardstick_step(images, targets, work)}
    for name, cfg in configs.items():
        note(f"profiling a training step of {name}")
        subject = steps.build_subject(cfg, device, work)
        step = steps.training_step(subject, images, targets)
        step()  # without the set-up of the first step
        report["layouts"][name] = subject.layout.names()
        entry = report["configs"][name] = {"why": subject.layout.describe(),
                                           **where(subject, step, work.profiled, device)}
        loop, entry["convolutions"] = build_floor(step, device, note=note)
        calls |= {STEP + name: step, FLOOR + name: loop}
        if device.type == "cpu":
            note(f"asking oneDNN for its kernels in a step of {name}")
            entry["onednn"] = run_in_process(cfg, work, subject.layout)
    note(f"timing steps and floors, {work.warmup} + {counted(work.rounds, 'round')}")
    with BusyWatch() as busy:
        seconds = interleave(calls, work.rounds, work.warmup)
    medians = medians_ms(seconds)
    report |= {"rounds_ms": {name: [1e3 * value for value in values] for name, values in seconds.items()},
               "busy": busy.record()}
    report["yardstick"]["step_ms"] = medians[STEP + YARDSTICK]
    for name, entry in report["configs"].items():
        entry |= {"step_ms": medians[STEP + name], "floor_ms": medians[FLOOR + name]}
    return report


def format_where(report: dict) -> str:
    """The report as tables for people."""
    on, work, yardstick = (report[key] for key in ("machine", "workload", "yardstick"))
    height, width = work["size"]
    lines = [f"{on['device']}, {counted(on['threads'], 'thread')}, torch {on['torch']}; "
             f"{counted(work['batch'], 'image')} of {height} x {width} a step; medians of "
             f"{counted(work['rounds'], 'round')}, in brackets the middle half of them",
             *filter(None, [report["busy"]["warning"]]), ""]
    rows = [[yardstick["name"], shown(report["rounds_ms"][STEP + yardstick["name"]]), "1.000", *"-" * 4]]
    for name, entry in report["configs"].items():
        flops = sum(row["times"] * row["flops"] for row in entry["convolutions"])
        rows.append([name, shown(report["rounds_ms"][STEP + name]), f"{entry['step_ms'] / yardstick['step_ms']:.3f}",
                     shown(report["rounds_ms"][FLOOR + name]), f"{entry['floor_ms'] / yardstick['step_ms']:.3f}",
                     f"{entry['step_ms'] / entry['floor_ms']:.3f}", f"{flops / entry['floor_ms'] / 1e6:.0f}"])
    lines.append(text_table(["training step", "ms", "ratio", "floor ms", "floor's ratio", "step / floor",
                             "floor's GFLOP/s"], rows))
    lines += ["", "The floor is the convolutions of the step alone, each in its best memory layout."]
    for name, entry in report["configs"].items():
        lines += ["", f"== {name}", *entry["why"], "", *tables(entry)]
    return "\n".join(lines)


def tables(entry: dict) -> list[str]:
    """The tables of one configuration."""
    total = sum(sum(part.values()) for part in entry["parts"].values())
    rows = [[name, f"{part['forward']:.1f}", f"{part['backward']:.1f}", f"{sum(part.values()) / total:.1%}"]
            for name, part in entry["parts"].items()]
    found = [text_table(["part, profiled", "forward ms", "backward ms", "of the step"], rows), ""]
    rows = [[name, f"{row['calls']:.0f}", f"{row['ms']:.1f}", f"{row['ms'] / total:.1%}"]
            for name, row in entry["operators"].items()]
    found += [text_table(["operator, without those inside it", "calls", "ms", "of the step"], rows), ""]
    rows = [[row["what"], row["direction"], str(row["times"]), *(f"{row['ms'][layout]:.2f}" for layout in LAYOUTS),
             f"{row['flops'] / min(row['ms'].values()) / 1e6:.0f}"] for row in entry["convolutions"][:LISTED]]
    found.append(text_table(["convolution alone", "direction", "times", "ordinary ms", "channels_last ms", "GFLOP/s"],
                            rows))
    for key, title in (("kernels", "kernel of oneDNN"), ("reorders", "reorder of oneDNN")):
        if table := (entry.get("onednn") or {}).get(key):
            rows = [[name, str(row["calls"]), f"{row['ms']:.1f}"] for name, row in list(table.items())[:LISTED]]
            rows.append(["all of them", str(sum(row["calls"] for row in table.values())),
                         f"{sum(row['ms'] for row in table.values()):.1f}"])
            found += ["", text_table([title, "calls", "ms"], rows)]
    return found
