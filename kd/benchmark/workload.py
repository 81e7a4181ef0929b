"""What the benchmark times, if it is not told otherwise."""
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass

from ..exceptions import UsageError

CONFIGS = ("configs/gfl/gfl_r50_1x.yaml", "configs/retinanet/retinanet_r50_1x.yaml",
           "configs/crosskd/crosskd_r18_gfl_r50_1x.yaml", "configs/crosskd/crosskd_r18_retinanet_r50_1x.yaml")
# Size and batch by device, if not given.
SIZES = {"cpu": ((320, 416), 2), "cuda": ((800, 1333), 8), "mps": ((800, 1333), 2)}

# The kinds of parts of `scripts/gpu.py`.
GPU_PARTS = ("tests", "matmul", "synchronisations", "parity", "step", "feed", "training", "benchmark")


@dataclass
class Workload:
    """The input of every model, and how often it is timed."""

    size: tuple[int, int]      # height, width of the images before they are padded
    batch: int                 # images per step
    boxes: int = 7             # boxes per image
    classes: int = 80          # if a configuration does not set it
    rounds: int = 9            # timed, after `warmup` that are not
    warmup: int = 2
    profiled: int = 2          # training steps that are profiled for `shares`
    amp: str | None = None     # in place of every configuration's train.amp, and of the yardstick's "none"
    input_images: int = 128    # JPEG files that the input pipeline is timed on
    eval_images: int = 500     # images with 100 detections each that the evaluation is timed on


def check_options(parser: ArgumentParser, args: Namespace) -> None:
    """Raise UsageError for options of benchmark.py that contradict each other, or that need another one."""
    def given(*names: str) -> list[str]:
        return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != parser.get_default(name)]

    steps = "cfg", "device", "size", "batch", "boxes", "rounds", "amp", "eval_images", "where"
    others = "exported", "checkpoint", "compile", "openvino", "no_ap"
    if args.report:
        if args.against is None:
            raise UsageError("--report is compared with another report: add --against OLD.json")
        if wrong := args.overrides or given(*steps, *others, "annotations", "out"):
            raise UsageError(f"--report compares two files and measures nothing: remove {wrong[0]}")
        return
    if args.annotations:
        if wrong := [*map(repr, args.overrides), *given(*steps, *others, "against")]:
            raise UsageError(f"{wrong[0]} is not for --annotations, which measures generated annotations alone: remove "
                             f"{wrong[0]}")
        return
    if args.where and args.exported:
        raise UsageError("--where shows training steps, and --exported files that detect: choose one")
    if args.where and given("eval_images"):
        raise UsageError("--eval-images is for timing the evaluation, which --where does not: remove it")
    if not args.exported:
        if wrong := given("checkpoint", "compile", "openvino", "no_ap"):
            raise UsageError(f"{wrong[0]} is for --exported: add --exported FILE, or remove {wrong[0]}")
        return
    if wrong := given("size", "batch", "boxes", "amp", "eval_images"):
        raise UsageError(f"{wrong[0]} is not for --exported, which times images of data.val as the files need them: "
                         f"remove {wrong[0]}")
    if len(args.cfg or []) != 1:
        raise UsageError("--exported needs one --cfg, the configuration of the files' detector")
    if args.device not in (None, "cpu"):
        raise UsageError(f"--device {args.device}: --exported times on the CPU: remove it")
    if args.compile and args.checkpoint is None:
        raise UsageError("--compile compiles the detector in PyTorch: add its --checkpoint")
    for path in args.exported:
        if not path.is_file():
            raise UsageError(f"no such exported file: {path}")
    if len(set(args.exported)) < len(args.exported):
        raise UsageError("--exported names a file twice: give each once")
