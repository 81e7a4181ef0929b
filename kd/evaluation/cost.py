"""The cost of a detector in parameters, operations and memory, measured quickly with tensors without content."""
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from data.tables import text_table
from data.transforms import padded_size
from models import ConfigError, Detector, HeadOutputs, build_detector

from ..build import build_teacher
from ..config import Config
from ..inference.detectors import annotated_classes

SHOWN = 1000  # modules of fewer parameters and operations are left out
PARTS = ("backbone", "neck", "bbox_head")


class Maps(nn.Module):
    """A detector up to its head's outputs, or to its feature maps if it has no head."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> HeadOutputs | list[Tensor]:
        features, head = self.detector.extract_features(images), self.detector.bbox_head
        return features if head is None else head(features)


@dataclass
class Level:
    """A level of the head's predictions."""

    stride: int
    size: tuple[int, int]  # (h, w) of its map
    anchors: str           # what predictions are made from, in words


@dataclass
class Summary:
    """The cost of a detector on one image."""

    size: tuple[int, int]         # (h, w) of the image
    parameters: dict[str, int]    # by part, and by the modules in it as `part.module`
    flops: dict[str, int]         # likewise; a multiply-add is two operations
    levels: list[Level]
    weight_bytes: int             # of parameters and buffers
    activation_bytes: int | None  # see `measure`
    children: dict[str, list[str]] = field(default_factory=dict)  # by part, the modules in it

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters[part] for part in PARTS if part in self.parameters)

    @property
    def total_flops(self) -> int:
        return sum(self.flops[part] for part in PARTS if part in self.flops)


