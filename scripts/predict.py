"""Detect objects in images and videos, draw them, and write them as COCO-format results."""
from pathlib import Path

from data.errors import counted
from data.inputs.find import find_files
from data.ranges import Count, Share
from kd import cli
from kd.exceptions import Incomplete


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/predict.py --cfg configs/bccd/student_gfl_r18w16.yaml "
                                 "--checkpoint runs/student_gfl_r18w16/last.pth --input photos --out found",
                        "--cfg", "--checkpoint", "--exported", "--part", "--classes", "--score-thr", "--device",
                        "overrides", cfg=cli.OPTIONAL,
                        score_thr={"help": "detections with a lower score are left out, in addition to "
                                           "model.test.score_thr; default: 0.3"})
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH",
                        help="images, videos, folders (searched with their subfolders) or quoted globs")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for pictures and results")
    parser.add_argument("--class-thr", nargs="+", action="extend", type=cli.named(Share), default=[],
                        metavar="NAME=SCORE", help="lowest score for a single class")
    parser.add_argument("--batch-size", type=cli.number(Count), metavar="N",
                        help="images at a time; default: data.batch_size")
    args = parser.parse_intermixed_args()
    sources = find_files(args.input)
    cli.check_exported(args)
    cfg = cli.load_config(args.cfg, args.overrides, checkpoint=args.checkpoint) if args.cfg or args.checkpoint else None
    from kd.inference.detectors import load_named
    from kd.inference.exported import open_named
    from kd.inference.predict import Predictor, class_thresholds, predict_files

    device, within = cli.choose_device(args.device or ("cpu" if args.exported else None)), (None, None)
    if args.exported:
        detector, classes, cfg = open_named(args.exported, cfg, device.type)
        device, within = detector.device, detector.file.about.within
    else:
        detector, classes = load_named(cfg, args.checkpoint, device, args.part, args.classes)
    thresholds = class_thresholds(classes, args.score_thr, args.class_thr)
    predictor = Predictor(detector, cfg, thresholds, device, args.batch_size, within)
    results, unread = predict_files(predictor, classes, sources, args.out)
    print(f"{counted(len(results.results), 'detection')} on {counted(len(results.images), 'image')}; pictures, "
          f"predictions.json and images.json are in {args.out}")
    if unread:
        raise Incomplete(f"{len(unread)} of {counted(len(sources), 'file')} could not be read and were left out, "
                         "see above")


if __name__ == "__main__":
    cli.run(main)
