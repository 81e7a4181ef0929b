"""What a search has found: its candidates, and the winner against its rivals on fresh seeds."""
from collections.abc import Sequence
from statistics import mean
from typing import Any

import yaml

from data.errors import counted, listed
from data.output import write_text
from data.tables import markdown_table, points, text_table

from ..exceptions import TrainingError
from ..work_dir.records import read_json
from .compare import over_seeds
from .optuna_engine import choose_with_optuna
from .search import Search, choose, explain_plan, final_jobs, make_plan, test_once
from .sweep import OUTPUT, Job
from .tables import with_deviation
from .verdict import CONFIDENCE, judge

MEANING = {"alone": "the winner's settings without distillation", "base": "the configuration of --cfg as it is"}


def finish(search: Search) -> str:
    """Carry out a search, or what is left of it; the tables and the words, see `outcome`.

    Raises:
        ConfigError: the budget is too small.
        TrainingError: a run at the end failed, or too many before.
        Stopped: a signal, after the runs have saved.
    """
    if search.config.engine == "optuna":
        winner = choose_with_optuna(search)
    else:
        rungs = make_plan(search)
        search.say(explain_plan(search, rungs))
        winner = choose(search, rungs)
    jobs = final_jobs(search, winner)
    search.say(f"the winner: {in_words(winner)}")
    search.run([job for several in jobs.values() for job in several])
    test_once(search, jobs)
    return outcome(search, winner, jobs)


def check_failed(search: Search) -> None:
    """Raise TrainingError if runs of the search failed, though the search is complete without them."""
    names = [f"c{int(i):03d}" for result in search.state["results"] for i, ap in result["AP"].items() if ap is None]
    if names:
        raise TrainingError(f"{counted(len(names), 'run')} of the search failed ({listed(names, ', ')}), which could "
                            f"not win: see {OUTPUT} in the work dirs")


def outcome(search: Search, winner: dict, jobs: dict[str, list[Job]]) -> str:
    """The tables and the words for the terminal. They are also written, with the winner's configuration, to the work
    dir: `search.md` and `winner.yaml`.
    """
    job = jobs["winner"][0]
    heading = f"# The winner of a search with {search.path.name}. It is complete: `--cfg` takes it as it is.\n"
    write_text(search.work_dir / "winner.yaml", heading + yaml.safe_dump(plain_lists(dict(job.config)),
                                                                         sort_keys=False, allow_unicode=True))
    tried, final, words = candidate_rows(search), final_rows(search, jobs), explain(search, winner, jobs)
    write_text(search.work_dir / "search.md", "\n\n".join([words, *(markdown_table(*table) for table in (final, tried))]
                                                          ) + "\n")
    return "\n\n".join([text_table(*tried), text_table(*final), words])


def plain_lists(value: Any) -> Any:
    """A configuration as YAML can write it."""
    if isinstance(value, dict):
        return {key: plain_lists(each) for key, each in value.items()}
    return [plain_lists(each) for each in value] if isinstance(value, (list, tuple)) else value


def in_words(settings: dict) -> str:
    """Settings on one line, as overrides show them."""
    values = {key: yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
              for key, value in settings.items()}
    return " ".join(f"{key}={text.splitlines()[0]}" for key, text in values.items()) or "the base configuration"


def candidate_rows(search: Search) -> tuple[list[str], list[list[str]]]:
    """The candidates with their AP in each rung, the best first; a candidate that failed has a dash."""
    results = search.state["results"]
    order = sorted(range(len(search.state["candidates"])), key=lambda i: tuple(
        -2.0 if (ap := result["AP"].get(str(i))) is None else -ap for result in reversed(results)))
    order.sort(key=lambda i: -sum(result["AP"].get(str(i)) is not None for result in results))
    rows = [[f"c{i:03d}", *(("failed" if result["AP"][str(i)] is None else points(result["AP"][str(i)]))
                            if str(i) in result["AP"] else "-" for result in results),
             in_words(search.state["candidates"][i])] for i in order]
    return ["candidate", *(f"AP after {counted(result['epochs'], 'epoch')}" for result in results), "settings"], rows


def figures_of(jobs: Sequence[Job], tested: bool) -> dict[int, float | None]:
    """AP by seed, on `test` or on data.val."""
    return {job.seed: read_json(job.work_dir / "test.json", "remove it, and the same command evaluates again")["AP"]
            if tested else job.record().evaluations[-1]["AP"] for job in jobs}


def gains(jobs: dict[str, list[Job]], tested: bool) -> dict[str, Any]:
    """The judgement on the winner over each rival, by pairs of one seed."""
    own = figures_of(jobs["winner"], tested)
    found = {}
    for name, others in jobs.items():
        base = figures_of(others, tested)
        pairs = [own[seed] - base[seed] for seed in own if None not in (own[seed], base[seed])]
        if name != "winner" and pairs:
            found[name] = judge(pairs, name)
    return found


def final_rows(search: Search, jobs: dict[str, list[Job]]) -> tuple[list[str], list[list[str]]]:
    """Winner and rivals: AP on data.val and on `test`, and the winner's gain over each."""
    parts = [("data.val", False), *([("test", True)] if search.config.test else [])]
    judged = [gains(jobs, tested) for _, tested in parts]
    header = ["run", "seeds", *(f"AP on {name}" for name, _ in parts),
              *(f"winner's gain on {name}" for name, _ in parts), "verdict"]
    rows = []
    for name, several in jobs.items():
        known = [each.get(name) for each in judged]
        rows.append([name, str(len(several)),
                     *(with_deviation(*over_seeds(list(figures_of(several, tested).values()))) for _, tested in parts),
                     *("-" if each is None else with_deviation(each.gain, each.interval, True) for each in known),
                     str(known[-1] or "-")])
    return header, rows


def explain(search: Search, winner: dict, jobs: dict[str, list[Job]]) -> str:
    """The result in sentences."""
    tested, results = search.config.test is not None, search.state["results"]
    chosen = max(ap for ap in results[-1]["AP"].values() if ap is not None)
    fresh = [ap for ap in figures_of(jobs["winner"], False).values() if ap is not None]
    part = "test" if tested else "data.val"
    lines = [f"winner: {in_words(winner)}"]
    for name, told in gains(jobs, tested).items():
        lines.append(f"- over {name} ({MEANING[name]}): {with_deviation(told.gain, told.interval, True)} AP on {part}, "
                     f"{counted(told.pairs, 'fresh seed')}: {told}")
    if len(jobs) == 1:
        lines.append("- it is the configuration of --cfg itself: the search found nothing better")
    lines.append(f"The search chose it by its AP of {points(chosen)} on data.val, as the best of "
                 f"{counted(len(search.state['candidates']), 'candidate')}, so that figure may be too high by luck. On "
                 f"fresh seeds it has {points(mean(fresh)) if fresh else '-'} there.")
    lines.append(f"Gains are by pairs of one seed; ±: the {100 * CONFIDENCE:.0f}% confidence interval (Student's t), "
                 "or the standard deviation of an AP.")
    lines.append("The images of test had no part in the choice, and were evaluated once." if tested else
                 "data.val has also chosen the winner, so its gain may be too high there. For a figure to report, give "
                 "test, other images, from the start.")
    return "\n".join(lines)
