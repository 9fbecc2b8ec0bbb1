"""The one training loop: pre-training, reinforcement, simulation and attack all run on `fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.distributed import ALONE, Group
from holdfast.domains import ImageData
from holdfast.errors import require
from holdfast.layers import evaluating
from holdfast.ledger import Ledger
from holdfast.optimisers import SAM
from holdfast.runtime import Runtime
from holdfast.seeding import derive, generator, reseed
from holdfast.tasks import Loss, Task

Batch = tuple[Tensor, Tensor]
Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]
AfterStep = Callable[[int, Tensor], bool | None]


@dataclass(frozen=True)
class FitResult:
    """Steps done, the last loss, and the step (from 1) at which the loss was no longer finite, if it ever was not."""

    steps: int
    loss: float
    diverged_at: int | None = None


def plain(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """`model(inputs)`: the forward pass of those who train on no task's loss."""
    outputs: Tensor = model(inputs)
    return outputs


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    *,
    runtime: Runtime,
    forward: Forward = plain,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip: float | None = None,
    seed: int | None = None,
    first_step: int = 0,
    group: Group = ALONE,
    set_mode: Callable[[nn.Module], Any] = nn.Module.train,
    after_step: AfterStep | None = None,
) -> FitResult:
    """Forward, backward, update for every batch; `after_step(step, loss)` after each, from step `first_step + 1` on.

    A true value from `after_step` ends the run; so does a loss that is not finite, before it reaches the weights. Where
    `runtime.lag` is not 0 (on a GPU) losses are looked at so many steps later, and weights that a broken loss has
    reached are as they are by then; `diverged_at` is exact. `loss` is a scalar tensor on the device: reading it waits.
    `forward`: a task's, which makes of model, inputs and targets what `loss` takes. `clip`: largest L2 norm of the
    gradient. `set_mode` is called before every step, so a callback may change modes.
    With `seed`, step s draws from the stream (seed, "step", s): dropout does not depend on where a run was resumed.
    `group`: the processes that train the same weights, each on its part of every batch; the gradient is that of the
    mean loss over the whole batch, batch statistics (but of a compiled network) are the whole batch's too.
    Works on the model in place.
    """
    step, ledger = first_step, Ledger(runtime.lag)
    stream = (*group.stream, *runtime.sharing.stream)
    for step, (inputs, targets) in enumerate(batches, start=first_step + 1):
        set_mode(model)
        optimiser.zero_grad(set_to_none=True)
        if seed is not None:
            reseed(derive(seed, "step", step, *stream))
        runtime.begin_step()
        value = _gradients(model, inputs, targets, forward, loss, runtime, group)
        broken = ledger.note(step, value)
        if broken:
            return FitResult(*broken, broken[0])
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if isinstance(optimiser, SAM):
            drawn = derive(seed, "step", step, *stream) if seed is not None else None
            again = partial(_gradients, model, inputs, targets, forward, loss, runtime, group)
            optimiser.step(partial(_anew, optimiser, drawn, again))
        else:
            optimiser.step()
        if schedule is not None:
            schedule.step()
        if after_step is not None and after_step(step, value):
            break
    broken = ledger.settle()
    return FitResult(*broken, broken[0]) if broken else FitResult(step, ledger.last)


def _gradients(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    forward: Forward,
    loss: Loss,
    runtime: Runtime,
    group: Group,
) -> Tensor:
    """The gradient of the mean loss over the samples of all processes; returns that loss."""
    sharing = runtime.sharing
    together = sharing if sharing.count > 1 else group
    mine = 1.0 if together.count == 1 else float(len(targets))

    def part(inputs: Tensor, targets: Tensor, share: float) -> Tensor:
        with runtime.autocast(), together.statistics() if not runtime.compile else nullcontext():
            outputs = forward(model, inputs, targets)
        current = loss(outputs, targets)
        current = current if share * mine == 1 else current * (share * mine)
        current.backward()  # type: ignore[no-untyped-call]
        return current.detach()

    if together.count == 1:
        return runtime.micro.run(inputs, targets, part, partial(model.zero_grad, set_to_none=True))
    total = part(inputs, targets, 1.0)  # whole: the processes meet in it as often as each other
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    both = torch.stack([total, torch.full_like(total, mine)])
    together.sum([both] if together is sharing else [*gradients, both])  # those of shards are summed already
    torch._foreach_div_(gradients, both[1])
    return both[0] / both[1]


