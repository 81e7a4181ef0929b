"""The kernels that oneDNN chooses for a training step on a CPU, and its reorders (copies into another memory format).

oneDNN prints them on the standard output of its process, so the step runs in a process of its own.
"""
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from ...config import Config, parse_config
from ...engine.layout import Layout
from ..steps import build_subject, make_batch, training_step
from ..workload import Workload

LINE = re.compile(r"onednn_verbose(?:,v\d+)?,primitive,exec,cpu,(.*)")
MEMORY = re.compile(r"(src|dst):[^:]*:[^:]*:[^:]*:([^:]*):")  # src:f32::blocked:acdb::f0
BACKWARD = {"backward_data": "gradient of input", "backward_weights": "gradient of weight"}
SECONDS = 600  # after which the process is given up


def run_in_process(cfg: Config, work: Workload, layout: Layout) -> dict | None:
    """`summarise` for one step of a configuration; None if oneDNN is not there or the process fails.

    Args:
        cfg: prepared, see `prepare`.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    root = str(Path(__file__).resolve().parents[3])
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()),
                        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    given = json.dumps({"cfg": cfg, "work": asdict(work), "layout": asdict(layout)})
    try:
        done = subprocess.run([sys.executable, "-m", __spec__.name], input=given, env=env, capture_output=True,
                              text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return summarise(done.stdout) if done.returncode == 0 else None


def summarise(text: str) -> dict:
    """What oneDNN's lines say.

    Returns:
        `kernels` by name and direction, and `reorders` by the two formats: `calls` and `ms` each, longest first.
    """
    kernels, reorders = {}, {}
    for line in text.splitlines():
        found = LINE.fullmatch(line.strip())
        fields = found[1].split(",") if found else []
        if len(fields) < 7:
            continue
        kind, implementation, direction, memory, ms = *fields[:4], fields[-1]
        if kind == "reorder":
            formats = dict(MEMORY.findall(memory))
            key, table = f"{formats.get('src', '?')} to {formats.get('dst', '?')}", reorders
        else:
            key, table = f"{kind} {implementation}, {BACKWARD.get(direction, 'forward')}", kernels
        entry = table.setdefault(key, Counter())
        entry["calls"] += 1
        entry["ms"] += float(ms)
    return {name: {key: dict(entry) for key, entry in sorted(table.items(), key=lambda item: -item[1]["ms"])}
            for name, table in (("kernels", kernels), ("reorders", reorders))}


def main() -> None:
    """Run a step of what is described on the standard input, and let oneDNN print."""
    given, device = json.load(sys.stdin), torch.device("cpu")
    work = Workload(**given["work"] | {"size": tuple(given["work"]["size"])})
    cfg = parse_config(given["cfg"])
    torch.manual_seed(0)
    step = training_step(build_subject(cfg, device, work, {"layout": given["layout"]}),
                         *make_batch(work, device, cfg.model.head["num_classes"]))
    step()  # without the set-up of the first step
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        step()


if __name__ == "__main__":
    main()
