"""Measure the time of training steps, with torchvision's RetinaNet for comparison, of inference, of the parts of both,
of the input pipeline and of the evaluation; with --where, of every part and operator of a step; with --exported, of
exported files; with --annotations, of data sets of millions of boxes. With --against, compare the report with an
earlier one."""
import json
import sys
from pathlib import Path
from typing import Annotated

from data.output import write_text
from data.ranges import Count, Range
from kd import cli
from kd.benchmark.against import check_kinds, compare, read_report
from kd.benchmark.workload import CONFIGS, SIZES, Workload, check_options
from kd.early import check_early


def main() -> None:
    parser = cli.parser(
        __doc__, "python scripts/benchmark.py --cfg configs/gfl/gfl_r50_1x.yaml --rounds 5 --out bench.json",
        "--cfg", "--device", "overrides",
        cfg={"required": False, "action": "append",
             "help": f"configuration; may be given several times; default: {', '.join(CONFIGS)}"})
    parser.add_argument("--size", type=cli.number(Annotated[int, Range(64)]), nargs=2, metavar=("H", "W"),
                        help="image size in pixels; default: 320 416 on a CPU, 800 1333 on a GPU")
    parser.add_argument("--batch", type=cli.number(Count), metavar="N",
                        help="images per step; default: 2 on a CPU, 8 on a GPU")
    parser.add_argument("--boxes", type=cli.number(Count), default=Workload.boxes, metavar="K",
                        help="boxes per image; default: %(default)s")
    parser.add_argument("--rounds", type=cli.number(Count), default=Workload.rounds, metavar="R",
                        help="rounds that are timed; the medians are shown; default: %(default)s")
    parser.add_argument("--amp", choices=("none", "bf16", "fp16"), help="replaces train.amp of the configurations")
    parser.add_argument("--eval-images", type=cli.number(Count), default=Workload.eval_images, metavar="N",
                        help="images, with 100 detections each, for timing the evaluation; default: %(default)s")
    parser.add_argument("--where", action="store_true",
                        help="show where the time of a training step goes, and the time of its convolutions alone")
    parser.add_argument("--exported", action="append", type=Path, metavar="FILE",
                        help="time this file of export.py on the CPU instead; may be given several times")
    parser.add_argument("--checkpoint", metavar="PATH", help="with --exported: also time PyTorch with these weights")
    parser.add_argument("--compile", action="store_true",
                        help="with --exported and --checkpoint: also time torch.compile, which takes a minute")
    parser.add_argument("--openvino", action="store_true",
                        help="with --exported: also time each ONNX file with OpenVINO")
    parser.add_argument("--no-ap", action="store_true", help="with --exported: do not compute the AP on data.val")
    parser.add_argument("--annotations", choices=("coco", "objects365"),
                        help="measure the start, the loader workers and the evaluation with generated annotations like "
                             "these instead: 118,000 images, or 1,700,000 (takes minutes and 4 GB of disk)")
    parser.add_argument("--against", type=Path, metavar="OLD.json",
                        help="compare with a report that --out wrote: faster, slower or no difference, row by row")
    parser.add_argument("--report", type=Path, metavar="NEW.json",
                        help="with --against: compare this report, and measure nothing")
    parser.add_argument("--out", type=cli.out_file, metavar="FILE", help="also write the report as JSON")
    args = parser.parse_intermixed_args()
    check_options(parser, args)
    old, new = (path and read_report(path) for path in (args.against, args.report))
    check_kinds(args, old, new)
    if new is not None:
        print(compare(old, new, args.against))
        return
    for path in [] if args.annotations else args.cfg or CONFIGS:
        check_early(path, args.overrides, ["val"] if args.exported and not args.no_ap else [], args.checkpoint)

    def note(text: str) -> None:
        print(text, "...", file=sys.stderr)

    if args.annotations:
        from kd.benchmark.scale import format_scale, measure_scale

        report = measure_scale(args.annotations, note)
        print(format_scale(report))
    elif args.exported:
        from kd.benchmark.exported import format_exported, run_exported

        cfg = cli.load_config(args.cfg[0], args.overrides, checkpoint=args.checkpoint)
        report = run_exported(cfg, args.exported, args.checkpoint, args.compile, not args.no_ap,
                              args.openvino, args.rounds, note=note)
        print(format_exported(report))
    else:
        from kd.benchmark.run import format_report, run_benchmark
        from kd.benchmark.where.report import format_where, run_where

        device = cli.choose_device(args.device)
        size, batch = SIZES[device.type]
        work = Workload(tuple(args.size or size), args.batch or batch, boxes=args.boxes, rounds=args.rounds,
                        amp=args.amp, eval_images=args.eval_images)
        measure, show = (run_where, format_where) if args.where else (run_benchmark, format_report)
        report = measure(args.cfg or CONFIGS, device, work, args.overrides, note=note)
        print(show(report))
    if old is not None:
        print(f"\n{compare(old, report, args.against)}")
    if args.out:
        write_text(args.out, json.dumps(report, indent=1))


if __name__ == "__main__":
    cli.run(main)
