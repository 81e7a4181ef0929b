"""Draw runs: losses and AP over epochs, precision over recall of each class, AP over the length of training if there
are several, and the share of the gap to the teacher that is closed. Runs that differ only in the seed become one line,
their mean, in a band from the lowest to the highest."""
import sys

from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/plot.py runs/student_gfl_r18w16 runs/crosskd_gfl_r18w16_r18w32 "
                                 "--out plots", "runs", "--teacher-ap",
                        runs={"help": "work dirs of train.py, or metrics.jsonl files from them"})
    parser.add_argument("--out", required=True, type=cli.out_folder, metavar="DIR", help="folder for the PNG pictures")
    args = parser.parse_args()
    cli.check_runs(args.runs)
    from kd.experiments.compare import compare
    from kd.experiments.plot import plot_runs
    from kd.work_dir.records import read_runs

    runs, notes = read_runs(args.runs)
    if notes:
        print("\n".join(notes), file=sys.stderr)
    rows = compare(runs, cli.fraction(args.teacher_ap))
    files = plot_runs(runs, rows, args.out)
    print("\n".join(map(str, files)))
    if "precision_recall.png" not in {file.name for file in files}:
        print("no precision_recall.png: none of the runs holds a precision_recall.json; eval.py --curves writes one",
              file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
