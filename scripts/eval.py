"""COCO figures of a checkpoint on data.val."""
import json
from pathlib import Path

from kd.config.load import load_config
from kd.evaluation.evaluate import evaluate_checkpoint, format_figures
from kd.processes.distributed import rank
from kd.terminal import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/eval.py --cfg configs/bccd/student_gfl_r18w16.yaml "
                                 "--checkpoint runs/student_gfl_r18w16/last.pth --out metrics.json")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="file or URL of the weights, in any format")
    parser.add_argument("--part", choices=("student", "teacher"), help="which model of an FGD checkpoint")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--curves", type=Path, metavar="FILE",
                        help="also write precision over recall of every class, as in train.py's precision_recall.json")
    args = parser.parse_intermixed_args()
    figures = evaluate_checkpoint(load_config(args.cfg, args.overrides), args.checkpoint,
                                  cli.choose_device(args.device), args.part, args.curves)
    cli.say(format_figures(figures))
    if args.curves:
        cli.say(f"wrote {args.curves}")
    if args.out and rank() == 0:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        cli.say(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
