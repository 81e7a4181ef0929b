"""Several processes compute the same as one process with all their batches."""
import json
from unittest import mock

import pytest
import torch
from processes import together
from runs import config, config_with, model
from small_models import make_batch, small_detector, small_distiller, teacher_entry

from data import generate_scenes
from kd.config import parse_config
from kd.engine import train as engine
from kd.engine.run import build_run
from kd.engine.skipped import SkippedImages
from kd.engine.train import train
from kd.exceptions import TrainingError
from kd.processes import distributed
from kd.processes.sharding import shard
from kd.work_dir.checkpoint import read_checkpoint, read_plain
from losses import channel_statistics, mean_over_processes
from models import ConfigError, Preprocess

CPU = torch.device("cpu")

# A process with two of them, or with one, may have no box at all.
SIZES, COUNTS = ((64, 96), (50, 70), (60, 90), (33, 65)), (4, 2, 0, 0)
HEADS = ("GFLHead", "RetinaHead", "FCOSHead", "ATSSHead")
KL = {"type": "KnowledgeDistillationKLDivLoss", "loss_weight": 10, "T": 2}
METHODS = {"CrossKD": {"type": "CrossKD", "reused_teacher_head_idx": 1, "sync_stats": True},
           "CrossKD, its own statistics": {"type": "CrossKD", "reused_teacher_head_idx": 1},
           "FGD": {"type": "FGD"}, "PKD": {"type": "PKD", "sync_stats": True}, "BCKD": {"type": "BCKD"},
           # LD's loss on boxes is a sum over the batch of each process, as in the original; its weight is 0 here.
           "LD's classes": {"type": "LD", "loss_weight": 0.0, "loss_kd": KL, "loss_kd_vlr": KL},
           # With the defaults, cells are chosen from the batch of each process. Here all cells are.
           "GI": {"type": "GI", "top": 400, "iou_threshold": 1.0, "only_levels_with_positives": False},
           "PGD": {"type": "PGD", "topk": 5}, "FRS": {"type": "FRS"},
           "CWD": {"type": "CWD", "norm": True, "sync_stats": True}}
CASES = [(head, method) for head in HEADS for method in ("plain", "CrossKD", "FGD")]
CASES += [("GFLHead", "CrossKD, its own statistics"), ("GFLHead", "PKD"), ("GFLHead", "BCKD"), ("FCOSHead", "BCKD"),
          ("GFLHead", "LD's classes"), ("GFLHead", "GI"), ("ATSSHead", "PGD"), ("RetinaHead", "FRS"),
          ("FCOSHead", "CWD")]
CASES += [("GFLHead", "CrossKD <- RetinaHead"), ("RetinaHead", "CrossKD <- GFLHead"),
          ("FCOSHead", "CrossKD <- ATSSHead")]


def build(head, method):
    if method == "plain":
        return small_detector(head).train()
    method, _, other = method.partition(" <- ")
    return small_distiller(METHODS[method], head=head, teacher=teacher_entry(other or head, width=24))


