"""Out of memory: smaller parts and the same gradient; activations computed anew. What was freed is kept."""

import math
import os
import platform
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.defences.base import Given
from holdfast.defences.lockout import Lockout
from holdfast.defences.ntp import NTP
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.memory import out_of_memory
from holdfast.models import Architecture
from holdfast.runtime import Runtime
from holdfast.simulation import Accumulator, Simulator, step_weights
from holdfast.tasks import Classification
from holdfast.training import Beside, evaluate, fit, minibatches


class Narrow(nn.Module):
    """A linear network that has room for `most` samples."""

    def __init__(self, most: int, pixels: int = 64, classes: int = 5) -> None:
        super().__init__()
        self.most, self.seen = most, []
        torch.manual_seed(0)
        self.layer = nn.Linear(pixels, classes)

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has")
        return self.layer(images.flatten(1))


def trained(most: int, data, steps: int = 3) -> tuple[Narrow, float, Runtime]:
    model, runtime = Narrow(most), Runtime("cpu", "float32")
    optimiser = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    result = fit(model, minibatches(data, 13, steps, 0, runtime), F.cross_entropy, optimiser, runtime=runtime)
    return model, result.loss, runtime


def test_a_batch_in_parts_has_the_gradient_of_the_whole(original, capsys) -> None:
    whole, loss, _ = trained(100, original.train)
    parts, same, runtime = trained(4, original.train)
    assert torch.allclose(whole.layer.weight, parts.layer.weight, atol=1e-6)
    assert same == pytest.approx(loss, abs=1e-6)
    assert parts.seen == [13, 7] + [4, 4, 4, 1] * 3  # remembered: later steps begin with what fits
    assert runtime.micro.most == 4
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"out of memory with {n} samples at once" for n in (13, 7)]


def test_one_sample_that_does_not_fit_is_one_line(original) -> None:
    with pytest.raises(UserError, match=r"one sample at a time \(CUDA out of memory. Tried to allocate 20.00 MiB.\)"):
        trained(0, original.train)


def test_other_errors_are_not_taken_for_it(original) -> None:
    model = Narrow(100, pixels=63)
    optimiser = torch.optim.SGD(model.parameters(), 0.5)
    runtime = Runtime("cpu", "float32")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(model, minibatches(original.train, 13, 1, 0, runtime), F.cross_entropy, optimiser, runtime=runtime)
    assert model.seen == [13]


def test_a_part_of_a_batch_has_the_same_part_of_the_other_beside_it(original) -> None:
    """Seven of ours, in parts of 3, 3 and 1; beside them 14 or 3 of theirs, one at least."""
    images, labels = torch.arange(7.0).view(7, 1), torch.arange(7)
    for count, wanted in ((14, [(0, 6), (6, 12), (12, 14)]), (3, [(0, 1), (1, 2), (2, 3)])):
        theirs = (torch.arange(float(count)).view(count, 1), torch.arange(count))
        both = Beside([(images, labels)], iter([theirs]))
        for _ in both:
            for _ in range(2):  # once more, where memory ran out meanwhile
                found = [both.of(part)[1].tolist() for part in labels.split(3)]
                assert found == [list(range(*ends)) for ends in wanted]
            assert both.of(labels)[0] is not None
            assert torch.equal(both.of(labels)[1], theirs[1])


@pytest.mark.parametrize("spec", [Lockout(batch_size=10, close=2), NTP(batch_size=10, steps=2)], ids=["lockout", "ntp"])
def test_defences_that_look_at_both_domains_work_in_parts(spec, original, restricted, architecture, task) -> None:
    runtime = Runtime("cpu", "float32")
    runtime.micro.most = 3
    given = Given(architecture.build(5), original, restricted.train, 5, architecture, task, runtime)
    spec = replace(spec, iterations=1, check_every=1)
    losses = spec.prepare(given).iterate(1, 1.0)
    assert all(map(math.isfinite, losses.values()))
    assert runtime.micro.most == 3


