"""Everything that is to be checked and measured on a GPU, part by part; `parts` lists it in order."""
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from data.errors import DataError, counted
from data.output import write_text

from ...checks import check_files
from ...config import load_config
from ...engine.train import train
from ...exceptions import Incomplete, Stopped
from ...processes.timing import interleave, medians_ms
from ..run import format_report, names, run_benchmark
from ..timing import machine, matmul_call
from ..workload import CONFIGS, GPU_PARTS, Workload
from .parity import compare_precision, with_methods
from .table import format_gpu
from .variants import VARIANTS, count_synchronisations, has_teachers, time_feed, time_variant

ROOT = Path(__file__).resolve().parents[3]
PARITY = ("configs/crosskd/crosskd_r18_gfl_r50_1x.yaml", "configs/crosskd/crosskd_r18_retinanet_r50_1x.yaml",
          "configs/crosskd/crosskd_r50_atss_r101_1x.yaml", "configs/crosskd/crosskd_r50_fcos_r101_ms_2x.yaml")
TRAINING = "configs/bccd/student_gfl_r18w16.yaml"  # docs/results/ has its AP on a CPU
TEST_SECONDS = 240  # the most that the tests may take


class LeftOut(Exception):
    """A part that cannot run here. The message is the reason."""


@dataclass
class Job:
    """What is measured where."""

    device: torch.device
    work: Workload
    configs: Sequence[str] = CONFIGS    # whose steps are timed
    parity: Sequence[str] = PARITY      # whose losses are compared in several precisions
    training: str = TRAINING
    overrides: Sequence[str] = field(default_factory=list)  # of `training`
    matmul_side: int = 8192


@dataclass
class Part:
    """One part: its work, and about how many seconds it takes on a GPU."""

    call: Callable[[], dict]
    seconds: int
    needs_cuda: bool = False


def parts(job: Job) -> dict[str, Part]:
    """All parts by name, in order: what matters most comes first, and what compiles comes last."""
    device, work = job.device, job.work
    found = {"tests": Part(run_tests, 100, needs_cuda=True),
             "matmul": Part(lambda: measure_matmul(job), 5)}
    for name, path in zip(names(job.configs), job.configs):
        for amp in ("none", "bf16"):
            found[f"synchronisations/{name}/{amp}"] = Part(
                lambda p=path, a=amp: count_synchronisations(p, a, device), 10, needs_cuda=True)
    for name, path in zip(names(job.parity), job.parity):
        for amp in ("bf16", "fp16"):
            found[f"parity/{name}/{amp}"] = Part(lambda p=path, a=amp: check_parity(job, p, a), 15)
    for variant, how in VARIANTS.items():
        for name, path in zip(names(job.configs), job.configs):
            if not how.compiled and (not how.beside or has_teachers(path)):
                found[f"step/{name}/{variant}"] = Part(lambda p=path, h=how: time_variant(p, h, work, device), 15,
                                                       how.needs_cuda)
    for name, path in list(zip(names(job.configs), job.configs))[-1:]:
        found[f"feed/{name}"] = Part(lambda p=path: time_feed(p, work, device), 20, needs_cuda=True)
    found["training"] = Part(lambda: measure_training(job), 150)
    found["benchmark"] = Part(lambda: measure_all(job), 120)
    for variant, how in VARIANTS.items():
        for name, path in reversed(list(zip(names(job.configs), job.configs))):  # distilled ones first
            if how.compiled:
                found[f"step/{name}/{variant}"] = Part(lambda p=path, h=how: time_variant(p, h, work, device), 100,
                                                       how.needs_cuda)
    return found


def run_gpu(job: Job, folder: Path, minutes: float, only: Sequence[str] = GPU_PARTS,
            note: Callable[[str], None] = lambda text: None) -> tuple[dict, Path]:
    """Run all parts that `folder` has no result of, from this commit, and write each result as soon as it is there.

    Args:
        folder: gets `<device>.json` and `<device>.md`.
        minutes: a part for which too little of this time is left does not start.
        only: the kinds of parts that run.
        note: called with a line on what is being done.
    Returns:
        The report, and the path of the JSON file. A part's `status` is done, failed (with `error`) or left out (with
        `reason`).
    Raises:
        Incomplete: the GPU cannot be used any more after a part that failed.
    """
    started, here = time.monotonic(), machine(job.device)
    path = folder / f"{re.sub(r'[^a-z0-9]+', '_', here['device'].lower()).strip('_')}.json"
    report = read_report(path)
    report |= {"machine": here, "workload": asdict(job.work)}
    listed = parts(job)
    for name, part in listed.items():
        if name.partition("/")[0] not in only:
            continue
        before = report["parts"].get(name, {})
        if before.get("status") == "done" and before.get("commit") == here["commit"]:
            continue
        left = 60 * minutes - (time.monotonic() - started)
        note(f"{name}, {left / 60:.1f} minutes left")
        report["parts"][name] = entry = run_part(part, left, job.device) | {"commit": here["commit"]}
        report["parts"] = {key: report["parts"][key] for key in listed if key in report["parts"]}
        write_text(path, json.dumps(report, indent=1))
        write_text(path.with_suffix(".md"), format_gpu(report) + "\n")
        if entry["status"] != "done":
            note(f"{name}: {entry['status']}: {entry.get('error') or entry['reason']}")
        if entry["status"] == "failed" and not usable(job.device):
            raise Incomplete(f"after {name} failed, this process cannot use the GPU any more: {path} has the parts so "
                             "far, and the same command goes on with the others")
    return report, path


