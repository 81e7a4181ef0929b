"""Convert a checkpoint of any format to mmdet's or torchvision's, or an FGD checkpoint to its student."""
import argparse

from kd.terminal import cli
from models.checkpoints.convert import CONVERSIONS, convert_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/convert.py --checkpoint runs/student/last.pth --to mmdet --out student.pth")
    parser.add_argument("--checkpoint", required=True, help="file or URL, in any format that the project reads")
    parser.add_argument("--to", required=True, choices=CONVERSIONS,
                        help="torchvision is for RetinaNet; student writes an FGD file's student as mmdet's")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--part", choices=("student", "teacher"), help="which model of an FGD checkpoint")
    args = parser.parse_args()
    print(convert_checkpoint(args.checkpoint, args.to, args.out, args.part))


if __name__ == "__main__":
    cli.run(main)