@pytest.mark.parametrize("most", [3, 5, 19])
def test_suppression_in_parts(most: int, restricted, task: Classification) -> None:
    def simulated(room: int) -> tuple[float, Accumulator]:
        learner, found = Narrow(room), Accumulator()
        state = {n: v.clone() for n, v in learner.state_dict().items()}
        architecture = Architecture("small_conv", 8, 1)
        simulator = Simulator(
            learner, architecture, 5, restricted.train, task, Runtime("cpu", "float32"), held_out_fraction=0.5
        )
        tuning = FineTuning(optimiser="sgd", lr=0.1, weight_decay=0.0, batch_size=20, steps=4)
        loss = simulator.simulate(state, tuning, step_weights("linear", 4), task.suppression("klu"), found, 0)
        return loss, found

    loss, whole = simulated(100)
    same, parts = simulated(most)
    assert same == pytest.approx(loss, abs=1e-6)
    assert whole.sums.keys() == parts.sums.keys()
    assert all(torch.allclose(v, parts.sums[n], atol=1e-6) for n, v in whole.sums.items())


def test_evaluation_in_parts_knows_where_it_is(original) -> None:
    class Placed(Classification):
        places: ClassVar[list[tuple[int, int]]] = []

        def forward(self, model: nn.Module, inputs: Tensor, targets: Tensor, first: int | None = None) -> Tensor:
            outputs = super().forward(model, inputs, targets, first)
            self.places.append((first or 0, len(inputs)))
            return outputs

    data = original.validation.subset(torch.arange(25))
    whole = evaluate(Narrow(100), data, Classification(), Runtime("cpu", "float32"), batch_size=10)
    parts = evaluate(Narrow(4), data, Placed(), Runtime("cpu", "float32"), batch_size=10)
    assert parts == pytest.approx(whole, abs=1e-6)
    assert Placed.places == [(0, 3), (3, 3), (6, 3), (9, 1), (10, 3), (13, 3), (16, 3), (19, 1), (20, 3), (23, 2)]


REAL = """
import resource, torch
from torch import nn
from holdfast.runtime import Runtime
from holdfast.training import fit
torch.set_num_threads(1)
model = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 1, 3), nn.Flatten(), nn.LazyLinear(2))
runtime = Runtime("cpu", "float32", False)
def step(count):
    batch = (torch.ones(count, 1, 32, 32), torch.zeros(count, dtype=torch.int64))
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    return fit(model, [batch], nn.functional.cross_entropy, optimiser, runtime=runtime)
step(2)  # for two images oneDNN keeps its primitives; once it has been refused memory it makes no new ones
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + ROOM * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
print(step(1000).steps, runtime.micro.most)  # 256 MiB for what the first layer alone gives
"""


@pytest.mark.parametrize("room", [60, 150, 200])  # MiB: torch's own allocator says no first, or oneDNN does
def test_the_real_allocator_says_no(room: int) -> None:
    program = REAL.replace("ROOM", str(room))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    steps, most = map(int, done.stdout.split())
    assert steps == 1
    assert 1 < most < 1000
    assert "out of memory with 1000 samples at once: from here on at most 500" in done.stderr


def test_allocators_are_known_by_what_they_say() -> None:
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to …"))
    assert out_of_memory(RuntimeError("could not create a primitive"))
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("std::bad_alloc"))
    assert not out_of_memory(RuntimeError("could not create a primitive descriptor for the matmul primitive"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_activations_computed_anew_give_the_same_gradients() -> None:
    architecture = Architecture("resnet18", size=32, channels=3)
    images, labels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    found = []
    for checkpointing in (False, True):
        model = Runtime("cpu", "float32", checkpointing=checkpointing).place(architecture.build(3, 1)).train()
        assert getattr(model, "grad_checkpointing", None) is checkpointing
        F.cross_entropy(model(images), labels).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_a_network_that_cannot_recompute_is_told() -> None:
    with pytest.raises(UserError, match="Sequential cannot recompute its activations; networks of timm and diffusers"):
        Runtime("cpu", "float32", checkpointing=True).place(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
@pytest.mark.parametrize("kept", [False, True])
def test_what_was_freed_is_not_cleared_by_the_system_again(kept: bool) -> None:
    """Page faults of 50 steps that each allocate and free 3 × 40 MB, 29,297 pages of 4 KiB, in a process of its own."""
    code = f"""
import resource, torch
from holdfast.memory import keep_freed
from holdfast.runtime import Runtime
Runtime.choose("cpu") if {kept} else None
def step():
    blocks = [torch.ones(10**7) for _ in range(3)]
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    plain = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    faults = int(found.stdout)
    assert (faults < 50 * 29_297 / 10) if kept else (faults > 50 * 29_297 * 0.9)
