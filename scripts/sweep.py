"""Train and evaluate configurations over seeds, one run after another or several at once, and compare them.

Finished runs are skipped and stopped ones are resumed, so the same command continues a sweep at any time."""
from pathlib import Path

from data.ranges import Few, Seed
from kd import cli
from kd.early import check_early
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
    parser.add_argument("--seeds", nargs="+", type=seed_or_setting, default=[0, 1, 2], metavar="SEED",
                        help="default: 0 1 2")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/sweep"),
                        help="where the runs and the table go; default: runs/sweep")
    parser.add_argument("--jobs", type=cli.number(Few), metavar="N",
                        help="runs at once; default: one per GPU, or one")
    args = parser.parse_intermixed_args()
    seeds = [seed for seed in args.seeds if isinstance(seed, int)]
    overrides = [*(word for word in args.seeds if isinstance(word, str)), *args.overrides]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {' '.join(map(str, seeds))}: give whole numbers, each once")
    for path in args.cfg:  # overrides of distill are only for those that distil
        check_early(path, [text for text in overrides if not text.startswith("distill.")],
                    ("train", "val", "init"))
    import torch

    from kd.experiments.compare import compare
    from kd.experiments.sweep import plan, run_jobs
    from kd.experiments.tables import explain, format_rows, save_rows
    from kd.work_dir.records import read_runs

    device = cli.choose_device(args.device).type
    at_once = args.jobs or (torch.cuda.device_count() if device == "cuda" else 1)

    jobs, failure = plan(args.cfg, seeds, args.work_dir, overrides, args.teacher), None
    try:
        run_jobs(jobs, at_once, device, lambda line: print(line, flush=True))
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


def seed_or_setting(text: str) -> int | str:
    """A seed; or an override, because --seeds also takes those that follow it."""
    return text if "=" in text else cli.number(Seed)(text)


seed_or_setting.hint = Seed


if __name__ == "__main__":
    cli.run(main)
