"""Show runs in a table: AP over seeds, the gain over the student alone and whether it pays, the share of the gap to the
teacher that is closed, hours, memory, parameters, GFLOPs and speed."""
import sys
from pathlib import Path

from data import DataError
from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/compare.py runs/* --out table.md --out table.csv", "runs",
                        "--teacher-ap")
    parser.add_argument("--out", type=cli.out_file, action="append", default=[], metavar="FILE",
                        help="also write the table: .md for markdown, .csv for CSV with AP as fractions")
    parser.add_argument("--figures", type=Path, metavar="NAME",
                        help="take the figures from this file in each work dir, for example test.json, as eval.py "
                        "--out writes it; default: those of the last evaluation in training")
    args = parser.parse_args()
    cli.check_runs(args.runs)
    from kd.experiments.compare import compare
    from kd.experiments.tables import explain, format_rows, save_rows
    from kd.work_dir.records import read_runs, with_figures

    runs, notes = read_runs(args.runs)
    if args.figures:
        runs, missing = with_figures(runs, args.figures)
        notes += missing
        if not runs:
            raise DataError(f"no run has a {args.figures}: {notes[-1]}")
    notes += [f"{run.path} is left out: it has not been evaluated yet" for run in runs if not run.evaluations]
    if notes:
        print("\n".join(notes), file=sys.stderr)
    rows = compare(runs, cli.fraction(args.teacher_ap))
    print(f"{format_rows(rows)}\n\n{explain(rows)}")
    for out in args.out:
        save_rows(rows, out)
        cli.wrote(out)


if __name__ == "__main__":
    cli.run(main)
