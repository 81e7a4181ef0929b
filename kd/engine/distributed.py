"""The little that the engine asks of torch.distributed. One process is the same code."""
import os

import torch
import torch.distributed as dist


def start_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun started, if it did, and return the device of this one."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(items: list) -> list:
    """The processes' lists, one after another, on every process."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def any_process(flag: int) -> int:
    """The largest of the processes' numbers: what one has noticed all will know."""
    if world_size() == 1:
        return flag
    value = torch.tensor(flag, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)
