"""Short names for published checkpoints: `zoo:gfl_r101_2x` goes wherever a path or an address of a checkpoint goes."""
import re
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from data.errors import one_line

from .unpickler import CheckpointError

PREFIX = "zoo:"
_MMDET = "https://download.openmmlab.com/mmdetection/v2.0/"
_ROOT = Path(__file__).resolve().parents[2]
# The end of a name from torch hub or OpenMMLab: the start of the file's SHA-256, unless it is a date.
_CHECKSUM = re.compile(r"-(?!20[0-3]\d{5}\.)([0-9a-f]{8,64})\.\w+$")


class Published(NamedTuple):
    """A checkpoint that others published, trained on COCO."""

    url: str
    cfg: str   # the configuration with its architecture, in the project's folder
    ap: float  # on val2017, in points, as its authors publish it


ZOO = {
    "atss_r101_1x": Published(f"{_MMDET}atss/atss_r101_fpn_1x_coco/atss_r101_fpn_1x_20200825-dfcadd6f.pth",
                              "configs/atss/atss_r101_1x.yaml", 41.5),
    "fcos_r101_ms_2x": Published(f"{_MMDET}fcos/fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco/"
                                 "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6.pth",
                                 "configs/fcos/fcos_r101_ms_2x.yaml", 40.8),
    "fcos_rx101_64x4d_ms_2x": Published(f"{_MMDET}fcos/fcos_x101_64x4d_fpn_gn-head_mstrain_640-800_2x_coco/"
                                        "fcos_x101_64x4d_fpn_gn-head_mstrain_640-800_2x_coco-ede514a8.pth",
                                        "configs/fcos/fcos_rx101_64x4d_ms_2x.yaml", 42.6),
    "gfl_r50_1x": Published(f"{_MMDET}gfl/gfl_r50_fpn_1x_coco/gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth",
                            "configs/gfl/gfl_r50_1x.yaml", 40.2),
    "gfl_r101_2x": Published(f"{_MMDET}gfl/gfl_r101_fpn_mstrain_2x_coco/"
                             "gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth",
                             "configs/gfl/gfl_r101_1x.yaml", 44.7),
    "paa_r50_1x": Published(f"{_MMDET}paa/paa_r50_fpn_1x_coco/paa_r50_fpn_1x_coco_20200821-936edec3.pth",
                            "configs/atss/paa_r50_1x.yaml", 40.4),
    "paa_r101_2x": Published(f"{_MMDET}paa/paa_r101_fpn_2x_coco/paa_r101_fpn_2x_coco_20200821-6829f96b.pth",
                             "configs/atss/paa_r101_1x.yaml", 43.5),
    "paa_r101_ms_3x": Published(f"{_MMDET}paa/paa_r101_fpn_mstrain_3x_coco/"
                                "paa_r101_fpn_mstrain_3x_coco_20210122_084202-83250d22.pth",
                                "configs/atss/paa_r101_1x.yaml", 45.1),
    "retinanet_r50_1x": Published(f"{_MMDET}retinanet/retinanet_r50_fpn_1x_coco/"
                                  "retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth",
                                  "configs/retinanet/retinanet_r50_1x.yaml", 36.5),
    "retinanet_r101_2x": Published(f"{_MMDET}retinanet/retinanet_r101_fpn_2x_coco/"
                                   "retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth",
                                   "configs/retinanet/retinanet_r101_2x.yaml", 38.9),
    "retinanet_rx101_64x4d_1x": Published(f"{_MMDET}retinanet/retinanet_x101_64x4d_fpn_1x_coco/"
                                          "retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth",
                                          "configs/retinanet/retinanet_rx101_64x4d_1x.yaml", 41.0),
    "detectron2_retinanet_r50_1x": Published("https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/"
                                             "retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl",
                                             "configs/detectron2/retinanet_r50_1x.yaml", 37.4),
    "torchvision_retinanet_r50": Published("https://download.pytorch.org/models/"
                                           "retinanet_resnet50_fpn_coco-eeacb38b.pth",
                                           "configs/torchvision/retinanet_r50.yaml", 36.4)}


def published(source: str) -> Published | None:
    """The entry that `zoo:NAME` stands for, None for a path or another address; CheckpointError for an unknown name."""
    if not source.startswith(PREFIX):
        return None
    name = source.removeprefix(PREFIX)
    if name not in ZOO:
        near = get_close_matches(name.lower(), ZOO, 1)
        advice = f"did you mean {PREFIX}{near[0]}?" if near else f"known: {', '.join(PREFIX + each for each in ZOO)}"
        raise CheckpointError(f"no published checkpoint is called {one_line(source, 80)}; {advice}")
    return ZOO[name]


def published_config(source: str) -> Path | None:
    """The configuration file of `zoo:NAME`; None for another checkpoint. Errors as in `published`."""
    entry = published(source)
    return None if entry is None else _ROOT / entry.cfg


def checksum(url: str) -> str | None:
    """The start of a file's SHA-256, where the file's name ends with it."""
    found = _CHECKSUM.search(url)
    return found[1] if found else None


def zoo_table() -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table for people."""
    return (["name", "AP", "configuration", "SHA-256", "address"],
            [[PREFIX + name, f"{entry.ap:.1f}", entry.cfg, checksum(entry.url) or "(none)", entry.url]
             for name, entry in ZOO.items()])
