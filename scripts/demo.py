"""Train a teacher, a student alone and a distilled student on generated scenes; a few minutes on two CPU cores."""
from pathlib import Path

from data.ranges import Count
from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/demo.py --work-dir runs/demo", "--device", "overrides")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/demo"),
                        help="folder for everything; an earlier demo there is replaced; default: runs/demo")
    parser.add_argument("--images", type=cli.number(Count), default=400, help="scenes to train on; default: 400")
    args = parser.parse_args()
    from kd.experiments.demo import run_demo

    print(run_demo(args.work_dir, cli.choose_device(args.device), images=args.images,
                   overrides=tuple(args.overrides)))
    print(f"\nThe table is in {args.work_dir / 'table.md'}, and detections of all three in "
          f"{args.work_dir / 'detections.png'}.")


if __name__ == "__main__":
    cli.run(main)
