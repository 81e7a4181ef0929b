"""Numbers and texts of a configuration: each has a range or a list of choices, and what is just outside is refused."""
import re
from collections.abc import Iterator
from math import inf, nan
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from runs import config, write_config

from data.ranges import NotEmpty, Range
from kd.config import Config, load_config, parse_config
from kd.config.reference import collect
from models.build import ConfigError, OneOf, check_value, parameters

# Any number: the means of box deltas; and sizes of boxes, where a negative number means that all are kept.
FREE_NUMBERS = {"target_means", "min_bbox_size"}
# Names and paths.
FREE_TEXTS = {"annotations", "cache", "cfg", "checkpoint", "dir", "factory", "frozen", "images", "init", "init_classes",
              "name", "nodes", "student_modules", "teacher_modules", "torchvision", "weights"}
GIVEN = {"student", "teacher", "model"}  # networks, which the program gives
PLACES = collect(Config)
COMPONENTS = {call: name for choice, _ in PLACES.tables.values() for name, call in choice.table.items()}
CALLS = [*PLACES.sections, *COMPONENTS, *(choice.common for choice, _ in PLACES.tables.values() if choice.common)]


def numbers(hint: Any) -> Iterator[tuple[Any, Range | None]]:
    """The plain types in a type hint, each with its range."""
    if get_origin(hint) is Annotated:
        plain, mark = get_args(hint)
        if isinstance(mark, Range):
            yield plain, mark
        elif not isinstance(mark, OneOf):
            yield from numbers(plain)
    elif get_origin(hint) is not Literal and get_args(hint):
        for part in get_args(hint):
            yield from numbers(part)
    else:
        yield hint, None


KEYS = [(call.__name__, name, kind, allowed) for call in CALLS for name, (hint, _) in parameters(call).items()
        for kind, allowed in dict.fromkeys(numbers(hint)) if kind in (int, float) and name not in FREE_NUMBERS]


def test_there_are_numbers():
    assert len(KEYS) > 150 and len(COMPONENTS) > 40
    assert {"flip", "grad_clip", "gamma", "lr", "weight", "score_thr", "topk", "target_stds", "tau", "alpha_fgd",
            "num_outs", "strides", "reg_max", "T", "num_groups"} <= {key[1] for key in KEYS}


@pytest.mark.parametrize("section, name, kind, allowed", KEYS, ids=lambda value: str(value))
def test_the_neighbours_of_a_range_are_refused(section, name, kind, allowed):
    assert allowed is not None, f"{section}.{name} has no range: use one of data/ranges.py"
    hint = Annotated[kind, allowed]
    inside = [*[allowed.low] * (not allowed.open), min(allowed.low + 1, allowed.high), *[allowed.high] * (
        allowed.high != inf)]
    for value in inside:
        assert check_value(kind(value), hint, "key") == value
    for value in outside(kind, allowed):
        with pytest.raises(ConfigError, match="^key: must be "):
            check_value(value, hint, "key")


def outside(kind: type, allowed: Range) -> list:
    """What a number of this type and range must not be."""
    near = [allowed.low - 1, -10 ** 30, *[allowed.low] * allowed.open, *[allowed.high + 1] * (allowed.high != inf)]
    return [kind(value) for value in near] + [True, None, "1"] + [nan, inf, -inf, 10 ** 400] * (kind is float)


def test_a_text_has_choices():
    without = [f"{call.__name__}.{name}" for call in CALLS for name, (hint, _) in parameters(call).items()
               for kind, _ in numbers(hint) if kind is str and name not in FREE_TEXTS]
    assert not without, f"{without}: use Literal"


def test_a_list_has_an_entry():
    may_be_empty = {"milestones", "methods", "frozen", "loggers"}
    without = [f"{call.__name__}.{name}" for call in CALLS for name, (hint, _) in parameters(call).items()
               if name not in may_be_empty and fits([], hint)]
    assert not without, f"{without}: use Some, or NotEmpty()"


# --- every key of every section and component, through a whole configuration ---


def put(tree: Any, path: tuple, value: Any) -> Any:
    """A copy of the tree with a value at a path; missing mappings and lists are created."""
    if not path:
        return value
    first, *rest = path
    if first == 0:
        return [put(tree[0] if tree else {}, rest, value)]
    return (tree or {}) | {first: put((tree or {}).get(first), rest, value)}


def below(hint: Any, listed: bool = False) -> Iterator[tuple[Any, bool]]:
    """The sections and tables of types in a type hint, and whether they are in a list."""
    mark = get_args(hint)[1] if get_origin(hint) is Annotated else None
    if isinstance(mark, OneOf) or hint in PLACES.sections:
        yield mark or hint, listed
    elif get_origin(hint) is not Literal:
        for part in get_args(hint):
            yield from below(part, listed or get_origin(hint) is list)


