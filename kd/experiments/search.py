"""A search for the settings that distil best: chosen on data.val, then judged on fresh seeds and, once, on other data.

Everything that a search has decided is in `search.json` of its work dir, and every run has a work dir of its own below
it. So the same command continues a search at any time, and comes to the same winner.
"""
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.errors import counted, listed
from data.output import write_text
from models import ConfigError

from ..build import build_model
from ..config import Config, parse_config
from ..config.hints import with_defaults
from ..config.resume import changes
from ..evaluation.evaluate import evaluate_checkpoint
from ..exceptions import TrainingError, WorkDirError
from ..inference.detectors import annotated_classes
from ..work_dir.records import read_json, setting
from .halving import Rung, cost, lengths, plan_rungs, ranked, shortened
from .space import Base, SearchConfig, as_overrides, candidates, read_search, read_tree, variants, with_settings_of
from .sweep import Job, plan, run_jobs, without_checkpoints

STATE = "search.json"


@dataclass
class Search:
    """A search in its work dir."""

    path: Path            # its file
    base: Base
    config: SearchConfig
    work_dir: Path
    at_once: int
    device: str
    teacher: Job | None   # the run that trains the teacher
    say: Callable[[str], None]
    state: dict = field(default_factory=dict)  # what is decided, as in search.json

    @property
    def epochs(self) -> int:
        """The full length."""
        return self.base.config.train.epochs

    @property
    def rivals(self) -> list[str]:
        """What the winner is compared with: `alone` and `base`, if they can be different."""
        if self.config.against is not None:
            return list(dict.fromkeys(self.config.against))
        distils = [key.partition(".")[0] == "distill" for key in self.config.space]
        return ["base"] if self.base.config.distill is None and len(set(distils)) == 1 else ["alone", "base"]

    @property
    def final_runs(self) -> int:
        """Runs of full length on fresh seeds."""
        return (1 + len(self.rivals)) * len(self.config.seeds)

    def job(self, title: str, folder: str, settings: dict, seed: int, more: Sequence[str] = ()) -> Job:
        """A run with these settings in a folder of the work dir."""
        own = [*self.base.overrides, *as_overrides(settings), *more]
        return Job(self.base.cfg, own, seed, self.work_dir / folder, self.base.with_settings(settings, more),
                   self.teacher, title)

    def short_job(self, number: int, settings: dict, epochs: int, name: str | None = None) -> Job:
        """A run of a candidate, in a folder of its number or of another name.

        Only the base configuration, which is number 0, shows what the teacher can: that takes time.
        """
        more = shortened(self.base.with_settings(settings), epochs)
        more += ["train.check_images=0"] if number else []
        name = name or f"c{number:03d}"
        return self.job(f"{name}, {counted(epochs, 'epoch')}", f"{name}/epochs{epochs}", settings, self.config.seed,
                        more)

    def run(self, jobs: Sequence[Job]) -> None:
        """Run them, after the teacher's; raises as `run_jobs`."""
        run_jobs([*([self.teacher] if self.teacher else []), *jobs], self.at_once, self.device, self.say)

    def save(self) -> None:
        write_text(self.work_dir / STATE, json.dumps(self.state, indent=1) + "\n")


def open_search(cfg: Path, path: Path, overrides: Sequence[str], work_dir: Path, at_once: int, device: str,
                teacher: Path | None = None, say: Callable[[str], None] = print) -> Search:
    """A new search, or the one in the work dir.

    Raises:
        ConfigError, DataError, CheckpointError: a wrong file.
        WorkDirError: the work dir holds another search; it says what differs.
    """
    config = read_search(path)
    first = plan([cfg], [config.seed], work_dir, overrides, teacher)[-1]
    search = Search(path, Base(cfg, first.overrides), config, work_dir, at_once, device, first.waits, say)
    about = {"search": read_tree(path), "base": dict(search.base.config)}
    if (work_dir / STATE).is_file():
        search.state = read_json(work_dir / STATE, "remove the work dir, or give another one")
        check_same(search.state.get("about"), about, work_dir)
    else:
        check_built(search)
        search.state = {"about": about}
        search.save()
    return search


