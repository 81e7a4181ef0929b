"""Check the data of a configuration: all annotations, and every image by decoding it. Exit code 2 if any is wrong."""
import argparse

from data.check import check_data, format_check
from kd.config.load import load_config
from kd.terminal import cli


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/check_data.py --cfg configs/bccd/student_gfl_r18w16.yaml")
    parser.add_argument("--cfg", required=True, metavar="FILE", help="configuration, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    checks = check_data(load_config(args.cfg, args.overrides).get("data"))
    print("\n\n".join(map(format_check, checks)))
    if count := sum(len(check.problems) for check in checks):
        raise cli.UsageError(f"{count} {'problem' if count == 1 else 'problems'} in the data: correct them, see above")


if __name__ == "__main__":
    cli.run(main)
