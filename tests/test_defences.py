"""The contract that every defence meets. One that is not in CASES fails."""

import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.defences.base import Given
from holdfast.defences.lockout import Lockout
from holdfast.defences.ntl import NTL
from holdfast.defences.ntp import NTP
from holdfast.defences.registry import DEFENCES, Identity, defence_class
from holdfast.defences.reverse_maml import ReverseMAML
from holdfast.defences.skd import SKD
from holdfast.defences.sophon import Sophon
from holdfast.defences.unsir import UNSIR
from holdfast.distributed import Group
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture, state_of
from holdfast.runtime import Runtime
from holdfast.tasks import Classification
from holdfast.training import evaluate
from holdfast.workplace import Workplace

QUICK_SOPHON = Sophon(
    adversaries=1,
    inner_steps=4,
    inner_batch_size=(30,),
    inner_lr=(1e-3, 1e-2),
    iterations=20,
    check_every=5,
    ntr_loops=2,
    ntr_batch_size=50,
    probe_steps=10,
    tolerance=0.05,
)
QUICK_NTP = NTP(gamma=1.0, sparsity=0.5, iterations=6, steps=5, retrain=4, check_every=2, probe_steps=10)
QUICK_NTL = NTL(iterations=40, check_every=10, probe_steps=10)
QUICK_UNSIR = UNSIR(
    learn_steps=20,
    noise_steps=5,
    noise_batch=10,
    noise_copies=2,
    retained=40,
    repair_epochs=10,
    batch_size=50,
    check_every=5,
    probe_steps=10,
)
QUICK_SKD = SKD(
    target=-5.0, tolerance=0.4, iterations=80, lr=1e-2, batch_size=40, head_steps=60, check_every=20, probe_steps=10
)
QUICK_LOCKOUT = Lockout(
    iterations=20, steps=10, check_every=5, probe_steps=10, batch_size=50, close=2, hinge=0.3, flat=0.5, spread=0.1
)
QUICK_MAML = ReverseMAML(iterations=6, tasks=1, check_every=3, batch_size=40, probe_steps=10)
CASES = {
    "sophon": QUICK_SOPHON,
    "ntp": QUICK_NTP,
    "skd": QUICK_SKD,
    "reverse-maml": QUICK_MAML,
    "ntl": QUICK_NTL,
    "unsir": QUICK_UNSIR,
    "lockout": QUICK_LOCKOUT,
    "identity": Identity(),
}


def protect(defence, clean_state, original, restricted, architecture, task, runtime, seed=0, workplace=None):
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    history = defence.protect(
        model,
        original,
        restricted.halves(0)[0],
        restricted_classes=5,
        architecture=architecture,
        task=task,
        runtime=runtime,
        seed=seed,
        workplace=workplace,
    )
    return model, history


def test_every_defence_has_a_case() -> None:
    assert DEFENCES.keys() == CASES.keys()
    with pytest.raises(UserError, match="unknown defence 'sofon'"):
        defence_class("sofon")


@pytest.mark.parametrize("name", DEFENCES)
class TestContract:
    def test_it_is_a_frozen_value_with_defaults(self, name) -> None:
        defence = DEFENCES[name]()
        assert hash(defence) == hash(DEFENCES[name]())
        for field in fields(defence):
            with pytest.raises(FrozenInstanceError):
                setattr(defence, field.name, 1)
        assert isinstance(defence.simulates(FineTuning()), bool)
        assert (DEFENCES[name].__doc__ or "").strip()

    def test_the_result_is_within_tolerance_finite_and_the_same_model(
        self, name, clean_state, original, restricted, architecture, task, runtime
    ) -> None:
        model, history = protect(CASES[name], clean_state, original, restricted, architecture, task, runtime)
        assert history.released or name in ("identity", "sophon"), "else the clean model is compared with itself"
        clean = architecture.build(5)
        clean.load_state_dict(clean_state)
        before, after = (evaluate(m, original.validation, task, runtime)[0] for m in (clean, model))
        assert after >= before * (1 - getattr(CASES[name], "tolerance", 0)) - 1e-9
        assert model.state_dict().keys() == clean_state.keys()
        assert all(v.isfinite().all() for v in model.state_dict().values())

    def test_the_seed_decides_everything(
        self, name, clean_state, original, restricted, architecture, task, runtime
    ) -> None:
        short = CASES[name]
        if "iterations" in {f.name for f in fields(short)}:
            short = replace(short, iterations=4, check_every=2)
        one, two = (
            state_of(protect(short, clean_state, original, restricted, architecture, task, runtime, seed=5)[0])
            for _ in range(2)
        )
        assert all(torch.equal(one[k], two[k]) for k in one)


