"""Write a detector as an ONNX or torch.export file and check it against PyTorch. docs/run_onnx.py shows how to run an
ONNX file."""
from pathlib import Path

from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/export.py --cfg configs/bccd/student_gfl_r18w16.yaml "
                                 "--checkpoint runs/student_gfl_r18w16/last.pth --out student.onnx",
                        "--cfg", "--checkpoint", "--part", "--classes", "overrides", cfg=cli.OPTIONAL)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--format", choices=("onnx", "pt2"),
                        help="default: pt2 (torch.export) if --out ends in .pt2, otherwise onnx")
    parser.add_argument("--nms", choices=("inside", "outside"), default="inside",
                        help="do non-maximum suppression inside the file, or leave it to the caller; default: inside")
    parser.add_argument("--check", nargs="+", type=Path, default=[], metavar="IMAGE",
                        help="images to check on; default: the first two of data.val, or noise if there are none")
    args = parser.parse_intermixed_args()
    cfg = cli.load_config(args.cfg, args.overrides, checkpoint=args.checkpoint)
    from kd.inference.detectors import load_named
    from kd.inference.export import check_samples, export, recipe

    kind = args.format or ("pt2" if args.out.suffix == ".pt2" else "onnx")
    detector, classes = load_named(cfg, args.checkpoint, cli.choose_device("cpu"), args.part, args.classes)
    about = recipe(cfg, detector, classes.names, kind, args.nms)
    agreement = export(detector, args.out, kind, about, check_samples(cfg, about, args.check))
    print(f"wrote {args.out}, {args.out.stat().st_size / 2 ** 20:.1f} MiB. Checked: {agreement}")


if __name__ == "__main__":
    cli.run(main)