def count_parameters(module: nn.Module) -> int:
    """The number of weights of a detector, or of a part of it."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(detector: Detector, size: tuple[int, int]) -> int:
    """Floating-point operations of backbone, neck and head on one image of (height, width); a multiply-add is two."""
    return measure(detector, size)[0]


def typical_size(scale: tuple[int, int]) -> tuple[int, int]:
    """The padded size (h, w) of a landscape image that fills `scale`."""
    return padded_size((min(scale), max(scale)))


def summarize(detector: Detector, size: tuple[int, int]) -> Summary:
    """The cost of a detector on one image of (height, width)."""
    sizes, counts = run_counted(detector, size)
    flops, parameters, children = {}, {}, {}
    for part in PARTS:
        module = getattr(detector, part)
        if module is None:
            continue
        parameters[part], flops[part] = count_parameters(module), flops_of(counts, module, f"detector.{part}")
        children[part] = []
        for name, child in module.named_children():
            cost = count_parameters(child), flops_of(counts, child, f"detector.{part}.{name}")
            if max(cost) >= SHOWN:
                children[part].append(name)
                parameters[f"{part}.{name}"], flops[f"{part}.{name}"] = cost
        rest = flops[part] - sum(flops[f"{part}.{name}"] for name in children[part])
        if rest >= SHOWN:  # operations outside modules
            children[part].append("functions")
            parameters[f"{part}.functions"], flops[f"{part}.functions"] = 0, rest
    weight_bytes = sum(tensor.nbytes for tensor in [*detector.parameters(), *detector.buffers()])
    return Summary(size, parameters, flops, levels(detector, sizes), weight_bytes, measure(detector, size)[1], children)


def run_counted(detector: Detector, size: tuple[int, int]) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """The (h, w) of each level's map, and the operations by module, from a run without numbers."""
    model = Maps(detector)
    hooks = [module.register_forward_hook(lambda *_: None) for module in detector.modules()
             if isinstance(module, nn.Conv2d)]  # a hook makes each count under its own name
    try:
        with in_mode(detector, training=False), torch.no_grad(), FlopCounterMode(display=False) as counter:
            outputs = functional_call(model, without_numbers(model), (blank(detector, size),))
    finally:
        for hook in hooks:
            hook.remove()
    counts = {name.partition(".")[2]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    return [tuple(x.shape[-2:]) for x in outputs] if detector.bbox_head is None else outputs.sizes, counts


def flops_of(counts: dict[str, int], module: nn.Module, name: str) -> int:
    """Operations of a module; for a module that only holds others, the sum of theirs."""
    if name in counts:
        return counts[name]
    return sum(flops_of(counts, child, f"{name}.{key}") for key, child in module.named_children())


@contextmanager
def in_mode(detector: Detector, training: bool) -> Iterator[None]:
    before = detector.training
    detector.train(training)
    try:
        yield
    finally:
        detector.train(before)


def without_numbers(model: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers on the meta device: shapes without numbers."""
    return {name: torch.empty_like(value, device="meta", requires_grad=value.requires_grad)
            for name, value in [*model.named_parameters(), *model.named_buffers()]}


def measure(detector: Detector, size: tuple[int, int]) -> tuple[int, int | None]:
    """Operations on one image, and the bytes besides the weights that autograd keeps for the backward pass.

    Losses are not counted. The bytes are None if nothing is trained, or if batch norms wait for other processes or
    cannot learn from one image of this size.
    """
    synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in detector.modules())
    if not synchronised and any(parameter.requires_grad for parameter in detector.parameters()):
        with suppress(ValueError):  # a batch norm has one value per channel
            return _measure(detector, size, learns=True)
    return _measure(detector, size, learns=False)


def _measure(detector: Detector, size: tuple[int, int], learns: bool) -> tuple[int, int | None]:
    model = Maps(detector)
    tensors, kept = without_numbers(model), {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()  # counts once if several operations keep it
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with in_mode(detector, training=learns), torch.set_grad_enabled(learns), saved, \
            FlopCounterMode(display=False) as counter:
        outputs = functional_call(model, tensors, (blank(detector, size),))  # keeps everything alive until `del`
    for tensor in tensors.values():
        kept.pop(tensor.untyped_storage()._cdata, None)
    del outputs
    return counter.get_total_flops(), sum(kept.values()) if learns else None


def blank(detector: Detector, size: tuple[int, int]) -> Tensor:
    """An image (1, 3, H, W) without numbers."""
    return torch.empty(1, 3, *size, dtype=next(detector.parameters()).dtype, device="meta")


def levels(detector: Detector, sizes: list[tuple[int, int]]) -> list[Level]:
    """Stride, map and anchors of every level."""
    head, found = detector.bbox_head, []
    if head is None:
        return [Level(stride, size, "features only") for stride, size in zip(detector.strides, sizes, strict=True)]
    ranges = getattr(head.assigner, "regress_ranges", None)
    for i, (stride, size) in enumerate(zip(head.prior_generator.strides, sizes, strict=True)):
        if ranges is not None:
            low, high = ranges[i]
            near, far = "" if low <= 0 else f" from {low:g}", "" if high >= 1e5 else f" to {high:g}"
            anchors = f"a point, learns distances{near}{far} px"
        else:
            base = head.prior_generator.base_anchors(i)
            extent = base[:, 2:] - base[:, :2]
            sides = sorted({round(float(side)) for side in extent.prod(1).sqrt()})
            ratios = sorted({round(float(ratio), 2) for ratio in extent[:, 1] / extent[:, 0]})
            anchors = f"{len(base)} anchors a cell" if len(base) > 1 else "an anchor a cell"
            anchors += f" of side {', '.join(map(str, sides))} px"
            if ratios != [1]:
                anchors += f", height : width {', '.join(f'{ratio:g}' for ratio in ratios)}"
        found.append(Level(stride, size, anchors))
    return found


def brief(detector: Detector, size: tuple[int, int]) -> str:
    """The cost in one line; only the parameters for a sharded detector, which cannot run without numbers.

    The code of a teacher from a user's factory may not run without numbers, either.
    """
    if detector.sharded:
        return f"{count_parameters(detector) / 1e6:.2f} M parameters in shards"
    try:
        flops, activations = measure(detector, size)
    except Exception as error:
        if detector.bbox_head is not None:
            raise
        return f"{count_parameters(detector) / 1e6:.2f} M parameters, GFLOPs unknown ({type(error).__name__})"
    line = f"{count_parameters(detector) / 1e6:.2f} M parameters, {flops / 1e9:.2f} GFLOPs"
    return line if activations is None else f"{line} and {mebibytes(activations)} of activations"


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2 ** 20:.1f} MiB"


def models_of(cfg: Config) -> dict[str, Detector]:
    """The student (or, without `distill`, the detector) and the teachers of a configuration, by title, untrained.

    Raises:
        ConfigError: the class count is not known.
    """
    if cfg.model.head.get("num_classes") is None:
        classes = annotated_classes(cfg)
        if classes is None:
            raise ConfigError("model.head.num_classes", "not known: data.val has no annotations that name the "
                                                        "classes; give for example model.head.num_classes=80")
        cfg = cfg.with_num_classes(len(classes.names))
    student = build_detector(cfg.model, pretrained=False)
    found = {"student" if cfg.distill else "detector": student}
    for i, entry in enumerate(cfg.teachers):
        teacher = build_teacher(replace(entry, checkpoint=None), student.bbox_head.num_classes)
        found[f"teacher {i}" if len(cfg.teachers) > 1 else "teacher"] = teacher.requires_grad_(False)
    return found


def format_summaries(summaries: dict[str, Summary]) -> str:
    """Detectors side by side, by title: costs by module, memory, and levels."""
    h, w = next(iter(summaries.values())).size
    header = [f"on one image of {h} x {w}"]
    for title in summaries:
        header += [f"{title}: M parameters", "GFLOPs"]

    def row(name: str, *pairs: tuple[str, str]) -> list[str]:
        return [name, *(cell for pair in pairs for cell in pair)]

    def costs(key: str) -> list[tuple[str, str]]:
        return [(f"{s.parameters[key] / 1e6:.3f}", f"{s.flops[key] / 1e9:.3f}") if key in s.parameters else ("", "")
                for s in summaries.values()]

    rows = []
    for part in PARTS:
        names = list(dict.fromkeys(name for s in summaries.values() for name in s.children.get(part, ())))
        if names:
            rows += [row(part, *costs(part)), *(row(f"  {name}", *costs(f"{part}.{name}")) for name in names)]
    rows += [row("all", *((f"{s.total_parameters / 1e6:.3f}", f"{s.total_flops / 1e9:.3f}")
                          for s in summaries.values())),
             row("weights", *((mebibytes(s.weight_bytes), "") for s in summaries.values())),
             row("activations", *((mebibytes(s.activation_bytes), "") for s in summaries.values()))]
    lines = [text_table(header, rows)]
    of_levels: dict[tuple[str, ...], list[str]] = {}
    for title, summary in summaries.items():
        table = tuple(f"  stride {level.stride:<4} map {level.size[0]:>3} x {level.size[1]:<4} {level.anchors}"
                      for level in summary.levels)
        of_levels.setdefault(table, []).append(title)
    for table, titles in of_levels.items():
        lines += ["", f"levels of {' and '.join(titles)}", *table]
    return "\n".join(lines)
