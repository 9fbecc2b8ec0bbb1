"""The one loop against a loop written out by hand; batches; strategies."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.errors import UserError
from holdfast.finetuning import ALIASES, OPTIMISERS, FineTuning
from holdfast.models import Architecture, state_of
from holdfast.tasks import Classification
from holdfast.training import evaluate, fit, minibatches


def test_fit_is_forward_backward_update(runtime) -> None:
    torch.manual_seed(0)
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    batches = [(torch.randn(4, 3), torch.randint(0, 2, (4,))) for _ in range(5)]
    seen = []
    result = fit(
        model,
        batches,
        F.cross_entropy,
        torch.optim.SGD(model.parameters(), 0.1),
        runtime=runtime,
        after_step=lambda step, loss: seen.append((step, loss.item())),
    )
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(twin(x), y)
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for p, g in zip(twin.parameters(), grads, strict=True):
                p -= 0.1 * g
        losses.append(loss.item())
    assert torch.allclose(model.weight, twin.weight, atol=1e-6)
    assert [s for s, _ in seen] == [1, 2, 3, 4, 5]
    assert [v for _, v in seen] == pytest.approx(losses, rel=1e-5)
    assert (result.steps, result.diverged_at) == (5, None)


def test_fit_clips_and_stops(runtime) -> None:
    model = nn.Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    batch = (1e3 * torch.ones(1, 2), torch.tensor([0]))
    fit(
        model,
        [batch] * 9,
        F.cross_entropy,
        torch.optim.SGD(model.parameters(), 1.0),
        runtime=runtime,
        clip=0.01,
        after_step=lambda step, _: step == 2,
    )
    assert (model.weight - before).norm() <= 2 * 0.01 + 1e-6


def test_a_loss_that_is_not_finite_never_reaches_the_weights(runtime) -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    batch = (torch.full((1, 2), math.inf), torch.tensor([0]))
    result = fit(model, [batch], F.cross_entropy, torch.optim.SGD(model.parameters(), 1.0), runtime=runtime)
    assert result.diverged_at == 1
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("lag", [1, 3, 8])
def test_a_loss_that_is_read_late_changes_nothing_but_when_it_is_noticed(runtime, lag) -> None:
    batches = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1])) for _ in range(7)]
    outcomes = []
    for late in (0, lag):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        adam = torch.optim.Adam(model.parameters(), 0.1)
        result = fit(model, batches, F.cross_entropy, adam, runtime=replace(runtime, lag=late))
        outcomes.append((result, model.weight.detach().clone()))
    assert outcomes[0][0] == outcomes[1][0]
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize(("lag", "seen"), [(0, 3), (2, 5), (20, 9)])
def test_a_run_that_diverged_ends_lag_steps_later_and_says_where(runtime, lag, seen) -> None:
    """From step 4 on the loss is not finite; what a late reader does meanwhile is not more than `lag` steps."""
    batches = [(torch.full((2, 2), math.inf if i >= 3 else 1.0), torch.tensor([0, 1])) for i in range(9)]
    model, steps = nn.Linear(2, 2), []
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    late = replace(runtime, lag=lag)
    result = fit(model, batches, F.cross_entropy, sgd, runtime=late, after_step=lambda step, _: steps.append(step))
    assert (result.steps, result.diverged_at) == (4, 4)
    assert not math.isfinite(result.loss)
    assert len(steps) == seen


@pytest.mark.parametrize("lag", [0, 5])
def test_no_evaluation_is_noted_as_running_after_the_loss_has_gone(original, runtime, lag) -> None:
    """Whether the loop has noticed yet or not: a fine-tuning that diverged at step 2 was running at step 1 at most."""
    late = replace(runtime, lag=lag)
    architecture = Architecture("small_conv", 8, 1)
    model = architecture.build(5)
    noted = []
    tuning = FineTuning(optimiser="sgd", lr=1000.0, batch_size=20, steps=40)
    result = tuning.run_from(
        {n: v * (1e12 if v.ndim > 1 else 1) for n, v in model.state_dict().items()},
        model,
        original.train,
        Classification(),
        architecture,
        5,
        runtime=late,
        seed=0,
        steps=[1, 4, 40],
        note=lambda step, how: noted.append((step, how)),
    )
    assert result.diverged_at is not None
    assert [n for n in noted if n[0] >= result.diverged_at and n[1] == "running" and n[0] > 0] == []
    assert noted[-1] == (40, "diverged")


def test_minibatches_are_full_cover_every_pass_and_do_not_depend_on_where_one_starts(original, runtime) -> None:
    data = original.train.subset(torch.arange(10))
    marked = replace(data, labels=torch.arange(10))
    batches = [y.tolist() for _, y in minibatches(marked, 4, 10, 7, runtime)]
    assert all(len(b) == 4 for b in batches)
    flat = [label for batch in batches for label in batch]
    for k in range(4):
        assert sorted(flat[10 * k : 10 * k + 10]) == list(range(10))
    later = [y.tolist() for _, y in minibatches(marked, 4, 10, 7, runtime, first_step=6)]
    assert later == batches[6:]
    assert len(next(iter(minibatches(marked, 99, 1, 7, runtime)))[1]) == 10
    some = [y.tolist() for _, y in minibatches(marked, 4, 4, 7, runtime, needed=[False, True, False, True])]
    assert some == [[], batches[1], [], batches[3]]


def test_evaluate_counts_and_leaves_modes_alone(original, architecture, task, runtime) -> None:
    model = architecture.build(5).train()
    before = state_of(model)
    value, loss = evaluate(model, original.test, task, runtime, batch_size=17)
    model.eval()
    x, y = original.test.batch(torch.arange(len(original.test)), runtime)
    assert value == pytest.approx((model(x).argmax(1) == y).float().mean().item(), abs=1e-6)
    assert loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-4)
    model.train()
    evaluate(model, original.test, task, runtime)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_full_of_nan_knows_nothing(task) -> None:
    assert task.score(torch.full((3, 2), math.nan), torch.tensor([0, 1, 0])).sum() == 0


class TestFineTuning:
    def changed(self, model, state, runtime, original, architecture, task, tuning) -> set[str]:
        fresh = tuning.initialise_from(model, state, architecture, 5, seed=1)
        start = state_of(model)
        tuning.run(model, original.train, task, architecture, 5, runtime=runtime, seed=1)
        # An adapter's layer keeps its weights under another name, and adds its own.
        after = {k.replace("base_layer.", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
        moved = {k for k, v in after.items() if not torch.equal(v, start[k])}
        self.kept = {k for k in start if torch.equal(start[k], state[k])}
        self.fresh = fresh
        return moved

    @pytest.mark.parametrize("name", ALIASES)
    def test_what_is_kept_and_what_trains(self, name, clean_state, original, architecture, task, runtime) -> None:
        tuning = FineTuning.named(name, lr=0.01, steps=3, batch_size=20, k=2)
        model = architecture.build(5)
        moved = self.changed(model, clean_state, runtime, original, architecture, task, tuning)
        parameters = {n for n, _ in model.named_parameters()}
        head, last = {"14.weight", "14.bias"}, {"9.weight", "10.weight", "10.bias"}
        expected = {
            "direct+all": (set(), parameters),
            "initFC+FC": (head, head),
            "initFC+all": (head, parameters),
            "last-k+all": (head | last, parameters),
            "initFC+LoRA": (head, head),
            "direct+LoRA": (set(), head),
            "scratch": (parameters, parameters),
        }[name]
        assert self.fresh == expected[0]
        assert moved & parameters == expected[1]
        assert parameters - self.kept >= {n for n in expected[0] if n.endswith("weight") and n != "10.weight"}
        if name == "initFC+FC":
            assert moved == head  # batch statistics stay the pre-trained ones

    def test_keeping_a_head_of_other_classes_is_refused(self, clean_state, architecture) -> None:
        with pytest.raises(UserError, match="head and classes do not agree"):
            FineTuning.named("direct+all").initialise_from(architecture.build(7), clean_state, architecture, 7, 0)
        FineTuning.named("initFC+all").initialise_from(architecture.build(7), clean_state, architecture, 7, 0)

    @pytest.mark.parametrize("name", OPTIMISERS)
    def test_every_optimiser_learns(self, name, original, architecture, task, runtime) -> None:
        lr = {"sgd": 0.3, "momentum": 0.05, "nesterov": 0.05, "adagrad": 0.02, "adadelta": 1.0}.get(name, 0.01)
        tuning = FineTuning.named("scratch", optimiser=name, lr=lr, steps=60, batch_size=60)
        model = architecture.build(5)
        tuning.initialise_from(model, {}, architecture, 5, 0)
        tuning.run(model, original.train, task, architecture, 5, runtime=runtime, seed=0)
        assert evaluate(model, original.test, task, runtime)[0] > 0.8

    def test_schedule_by_hand(self) -> None:
        tuning = FineTuning(schedule="cosine", warmup=4, steps=12)
        assert [tuning.lr_factor(s) for s in (0, 1, 3)] == [0.25, 0.5, 1.0]
        assert tuning.lr_factor(8) == pytest.approx(0.5)
        assert tuning.lr_factor(12) == pytest.approx(0)
        assert FineTuning().build_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)) is None

    def test_the_same_seed_gives_the_same_weights(self, clean_state, original, architecture, task, runtime) -> None:
        found = []
        for _ in range(2):
            model = architecture.build(5)
            tuning = FineTuning.named("initFC+all", optimiser="adam", lr=0.01, steps=5, batch_size=30)
            tuning.initialise_from(model, clean_state, architecture, 5, 3)
            tuning.run(model, original.train, task, architecture, 5, runtime=runtime, seed=3)
            found.append(state_of(model))
        assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])

    @pytest.mark.parametrize(
        "bad", [{"lr": 0}, {"optimiser": "adan"}, {"steps": 0}, {"train": "some"}, {"initialise": "none"}, {"k": 0}]
    )
    def test_values_out_of_range(self, bad) -> None:
        with pytest.raises(UserError):
            FineTuning(**bad)
        with pytest.raises(UserError, match="valid: direct"):
            FineTuning.named("direct")

    def test_the_defaults_are_the_papers_attack(self) -> None:
        t = FineTuning.named("direct+all")
        assert (t.optimiser, t.lr, t.batch_size, t.weight_decay, t.steps) == ("momentum", 1e-4, 200, 1e-4, 5000)


class TestRunFrom:
    """What is noted along a run: while it runs, after it diverged or converged, and when it is told to stop."""

    def noted(self, tuning, state, original, architecture, task, runtime, **more) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        stop = more.pop("stop", None)
        tuning.run_from(
            state,
            architecture.build(5),
            original.train,
            task,
            architecture,
            5,
            runtime=runtime,
            seed=1,
            steps=[2, 4, 8],
            note=lambda step, how: found.append((step, how)) or step == stop,
            **more,
        )
        return found

    def test_to_its_end(self, clean_state, original, architecture, task, runtime) -> None:
        tuning = FineTuning(steps=8, batch_size=20)
        found = self.noted(tuning, clean_state, original, architecture, task, runtime)
        assert found == [(s, "running") for s in (0, 2, 4, 8)]

    def test_told_to_stop(self, clean_state, original, architecture, task, runtime) -> None:
        tuning = FineTuning(steps=8, batch_size=20)
        found = self.noted(tuning, clean_state, original, architecture, task, runtime, stop=4)
        assert found == [(s, "running") for s in (0, 2, 4)]

    def test_converged(self, clean_state, original, architecture, task, runtime) -> None:
        tuning = FineTuning(steps=8, batch_size=20)
        found = self.noted(tuning, clean_state, original, architecture, task, runtime, converged=100.0)
        assert found == [(0, "running"), (2, "running"), (4, "converged"), (8, "converged")]

    def test_diverged(self, clean_state, original, architecture, task, runtime) -> None:
        broken = {n: v.clone() for n, v in clean_state.items()}
        broken["14.bias"][:] = math.nan
        found = self.noted(FineTuning(steps=8, batch_size=20), broken, original, architecture, task, runtime)
        assert found == [(0, "running"), (2, "diverged"), (4, "diverged"), (8, "diverged")]


@pytest.mark.parametrize("optimiser", ["adam", "momentum", "sam"])
def test_a_kept_mask(optimiser, architecture, clean_state, restricted, task, runtime) -> None:
    """Weights at exactly zero stay there with `keep_zeros`, and take part without it; biases at zero always do."""
    state = {n: v.clone() for n, v in clean_state.items()}
    weight = next(n for n, v in state.items() if v.ndim == 4)
    state[weight][:, :, 0] = 0
    for kept in (True, False):
        tuning = FineTuning("head", optimiser=optimiser, lr=1e-2, batch_size=20, steps=3, keep_zeros=kept)
        model = architecture.build(5)
        tuning.initialise_from(model, state, architecture, 5, 0)
        tuning.run(model, restricted.train, task, architecture, 5, runtime=runtime, seed=0)
        after = model.state_dict()[weight]
        assert bool((after[:, :, 0] == 0).all()) == kept
        assert not torch.equal(after[:, :, 1:], state[weight][:, :, 1:])
    assert not tuning.control().keep_zeros
    assert not FineTuning(keep_zeros=True).control().keep_zeros
