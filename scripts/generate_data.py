"""Write the built-in data set of rendered scenes in COCO format."""
from pathlib import Path
from typing import Annotated

from data.ranges import Count, Range, Seed
from data.sources.shapes import SHAPES
from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/generate_data.py --out datasets/scenes --train 400 --val 100")
    parser.add_argument("--out", type=cli.out_folder, default=Path("datasets/scenes"),
                        help="folder to write to; default: datasets/scenes")
    parser.add_argument("--train", type=cli.number(Count), default=400, help="images to train on; default: 400")
    parser.add_argument("--val", type=cli.number(Count), default=100, help="images to evaluate on; default: 100")
    parser.add_argument("--size", type=cli.number(Annotated[int, Range(32)]), nargs=2, default=(160, 160),
                        metavar=("H", "W"), help="image size in pixels; default: 160 160")
    parser.add_argument("--seed", type=cli.number(Seed), default=0, help="the same seed gives the same bytes")
    parser.add_argument("--classes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES), metavar="NAME",
                        help=f"shapes that get boxes, the others become background; default: {' '.join(SHAPES)}")
    args = parser.parse_args()
    from data import generate_scenes

    root = generate_scenes(args.out, args.train, args.val, tuple(args.size), args.seed, args.classes)
    print(f"wrote {args.train} training and {args.val} validation images to {root}")


if __name__ == "__main__":
    cli.run(main)