def steps():
    """Losses and gradients by case, for this process's share of the batch; DDP averages the gradients."""
    rank, world = distributed.rank(), distributed.world_size()
    images, targets = make_batch(SIZES, COUNTS)
    share = slice(rank * len(images) // world, (rank + 1) * len(images) // world)
    found = {}
    for case in CASES:
        model = build(*case)
        wrapped = distributed.data_parallel(model, CPU)
        losses = wrapped(images[share], targets[share])
        sum(losses.values()).backward()
        found[case] = ({name: value.detach() for name, value in losses.items()},
                       {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


def share(x):
    """This process's part of a tensor; the first parts are longer."""
    return x.tensor_split(distributed.world_size())[distributed.rank()]


def statistics():
    """Statistics of maps, whose number differs between processes, and their gradient; means and gathered rows."""
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x.data[:, 2] = 7  # a constant channel
    std, mean = channel_statistics(share(x), sync=True)
    weight = torch.arange(1, 4).view(1, 3, 1, 1)
    (share(x) / (std + 1) * weight - mean.square()).square().sum().backward()
    rows = torch.arange(14.0, dtype=torch.float64).view(7, 2)
    rank, few = distributed.rank(), torch.tensor(0.25)
    skipped = SkippedImages(mock.Mock())
    skipped.note([{"skipped": [f"image {rank} does not exist", "image 9 is empty"]}])
    skipped.report(0)
    return {"skipped": sorted(skipped.lines), "std": std.detach(), "mean": mean.detach(), "gradient": x.grad,
            "rows": distributed.gather_rows(share(rows) if rank else rows[:0]),
            "means": [float(mean_over_processes(torch.tensor(float(rank)))), float(mean_over_processes(few, least=2))],
            "first": distributed.from_first({"rank": rank})}


def teacher_in_ddp():
    """Names in a distiller under DDP, and how much DDP and a step change a teacher that differs between processes."""
    distiller = build("GFLHead", "FGD")
    weight = distiller.teacher.backbone.conv1.weight
    weight.data += distributed.rank()
    before = weight.clone()
    wrapped = distributed.data_parallel(distiller, CPU)
    sum(wrapped(*make_batch()).values()).backward()
    own = [tensor for part in (distiller.student, distiller.methods) for tensor in part.parameters()]
    return {"names": [name for name, _ in wrapped.named_parameters()], "own": len(own),
            "change": float((weight - before).abs().max())}


def teacher_in_shards():
    """A sharded teacher compared with a whole one: losses, gradients of the student, and the share in this process."""
    measured = {"weight": {"gradient_share": 0.3, "gradient_share_every": 1}}
    methods = [METHODS["CrossKD"] | measured, METHODS["FGD"] | measured,
               {"type": "FitNet", "student_modules": ["backbone.layer3.0.conv1"]}]
    distiller = small_distiller(*methods, teacher=teacher_entry(width=24))
    rank, (images, targets) = distributed.rank(), make_batch(SIZES, COUNTS)

    def step():
        distiller.zero_grad()
        distiller.advance(distiller.step + 1, 10, 10)  # so that it measures
        values = distiller(images[rank:][:2], targets[rank:][:2])
        sum(values.values()).backward()
        return values | {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}

    def here(part):
        return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in part.parameters())

    elements, whole = here(distiller.teacher), step()
    shard(distiller.teacher, CPU)
    distiller.to(CPU, memory_format=torch.channels_last)  # as the rest of it is moved
    errors = [max(relative(value.detach(), whole[name].detach(), 1e-6) for name, value in step().items())
              for _ in range(2)]
    return {"errors": errors, "compared": len(whole), "before": elements, "here": here(distiller.teacher),
            "head": here(distiller.teacher.bbox_head), "sharded": distiller.teacher.sharded}


def messages():
    """The sizes of the all-reduces in a step without DDP: for plain training, and in addition for CrossKD."""
    found = {}
    for head in HEADS:
        for method in ("plain", "CrossKD"):
            module = build(head, method)
            with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as sent:
                sum(module(*make_batch()).values()).backward()
            found[head, method] = [call.args[0].numel() for call in sent.call_args_list]
    return found


def everything():
    return {"steps": steps(), "statistics": statistics(), "in DDP": teacher_in_ddp(), "messages": messages()}


@pytest.fixture(scope="module")
def alone():
    return everything()


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    """The results of each of 2 or 4 processes."""
    return together(everything, request.param, tmp_path_factory.mktemp("together"))


def relative(found, wanted, least=0.0):
    """The largest difference, relative to the largest value or to `least`."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=least))


def test_losses_and_gradients_are_those_of_one_process_with_the_whole_batch(alone, results):
    wrong = {}
    assert len(alone["steps"]) == len(CASES) and alone["steps"]["GFLHead", "LD's classes"][0]["loss_kd"] > 0
    for case, (losses, gradients) in alone["steps"].items():
        shares = [result["steps"][case] for result in results]
        for name, value in losses.items():
            wrong[case, name] = relative(sum(own[name] for own, _ in shares) / len(results), value, 1e-12)
        least = 1e-6 * max(value.abs().max() for value in gradients.values())  # some are zero but for rounding
        for _, own in shares:
            assert own.keys() == gradients.keys()
            for name, value in gradients.items():
                wrong[case, name] = max(relative(own[name], value, least), wrong.get((case, name), 0))
    of_its_own = [key for key in wrong if key[0][1] == "CrossKD, its own statistics"]
    assert any(not wrong[key] < 1e-3 for key in of_its_own)  # the comparison would notice
    assert {key: value for key, value in wrong.items() if key not in of_its_own and not value < 1e-5} == {}


def test_statistics_weigh_every_entry_alike_wherever_it_is(alone, results):
    found = [result["statistics"] for result in results]
    for own in found:
        assert relative(own["std"], alone["statistics"]["std"]) < 1e-12
        assert relative(own["mean"], alone["statistics"]["mean"]) < 1e-12
    assert relative(sum(own["gradient"] for own in found), alone["statistics"]["gradient"]) < 1e-12


def test_means_rows_and_values(alone, results):
    world = len(results)
    for result in results:
        assert result["statistics"]["means"] == [(world - 1) / 2, 2 / world]
        assert result["statistics"]["first"] == {"rank": 0}
        assert result["statistics"]["skipped"] == [*(f"image {i} does not exist" for i in range(world)),
                                                   "image 9 is empty"]
    assert alone["statistics"]["means"] == [0, 2]
    gathered, *others = [result["statistics"]["rows"] for result in results]
    lost = -(-7 // world)  # the first process has sent nothing
    assert torch.equal(gathered, torch.arange(14.0, dtype=torch.float64).view(7, 2)[lost:])
    assert others == [None] * (world - 1)


def test_a_teacher_is_no_part_of_ddp(results):
    for result in results:
        found = result["in DDP"]
        assert [name for name in found["names"] if "teacher" in name] == [] and found["change"] == 0
        assert len(found["names"]) == found["own"] > 0


def test_a_teacher_in_shards_gives_the_same_losses_and_gradients(tmp_path):
    for found in together(teacher_in_shards, 2, tmp_path):
        assert found["sharded"] and found["compared"] > 60 and max(found["errors"]) < 1e-6
        share = (found["before"] - found["head"]) / 2
        assert share <= found["here"] - found["head"] < 1.1 * share  # uneven parts are padded
    alone = teacher_in_shards()
    assert not alone["sharded"] and alone["here"] == alone["before"]


def test_what_a_step_sends_is_what_the_page_on_scaling_says(results):
    """Normalisers, and of CrossKD with `sync_stats` 2C + 1 numbers of student and teacher for each level and tower."""
    normalisers = {"GFLHead": (2, 1), "RetinaHead": (1, 0), "FCOSHead": (2, 1), "ATSSHead": (2, 0)}
    for head, (count, of_crosskd) in normalisers.items():
        for result in results:
            sent = result["messages"]
            assert sent[head, "plain"] == [1] * count
            synced = [n for n in sent[head, "CrossKD"] if n > 1]
            assert len(sent[head, "CrossKD"]) == len(synced) + count + of_crosskd
            if head == "GFLHead":
                assert len(synced) == 60 and sum(synced) == 5 * 2 * (2 * 24 + 1) * (2 + 1)


def run_all(configurations, folder):
    """Train in float64, so that rounding does not matter."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(Preprocess.forward, "__defaults__", (torch.float64,)):
            for name, cfg in configurations.items():
                train(cfg, folder / name, CPU)
    finally:
        torch.set_default_dtype(torch.float32)


def test_two_processes_train_as_one(tmp_path):
    """With accumulation and an average of the weights; with methods that pause, adapters and a teacher in shards."""
    scenes = generate_scenes(tmp_path / "scenes", train=14, val=4, size=(64, 64))
    plain = config_with(config(scenes), train={"accumulate": 2, "ema": 0.5})
    plain["model"]["backbone"]["norm_eval"] = True
    wide = model()
    wide["neck"]["out_channels"] = wide["head"]["feat_channels"] = 24
    distilled = config_with(plain, train={"accumulate": 1, "check_images": 3}, distill={
        "teacher": {"model": wide, "checkpoint": None, "shard": True}, "init_student": True,
        "methods": [METHODS["CrossKD"], {"type": "FGD", "every": 2}, METHODS["PKD"] | {"stop_epoch": 1}]})
    cases = {"plain": plain, "distilled": distilled}
    run_all({name: config_with(cfg, data={"batch_size": 4}) for name, cfg in cases.items()}, tmp_path / "one")
    halves = {name: config_with(cfg, data={"batch_size": 2}) for name, cfg in cases.items()}
    together(run_all, 2, tmp_path / "processes", halves, tmp_path / "two")
    for name in cases:
        one, two = (read_checkpoint(tmp_path / folder / name / "last.pth") for folder in ("one", "two"))
        for part in ("model", "training", "methods"):
            for key, value in one[part].items():
                assert relative(two[part][key].double(), value.double(), 1e-3) < 1e-5, (name, part, key)
        lines = [[json.loads(line) for line in (tmp_path / folder / name / "metrics.jsonl").read_text().splitlines()]
                 for folder in ("one", "two")]
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
        assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    logs = [[line for line in (tmp_path / folder / "distilled" / "train.log").read_text().splitlines()
             if line.startswith(("  teacher 0: ", "  student: ", "AP on the first 3"))] for folder in ("one", "two")]
    assert logs[0] == logs[1] and len(logs[0]) >= 2
    assert "M parameters in shards, distilled by" in (tmp_path / "two" / "distilled" / "train.log").read_text()


def test_batch_norms_are_synchronised_on_gpus_only(tmp_path, monkeypatch):
    """One process has nothing to synchronise with, so it accepts the setting on any device."""
    scenes = generate_scenes(tmp_path, train=2, val=1, size=(64, 64))
    cfg = config_with(config(scenes), train={"sync_bn": True})
    build_run(parse_config(cfg), tmp_path, CPU)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="train.sync_bn: PyTorch synchronises batch norms on CUDA only"):
        build_run(parse_config(cfg), tmp_path, CPU)


def test_norms_that_never_learn_are_not_synchronised():
    """Synchronised, they would start to collect statistics."""
    kinds = []
    for norm in ("BN", "FrozenBN"):
        backbone = small_detector(backbone={"norm_cfg": norm, "norm_eval": False}).backbone
        distributed.synchronise_norms(backbone)
        norms = [m for m in backbone.train().modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        kinds.append({(type(m).__name__, m.training) for m in norms})
    assert kinds == [{("SyncBatchNorm", True)}, {("FrozenBatchNorm", False)}]


def broken_on_one(cfg, work_dir):
    """The message of each process about a batch that is not finite on the last process."""
    original, steps = engine.to_device, []

    def spoil(images, targets, *where):
        images, targets = original(images, targets, *where)
        steps.append(len(steps))
        spoilt = steps[-1] == 2 and distributed.rank() == distributed.world_size() - 1
        return images * float("inf") if spoilt else images, targets

    with mock.patch.object(engine, "to_device", spoil), pytest.raises(TrainingError) as caught:
        train(cfg, work_dir, CPU)
    return str(caught.value)


def test_a_loss_that_is_not_finite_on_one_process_stops_all(tmp_path):
    cfg = config(generate_scenes(tmp_path / "scenes", train=16, val=2, size=(64, 64)), head="RetinaHead")
    cfg = config_with(cfg, data={"batch_size": 2}, train={"checkpoint_every": 1, "grad_clip": None})
    other, own = together(broken_on_one, 2, tmp_path / "processes", cfg, tmp_path / "run")
    assert "a loss of another process, is not finite at step 3" in other and str(tmp_path / "run/replay.pth") in other
    assert "loss_cls is nan" in own and str(tmp_path / "run/replay1.pth") in own
    state = read_checkpoint(tmp_path / "run" / "last.pth")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())
    assert read_plain(tmp_path / "run" / "replay1.pth", "densekd-replay", "file", "a replay file")["step"] == 2


@pytest.mark.parametrize("nodes, first", [
    ("gpu[03-05,9],cpu1", "gpu03"), ("gpu7", "gpu7"), ("node-a1,node-b2", "node-a1"), ("rack2-[10,12]", "rack2-10")])
def test_slurm_says_where_the_processes_meet(nodes, first):
    env = {"SLURM_JOB_NODELIST": nodes, "SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1",
           "SLURM_JOB_ID": "123456"}
    assert distributed.slurm_environment(env) == {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1",
                                                  "MASTER_ADDR": first, "MASTER_PORT": "23456"}
    given = distributed.slurm_environment(env | {"MASTER_ADDR": "head", "MASTER_PORT": "29500"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("head", "29500")


def train_with_patience(cfg, work_dir):
    """Train until patience ends; the steps of this process."""
    taken, original = [], engine.train_step

    def count(run, *arguments):
        taken.append(run.step)
        return original(run, *arguments)

    with mock.patch.object(engine, "train_step", count):
        train(cfg, work_dir, CPU)
    return taken


def test_processes_agree_when_patience_ends(tmp_path):
    """At a learning rate of zero no evaluation is better than the first; one process alone would wait for the others.
    Data sets are joined, and each step has images of both processes."""
    scenes = generate_scenes(tmp_path / "scenes", train=6, val=2, size=(64, 64))
    cfg = config_with(config(scenes, 5), optimizer={"lr": {"per_image": 0.0}}, train={"patience": 2})
    cfg = config_with(cfg, data={"batch_size": 2, "train": [cfg["data"]["train"] | {"repeat": 2}] * 2})
    for taken in together(train_with_patience, 2, tmp_path / "processes", cfg, tmp_path / "run"):
        assert taken == list(range(18))  # 3 epochs of 24 images
    log = (tmp_path / "run" / "train.log").read_text()
    assert "learning rate 0, with 4 images per step: 2 processes x 2 per batch x 1 batch\n" in log
    assert log.count("stopped after epoch 3, because 2 evaluations brought no better AP than 0.0") == 1
