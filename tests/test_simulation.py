"""Simulated fine-tuning against an independent unroll, in which K graphs are kept and nothing of ours is used."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from holdfast.attacks.standardise import Standardise
from holdfast.attacks.structure import LeakyActivations
from holdfast.attacks.weights import BatchNormStatistics
from holdfast.domains import holdout
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.losses import inverse_cross_entropy
from holdfast.runtime import Runtime
from holdfast.seeding import derive, generator
from holdfast.simulation import Accumulator, Simulator, accumulate_along_path, step_weights, thinned
from holdfast.tasks import Classification
from holdfast.training import minibatches

STEPS = 6


@pytest.fixture
def batches(restricted, runtime):
    half = restricted.halves(0)[0]
    adapt, evaluate = holdout(half.labels, 0.3, generator(0, "test"))
    first = list(minibatches(half, 20, STEPS, 1, runtime, within=adapt))
    second = list(minibatches(half.subset(evaluate), 10, STEPS, 2, runtime))
    return first, second


def ours(model, tuning, batches, gammas, runtime=None):
    accumulator = Accumulator()
    parameters = list(model.parameters())
    adapt, held_out = batches
    loss = accumulate_along_path(
        model,
        tuning,
        parameters,
        iter(adapt),
        iter(held_out),
        gammas,
        task=Classification(),
        suppression=inverse_cross_entropy,
        accumulator=accumulator,
        names={n: n for n, _ in model.named_parameters()},
        runtime=runtime or Runtime(),
    )
    return accumulator.sums, loss


def unrolled_sgd(model, lr, batches, gammas):
    """First-order MAML as a graph: ϑ ← ϑ − lr·stop(g), Σ γ_k·L_k, one backward through everything."""
    model.train()
    theta = {n: p.detach().clone().requires_grad_(True) for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    adapted, total = dict(theta), torch.zeros(())
    for gamma, (x, y), (xt, yt) in zip(gammas, *batches, strict=True):
        loss = F.cross_entropy(functional_call(model, (adapted, buffers), (x,)), y)
        grads = torch.autograd.grad(loss, list(adapted.values()), retain_graph=True)
        adapted = {n: p - lr * g.detach() for (n, p), g in zip(adapted.items(), grads, strict=True)}
        total = total + gamma * inverse_cross_entropy(functional_call(model, (adapted, buffers), (xt,)), yt)
    return dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True)), total.item()


def unrolled_adam(model, lr, batches, gammas):
    """The same with Adam's update written out by hand (β 0.9, 0.999, ε 1e-8)."""
    model.train()
    theta = {n: p.detach().clone().requires_grad_(True) for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    m = {n: torch.zeros_like(p) for n, p in theta.items()}
    v = {n: torch.zeros_like(p) for n, p in theta.items()}
    adapted, total = dict(theta), torch.zeros(())
    for t, (gamma, (x, y), (xt, yt)) in enumerate(zip(gammas, *batches, strict=True), start=1):
        loss = F.cross_entropy(functional_call(model, (adapted, buffers), (x,)), y)
        grads = torch.autograd.grad(loss, list(adapted.values()), retain_graph=True)
        for (n, p), g in zip(list(adapted.items()), grads, strict=True):
            m[n] = 0.9 * m[n] + 0.1 * g.detach()
            v[n] = 0.999 * v[n] + 0.001 * g.detach() ** 2
            adapted[n] = p - lr * (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.999**t)).sqrt() + 1e-8)
        total = total + gamma * inverse_cross_entropy(functional_call(model, (adapted, buffers), (xt,)), yt)
    return dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True)), total.item()


@pytest.mark.parametrize("gamma", ["uniform", "linear", "last"])
@pytest.mark.parametrize(("optimiser", "lr", "unroll"), [("sgd", 0.05, unrolled_sgd), ("adam", 0.003, unrolled_adam)])
def test_the_accumulated_gradient_is_that_of_an_unroll(
    gamma, optimiser, lr, unroll, batches, architecture, clean_state
) -> None:
    gammas = step_weights(gamma, STEPS)
    model, twin = architecture.build(5), architecture.build(5)
    for net in (model, twin):
        net.load_state_dict(clean_state)
    expected, expected_loss = unroll(twin, lr, batches, gammas)
    tuning = FineTuning(optimiser=optimiser, lr=lr, weight_decay=0, steps=STEPS, batch_size=20)
    found, loss = ours(model, tuning, batches, gammas)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert found.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().item()
        assert torch.allclose(found[name], expected[name], atol=2e-3 * scale + 1e-7), name


