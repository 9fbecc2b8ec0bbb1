"""Several processes, one protection: started by torchrun, joined by torch.distributed (gloo on CPUs, nccl on GPUs).

Every process reads the same recipe and data. What they share: each simulates its own adversaries, and one sum over the
processes makes the suppression gradient; each takes its part of every batch of reinforcement. The result is that of one
process with as many adversaries, up to the order of summation. Files, measures and decisions are the first process's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from holdfast.errors import UserError, one_line
from holdfast.normalisation import OnBatchNorm

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # the others wait while the first audits; who dies is noticed at once all the same
SETTLING_SECONDS = 0.3  # before the end of a process; see `joined`
LOST = "lost contact with another process of this run ({}); the same command with --resume goes on from what was saved"


class Told(UserError):
    """An error that the first process has, and tells."""


@dataclass(frozen=True)
class Group:
    """This process among those of the run: `rank` of `count`. Every method is to be called by all of them in the same
    order; with one process each does nothing, or what it is given to do."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that measures, writes and speaks."""
        return self.rank == 0

    @property
    def stream(self) -> tuple[str | int, ...]:
        """What tells this process's random streams from the others': dropout and noise of its part of a batch."""
        return () if self.first else ("rank", self.rank)

    def own(self, tasks: int) -> range:
        """This process's share of `tasks` numbered pieces of work."""
        return range(self.rank, tasks, self.count)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors of the same shapes and floating type over the processes, in place, by one all-reduce."""
        if self.count == 1 or not tensors:
            return
        whole = torch.cat([t.reshape(-1) for t in tensors])
        _reduce(whole)
        for tensor, part in zip(tensors, torch.split(whole, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def agreed(self, find: Callable[[], T]) -> T:
        """What the first process finds, in all of them; its `UserError` is everyone's."""
        if self.count == 1:
            return find()
        sent: list[Any] = [None, None]
        if self.first:
            try:
                sent[0] = find()
            except UserError as error:
                _broadcast([None, str(error)])
                raise
        _broadcast(sent)
        if sent[1] is not None:
            raise Told(sent[1])
        found: T = sent[0]
        return found

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.count == 1:
            return flag
        flags = torch.tensor([float(flag)])
        _reduce(flags)
        return flags.item() > 0

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        if self.count == 1:
            return number
        numbers = torch.tensor([number])
        _reduce(numbers, dist.ReduceOp.MIN)
        return int(numbers.item())

    def statistics(self) -> AbstractContextManager[Any]:
        """Within it, batch normalisation in training takes the statistics of all processes' samples together."""
        return nullcontext() if self.count == 1 else OnBatchNorm(_together)


ALONE = Group()


def current() -> Group:
    """The processes that `joined` has joined; this one alone, where there was nothing to join."""
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size())
    return ALONE


@contextmanager
def joined() -> Iterator[Group]:
    """Join the processes that torchrun has started, for the length of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_torchelastic_launched():
        yield ALONE
        return
    gpus = torch.cuda.is_available()
    own = int(os.environ["LOCAL_RANK"])
    if own < torch.cuda.device_count():  # else it works on the CPU, or `Runtime.choose` refuses
        torch.cuda.set_device(own)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    store, rank, count = next(rendezvous("env://"))
    # torchrun keeps its store through a restart, and in it the addresses of processes that are gone.
    attempt = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, timeout=PATIENCE, store=attempt, rank=rank, world_size=count)
    yield current()
    dist.destroy_process_group()  # not after an error: nccl would wait for what will never come
    # torch's caches of sharded models keep gloo's threads alive. One that still waits for the interpreter's lock, to
    # let go of its last tensor, aborts the process if the interpreter ends first (pytorch/pytorch#190489).
    time.sleep(SETTLING_SECONDS)


def _reduce(tensor: Tensor, by: Any = dist.ReduceOp.SUM) -> None:
    try:
        dist.all_reduce(tensor, by)
    except RuntimeError as error:  # whatever a backend raises where the other side is gone
        raise UserError(LOST.format(one_line(error, 100))) from error


def _broadcast(sent: list[Any]) -> None:
    try:
        dist.broadcast_object_list(sent, src=0)
    except RuntimeError as error:
        raise UserError(LOST.format(one_line(error, 100))) from error


class _Sum(torch.autograd.Function):
    """A sum over the processes, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Σ value."""
        total = value.clone(memory_format=torch.contiguous_format)
        _reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Σ gradient: every process's loss rests on every process's value."""
        return _Sum.forward(ctx, gradients[0])


def _together(given: dict[str, Any]) -> Tensor:
    """Batch normalisation over the samples of all processes: torch's own synchronised layer works on GPUs only, and
    would have to be put into the network."""
    return batch_norm(**{n: v for n, v in given.items() if n != "training"})


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """(x − μ)/√(σ² + ε) · w + b with μ and σ² over the samples of all processes, in float32 at least; the running
    statistics follow by `momentum`, with the unbiased variance. Shapes and arguments are those of `F.batch_norm`."""
    over = [0, *range(2, input.ndim)]
    shape = [1, -1, *[1] * (input.ndim - 2)]
    values = input.to(torch.promote_types(input.dtype, torch.float32))
    count = torch.tensor(float(input.numel() // input.shape[1]), dtype=values.dtype, device=input.device)
    _reduce(count)
    mean = _sum(values.sum(over)) / count
    centred = values - mean.view(shape)
    variance = _sum(centred.square().sum(over)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    result = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        result = result * weight.view(shape)
    if bias is not None:
        result = result + bias.view(shape)
    return result.to(input.dtype)


def _sum(value: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(value)
    return total
