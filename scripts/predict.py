"""Detect objects in images and videos, draw them, and write them as results in common formats."""
import sys
from pathlib import Path

from data.errors import counted, listed
from data.inputs.find import find_files
from data.ranges import Count, Share
from data.results import WRITERS
from kd import cli
from kd.exceptions import Incomplete, UsageError
from kd.inference.thresholds import read_thresholds, scores_for

SCORE_THR = 0.3


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/predict.py --cfg configs/bccd/student_gfl_r18w16.yaml "
                                 "--checkpoint runs/student_gfl_r18w16/last.pth --input photos --out found",
                        "--cfg", "--checkpoint", "--exported", "--part", "--classes", "--score-thr", "--device",
                        "overrides", cfg=cli.OPTIONAL,
                        score_thr={"default": None, "help": "detections with a lower score are left out, in addition "
                                                            f"to model.test.score_thr; default: {SCORE_THR}"})
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH",
                        help="images, videos, folders (searched with their subfolders) or quoted globs")
    parser.add_argument("--out", required=True, type=cli.out_folder, metavar="DIR",
                        help="folder for pictures and results")
    parser.add_argument("--class-thr", nargs="+", action="extend", type=cli.named(Share), default=[],
                        metavar="NAME=SCORE", help="lowest score for a single class")
    parser.add_argument("--thresholds", type=Path, metavar="FILE",
                        help="lowest score of each class, in place of --score-thr: a thresholds.json from analyze.py")
    parser.add_argument("--batch-size", type=cli.number(Count), metavar="N",
                        help="images or tiles at a time; default: eval.batch_size, or data.batch_size")
    parser.add_argument("--format", choices=tuple(WRITERS), default="coco",
                        help="of the results: COCO's JSON, YOLO's text files, Pascal VOC's XML files or one CSV table; "
                             "default: coco")
    parser.add_argument("--no-pictures", action="store_true", help="write results only, which is faster")
    args = parser.parse_intermixed_args()
    if args.thresholds is not None and args.score_thr is not None:
        raise UsageError("--thresholds has a lowest score for each class, so --score-thr has no effect: give only one "
                         "of them")
    chosen = None if args.thresholds is None else read_thresholds(args.thresholds)
    sources = find_files(args.input)
    cli.check_exported(args)
    cfg = cli.load_config(args.cfg, args.overrides, checkpoint=args.checkpoint) if args.cfg or args.checkpoint else None
    from kd.deploy.exported import open_named
    from kd.inference.detectors import load_named
    from kd.inference.predict import Predictor, class_thresholds, left_out_classes, predict_files

    device, within = cli.choose_device(args.device or ("cpu" if args.exported else None)), (None, None)
    if args.exported:
        detector, classes, cfg = open_named(args.exported, cfg, device.type)
        device, within = detector.device, detector.file.about.within
    else:
        detector, classes = load_named(cfg, args.checkpoint, device, args.part, args.classes)
    if chosen is not None:
        chosen = scores_for(args.thresholds, chosen, classes.names)
    elif args.exported and args.score_thr is None:
        chosen = detector.file.about.thresholds  # None if the file holds none
    score_thr = SCORE_THR if args.score_thr is None else args.score_thr
    thresholds = class_thresholds(classes, score_thr, args.class_thr, chosen=chosen)
    if left_out := left_out_classes(classes, thresholds):
        print(f"{args.thresholds or args.exported} has no score for {listed(left_out, ', ')}: all their boxes are left "
              "out; --class-thr NAME=SCORE gives one", file=sys.stderr)
    predictor = Predictor(detector, cfg, thresholds, device, args.batch_size, within)
    done = predict_files(predictor, classes, sources, args.out, args.format, not args.no_pictures)
    files = WRITERS[args.format].files
    print(f"{counted(done.detections, 'detection')} on {counted(done.images, 'image')}; "
          f"{args.out} has {files if args.no_pictures else f'pictures, {files}'}")
    if done.problems:
        raise Incomplete(f"{len(done.problems)} of {counted(len(sources), 'file')} could not be read and were left "
                         "out, see above")


if __name__ == "__main__":
    cli.run(main)
