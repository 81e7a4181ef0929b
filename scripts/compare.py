"""Show runs in one table: AP over seeds, the gain over the student alone, the share of the gap to the teacher that is
closed, parameters, GFLOPs and speed."""
import argparse
import sys
from pathlib import Path

from kd.experiments.compare import compare, explain, format_rows, save_rows
from kd.terminal import cli
from kd.work_dir.records import read_runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/compare.py runs/* --out table.md --out table.csv")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="work dirs of train.py; other paths are left out")
    parser.add_argument("--out", type=Path, action="append", default=[], metavar="FILE",
                        help="also write the table: .md for markdown, .csv for CSV with AP as fractions")
    parser.add_argument("--teacher-ap", type=float, metavar="POINTS", help="the teacher's AP, if no run has it")
    args = parser.parse_args()
    runs, notes = read_runs(args.runs)
    notes += [f"{run.path} is left out: it has not been evaluated yet" for run in runs if not run.evaluations]
    if notes:
        print("\n".join(notes), file=sys.stderr)
    rows = compare(runs, None if args.teacher_ap is None else args.teacher_ap / 100)
    print(f"{format_rows(rows)}\n\n{explain(rows)}")
    for out in args.out:
        save_rows(rows, out)
        print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
