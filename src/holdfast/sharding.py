"""A model too large to train on one device: its parameters, gradients and optimiser states in shards over all processes
(FSDP2, `torch.distributed.fsdp.fully_shard`).

Of a sharded model each process keeps a part of every tensor along its first dimension. A layer is put together when it
is needed, and let go again. Forward and backward passes are therefore everyone's, in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # takes seconds to import, and most have no use for it
    from torch.distributed.tensor import DTensor

UNIT = 0.01  # a block with this share of the parameters is put together on its own


def shard(model: nn.Module, count: int, kind: str) -> None:
    """Shard `model`, which all `count` processes have built alike, in place, over devices of a kind (cpu, cuda): each
    block of its lists and sequences on its own, and what is left with the whole. Gradients are summed over the
    processes, not averaged."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(kind, (count,))
    least = UNIT * sum(p.numel() for p in model.parameters())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    blocks = dict.fromkeys(b for m in lists for b in m.children() if sum(p.numel() for p in b.parameters()) >= least)
    for block in reversed(blocks):  # inner ones before those that hold them
        if not isinstance(block, nn.ModuleList) and block is not model:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # by default a root stays whole, its gradients elsewhere
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def is_sharded(value: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is in shards."""
    return hasattr(value, "device_mesh")


def whole(value: Tensor) -> Tensor:
    """The tensor put together, for all processes; all must ask for it."""
    return value.full_tensor() if is_sharded(value) else value


def own(value: Tensor) -> Tensor:
    """This process's part."""
    return value.to_local() if is_sharded(value) else value


def assign(target: Tensor, value: Tensor) -> None:
    """Copy `value` into `target`: a whole tensor, which all processes have, or one that is sharded like it, or this
    process's own part."""
    if not is_sharded(target) or is_sharded(value):
        target.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    part = target.to_local()
    if value.shape == part.shape:
        part.copy_(value)
        return
    moved = value.to(part.device, part.dtype)
    part.copy_(distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None).to_local())


def fits(target: Tensor, value: Tensor) -> bool:
    """Whether `assign` could: the shape is that of the whole, or of the own part."""
    return value.shape == target.shape or (is_sharded(target) and value.shape == own(target).shape)


def reshard_state(optimiser: torch.optim.Optimizer) -> None:
    """After `load_state_dict` of own parts: make each part the shard of a tensor like its parameter."""
    for parameter, state in optimiser.state.items():
        if is_sharded(parameter):
            for name, value in state.items():
                state[name] = _alike(value, parameter)


def _alike(value: Any, parameter: DTensor) -> Any:
    if not isinstance(value, Tensor) or is_sharded(value) or value.ndim == 0:
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