def check_same(before: Any, after: dict, work_dir: Path) -> None:
    """Raise WorkDirError, naming what differs, if a work dir holds a search of something else."""
    try:
        found = [str(change) for change in changes(before["base"], after["base"])
                 if setting(before["base"]) != setting(after["base"])]
        old, new = (with_defaults(SearchConfig, each["search"]) for each in (before, after))
        for each in (old, new):  # by key, so that a message is short
            each |= {f"space.{key}": node for key, node in each["space"].items()} | {"space": list(each["space"])}
    except (KeyError, TypeError, AttributeError):
        raise WorkDirError(f"{work_dir / STATE} is not that of a search: give another --work-dir") from None
    found += [f"{key} was {json.dumps(old.get(key))} and is {json.dumps(new.get(key))}"
              for key in {**old, **new} if old.get(key) != new.get(key)]
    if found:
        raise WorkDirError(f"{work_dir} holds another search ({listed(found)}): give another --work-dir, or undo the "
                           "change")


def check_built(search: Search) -> None:
    """Build what the space may contain, without weights; ConfigError if something cannot be built."""
    classes = annotated_classes(search.base.config)
    log = logging.getLogger("densekd")  # reports on each pair are for its run
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        for settings in ({}, *variants(search.config.space)):
            tree = without_checkpoints(with_settings_of(search.base, settings, search.path))
            with torch.device("meta"):
                build_model(tree if classes is None else tree.with_num_classes(len(classes.names)), pretrained=False)
    except ConfigError as error:
        raise ConfigError(error.key, f"{error.problem} ({search.path}, with {' '.join(as_overrides(settings))})"
                          ) from None
    finally:
        log.setLevel(before)


def make_plan(search: Search) -> list[Rung]:
    """The rungs and the candidates of the search, made at its first start.

    Raises:
        ConfigError: the budget is too small.
    """
    state, config, epochs = search.state, search.config, search.epochs
    if "rungs" not in state:
        runs = affordable_runs(search)
        try:
            rungs = plan_rungs(runs - search.final_runs, epochs, config.reduction, config.shortest)
            drawn = candidates(search.base, config, rungs[0].count)
            if len(drawn) < rungs[0].count:
                rungs = plan_rungs(runs - search.final_runs, epochs, config.reduction, config.shortest, len(drawn))
        except ConfigError as error:
            raise ConfigError("budget", f"pays for {runs:.3g} runs of {counted(epochs, 'epoch')}. The end takes "
                              f"{search.final_runs} ({counted(len(search.config.seeds), 'seed')}; the winner, "
                              f"{', '.join(search.rivals)}), and it {error.problem}: give more, or fewer seeds "
                              f"({search.path})") from None
        state["candidates"], state["rungs"] = drawn[:rungs[0].count], [vars(rung) for rung in rungs]
        state["results"] = []
        search.save()
    return [Rung(**rung) for rung in state["rungs"]]


def affordable_runs(search: Search) -> float:
    """The budget in runs of full length."""
    budget, state = search.config.budget, search.state
    if budget.runs is not None:
        return budget.runs
    if "seconds_per_run" not in state:
        state["seconds_per_run"] = time_of_a_run(search)
    return budget.hours * 3600 * search.at_once / state["seconds_per_run"]


def time_of_a_run(search: Search) -> float:
    """Seconds that a run of full length takes, from a short run of the base configuration."""
    epochs = lengths(search.epochs, search.config.reduction, search.config.shortest)[0]
    job = search.short_job(0, {}, epochs)
    search.say("a short run of the base configuration shows how long runs take")
    search.run([job])
    return seconds_of_run(job) / epochs * search.epochs


def seconds_of_run(job: Job) -> float:
    """From the start of a run, or from its resumption, to its last evaluation."""
    started, ended = ((job.work_dir / name).stat().st_mtime for name in ("run.json", "metrics.jsonl"))
    return max(ended - started, 1e-3)


def explain_plan(search: Search, rungs: Sequence[Rung]) -> str:
    """The plan in words, with what it is expected to cost."""
    final = search.final_runs
    total = cost(rungs, search.epochs) + final
    lines = [f"{counted(rungs[0].count, 'candidate')}; the first is {search.base.cfg} as it is",
             *(f"rung {i}: {rung}" for i, rung in enumerate(rungs, 1)),
             f"end: {counted(final, 'run')} of {counted(search.epochs, 'epoch')}: the winner, "
             f"{', '.join(search.rivals)}; with the seeds {', '.join(map(str, search.config.seeds))}",
             f"expected cost: as much as {total:.1f} runs of full length"]
    if seconds := search.state.get("seconds_per_run"):
        lines[-1] += f", about {total * seconds / 3600 / search.at_once:.1f} hours"
    if search.teacher:
        lines[-1] += ", and the teacher's run"
    return "\n".join(lines)


