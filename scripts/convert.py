"""Convert a checkpoint of any known format to mmdet's or torchvision's, or an FGD checkpoint to its student."""
from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/convert.py --checkpoint runs/student/last.pth --to mmdet "
                                 "--out student.pth", "--checkpoint", "--part")
    parser.add_argument("--to", required=True, choices=("mmdet", "torchvision", "student"),
                        help="torchvision: for RetinaNet; student: the student of an FGD checkpoint, in mmdet's format")
    parser.add_argument("--out", required=True, help="file to write")
    args = parser.parse_args()
    cli.check_early(None, (), checkpoint=args.checkpoint)
    from models.checkpoints.convert import convert_checkpoint

    print(convert_checkpoint(args.checkpoint, args.to, args.out, args.part))


if __name__ == "__main__":
    cli.run(main)
