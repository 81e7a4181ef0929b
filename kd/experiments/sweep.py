"""Many training runs, one after another or several at once: resumed where they were stopped, then compared."""
import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.errors import counted
from data.output import naming
from models import ConfigError
from models.checkpoints.sources import is_address

from ..build import check_files
from ..config import Config, load_config, parse_config
from ..exceptions import Stopped, TrainingError, WorkDirError
from ..processes.signals import StopSignals
from ..work_dir.checkpoint import newest_checkpoint
from ..work_dir.lock import in_use
from ..work_dir.records import RunRecord, read_run, setting, teacher_entries

TRAIN = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
OUTPUT = "output.txt"  # in a run's work dir: everything that the run printed


@dataclass(eq=False)
class Job:
    """One run: a configuration with a seed, in its own work dir."""

    cfg: Path
    overrides: list[str]
    seed: int | None         # None: the configuration's own
    work_dir: Path
    config: Config
    waits: "Job | None" = None  # the run that trains its teacher
    title: str = ""          # its name, if it is not that of the configuration

    @property
    def name(self) -> str:
        if self.title:
            return self.title
        return self.cfg.stem if self.seed is None else f"{self.cfg.stem} seed {self.seed}"

    def record(self) -> RunRecord | None:
        """The record of the run so far, if there is one.

        Raises:
            WorkDirError: its work dir holds a run of another configuration.
        """
        metrics = self.work_dir / "metrics.jsonl"
        if not metrics.is_file() or not (self.work_dir / "run.json").is_file():
            return None
        run = read_run(self.work_dir, metrics)
        wanted = self.config.with_num_classes(run.config["model"]["head"].get("num_classes"))
        if setting(wanted) != setting(run.config) or (self.seed is not None and run.seed != self.seed):
            raise WorkDirError(f"{self.work_dir} holds a run of another configuration: give another --work-dir, or "
                               "remove it")
        return run

    def finished(self) -> bool:
        run = self.record()
        return run is not None and run.finished

    def command(self, device: str) -> list[str]:
        seed = [] if self.seed is None else [f"train.seed={self.seed}"]
        resume = ["--resume"] if newest_checkpoint(self.work_dir, missing_ok=True) else []
        return [sys.executable, str(TRAIN), "--cfg", str(self.cfg), "--work-dir", str(self.work_dir), "--device",
                device, *resume, *self.overrides, *seed]


def plan(cfgs: Sequence[Path], seeds: Sequence[int], work_dir: Path, overrides: Sequence[str] = (),
         teacher: Path | None = None) -> list[Job]:
    """The runs of a sweep, the teacher's first.

    Args:
        overrides: for all runs; those of `distill` only for configurations that distil, and only those of `data` for
            the teacher.
        teacher: a configuration that is trained once, before the others; each of `cfgs` that has this file as its
            `distill.teacher.cfg` uses the resulting checkpoint.
    Raises:
        ConfigError: a bad configuration, nothing to evaluate on, or a teacher's checkpoint that does not exist.
    """
    trained = None if teacher is None else teachers_job(teacher, work_dir, overrides)
    jobs = []
    for cfg in cfgs:
        distils = load_config(cfg).distill is not None
        own = [override for override in overrides if distils or not override.startswith("distill.")]
        uses = trained is not None and distils and is_teacher(load_config(cfg, own), teacher)
        if uses:
            own.append(f"distill.teacher.checkpoint={trained.work_dir / 'last.pth'}")
        config = load_config(cfg, own)
        if not uses:
            check_teachers(config, cfg)
        stem = cfg.stem if [other.stem for other in cfgs].count(cfg.stem) == 1 else f"{cfg.parent.name}_{cfg.stem}"
        jobs += [Job(cfg, own, seed, work_dir / stem / f"seed{seed}", config, trained if uses else None)
                 for seed in seeds]
    if trained is not None:
        if not any(job.waits for job in jobs):
            raise ConfigError("", f"--teacher {teacher}: no configuration has this file as its distill.teacher.cfg")
        jobs.insert(0, trained)
    for job in jobs:
        if job.config.data is None or job.config.data.val is None:
            raise ConfigError("data.val", f"missing in {job.cfg}: give the data on which the runs are compared")
    return jobs


def teachers_job(teacher: Path, work_dir: Path, overrides: Sequence[str]) -> Job:
    """The run that trains a teacher, with those overrides that are of `data`."""
    own = [override for override in overrides if override.startswith("data.")]
    return Job(teacher, own, None, work_dir / teacher.stem, load_config(teacher, own))


def check_plan(cfgs: Sequence[Path], overrides: Sequence[str], teacher: Path | None) -> None:
    """Raise what `plan` raises, and an error for a file of data, teachers or `train.init` that does not exist."""
    for job in plan(cfgs, [0], Path(), overrides, teacher):
        check_files(without_checkpoints(job.config) if job.waits else job.config, ("train", "val", "init"))


def without_checkpoints(config: Config) -> Config:
    """The same configuration, whose teachers have no weights: a check does not need those that are to be trained."""
    tree = copy.deepcopy(dict(config))
    for entry in teacher_entries(tree):
        entry["checkpoint"] = None
    return parse_config(tree)