def test_weight_decay_scales_an_unroll_but_not_ours(batches, architecture, clean_state) -> None:
    """The trap of a differentiable unroll: with decay inside the inner step, ∂ϑᵏ/∂θ = (1 − lr·wd)^k."""
    gammas = step_weights("last", STEPS)
    lr, wd = 0.05, 0.1
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    tuning = FineTuning(optimiser="sgd", lr=lr, weight_decay=wd, steps=STEPS, batch_size=20)
    found, _ = ours(model, tuning, batches, gammas)
    # At the adapted weights, by hand: the gradient of the last suppression loss, unscaled.
    xt, yt = batches[1][-1]
    model.train()
    value = inverse_cross_entropy(model(xt), yt)
    expected = torch.autograd.grad(value, list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-6), name


def test_step_weights_sum_to_one() -> None:
    assert step_weights("uniform", 4) == [0.25] * 4
    assert step_weights("linear", 3) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert step_weights("last", 3) == [0, 0, 1]
    with pytest.raises(UserError, match="gamma must be one of"):
        step_weights("some", 3)


def test_every_third_step_has_the_expectation_of_all() -> None:
    gammas = step_weights("linear", 7)
    seen = [thinned(gammas, 3, seed) for seed in range(600)]
    firsts = [next(k for k, g in enumerate(s) if g) for s in seen]
    assert sorted(set(firsts)) == [0, 1, 2]
    assert all(150 < firsts.count(f) < 250 for f in (0, 1, 2))
    chosen = {f: seen[firsts.index(f)] for f in (0, 1, 2)}
    for first, weights in chosen.items():
        assert weights == [3 * g if k % 3 == first else 0 for k, g in enumerate(gammas)]
    assert [sum(w[k] for w in chosen.values()) / 3 for k in range(7)] == pytest.approx(gammas)
    assert thinned(gammas, 1, 0) == gammas


def test_accumulator_adds_and_applies_by_name(architecture) -> None:
    model = architecture.build(5)
    accumulator = Accumulator()
    weight = model[0].weight
    accumulator.add(["0.weight"], [torch.ones_like(weight)], 0.5)
    accumulator.add(["0.weight"], [torch.ones_like(weight)], 0.25)
    accumulator.add(["14.weight"], [torch.zeros(7, 16)], 1.0)  # another head's shape
    accumulator.apply(model)
    assert weight.grad.unique().tolist() == [0.75]
    assert model[14].weight.grad is None
    assert model[14].bias.grad is None
    assert accumulator.finite()
    other = Accumulator()
    other.merge(accumulator)
    other.scale(2)
    assert other.sums["0.weight"].unique().tolist() == [1.5]
    assert accumulator.sums["0.weight"].unique().tolist() == [0.75]


