"""NTL, UNSIR, SKD and Reverse-MAML: their mathematics, by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.defences.base import Given
from holdfast.defences.ntl import NTL, ntl_loss
from holdfast.defences.ntp import NTP, ntp_loss
from holdfast.defences.reverse_maml import ReverseMAML, adapt, episode, meta_gradient
from holdfast.defences.skd import SKD, distillation_loss, misses
from holdfast.defences.unsir import UNSIR, noise_loss
from holdfast.errors import UserError
from holdfast.features import Tap, last_rectifier, silences
from holdfast.models import Architecture
from holdfast.pruning import prunable, sparsity
from test_defences import QUICK_MAML, QUICK_NTP, QUICK_SKD, QUICK_UNSIR, protect


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


class TestNTL:
    def test_the_product_by_hand(self) -> None:
        """1 − min(0.1·4, 1)·min(0.1·5, 1) = 0.8; d/dL_r = −0.1·0.5, d/dMMD = −0.4·0.1."""
        original, restricted, distance = scalar(1.0), scalar(4.0), scalar(5.0)
        loss = ntl_loss(original, restricted, distance, NTL())
        assert loss.item() == pytest.approx(0.8)
        gradients = torch.autograd.grad(loss, (original, restricted, distance))
        assert [g.item() for g in gradients] == pytest.approx([1, -0.05, -0.04])
        assert ntl_loss(original, restricted, distance, NTL(), strength=0.5).item() == pytest.approx(0.9)

    def test_a_factor_at_its_bound_has_no_gradient(self) -> None:
        restricted, distance = scalar(40.0), scalar(5.0)
        loss = ntl_loss(scalar(1.0), restricted, distance, NTL())
        assert loss.item() == pytest.approx(0.5)
        assert [g.item() for g in torch.autograd.grad(loss, (restricted, distance))] == pytest.approx([0, -0.1])

    def test_more_restricted_classes_than_the_head_has(self) -> None:
        with pytest.raises(UserError, match="head and classes do not agree"):
            NTL().check_classes(5, 6)


def small_vgg(classes: int) -> nn.Module:
    """VGG-11's convolutions with one linear layer: its own three hold 120 million weights."""
    from torchvision.models import vgg11

    return nn.Sequential(vgg11().features, nn.Flatten(), nn.Linear(512, classes))


