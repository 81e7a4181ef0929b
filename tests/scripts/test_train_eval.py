"""train.py and eval.py from the command line: what they write, resuming, signals, and bad input."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from processes import context
from runs import ROOT, config, model, run_script, script, write_checkpoint, write_config

from data import generate_scenes
from kd.optim import build_optimizer, load_optimizer


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=12, val=4, size=(64, 64))


@pytest.fixture(scope="session")
def trained(scenes, tmp_path_factory):
    """A teacher that the script trained in its own process: (configuration, work dir, output)."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_config(folder / "cfg.yaml", config(scenes))
    done = subprocess.run([sys.executable, ROOT / "scripts/train.py", "--cfg", path, "--work-dir", folder / "run",
                           "--device", "cpu"], capture_output=True, text=True, check=True)
    return path, folder / "run", done.stdout


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_what_a_run_leaves(trained):
    _, work_dir, printed = trained
    lines = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert {"epoch", "step", "lr", "loss_cls", "loss_bbox", "loss_dfl", "loss", "images_per_second"} <= steps[0].keys()
    assert [line["epoch"] for line in lines if "AP" in line] == [0, 1]
    first, second = (line for line in lines if "AP" in line)
    assert 0 < first["training_seconds"] < second["training_seconds"] < 600
    assert 1e8 < first["peak_memory_bytes"] <= second["peak_memory_bytes"]
    state = torch.load(work_dir / "last.pth", weights_only=True)
    assert (state["seconds"], state["peak_memory"]) == (second["training_seconds"], second["peak_memory_bytes"])
    provenance = json.loads((work_dir / "run.json").read_text())
    assert provenance["machine"]["processes"] == 1
    assert provenance["config"]["model"]["head"]["num_classes"] == 6  # from the annotations
    assert provenance["versions"]["torch"] == torch.__version__
    assert (work_dir / "last.pth").exists() and (work_dir / "best.pth").exists()
    assert "12 training images" in (work_dir / "train.log").read_text()
    assert "12 training images" in printed and "AP50" in printed
    last, best = work_dir / "last.pth", work_dir / "best.pth"
    assert f"done, the last checkpoint is {last}, the best checkpoint is {best}" in printed


def test_eval_gives_the_figures_of_training(trained, tmp_path, monkeypatch, capsys):
    path, work_dir, _ = trained
    out = tmp_path / "deep" / "metrics.json"
    assert run_script(monkeypatch, "eval.py", "--cfg", path, "--checkpoint", work_dir / "last.pth", "--out", out) == 0
    last = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()][-1]
    figures = json.loads(out.read_text())
    assert len(figures) == 13 and set(figures["per_class"]) == {"disc", "ring", "square", "triangle", "cross", "star"}
    assert figures == {key: last[key] for key in figures}
    assert "AR100" in capsys.readouterr().out


@pytest.mark.parametrize("methods", [[{"type": "CrossKD", "reused_teacher_head_idx": 1}], [{"type": "FGD"}],
                                     [{"type": "CrossKD", "reused_teacher_head_idx": 0}, {"type": "FGD"}]])