def read_report(path: Path) -> dict:
    """The report of an earlier call, or an empty one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found["parts"], dict) else {"parts": {}}
    except (OSError, ValueError, KeyError, TypeError):
        return {"parts": {}}


def run_part(part: Part, left: float, device: torch.device) -> dict:
    """A part's entry in the report."""
    if part.needs_cuda and device.type != "cuda":
        return {"status": "left out", "reason": "needs CUDA"}
    if device.type == "cuda" and left < part.seconds:
        return {"status": "left out", "reason": f"{max(0, left):.0f} seconds are left of --minutes, and it takes about "
                                                f"{part.seconds}"}
    started = time.monotonic()
    try:
        found = {"status": "done", "result": part.call()}
    except LeftOut as reason:
        found = {"status": "left out", "reason": str(reason)}
    except Stopped:
        raise
    except Exception as error:  # the other parts are to run
        found = {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if device.type == "cuda" and usable(device):
        torch.cuda.empty_cache()
    return found | {"seconds": time.monotonic() - started}


def usable(device: torch.device) -> bool:
    """Whether the device still works: after some errors, CUDA refuses everything in this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def run_tests() -> dict:
    """The tests that need a GPU, in a process of their own."""
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py")
                   if "pytest.mark.gpu" in path.read_text(encoding="utf-8"))
    if not files:
        raise LeftOut(f"there are no tests in {ROOT / 'tests'}")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rfE", *files],
                          cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS)
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        raise RuntimeError("; ".join([lines[-1], *bad[:5]]))
    return {"summary": lines[-1].strip("= ")}


def measure_matmul(job: Job) -> dict:
    """Floating-point operations per second of large products of bf16 matrices."""
    call, products = matmul_call(job.device, job.matmul_side)
    ms = medians_ms(interleave({"matmul": call}, job.work.rounds, job.work.warmup))["matmul"]
    return {"flops_per_second": products / ms * 1e3}


def check_parity(job: Job, path: str, amp: str) -> dict:
    """Losses and gradients in mixed precision, of a CrossKD configuration with FGD, and with LD for GFL.

    Raises:
        RuntimeError: they are further from those in float32 than they may be.
    """
    cfg = load_config(path, ["model.backbone.norm_eval=false", "distill.eval_teacher=false"])
    more = [{"type": "FGD"}] + [{"type": "LD"}] * (cfg.model.head["type"] == "GFLHead")
    work = Workload(job.work.size, min(2, job.work.batch), classes=job.work.classes)
    found = compare_precision(with_methods(cfg, *more), work, job.device, amp)
    if not found["within"]:
        raise RuntimeError(f"differences from float32 are larger than {found['bounds']}: losses {found['losses']}, "
                           f"gradient {found['gradient']:.3g}")
    return found


def measure_all(job: Job) -> dict:
    """The whole benchmark in bf16, with inference, all parts of a step, reading images, and the evaluation."""
    work = Workload(**asdict(job.work) | {"amp": "bf16", "rounds": min(3, job.work.rounds), "warmup": 1})
    report = run_benchmark(job.configs, job.device, work)
    return {"report": report, "text": format_report(report)}


def measure_training(job: Job) -> dict:
    """A whole training run on real data, with its AP."""
    cfg = load_config(job.training, job.overrides)
    try:
        check_files(cfg, ["train", "val"])
    except DataError as error:
        raise LeftOut(str(error)) from None
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        figures = train(cfg, Path(folder), job.device)
    return {"configuration": job.training, "overrides": list(job.overrides), "epochs": cfg.train.epochs,
            "AP": figures["AP"], "AP50": figures["AP50"], "minutes": (time.monotonic() - started) / 60}


def failures(report: dict) -> str | None:
    """The parts that failed, in words; None if there are none."""
    bad = [name for name, entry in report["parts"].items() if entry["status"] == "failed"]
    return f"{counted(len(bad), 'part')} failed: {', '.join(bad)}" if bad else None
