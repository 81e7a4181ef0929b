"""The time and memory of a run, and of the same run without distillation: a few steps of both, one after the other."""
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from statistics import mean, median

import torch
from torch import Tensor, nn

from models.targets import count_labelled

from ...inference.precision import autocast
from ...optim import build_optimizer
from ...processes import distributed
from ...processes.memory import peak_memory
from ...processes.timing import synchronize
from ..average import WeightAverage
from ..clock import PartsClock
from ..finite import FiniteWatch
from ..run import Run
from ..train import in_parallel, in_runs, train_step

GROUPS = 3     # batches whose steps are timed, or one step if it takes more batches than that
ROUNDS = 3     # times that each of these steps is timed; fewer, but one, after `ENOUGH` seconds
ENOUGH = 20.0
LATE = 10 ** 6  # measurements after which there are no early ones any more
LONGEST = 20.0  # seconds of loading after which no more batches are loaded to be timed

Group = list[tuple[Tensor, list[dict]]]  # the batches of an optimiser step


@dataclass
class Cost:
    """What a step takes on this process."""

    step: float          # seconds, without loading
    memory: int | None   # bytes at the peak, see `peak_memory`


@dataclass
class Costs:
    """The costs of a run."""

    run: Cost
    alone: Cost | None     # of the student without teachers and methods
    loading: float | None  # seconds until the loader has the batches of one step; None if there are too few to time
    image: float | None    # seconds to detect on an image; None without data.val
    images: int            # of a step in this process
    steps: int             # of the whole run
    evaluated: int         # images of data.val that one process sees in all evaluations
    workers: int
    busy: bool             # whether other programs use the processors, too

    def training(self, cost: Cost) -> float:
        """Seconds of all steps. The loader's workers load while a step runs; without them, a step waits for it."""
        loading = self.loading or 0.0
        return self.steps * (max(cost.step, loading) if self.workers else cost.step + loading)

    @property
    def evaluation(self) -> float:
        """Seconds of all evaluations, without loading and the computation of AP."""
        return self.evaluated * (self.image or 0.0)


