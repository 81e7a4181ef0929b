"""Check and measure everything that needs a GPU, once: tests, mixed precision, synchronisations, the time of training
steps in several ways, a training run. Each part is kept as soon as it is done, and a second call goes on."""
import sys
from pathlib import Path

from data.ranges import Positive
from kd import cli
from kd.benchmark.workload import CONFIGS, GPU_PARTS, SIZES
from kd.early import check_early

DRY = {"size": (64, 96), "batch": 2, "rounds": 1, "warmup": 1, "input_images": 4, "eval_images": 4}


def main() -> None:
    parser = cli.parser(
        __doc__, "python scripts/gpu.py --minutes 12", "--cfg", "--device",
        cfg={"required": False, "action": "append",
             "help": f"time the steps of these configurations; default: {', '.join(CONFIGS)}"},
        device={"choices": ("cpu", "cuda"), "help": "default: cuda; cpu tries everything else on tiny images"})
    parser.add_argument("--minutes", type=cli.number(Positive), default=12.0,
                        help="parts that would take longer than what is left are not started; default: %(default)g")
    parser.add_argument("--only", nargs="+", choices=GPU_PARTS, default=GPU_PARTS, metavar="PART",
                        help=f"run only these of {', '.join(GPU_PARTS)}")
    parser.add_argument("--out", type=cli.out_folder, metavar="DIR",
                        help="folder for the results; default: results/gpu, or runs/gpu with --device cpu")
    args = parser.parse_args()
    for path in args.cfg or CONFIGS:
        check_early(path, [], [], None)
    device = cli.choose_device(args.device or "cuda")
    from kd.benchmark.gpu.run import Job, failures, run_gpu
    from kd.benchmark.gpu.table import format_gpu
    from kd.benchmark.workload import Workload
    from kd.exceptions import Incomplete

    configs = args.cfg or CONFIGS
    if device.type == "cuda":
        size, batch = SIZES["cuda"]
        job = Job(device, Workload(size, batch, rounds=7, warmup=2, input_images=32, eval_images=100), configs)
    else:
        overrides = ["train.epochs=1", "data.train.first=4", "data.val.first=4", "data.scale=[96,64]"]
        job = Job(device, Workload(**DRY), configs, overrides=overrides, matmul_side=256)
    out = args.out or Path("results/gpu" if device.type == "cuda" else "runs/gpu")
    report, path = run_gpu(job, out, args.minutes, args.only, lambda text: print(text, "...", file=sys.stderr))
    print(format_gpu(report))
    cli.wrote(path, path.with_suffix(".md"))
    if bad := failures(report):
        raise Incomplete(bad)


if __name__ == "__main__":
    cli.run(main)
