"""Small exported files for tests. An export takes seconds, so all tests, and all workers of pytest, share them."""
import importlib.util
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock  # a dependency of torch
from runs import ROOT, config, write_checkpoint, write_config
from small_models import enliven, small_config, small_detector

from data import generate_scenes
from data.inputs.files import make_sample
from data.sources.scenes import CLASSES
from kd.config import Config, parse_config
from kd.deploy.agreement import Agreement
from kd.deploy.export import check_samples, export
from kd.deploy.recipe import Recipe, make_recipe, with_detections
from kd.evaluation.evaluate import detect, eval_loader
from kd.inference.detectors import load_named, load_with_data

SCALE = [160, 120]  # that of the scenes: how a resize rounds depends on the processor
FIXED = {"height": 128, "width": 160}  # a fixed size takes half the time
CPU = torch.device("cpu")
OPENVINO = find_spec("openvino") is not None
# The files, each form with another head: options of `Shared.make`. Sizes vary only in those that are called any.
FORMS = {"any.onnx": {"fixed": {}}, "end2end.onnx": {"head": "RetinaHead", "end2end": 20},
         "fixed.onnx": {"head": "ATSSHead", "beside": True, "fixed": FIXED | {"batch": 2}},
         "outside.onnx": {"head": "FCOSHead", "nms": "outside"}, "any.pt2": {"fixed": {}}, "openvino.xml": {}}


def example():
    """docs/run_onnx.py as a module."""
    spec = importlib.util.spec_from_file_location("run_onnx", ROOT / "docs" / "run_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def few_levels(head: str, strides: tuple[int, ...] = (16, 32)) -> tuple[dict, dict]:
    """What makes a neck and a head of these strides, up to 32: fewer levels take less time to export."""
    neck = {"start_level": 4 - len(strides), "num_outs": len(strides)}
    if head == "FCOSHead":
        edges = [-1, 64, 1e8][-len(strides) - 1:]
        return neck, {"strides": list(strides), "regress_ranges": [list(pair) for pair in zip(edges, edges[1:])]}
    kind = {"octave_base_scale": 8, "scales_per_octave": 1, "ratios": [1.0]}
    return neck, {"anchor_generator": {"type": "AnchorGenerator", "strides": list(strides), **kind}}


def tiny_detector(head: str = "GFLHead", lively: bool = True, strides: tuple[int, ...] = (32,), classes: int = 3,
                  **test: float):
    """A detector with the fewest layers, in evaluation mode."""
    neck, section = few_levels(head, strides)
    section |= {"stacked_convs": 1, "num_classes": classes}
    detector = small_detector(head, dtype=torch.float32, neck=neck, head=section, test=test).eval()
    return enliven(detector) if lively else detector


def tiny_export(path: Path, detector, kind: str = "onnx", size: tuple[int, int] = (256, 192), opset: int = 18,
                beside: bool = False, **options) -> tuple[Agreement, Recipe]:
    """Export and check on noise and on an image of one colour, where many scores are equal.

    Args:
        size: width and height of the images.
        options: of `make_recipe`; `fixed` is by default that size, for two images.
    """
    w, h = size
    cfg = parse_config({"model": small_config(), "data": {"train": {"images": "a", "annotations": "b"}, "scale": size}})
    options = {"fixed": {"batch": 2, "height": h, "width": w}} | options
    names = [f"class {k}" for k in range(detector.bbox_head.num_classes)]
    about = make_recipe(cfg, detector, names, kind, **options)
    with_detections(detector, options.get("end2end"))
    noise = torch.randint(0, 256, (3, h, w), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    samples = [make_sample(image, i, [size]) for i, image in enumerate((noise, torch.full((3, h, w), 99).byte()))]
    return export(detector, path, kind, about, samples, opset, beside)[0], about


class Shared:
    """Detectors on three scenes, with configurations and checkpoints, and their exported files."""

    def __init__(self, root: Path):
        self.root = root
        self.scenes = root / "scenes"
        with FileLock(root / "lock"):
            if not self.scenes.exists():
                generate_scenes(self.scenes, train=1, val=3, size=(120, 160))

    def model(self, head: str = "GFLHead") -> tuple[Path, Path, dict]:
        """Paths of configuration and checkpoint, and the configuration."""
        cfg = config(self.scenes, head=head)
        neck, section = few_levels(head)
        cfg["model"]["neck"] |= neck
        cfg["model"]["head"] |= section
        cfg["model"]["test"] = {"score_thr": 0.4, "nms_pre": 100, "max_per_img": 50}
        cfg["data"]["scale"] = SCALE
        if head == "RetinaHead":
            del cfg["model"]["head"]["norm_cfg"]
        path, checkpoint, truth = (self.root / f"{head}{suffix}" for suffix in (".yaml", ".pth", ".json"))
        with FileLock(self.root / "lock"):
            if not truth.exists():
                write_checkpoint(checkpoint, cfg)
                truth.write_text(json.dumps(self.half(parse_config(cfg), checkpoint)))
            cfg["data"]["val"]["annotations"] = str(truth)
            if not path.exists():
                write_config(path, cfg)
        return path, checkpoint, cfg

    def half(self, cfg: Config, checkpoint: Path) -> dict:
        """Annotations of data.val: half of what the detector finds there, a little moved, so that it has an AP."""
        content = json.loads(Path(cfg.data.val.annotations).read_text())
        detector, dataset = load_with_data(cfg, checkpoint, CPU)
        found = [(image_id, row) for image_id, rows in detect(detector, eval_loader(cfg, dataset), CPU)
                 for row in rows[::2].tolist() if min(row[2:4]) > 4]
        return content | {"annotations": [
            {"id": k, "image_id": image_id, "category_id": dataset.category_ids[int(label)],
             "bbox": [x + 1, y, w - 1, h], "area": w * h, "iscrowd": 0}
            for k, (image_id, (x, y, w, h, _, label)) in enumerate(found, start=1)]}

    def file(self, name: str) -> Path:
        """The exported file of this name, see `FORMS`."""
        path = self.root / name
        with FileLock(self.root / f"{name}.lock"):
            if not path.exists():
                self.make(path, **FORMS[name])
        return path

    def make(self, path: Path, head: str = "GFLHead", beside: bool = False, **options) -> None:
        """Export; `options` are those of `make_recipe`."""
        kind = {".pt2": "pt2", ".xml": "openvino"}.get(path.suffix, "onnx")
        _, checkpoint, cfg = self.model(head)
        cfg = parse_config(cfg)
        detector, classes = load_named(cfg, checkpoint, CPU)
        assert classes.names == CLASSES
        about = make_recipe(cfg, detector, classes.names, kind, **{"fixed": FIXED} | options)
        with_detections(detector, options.get("end2end"))
        export(detector, path, kind, about, check_samples(cfg, about, []), beside=beside)