class Killed(Exception):
    """As by `kill -9`, between two iterations."""


# One in every stage, as shares of the whole: ADMM and retraining; learn, noise, impair, repair; GAN, copies, NTL.
DEATHS = {"ntp": (0.3, 0.8), "unsir": (0.2, 0.33, 0.4, 0.8), "source-only ntl": (0.2, 0.5, 0.8)}
RESUMED = {
    **CASES,
    # Both stages, with every term, and each kind of adversary that `recipes/lockout/mnist-usps.yaml` simulates.
    "lockout-sophon": replace(
        QUICK_LOCKOUT,
        iterations=4,
        check_every=2,
        tolerance=0.9,
        peak=0.5,
        reopen=0.5,
        fisher=0.1,
        mmd=0.1,
        answer=0.1,
        augment="shift",
        sophon=Sophon(
            adversaries=2,
            inner_steps=3,
            inner_lr=(1e-3, 1e-2),
            inner_batch_size=(20,),
            inner_initialise=("keep", "head", "last-k"),
            inner_edits=("leaky",),
            iterations=6,
            ntr_loops=2,
        ),
    ),
    "source-only ntl": NTL(
        auxiliary="generated",
        iterations=4,
        gan_steps=4,
        distances=(0.1, 0.3),
        directions=2,
        leave_steps=2,
        generated=5,
        check_every=3,
        probe_steps=2,
    ),
}


@pytest.mark.parametrize("name", sorted(RESUMED.keys() - {"identity"}))
def test_killed_and_resumed_is_undisturbed(
    name, clean_state, original, restricted, architecture, task, runtime, tmp_path, monkeypatch
) -> None:
    """Whatever a defence keeps beside the model must be in its engine's states."""
    from holdfast.defences import base

    arguments = (clean_state, original, restricted, architecture, task, runtime)
    spec = RESUMED[name]
    whole, expected = protect(spec, *arguments)
    run_guarded = base.run_guarded

    deaths = list(DEATHS.get(name, (0.8,)))

    def until(model, states, iterate, *, iterations, **others):
        def dying(i, strength):
            if i > max(1, round(deaths[0] * iterations)):
                raise Killed
            return iterate(i, strength)

        return run_guarded(model, states, dying, iterations=iterations, **others)

    monkeypatch.setattr(base, "run_guarded", until)
    while deaths:
        with pytest.raises(Killed):
            protect(spec, *arguments, workplace=Workplace(tmp_path, resume=True, save_every_seconds=-1))
        deaths.pop(0)
    monkeypatch.setattr(base, "run_guarded", run_guarded)
    again, history = protect(spec, *arguments, workplace=Workplace(tmp_path, resume=True, save_every_seconds=-1))
    assert history.checks == expected.checks
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in whole.state_dict().items())


def test_sophon_suppresses_and_says_what_it_did(
    clean_state, original, restricted, architecture, task, runtime, tmp_path
) -> None:
    model, history = protect(
        QUICK_SOPHON, clean_state, original, restricted, architecture, task, runtime, workplace=Workplace(tmp_path)
    )
    assert any(not torch.equal(v, clean_state[k]) for k, v in model.state_dict().items())
    first, last = history.checks[0], history.checks[-1]
    assert [c["iteration"] for c in history.checks] == [0, 5, 10, 15, 20]
    assert min(c.get("restricted", 1) for c in history.checks) < first["restricted"]
    assert {"fts", "ntr", "original", "strength"} <= last.keys()
    assert (tmp_path / "checkpoint.pt").exists()


