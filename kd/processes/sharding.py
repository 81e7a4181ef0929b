"""Teachers that are too large for one device: their weights lie in shards on all of them."""
import torch

from models import Detector

from . import distributed


def shard(detector: Detector, device: torch.device) -> None:
    """Spread the weights of a detector's backbone and neck over the processes (FSDP2); nothing for one process.

    They come together part by part while the part runs, a ResNet's stages one by one, and go again. The head stays
    whole: methods enter it in the middle, and gradients flow through it. Every process must run the detector as often
    as the others do.
    """
    if distributed.world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh  # here, for these two take half a second
    from torch.distributed.fsdp import fully_shard
    mesh, backbone = init_device_mesh(device.type, (distributed.world_size(),)), detector.backbone
    stages = [getattr(backbone, f"layer{i + 1}") for i in range(getattr(backbone, "num_stages", 0))]
    for part in (*stages, backbone, detector.neck):
        if part is not None:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    detector.to(device)
    detector.sharded = True
