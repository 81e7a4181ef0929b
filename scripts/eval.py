"""Show the COCO figures of a checkpoint, or of an exported file, on data.val."""
import json

from data.output import write_text
from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/eval.py --cfg configs/bccd/student_gfl_r18w16.yaml "
                                 "--checkpoint runs/student_gfl_r18w16/last.pth --out metrics.json",
                        "--cfg", "--checkpoint", "--exported", "--part", "--device", "overrides", cfg=cli.OPTIONAL)
    parser.add_argument("--out", type=cli.out_file, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--curves", type=cli.out_file, metavar="FILE",
                        help="also write precision over recall of every class, as in train.py's precision_recall.json")
    args = parser.parse_intermixed_args()
    cli.check_exported(args, needs_cfg=True)
    cfg = cli.load_config(args.cfg, args.overrides, "val", checkpoint=args.checkpoint)
    from kd.evaluation.coco import format_figures
    from kd.evaluation.evaluate import evaluate_checkpoint, evaluate_exported
    from kd.processes.distributed import rank

    if args.exported:
        figures = evaluate_exported(cfg, args.exported, cli.choose_device(args.device or "cpu"), args.curves)
    else:
        figures = evaluate_checkpoint(cfg, args.checkpoint, cli.choose_device(args.device), args.part, args.curves)
    cli.say(format_figures(figures))
    if args.curves:
        cli.wrote(args.curves)
    if args.out and rank() == 0:
        write_text(args.out, json.dumps(figures, indent=1))
        cli.wrote(args.out)


if __name__ == "__main__":
    cli.run(main)
