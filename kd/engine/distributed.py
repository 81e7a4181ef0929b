"""The little that the engine asks of torch.distributed. One process is the same code."""
import os
import re
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


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


def any_process(flag: int) -> int:
    """The largest of the processes' numbers: what one has noticed all will know."""
    if world_size() == 1:
        return flag
    value = torch.tensor(flag, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: batch norms have seen other images on each."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
