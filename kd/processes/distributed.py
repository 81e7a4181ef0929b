"""What the engine needs from torch.distributed. A single process runs the same code."""
import logging
import os
import re
import signal
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.layers import FrozenBatchNorm

from ..exceptions import UsageError


def start_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun or Slurm's srun has started, if any, and return the device of this one."""
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        os.environ.update(slurm_environment(os.environ))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "mps":
        raise UsageError("--device mps works with one process only: start the script without torchrun, or use "
                         "--device cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    for number in (signal.SIGINT, signal.SIGTERM):  # while it waits for the others, a process hears no handler
        signal.signal(number, signal.SIG_DFL)
    if not dist.is_initialized():
        # gloo transfers what lies in CPU memory, also on machines with GPUs, so that this does not wait for the GPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **fresh_store(os.environ))
    if rank() > 0:
        logging.getLogger("densekd").setLevel(logging.CRITICAL)  # only the first process logs
    return device


def fresh_store(env: Mapping[str, str]) -> dict:
    """A new store for the processes that torchrun has restarted, as arguments; empty if PyTorch makes its own.

    torchrun keeps its store when it restarts, with the addresses of processes that have ended; PyTorch may then connect
    to those (pytorch/pytorch#135712). The number of restarts is the same only for the processes of one node.
    """
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("LOCAL_WORLD_SIZE") != env["WORLD_SIZE"]:
        return {}
    store, rank, world = next(dist.rendezvous("env://"))
    return {"store": dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store), "rank": rank,
            "world_size": world}


def slurm_environment(env: Mapping[str, str]) -> dict[str, str]:
    """torch.distributed's variables from srun's: one task per process; the port follows from the job's number."""
    nodes = env["SLURM_JOB_NODELIST"]
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)  # gpu[03-05,9],cpu1 -> gpu03
    return {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_NTASKS"], "LOCAL_RANK": env["SLURM_LOCALID"],
            "MASTER_ADDR": env.get("MASTER_ADDR") or first[1] + (first[2] or ""),
            "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + int(env["SLURM_JOB_ID"]) % 20000)}


def restarted() -> bool:
    """Whether torchrun has restarted this process after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(items: list) -> list:
    """The concatenated lists of all processes, on every process; for short lists."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def gather_rows(rows: Tensor) -> Tensor | None:
    """The concatenated rows (n, k) of all processes, on the first process; None on the others.

    The tensors are sent directly to the first process, without pickling.
    """
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.full_like(counts[0], len(rows)))
    counts = torch.cat(counts).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])  # of one size everywhere
    parts = [torch.empty_like(padded) for _ in counts] if rank() == 0 else None
    dist.gather(padded, parts)
    return None if parts is None else torch.cat([part[:count] for part, count in zip(parts, counts)])


def from_first(value: object) -> object:
    """The value of the first process, on every process; for small values."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


class Agreement:
    """Tells all processes the largest of the numbers that they passed to the previous call, so that none has to wait.

    A single process gets its own number at once.
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
    """Wrap a module so that gradients are averaged over the processes, and all start with the first one's weights.

    `sometimes_unused` says whether a parameter may get no gradient at some steps.
    """
    if world_size() == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer PyTorch renames `broadcast_buffers`
        # Buffers are shared only when they are needed, see `share_buffers`.
        return DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True,
                                       find_unused_parameters=sometimes_unused)


def synchronise_norms(model: nn.Module) -> None:
    """Replace every batch norm inside a module with a `SyncBatchNorm`, except those that are never trained."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, FrozenBatchNorm):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def share_buffers(model: nn.Module) -> None:
    """Copy the first process's buffers to all: the batch norms of each process have seen different images."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
