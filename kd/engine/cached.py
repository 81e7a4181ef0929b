"""The teachers' caches (`distill.cache`) in a training run: what they need, reading ahead, and reports."""
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from data.errors import counted
from data.tables import percent

from ..cache.expected import expect
from ..cache.store import others
from ..inference.precision import autocast
from ..processes import distributed
from .run import Run, stored_views

Batches = list[tuple[Tensor, list[dict]]]
log = logging.getLogger("densekd")


def in_units(number: float) -> str:
    """Bytes for people: `1.5 MiB`."""
    units = {40: "TiB", 30: "GiB", 20: "MiB", 10: "KiB"}
    power, unit = next(((power, unit) for power, unit in units.items() if number >= 2 ** power), (10, "KiB"))
    return f"{number / 2 ** power:.1f} {unit}"


def describe_caches(run: Run) -> list[str]:
    """Lines on the room that the caches of a run will need, and on how often the teachers will still run."""
    lines, data, epochs = [], run.cfg.data, run.cfg.train.epochs
    for name, cache in named_caches(run):
        dataset = run.train_loader.dataset
        found = expect(run.train_loader.batch_sampler, dataset.eval_sizes(), data.flip, epochs, stored_views(run.cfg))
        with autocast(run.device, run.cfg.train.amp):
            size = cache.entry_size(found.common, data.batch_size)
        total = size * found.pixels / (found.common[0] * found.common[1])
        free = shutil.disk_usage(nearest_folder(cache.root)).free
        more = " with labels, and more for those without" if dataset.unlabelled else ""
        lines.append(f"{name}: its answers are kept in {cache.root}, {in_units(size)} for an image of "
                     f"{found.common[0]} x {found.common[1]}, about {in_units(total)} for "
                     f"{counted(found.entries, 'view')} (flips and paddings) of {counted(len(dataset), 'image')}{more}"
                     f"; {in_units(free)} are free there")
        lines.append(f"{name}: if nothing is stored yet, it runs about {percent(found.computed)} as often in "
                     f"{counted(epochs, 'epoch')} as without distill.cache")
        if total > free:
            lines.append(f"WARNING: {cache.root} has too little room for all answers: make room, give another "
                         "distill.cache.dir, or set distill.cache.precision to fp16")
    return lines


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def named_caches(run: Run) -> list[tuple[str, object]]:
    """The run's caches, with names for messages."""
    caches = run.distiller.caches if run.distiller else []
    return [("teacher" if len(caches) == 1 else f"teacher {i}", cache) for i, cache in enumerate(caches)]


def open_caches(run: Run) -> None:
    """Open the folders of a run's caches, and log which folders beside them are not used, and why.

    Raises:
        OutputError: a folder cannot be written.
    """
    caches = named_caches(run)
    notes = [line for _, cache in caches for line in cache.open()]
    own = {cache.fingerprint for _, cache in caches}
    for name, cache in caches:
        stored = count_entries(cache.store.folder)
        log.info("%s: answers are in %s, %s so far", name, cache.store.folder, counted(stored, "entry", "entries"))
    if caches:  # they are all in one folder
        notes += others(caches[0][1].root, caches[0][1].settings, own)
    for note in dict.fromkeys(notes):
        log.info(note)


def count_entries(folder: Path) -> int:
    """The number of entries in a cache's folder."""
    return sum(entry.name.endswith(".bin") for inner in os.scandir(folder) if inner.is_dir()
               for entry in os.scandir(inner.path))


def ahead(run: Run, steps: Iterable[Batches]) -> Iterator[Batches]:
    """The batches of each step; while a step runs, the answers for the next one are read."""
    caches, upcoming = named_caches(run), None
    if not caches:
        yield from steps
        return
    for number, batches in enumerate(steps, start=run.step):
        for _, targets in batches:
            run.distiller.read_ahead(targets, number, run.steps_per_epoch)
        if upcoming is not None:
            yield upcoming
        upcoming = batches
    if upcoming is not None:
        yield upcoming


def report_caches(run: Run, epoch: int) -> None:
    """At the end of an epoch, wait until all answers are written, and log how many were computed and read."""
    for name, cache in named_caches(run):
        cache.finish()
        parts = distributed.gather([(cache.computed, cache.read, cache.store.entries, cache.store.size)])
        computed, read, entries, size = map(sum, zip(*parts))
        written = f", {in_units(size)} written, {in_units(size / entries)} for an image" if entries else ""
        log.info("epoch %d: the %s has answered for %s so far, and %s were read%s", epoch + 1, name,
                 counted(computed, "image"), counted(read, "answer"), written)


def keep_nothing(run: Run) -> None:
    """Let the run's caches read only."""
    for _, cache in named_caches(run):
        cache.writes = False