def test_reinforcement_sees_images_as_pre_training_did(
    clean_state, original, restricted, architecture, task, runtime
) -> None:
    """Shifted where asked, another shift in every step; the same however far into the run it begins."""
    seen: list[Tensor] = []

    class Watched(Classification):
        def forward(self, model, inputs, targets, first=None):
            if len(inputs) == 24:  # reinforcement's alone
                seen.append(inputs.clone())
            return super().forward(model, inputs, targets, first)

    def batches(augment: str, first: int) -> list[Tensor]:
        seen.clear()
        spec = replace(QUICK_SOPHON, augment=augment, ntr_batch_size=24, ntr_loops=2)
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        engine = spec.prepare(Given(model, original, restricted.train, 5, architecture, Watched(), runtime))
        for iteration in range(first, 3):
            engine.reinforce(iteration)
        return list(seen)

    plain, shifted = batches("none", 1), batches("shift", 1)
    assert len(plain) == len(shifted) == 4
    assert all(
        torch.equal(torch.unique(p), torch.unique(torch.cat([p, s]))) for p, s in zip(plain, shifted, strict=True)
    )
    assert not any(torch.equal(p, s) for p, s in zip(plain, shifted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(shifted[2:], batches("shift", 2), strict=True))
    with pytest.raises(UserError, match="augmentation"):
        Sophon(augment="mirror")


def test_sophon_defaults_are_the_papers() -> None:
    d = Sophon()
    assert (d.alpha, d.beta, d.iterations, d.inner_steps, d.fts_loops, d.ntr_loops, d.adversaries) == (
        3e-4,
        5e-4,
        800,
        50,
        1,
        1,
        3,
    )
    assert d.inner_lr == (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    assert d.inner_batch_size == (50, 100, 150, 200, 250)
    assert d.inner_optimiser == ("adam",)
    assert d.inner_initialise == ("keep", "head")


def test_adversaries_are_drawn_from_all_of_phi() -> None:
    spec = Sophon(inner_optimiser=("adam", "sgd"))
    drawn = [spec.draw(0, i) for i in range(400)]
    assert {d.initialise for d in drawn} == {"keep", "head"}
    assert {d.lr for d in drawn} == set(spec.inner_lr)
    assert {d.batch_size for d in drawn} == set(spec.inner_batch_size)
    assert {d.optimiser for d in drawn} == {"adam", "sgd"}
    counts = [sum(d.lr == lr for d in drawn) for lr in spec.inner_lr]
    assert min(counts) > 50  # 80 each on average
    assert spec.draw(0, 7) == spec.draw(0, 7)


def test_sophon_knows_what_it_simulates() -> None:
    spec = Sophon()
    assert spec.simulates(FineTuning.named("initFC+all", optimiser="adam", lr=1e-3))
    assert not spec.simulates(FineTuning.named("direct+all"))  # momentum was never simulated
    assert not spec.simulates(FineTuning.named("direct+all", optimiser="adam", lr=3e-2))
    assert not spec.simulates(FineTuning.named("initFC+FC", optimiser="adam", lr=1e-3))
    assert not spec.simulates(FineTuning.named("initFC+all", optimiser="adam", lr=1e-3, augment="shift"))
    assert not spec.simulates(FineTuning.named("initFC+all", optimiser="adam", lr=1e-3, mixup=0.2))
    for other in ({"ema": 0.99}, {"schedule": "cosine"}, {"warmup": 5}, {"keep_zeros": True}):
        assert not spec.simulates(FineTuning.named("initFC+all", optimiser="adam", lr=1e-3, **other))


def test_sophon_draws_structural_adversaries() -> None:
    spec = Sophon(
        inner_initialise=("head", "last-k"), inner_k=(2, 3), inner_train=("all", "lora"), inner_edits=("leaky", "noise")
    )
    drawn = [(spec.draw(0, i), spec.draw_edits(0, i)) for i in range(200)]
    assert {t.k for t, _ in drawn if t.initialise == "last-k"} == {2, 3}
    assert {t.k for t, _ in drawn if t.initialise == "head"} == {1}
    assert {t.train for t, _ in drawn} == {"all", "lora"}
    names = [e[0].name if e else "none" for _, e in drawn]
    assert all(40 < names.count(n) < 95 for n in ("none", "leaky", "noise"))
    tuned = FineTuning.named("last-k+all", optimiser="adam", lr=1e-3, k=2)
    assert spec.simulates(tuned)
    assert spec.simulates(tuned, spec.inner_edits[:1])
    assert not spec.simulates(tuned, spec.inner_edits)  # both at once
    assert not spec.simulates(replace(tuned, k=4))
    plain = Sophon()
    assert [plain.draw(3, i).lr for i in range(9)] == [Sophon(inner_edits=("leaky",)).draw(3, i).lr for i in range(9)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inner_edits": ("rebalance",)}, "'rebalance', which does not keep every weight .* valid: batchnorm, leaky"),
        ({"inner_edits": ("nosuch",)}, "unknown edit 'nosuch'"),
        ({"inner_initialise": ("scratch",)}, "inner_initialise holds 'scratch'; valid: keep, head, last-k"),
        ({"inner_train": ("body",)}, "inner_train holds 'body'; valid: all, head, lora"),
        ({"inner_k": (0,)}, "inner_k must be at least 1, but got 0"),
    ],
)
def test_structural_adversaries_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sophon(**wrong)


def test_two_adams_on_the_same_parameters_and_the_suppression_step_by_hand(
    clean_state, original, restricted, architecture, task, runtime
) -> None:
    """One FTS loop is one Adam step at α on the clipped mean gradient of N adversaries."""
    from holdfast.defences.sophon import _Engine
    from holdfast.seeding import derive
    from holdfast.simulation import Accumulator

    spec = replace(QUICK_SOPHON, adversaries=2, clip=0.1)
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    engine = _Engine(spec, Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime))
    accumulator = Accumulator()
    for n in range(2):
        seed = derive(0, "simulation", 1, 0, n)
        tuning = spec.draw(0, 1, 0, n)
        engine.simulator.simulate(model.state_dict(), tuning, engine.gammas, engine.suppression, accumulator, seed)
    accumulator.scale(0.5)
    norm = torch.sqrt(sum((g**2).sum() for g in accumulator.sums.values())).item()
    scale = min(1.0, 0.1 / norm)
    engine.suppress(1, 0, strength=0.5)
    for name, p in model.named_parameters():
        g = accumulator.sums.get(name)
        if g is None:
            continue
        g = g * scale
        expected = clean_state[name] - 0.5 * spec.alpha * g / (g.abs() + 1e-8)  # Adam's first step
        assert torch.allclose(p, expected, atol=2e-6), name
    assert engine.ntr.state_dict()["state"] == {}
    engine.reinforce(1)
    assert len(engine.ntr.state_dict()["state"]) == len(list(model.parameters()))


