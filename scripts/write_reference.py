"""Write docs/configuration.md, every key of a configuration, from the code."""
import argparse
from pathlib import Path

from kd.config.reference import configuration_reference
from kd.terminal import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python scripts/write_reference.py")
    parser.add_argument("--out", type=Path, default=Path("docs/configuration.md"), metavar="FILE",
                        help="default: docs/configuration.md")
    args = parser.parse_args()
    args.out.write_text(configuration_reference(), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
