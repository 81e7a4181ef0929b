"""Write the built-in data set of rendered scenes in COCO format."""
from pathlib import Path

from data import generate_scenes
from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/generate_data.py --out datasets/scenes --train 400 --val 100")
    parser.add_argument("--out", type=Path, default=Path("datasets/scenes"),
                        help="folder to write to; default: datasets/scenes")
    parser.add_argument("--train", type=int, default=400, help="images to train on; default: 400")
    parser.add_argument("--val", type=int, default=100, help="images to evaluate on; default: 100")
    parser.add_argument("--size", type=int, nargs=2, default=(160, 160), metavar=("H", "W"),
                        help="image size in pixels; default: 160 160")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    args = parser.parse_args()
    if min(args.size) < 32 or min(args.train, args.val) < 1:
        parser.error("--size needs at least 32 pixels, --train and --val at least 1 image")
    root = generate_scenes(args.out, args.train, args.val, tuple(args.size), args.seed)
    print(f"wrote {args.train} training and {args.val} validation images to {root}")


if __name__ == "__main__":
    cli.run(main)