def test_a_joint_update_by_hand(clean_state, original, restricted, architecture, task, runtime) -> None:
    """One Adam step at β on ∇L_NTR + strength · weight · ∇L_FTS, the latter clipped; twice where ℓ_NTR = 2."""
    from holdfast.defences.sophon import _Engine
    from holdfast.seeding import derive
    from holdfast.simulation import Accumulator

    spec = replace(QUICK_SOPHON, update="joint", weight=0.3, clip=0.1, ntr_loops=1)
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    given = Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime)
    engine = _Engine(spec, given)
    assert list(engine.states) == ["ntr"]
    accumulator = Accumulator()
    arguments = (engine.gammas, engine.suppression, accumulator, derive(0, "simulation", 1, 0, 0))
    engine.simulator.simulate(model.state_dict(), spec.draw(0, 1, 0, 0), *arguments)
    norm = torch.sqrt(sum((g**2).sum() for g in accumulator.sums.values())).item()
    twin = architecture.build(5)
    twin.load_state_dict(clean_state)
    inputs, labels = next(iter(given.batches(original.train, spec.ntr_batch_size, "reinforce", 0, 1)))
    task.loss(twin.train()(inputs), labels).backward()
    losses = engine.iterate(1, 0.5)
    assert set(losses) == {"fts", "ntr"}
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        g = q.grad
        if name in accumulator.sums:
            g = g + 0.5 * 0.3 * accumulator.sums[name] * min(1.0, 0.1 / norm)
        expected = clean_state[name] - spec.beta * g / (g.abs() + 1e-8)
        sure = g.abs() > 1e-6  # Adam's first step is a sign: of a gradient that is nearly 0, that of rounding
        assert torch.allclose(p[sure], expected[sure], atol=2e-6), name