class TestSimulator:
    def simulator(self, architecture, restricted, task, runtime) -> Simulator:
        return Simulator(architecture.build(5), architecture, 5, restricted.halves(0)[0], task, runtime)

    def run(self, simulator, model, tuning, seed=3, edits=()):
        accumulator = Accumulator()
        gammas = step_weights("uniform", tuning.steps)
        done = simulator.simulate(model.state_dict(), tuning, gammas, inverse_cross_entropy, accumulator, seed, edits)
        return done, accumulator.sums

    def test_the_model_its_batch_statistics_and_its_mode_are_untouched(
        self, architecture, clean_state, restricted, task, runtime
    ) -> None:
        model = architecture.build(5).eval()
        model.load_state_dict(clean_state)
        simulator = self.simulator(architecture, restricted, task, runtime)
        self.run(simulator, model, FineTuning(optimiser="adam", lr=0.01, steps=4, batch_size=20))
        assert not model.training
        assert all(torch.equal(v, clean_state[k]) for k, v in model.state_dict().items())
        moved = simulator.learner.state_dict()
        assert not torch.equal(moved["1.running_mean"], clean_state["1.running_mean"])

    def test_a_re_initialised_head_gets_no_gradient(self, architecture, clean_state, restricted, task, runtime) -> None:
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        simulator = self.simulator(architecture, restricted, task, runtime)
        _, kept = self.run(simulator, model, FineTuning.named("direct+all", steps=3, batch_size=20))
        _, fresh = self.run(simulator, model, FineTuning.named("initFC+all", steps=3, batch_size=20))
        assert kept.keys() - fresh.keys() == {"14.weight", "14.bias"}

    def test_a_frozen_body_still_gets_its_suppression_gradient(
        self, architecture, clean_state, restricted, task, runtime
    ) -> None:
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        simulator = self.simulator(architecture, restricted, task, runtime)
        _, sums = self.run(simulator, model, FineTuning.named("initFC+FC", lr=0.1, steps=3, batch_size=20))
        assert sums["0.weight"].abs().max() > 0
        assert torch.equal(simulator.learner.state_dict()["0.weight"], clean_state["0.weight"])

    @pytest.mark.parametrize(
        ("edit", "tuning", "without"),
        [
            (
                (),
                FineTuning.named("last-k+all", k=2, steps=3, batch_size=20),
                {"9.weight", "10.weight", "10.bias", "14.weight", "14.bias"},
            ),
            ((LeakyActivations(),), FineTuning.named("direct+all", steps=3, batch_size=20), set()),
            ((Standardise(),), FineTuning.named("direct+all", steps=3, batch_size=20), set()),
            (
                (BatchNormStatistics(how="reset"),),
                FineTuning.named("direct+all", steps=3, batch_size=20),
                {f"{n}.{p}" for n in (1, 4, 7, 10) for p in ("weight", "bias")},
            ),
            ((), FineTuning.named("direct+LoRA", rank=2, lr=0.1, steps=3, batch_size=20), set()),
        ],
        ids=["last-k", "leaky", "standardise", "batchnorm", "lora"],
    )
    def test_structural_adversaries(
        self, edit, tuning, without, architecture, clean_state, restricted, task, runtime
    ) -> None:
        """Gradients have the protected model's names, but for what does not depend on it any more; the learner that
        all others use stays out of it."""
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        simulator = self.simulator(architecture, restricted, task, runtime)
        before = {n: v.clone() for n, v in simulator.learner.state_dict().items()}
        for _ in range(2):
            sums = self.run(simulator, model, tuning, edits=edit)[1]
            assert set(sums) == {n for n, _ in model.named_parameters()} - without
            assert all(v.shape == dict(model.named_parameters())[n].shape for n, v in sums.items())
            assert sums["0.weight"].abs().max() > 0
        if (edit and edit[0].name in ("leaky", "standardise")) or tuning.train == "lora":
            assert all(torch.equal(v, before[n]) for n, v in simulator.learner.state_dict().items())

    def test_an_edited_adversary_walks_the_path_of_the_edited_model(
        self, architecture, clean_state, restricted, task, runtime
    ) -> None:
        """Leaky activations by hand: another module in the place of each ReLU, and the gradient of an unroll."""
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        simulator = self.simulator(architecture, restricted, task, runtime)
        tuning = FineTuning("keep", optimiser="sgd", lr=0.1, weight_decay=0.0, steps=2, batch_size=20)
        sums = self.run(simulator, model, tuning, 4, (LeakyActivations(0.3),))[1]
        twin = architecture.build(5)
        for name, module in list(twin.named_modules()):
            if isinstance(module, torch.nn.ReLU):
                twin.set_submodule(name, torch.nn.LeakyReLU(0.3))
        twin.load_state_dict(clean_state)
        twin.train()
        adapt, held = holdout(simulator.data.labels, simulator.held_out_fraction, generator(4, "holdout"))
        ours = minibatches(simulator.data, 20, 2, derive(4, "adapt"), runtime, within=adapt)
        theirs = minibatches(simulator.data, 5, 2, derive(4, "evaluate"), runtime, within=held)
        total = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
        for (x, y), (xt, yt) in zip(ours, theirs, strict=True):
            step = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
            with torch.no_grad():
                for p, g in zip(twin.parameters(), step, strict=True):
                    p.sub_(0.1 * g)
            found = torch.autograd.grad(inverse_cross_entropy(twin(xt), yt), list(twin.parameters()))
            for n, g in zip(total, found, strict=True):
                total[n] += g / 2
        for n in total:
            torch.testing.assert_close(sums[n], total[n], rtol=1e-4, atol=1e-5)

    def test_the_seed_decides_everything(self, architecture, clean_state, restricted, task, runtime) -> None:
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        simulator = self.simulator(architecture, restricted, task, runtime)
        tuning = FineTuning.named("initFC+all", optimiser="adam", lr=1e-3, steps=3, batch_size=20)
        one, two, other = (self.run(simulator, model, tuning, seed)[1] for seed in (1, 1, 2))
        assert all(torch.equal(one[k], two[k]) for k in one)
        assert any(not torch.equal(one[k], other[k]) for k in one)
        adapted = replace(tuning, train="lora", rank=2)
        torch.manual_seed(0)
        first = self.run(simulator, model, adapted, 1)[1]
        torch.manual_seed(1)
        second = self.run(simulator, model, adapted, 1)[1]
        assert all(torch.equal(first[k], second[k]) for k in first), "adapters are drawn by the seed too"

    def test_simulation_is_the_audits_fine_tuning(self, architecture, clean_state, restricted, task, runtime) -> None:
        """The adversary that is simulated walks the path that the audit would walk with the same draw."""
        tuning = FineTuning.named("initFC+all", optimiser="adam", lr=1e-3, weight_decay=0, steps=4, batch_size=20)
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        simulator = self.simulator(architecture, restricted, task, runtime)
        self.run(simulator, model, tuning, seed=9)
        adapt, _ = holdout(simulator.data.labels, simulator.held_out_fraction, generator(9, "holdout"))
        twin = architecture.build(5)
        tuning.initialise_from(twin, clean_state, architecture, 5, derive(9, "init"))
        twin.train()
        optimiser = torch.optim.Adam(twin.parameters(), 1e-3)
        for x, y in minibatches(simulator.data.subset(adapt), 20, 4, derive(9, "adapt"), runtime):
            optimiser.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            optimiser.step()
        for (name, p), q in zip(simulator.learner.named_parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-5), name

    def test_a_diverging_adversary_is_reported(self, architecture, clean_state, restricted, task, runtime) -> None:
        broken = {k: v.clone() for k, v in clean_state.items()}
        broken["14.weight"].fill_(math.nan)
        model = architecture.build(5)
        model.load_state_dict(broken)
        simulator = self.simulator(architecture, restricted, task, runtime)
        done, sums = self.run(simulator, model, FineTuning(steps=3, batch_size=20))
        assert math.isnan(done)
        assert sums == {}


