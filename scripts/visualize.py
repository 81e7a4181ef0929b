"""Draw what is distilled: ground truth, teacher, student and cross-head predictions side by side, score maps of every
level and, with FGD, PGD or FRS among the methods, the weights that these give to the cells. One PNG file of each kind
for each image."""
import sys
from pathlib import Path

from data.ranges import Count
from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/visualize.py --cfg configs/bccd/crosskd_gfl_r18w16_r18w32.yaml "
                                 "--checkpoint runs/crosskd_gfl_r18w16_r18w32/last.pth --out pictures",
                        "--cfg", "--checkpoint", "--part", "--score-thr", "--device", "overrides", checkpoint={
                            "help": "the student's weights, preferably from a run of this configuration"})
    parser.add_argument("--images", nargs="+", type=Path, default=[], metavar="FILE",
                        help="images to draw; default: the first ones of data.val")
    parser.add_argument("--count", type=cli.number(Count), default=4, help="how many images of data.val; default: 4")
    parser.add_argument("--out", required=True, type=cli.out_folder, metavar="DIR", help="folder for the pictures")
    args = parser.parse_intermixed_args()
    cfg = cli.load_config(args.cfg, args.overrides, checkpoint=args.checkpoint)
    from kd.evaluation.visualize import visualize

    files, left_out = visualize(cfg, args.checkpoint, args.out, cli.choose_device(args.device), args.images,
                                args.count, args.part, args.score_thr)
    print("\n".join(map(str, files)))
    if left_out:
        print("\n".join(left_out), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