def test_reinforcement_by_distillation_by_hand(clean_state, original, restricted, architecture, task, runtime) -> None:
    """Adam's first step on KL(unprotected ‖ model); the labels play no part, and the teacher stays what it was."""
    from holdfast.defences.sophon import _Engine

    spec = replace(QUICK_SOPHON, reinforcement="distillation", ntr_loops=1)
    model, twin = architecture.build(5), architecture.build(5)
    model.load_state_dict(clean_state)
    engine = _Engine(spec, Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime))
    started = {n: v + 0.01 * torch.randn(v.shape) if v.is_floating_point() else v for n, v in clean_state.items()}
    model.load_state_dict(started)
    twin.load_state_dict(started)
    inputs, _ = next(iter(engine.given.batches(original.train, spec.ntr_batch_size, "reinforce", 0, 1)))
    wanted = engine.teacher(inputs).softmax(1)
    answered = twin.train()(inputs).log_softmax(1)
    value = (wanted * (wanted.log() - answered)).sum(1).mean()
    value.backward()
    assert engine.reinforce(1) == pytest.approx(value.item(), rel=1e-4)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        sure = q.grad.abs() > 1e-6
        expected = started[name] - spec.beta * q.grad / (q.grad.abs() + 1e-8)
        assert torch.allclose(p[sure], expected[sure], atol=2e-6), name
    for name, value in engine.teacher.state_dict().items():
        assert torch.equal(value, clean_state[name]), name


def test_the_repair_of_sophon(clean_state, original, restricted, architecture, task, runtime) -> None:
    """The last 4 of 10 iterations: rates ½·(1 + cos π·k/4), k = 0 … 3, and only there a state can be released."""
    from holdfast.defences.sophon import _Engine

    model = architecture.build(5)
    model.load_state_dict(clean_state)
    given = Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime)
    spec = replace(QUICK_SOPHON, iterations=10, repair=0.4, inner_steps=1)
    engine = _Engine(spec, given)
    assert [engine.phase(i) for i in range(1, 11)] == ["free"] * 8 + ["candidate"] * 2
    found = []
    for i in range(5, 11):
        engine.iterate(i, 0.5)
        found.append((engine.fts.param_groups[0]["lr"], engine.ntr.param_groups[0]["lr"]))
    rates = [1, 1, 1, 0.5 * (1 + 0.5**0.5), 0.5, 0.5 * (1 - 0.5**0.5)]
    assert found == [pytest.approx((0.5 * spec.alpha * r, spec.beta * r)) for r in rates]
    whole = _Engine(replace(spec, repair=0.0), given)
    assert {whole.phase(i) for i in range(1, 11)} == {"candidate"}
    assert {whole.rate(i) for i in range(1, 11)} == {1.0}


