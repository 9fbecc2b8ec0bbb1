"""What only a CUDA device can show: no step waits, memory does not grow with K, graphs compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from holdfast.defences.lockout import Lockout
from holdfast.domains import Domain
from holdfast.finetuning import FineTuning
from holdfast.losses import inverse_cross_entropy
from holdfast.models import Architecture, State, load_state
from holdfast.normalisation import Lent
from holdfast.runtime import Runtime
from holdfast.simulation import Accumulator, Simulator, step_weights
from holdfast.tasks import Classification
from holdfast.training import fit, minibatches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def gpu() -> Runtime:
    return Runtime.choose("cuda", "float32")


@contextmanager
def never_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def trained(
    runtime: Runtime, architecture: Architecture, state: State, data: Domain, steps: int = 12, lr: float = 1e-3
) -> tuple[dict[str, Tensor], float]:
    """Weights after some steps of Adam in a runtime, and the last loss."""
    model = runtime.place(architecture.build(5))
    load_state(model, state)
    optimiser = FineTuning(optimiser="adam", lr=lr).build_optimiser(model.parameters())
    task = Classification()
    batches = minibatches(data.train.to(runtime), 32, steps, 0, runtime)
    result = fit(model, batches, task.loss, optimiser, runtime=runtime, forward=task.forward)
    return {n: v.detach().cpu() for n, v in model.state_dict().items()}, result.loss


def test_no_step_waits_for_the_device(gpu, architecture, clean_state, original) -> None:
    """After the first step, which puts the order of a pass on the device and compiles kernels."""
    model = gpu.place(architecture.build(5))
    load_state(model, clean_state)
    optimiser = FineTuning(optimiser="adam", lr=1e-3).build_optimiser(model.parameters())
    task, data = Classification(), original.train.to(gpu)
    batches = minibatches(data, 16, 30, 0, gpu)
    fit(model, (next(batches) for _ in range(2)), task.loss, optimiser, runtime=gpu, forward=task.forward)
    assert len(data) > 30 * 16
    with never_waiting():
        result = fit(model, batches, task.loss, optimiser, runtime=gpu, forward=task.forward, first_step=2)
    assert result.steps == 30


def test_losses_are_read_late_and_change_nothing(gpu, architecture, clean_state, original) -> None:
    late, loss = trained(gpu, architecture, clean_state, original)
    once, same = trained(replace(gpu, lag=0), architecture, clean_state, original)
    assert gpu.lag > 0
    assert loss == pytest.approx(same, rel=1e-5)
    for name, value in once.items():
        torch.testing.assert_close(late[name], value, rtol=1e-4, atol=1e-5)


def test_the_step_at_which_a_run_diverged_is_exact(gpu, architecture, clean_state, original) -> None:
    model = gpu.place(architecture.build(5))
    load_state(model, clean_state)
    task, steps = Classification(), [0]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        steps[0] += 1
        return task.loss(outputs, targets) * (float("nan") if steps[0] == 5 else 1.0)

    optimiser = torch.optim.SGD(model.parameters(), 1e-3)
    batches = minibatches(original.train.to(gpu), 16, 40, 0, gpu)
    result = fit(model, batches, loss, optimiser, runtime=gpu, forward=task.forward)
    assert result.diverged_at == 5
    assert steps[0] <= 5 + gpu.lag + 1


def test_a_cpu_and_a_gpu_train_alike(gpu, architecture, clean_state, original) -> None:
    theirs, loss = trained(gpu, architecture, clean_state, original, lr=1e-4)
    ours, same = trained(Runtime.choose("cpu", "float32"), architecture, clean_state, original, lr=1e-4)
    assert loss == pytest.approx(same, rel=1e-2)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=2e-2, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("way", [True, "graphs"])
def test_compiled_and_graphed_steps_are_the_same_steps(gpu, architecture, clean_state, original, way) -> None:
    eager, loss = trained(gpu, architecture, clean_state, original, lr=1e-4)
    other, same = trained(replace(gpu, compile=way), architecture, clean_state, original, lr=1e-4)
    assert loss == pytest.approx(same, rel=1e-2)
    for name, value in eager.items():
        torch.testing.assert_close(other[name], value, rtol=2e-2, atol=2e-3)


def simulate(gpu: Runtime, architecture: Architecture, state: State, restricted: Domain, steps: int) -> Accumulator:
    task = Classification()
    learner = gpu.place(architecture.build(5))
    simulator = Simulator(learner, architecture, 5, restricted.train.to(gpu), task, gpu, 0.2)
    tuning = FineTuning(initialise="head", optimiser="adam", lr=1e-3, weight_decay=0.0, batch_size=40, steps=steps)
    accumulator = Accumulator()
    simulator.simulate(state, tuning, step_weights("uniform", steps), inverse_cross_entropy, accumulator, 0)
    return accumulator


def test_memory_of_a_simulation_does_not_grow_with_its_steps(gpu, architecture, clean_state, restricted) -> None:
    peaks = []
    for steps in (5, 5, 60):
        torch.cuda.reset_peak_memory_stats()
        simulate(gpu, architecture, clean_state, restricted, steps)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= 1.05 * peaks[1]


@pytest.mark.slow
def test_a_graphed_simulation_finds_the_eager_gradient(gpu, architecture, clean_state, restricted) -> None:
    eager = simulate(gpu, architecture, clean_state, restricted, 6).sums
    graphed = simulate(replace(gpu, compile="graphs"), architecture, clean_state, restricted, 6).sums
    assert set(eager) == set(graphed)
    for name, value in eager.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(graphed[name], value, rtol=5e-2, atol=2e-2 * scale + 1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_statistics_are_borrowed_on_a_gpu_as_on_a_cpu(kind, layout) -> None:
    """What comes out, and the gradients of both batches and of the weights; kernels differ by layout and type."""
    draw, found = torch.Generator().manual_seed(0), []
    first, second = (torch.randn(n, 16, 6, 6, generator=draw).to(kind).float() for n in (8, 12))
    for device, dtype in (("cpu", torch.float32), ("cuda", kind)):
        layer, lent = nn.BatchNorm2d(16).to(device).train(), Lent()
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 1.5, 16))
            layer.bias.copy_(torch.linspace(-1, 1, 16))
        x, y = (v.to(device, dtype).contiguous(memory_format=layout).detach().requires_grad_() for v in (first, second))
        with lent.lending():
            layer(x)
        with lent.borrowing():
            output = layer(y)
        gradients = torch.autograd.grad(output.float().pow(3).sum(), (x, y, layer.weight, layer.bias))
        found.append([v.detach().float().cpu() for v in (output, *gradients)])
    for theirs, ours in zip(found[1], found[0], strict=True):
        scale = ours.abs().max().item()
        torch.testing.assert_close(theirs, ours, rtol=0, atol=(1e-4 if kind is torch.float32 else 3e-2) * scale)


@pytest.mark.parametrize("terms", [{}, {"hinge": 0, "flat": 0, "spread": 0, "mmd": 30.0}])
def test_lockout_on_a_gpu_begins_as_on_a_cpu(gpu, architecture, clean_state, original, restricted, terms) -> None:
    """A network with batch normalisation, three steps of both kinds of terms."""
    losses = []
    for runtime in (gpu, Runtime.choose("cpu", "float32")):
        model = runtime.place(architecture.build(5))
        load_state(model, clean_state)
        spec = Lockout(iterations=1, steps=3, check_every=1, probe_steps=2, batch_size=40, lr=1e-4, close=2, **terms)
        history = spec.protect(
            model,
            original,
            restricted.train,
            restricted_classes=5,
            architecture=architecture,
            task=Classification(),
            runtime=runtime,
        )
        losses.append(history.checks[-1]["lockout"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