def test_distillation_from_a_run_of_our_own(trained, scenes, tmp_path, monkeypatch, methods):
    teacher, teacher_dir, _ = trained
    distill = {"teacher": {"cfg": str(teacher), "checkpoint": str(teacher_dir / "last.pth")}, "methods": methods}
    path = write_config(tmp_path / "kd.yaml", config(scenes, 1, distill))
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / "run", "--device", "cpu") == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert ("loss_cls_kd" in line) == (methods[0]["type"] == "CrossKD")
    assert ("loss_fgd" in line) == (methods[-1]["type"] == "FGD")
    assert weights(tmp_path / "run" / "last.pth").keys() == weights(teacher_dir / "last.pth").keys()
    provenance = json.loads((tmp_path / "run" / "run.json").read_text())
    recorded, (built,) = provenance["teachers"], provenance["teacher_models"]
    assert built["head"]["num_classes"] == 6 and built["backbone"] == model()["backbone"]
    assert list(recorded) == [str(teacher_dir / "last.pth")] and len(recorded[str(teacher_dir / "last.pth")]) == 64


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_resumes_to_the_same_weights(scenes, tmp_path, monkeypatch, number, code):
    teacher = {"teacher": {"model": model(), "checkpoint": None}, "methods": [{"type": "FGD"}]}
    path = write_config(tmp_path / "cfg.yaml", config(scenes, 8, teacher) | {"eval": {"every": 0}})
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", whole, "--device", "cpu") == 0
    log = tmp_path / "log"
    process = context.Process(target=script, args=(log, "train.py", "--cfg", path, "--work-dir", halves, "--device",
                                                   "cpu", "data.workers=2"))
    process.start()
    metrics = halves / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as Ctrl-C does, the loader's workers get it too
    process.join()
    assert process.exitcode == code and "--resume goes on from there" in log.read_text()
    assert torch.load(halves / "last.pth", weights_only=True)["step"] < 24
    (halves / "newer.pth").write_bytes(b"damaged")
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", halves, "--device", "cpu", "--resume") == 0
    assert_equal(weights(whole / "last.pth"), weights(halves / "last.pth"))
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 25))


def test_a_run_that_is_there_already_is_not_overwritten(trained, monkeypatch, capsys):
    path, work_dir, _ = trained
    before = (work_dir / "last.pth").read_bytes()
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", work_dir) == 2
    assert "--resume" in capsys.readouterr().err
    assert (work_dir / "last.pth").read_bytes() == before


def test_a_finished_run_can_be_resumed_for_more_epochs(trained, tmp_path, monkeypatch):
    path, work_dir, _ = trained
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path, "--resume-from",
                      work_dir / "last.pth", "train.epochs=3") == 0
    assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == 9


def test_a_resumed_run_takes_the_optimizers_new_settings(trained, tmp_path, monkeypatch):
    """The groups of the optimiser have the values that they have in a new run."""
    path, work_dir, _ = trained
    options = ["train.epochs=3", "train.log_every=2", "optimizer.lr=0.002", "optimizer.weight_decay=0.01",
               "optimizer.momentum=0.5"]
    for name, resume in (("new", []), ("resumed", ["--resume-from", work_dir / "last.pth"])):
        assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / name, *resume, *options) == 0
    before, new, resumed = (torch.load(folder / "last.pth", weights_only=True)["optimizer"]["param_groups"]
                            for folder in (work_dir, tmp_path / "new", tmp_path / "resumed"))
    assert resumed == new != before
    assert (resumed[0]["initial_lr"], resumed[0]["momentum"], resumed[0]["weight_decay"]) == (0.002, 0.5, 0.01)
    log = (tmp_path / "resumed" / "train.log").read_text()
    assert sorted(re.findall("since the checkpoint, (.*)", log)) == [
        "optimizer.lr was 0.01 and is 0.002", "optimizer.momentum was 0.9 and is 0.5",
        "optimizer.weight_decay was 0.0001 and is 0.01", "train.epochs was 2 and is 3"]  # not train.log_every


def test_a_resumed_run_may_group_its_parameters_otherwise(trained, tmp_path, monkeypatch):
    """Also from a checkpoint of earlier versions, which holds no names of parameters: the weights end the same."""
    path, work_dir, _ = trained
    state = torch.load(work_dir / "last.pth", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        assert group.pop("param_names")
    torch.save(state, tmp_path / "earlier.pth")
    for name, start in (("named", work_dir / "last.pth"), ("earlier", tmp_path / "earlier.pth")):
        assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / name, "--resume-from", start,
                          "train.epochs=3", "optimizer.bias_lr_mult=2", "optimizer.bias_decay_mult=0") == 0
    named, earlier = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("named", "earlier"))
    assert len(named["optimizer"]["param_groups"]) == 3
    assert_equal(named["model"], earlier["model"])


