"""Several processes compute what one does with their batches together."""
import pytest
import torch
from processes import together
from small_models import make_batch, small_detector, small_distiller, teacher_entry
from torch.nn.parallel import DistributedDataParallel

from kd.engine import distributed
from losses import channel_statistics, mean_over_processes

# A process with two of them, or with one, may have no box at all.
SIZES, COUNTS = ((64, 96), (50, 70), (60, 90), (33, 65)), (4, 2, 0, 0)
HEADS = ("GFLHead", "RetinaHead", "FCOSHead", "ATSSHead")
METHODS = {"CrossKD": {"type": "CrossKD", "reused_teacher_head_idx": 1, "sync_stats": True},
           "CrossKD, its own statistics": {"type": "CrossKD", "reused_teacher_head_idx": 1},
           "FGD": {"type": "FGD"}, "PKD": {"type": "PKD", "sync_stats": True}}
CASES = [(head, method) for head in HEADS for method in ("plain", "CrossKD", "FGD")]
CASES += [("GFLHead", "CrossKD, its own statistics"), ("GFLHead", "PKD")]


def build(head, method):
    if method == "plain":
        return small_detector(head).train()
    return small_distiller(METHODS[method], head=head, teacher=teacher_entry(head, width=24))


def steps():
    """Losses and gradients by case, of this process's share of the batch; the gradients averaged by DDP."""
    rank, world = distributed.rank(), distributed.world_size()
    images, targets = make_batch(SIZES, COUNTS)
    share = slice(rank * len(images) // world, (rank + 1) * len(images) // world)
    found = {}
    for case in CASES:
        model = build(*case)
        wrapped = DistributedDataParallel(model) if world > 1 else model
        losses = wrapped(images[share], targets[share])
        sum(losses.values()).backward()
        found[case] = ({name: value.detach() for name, value in losses.items()},
                       {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


def share(x):
    """This process's part of a tensor, the first ones longer."""
    return x.tensor_split(distributed.world_size())[distributed.rank()]


def statistics():
    """Statistics of maps of which each process has another number, and their gradient; means and gathered rows."""
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x.data[:, 2] = 7  # a constant channel
    std, mean = channel_statistics(share(x), sync=True)
    weight = torch.arange(1, 4).view(1, 3, 1, 1)
    (share(x) / (std + 1) * weight - mean.square()).square().sum().backward()
    rows = torch.arange(14.0, dtype=torch.float64).view(7, 2)
    rank, few = distributed.rank(), torch.tensor(0.25)
    return {"std": std.detach(), "mean": mean.detach(), "gradient": x.grad,
            "rows": distributed.gather_rows(share(rows) if rank else rows[:0]),
            "means": [float(mean_over_processes(torch.tensor(float(rank)))), float(mean_over_processes(few, least=2))],
            "first": distributed.from_first({"rank": rank})}


def everything():
    return {"steps": steps(), "statistics": statistics()}


@pytest.fixture(scope="module")
def alone():
    return everything()


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    """What each of 2 or 4 processes computes."""
    return together(everything, request.param, tmp_path_factory.mktemp("together"))


def relative(found, wanted, least=0.0):
    """The largest difference, relative to the largest value or to `least`."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=least))


def test_losses_and_gradients_are_those_of_one_process_with_the_whole_batch(alone, results):
    wrong = {}
    for case, (losses, gradients) in alone["steps"].items():
        shares = [result["steps"][case] for result in results]
        for name, value in losses.items():
            wrong[case, name] = relative(sum(own[name] for own, _ in shares) / len(results), value)
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
    assert alone["statistics"]["means"] == [0, 2]
    gathered, *others = [result["statistics"]["rows"] for result in results]
    lost = -(-7 // world)  # the first process has sent nothing
    assert torch.equal(gathered, torch.arange(14.0, dtype=torch.float64).view(7, 2)[lost:])
    assert others == [None] * (world - 1)