class TestNTP:
    def test_the_loss_by_hand(self) -> None:
        """1 − 1·min(4, 3) + 10·0.2 = 0, and with half the strength 1 − ½·(3 − 2) = 0.5."""
        spec = NTP(bound=3.0, gamma=10.0)
        assert ntp_loss(scalar(1.0), scalar(4.0), scalar(0.2), spec).item() == pytest.approx(0.0)
        assert ntp_loss(scalar(1.0), scalar(4.0), scalar(0.2), spec, 0.5).item() == pytest.approx(0.5)

    def test_the_result_is_sparse_with_its_head_whole(
        self, clean_state, original, restricted, architecture, task, runtime
    ) -> None:
        model, history = protect(QUICK_NTP, clean_state, original, restricted, architecture, task, runtime)
        head = architecture.head(model, 5)
        weights = {n: model.get_parameter(n) for n in prunable(model, tuple(head))}
        assert history.released
        assert sparsity(weights) == pytest.approx(QUICK_NTP.sparsity, abs=0.01)
        assert (model.get_parameter(f"{head[0]}.weight") != 0).all()
        assert {"primal", "dual", "sparsity", "fisher"} <= history.checks[1].keys()
        assert history.checks[-1]["iteration"] <= QUICK_NTP.iterations + QUICK_NTP.retrain

    def test_restricted_classes_beyond_the_head_without_a_loss_of_their_own(
        self, clean_state, original, architecture, task, runtime
    ) -> None:
        from holdfast.domains import load_domain

        model = architecture.build(5)
        model.load_state_dict(clean_state)
        many = load_domain("digits", architecture.preprocessing)
        spec = replace(QUICK_NTP, alpha=0.0, iterations=1, retrain=1, check_every=1)
        arguments = {"architecture": architecture, "task": task, "runtime": runtime}
        assert (
            spec.protect(model, original, many.train, restricted_classes=10, **arguments).checks[-1]["restricted loss"]
            == 0
        )
        with pytest.raises(UserError, match="alpha > 0"):
            QUICK_NTP.protect(model, original, many.train, restricted_classes=10, **arguments)

    def test_it_stops_when_the_residual_is_small(
        self, clean_state, original, restricted, architecture, task, runtime
    ) -> None:
        spec = replace(QUICK_NTP, residual=100.0, retrain=2, iterations=50)
        _, history = protect(spec, clean_state, original, restricted, architecture, task, runtime)
        assert history.checks[-1]["iteration"] == 3, "one of ADMM, two of retraining"

    @pytest.mark.parametrize(("primal", "dual", "stops"), [(0.01, 0.01, 1), (0.01, 0.9, 4), (0.9, 0.01, 4)])
    def test_both_residuals_must_be_small(
        self, primal, dual, stops, clean_state, original, restricted, architecture, task, runtime, monkeypatch
    ) -> None:
        from holdfast.pruning import ADMM

        update = ADMM.update

        def told(self, weights, project):
            update(self, weights, project)
            return primal, dual

        monkeypatch.setattr(ADMM, "update", told)
        spec = replace(QUICK_NTP, residual=0.05, retrain=1, iterations=4, steps=1, probe_steps=1)
        _, history = protect(spec, clean_state, original, restricted, architecture, task, runtime)
        assert history.checks[-1]["iteration"] == stops + 1

    def test_the_soft_threshold_is_lambda_over_rho(self) -> None:
        values = {"a": torch.tensor([0.3, -0.05])}
        spec = NTP(projection="soft", l1=0.01)
        assert spec.project(values, 0.1)["a"].tolist() == pytest.approx([0.2, 0.0])
        assert spec.project(values, 0.2)["a"].tolist() == pytest.approx([0.25, 0.0])
        assert spec.project(values, 1.0)["a"].tolist() == pytest.approx([0.29, -0.04])

    def test_one_step_by_hand(self, clean_state, original, restricted, architecture, task, runtime) -> None:
        """The restricted batch is the one that is pushed and whose classes collapse; Adam's first step is −lr·sign."""
        from holdfast.pruning import ADMM
        from holdfast.separation import fisher_ratio

        spec = NTP(gamma=2.0, alpha=0.5, steps=1, weight_decay=0.0, batch_size=20, rho=0.1)
        model, other = architecture.build(5), architecture.build(5)
        for m in (model, other):
            m.load_state_dict(clean_state)
            m.train()
        given = Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime)
        engine = spec.prepare(given)
        (ours,) = given.batches(original.train, 20, "original", 0)
        (theirs,) = given.batches(given.restricted, 20, "restricted", 0)
        statistics = {n: b.clone() for n, b in other.named_buffers()}
        kept = task.loss(other(ours[0]), ours[1])
        after_ours = {n: b.clone() for n, b in other.named_buffers()}
        with Tap(other, engine.head[0]) as tap:
            pushed = task.loss(other(theirs[0]), theirs[1])
        admm = ADMM({n: other.get_parameter(n) for n in engine.names}, 0.1)
        total = kept - 0.5 * pushed + 2.0 * fisher_ratio(tap.value, theirs[1])
        (total + admm.penalty({n: other.get_parameter(n) for n in engine.names})).backward()
        losses = engine.iterate(1, 1.0)
        assert losses["restricted loss"] == pytest.approx(pushed.item(), rel=1e-4)
        assert losses["ntp"] == pytest.approx(total.item(), rel=1e-4)
        for name, p in model.named_parameters():
            gradient = other.get_parameter(name).grad
            sure = gradient.abs() > 1e-4
            step = (p.detach() - clean_state[name])[sure]
            assert torch.allclose(step, -spec.lr * gradient[sure].sign(), rtol=0.02), name
        for name, b in model.named_buffers():
            if b.is_floating_point():
                assert torch.allclose(b, after_ours[name], atol=1e-6), "restricted images leave no trace"
        assert any(not torch.equal(after_ours[n], statistics[n]) for n in statistics)

    @pytest.mark.parametrize("change", [{"regulariser": "mmd"}, {"regulariser": "none"}, {"projection": "soft"}])
    def test_its_variants(self, change, clean_state, original, restricted, architecture, task, runtime) -> None:
        spec = replace(QUICK_NTP, **change, iterations=2, retrain=1, check_every=1)
        _, history = protect(spec, clean_state, original, restricted, architecture, task, runtime)
        assert history.checks[-1]["iteration"] == 3
        assert history.checks[-1]["sparsity"] > 0

    @pytest.mark.parametrize(
        "architecture",
        [
            Architecture(
                "vit_tiny_patch16_224", 32, 3, options={"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
            ),
            Architecture("vgg", 32, 3, factory=small_vgg),
        ],
    )
    def test_a_vision_transformer_and_a_vgg(self, architecture, task, runtime) -> None:
        from holdfast.domains import DomainSpec, load_domain

        kept, other = (
            load_domain(DomainSpec(f"digits[{c}]", per_class=8, test_per_class=2), architecture.preprocessing)
            for c in ("0-1", "5-6")
        )
        model = architecture.build(2)
        spec = NTP(gamma=1.0, sparsity=0.5, iterations=1, steps=1, retrain=1, check_every=1, probe_steps=1)
        spec = replace(spec, batch_size=4, tolerance=0.99, projection="largest")
        arguments = {"architecture": architecture, "task": task, "runtime": runtime}
        history = spec.protect(model, kept, other.train, restricted_classes=2, **arguments)
        assert history.checks[-1]["sparsity"] == pytest.approx(0.5, abs=0.01)

    def test_the_learning_rate_falls_once_the_mask_is_fixed(
        self, clean_state, original, restricted, architecture, task, runtime
    ) -> None:
        """Two iterations of ADMM at full rate, then ½·(1 + cos π·k/4), k = 0 … 3."""
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        spec = NTP(gamma=1.0, sparsity=0.5, iterations=2, steps=1, retrain=4, lr=0.01)
        engine = spec.engine(Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime))
        rates = []
        for i in range(1, 7):
            engine.iterate(i, 1.0)
            rates.append(engine.adam.param_groups[0]["lr"])
        assert rates == pytest.approx([0.01, 0.01, 0.01, 0.008536, 0.005, 0.001464], rel=1e-3)


