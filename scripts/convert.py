"""Convert a checkpoint of any known format to mmdet's, torchvision's or detectron2's, or to .safetensors, or an FGD
checkpoint to its student. Beside a .safetensors file it writes model_card.md, a page about the detector."""

from kd import cli
from kd.exceptions import UsageError


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/convert.py --checkpoint runs/student/last.pth --to mmdet "
                                 "--out student.pth", "--cfg", "--checkpoint", "--part", "overrides",
                        cfg={"required": False, "help": "configuration of the checkpoint, to put into a .safetensors "
                             "file or to compare with torchvision's or detectron2's; default: the one in the "
                             "checkpoint"})
    parser.add_argument("--to", required=True, choices=("mmdet", "torchvision", "detectron2", "safetensors", "student"),
                        help="torchvision, detectron2: for RetinaNet; safetensors: to publish a detector; student: the "
                             "student of an FGD checkpoint, in mmdet's format")
    parser.add_argument("--out", required=True, type=cli.out_file, help="file to write")
    args = parser.parse_intermixed_args()
    if args.overrides and args.cfg is None:
        raise UsageError(f"{args.overrides[0]}: settings replace those of --cfg, which is missing")
    if args.cfg is not None and args.to in ("mmdet", "student"):
        raise UsageError(f"--cfg has no effect with --to {args.to}: leave it out")
    cli.check_early(args.cfg, args.overrides, checkpoint=args.checkpoint)
    from kd.config import load_config
    from kd.inference.convert import convert

    cfg = None if args.cfg is None else load_config(args.cfg, args.overrides)
    print("\n".join(convert(args.checkpoint, args.to, args.out, args.part, cfg)))


if __name__ == "__main__":
    cli.run(main)