def test_momentum_survives_a_resume_and_starts_at_zero_where_there_was_none():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    plain = build_optimizer({"type": "SGD", "momentum": 0.0}, model, 1)
    model(torch.ones(1, 3)).sum().backward()
    plain.step()
    own = build_optimizer({"type": "SGD", "lr": 0.5}, model, 1)
    load_optimizer(own, plain.state_dict())
    assert all((own.state[p]["momentum_buffer"] == 0).all() for p in model.parameters())
    own.step()
    again = build_optimizer({"type": "SGD", "lr": 0.25, "momentum": 0.8}, model, 1)
    load_optimizer(again, own.state_dict())
    assert again.param_groups[0]["lr"] == 0.25 and again.param_groups[0]["momentum"] == 0.8
    for p in model.parameters():
        assert torch.equal(again.state[p]["momentum_buffer"], own.state[p]["momentum_buffer"])
        assert again.state[p]["momentum_buffer"].abs().sum() > 0


def reversed_classes(scenes, folder):
    """Overrides that train and evaluate on the same boxes, with the names of the classes in the reverse order."""
    for split in ("train", "val"):
        content = json.loads((scenes / "annotations" / f"{split}.json").read_text())
        names = [category["name"] for category in content["categories"]]
        for category, name in zip(content["categories"], reversed(names)):
            category["name"] = name
        (folder / f"{split}.json").write_text(json.dumps(content))
    return [f"data.{split}.annotations={folder / split}.json" for split in ("train", "val")]


def bad_annotations(folder, text):
    (folder / "a.json").write_text(text)
    return f"data.train.annotations={folder / 'a.json'}"


@pytest.mark.parametrize("case, expected", [
    ("unknown key", 'model.head.stackd_convs: unknown key; did you mean "stacked_convs"?'),
    ("missing annotations", "nowhere.json"),
    ("no JSON", "a.json"),
    ("not COCO", "a.json"),
    ("no cuda", "no CUDA device"),
    ("missing configuration", "does not exist"),
    ("another teacher", "does not fit"),
    ("no teacher", "no such checkpoint file: nowhere.pth"),
    ("class count", "model.head.num_classes"),
    ("nothing to resume", "no checkpoint to resume from"),
    ("another optimizer", "does not fit these settings: optimizer.type was \"SGD\" and is \"AdamW\"; resume with the "),
    ("other trained parameters", "model.backbone.frozen_stages was -1 and is 4; resume with the old values"),
    ("another batch size", "data.batch_size times the number of processes was 4 and is 5"),  # as many steps per epoch
    ("classes in another order", "has the classes disc, ring"),
    ("impossible pair", "do not mean the same"),
])
def test_bad_input_is_one_line_and_exit_code_2(trained, scenes, tmp_path, monkeypatch, capsys, case, expected):
    path, work_dir, _ = trained
    other = {"teacher": {"model": model(16), "checkpoint": str(work_dir / "last.pth")}, "methods": [{"type": "FGD"}]}
    missing = {"teacher": {"model": model(), "checkpoint": "nowhere.pth"}, "methods": [{"type": "FGD"}]}
    retina = {"teacher": {"model": model(head="RetinaHead"), "checkpoint": None}, "methods": [{"type": "Mimic"}]}
    arguments = {
        "unknown key": ["model.head.stackd_convs=1"],
        "missing annotations": ["data.train.annotations=nowhere.json"],
        "no JSON": [bad_annotations(tmp_path, "{")],
        "not COCO": [bad_annotations(tmp_path, '{"shapes": []}')],
        "no cuda": ["--device", "cuda"],
        "missing configuration": ["--cfg", tmp_path / "nowhere.yaml"],
        "another teacher": [f"distill={yaml.safe_dump(other, default_flow_style=True, width=10000)}"],
        "no teacher": [f"distill={yaml.safe_dump(missing, default_flow_style=True, width=10000)}"],
        "class count": ["model.head.num_classes=80"],
        "nothing to resume": ["--resume"],
        "another optimizer": ["--resume-from", work_dir / "last.pth", "optimizer={type: AdamW}"],
        "other trained parameters": ["--resume-from", work_dir / "last.pth", "model.backbone.frozen_stages=4"],
        "another batch size": ["--resume-from", work_dir / "last.pth", "data.batch_size=5"],
        "classes in another order": ["--resume-from", work_dir / "last.pth", *reversed_classes(scenes, tmp_path)],
        "impossible pair": [f"distill={yaml.safe_dump(retina, default_flow_style=True, width=10000)}"],
    }[case]
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and expected in error[0], error
    assert not (tmp_path / "run").exists()