class TestUNSIR:
    def test_the_noises_loss_by_hand(self, task) -> None:
        """Uniform logits over 4 classes: −ln 4 + 0.1·mean(1 + 4, 9) = −ln 4 + 0.7."""
        noise = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 0.0]]]])
        loss = noise_loss(torch.zeros(2, 4), torch.tensor([1, 2]), noise, 0.1, task)
        assert loss.item() == pytest.approx(-torch.log(torch.tensor(4.0)).item() + 0.7)

    def test_stages_and_what_is_released(self, clean_state, original, restricted, architecture, task, runtime) -> None:
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        engine = QUICK_UNSIR.engine(Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime))
        assert engine.plan == {"learn": 20, "noise": 5, "impair": 6, "repair": 40}  # (100 + 200)/50, 10·200/50
        assert [engine.stage(i) for i in (1, 20, 21, 26, 32, 71)] == [
            ("learn", 0),
            ("learn", 19),
            ("noise", 0),
            ("impair", 0),
            ("repair", 0),
            ("repair", 39),
        ]
        assert [engine.phase(i) for i in (1, 26, 32)] == ["free", "free", "candidate"]
        assert engine.labels.bincount().tolist() == [10] * 5, "every noise image has its own class's label"
        before = engine.noise[0].images.detach().clone()
        for i in range(1, engine.length + 1):
            engine.iterate(i, 1.0)
            if engine.stage(i) == ("learn", 19):
                assert torch.equal(engine.noise[0].images, before)
        assert not torch.equal(engine.noise[0].images, before)
        parts = [engine._chosen("impair", n) for n in range(6)]
        assert {len(p) for p in parts} == {50}
        assert sorted(torch.cat(parts).tolist()) == list(range(300)), "one epoch"
        joint = engine.joint.state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(value, joint[name][:5] if name.startswith(engine.heads) else joint[name])

    def test_noise_is_impaired_under_its_own_classs_label(
        self, clean_state, original, restricted, architecture, task, runtime, monkeypatch
    ) -> None:
        """Noise image i of class c is painted 10·c + i; batches must say class 5 + c of each, once and no other."""
        from holdfast.defences import unsir

        model = architecture.build(5)
        model.load_state_dict(clean_state)
        spec = replace(QUICK_UNSIR, noise_copies=1)
        engine = spec.engine(Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime))
        with torch.no_grad():
            for c, noise in enumerate(engine.noise):
                for i in range(spec.noise_batch):
                    noise.images[i] = 1000 + 10 * c + i
        batches = []
        fit = unsir.fit

        def seen(model, given, *arguments, **others):
            batches.extend(given)
            return fit(model, given, *arguments, **others)

        monkeypatch.setattr(unsir, "fit", seen)
        first = 1 + sum(engine.plan[n] for n in ("learn", "noise"))
        for i in range(first, first + engine.plan["impair"]):
            engine.iterate(i, 1.0)
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        painted = images.flatten(1).mean(1).round().long() - 1000
        noisy = painted > -500
        assert sorted(painted[noisy].tolist()) == list(range(50))
        assert torch.equal(labels[noisy], 5 + painted[noisy] // 10)
        assert len(labels[~noisy]) == len(engine.retained)
        assert labels[~noisy].max() < 5

    def test_what_is_forgotten_is_on_record(
        self, clean_state, original, restricted, architecture, task, runtime
    ) -> None:
        """The joint model's accuracy on the defender's restricted images: learned first, lost by impairing."""
        _, history = protect(
            replace(QUICK_UNSIR, learn_steps=60), clean_state, original, restricted, architecture, task, runtime
        )
        known = [c["joint restricted"] for c in history.checks if "joint restricted" in c]
        assert max(known) > 0.9
        assert known[-1] < max(known) - 0.2

    def test_the_noise_makes_the_model_wrong(
        self, clean_state, original, restricted, architecture, task, runtime
    ) -> None:
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        spec = replace(QUICK_UNSIR, noise_steps=20, noise_penalty=0.0)
        engine = spec.engine(Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime))
        losses = [next(iter(engine.iterate(i, 1.0).items())) for i in range(1, 41)]
        noisy = [v for n, v in losses if n == "noise"]
        assert noisy[-1] < noisy[0] - 1


