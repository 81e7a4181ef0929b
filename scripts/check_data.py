"""Check the data of a configuration: all annotations, and every image by decoding it. Exit code 2 if any is wrong."""
from data.errors import DataError, counted
from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/check_data.py --cfg configs/bccd/student_gfl_r18w16.yaml", "--cfg",
                        "overrides")
    args = parser.parse_intermixed_args()
    cfg = cli.load_config(args.cfg, args.overrides)
    from data.check import check_data, format_check

    checks = check_data(cfg.data)
    print("\n\n".join(map(format_check, checks)))
    if count := sum(len(check.problems) for check in checks):
        raise DataError(f"{counted(count, 'problem')} in the data: correct them, see above")


if __name__ == "__main__":
    cli.run(main)