def test_eval_refuses_another_models_checkpoint(trained, monkeypatch, capsys):
    path, work_dir, _ = trained
    assert run_script(monkeypatch, "eval.py", "--cfg", path, "--checkpoint", work_dir / "last.pth",
                      "model.backbone.base_channels=16") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "does not fit the model" in error[0]


@pytest.mark.parametrize("clip", ["null", "35"])
def test_a_loss_that_is_not_finite_stops_the_run(trained, tmp_path, monkeypatch, capsys, clip):
    """The error names the loss and the images, no weight changes, and a file can repeat the step."""
    path, _, _ = trained
    run = tmp_path / "run"
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", run, "optimizer.lr=1e30", "--device", "cpu",
                      f"train.grad_clip={clip}", "schedule.warmup_steps=0", "train.checkpoint_every=1",
                      "train.epochs=4") == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and f"--replay {run / 'replay.pth'}" in error[0]
    step, images = re.search(r" at step (\d+), images ([\d, ]+)\.", error[0]).groups()
    state = torch.load(run / "replay.pth", weights_only=True)
    assert state["step"] == int(step) - 1 and len(images.split(",")) == 4
    assert [str(t["image_id"]) for t in state["batches"][0][1]] == images.split(", ")
    last = torch.load(run / "last.pth", weights_only=True)
    assert last["step"] == int(step) - 1 and all(v.isfinite().all() for v in last["model"].values())
    learnt = [{k: v for k, v in each["model"].items() if "running" not in k and "batches" not in k}
              for each in (state, last)]
    assert_equal(*learnt)  # the step itself was skipped
    assert run_script(monkeypatch, "train.py", "--replay", run / "replay.pth", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert f"images {images}: loss_cls" in printed and "outputs that are not finite, first ones first: " in printed
    assert "nan" in printed or "inf" in printed or "gradients that are not finite: backbone" in printed


def test_replay_of_another_file(trained, monkeypatch, capsys):
    _, work_dir, _ = trained
    assert run_script(monkeypatch, "train.py", "--replay", work_dir / "last.pth") == 2
    assert "is not a replay file" in capsys.readouterr().err


def test_only_a_replay_needs_no_configuration(monkeypatch, capsys):
    assert run_script(monkeypatch, "train.py", "--device", "cpu") == 2
    assert "--cfg is required" in capsys.readouterr().err


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(trained, tmp_path, monkeypatch, amp):
    path, _, _ = trained
    # At 64 pixels the coarsest levels are one cell, on which torch's bf16 convolutions give NaN gradients on the CPU.
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / "run", f"train.amp={amp}",
                      "data.scale=[128, 128]",
                      "train.epochs=1", "--device", "cpu") == 0