def test_the_onset_of_sophon(clean_state, original, restricted, architecture, task, runtime, monkeypatch) -> None:
    """The first 4 of 10 iterations: the adversary's learning rate is a thousandth · 1000^(i/4) of the drawn one."""
    from holdfast.defences.sophon import _Engine

    model = architecture.build(5)
    model.load_state_dict(clean_state)
    given = Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime)
    spec = replace(QUICK_SOPHON, iterations=10, onset=0.4, inner_steps=1, inner_lr=(0.1,), adversaries=1)
    engine, found = _Engine(spec, given), []
    simulate = engine.simulator.simulate

    def seen(simulator, state, tuning, *rest):
        found.append(tuning.lr)
        return simulate(state, tuning, *rest)

    monkeypatch.setattr(type(engine.simulator), "simulate", seen)
    for i in range(1, 7):
        engine.iterate(i, 1.0)
    assert found == pytest.approx([0.1e-3 * 1000**0.25, 0.1e-3 * 1000**0.5, 0.1e-3 * 1000**0.75, 0.1, 0.1, 0.1])
    assert _Engine(replace(spec, onset=0.0), given).onset(1) == 1.0


def test_heads_and_classes_that_disagree_are_refused_before_any_work(
    clean_state, original, restricted, architecture, task, runtime
) -> None:
    model = architecture.build(5)
    arguments = {"architecture": architecture, "task": task, "runtime": runtime}
    with pytest.raises(UserError, match="head and classes do not agree"):
        QUICK_SOPHON.protect(model, original, restricted.train, restricted_classes=7, **arguments)
    with pytest.raises(UserError, match="head and classes do not agree"):
        QUICK_SOPHON.protect(architecture.build(6), original, restricted.train, restricted_classes=5, **arguments)


def test_other_classes_are_fine_where_every_adversary_has_its_own_head(
    clean_state, original, architecture, task, runtime
) -> None:
    from holdfast.domains import load_domain

    three = load_domain("digits[5-7]", architecture.preprocessing)
    spec = replace(QUICK_SOPHON, inner_initialise=("head",), iterations=2, check_every=1)
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    arguments = {"architecture": architecture, "task": task, "runtime": runtime}
    spec.protect(model, original, three.train, restricted_classes=3, **arguments)
    assert model(architecture.example()).shape == (1, 5)


class Dropping(nn.Module):
    """A user's own model, with dropout."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("loss", ["ice", "klu", "ice_logits"])
def test_a_users_own_module_with_every_loss(loss, original, restricted, task, runtime) -> None:
    architecture = Architecture("mine", size=8, channels=1, factory=Dropping)
    model = architecture.build(5)
    spec = replace(QUICK_SOPHON, suppression=loss, iterations=2, check_every=1)
    arguments = {"architecture": architecture, "task": task, "runtime": runtime}
    history = spec.protect(model, original, restricted.train, restricted_classes=5, **arguments)
    assert len(history.checks) == 3


def test_a_real_timm_model(task, runtime) -> None:
    from holdfast.domains import DomainSpec, load_domain

    architecture = Architecture("resnet10t", size=32, channels=3)
    kept = load_domain(DomainSpec("digits[0-4]", per_class=20, test_per_class=5), architecture.preprocessing)
    other = load_domain(DomainSpec("digits[5-9]", per_class=20, test_per_class=5), architecture.preprocessing)
    model = architecture.build(5)
    spec = replace(QUICK_SOPHON, iterations=1, check_every=1, inner_steps=2, probe_steps=2, tolerance=0.9)
    arguments = {"architecture": architecture, "task": task, "runtime": runtime}
    before = state_of(model)
    spec.protect(model, kept, other.train, restricted_classes=5, **arguments)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    "bad",
    [
        {"alpha": 0},
        {"tolerance": 1},
        {"gamma": "some"},
        {"inner_lr": ()},
        {"inner_optimiser": ("adan",)},
        {"clip": -1},
        {"inner_steps": 0},
        {"update": "in turn"},
        {"reinforcement": "both"},
        {"probe_lr": 0.0},
        {"probe_optimiser": "adan"},
        {"weight": 0.0},
        {"repair": 1.1},
        {"onset": -0.1},
        {"inner_initialise": ("scratch",)},
        {"held_out_fraction": 1.0},
    ],
)
def test_values_out_of_range(bad) -> None:
    with pytest.raises(UserError):
        Sophon(**bad)


def test_one_adversary_that_diverges_does_not_spoil_the_others(
    clean_state, original, restricted, architecture, task, runtime, monkeypatch
) -> None:
    from holdfast.defences.sophon import _Engine

    spec = replace(QUICK_SOPHON, adversaries=2)
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    engine = _Engine(spec, Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime))
    whole, calls = type(engine.simulator).simulate, []

    def first_diverges(self, *arguments):
        value = whole(self, *arguments)
        calls.append(value)
        return float("nan") if len(calls) % 2 else value

    monkeypatch.setattr(type(engine.simulator), "simulate", first_diverges)
    assert engine.suppress(1, 0, 1.0) == pytest.approx(calls[1])
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_joint_update_where_a_whole_loop_diverges(
    clean_state, original, restricted, architecture, task, runtime, monkeypatch
) -> None:
    """What is taken along is this iteration's, of the loops that told something; and the loss says that one did not."""
    from holdfast.defences.sophon import _Engine

    spec = replace(QUICK_SOPHON, update="joint", adversaries=1, fts_loops=2, weight=0.3, clip=None)
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    engine = _Engine(spec, Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime))
    whole, calls = type(engine.simulator).simulate, []

    def one_diverges(self, *arguments):
        value = whole(self, *arguments)
        calls.append(value)
        return float("nan") if len(calls) in (3, 5, 6) else value

    monkeypatch.setattr(type(engine.simulator), "simulate", one_diverges)
    assert engine.iterate(1, 1.0)["fts"] == pytest.approx(sum(calls) / 2)
    before = [p.clone() for p in engine.pushes]
    assert math.isnan(engine.iterate(2, 1.0)["fts"])
    engine.pushes = []
    model.zero_grad()
    assert len(before) == len(list(model.parameters()))
    assert math.isnan(engine.iterate(3, 1.0)["fts"])
    assert engine.pushes == []


