"""Teachers that are too large for one device: their weights are sharded over all devices."""
import torch

from models import Detector
from models.folding import do_not_keep_folded

from . import distributed


def shard(detector: Detector, device: torch.device) -> None:
    """Shard the weights of a detector's backbone and neck over the processes (FSDP2); a single process changes nothing.

    The weights of a part are gathered while it runs and then freed; each stage of a ResNet is a part. The head is not
    sharded: methods start it from a middle layer, and gradients flow through it. All processes must run the detector
    equally often.
    """
    if distributed.world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh  # here, because these imports take half a second
    from torch.distributed.fsdp import fully_shard
    mesh, backbone = init_device_mesh(device.type, (distributed.world_size(),)), detector.backbone
    stages = [getattr(backbone, f"layer{i + 1}") for i in range(getattr(backbone, "num_stages", 0))]
    for part in (*stages, backbone, detector.neck):
        if part is not None:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    do_not_keep_folded(detector)
    detector.to(device)
    detector.sharded = True
