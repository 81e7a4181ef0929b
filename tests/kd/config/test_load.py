"""Configurations: inheritance, overrides, YAML 1.2, and errors that name the key and the file."""
import copy
import json
import pickle

import pytest
from runs import ROOT

from kd import build_distiller
from kd.config import load_config, parse_config
from models import ConfigError

MODEL = """
model:
  backbone: {type: ResNet, depth: 18}
  neck: {type: FPN, out_channels: 64, num_outs: 5, start_level: 1, add_extra_convs: on_output}
  head: {type: GFLHead, num_classes: 3, assigner: {type: ATSSAssigner, topk: 9}}
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path
    return write


def test_inheritance_merges_mappings_and_replaces_the_rest(write):
    write("base.yaml", MODEL + "schedule: {warmup_steps: 7, milestones: [1, 2]}\n")
    write("other.yaml", "train: {epochs: 3}\n")
    cfg = load_config(write("cfg.yaml", "_base_: [base.yaml, other.yaml]\nschedule: {milestones: [5]}\n"
                                        "model: {head: {assigner: {topk: 4}}}\n"))
    assert cfg["schedule"] == {"warmup_steps": 7, "milestones": [5]}
    assert cfg["model"]["head"]["assigner"] == {"type": "ATSSAssigner", "topk": 4}
    assert cfg["train"] == {"epochs": 3}
    assert "_base_" not in cfg


def test_another_type_replaces_what_it_inherits(write):
    write("base.yaml", MODEL)
    cfg = load_config(write("cfg.yaml", "_base_: base.yaml\nmodel: {head: {type: RetinaHead, num_classes: 2}}\n"))
    assert cfg["model"]["head"] == {"type": "RetinaHead", "num_classes": 2}


def test_yaml_is_1_2(write):
    path = write("cfg.yaml", MODEL + "optimizer: {lr: 1e-3, weight_decay: 5e-6}\n")
    cfg = load_config(path, ["model.neck.add_extra_convs=off"])
    assert cfg["optimizer"] == {"lr": 0.001, "weight_decay": 5e-6}
    assert cfg["model"]["neck"]["add_extra_convs"] == "off"


def test_overrides(write):
    distill = "distill: {teacher: {checkpoint: null, cfg: x.yaml}, methods: [{type: Replaced}, {type: FGD}]}\n"
    cfg = load_config(write("cfg.yaml", MODEL + distill), [
        "distill.methods.0={type: CrossKD, name: a}", "distill.methods.1.temp=0.25", "train.amp=bf16", "eval.every=2"])
    assert cfg["distill"]["methods"] == [{"type": "CrossKD", "name": "a"}, {"type": "FGD", "temp": 0.25}]
    assert cfg["train"] == {"amp": "bf16"} and cfg["eval"] == {"every": 2}


@pytest.mark.parametrize("override, expected", [
    ("model.head.assigner.topkk=3", 'model.head.assigner.topkk: unknown key; did you mean "topk"?'),
    ("optimiser.lr=3", 'optimiser: unknown key; did you mean "optimizer"?'),
    ("optimizer.type=SDG", 'unknown type "SDG"; did you mean "SGD"?'),
    ("optimizer.lr=fast", "optimizer.lr: must be a number, not text ('fast')"),
    ("train.epochs=1.5", "train.epochs: must be an integer"),
    ("train.amp=fp8", "train.amp: must be one of none, fp16, bf16"),
    ("model.head.loss_cls={type: FocalLos}", 'unknown type "FocalLos"; did you mean "FocalLoss"?'),
    ("model.preprocess.mean=[1, 2, x]", "model.preprocess.mean.2: must be a number"),
    ("model.backbone.style=cafe", "model.backbone.style: must be one of pytorch, caffe"),
    ("model.test.max_per_image=3", 'did you mean "max_per_img"?'),
    ("data.scale=[1, 2, 3]", "data"),
    ("distill.methods=[]", "distill.teacher: missing"),
    ("distill={teacher: {cfg: x.yaml}, methods: []}", "distill.teacher.checkpoint: missing"),
    ("nonsense", 'override "nonsense" is not of the form key=value'),
    ("train.epochs=!!int x", "line 1 is not valid YAML: 'x' cannot be read as int"),
    ("train.epochs=!!float x", "line 1 is not valid YAML: 'x' cannot be read as float"),
    ("train.sync_bn=!!bool x", "line 1 is not valid YAML: 'x' cannot be read as bool"),
    ("train.epochs=!!timestamp x", "line 1 is not valid YAML: 'x' cannot be read as timestamp"),
    (f"train.epochs={'9' * 5000}", "is not valid YAML: '999"),
    ("optimizer.lr=1e300", "lr: must be a number that fits into 32 bits, from 1.2e-38 to 3.4e+38, not 1e+300"),
    ("model.preprocess.std=[1, 1e-300, 1]", "model.preprocess.std.1: must be a number that fits into 32 bits"),
    ("model.head.anchor_generator={type: AnchorGenerator, strides: [8], ratios: [1.0e-5], scales: [8]}",
     "model.head.anchor_generator.ratios.0: must be from 0.001 to 1000, not 1e-05"),
    ("train.keep=1001", "train.keep: must be from 1 to 1000, not 1001"),
    ("model.neck.num_outs=1000000", "model.neck.num_outs: must be from 1 to 1000, not 1000000"),
    ("model.head.stacked_convs=1000000000", "model.head.stacked_convs: must be from 0 to 1000, not 1000000000"),
    (f"train.epochs={2 ** 32}", f"train.epochs: must be an integer of at most 32 bits, not {2 ** 32}"),
    ('train={"a\\nb": 1}', "train.a b: unknown key"),
    (f"train={{epochs: {list(range(9999))}}}", "train.epochs: must be an integer, not a list ([0, 1, 2, 3"),
    (f"model.head.type={'x' * 9999}", 'model.head.type: unknown type "xxx'),
])
def test_wrong_settings_are_one_line_that_says_what_and_where(write, override, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(write("cfg.yaml", MODEL), [override])
    message = str(caught.value)
    assert expected in message and "\n" not in message and len(message) < 1000
    assert "override" in message or "cfg.yaml" in message


@pytest.mark.parametrize("override, expected", [
    ("schedule.milestones.0.1=3", "names a part of a single value; leave out .1"),
    ("schedule.milestones.²=3", "must name an entry of this list; valid: 0, 1"),
    ("schedule.milestones.00=3", 'must name an entry of this list; did you mean "0"?'),
])
def test_overrides_of_list_entries_that_do_not_exist(write, override, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(write("cfg.yaml", MODEL + "schedule: {milestones: [1, 2]}\n"), [override])
    assert expected in str(caught.value)


def test_a_bad_key_names_the_file_that_said_it(write):
    write("base.yaml", MODEL.replace("topk: 9", "topk: many"))
    with pytest.raises(ConfigError, match=r"topk: must be an integer.*base\.yaml"):
        load_config(write("cfg.yaml", "_base_: base.yaml\ntrain: {epochs: 3}\n"))


def test_files_that_cannot_be_read(write, tmp_path):
    with pytest.raises(ConfigError, match="missing.yaml does not exist"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        load_config(write("a.yaml", "_base_: nowhere.yaml\n"))
    with pytest.raises(ConfigError, match="inherits from itself"):
        load_config(write("b.yaml", "_base_: b.yaml\n"))
    with pytest.raises(ConfigError, match="line 2 is not valid YAML"):
        load_config(write("c.yaml", "model: {\n  a: ]\n"))
    with pytest.raises(ConfigError, match="e.yaml is nested too deeply, or contains itself"):
        load_config(write("e.yaml", "model: &m {backbone: *m}\n"))
    with pytest.raises(ConfigError, match="f.yaml is nested too deeply"):
        load_config(write("f.yaml", "model: " + "[" * 2000 + "]" * 2000 + "\n"))
    for i, base in enumerate(["1", "null", "{a: b.yaml}", "[b.yaml, 3]", "[[b.yaml]]"]):
        with pytest.raises(ConfigError, match=rf"^_base_: must be a path or a list of paths, not .*g{i}\.yaml\)$"):
            load_config(write(f"g{i}.yaml", f"_base_: {base}\n"))
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for name, said, reason in [("loop.yaml", "loop.yaml", "Too many levels"), ("a\0b", "a b", "embedded null byte"),
                               ("", "", "Is a directory")]:
        with pytest.raises(ConfigError, match=f"^configuration file .*{said} cannot be read: {reason}"):
            load_config(tmp_path / name)
    with pytest.raises(ConfigError, match="keys and values at its top level"):
        load_config(write("d.yaml", "- 1\n"))


def test_yaml_cannot_build_objects(write, tmp_path):
    marker = tmp_path / "marker"
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write("a.yaml", f"model: !!python/object/apply:os.system ['touch {marker}']\n"))
    assert not marker.exists()


@pytest.mark.parametrize("override, key, part", [
    ("data.batchsize=2", "data.batchsize", 'unknown key; did you mean "batch_size"'),
    ("data.train.folder=x", "data.train.folder", "unknown key"),
    ("data.train={images: x}", "data.train.annotations", "missing"),
])
def test_bad_data_sections(override, key, part):
    with pytest.raises(ConfigError) as error:
        load_config(ROOT / "configs/bccd/student_gfl_r18w16.yaml", [override])
    assert error.value.key == key and part in str(error.value)


def test_sections_are_typed_and_the_mapping_stays_as_it_was_written():
    cfg = load_config(ROOT / "configs/bccd/crosskd_gfl_r18w16_r18w32.yaml", ["data.scale=[96, 64]"])
    assert cfg.train.epochs == 15 and cfg.data.scale == (96, 64) and cfg.eval.tta.flip is False
    assert [teacher.cfg for teacher in cfg.teachers] == ["configs/bccd/teacher_gfl_r18w32.yaml"]
    assert cfg["data"]["scale"] == [96, 64] and "tta" not in cfg.get("eval", {}) and cfg.get("nothing") is None
    counted = cfg.with_num_classes(3)
    assert counted.model.head["num_classes"] == counted["model"]["head"]["num_classes"] == 3
    assert "num_classes" not in cfg.model.head and "num_classes" not in cfg["model"]["head"]
    assert counted.with_num_classes(5) == counted


def test_a_mapping_that_was_changed_is_read_again():
    """Some tools take a published configuration and make its teacher untrained."""
    cfg = load_config(ROOT / "configs/bccd/crosskd_gfl_r18w16_r18w32.yaml")
    cfg["model"]["head"]["num_classes"] = 3
    cfg["distill"]["teacher"]["checkpoint"] = None
    cfg["train"] = {"epochs": 2}
    assert parse_config(cfg).train.epochs == 2
    distiller = build_distiller(cfg)
    assert distiller.student.bbox_head.num_classes == distiller.teacher.bbox_head.num_classes == 3


def test_aliases_that_repeat_without_end_are_refused(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="cfg.yaml is not valid YAML: its aliases .* more than 100000 entries"):
        load_config(write("cfg.yaml", MODEL + "\n".join(lines)))
    cfg = load_config(write("cfg.yaml", MODEL + "schedule: {milestones: &m [1, 2]}\ntrain: {epochs: 3}\n"))
    assert cfg.schedule.milestones == [1, 2]


def test_a_configuration_is_a_dictionary(write):
    """The one that was written, for whoever records, prints or merges it."""
    cfg = load_config(write("cfg.yaml", MODEL))
    assert cfg == dict(cfg) == json.loads(json.dumps(cfg)) == copy.deepcopy(cfg) and list(cfg) == ["model"]
    assert cfg | {"train": {"epochs": 3}} == {"model": cfg["model"], "train": {"epochs": 3}}
    assert pickle.loads(pickle.dumps(cfg)).train.epochs == cfg.train.epochs == 12


def test_an_option_of_a_method_is_named_with_its_source():
    with pytest.raises(ConfigError) as error:
        load_config(ROOT / "configs/bccd/fgd_gfl_r18w16_r18w32.yaml", ["distill.methods.0.every=0"])
    assert str(error.value) == ('distill.methods.0.every: must be at least 1, not 0 '
                                '(override "distill.methods.0.every=0")')


def test_a_distiller_needs_a_distill_section(write):
    with pytest.raises(ConfigError, match="distill: missing"):
        build_distiller(load_config(write("cfg.yaml", MODEL)))


def test_data_paths_start_where_they_say(write, tmp_path, monkeypatch):
    """At the file for `./`, at $DENSEKD_DATA for other relative paths, and at the current folder for an override."""
    for name in ("sets", "here"):
        (tmp_path / name).mkdir()
    write("sets/val.json", "")
    monkeypatch.setenv("DENSEKD_DATA", str(tmp_path / "sets"))
    monkeypatch.chdir(tmp_path / "here")
    write("sets/data.yaml", "data:\n  train: {images: ./../pictures, annotations: ../x.json}\n"
                            "  val: {images: [/none, ./], annotations: [./none.json, val.json, ./val.json]}\n")
    cfg = load_config(write("cfg.yaml", "_base_: sets/data.yaml\n" + MODEL))
    assert cfg["data"] == {"train": {"images": str(tmp_path / "pictures"), "annotations": "../x.json"},
                           "val": {"images": str(tmp_path / "sets"), "annotations": "val.json"}}
    cfg = load_config(tmp_path / "cfg.yaml", ["data.val.annotations=./a.json", "data.train.images=[/none, /nor]"])
    assert cfg.data.val.annotations == str(tmp_path / "here" / "a.json") and cfg.data.train.images == "/none"


@pytest.mark.parametrize("value", ["[]", "[1, 2]", "{a: b}", "3"])
def test_data_paths_that_are_none(write, value):
    with pytest.raises(ConfigError, match=r"data.train.images.*cfg.yaml"):
        load_config(write("cfg.yaml", MODEL + f"data: {{train: {{images: {value}, annotations: a.json}}}}\n"))


def test_data_paths_in_a_list_of_data_sets(write, tmp_path):
    path = write("list.yaml", MODEL + "data: {train: [{images: ./x, annotations: y.json}, {images: [none, ./here], "
                              "annotations: ./z.json}], val: {images: ./v, annotations: w}}\n")
    (tmp_path / "here").mkdir()
    first, second = load_config(path)["data"]["train"]
    assert first == {"images": str(tmp_path / "x"), "annotations": "y.json"}
    assert second == {"images": str(tmp_path / "here"), "annotations": str(tmp_path / "z.json")}
