"""What the benchmark times, if it is not told otherwise."""
from dataclasses import dataclass

CONFIGS = ("configs/gfl/gfl_r50_1x.yaml", "configs/retinanet/retinanet_r50_1x.yaml",
           "configs/crosskd/crosskd_r18_gfl_r50_1x.yaml", "configs/crosskd/crosskd_r18_retinanet_r50_1x.yaml")
# Size and batch by device, if not given.
SIZES = {"cpu": ((320, 416), 2), "cuda": ((800, 1333), 8), "mps": ((800, 1333), 2)}


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
