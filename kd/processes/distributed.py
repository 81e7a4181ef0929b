"""What little the engine needs of torch.distributed. A single process runs the same code."""
import logging
import os
import re
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.layers import FrozenBatchNorm


def start_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun or Slurm's srun started, if one did, and return the device of this one."""
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        os.environ.update(slurm_environment(os.environ))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # What lies in ordinary memory goes by gloo also beside GPUs, so that asking for it does not wait for them.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **fresh_store(os.environ))
    if rank() > 0:
        logging.getLogger("densekd").setLevel(logging.CRITICAL)  # one process reports
    return device


def fresh_store(env: Mapping[str, str]) -> dict:
    """A place to meet for processes that torchrun has restarted; nothing where PyTorch finds one by itself.

    torchrun keeps its store over restarts, and with it the addresses of the processes that are no more, which PyTorch
    then may connect to (pytorch/pytorch#135712). The count of restarts is the same for all processes of one node only.
    """
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("LOCAL_WORLD_SIZE") != env["WORLD_SIZE"]:
        return {}
    store, rank, world = next(dist.rendezvous("env://"))
    return {"store": dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store), "rank": rank,
            "world_size": world}


def slurm_environment(env: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed reads, from what srun sets: one task per process, the first node's port by the job."""
    nodes = env["SLURM_JOB_NODELIST"]
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)  # gpu[03-05,9],cpu1 -> gpu03
    return {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_NTASKS"], "LOCAL_RANK": env["SLURM_LOCALID"],
            "MASTER_ADDR": env.get("MASTER_ADDR") or first[1] + (first[2] or ""),
            "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + int(env["SLURM_JOB_ID"]) % 20000)}


def restarted() -> bool:
    """Whether torchrun has started this process in place of one that was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(items: list) -> list:
    """The processes' lists, short ones, one after another, on every process."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def gather_rows(rows: Tensor) -> Tensor | None:
    """The processes' rows (n, k), one after another, on the first process; None on the others.

    They travel as they are, without pickling, and pass through no other process.
    """
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.full_like(counts[0], len(rows)))
    counts = torch.cat(counts).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])  # all send equally much
    parts = [torch.empty_like(padded) for _ in counts] if rank() == 0 else None
    dist.gather(padded, parts)
    return None if parts is None else torch.cat([part[:count] for part, count in zip(parts, counts)])


def from_first(value: object) -> object:
    """The first process's value, small, on every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


class Agreement:
    """What one process has noticed, all will know: the largest of their numbers at the call before, so that none waits.

    One process alone gets its own at once.
    """

    def __init__(self):
        self.number = self.work = None

    def __call__(self, number: int) -> int:
        if world_size() == 1:
            return number
        known = 0
        if self.work is not None:
            self.work.wait()
            known = int(self.number)
        self.number = torch.tensor(number)
        self.work = dist.all_reduce(self.number, dist.ReduceOp.MAX, async_op=True)
        return known


def data_parallel(model: nn.Module, device: torch.device, sometimes_unused: bool = False) -> nn.Module:
    """A module whose gradients are averaged over the processes, and which starts with the first one's weights on all.

    Args:
        sometimes_unused: whether there are steps at which a parameter takes no part.
    """
    if world_size() == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `broadcast_buffers` has another name in newer PyTorch
        # Buffers are shared when they are needed, see `share_buffers`, in place of at every step.
        return DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True,
                                       find_unused_parameters=sometimes_unused)


def synchronise_norms(model: nn.Module) -> None:
    """Put a `SyncBatchNorm` in the place of every batch norm within a module, but for those that never learn."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, FrozenBatchNorm):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: batch norms have seen other images on each."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
