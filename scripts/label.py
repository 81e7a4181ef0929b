"""Write a teacher's detections on images as annotations in COCO format, to train on. With --results, take them from a
file of COCO results instead of a checkpoint."""
import argparse
import os
from collections.abc import Callable
from pathlib import Path

from data.errors import counted
from data.ranges import Count, Share
from kd import cli
from kd.exceptions import Incomplete, UsageError

SCORE_THR = 0.5


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/label.py --checkpoint runs/teacher_gfl_r18w32/last.pth --input photos "
                                 "--out photos/found.json --score-thr 0.5 RBC=0.7",
                        "--cfg", "--checkpoint", "--part", "--classes", "--score-thr", "--device", "overrides",
                        cfg=cli.OPTIONAL, checkpoint={"required": False},
                        score_thr={"nargs": "+", "action": "extend", "type": cli.number_or_named(Share), "default": [],
                                   "metavar": "SCORE or NAME=SCORE",
                                   "help": "detections with a lower score are left out, for all classes or for one; "
                                           f"default: {SCORE_THR}"})
    parser.add_argument("--input", type=Path, metavar="DIR",
                        help="folder with images, searched with its subfolders; file names start from it")
    parser.add_argument("--results", type=Path, metavar="FILE", help="COCO results of any detector")
    parser.add_argument("--annotations", type=Path, metavar="FILE",
                        help="COCO file with the images and categories of --results; its annotations are not used")
    parser.add_argument("--out", required=True, type=cli.out_file, metavar="FILE",
                        help="the annotations, a new JSON file")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--batch-size", type=cli.number(Count), metavar="N",
                        help="images or tiles at a time; default: eval.batch_size, or data.batch_size")
    args = parser.parse_intermixed_args()
    check_sources(args, parser.error)
    if args.out.exists() and not args.overwrite:
        raise UsageError(f"{args.out} exists: give another --out, or --overwrite to replace it")
    general = [score for name, score in args.score_thr if name is None]
    if len(general) > 1:
        raise UsageError(f"--score-thr has {len(general)} numbers for all classes: give one, and NAME=SCORE for others")
    thresholds = (general or [SCORE_THR])[0], [each for each in args.score_thr if each[0] is not None]
    unread = []
    if args.results:
        from kd.inference.label import label_results

        made = label_results(args.results, args.annotations, *thresholds)
    else:
        from data.inputs.find import find_images

        sources = find_images(args.input)
        cfg = cli.load_config(args.cfg, args.overrides, checkpoint=args.checkpoint)
        from kd.inference.label import label_images

        made, unread = label_images(cfg, args.checkpoint, sources, cli.choose_device(args.device), *thresholds,
                                    part=args.part, names=args.classes, batch_size=args.batch_size)
    made.write(args.out)
    print(f"{made.describe()}; annotations are in {args.out}")
    if unread:
        raise Incomplete(f"{len(unread)} of {counted(len(sources), 'image')} could not be read and were left out, see "
                         "above")


def check_sources(args: argparse.Namespace, error: Callable[[str], object]) -> None:
    """End with `error` unless the arguments name a checkpoint and images, or results and their images."""
    if (args.checkpoint is None) == (args.results is None):
        error("give either --checkpoint or --results")
    needed, useless = ("annotations", ("input", "cfg", "part", "classes", "device", "batch_size", "overrides")) \
        if args.results else ("input", ("annotations",))
    own = "results" if args.results else "checkpoint"
    if getattr(args, needed) is None:
        error(f"--{own} needs --{needed}")
    for name in useless:
        if getattr(args, name):
            error(f"--{own} takes no {name if name == 'overrides' else '--' + name.replace('_', '-')}: remove it")
    for path in filter(None, (args.results, args.annotations)):
        if not path.is_file():
            raise UsageError(f"{path} does not exist, or is not a file: correct the path")
        if os.path.realpath(path) == os.path.realpath(args.out):
            raise UsageError(f"--out {args.out} is also read: give another --out")


if __name__ == "__main__":
    cli.run(main)
