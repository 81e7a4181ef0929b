"""Write docs/configuration.md, every key of a configuration, from the code."""
from pathlib import Path

from data.output import write_text
from kd import cli


def main() -> None:
    parser = cli.parser(__doc__, "python scripts/write_reference.py")
    parser.add_argument("--out", type=cli.out_file, default=Path("docs/configuration.md"), metavar="FILE",
                        help="default: docs/configuration.md")
    args = parser.parse_args()
    from kd.config.reference import configuration_reference

    write_text(args.out, configuration_reference())
    cli.wrote(args.out)


if __name__ == "__main__":
    cli.run(main)
