"""A network in shards: each of several processes keeps a part of every parameter (FSDP2)."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def share_out(network: nn.Module, mesh: DeviceMesh) -> None:
    """Share out each child of a network that has parameters, and then the rest of it, unless that was done before."""
    if isinstance(network, FSDPModule):
        return
    for part in (*network.children(), network):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
