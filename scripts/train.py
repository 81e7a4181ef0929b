"""Train a detector, alone or distilled from a teacher."""
from pathlib import Path

from kd import cli
from kd.exceptions import UsageError


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/train.py --cfg configs/bccd/student_gfl_r18w16.yaml train.epochs=3",
                        "--cfg", "--device", "overrides", cfg={"required": False})
    parser.add_argument("--work-dir", type=Path,
                        help="where checkpoints and logs go; default: runs/NAME for a --cfg of NAME.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the work dir")
    parser.add_argument("--resume-from", type=Path, metavar="PATH", help="go on from this checkpoint")
    parser.add_argument("--check", action="store_true",
                        help="show what would be trained, judge it, write nothing but --out, and exit")
    parser.add_argument("--out", type=cli.out_file, metavar="FILE", help="with --check: write the judgement as JSON")
    parser.add_argument("--replay", type=Path, metavar="FILE",
                        help="repeat a step whose loss was not finite and show where it broke; needs --cfg only for "
                             "a teacher with a factory")
    args = parser.parse_intermixed_args()
    if args.out and not args.check:
        parser.error("--out is for --check, which it is not given with")
    if args.replay:
        trusted = None if args.cfg is None else cli.load_config(args.cfg, args.overrides)
        from kd.engine.replay import replay

        print(replay(args.replay, cli.choose_device(args.device), trusted))
        return
    if args.cfg is None:
        parser.error("--cfg is required, except with --replay")
    goes_on = args.resume or args.resume_from
    cfg = cli.load_config(args.cfg, args.overrides, "train", "val", *(() if goes_on else ("init",)),
                          checkpoint=args.resume_from)
    if args.check:
        from kd.engine.check import check

        cli.say(check(cfg, cli.choose_device(args.device), args.out))
        return
    from kd.engine.train import train
    from kd.processes.distributed import restarted
    from kd.work_dir.checkpoint import newest_checkpoint

    work_dir = args.work_dir or Path("runs") / Path(args.cfg).stem
    resume_from = args.resume_from or (newest_checkpoint(work_dir) if args.resume else None)
    if resume_from is None and restarted():  # by torchrun --max-restarts, after a process was lost
        resume_from = newest_checkpoint(work_dir, missing_ok=True)
    if resume_from is None and any(work_dir.glob("last*.pth")):
        raise UsageError(f"{work_dir} holds a run already: --resume goes on with it, or give another --work-dir")
    train(cfg, work_dir, cli.choose_device(args.device), resume_from)


if __name__ == "__main__":
    cli.run(main)