class TestSKD:
    def test_the_loss_by_hand(self) -> None:
        """Kept: (1 − 0)² + (2 − 2)²; pushed: (−99 + 100)² + (0 + 100)²; over 4 entries."""
        student = torch.tensor([[1.0, 2.0], [-99.0, 0.0]])
        teacher = torch.tensor([[0.0, 2.0]])
        assert distillation_loss(student, teacher, -100.0).item() == pytest.approx((1 + 1 + 10000) / 4)
        assert distillation_loss(student, teacher, -100.0, 0.5).item() == pytest.approx((1 + 0.5 * 10001) / 4)

    def test_one_step_by_hand(self, clean_state, original, restricted, task, runtime) -> None:
        """Original images regress to the teacher's activations, restricted ones to the target; −lr·sign of that."""
        architecture = Architecture("small_conv", 8, 1, options={"width": 4, "norm": False, "hidden": 6})
        model, twin = architecture.build(5, 3), architecture.build(5, 3)
        given = Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime)
        spec = SKD(target=-2.0, batch_size=10, zero_bias=False, lr=1e-3)
        engine = spec.prepare(given)
        (ours,) = given.batches(original.train, 10, "original", 0)
        (theirs,) = given.batches(given.restricted, 10, "restricted", 0)
        with torch.no_grad(), Tap(twin, engine.activation, "output") as taught:
            twin(ours[0])
        with Tap(twin, engine.activation) as tap:
            twin(torch.cat([ours[0], theirs[0]]))
        kept, pushed = tap.value[:10], tap.value[10:]
        expected = ((kept - taught.value).square().sum() + (pushed + 2).square().sum()) / tap.value.numel()
        expected.backward()
        assert engine.iterate(1, 1.0)["skd"] == pytest.approx(expected.item(), rel=1e-4)
        start = architecture.build(5, 3).state_dict()
        for name, p in model.named_parameters():
            gradient = twin.get_parameter(name).grad
            if gradient is None:
                assert torch.equal(p, start[name]), f"{name}: the head is not distilled"
                continue
            sure = gradient.abs() > 1e-4
            step = (p.detach() - start[name])[sure]
            assert torch.allclose(step, -spec.lr * gradient[sure].sign(), rtol=0.02), name

    def test_the_last_relu_and_what_feeds_it(self) -> None:
        model = Architecture("small_conv", 8, 1, options={"width": 4, "norm": False, "hidden": 6}).build(3)
        activation, before = last_rectifier(model, torch.zeros(1, 1, 8, 8))
        assert isinstance(model.get_submodule(activation), nn.ReLU)
        assert isinstance(model.get_submodule(before or ""), nn.Linear)
        dropping = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.ReLU(), nn.Linear(3, 2))
        assert last_rectifier(dropping, torch.zeros(1, 4)) == ("2", "0"), "dropout hands on what it gets"
        with pytest.raises(UserError, match="no ReLU or ReLU6 module"):
            last_rectifier(nn.Sequential(nn.Linear(4, 2), nn.GELU(), nn.Linear(2, 2)), torch.zeros(1, 4))

    def test_a_residual_stream_feeds_the_relu_and_passes_it_by(self, original, restricted, task, runtime) -> None:
        class Residual(nn.Module):
            """Adds in place; with `after`, what the ReLU cuts off comes back behind it."""

            def __init__(self, classes: int, after: bool) -> None:
                super().__init__()
                self.layer, self.relu, self.head = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)
                self.after = after

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x, y = x.flatten(1), self.layer(x.flatten(1))
                if self.after:
                    return self.head(self.relu(y) + x)
                y += x
                return self.head(self.relu(y))

        example = torch.randn(2, 1, 8, 8)
        for after, feeder in ((False, None), (True, "layer")):
            model = Residual(5, after)
            assert last_rectifier(model, example) == ("relu", feeder)
            assert silences(model, "relu", "head", example) is not after
        architecture = Architecture("mine", 8, 1, factory=lambda classes: Residual(classes, True))
        given = Given(architecture.build(5), original, restricted.halves(0)[0], 5, architecture, task, runtime)
        with pytest.raises(UserError, match="something passes 'relu' by"):
            SKD().check(given)

    def test_what_the_paper_reports_is_measured_on_test_data(
        self, clean_state, original, restricted, architecture, task, runtime
    ) -> None:
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        given = Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime)
        assert SKD().measure(given, restricted.test) == {"misses, restricted": 1, "misses, original": 1}
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.zero_()
                    module.bias.fill_(-1)
        assert SKD().measure(given, restricted.test) == {"misses, restricted": 0, "misses, original": 0}

    def test_an_activation_in_place_does_not_spoil_its_input(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
        with Tap(model, "2") as tap:
            model(torch.randn(50, 1, 1, 2))
        assert (tap.value < 0).any()

    def test_misses(self, task, runtime, restricted) -> None:
        class Odd(nn.Module):
            """Live on images whose mean is above that of all."""

            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(1, 2)
                self.limit = 0.0

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(torch.relu(x.flatten(1).mean(1, keepdim=True) - self.limit))

        model = Odd()
        images = restricted.test.batch(torch.arange(len(restricted.test)), runtime)[0]
        model.limit = images.flatten(1).mean(1).median().item()
        expected = (images.flatten(1).mean(1) > model.limit).float().mean().item()
        assert misses(model, restricted.test, "head", runtime) == pytest.approx(expected)

    def test_restricted_images_lose_their_features(self, original, restricted, task, runtime, tmp_path) -> None:
        from holdfast.finetuning import FineTuning
        from holdfast.pretraining import pretrain

        architecture = Architecture("small_conv", 8, 1, options={"width": 16, "norm": False, "hidden": 64})
        tuning = FineTuning("scratch", optimiser="adam", lr=3e-3, batch_size=50, steps=150)
        state = pretrain(architecture, original, tuning, task, runtime)
        spec = replace(QUICK_SKD, target=-10.0, lr=3e-3, iterations=200, check_every=50)
        model, history = protect(spec, state, original, restricted, architecture, task, runtime)
        assert history.released == 200
        assert history.checks[-1]["misses, training"] < 0.1
        layer = prunable(model)[-2].removesuffix(".weight")
        assert (model.get_submodule(layer).bias == 0).all()

    def test_the_bias_that_is_zeroed_is_a_linear_layers(
        self, architecture, clean_state, original, restricted, task, runtime
    ) -> None:
        """Not a normalisation's: it is needed to tell the domains apart."""
        model, _ = protect(QUICK_SKD, clean_state, original, restricted, architecture, task, runtime)
        normalisations = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all((m.bias != 0).any() for m in normalisations)

    def test_after_a_nan_it_begins_again(self, original, restricted, task, runtime) -> None:
        architecture = Architecture("small_conv", 8, 1, options={"width": 8, "norm": False, "hidden": 16})
        model = architecture.build(5)
        given = Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime)
        engine = QUICK_SKD.engine(given)
        before = {n: copy.deepcopy(s.state_dict()) for n, s in engine.states.items()}
        bias = model.get_parameter(engine.bias)
        engine.iterate(1, 1.0)
        assert (bias == 0).all()
        with torch.no_grad():
            bias.fill_(0.3)  # back to the start
        for name, state in before.items():
            engine.states[name].load_state_dict(state)
        engine.iterate(2, 1.0)
        assert (bias == 0).all()

    def test_a_target_that_no_relu_cuts_off(self) -> None:
        with pytest.raises(UserError, match="target must be negative"):
            SKD(target=1.0)