def _anew(optimiser: torch.optim.Optimizer, drawn: int | None, again: Callable[[], object]) -> None:
    """The gradient of the same loss elsewhere: with the same noise and dropout as at the first."""
    optimiser.zero_grad(set_to_none=True)
    if drawn is not None:
        reseed(drawn)
    again()


def minibatches(
    data: ImageData,
    batch_size: int,
    steps: int,
    seed: int,
    runtime: Runtime,
    first_step: int = 0,
    within: Tensor | None = None,
    group: Group = ALONE,
    needed: Sequence[bool] | None = None,
) -> Iterator[Batch]:
    """Batches number `first_step` … `steps` − 1 of an endless stream: shuffled passes over the data, end to end.

    Every batch is full (`min(batch_size, len(data))`), so no step sees a stray batch of one; batch i is a function of
    `seed` and i. `within`: take only the samples at these indices, without copying them. `group`: of each batch this
    process's part, every `count`-th sample; `UserError` where there is none for it. `needed`: batches whose entry is
    false are empty.
    """
    count = len(data) if within is None else len(within)
    size = min(batch_size, count)
    processes = group.count * runtime.sharing.count
    require(size >= processes, f"a batch of {size} cannot be shared by {processes} processes; start fewer")
    passes: dict[int, Tensor] = {}
    within = None if within is None else within.to(data.images.device)

    def order(number: int) -> Tensor:
        if number not in passes:
            for old in [n for n in passes if n < number - 1]:
                del passes[old]
            drawn = torch.randperm(count, generator=generator(seed, "pass", number))
            passes[number] = drawn.to(data.images.device)  # once a pass, so that no batch has to
        return passes[number]

    for step in range(first_step, steps):
        if needed is not None and not needed[step]:
            yield data.batch(torch.zeros(0, dtype=torch.int64), runtime)
            continue
        start, stop = step * size, (step + 1) * size
        first, last = start // count, (stop - 1) // count
        parts = [order(n)[max(0, start - n * count) : stop - n * count] for n in range(first, last + 1)]
        chosen = torch.cat(parts)
        for part in (group, runtime.sharing):
            chosen = chosen[part.rank :: part.count]
        yield data.batch(chosen if within is None else within[chosen], runtime)


class Beside:
    """The batches `ours`, and with each one of `theirs`: where memory wants a batch worked on in parts, or once more,
    a part of ours has the same part of theirs beside it. Which part it is its targets say, a view of the batch's."""

    def __init__(self, ours: Iterable[Batch], theirs: Iterable[Batch]) -> None:
        self._ours, self._theirs = ours, theirs

    def __iter__(self) -> Iterator[Batch]:
        for batch, other in zip(self._ours, self._theirs, strict=False):
            self._whole, self._other = batch[1], other
            yield batch

    def of(self, targets: Tensor) -> Batch:
        """What stands beside the part of the batch that has these `targets`: all beside all, one sample at least."""
        images, labels = self._other
        count, first = len(self._whole), 0
        if len(targets) < count:
            first = int(targets.storage_offset() - self._whole.storage_offset()) // max(1, self._whole.stride(0))
        start = first * len(images) // count
        stop = max(start + 1, (first + len(targets)) * len(images) // count)
        return images[start:stop], labels[start:stop]


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageData, task: Task, runtime: Runtime, batch_size: int = 500
) -> tuple[float, float]:
    """Metric and mean loss on all of `data`, in evaluation mode; the model's modes are put back."""
    at = 0

    def part(inputs: Tensor, targets: Tensor, _: float) -> Tensor:
        nonlocal at
        with runtime.autocast():
            outputs = task.forward(model, inputs, targets, at)
        at += len(targets)
        loss = task.loss(outputs, targets).double() * len(targets)
        return torch.stack([task.score(outputs, targets).sum().double(), loss])

    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    with evaluating(model):
        for start in range(0, len(data), batch_size):

            def begin(start: int = start) -> None:
                nonlocal at
                at = start

            begin()
            batch = data.batch(torch.arange(start, min(start + batch_size, len(data))), runtime)
            sums += runtime.micro.run(*batch, part, begin)
    right, total = sums.tolist()
    return right / len(data), total / len(data)