@pytest.mark.parametrize("update", ["alternating", "joint"])
def test_iterations_in_which_all_adversaries_diverge_are_reinforcement_alone(
    update, clean_state, original, restricted, architecture, task, runtime, monkeypatch
) -> None:
    """They take nothing back: the model is whole."""
    monkeypatch.setattr("holdfast.defences.sophon.Simulator.simulate", lambda *_: math.nan)
    spec = replace(QUICK_SOPHON, update=update, iterations=6, check_every=3)
    arguments = {"restricted_classes": 5, "architecture": architecture, "task": task, "runtime": runtime}
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    history = spec.protect(model, original, restricted.train, **arguments)
    assert (history.rollbacks, history.silent) == (0, 6)
    assert [c["strength"] for c in history.checks] == [1.0, 1.0, 1.0]
    assert [{"fts", "ntr"} & c.keys() for c in history.checks] == [set(), {"ntr"}, {"ntr"}]
    assert not torch.equal(model[14].weight, clean_state["14.weight"])  # it was trained


def test_several_processes_do_not_recompute_batch_normalisation(original, restricted, task, monkeypatch) -> None:
    """Activations that were normalised together cannot be computed anew; without such a layer they can."""
    monkeypatch.setattr("holdfast.defences.base.current", lambda: Group(0, 2))
    runtime = Runtime("cpu", "float32", checkpointing=True)
    for norm in (True, False):
        small = Architecture("small_conv", size=8, channels=1, options={"width": 8, "norm": norm})
        given = Given(small.build(5), original, restricted.train, 5, small, task, runtime)
        if norm:
            with pytest.raises(UserError, match=r"batch normalisation has found together, .* set it to false"):
                QUICK_SOPHON.check(given, build=False)
        else:
            QUICK_SOPHON.check(given, build=False)


def test_a_probe_that_diverges_is_never_selected(
    clean_state, original, restricted, architecture, task, runtime
) -> None:
    from holdfast.defences.sophon import _Engine

    model = architecture.build(5)
    model.load_state_dict(clean_state)
    with torch.no_grad():
        model[14].weight.fill_(float("inf"))
    engine = _Engine(QUICK_SOPHON, Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime))
    assert engine.restricted_metric.probe("keep") == 1.0