def quadratic(weights, batch):
    """L = ½·Σ a·(w − b)², batch = (a, b)."""
    return 0.5 * (batch[0] * (weights["w"] - batch[1]) ** 2).sum()


class TestReverseMAML:
    SUPPORT = (torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0]))
    QUERY = (torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))
    W = torch.tensor([2.0, 4.0])

    def test_one_step_of_adaptation(self) -> None:
        """w′ = w − 0.1·a(w − b) = (2 − 0.2, 4 − 0.4)."""
        after = adapt({"w": self.W}, self.SUPPORT, quadratic, 0.1, 1)
        assert after["w"].tolist() == pytest.approx([1.8, 3.6])

    def test_gradients_by_hand(self) -> None:
        """∂L_q/∂w′ = a_q(w′ − b_q) = (1.8, 7.8); dw′/dw = 1 − 0.1·a_s = (0.8, 0.9)."""
        for order, expected in (("first", [1.8, 7.8]), ("second", [1.44, 7.02]), ("reptile", [2.0, 4.0])):
            found, loss = meta_gradient({"w": self.W}, self.SUPPORT, self.QUERY, quadratic, 0.1, 1, order)
            assert found["w"].tolist() == pytest.approx(expected), order
            assert loss.item() == pytest.approx(0.5 * 1.8**2 + 1.5 * 2.6**2)

    def test_reptile_over_two_steps_is_their_mean(self) -> None:
        """The inner gradients a(w − b) are (2, 4), then at (1.8, 3.6): (2·0.8, 3.6)."""
        found, _ = meta_gradient({"w": self.W}, self.SUPPORT, self.QUERY, quadratic, 0.1, 2, "reptile")
        assert found["w"].tolist() == pytest.approx([1.8, 3.8])

    def test_second_order_against_finite_differences(self) -> None:
        """Three inner steps through a small network in float64."""
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        batches = [(torch.randn(5, 3).double(), torch.randint(2, (5,))) for _ in range(2)]

        def loss(weights, batch):
            outputs = torch.func.functional_call(net, weights, (batch[0],))
            return nn.functional.cross_entropy(outputs, batch[1])

        weights = {n: p.detach() for n, p in net.named_parameters()}
        found, _ = meta_gradient(weights, *batches, loss, 0.5, 3, "second")
        for name in weights:
            moved = []
            for sign in (1, -1):
                changed = {n: w.clone() for n, w in weights.items()}
                changed[name].view(-1)[0] += sign * 1e-5
                moved.append(loss(adapt(changed, batches[0], loss, 0.5, 3), batches[1]).item())
            assert found[name].view(-1)[0].item() == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-5, abs=1e-8)

    def test_episodes(self, restricted) -> None:
        rng = torch.Generator().manual_seed(0)
        support, query = episode(restricted.train, 3, 4, 6, rng)
        labels = restricted.train.labels
        assert sorted(labels[support].bincount()[labels[support].unique()].tolist()) == [4, 4, 4]
        assert sorted(labels[query].bincount()[labels[query].unique()].tolist()) == [6, 6, 6]
        assert not set(support.tolist()) & set(query.tolist())
        assert set(labels[support].tolist()) == set(labels[query].tolist())

    def test_a_class_of_one_image_takes_no_part(self, restricted) -> None:
        train = restricted.train
        one = torch.cat([torch.nonzero(train.labels == c).flatten()[: 1 if c == 1 else 6] for c in range(3)])
        support, query = episode(train.subset(one), None, 3, 3, torch.Generator().manual_seed(0))
        labels = train.labels[one]
        assert set(labels[support].tolist()) == set(labels[query].tolist()) == {0, 2}
        with pytest.raises(UserError, match="3 classes of at least 2 images, but there are 2"):
            episode(train.subset(one), 3, 3, 3, torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("order", ["second", "first", "reptile"])
    def test_every_order_and_episodes_of_few_classes(
        self, order, clean_state, original, restricted, architecture, task, runtime
    ) -> None:
        spec = replace(QUICK_MAML, order=order, ways=3, iterations=2, check_every=1)
        _, history = protect(spec, clean_state, original, restricted, architecture, task, runtime)
        assert {"original task", "restricted task", "anchor"} <= history.checks[-1].keys()

    def test_the_engines_step_by_hand(
        self, clean_state, original, restricted, architecture, task, runtime, monkeypatch
    ) -> None:
        """Original episodes are descended on, restricted ones ascended on up to `bound`, and the anchor descended."""
        from holdfast.defences.reverse_maml import Episodes

        spec = ReverseMAML(tasks=1, ascent=0.5, anchor=2.0, clip=1e9, bound=5.0)
        names = [n for n, _ in architecture.build(5).named_parameters()]

        for loss, pushes in ((1.0, 1), (6.0, 0)):
            model = architecture.build(5)
            model.load_state_dict(clean_state)
            given = Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime)
            engine = spec.prepare(given)

            def told(self, seed, loss=loss):
                ours = self.data is original.train
                return {names[0]: torch.full_like(clean_state[names[0]], 3.0 if ours else 7.0)}, loss

            monkeypatch.setattr(Episodes, "gradient", told)
            (batch,) = given.batches(original.train, spec.batch_size, "anchor", 0)
            model.train()
            plain = torch.autograd.grad(task.loss(model(batch[0]), batch[1]), list(model.parameters()))
            model.load_state_dict(clean_state)
            engine.iterate(1, 0.8)
            found = {n: p.grad for n, p in model.named_parameters()}
            for name, gradient in zip(names, plain, strict=True):
                expected = 2.0 * gradient
                if name == names[0]:
                    expected = expected + 3.0 - pushes * 0.5 * 0.8 * 7.0
                assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-5), (name, loss)

    def test_second_order_through_fused_attention(self, task, runtime) -> None:
        from holdfast.domains import DomainSpec, load_domain

        options = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
        architecture = Architecture("vit_tiny_patch16_224", 16, 1, options=options)
        kept, other = (
            load_domain(DomainSpec(f"digits[{c}]", per_class=10, test_per_class=4), architecture.preprocessing)
            for c in ("0-1", "5-6")
        )
        given = Given(architecture.build(2), kept, other.train, 2, architecture, task, runtime)
        spec = ReverseMAML(tasks=1, shots=2, queries=2, batch_size=4, inner_steps=1)
        losses = spec.prepare(given).iterate(1, 1.0)
        assert all(torch.isfinite(torch.tensor(v)) for v in losses.values())
        measured = spec.measure(given, other.test)
        assert set(measured) == {"few-shot accuracy, restricted", "few-shot accuracy, original"}
        assert all(0 <= v <= 1 for v in measured.values())

    def test_few_shot_accuracy_tells_a_body_that_knows_from_one_that_does_not(
        self, clean_state, original, restricted, architecture, task, runtime
    ) -> None:
        given = Given(architecture.build(5), original, restricted.halves(0)[0], 5, architecture, task, runtime)
        given.model.load_state_dict(clean_state)
        spec = ReverseMAML(inner_steps=5)
        before = {n: v.clone() for n, v in given.model.state_dict().items()}
        found = spec.measure(given, restricted.test)
        assert found["few-shot accuracy, original"] > max(0.7, found["few-shot accuracy, restricted"])
        assert all(torch.equal(v, before[n]) for n, v in given.model.state_dict().items())

    def test_more_ways_than_classes(self) -> None:
        with pytest.raises(UserError, match="ways = 6"):
            ReverseMAML(ways=6).check_classes(5, 10)


@pytest.mark.parametrize(
    ("defence", "bad"),
    [
        (NTL, {"lr": 0}),
        (NTL, {"loss_bound": -1}),
        (NTP, {"sparsity": 1.0}),
        (NTP, {"projection": "hard"}),
        (NTP, {"budget": "block"}),
        (NTP, {"regulariser": "fischer"}),
        (SKD, {"student": "new"}),
        (SKD, {"lr": 2}),
        (UNSIR, {"repair_epochs": 0}),
        (UNSIR, {"noise_penalty": -1}),
        (ReverseMAML, {"order": "third"}),
        (ReverseMAML, {"ways": 1}),
        (ReverseMAML, {"clip": 0}),
    ],
)
def test_values_out_of_range(defence, bad) -> None:
    with pytest.raises(UserError):
        defence(**bad)
