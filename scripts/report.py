"""Write one page about runs, a single HTML file that needs no network: whether distillation pays, figures, curves,
gains by class and size, errors, precision and recall, pictures, costs, commands and commits."""
import argparse
import shlex
import sys
from typing import Annotated

from data.ranges import Range
from kd import cli
from kd.exceptions import UsageError


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/report.py runs/bccd/*/seed* --analyze --out report.html", "runs",
                        "--teacher-ap", "--score-thr", "--device", score_thr={
                            "default": None, "help": "with --analyze: boxes with a lower score do not count, and are "
                            "not drawn; default: 0.3"})
    parser.add_argument("--out", required=True, type=cli.out_file, metavar="FILE",
                        help="the page, a file that ends with .html")
    parser.add_argument("--title", metavar="TEXT", help="heading of the page")
    parser.add_argument("--analyze", action="store_true",
                        help="also evaluate the checkpoint of each run on its data.val, for errors and pictures")
    parser.add_argument("--pictures", type=cli.number(Annotated[int, Range(0, 20)]), metavar="N",
                        help="with --analyze: how many images are shown; default: 4")
    args = parser.parse_args()
    check(args)
    cli.check_runs(args.runs)
    from kd.experiments.report.page import Analyze, write_report
    from kd.work_dir.provenance import command
    from kd.work_dir.records import read_runs

    runs, notes = read_runs(args.runs)
    notes += [f"{run.path} is left out: it has not been evaluated yet" for run in runs if not run.evaluations]
    asked = {name: value for name in ("score_thr", "pictures") if (value := getattr(args, name)) is not None}
    analyze = Analyze(cli.choose_device(args.device), **asked) if args.analyze else None
    notes += write_report(runs, args.out, f"python {shlex.join(command())}", args.title, cli.fraction(args.teacher_ap),
                          analyze)
    if notes:
        print("\n".join(notes), file=sys.stderr)
    cli.wrote(args.out)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for a wrong --out, and for what is only for --analyze."""
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {args.out}: the page is HTML, so give a file that ends with .html")
    for name in ("score_thr", "pictures", "device"):
        if getattr(args, name) is not None and not args.analyze:
            raise UsageError(f"--{name.replace('_', '-')} is for the evaluation of checkpoints: add --analyze")


if __name__ == "__main__":
    cli.run(main)