def choose(search: Search, rungs: Sequence[Rung]) -> dict:
    """The settings of the winner: the best one of the last rung.

    Raises:
        TrainingError: so many runs failed that too few are left.
    """
    drawn, results = search.state["candidates"], search.state["results"]
    for i, rung in enumerate(rungs):
        alive = survivors(results[i - 1], rung.count) if i else range(rung.count)
        if i < len(results):
            continue
        jobs = {number: search.short_job(number, drawn[number], rung.epochs) for number in alive}
        search.say(f"rung {i + 1} of {len(rungs)}: {rung}")
        failure = None
        try:
            search.run(list(jobs.values()))
        except TrainingError as error:
            failure = error
        found = {number: ap_of(job) for number, job in jobs.items()}
        needed = rungs[i + 1].count if i + 1 < len(rungs) else 1
        if len(ranked(found)) < needed:
            raise failure or TrainingError("no run has an AP: is there an object in data.val?")
        results.append({"epochs": rung.epochs, "AP": {str(number): ap for number, ap in found.items()}})
        search.save()
        tell_time(search, [jobs[number] for number in ranked(found)], rung.epochs, rungs[i + 1:])
        remove_checkpoints(jobs.values())
    return drawn[survivors(results[-1], 1)[0]]


def remove_checkpoints(jobs: Iterable[Job]) -> None:
    """Tens of candidates would fill the disk; and a longer run is trained anew."""
    for file in (file for job in jobs for name in ("last*.pth", "best.pth") for file in job.work_dir.glob(name)):
        file.unlink()


def survivors(result: dict, count: int) -> list[int]:
    """The best candidates of a rung, from its entry in search.json."""
    return ranked({int(number): ap for number, ap in result["AP"].items()})[:count]


def ap_of(job: Job) -> float | None:
    """The last AP of a run; None if it failed."""
    return job.record().evaluations[-1]["AP"] if job.finished() else None


def tell_time(search: Search, jobs: Sequence[Job], epochs: int, rungs: Sequence[Rung]) -> None:
    """Say how long the rest will take, from the runs so far."""
    seconds = sum(map(seconds_of_run, jobs)) / len(jobs) / epochs * search.epochs
    left = (cost(rungs, search.epochs) + search.final_runs) * seconds / search.at_once
    search.say(f"about {left / 3600:.1f} hours are left")


def final_jobs(search: Search, winner: dict) -> dict[str, list[Job]]:
    """The runs of the winner and of its rivals on fresh seeds; without a rival that is the same as the winner."""
    settings = {"winner": (winner, ()), "alone": (winner, ("distill=null",)), "base": ({}, ())}
    found, known = {}, set()
    for name in ("winner", *search.rivals):
        own, more = settings[name]
        key = setting(search.base.with_settings(own, more))
        if key not in known:
            found[name] = [search.job(f"{name}, seed {seed}", f"{name}/seed{seed}", own, seed, more)
                           for seed in search.config.seeds]
        known.add(key)
    return found


def test_once(search: Search, jobs: dict[str, list[Job]]) -> None:
    """Write test.json into the work dir of every run: its figures on the images of `test`. A second call does nothing.
    """
    if search.config.test is None:
        return
    part = {key: value for key, value in vars(search.config.test).items() if value is not None}
    for job in (job for several in jobs.values() for job in several):
        out = job.work_dir / "test.json"
        if not out.is_file():
            search.say(f"{job.name}: evaluated on {part['annotations']}, once")
            figures = evaluate_checkpoint(on_test(job.config, part), str(job.work_dir / "last.pth"),
                                          torch.device(search.device))
            write_text(out, json.dumps({"annotations": part["annotations"]} | figures, indent=1) + "\n")


def on_test(config: Config, part: dict) -> Config:
    return parse_config(config | {"data": config["data"] | {"val": part}})
