"""Show what a configuration's models cost: parameters, operations and memory by module, and their heads' levels.
Or list the published checkpoints (--zoo), or the distillation methods with what each of them needs (--methods)."""
from data.ranges import Count
from data.tables import text_table
from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/summary.py --cfg configs/crosskd/crosskd_r18_gfl_r50_1x.yaml "
                                 "model.head.num_classes=80", "--cfg", "--checkpoint", "overrides",
                        cfg=cli.OPTIONAL, checkpoint={"required": False, "help": "a checkpoint that holds its "
                                                      "configuration, or zoo:NAME, in place of --cfg"})
    parser.add_argument("--zoo", action="store_true", help="list the published checkpoints, which zoo:NAME stands for")
    parser.add_argument("--methods", action="store_true", help="list the distillation methods, with what each needs")
    parser.add_argument("--size", type=cli.number(Count), nargs=2, metavar=("H", "W"),
                        help="image size, rounded up to multiples of 32; default: a landscape image that fills "
                             "data.scale")
    args = parser.parse_intermixed_args()
    if args.zoo:
        from models.checkpoints.zoo import zoo_table

        print(text_table(*zoo_table()))
        return
    if args.methods:
        from kd.methods.table import method_table

        print(text_table(*method_table()))
        return
    if args.cfg is None and args.checkpoint is None:
        parser.error("give --cfg, --checkpoint, --zoo or --methods")
    cfg = cli.load_config(args.cfg, args.overrides, checkpoint=args.checkpoint)
    from data.transforms import padded_size
    from kd.evaluation.cost import format_summaries, models_of, summarize, typical_size

    size = padded_size(args.size) if args.size else typical_size(cfg.input.scale)
    print(format_summaries({title: summarize(model, size) for title, model in models_of(cfg).items()}))


if __name__ == "__main__":
    cli.run(main)
