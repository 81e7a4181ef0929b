"""Converts a checkpoint: ours to mmdet's or torchvision's form, or an FGD checkpoint to its student."""

import argparse
import sys

from models.checkpoint_convert import CONVERSIONS, convert_checkpoint
from models.weights import CheckpointError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="file or URL, of any format that the project reads")
    parser.add_argument("--to", required=True, choices=CONVERSIONS)
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--part", choices=("student", "teacher"), help="which model of an FGD checkpoint")
    args = parser.parse_args()
    try:
        print(convert_checkpoint(args.checkpoint, args.to, args.out, args.part))
    except (CheckpointError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
