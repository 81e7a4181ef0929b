"""Turn annotated images into COCO-format files with splits, or download COCO 2017."""
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Annotated

from data import find_data
from data.errors import DataError, counted
from data.ranges import FewOrNone, Range, Seed
from data.sources.download import COCO_2017, COCO_SERVER, prepare_coco
from data.sources.formats import READERS, read_labelled
from kd import cli
from kd.exceptions import UsageError

FORMATS = {"voc": "Pascal VOC: Annotations/*.xml and JPEGImages/, or XML files beside their images",
           "yolo": "YOLO: images/ and labels/*.txt, and the classes' names in a YAML file or classes.txt",
           "csv": "CSV files with the columns file, x1, y1, x2, y2 and class, or with those of other tools (filename, "
                  "xmin, ymin, xmax, ymax, label); commas, semicolons or tabs separate them",
           "labelme": "LabelMe: a JSON file for each image; rectangles, polygons and circles become boxes",
           "cvat": "CVAT for images 1.1: annotations.xml and images/; polygons, ellipses and masks become boxes"}
ANNOTATIONS = {"voc": "folder of the XML files", "yolo": "folder of the text files", "csv": "CSV file, or their folder",
               "labelme": "folder of the JSON files", "cvat": "XML file, or the folder of several"}


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/prepare_data.py yolo --input photos --out photos/coco")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in READERS:
        text = FORMATS[name]
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--input", required=True, type=Path, metavar="PATH",
                             help="folder with the images and their labels")
        command.add_argument("--out", required=True, type=cli.out_folder, metavar="DIR",
                             help="folder for NAME.json of each split, and data.yaml; images stay where they are")
        command.add_argument("--annotations", type=Path, metavar="PATH",
                             help=f"{ANNOTATIONS[name]}, if it has another name (in --input) or is elsewhere")
        command.add_argument("--images", type=Path, metavar="DIR",
                             help="folder of the images, if it has another name (in --input) or is elsewhere")
        command.add_argument("--encoding", type=encoding, metavar="NAME",
                             help="encoding of text files that do not say it themselves, for example cp1252, gbk or "
                                  "latin-1; default: UTF-8")
        command.add_argument("--split", nargs="+", type=cli.named(Annotated[float, Range(0, 1, open=True)]),
                             metavar="NAME=SHARE",
                             help="split at random, for example train=0.8 val=0.1 test=0.1; default: the splits of the "
                                  "data, otherwise train=0.8 val=0.2")
        command.add_argument("--seed", type=cli.number(Seed), default=0, help="seed of the random split; default: 0")
        command.add_argument("--workers", type=cli.number(FewOrNone), default=2,
                             help="processes that decode the images; default: 2")
        command.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
        if name == "yolo":
            command.add_argument("--names", type=Path, metavar="FILE", help="YAML file, or one name per line")
    text = "COCO 2017: download (19 GiB), check and unpack; an interrupted download continues where it stopped"
    coco = commands.add_parser("coco", help=text, description=text)
    coco.add_argument("--out", type=cli.out_folder, metavar="DIR", help="default: coco in $DENSEKD_DATA or datasets/")
    coco.add_argument("--parts", nargs="+", choices=COCO_2017, default=list(COCO_2017), help="default: all")
    coco.add_argument("--server", default=COCO_SERVER, metavar="URL", help="where the archives are")
    coco.add_argument("--keep-archives", action="store_true", help="do not delete archives after unpacking")
    args = parser.parse_args()
    if args.command == "coco":
        print("\n".join(prepare_coco(args.out or find_data("coco"), args.parts, args.server, args.keep_archives)))
        return
    folder = read_labelled(args.command, args.input, getattr(args, "names", None), args.annotations, args.images,
                           args.encoding)
    from data.coco.check import format_check
    from data.sources.prepare import prepare

    checks = prepare(folder, args.out, shares(args.split), args.seed, args.skip_unreadable, args.workers)
    print("\n\n".join(map(format_check, checks)))
    print(f"\nA configuration uses these data with\n  _base_: [..., {(args.out / 'data.yaml').resolve()}]\n"
          "docs/own_data.md explains the next steps")
    if count := sum(len(check.problems) for check in checks):
        raise DataError(f"{counted(count, 'problem')} in the data, see above")


def encoding(name: str) -> str:
    """The name of a text encoding, for argparse."""
    try:
        b"a".decode(name)
    except LookupError:
        raise ArgumentTypeError(f"unknown encoding {name!r}: give one like cp1252, gbk or latin-1") from None
    except UnicodeError:  # in UTF-16, a single byte is no text
        pass
    return name


def shares(pairs: list[tuple[str, float]] | None) -> dict[str, float] | None:
    """The share of each split; None without any."""
    for name, share in pairs or ():
        if name not in ("train", "val", "test"):
            raise UsageError(f"--split {name}={share}: a split must be called train, val or test")
    return dict(pairs) if pairs else None


if __name__ == "__main__":
    cli.run(main)