def draw(run: Run) -> tuple[list[Group], float | None]:
    """The batches of the first steps, and the seconds that the loader takes for those of one step.

    After the first ones, as many are drawn as its workers have begun in the meantime, so that the time is the loader's.
    """
    accumulate, begun = run.cfg.train.accumulate, 2 * run.cfg.data.workers
    count = max(1, GROUPS // accumulate)
    kept, times, start = [], [], time.perf_counter()
    for group in islice(in_runs(run.train_loader, accumulate), max(count, 1 + -(-begun // accumulate))):
        times.append(time.perf_counter())
        kept += [group] if len(kept) < count else []
        if len(kept) == count and times[-1] - start > LONGEST:  # as many are kept in all processes
            break
    return kept, (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def measure_costs(run: Run, groups: list[Group], loading: float | None) -> tuple[Costs, dict[str, Tensor], list[str]]:
    """The costs of a run, the losses of its first step, and lines about the weights that `gradient_share` measures.

    Peak memory of the CPU never falls, so the student alone, which needs less, is the first. The steps train the
    student, see `put_back`.
    """
    busy = is_busy()
    runs = [copy_of(run)] if run.distiller is None else [alone(run), copy_of(run)]
    shown = [groups] if run.distiller is None else [[labelled(group) for group in groups], groups]
    models, memory, first = [in_parallel(each) for each in runs], [], []
    for each, model, own in zip(runs, models, shown):
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        # The first steps are slower: they set up what later ones use.
        first = [train_step(each, model, group)[0] for group in own]
        synchronize()
        memory.append(peak_memory(run.device))
    lines = measure_seldom(run) if run.distiller else []
    seconds = time_in_turn(runs, models, shown)
    found = [Cost(*pair) for pair in zip(seconds, memory)]
    if run.distiller and found[0].memory is not None:  # what the student alone would not hold
        found[0].memory -= held(run)
    epochs = range(run.cfg.train.epochs)
    images = 0 if run.val_loader is None else len(run.val_loader.dataset) / distributed.world_size()
    costs = Costs(found[-1], found[0] if run.distiller else None, loading, None,
                  sum(len(shown) for shown, _ in groups[0]), len(epochs) * run.steps_per_epoch,
                  round(sum(map(run.evaluates, epochs)) * images), run.cfg.data.workers, busy)
    return costs, first[0], lines


def labelled(group: Group) -> Group:
    """The batches without unlabelled images."""
    counts = [count_labelled(targets) for _, targets in group]
    return [(images[:count], targets[:count]) for (images, targets), count in zip(group, counts)]


def measure_seldom(run: Run) -> list[str]:
    """Let weights be measured as seldom as late in a run; lines about those that have been measured."""
    shares = run.distiller.gradient_shares
    shares.times = [LATE] * len(shares.times)
    return shares.describe()


def time_in_turn(runs: list[Run], models: list[nn.Module], shown: list[list[Group]]) -> list[float]:
    """Seconds of a step of each run: the mean over its groups of the median over the rounds."""
    seconds, start = [[[] for _ in groups] for groups in shown], time.perf_counter()
    for _ in range(ROUNDS):
        for place in range(len(shown[0])):
            for each, model, groups, times in zip(runs, models, shown, seconds):
                synchronize()
                before = time.perf_counter()
                train_step(each, model, groups[place])
                synchronize()
                times[place].append(time.perf_counter() - before)
        if distributed.from_first(time.perf_counter() - start > ENOUGH):  # all processes stop together
            break
    return [mean(median(times) for times in of_run) for of_run in seconds]


def copy_of(run: Run, **changes: object) -> Run:
    """The run with a count of steps, a clock and a watch of its own."""
    return replace(run, clock=PartsClock(run.device), finite=FiniteWatch(run.device), overflows=0, **changes)


def alone(run: Run) -> Run:
    """The run without teachers and methods: the same student, with its own optimiser."""
    images = run.cfg.data.batch_size * distributed.world_size() * run.cfg.train.accumulate
    return copy_of(run, model=run.student, optimizer=build_optimizer(run.cfg.optimizer, run.student, images),
                   scaler=torch.amp.GradScaler(run.device.type, enabled=run.scaler.is_enabled()),
                   average=None if run.average is None else WeightAverage(run.student, run.cfg.train.ema))


def held(run: Run) -> int:
    """Bytes of the teachers' and methods' weights in this process."""
    modules = [*(teacher for teacher in run.distiller.teachers if not teacher.sharded), run.distiller.methods]
    return sum(x.numel() * x.element_size() for module in modules for x in (*module.parameters(), *module.buffers()))


@contextmanager
def put_back(run: Run) -> Iterator[None]:
    """At its end, the weights, what `gradient_share` measures, and the schedules of the methods are what they were at
    its start."""
    shares = run.distiller.gradient_shares if run.distiller else None
    counts = (shares.times, shares.last) if shares else ()
    progress = (run.distiller.step, run.distiller.epoch, run.distiller.epochs) if shares else ()
    modules = [run.student, *([run.distiller.methods, shares] if shares else []),
               *([] if run.average is None else [run.average.module])]
    if shares:
        shares.times, shares.last = map(list, counts)
    before = [[(x, x.detach().cpu().clone()) for x in (*module.parameters(), *module.buffers())] for module in modules]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, value in (pair for pairs in before for pair in pairs):
                x.copy_(value)
        if shares:
            shares.times, shares.last = counts
            run.distiller.step, run.distiller.epoch, run.distiller.epochs = progress


@torch.no_grad()
def time_detection(run: Run) -> tuple[int, int, float] | None:
    """Detect on one batch of data.val, twice: detections, images, and the seconds per image of the second time. None
    in a process that gets no images because there are so few, and without data.val."""
    shown = None if run.val_loader is None else next(iter(run.val_loader), None)
    if shown is None:
        return None
    detector = run.evaluated_model
    was_training = detector.training
    detector.eval()
    for _ in range(2):
        before = time.perf_counter()
        images = detector.preprocess(shown[0].to(run.device), shown[1])
        with autocast(run.device, run.cfg.train.amp):
            found = detector.predict(images, shown[1])
        synchronize()
        seconds = time.perf_counter() - before
    detector.train(was_training)
    return sum(len(each["boxes"]) for each in found), len(found), seconds / len(found)


def is_busy() -> bool:
    """Whether more programs ask for the processors than there are; False where the system does not tell."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
