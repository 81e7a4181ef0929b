"""Train and evaluate configurations over seeds, one run after another or several at once, and compare them. Or search
for the settings that distil best (--search).

Finished runs are skipped and stopped ones are resumed, so the same command continues a sweep at any time."""
from argparse import Namespace
from pathlib import Path

from data.ranges import Few, Seed
from kd import cli
from kd.early import early
from kd.exceptions import TrainingError, UsageError


def main() -> None:
    parser = cli.parser(
        __doc__, "python scripts/sweep.py --cfg configs/bccd/student_gfl_r18w16.yaml "
        "--cfg configs/bccd/crosskd_gfl_r18w16_r18w32.yaml --teacher configs/bccd/teacher_gfl_r18w32.yaml "
        "--seeds 0 1 2 --work-dir runs/bccd", "--cfg", "--teacher-ap", "--device", "overrides",
        cfg={"action": "append", "type": Path,
             "help": "configuration; repeat for each; one without `distill` is the student alone"},
        overrides={"help": "settings that replace those of the files; settings of distill are left out where there is "
                           "no distill, and the teacher takes only those of data"})
    parser.add_argument("--teacher", type=Path, metavar="FILE",
                        help="configuration of the teacher, which is trained first, once; its checkpoint is then used "
                             "by each --cfg whose distill.teacher.cfg is this file")
    parser.add_argument("--search", type=Path, metavar="FILE",
                        help="which settings of the only --cfg to search, and what that may cost, see docs/search.md")
    parser.add_argument("--seeds", nargs="+", type=seed_or_setting, default=[], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/sweep"),
                        help="where the runs and the table go; default: runs/sweep")
    parser.add_argument("--jobs", type=cli.number(Few), metavar="N",
                        help="runs at once; default: one per GPU, or one")
    args = parser.parse_intermixed_args()
    seeds = [seed for seed in args.seeds if isinstance(seed, int)]
    overrides = [*(word for word in args.seeds if isinstance(word, str)), *args.overrides]
    if args.seeds and not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {' '.join(map(str, seeds))}: give whole numbers, each once")
    if args.search:
        search(args, seeds, overrides)
        return
    early("kd.experiments.sweep", "check_plan", args.cfg, overrides, args.teacher)
    from kd.experiments.compare import compare
    from kd.experiments.sweep import plan, run_jobs
    from kd.experiments.tables import explain, format_rows, save_rows
    from kd.work_dir.records import read_runs

    device, at_once = choose(args)
    jobs, failure = plan(args.cfg, seeds or [0, 1, 2], args.work_dir, overrides, args.teacher), None
    try:
        run_jobs(jobs, at_once, device, say)
    except TrainingError as error:
        failure = error
    there = [job.work_dir for job in jobs if job.record() is not None]
    rows = compare(read_runs(there)[0], cli.fraction(args.teacher_ap)) if there else []
    if rows:
        print(f"\n{format_rows(rows)}\n\n{explain(rows)}")
        for name in ("table.md", "table.csv"):
            save_rows(rows, args.work_dir / name)
            cli.wrote(args.work_dir / name)
    if failure:
        raise failure


def search(args: Namespace, seeds: list[int], overrides: list[str]) -> None:
    """Do what --search asks for."""
    if len(args.cfg) > 1:
        raise UsageError("--search takes one --cfg: what else may be is in its file")
    if seeds:
        raise UsageError(f"--seeds is not for --search: {args.search} says which seeds")
    if args.teacher_ap is not None:
        raise UsageError("--teacher-ap is not for --search, which does not show the gap to the teacher")
    early("kd.experiments.space", "check_search", args.cfg[0], args.search, overrides, args.teacher)
    from kd.experiments.outcome import check_failed, finish
    from kd.experiments.search import open_search

    device, at_once = choose(args)
    found = open_search(args.cfg[0], args.search, overrides, args.work_dir, at_once, device, args.teacher, say)
    print(f"\n{finish(found)}")
    cli.wrote(args.work_dir / "search.md", args.work_dir / "winner.yaml")
    check_failed(found)


def choose(args: Namespace) -> tuple[str, int]:
    """The device, and how many runs are made at once."""
    import torch

    device = cli.choose_device(args.device).type
    return device, args.jobs or (torch.cuda.device_count() if device == "cuda" else 1)


def say(line: str) -> None:
    print(line, flush=True)


def seed_or_setting(text: str) -> int | str:
    """A seed; or an override, because --seeds also takes those that follow it."""
    return text if "=" in text else cli.number(Seed)(text)


seed_or_setting.hint = Seed


if __name__ == "__main__":
    cli.run(main)
