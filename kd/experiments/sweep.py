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

from ..checks import check_files
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


def run_jobs(jobs: Sequence[Job], at_once: int, device: str, say: Callable[[str], None] = print,
             after: Callable[[Job, bool], Sequence[Job]] | None = None) -> None:
    """Run the unfinished jobs, each in its own process and up to `at_once` at a time, on the GPUs in turn.

    A job in whose work dir another process is at work waits until that one ends.

    Args:
        after: is called with each job that has ended, and with whether it succeeded; returns jobs to run, too.
    Raises:
        TrainingError: a run has failed; the other runs were still made.
        Stopped: SIGINT or SIGTERM, after the runs have saved.
        WorkDirError: a work dir holds another run.
    """
    queue = Queue(jobs, at_once, device, say, after)
    with StopSignals() as signals:
        try:
            while (queue.pending and not signals.asked) or queue.running:
                if signals.asked:
                    queue.stop()
                else:
                    queue.start_ready()
                queue.collect()
                time.sleep(0.1)
        finally:
            for _, process, _ in queue.running.values():
                process.kill()
    if signals.asked:
        raise Stopped(signals.asked, "stopped; the same command goes on from there")
    if queue.failed:
        raise TrainingError(f"{len(queue.failed)} of {counted(len(jobs), 'run')} failed "
                            f"({', '.join(job.name for job in queue.failed)}): see {OUTPUT} in the work dirs; the same "
                            "command tries them again")


class Queue:
    """Jobs that wait, run, or have ended; arguments as of `run_jobs`."""

    def __init__(self, jobs: Sequence[Job], at_once: int, device: str, say: Callable[[str], None],
                 after: Callable[[Job, bool], Sequence[Job]] | None):
        self.done = {job for job in jobs if job.finished()}
        self.pending = [job for job in jobs if job not in self.done]
        self.failed, self.waiting, self.stopping = [], set(), False
        self.running: dict[int, tuple[Job, subprocess.Popen, float]] = {}  # by slot
        self.started, self.count = 0, len(self.pending)
        self.device, self.say, self.after = device, say, after
        self.at_once = at_once if after else max(1, min(at_once, len(self.pending)))  # the others leave no core idle
        if self.done:
            say(f"{len(self.done)} of {counted(len(jobs), 'run is', 'runs are')} finished already")
        for job in jobs:
            if job in self.done:
                self.go_on(job, True)

    def go_on(self, job: Job, right: bool) -> None:
        """Take what follows a job that has ended."""
        self.pending += self.after(job, right) if self.after else ()

    def start_ready(self) -> None:
        """Start jobs in the free slots."""
        for job in [job for job in self.pending if job.waits in self.failed]:
            self.pending.remove(job)
            self.failed.append(job)
            self.say(f"{job.name}: not run, because its teacher is not trained")
            self.go_on(job, False)
        ready = [job for job in self.pending
                 if (job.waits is None or job.waits in self.done) and not self.occupied(job)]
        for slot, job in zip([slot for slot in range(self.at_once) if slot not in self.running], ready):
            self.pending.remove(job)
            if job.finished():  # another process has made it, or it came with `after`
                self.done.add(job)
                self.go_on(job, True)
                continue
            self.started += 1
            left = f"/{self.count}" if self.after is None else ""
            self.say(f"[{self.started}{left}] {job.name}: into {job.work_dir}")
            self.running[slot] = job, start(job, slot, self.at_once, self.device), time.monotonic()

    def collect(self) -> None:
        """Take out the runs that have ended."""
        for slot, (job, process, begun) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[slot]
            if process.returncode and not self.stopping and self.occupied(job):  # another process was faster
                self.pending.append(job)
                continue
            right = report(job, process.returncode, time.monotonic() - begun, self.say, self.stopping)
            self.done.add(job) if right else self.failed.append(job)
            if not self.stopping:
                self.go_on(job, right)

    def stop(self) -> None:
        """Ask the runs to save and stop, once: a second signal would end a run without saving."""
        for _, process, _ in () if self.stopping else self.running.values():
            process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
        self.stopping = True

    def occupied(self, job: Job) -> bool:
        """Whether another process is at work in a job's work dir; this is told once."""
        if not in_use(job.work_dir):
            return False
        if job not in self.waiting:
            self.waiting.add(job)
            self.say(f"{job.name}: another process is at work in {job.work_dir}: waiting for it")
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