def test_held_out_data_are_disjoint_and_stratified(restricted) -> None:
    data = restricted.halves(0)[0]
    adapt, evaluate = holdout(data.labels, 0.25, generator(1, "x"))
    assert not set(adapt.tolist()) & set(evaluate.tolist())
    assert len(adapt) + len(evaluate) == len(data)
    assert set(data.labels[evaluate].tolist()) == set(range(5))
    with pytest.raises(UserError, match="class 1 has one image"):
        holdout(torch.tensor([0, 0, 1]), 0.2, generator(1, "x"))


def test_no_graph_outlives_its_step(batches, architecture, clean_state) -> None:
    """Memory constant in K: what autograd has saved is gone when the next inner step begins."""
    import gc
    import weakref

    alive: weakref.WeakSet = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    model = architecture.build(5)
    model.load_state_dict(clean_state)
    adapt, held_out = batches
    counts = []

    def watched():
        for batch in adapt:
            gc.collect()
            counts.append(len(alive))
            yield batch

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        accumulate_along_path(
            model,
            FineTuning(optimiser="adam", steps=STEPS, batch_size=20),
            list(model.parameters()),
            watched(),
            iter(held_out),
            step_weights("uniform", STEPS),
            task=Classification(),
            suppression=inverse_cross_entropy,
            accumulator=Accumulator(),
            names={n: n for n, _ in model.named_parameters()},
            runtime=Runtime(),
        )
    assert len(counts) == STEPS
    assert max(counts) <= len(list(model.parameters())) * 2  # one step's leftovers at most, not a sum over steps
    assert counts[-1] == counts[1]
