"""Detect objects in images and videos, draw them, and write them as results in common formats."""
from pathlib import Path

from data.errors import counted
from data.inputs.find import find_files
from data.ranges import Count, Share
from data.results import WRITERS
from kd import cli
from kd.exceptions import Incomplete


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/predict.py --cfg configs/bccd/student_gfl_r18w16.yaml "
                                 "--checkpoint runs/student_gfl_r18w16/last.pth --input photos --out found",
                        "--cfg", "--checkpoint", "--part", "--classes", "--score-thr", "--device", "overrides",
                        cfg=cli.OPTIONAL,
                        score_thr={"help": "detections with a lower score are left out, in addition to "
                                           "model.test.score_thr; default: 0.3"})
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH",
                        help="images, videos, folders (searched with their subfolders) or quoted globs")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for pictures and results")
    parser.add_argument("--class-thr", nargs="+", action="extend", type=cli.named(Share), default=[],
                        metavar="NAME=SCORE", help="lowest score for a single class")
    parser.add_argument("--batch-size", type=cli.number(Count), metavar="N",
                        help="images or tiles at a time; default: eval.batch_size, or data.batch_size")
    parser.add_argument("--format", choices=tuple(WRITERS), default="coco",
                        help="of the results: COCO's JSON, YOLO's text files, Pascal VOC's XML files or one CSV table; "
                             "default: coco")
    parser.add_argument("--no-pictures", action="store_true", help="write results only, which is faster")
    args = parser.parse_intermixed_args()
    sources = find_files(args.input)
    cfg = cli.load_config(args.cfg, args.overrides, checkpoint=args.checkpoint)
    from kd.inference.detectors import load_named
    from kd.inference.predict import Predictor, class_thresholds, predict_files

    device = cli.choose_device(args.device)
    detector, classes = load_named(cfg, args.checkpoint, device, args.part, args.classes)
    thresholds = class_thresholds(classes, args.score_thr, args.class_thr)
    done = predict_files(Predictor(detector, cfg, thresholds, device, args.batch_size), classes, sources, args.out,
                         args.format, not args.no_pictures)
    files = WRITERS[args.format].files
    print(f"{counted(done.detections, 'detection')} on {counted(done.images, 'image')}; "
          f"{files if args.no_pictures else f'pictures, {files}'} are in {args.out}")
    if done.problems:
        raise Incomplete(f"{len(done.problems)} of {counted(len(sources), 'file')} could not be read and were left "
                         "out, see above")


if __name__ == "__main__":
    cli.run(main)
