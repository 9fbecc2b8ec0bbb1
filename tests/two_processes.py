"""What `test_distributed` starts two of, by torchrun: each compares what both do together with what it does alone."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.defences import base
from holdfast.defences.base import Given
from holdfast.defences.sophon import Sophon
from holdfast.distributed import ALONE, Group, Told, current, joined
from holdfast.domains import ImageData, load_domain
from holdfast.errors import UserError
from holdfast.models import Architecture, state_of
from holdfast.preprocessing import Preprocessing
from holdfast.runtime import Runtime
from holdfast.simulation import Accumulator
from holdfast.tasks import Classification
from holdfast.training import fit, minibatches
from holdfast.workplace import Workplace

RUNTIME = Runtime("cpu", "float32")


def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference between tensors of the same names."""
    assert first.keys() == second.keys()
    return max((first[n] - second[n]).abs().max().item() for n in first)


def batch_statistics(group: Group) -> float:
    """Values, gradients and running statistics of a batch of 7 in two parts, in float64."""
    rng = torch.Generator().manual_seed(1)
    images, given = (torch.randn(7, 3, 4, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    whole = nn.BatchNorm2d(3).double()
    nn.init.uniform_(whole.weight, 0.5, 2, generator=rng)
    parts = copy.deepcopy(whole)
    mine = slice(group.rank, None, group.count)
    found = []
    for layer, where in ((whole, slice(None)), (parts, mine)):
        own = images[where].clone().requires_grad_(True)
        with group.statistics() if layer is parts else ALONE.statistics():
            outputs = layer(own)
        (outputs * given[where]).sum().backward()
        gradients = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        if layer is parts:
            group.sum(list(gradients.values()))
        assert own.grad is not None
        found.append({"outputs": outputs.detach(), "inputs": own.grad, **gradients, **dict(layer.named_buffers())})
    for name in ("outputs", "inputs"):
        found[0][name] = found[0][name][mine]
    return apart(*found)


def training(group: Group, sharded: bool = False) -> float:
    """Four steps on batches of 7, by an optimiser with momentum, in float64; `sharded`: with one model."""
    rng = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (40, 1, 6, 6), generator=rng).to(torch.uint8)
    data = ImageData(pixels, torch.arange(40) % 3, Preprocessing(6, 1, (0.5,), (0.5,)))
    torch.manual_seed(3)
    start = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    after = []
    ways = [(RUNTIME, ALONE), (replace(RUNTIME, sharing=group), ALONE) if sharded else (RUNTIME, group)]
    for runtime, together in ways:
        model = runtime.place(copy.deepcopy(start))
        optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        batches = minibatches(data, 7, 4, 0, runtime, group=together)
        doubles = ((i.double(), t) for i, t in batches)
        result = fit(model, doubles, F.cross_entropy, optimiser, runtime=runtime, group=together)
        after.append({**state_of(model), "loss": torch.tensor(result.loss, dtype=torch.float64)})
    return apart(*after)


def gathering(group: Group) -> float:
    """Sums of what some have and others have not; what nobody has stays absent."""
    shapes = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    own = Accumulator({"a": torch.tensor([1.0, 2.0])} if group.first else {"b": torch.ones(3)})
    count, total = own.gather(shapes, group, 2, 0.5)
    assert (count, total) == (4, 1.0)
    return apart(own.sums, {"a": torch.tensor([1.0, 2.0]), "b": torch.ones(3)})


def given(group: Group, runtime: Runtime = RUNTIME) -> Given:
    """A new network and digits."""
    architecture = Architecture("small_conv", size=8, channels=1, options={"width": 8})
    original, restricted = (load_domain(f"digits[{c}]", architecture.preprocessing) for c in ("0-4", "5-9"))
    model = runtime.place(architecture.build(5, 4))
    return Given(
        model, original, restricted.halves(0)[0], 5, architecture, Classification(), runtime, seed=0, group=group
    )


def protecting(group: Group, adversaries: int, sharded: bool = False) -> float:
    """Two iterations of SOPHON, with plain steps in the place of Adam's, which make something of a rounding error."""
    spec = Sophon(
        adversaries=adversaries,
        inner_steps=4,
        inner_lr=(1e-2,),
        inner_optimiser=("momentum",),
        inner_batch_size=(20,),
        ntr_batch_size=31,
    )
    after = []
    ways = {"alone": given(ALONE), "together": given(group)}
    if sharded:
        ways["together"] = given(ALONE, replace(RUNTIME, sharing=group))
    for way in ways.values():
        engine = spec.engine(way)
        engine.fts = torch.optim.SGD(engine.model.parameters(), 1.0)
        engine.ntr = torch.optim.SGD(engine.model.parameters(), 0.1)
        engine.spec = replace(spec, alpha=0.1, beta=0.1)
        losses = [engine.iterate(i, 1.0) for i in (1, 2)]
        numbers = {f"{n} {i}": torch.tensor(found[n]) for i, found in enumerate(losses) for n in found}
        after.append({**state_of(engine.model), **numbers})
    start = given(ALONE).model.state_dict()
    assert apart(start, {n: after[0][n] for n in start}) > 1e-3  # something has happened
    return apart(*after)


class Killed(Exception):
    """The process is gone."""


def resuming(group: Group, folder: Path, sharded: bool) -> float:
    """SOPHON stopped after three of four iterations and resumed, against undisturbed; of shards, the second process
    had not come to save its third."""
    runtime = replace(RUNTIME, sharing=group) if sharded else RUNTIME
    spec = Sophon(
        adversaries=2,
        inner_steps=2,
        inner_lr=(1e-3,),
        inner_batch_size=(20,),
        ntr_batch_size=31,
        iterations=4,
        check_every=2,
        probe_steps=2,
        tolerance=0.9,
    )

    def protected(workplace: Workplace) -> dict[str, Tensor]:
        start = given(group, runtime)
        spec.protect(
            start.model,
            start.original,
            start.restricted,
            restricted_classes=5,
            architecture=start.architecture,
            task=start.task,
            runtime=runtime,
            workplace=workplace,
        )
        return state_of(start.model)

    whole = protected(Workplace(group=group, sharded=sharded))
    kept = Workplace(folder, resume=True, save_every_seconds=-1, group=group, sharded=sharded)
    run_guarded = base.run_guarded

    def until(model: nn.Module, states: Any, iterate: Any, **others: Any) -> Any:
        def dying(i: int, strength: float) -> Any:
            if i > 3:
                raise Killed
            return iterate(i, strength)

        return run_guarded(model, states, dying, **others)

    with mock.patch.object(base, "run_guarded", until), pytest.raises(Killed):
        protected(kept)
    if sharded and not group.first:
        (folder / "checkpoint-2-of-2.previous.pt").replace(folder / "checkpoint-2-of-2.pt")
    return apart(whole, protected(kept))


def errors(group: Group) -> float:
    """The first process's error is everyone's, told by the first alone."""

    def fails() -> None:
        raise UserError("not this way")

    with pytest.raises(UserError, match=r"^not this way$") as caught:
        group.agreed(fails)
    assert (caught.type is Told) is not group.first
    return float(group.agreed(lambda: group.rank))


def main() -> None:
    """All comparisons; the first process prints them."""
    torch.set_num_threads(1)
    with joined() as group:
        assert group == current()
        assert group.count == 2
        assert group.any(not group.first)
        assert not group.any(False)
        assert [list(Group(r, 2).own(5)) for r in (0, 1)] == [[0, 2, 4], [1, 3]]
        checks: list[Callable[[Group], float]] = [batch_statistics, training, gathering, errors]
        found = {c.__name__: c(group) for c in checks}
        found["shards"] = training(group, sharded=True)
        found |= {f"protecting {n}": protecting(group, n) for n in (1, 3)}
        found["protecting in shards"] = protecting(group, 2, sharded=True)
        for name, sharded in (("resuming", False), ("resuming shards", True)):
            found[name] = resuming(group, Path(sys.argv[1]) / name, sharded)
        if group.first:
            print(json.dumps(found))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
