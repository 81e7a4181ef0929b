"""Check the data of a configuration: all annotations, and every image by decoding it. Exit code 2 if any is wrong.
With --pictures, also draw training images as annotated and as they are fed to the detector, augmented."""
import sys
from pathlib import Path

from data.errors import DataError, counted
from data.ranges import Count
from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/check_data.py --cfg configs/bccd/student_gfl_r18w16.yaml", "--cfg",
                        "overrides")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="folder for pictures of training images")
    parser.add_argument("--count", type=cli.number(Count), default=8, help="how many pictures; default: 8")
    args = parser.parse_intermixed_args()
    cfg = cli.load_config(args.cfg, args.overrides)
    from data import build_dataset
    from data.coco.check import check_augmentation, check_data, format_check

    checks = check_data(cfg.data)
    print("\n\n".join(map(format_check, checks)))
    if count := sum(len(check.problems) for check in checks):
        raise DataError(f"{counted(count, 'problem')} in the data: correct them, see above")
    train_set = build_dataset(cfg.data, "train", training=True, seed=cfg.train.seed, epochs=cfg.train.epochs)
    if warning := check_augmentation(train_set):
        print(warning, file=sys.stderr)
    if args.pictures:
        from kd.inference.draw import write_training_pictures

        files = write_training_pictures(cfg.data, args.pictures, args.count, cfg.train.seed, cfg.train.epochs)
        print("\n".join(map(str, files)))


if __name__ == "__main__":
    cli.run(main)
