"""Show which errors cost a detector AP: classification, localisation, duplicates, background, missed objects; which
lowest score suits each class; and how reliable the scores are. With two checkpoints, show where one is better than the
other."""
import sys
from typing import Annotated

from data.ranges import Range
from kd import cli
from kd.exceptions import UsageError


def main() -> None:
    parser = cli.parser(
        __doc__, "python scripts/analyze.py --cfg configs/bccd/student_gfl_r18w16.yaml "
        "--checkpoint runs/student_gfl_r18w16/last.pth --checkpoint runs/crosskd_gfl_r18w16_r18w32/last.pth",
        "--cfg", "--checkpoint", "--score-thr", "--device", "overrides",
        cfg={"action": "append", "required": False, "help": "configuration; give a second one if the second "
             "checkpoint needs its own; default: the one in each checkpoint"},
        checkpoint={"action": "append",
                    "help": "file or URL of the weights, in any format; give two to compare them side by side"},
        score_thr={"help": "lowest score in the confusion matrix, in the reliability, and of detections that find "
                           "objects; default: 0.3"})
    parser.add_argument("--precision", type=cli.number(Annotated[float, Range(0, 1, open=True)]), metavar="SHARE",
                        help="choose for each class the lowest score with this precision, for example 0.9; default: "
                             "the score with the best F1")
    parser.add_argument("--out", type=cli.out_folder, metavar="DIR",
                        help="also write analysis.md, analysis.json, thresholds.json (for predict.py and export.py) "
                             "and pictures into this folder")
    args = parser.parse_intermixed_args()
    paths = args.cfg or [None]
    if len(args.checkpoint) > 2 or len(paths) not in (1, len(args.checkpoint)):
        raise UsageError(f"{len(args.checkpoint)} --checkpoint and {len(args.cfg or [])} --cfg: give one or two "
                         "checkpoints, and one configuration for both, one each or none")
    cfgs = [cli.load_config(path, args.overrides, "val", checkpoint=checkpoint)
            for path, checkpoint in zip(paths * len(args.checkpoint), args.checkpoint)]
    from data.extras import MissingExtra
    from kd.evaluation.analyze import analyze, format_tables, save_analysis
    from kd.experiments.plot_scores import plot_scores

    found = analyze(cfgs, args.checkpoint, cli.choose_device(args.device), args.score_thr)
    print(format_tables(found, args.score_thr, precision=args.precision))
    if args.out:
        cli.wrote(*save_analysis(found, args.out, args.score_thr, args.precision))
        try:
            cli.wrote(*plot_scores(found, args.out, args.score_thr, args.precision))
        except MissingExtra as error:
            print(f"no pictures: {error}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
