"""Detect objects in images and videos, draw them, and write them as COCO-format results."""
from pathlib import Path

from data.inputs.files import find_files
from data.ranges import Count, Share
from kd import cli, load_config
from kd.exceptions import Incomplete
from kd.inference.detectors import load_named
from kd.inference.predict import Predictor, class_thresholds, predict_files


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/predict.py --cfg configs/bccd/student_gfl_r18w16.yaml "
                                 "--checkpoint runs/student_gfl_r18w16/last.pth --input photos --out found",
                        "--cfg", "--checkpoint", "--part", "--classes", "--score-thr", "--device", "overrides",
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
    cfg, device = load_config(args.cfg, args.overrides), cli.choose_device(args.device)
    sources = find_files(args.input)
    detector, classes = load_named(cfg, args.checkpoint, device, args.part, args.classes)
    thresholds = class_thresholds(classes, args.score_thr, args.class_thr)
    results, unread = predict_files(Predictor(detector, cfg, thresholds, device, args.batch_size), classes, sources,
                                    args.out)
    print(f"{len(results.results)} detections on {len(results.images)} images; pictures, predictions.json and "
          f"images.json are in {args.out}")
    if unread:
        raise Incomplete(f"{len(unread)} of {len(sources)} files could not be read and were left out, see above")


if __name__ == "__main__":
    cli.run(main)
