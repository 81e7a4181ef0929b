"""Write a detector as an ONNX, torch.export or OpenVINO file and check it against PyTorch. docs/run_onnx.py shows how
to run an ONNX file."""
from pathlib import Path
from typing import Annotated

from data.ranges import Count, Range, Share
from kd import cli
from kd.deploy.options import check_int8, check_options
from kd.inference.thresholds import read_thresholds, scores_for


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/export.py --cfg configs/bccd/student_gfl_r18w16.yaml "
                                 "--checkpoint runs/student_gfl_r18w16/last.pth --out student.onnx",
                        "--cfg", "--checkpoint", "--part", "--classes", "overrides", cfg=cli.OPTIONAL)
    parser.add_argument("--out", required=True, type=cli.out_file, metavar="FILE", help="file to write")
    parser.add_argument("--format", choices=("onnx", "pt2", "openvino"),
                        help="default: pt2 (torch.export) if --out ends in .pt2, openvino if in .xml, otherwise onnx")
    parser.add_argument("--nms", choices=("inside", "outside"), default="inside",
                        help="do non-maximum suppression inside the file, or leave it to the caller; default: inside")
    parser.add_argument("--end2end", type=cli.number(Count), metavar="N",
                        help="suppress inside the file, and always give N detections, and their number as num_dets; "
                             "unused ones have score 0 and label -1")
    parser.add_argument("--fixed", nargs="+", action="extend", type=cli.named(Count), default=[], metavar="NAME=SIZE",
                        help="sizes of the input that do not vary: batch, height, width; images are resized to fit")
    parser.add_argument("--opset", type=cli.number(Annotated[int, Range(18, 23)]), metavar="N",
                        help="ONNX operator set, from 18 to 23; default: 18")
    parser.add_argument("--weights", choices=("inside", "beside"), default="inside",
                        help="beside: in a second file FILE.data, as always above 2 GB; default: inside")
    parser.add_argument("--check", nargs="+", type=Path, default=[], metavar="IMAGE",
                        help="images to check on; default: the first two of data.val, or noise if there are none")
    parser.add_argument("--thresholds", type=Path, metavar="FILE",
                        help="lowest score of each class, for programs that use the file: a thresholds.json from "
                             "analyze.py")
    parser.add_argument("--int8", action="store_true",
                        help="also write FILE.int8.onnx, whose convolutions compute with 8-bit integers, and compare "
                             "its AP on data.val")
    parser.add_argument("--calibrate", type=cli.number(Count), metavar="N",
                        help="images of data.train that give the ranges of --int8; default: 128")
    parser.add_argument("--max-drop", type=cli.number(Share), metavar="X",
                        help="the AP that --int8 may lose, as a fraction: 0.01 is one point; default: 0.01")
    args = parser.parse_intermixed_args()
    beside, fixed = args.weights == "beside", dict(args.fixed)
    kind = check_options(args.out, args.format, args.opset, beside, args.nms, args.end2end, fixed)
    check_int8(args.out, kind, args.int8, args.calibrate, args.max_drop)
    chosen = None if args.thresholds is None else read_thresholds(args.thresholds)
    cfg = cli.load_config(args.cfg, args.overrides, *["train", "val"] * args.int8, checkpoint=args.checkpoint)
    from kd.deploy.export import check_samples, export
    from kd.deploy.recipe import make_recipe, with_detections
    from kd.evaluation.quantize import check_data, write_int8
    from kd.inference.detectors import load_named

    if args.int8:
        check_data(cfg)
    detector, classes = load_named(cfg, args.checkpoint, cli.choose_device("cpu"), args.part, args.classes,
                                   placed=False)
    if chosen is not None:
        chosen = scores_for(args.thresholds, chosen, classes.names)
    about = make_recipe(cfg, detector, classes.names, kind, args.nms, args.end2end, fixed, chosen)
    with_detections(detector, args.end2end)
    agreement, files = export(detector, args.out, kind, about, check_samples(cfg, about, args.check), args.opset or 18,
                              beside)
    written = " and ".join(f"{file}, {file.stat().st_size / 2 ** 20:.1f} MiB" for file in files)
    print(f"wrote {written}. Checked: {agreement}")
    if args.int8:
        found = write_int8(cfg, args.out, args.calibrate or 128, 0.01 if args.max_drop is None else args.max_drop)
        print(f"wrote {found.paths[1]}, {found.in_float} in float besides the first and the last ones\n\n{found}")
        found.check()


if __name__ == "__main__":
    cli.run(main)