def is_teacher(config: Config, teacher: Path) -> bool:
    """Whether a configuration has one teacher, which this configuration file describes."""
    said = [entry.cfg for entry in config.teachers]
    project = TRAIN.parents[1]  # the file is looked up there, too
    return len(said) == 1 and said[0] is not None and teacher.resolve() in (
        Path(said[0]).resolve(), (project / said[0]).resolve())


def check_teachers(config: Config, cfg: Path) -> None:
    for entry in config.teachers:
        checkpoint = entry.source
        if checkpoint is not None and not is_address(checkpoint) and not Path(checkpoint).is_file():
            raise ConfigError("distill.teacher.checkpoint", f"{checkpoint} does not exist ({cfg}): train it first, or "
                                                            "give its configuration with --teacher")


def run_jobs(jobs: Sequence[Job], at_once: int, device: str, say: Callable[[str], None] = print) -> None:
    """Run the unfinished jobs, each in its own process and up to `at_once` at a time, on the GPUs in turn.

    A job in whose work dir another process is at work waits until that one ends.

    Raises:
        TrainingError: a run has failed; the other runs were still made.
        Stopped: SIGINT or SIGTERM, after the runs have saved.
        WorkDirError: a work dir holds another run.
    """
    done = {job for job in jobs if job.finished()}
    pending = [job for job in jobs if job not in done]
    if done:
        say(f"{len(done)} of {counted(len(jobs), 'run is', 'runs are')} finished already")
    count, failed, waiting, told = len(pending), set(), set(), False
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}  # by slot
    with StopSignals() as signals:
        try:
            while (pending and not signals.asked) or running:
                for job in [job for job in pending if job.waits in failed]:
                    failed.add(job)
                    pending.remove(job)
                    say(f"{job.name}: not run, because its teacher is not trained")
                ready = [job for job in pending if (job.waits is None or job.waits in done)
                         and not occupied(job, waiting, say)]
                free = [slot for slot in range(at_once) if slot not in running]
                for slot, job in zip(free, [] if signals.asked else ready):
                    pending.remove(job)
                    if job in waiting and job.finished():
                        done.add(job)
                        continue
                    say(f"[{count - len(pending)}/{count}] {job.name}: into {job.work_dir}")
                    running[slot] = job, start(job, slot, at_once, device), time.monotonic()
                if signals.asked and not told:  # once: a second signal would end a run without saving
                    told = True
                    for _, process, _ in running.values():
                        process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
                for slot, (job, process, begun) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        if process.returncode and occupied(job, waiting, say):  # another process was faster
                            pending.append(job)
                            continue
                        right = report(job, process.returncode, time.monotonic() - begun, say, told)
                        (done if right else failed).add(job)
                time.sleep(0.1)
        finally:
            for _, process, _ in running.values():
                process.kill()
    if signals.asked:
        raise Stopped(signals.asked, "stopped; the same command goes on from there")
    if failed:
        names = ", ".join(job.name for job in jobs if job in failed)
        raise TrainingError(f"{len(failed)} of {counted(len(jobs), 'run')} failed ({names}): see {OUTPUT} in the work "
                            "dirs; the same command tries "
                            "them again")


def occupied(job: Job, known: set[Job], say: Callable[[str], None]) -> bool:
    """Whether another process is at work in a job's work dir; it is told once, and the job is then `known`."""
    if not in_use(job.work_dir):
        return False
    if job not in known:
        known.add(job)
        say(f"{job.name}: another process is at work in {job.work_dir}: waiting for it")
    return True


def start(job: Job, slot: int, at_once: int, device: str) -> subprocess.Popen:
    """Start a run in its own session, on Windows its own process group, so that Ctrl-C does not reach it directly."""
    threads = max(1, len(os.sched_getaffinity(0)) // at_once) if hasattr(os, "sched_getaffinity") else 1
    env = {"OMP_NUM_THREADS": str(threads)} | os.environ
    env.setdefault("MKL_NUM_THREADS", env["OMP_NUM_THREADS"])
    if device == "cuda" and at_once > 1:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        env |= {"CUDA_VISIBLE_DEVICES": gpus.split(",")[slot % len(gpus.split(","))]}
    with naming(job.work_dir / OUTPUT), open(job.work_dir / OUTPUT, "a", encoding="utf-8") as output:
        return subprocess.Popen(job.command(device), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env,
                                start_new_session=True,
                                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))


def report(job: Job, code: int, seconds: float, say: Callable[[str], None], stopping: bool) -> bool:
    """Print how a run ended; returns whether it succeeded."""
    if stopping and code:
        say(f"{job.name}: stopped")
        return False
    if code == 0 and job.finished():
        ap = job.record().evaluations[-1]["AP"]
        say(f"{job.name}: AP {'-' if ap is None else f'{100 * ap:.1f}'} after {seconds / 60:.1f} minutes")
        return True
    lines = (job.work_dir / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    say(f"{job.name}: failed with exit code {code}: {lines[-1] if lines else 'it printed nothing'}")
    return False