def test_the_same_classes_in_another_order(trained, scenes, tmp_path, monkeypatch, capsys):
    """Detections would get wrong names: the error gives the setting that corrects this, and the setting works."""
    path, work_dir, _ = trained
    checkpoint, out = work_dir / "last.pth", tmp_path / "figures.json"
    assert run_script(monkeypatch, "eval.py", "--cfg", path, "--checkpoint", checkpoint, "--out", out) == 0
    expected = json.loads(out.read_text())
    splits = {}
    for split in ("train", "val"):
        content = json.loads((scenes / "annotations" / f"{split}.json").read_text())
        last = max(category["id"] for category in content["categories"])
        turn = {category["id"]: last + 1 - category["id"] for category in content["categories"]}
        for entry in content["categories"]:
            entry["id"] = turn[entry["id"]]
        for entry in content["annotations"]:
            entry["category_id"] = turn[entry["category_id"]]
        splits[split] = tmp_path / f"{split}.json"
        splits[split].write_text(json.dumps(content))
    turned = [f"data.{split}.annotations={file}" for split, file in splits.items()]
    arguments = ["eval.py", "--cfg", path, "--checkpoint", checkpoint, "--out", out, *turned]
    assert run_script(monkeypatch, *arguments) == 0
    assert "6 classes (disc, ring, square, triangle, cross, star): those of the data" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["AP"] == pytest.approx(expected["AP"]) and found["per_class"] == pytest.approx(expected["per_class"])

    teacher = {"teacher": {"model": model(), "checkpoint": str(checkpoint)}, "methods": [{"type": "FGD"}]}
    arguments = ["train.py", "--cfg", path, "--check", "--device", "cpu", *turned,
                 f"distill={yaml.safe_dump(teacher, default_flow_style=True, width=10000)}"]
    assert run_script(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("say distill.teacher.class_map=[5,4,3,2,1,0]")
    assert run_script(monkeypatch, *arguments, "distill.teacher.class_map=[5,4,3,2,1,0]") == 0


def test_fewer_classes_are_found_by_their_names(scenes, tmp_path, monkeypatch):
    """In another order, each class has the AP that it has among all."""
    cfg = config(scenes)
    path, checkpoint = write_config(tmp_path / "cfg.yaml", cfg), write_checkpoint(tmp_path / "lively.pth", cfg)
    content = json.loads((scenes / "annotations" / "val.json").read_text())
    kept = {c["id"]: c["name"] for c in content["categories"][3:0:-2]}
    file, aps = tmp_path / "fewer.json", []
    file.write_text(json.dumps(content | {"categories": [{"id": 9 - i, "name": name} for i, name in kept.items()],
                                          "annotations": [a | {"category_id": 9 - a["category_id"]} for a in
                                                          content["annotations"] if a["category_id"] in kept]}))
    for annotations in (scenes / "annotations" / "val.json", file):
        assert run_script(monkeypatch, "eval.py", "--cfg", path, "--checkpoint", checkpoint, "--out",
                          tmp_path / "out.json", f"data.val.annotations={annotations}", "model.test.nms_pre=9999",
                          "model.test.max_per_img=9999", "model.test.score_thr=0") == 0
        aps.append(json.loads((tmp_path / "out.json").read_text())["per_class"])
    assert list(aps[1]) == ["triangle", "ring"] and aps[0]["triangle"] != aps[0]["ring"]
    assert aps[1] == {name: aps[0][name] for name in aps[1]}


def test_other_class_names_are_refused(trained, scenes, tmp_path, monkeypatch, capsys):
    """Every box would be named wrongly."""
    path, work_dir, _ = trained
    content = json.loads((scenes / "annotations" / "val.json").read_text())
    names = [category["name"] for category in content["categories"]]
    for changed, parts in (
            (["cat", *names[1:]], ["has 6 classes (disc, ", "and the data 6 classes (cat, ", "train it on the data's"]),
            (["cat", names[1]], ["has 6 classes (disc, ", f"and the data 2 classes (cat, {names[1]})"])):
        categories = [c | {"name": name} for c, name in zip(content["categories"], changed)]
        kept = {c["id"] for c in categories}
        file = tmp_path / "other.json"
        file.write_text(json.dumps(content | {"categories": categories, "annotations": [
            a for a in content["annotations"] if a["category_id"] in kept]}))
        assert run_script(monkeypatch, "eval.py", "--cfg", path, "--checkpoint", work_dir / "last.pth",
                          f"data.val.annotations={file}") == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and all(part in error[0] for part in parts), error
    assert run_script(monkeypatch, "predict.py", "--cfg", path, "--checkpoint", work_dir / "last.pth", "--input",
                      scenes / "val", "--out", tmp_path / "out", "--classes", "cat", "dog") == 2
    assert "--classes gives 2 classes (cat, dog), and " in capsys.readouterr().err