def find_places(call: Any, cfg: dict, path: tuple, found: dict[Any, tuple[dict, tuple]]) -> None:
    """For everything below a class: the first configuration that holds it, and its path there."""
    if call in found:
        return
    found[call] = cfg, path
    for name, (hint, _) in parameters(call).items():
        for inner, listed in below(hint):
            place = (*path, name, 0) if listed else (*path, name)
            if not isinstance(inner, OneOf):
                find_places(inner, put(cfg, place, {}), place, found)
                continue
            for kind, each in inner.table.items():
                if not inner.takes or each.takes in inner.takes:
                    find_places(each, put(cfg, place, {"type": kind}), place, found)
            if inner.common:
                find_places(inner.common, put(cfg, place, {"type": kind}), place, found)


ALL: dict[Any, tuple[dict, tuple]] = {}
find_places(Config, {"model": {"backbone": {"type": "ResNet", "depth": 18}, "head": {"type": "GFLHead"}}}, (), ALL)


def spoiled(hint: Any) -> Iterator[Any]:
    """Values that do not fit a type hint: instead of it, or inside a list of it."""
    if get_origin(hint) is Annotated:
        plain, mark = get_args(hint)
        if isinstance(mark, Range):
            yield from outside(plain, mark)
        elif isinstance(mark, NotEmpty):
            yield from ([], *spoiled(plain))
        elif isinstance(mark, OneOf):
            yield from ({"type": "Nothing"}, {"type": None}, 3, [])
    elif get_origin(hint) is list:
        yield from ([value] for value in spoiled(get_args(hint)[0]))
        yield 3
    elif get_origin(hint) is tuple:
        kinds = get_args(hint)
        yield from ([value] if kinds[-1] is Ellipsis else [value] * len(kinds) for value in spoiled(kinds[0]))
        if kinds[-1] is not Ellipsis:
            yield [1] * (len(kinds) + 1)
    elif get_origin(hint) is Literal:
        yield from ("nothing", 3.5, [], True if 1 in get_args(hint) else 1)
    elif hint in (float, int, str, bool):
        yield from {float: ["1", True, nan], int: ["1", True, 1.5], str: [1, True, []], bool: [1, "yes", None]}[hint]
    elif get_args(hint):  # a union: what none of the alternatives takes
        yield from (value for part in get_args(hint) if part is not type(None) for value in spoiled(part)
                    if not fits(value, hint))
    elif hint is not type(None):
        yield 3


def fits(value: Any, hint: Any) -> bool:
    try:
        check_value(value, hint, "key")
    except ConfigError:
        return False
    return True


def test_everything_has_a_place():
    assert set(ALL) == set(CALLS)


@pytest.mark.parametrize("call", ALL, ids=lambda call: call.__name__)
def test_every_key_refuses_what_it_does_not_take(call):
    cfg, path = ALL[call]
    tried = 0
    for name, (hint, _) in parameters(call).items():
        if name in GIVEN:
            continue
        key = ".".join(map(str, (*path, name)))
        for value in spoiled(hint):
            with pytest.raises(ConfigError) as error:
                parse_config(put(cfg, (*path, name), value))
            assert error.value.key.startswith(key), (key, value, str(error.value))
            assert re.search("must (be|have)|unknown type|missing", error.value.problem), (key, value, str(error.value))
            assert "\n" not in str(error.value)
            tried += 1
    assert tried


MISPLACED = [
    ("RetinaHead", "model.head.loss_cls={type: GIoULoss}",
     "model.head.loss_cls.type: GIoULoss compares boxes, and here logits and labels are compared; use FocalLoss"),
    ("RetinaHead", "model.head.bbox_coder={type: DistancePointBBoxCoder}",
     'model.head.bbox_coder.type: unknown type "DistancePointBBoxCoder"; did you mean "DeltaXYWHBBoxCoder"?'),
    ("ATSSHead", "model.head.bbox_coder={type: DistancePointBBoxCoder}", 'did you mean "DeltaXYWHBBoxCoder"?'),
    ("FCOSHead", "model.head.bbox_coder={type: DeltaXYWHBBoxCoder}", "model.head.bbox_coder: unknown key"),
    ("GFLHead", "model.head.bbox_coder={type: DeltaXYWHBBoxCoder}", "model.head.bbox_coder: unknown key"),
    ("FCOSHead", "model.head.assigner={type: MaxIoUAssigner}", "model.head.assigner: unknown key"),
    ("FCOSHead", "model.head.anchor_generator={type: AnchorGenerator}", "model.head.anchor_generator: unknown key"),
    ("GFLHead", "model.head.assigner={type: GFLHead}", 'unknown type "GFLHead"; valid: ATSSAssigner, MaxIoUAssigner'),
    ("GFLHead", "model.neck={type: GFLHead}", 'model.neck.type: unknown type "GFLHead"; valid: FPN'),
    ("GFLHead", "model.neck={type: ResNet}", 'model.neck.type: unknown type "ResNet"; valid: FPN'),
    ("GFLHead", "model.head={type: ResNet}", 'model.head.type: unknown type "ResNet"'),
    ("GFLHead", "model.backbone={type: FPN}", 'model.backbone.type: unknown type "FPN"'),
    ("GFLHead", "model.head.loss_cls={type: KDQualityFocalLoss}", "KDQualityFocalLoss compares logits of both sides"),
    ("GFLHead", "model.head.loss_bbox={type: KnowledgeDistillationKLDivLoss}", "use L1Loss, SmoothL1Loss, IoULoss"),
    ("GFLHead", "distill.methods.0.loss_cls_kd={type: FocalLoss}", "distill.methods.0.loss_cls_kd.type: FocalLoss "
     "compares logits and labels, and here logits of both sides are compared; use KDQualityFocalLoss"),
    ("GFLHead", "distill.methods.0.loss_reg_kd={type: FocalLoss}", "distill.methods.0.loss_reg_kd.type: FocalLoss"),
    ("GFLHead", "distill.methods.0.loss_center_kd={type: KDQualityFocalLoss}", "use CrossEntropyLoss"),
    ("GFLHead", "distill.methods.0={type: GIoULoss}", 'distill.methods.0.type: unknown type "GIoULoss"'),
]


