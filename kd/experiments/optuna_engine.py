"""A search by Optuna: it draws candidates from what others have shown, stops the worse ones, and keeps all of it in a
database that several machines can share. Here are only the runs.

Optuna decides as results arrive, so with several runs at once the winner depends on their order. The plan is the
budget: candidates are drawn until it is used up.
"""
import hashlib
import json
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import uuid4

from data.errors import counted
from data.extras import need
from models import ConfigError

from ..config.hints import with_defaults
from ..exceptions import TrainingError
from ..work_dir.records import setting
from .halving import lengths
from .search import Search, affordable_runs, ap_of, remove_checkpoints, survivors
from .space import SearchConfig, brief, draw
from .sweep import Job, run_jobs

if TYPE_CHECKING:
    import optuna


def choose_with_optuna(search: Search) -> dict:
    """The settings of the winner: the best one of full length.

    Raises:
        ConfigError: the budget is too small.
        TrainingError: none reached the full length; or another machine has started this study, and it makes the end.
    """
    if "results" not in search.state:
        search.work_dir.mkdir(parents=True, exist_ok=True)
        trials = Trials(search)
        final = counted(search.final_runs, "run")
        search.say(f"{counted(search.at_once, 'candidate')} at a time, until they cost {trials.budget:.3g} runs of "
                   f"full length; each is trained over {', '.join(map(str, trials.rungs))} epochs, as long as it "
                   f"is among the best 1/{search.config.reduction}; then {final} on fresh seeds")
        first = trials.next()
        try:
            run_jobs([*([search.teacher] if search.teacher else []), *first], search.at_once, search.device, search.say,
                     trials.after)
        except TrainingError as error:
            search.say(str(error))
        trials.read()
    return search.state["candidates"][survivors(search.state["results"][-1], 1)[0]]


class Trials:
    """The trials of a study, and the runs that belong to them."""

    def __init__(self, search: Search):
        self.optuna = optuna = need("optuna", "search", f"engine: optuna ({search.path})")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        config = search.config
        self.search, self.rungs = search, lengths(search.epochs, config.reduction, config.shortest)
        self.budget = affordable_runs(search) - search.final_runs
        if self.budget <= 0:
            raise ConfigError("budget", f"the {search.final_runs} runs at the end use all of it: give more "
                                        f"({search.path})")
        if "place" not in search.state:  # the name of the machine alone may change
            search.state["place"] = f"{socket.gethostname()}:{search.work_dir.resolve()} ({uuid4().hex[:8]})"
            search.save()
        self.place = search.state["place"]
        about = json.dumps(with_defaults(SearchConfig, search.state["about"]["search"]) | {"storage": None})
        name = hashlib.sha256((about + setting(search.base.config)).encode()).hexdigest()[:12]
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=config.reduction)
        self.study = optuna.create_study(
            storage=config.storage or f"sqlite:///{search.work_dir.resolve() / 'optuna.db'}", study_name=name,
            direction="maximize", pruner=pruner, load_if_exists=True)
        # The same seed again would draw the same candidates again.
        self.study.sampler = optuna.samplers.TPESampler(
            seed=config.seed + len(self.study.trials), constant_liar=search.at_once > 1)
        self.running: dict[Job, tuple[optuna.Trial, dict, int]] = {}  # with settings and rung
        self.take_over()

    def take_over(self) -> None:
        """Continue the trials that were running here when the search was stopped; at its first start, add the base."""
        if "home" not in self.study.user_attrs:
            self.study.set_user_attr("home", self.place)
            self.study.enqueue_trial({}, user_attrs={"base": True})
        for trial in self.study.get_trials(states=(self.optuna.trial.TrialState.RUNNING,)):
            if trial.user_attrs.get("place") == self.place:
                self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
                self.study.enqueue_trial(trial.params, {"base": trial.user_attrs.get("base", False)})

    def known(self, trial: "optuna.trial.FrozenTrial") -> dict[int, float | None]:
        """AP of a trial by rung; None if its run failed."""
        steps = {self.search.config.reduction ** rung: rung for rung in range(len(self.rungs))}
        found = {steps[step]: ap for step, ap in trial.intermediate_values.items()}
        return found | ({trial.user_attrs["failed"]: None} if "failed" in trial.user_attrs else {})

    def spent(self) -> float:
        """Runs of full length that all trials have cost, with what those that are running cost next."""
        trials = self.study.get_trials(deepcopy=False)
        ended = sum(self.rungs[rung] for trial in trials for rung in self.known(trial))
        return (ended + sum(self.rungs[rung] for _, _, rung in self.running.values())) / self.search.epochs

    def next(self) -> list[Job]:
        """The first runs of new trials, for all free slots, if the budget pays for them."""
        jobs = []
        while len(self.running) < self.search.at_once and self.spent() < self.budget:
            trial = self.study.ask()
            settings = {} if trial.user_attrs.get("base") else suggested(self.search.config.space, trial)
            trial.set_user_attr("place", self.place)
            trial.set_user_attr("settings", settings)
            jobs.append(self.job(trial, settings, 0))
        return jobs

    def job(self, trial: "optuna.Trial", settings: dict, rung: int) -> Job:
        """A run of a trial. The folder has a name of the settings, so that a trial that is repeated finds its runs."""
        name = f"t{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
        job = self.search.short_job(1 if settings else 0, settings, self.rungs[rung], name)
        self.running[job] = trial, settings, rung
        return job

    def after(self, job: Job, right: bool) -> Sequence[Job]:
        """Report how a run ended; what runs next: the same candidate for longer, or others."""
        if job not in self.running:  # the teacher
            return []
        trial, settings, rung = self.running.pop(job)
        states, ap, last = self.optuna.trial.TrialState, ap_of(job) if right else None, rung == len(self.rungs) - 1
        remove_checkpoints([job])
        if ap is None:
            trial.set_user_attr("failed", rung)
            self.study.tell(trial, state=states.FAIL)
            return self.next()
        trial.report(ap, self.search.config.reduction ** rung)
        if not last and not trial.should_prune():
            return [self.job(trial, settings, rung + 1)]
        self.study.tell(trial, ap if last else None, state=states.COMPLETE if last else states.PRUNED)
        return self.next()

    def read(self) -> None:
        """Write all trials that have an AP, also those of other machines, into the state of the search.

        Raises:
            TrainingError: see `choose_with_optuna`.
        """
        if self.study.user_attrs["home"] != self.place:
            raise TrainingError(f"the budget is used. The end is made where the study was started: "
                                f"{self.study.user_attrs['home']}")
        trials = [trial for trial in self.study.get_trials() if self.known(trial)]
        results = [{"epochs": epochs, "AP": {str(i): self.known(trial)[rung] for i, trial in enumerate(trials)
                                             if rung in self.known(trial)}} for rung, epochs in enumerate(self.rungs)]
        if not any(results[-1]["AP"].values()):
            raise TrainingError("no candidate has reached the full length: give more budget, or see why runs failed")
        self.search.state |= {"candidates": [trial.user_attrs["settings"] for trial in trials], "results": results}
        self.search.save()


def suggested(space: dict, trial: "optuna.Trial") -> dict:
    """The settings that Optuna suggests for a trial."""
    def pick(name: str, count: int) -> int:
        return trial.suggest_categorical(name, list(range(count)))

    def between(name: str, kind: str, low: float, high: float) -> float:
        if kind == "int":
            return trial.suggest_int(name, low, high)
        return brief(trial.suggest_float(name, low, high, log=kind == "log"), low, high)

    return draw(space, pick, between)