@pytest.mark.parametrize("head, override, message", MISPLACED)
def test_a_component_in_the_place_of_another_is_named(head, override, message, tmp_path):
    cfg = config(tmp_path, head=head, distill={"teacher": {"cfg": "x.yaml", "checkpoint": None},
                                               "methods": [{"type": "CrossKD"}]})
    with pytest.raises(ConfigError) as error:
        load_config(write_config(tmp_path / "cfg.yaml", cfg), [override])
    assert message in str(error.value) and f'(override "{override}")' in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part, message", [
    ("assigner={type: MaxIoUAssigner, pos_iou_thr: 0.3}", "assigner.neg_iou_thr: 0.4 must not be above pos_iou_thr"),
    ("anchor_generator={type: AnchorGenerator, strides: [8], ratios: [1], scales: [8], base_sizes: [4, 8]}",
     "anchor_generator.base_sizes: must have one entry per stride, 1 in total"),
    ("anchor_generator={type: AnchorGenerator, strides: [8], ratios: [1]}",
     "anchor_generator: must have either scales, or both octave_base_scale and scales_per_octave"),
    ("loss_cls={type: QualityFocalLoss, use_sigmoid: false}", "loss_cls: QualityFocalLoss: use_sigmoid must be true"),
])
def test_arguments_of_a_part_that_do_not_fit_each_other(part, message, tmp_path):
    path = write_config(tmp_path / "cfg.yaml", config(tmp_path))
    with pytest.raises(ConfigError) as error:
        load_config(path, [f"model.head.{part}"])
    assert str(error.value).startswith(f"model.head.{message}")


@pytest.mark.parametrize("override, message", [
    ("data.flip=1.5", "data.flip: must be from 0 to 1, not 1.5"),
    ("data.scale=[0,0]", "data.scale.0: must be at least 1, not 0"),
    ("data.multi_scale=[[64,64],[64,-1]]", "data.multi_scale.1.1: must be at least 1, not -1"),
    ("train.grad_clip=-1", "train.grad_clip: must be above 0, not -1"),
    ("train.seed=-1", "train.seed: must be from 0 to 4294967295, not -1"),
    ("train.epochs=0", "train.epochs: must be at least 1, not 0"),
    ("schedule.gamma=-1", "schedule.gamma: must be above 0, not -1"),
    ("schedule.milestones=[1,-1]", "schedule.milestones.1: must be at least 0, not -1"),
    ("optimizer.lr=.nan", "optimizer.lr: must be a finite number, not nan"),
    ("optimizer.lr=-0.01", "optimizer.lr: must be at least 0, not -0.01"),
    ("model.test.score_thr=5", "model.test.score_thr: must be from 0 to 1, not 5"),
    ("model.preprocess.std=[1,1,0]", "model.preprocess.std.2: must be above 0, not 0"),
    ("model.head.assigner={type: ATSSAssigner, topk: 0}", "model.head.assigner.topk: must be at least 1, not 0"),
    ("model.head.anchor_generator={type: AnchorGenerator, strides: [], ratios: [1]}",
     "model.head.anchor_generator.strides: must be a list with at least one entry, not []"),
    ("model.head.norm_cfg.num_groups=0", "model.head.norm_cfg.num_groups: must be at least 1, not 0"),
    ("model.head.loss_bbox={type: IoULoss, mode: cubic}",
     'model.head.loss_bbox.mode: must be one of log, linear, square, not text (\'cubic\')'),
    ("model.backbone.depth=true", "model.backbone.depth: must be one of 18, 34, 50, 101, 152, not true/false (True)"),
])
def test_what_the_message_says(override, message, tmp_path):
    path = write_config(tmp_path / "cfg.yaml", config(tmp_path))
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    assert str(error.value) == f'{message} (override "{override}")'


def test_defaults_are_within_their_ranges():
    for call in CALLS:
        for name, (hint, default) in parameters(call).items():
            if isinstance(default, (bool, int, float, str, tuple, dict)) and default != {}:
                check_value(default, hint, f"{call.__name__}.{name}")
