"""Weight edits: what keeps the function keeps it, and what revives, revives. On our network and on timm's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.attacks.attack import Attack
from holdfast.attacks.chains import links
from holdfast.attacks.edits import EDITS, make_edit
from holdfast.attacks.preparation import BenignFirst, Distil, Heal
from holdfast.attacks.released import Means, Released
from holdfast.attacks.standardise import Standardise
from holdfast.attacks.structure import EarlierLayer, FoldBatchNorm, LeakyActivations
from holdfast.attacks.weights import (
    BatchNormStatistics,
    Clip,
    Noise,
    Rebalance,
    Regrow,
    ShiftBiases,
    Shuffle,
    rectified_layers,
)
from holdfast.domains import Domain, ImageData
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture, State, state_of
from holdfast.preprocessing import Preprocessing
from holdfast.runtime import Runtime
from holdfast.tasks import Classification

PLAIN = Architecture("small_conv", size=8, channels=1, options={"width": 8, "norm": False})


def released(architecture: Architecture, classes: int = 5) -> Released:
    """A model whose batch normalisations have seen something, as a trained one's have."""
    model = architecture.build(classes, 3)
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(3):
            model(torch.randn(16, architecture.channels, architecture.size, architecture.size))
    return Released(architecture, state_of(model), classes)


@pytest.fixture
def means(original: Domain, restricted: Domain, runtime: Runtime, task: Classification) -> Means:
    return Means(restricted.train, task, runtime, 7, 20, original.train, original.train)


def answers(given: Released, runtime: Runtime) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    a = given.architecture
    with torch.no_grad():
        return given.build(runtime).eval()(torch.randn(8, a.channels, a.size, a.size, generator=generator))


@pytest.fixture(scope="module")
def resnet() -> Released:
    torch.manual_seed(0)
    return released(Architecture("resnet18", size=32, channels=3))


@pytest.fixture(scope="module")
def colour(runtime: Runtime, task: Classification) -> Means:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (32, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = ImageData(images, torch.arange(32) % 5, Preprocessing(32, 3, (0.5,), (0.5,)))
    return Means(data, task, runtime, 7, 4, data, data)


class TestFunctionKept:
    @pytest.mark.parametrize("edit", [Rebalance(), FoldBatchNorm()])
    def test_on_our_network(self, edit, architecture: Architecture, means: Means, runtime: Runtime) -> None:
        for arch in (architecture, PLAIN):
            before = released(arch)
            if edit.obstacle(before) is None:
                after = edit.apply(before, means)
                torch.testing.assert_close(answers(after, runtime), answers(before, runtime), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("edit", [Rebalance(), FoldBatchNorm()])
    def test_on_a_residual_network(self, edit, resnet: Released, colour: Means, runtime: Runtime) -> None:
        after = edit.apply(resnet, colour)
        torch.testing.assert_close(answers(after, runtime), answers(resnet, runtime), rtol=1e-3, atol=1e-3)

    def test_folding_leaves_no_batch_normalisation(self, resnet: Released, colour: Means) -> None:
        after = FoldBatchNorm().apply(resnet, colour)
        assert not any("running_mean" in n for n in after.state)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in after.architecture.build(5).modules())
        assert FoldBatchNorm().obstacle(after) is not None

    def test_what_does_not_follow_directly_is_not_folded(self, means: Means, runtime: Runtime) -> None:
        def between(classes: int) -> nn.Module:
            layers = [
                nn.Conv2d(1, 4, 3, padding=1),
                nn.ReLU(),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 4, 3),
                nn.BatchNorm2d(4),
            ]
            return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes))

        given = released(Architecture("between", size=8, channels=1, factory=between))
        after = FoldBatchNorm().apply(given, means)
        assert any(n.startswith("2.") for n in after.state)
        assert not any(n.startswith("4.") for n in after.state)
        torch.testing.assert_close(answers(after, runtime), answers(given, runtime), rtol=1e-3, atol=1e-4)


class TestRebalance:
    def test_links_of_a_chain_are_all_found(self) -> None:
        model = PLAIN.build(5, 1)
        found = [(link.first, link.second) for link in links(model, torch.randn(4, 1, 8, 8))]
        assert found == [("0", "2"), ("2", "4"), ("4", "6"), ("6", "10")]

    def test_a_normalisation_undoes_any_scale_before_it(self, architecture: Architecture) -> None:
        model = architecture.build(5, 1)
        found = {(link.first, link.second): link.statistics for link in links(model, torch.randn(4, 1, 8, 8))}
        assert found["0", "1"] is True
        assert found["1", "3"] is False

    def test_skip_connections_are_no_links(self, resnet: Released, runtime: Runtime) -> None:
        model = resnet.build(runtime)  # untrained, its residual branches would give 0 and be scaled by anything
        pairs = {(link.first, link.second) for link in links(model, torch.randn(2, 3, 32, 32))}
        assert ("layer1.0.bn1", "layer1.0.conv2") in pairs
        assert not any(first == "layer1.0.bn2" for first, _ in pairs)

    def test_it_undoes_a_rescaling(self, means: Means, runtime: Runtime) -> None:
        before = released(PLAIN)
        scaled = before.having(_rescaled(before, runtime))
        torch.testing.assert_close(answers(scaled, runtime), answers(before, runtime), rtol=1e-3, atol=1e-4)
        after = Rebalance().apply(scaled, means)
        torch.testing.assert_close(answers(after, runtime), answers(before, runtime), rtol=1e-3, atol=1e-4)
        fresh = PLAIN.build(5, 9).state_dict()

        def sizes(state: State) -> list[float]:
            names = [n for n in state if n.endswith("weight")]
            rows = [(state[n].flatten(1), fresh[n]) for n in names]
            return [float(s) for row, other in rows for s in row.square().mean(1).sqrt() / other.square().mean().sqrt()]

        assert max(sizes(scaled.state)) / min(sizes(scaled.state)) > 1e5
        assert all(0.4 < s < 2.5 for s in sizes(after.state))


def _rescaled(given: Released, runtime: Runtime) -> nn.Module:
    """Channels of layers 0 and 2, 4 and 6 scaled against each other, over six decades: the same function."""
    model = given.build(runtime)
    with torch.no_grad():
        for first, second in (("0", "2"), ("4", "6")):
            layer = model.get_submodule(first)
            factors = torch.logspace(-3, 3, len(layer.bias))  # type: ignore[arg-type]
            layer.weight.mul_(factors[:, None, None, None])
            layer.bias.mul_(factors)
            model.get_submodule(second).weight.div_(factors[:, None, None])
    return model


class TestWeights:
    def test_clipped_singular_values(self, architecture: Architecture, means: Means) -> None:
        before = released(architecture)
        before.state["3.weight"][0] *= 50
        after = Clip(ratio=2.0).apply(before, means)
        values = torch.linalg.svdvals(before.state["3.weight"].flatten(1))
        clipped = torch.linalg.svdvals(after.state["3.weight"].flatten(1))
        torch.testing.assert_close(clipped, values.clamp(max=2.0 * float(values.mean())), rtol=1e-3, atol=1e-4)

    def test_noise_is_as_large_as_it_says(self, architecture: Architecture, means: Means) -> None:
        before = released(architecture)
        after = Noise(scale=0.5).apply(before, means)
        weight = before.state["9.weight"]
        ratio = float((after.state["9.weight"] - weight).std() / weight.std())
        assert ratio == pytest.approx(0.5, rel=0.1)
        assert torch.equal(after.state["1.running_mean"], before.state["1.running_mean"])

    def test_shuffled_tensors_keep_their_values_and_nothing_else(
        self, architecture: Architecture, means: Means
    ) -> None:
        before = released(architecture)
        after, again = (Shuffle().apply(before, means) for _ in range(2))
        for name, value in before.state.items():
            if "running" in name or "tracked" in name:  # as a fresh model's, from which the control starts
                assert bool((after.state[name] == float(name.endswith("var"))).all())
            else:
                assert torch.equal(after.state[name].flatten().sort().values, value.flatten().sort().values)
                assert torch.equal(after.state[name], again.state[name])
        for name in ("0.weight", "3.weight", "9.weight"):
            kept = torch.corrcoef(torch.stack([before.state[name].flatten(), after.state[name].flatten()]))[0, 1]
            assert abs(float(kept)) < 5 / before.state[name].numel() ** 0.5, "five deviations of chance"

    def test_regrown_weights_are_fresh_and_the_others_stay(self, architecture: Architecture, means: Means) -> None:
        before = released(architecture)
        assert "no pruned weights" in str(Regrow().obstacle(before))
        mask = before.state["3.weight"].abs() < before.state["3.weight"].abs().median()
        before.state["3.weight"][mask] = 0
        assert Regrow().obstacle(before) is None
        after = Regrow().apply(before, means)
        assert torch.equal(after.state["3.weight"][~mask], before.state["3.weight"][~mask])
        assert int((after.state["3.weight"] == 0).sum()) == 0

    def test_statistics_are_those_of_the_attackers_images(self, architecture: Architecture, means: Means) -> None:
        before = released(architecture)
        after = BatchNormStatistics().apply(before, means)
        images = means.images()
        conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        conv.weight.data = before.state["0.weight"]
        with torch.no_grad():
            expected = conv(images).mean((0, 2, 3))
        torch.testing.assert_close(after.state["1.running_mean"], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(after.state["1.weight"], before.state["1.weight"])
        reset = BatchNormStatistics(how="reset").apply(before, means)
        assert torch.equal(reset.state["1.weight"], torch.ones(8))
        assert float(reset.state["1.running_mean"].abs().sum()) == 0
        assert "no batch normalisation" in str(BatchNormStatistics().obstacle(released(PLAIN)))


class TestRevival:
    """A network whose last convolution is dead on every input: no gradient reaches the body."""

    @pytest.fixture
    def dead(self) -> Released:
        given = released(PLAIN)
        given.state["6.bias"] -= 1000
        return given

    def gradient(self, given: Released, means: Means, runtime: Runtime) -> float:
        model = given.build(runtime)
        loss = means.task.loss(model(means.images()), means.restricted.labels[:256])
        body = [p for n, p in model.named_parameters() if n.startswith("0.")]
        return sum(float(g.abs().sum()) for g in torch.autograd.grad(loss, body))

    def test_a_dead_layer_has_no_gradient(self, dead: Released, means: Means, runtime: Runtime) -> None:
        assert self.gradient(dead, means, runtime) == 0

    @pytest.mark.parametrize("edit", [LeakyActivations(), ShiftBiases()])
    def test_revived(self, edit, dead: Released, means: Means, runtime: Runtime) -> None:
        assert edit.revives
        assert self.gradient(edit.apply(dead, means), means, runtime) > 0

    def test_only_layers_that_feed_a_relu_are_shifted(self, resnet: Released, colour: Means) -> None:
        model = resnet.architecture.build(5)
        found = rectified_layers(model, torch.randn(2, 3, 32, 32))
        assert "layer1.0.bn1" in found
        assert not {"layer1.0.bn2", "layer1.0.conv1", "fc"} & set(found), "bn2 is added to the skip connection first"
        vit = Architecture("vit_tiny_patch16_224", size=32, channels=3, options={"patch_size": 8, "depth": 1})
        assert "no layer with a bias" in str(ShiftBiases().obstacle(Released(vit, state_of(vit.build(5)), 5)))

    def test_only_dead_units_are_shifted(self, dead: Released, means: Means) -> None:
        after = ShiftBiases().apply(dead, means)
        assert (after.state["6.bias"] > dead.state["6.bias"] + 900).all()
        assert torch.equal(after.state["10.bias"], dead.state["10.bias"])


class TestEarlierLayer:
    def test_features_are_the_input_of_the_kth_last_layer(self, architecture: Architecture, means: Means) -> None:
        before = released(architecture)
        after = EarlierLayer(k=2, grid=1).apply(before, means)
        model = after.build(means.runtime).eval()
        whole = before.build(means.runtime).eval()
        images = means.images(4)
        with torch.no_grad():
            expected = nn.Sequential(*list(whole)[:9])(images).mean((2, 3))
            torch.testing.assert_close(model.features(images), expected)
        assert after.architecture.head(model, 5) == ["head"]

    def test_it_keeps_tokens_apart_from_maps(self, means: Means, runtime: Runtime, colour: Means) -> None:
        vit = Architecture("vit_tiny_patch16_224", size=32, channels=3, options={"patch_size": 8, "depth": 2})
        given = Released(vit, state_of(vit.build(5)), 5)
        model = EarlierLayer(k=3).apply(given, colour).build(runtime)
        assert model(colour.images(2)).shape == (2, 5)

    def test_maps_whose_channels_come_last(self, runtime: Runtime, colour: Means) -> None:
        name, options = "convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
        arch = Architecture(name, size=32, channels=3, options=options)
        given = Released(arch, state_of(arch.build(5)), 5)
        model = EarlierLayer(k=2, grid=1).apply(given, colour).build(runtime)
        assert model.features(colour.images(2)).shape[1] == model.body.get_submodule(model.layer).in_features

    def test_too_deep(self, architecture: Architecture) -> None:
        assert "too few for k = 9" in str(EarlierLayer(k=9).obstacle(released(architecture)))


class TestPreparation:
    def test_healing_keeps_the_head_and_says_what_it_cost(self, clean_state: State, means: Means) -> None:
        given = Released(_arch(), clean_state, 5)
        broken = replace(given, state={n: v + 0.1 * v.std() if v.ndim > 1 else v for n, v in clean_state.items()})
        after = Heal(budget=1.0).apply(broken, means)
        assert means.samples == 20 * 64
        assert means.flops > 0
        assert after.state["14.weight"].shape == clean_state["14.weight"].shape

    def test_benign_first_gives_the_released_head_back(self, clean_state: State, means: Means) -> None:
        after = BenignFirst().apply(Released(_arch(), clean_state, 5), means)
        assert torch.equal(after.state["14.weight"], clean_state["14.weight"])
        assert not torch.equal(after.state["0.weight"], clean_state["0.weight"])

    def test_a_student_learns_what_the_teacher_says(
        self, clean_state: State, means: Means, runtime: Runtime, original: Domain
    ) -> None:
        """Taught on original images, a student agrees with its teacher; without their labels."""
        teacher = Released(_arch(), clean_state, 5)
        means.restricted, means.steps = original.train, 160
        student = Distil(budget=1.0, lr=5e-3).apply(teacher, means)
        images = original.test.batch(torch.arange(len(original.test)), runtime)[0]
        with torch.no_grad():
            same = [g.build(runtime).eval()(images).argmax(1) for g in (teacher, student)]
        assert float((same[0] == same[1]).float().mean()) > 0.8
        assert not torch.equal(student.state["0.weight"], clean_state["0.weight"])

    def test_data_that_nobody_has(self, clean_state: State, means: Means) -> None:
        means.original = means.benign = None
        for edit in (Heal(), BenignFirst()):
            with pytest.raises(UserError, match="this attack needs"):
                edit.apply(Released(_arch(), clean_state, 5), means)


def _arch() -> Architecture:
    return Architecture("small_conv", size=8, channels=1, options={"width": 8})


def test_the_attackers_images_are_of_all_classes(means: Means) -> None:
    order = torch.argsort(means.restricted.labels, stable=True)
    sorted_by_class = replace(means, restricted=means.restricted.subset(order))
    shown = sorted_by_class.images(20)
    where = torch.arange(20) * len(order) // 20
    expected, labels = sorted_by_class.restricted.batch(where, means.runtime)
    assert torch.equal(shown, expected)
    assert len(labels.unique()) == len(means.restricted.labels.unique())


class TestStandardised:
    @pytest.mark.parametrize("network", ["small_conv", "resnet18", "vit_tiny_patch16_224"])
    def test_what_every_layer_but_the_first_reads_has_mean_0_and_variance_1(
        self, network: str, runtime: Runtime, colour: Means
    ) -> None:
        options = {"img_size": 32, "patch_size": 8} if network.startswith("vit") else {}
        given = released(Architecture(network, size=32, channels=3, options=options))
        edit = Standardise()
        assert edit.obstacle(given) is None
        after = edit.apply(given, colour)
        assert {n: tuple(v.shape) for n, v in after.state.items() if "standard" not in n} == {
            n: tuple(v.shape) for n, v in given.state.items()
        }
        model = after.build(runtime).train()  # of the batch
        layers = [n.removesuffix(".standard") for n, _ in model.named_modules() if n.endswith(".standard")]
        seen: dict[str, torch.Tensor] = {}
        for name in layers:
            model.get_submodule(f"{name}.standard").register_forward_hook(
                lambda _, __, out, name=name: seen.update({name: out.detach().float()})
            )
        with torch.no_grad():
            model(colour.images())
        assert len(seen) == len(layers) >= 4
        for name, values in seen.items():
            axis = values.ndim - 1 if isinstance(model.get_submodule(name), nn.Linear) else 1
            channels = values.movedim(axis, 0).flatten(1)
            assert channels.mean(1).abs().max() < 1e-3, name
            live = channels.std(1) > 0.1
            assert live.float().mean() > 0.5, name
            assert (channels.std(1, correction=0)[live] - 1).abs().max() < 0.02, name

    def test_it_undoes_what_hides_the_features_behind_a_mean(self, means: Means, runtime: Runtime) -> None:
        """The first layer's outputs a thousandth as far apart, about 5: the same after the edit, up to rounding."""
        given = released(PLAIN)
        hidden = dict(given.state)
        hidden["0.weight"], hidden["0.bias"] = given.state["0.weight"] * 1e-3, given.state["0.bias"] * 1e-3 + 5
        plain = Released(PLAIN, {**given.state, "0.bias": given.state["0.bias"] + 5e3}, given.classes)  # as open
        ours, theirs = (answers(Standardise().apply(r, means), runtime) for r in (replace(given, state=hidden), plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


class TestTable:
    def test_every_edit_is_a_frozen_value_that_says_what_it_needs(self) -> None:
        for name, cls in EDITS.items():
            edit = cls()
            assert edit.name == name
            assert edit.needs
            assert len(edit.summary()) > 20
            assert hash(edit) == hash(cls())

    @pytest.mark.parametrize("name", sorted(EDITS))
    def test_every_edit_composes_with_any_tuning(
        self, name: str, architecture: Architecture, means: Means, runtime: Runtime, task: Classification
    ) -> None:
        given = released(architecture)
        given.state["3.weight"][:2] = 0
        edit = EDITS[name]()
        if name in ("another-schedule", "another-target", "prior-preservation"):  # see test_denoising
            assert edit.obstacle(given) == "not a diffusion model"
            return
        assert edit.obstacle(given) is None
        before = {n: v.clone() for n, v in given.state.items()}
        after = edit.apply(given, means)
        assert all(torch.equal(v, before[n]) for n, v in given.state.items()), "an edit changed what it was given"
        for tuning in (FineTuning("head", steps=2), FineTuning("head", "lora", steps=2), FineTuning("last-k", steps=2)):
            model = runtime.place(after.architecture.build(3))
            data = means.restricted.subset(torch.nonzero(means.restricted.labels < 3).flatten())
            tuning.initialise_from(model, after.state, after.architecture, 3, 1)
            result = tuning.run(model, data, task, after.architecture, 3, runtime=runtime, seed=1)
            assert result.diverged_at is None

    def test_from_words(self) -> None:
        assert make_edit("rebalance") == Rebalance()
        assert make_edit({"name": "noise", "scale": 0.5}) == Noise(scale=0.5)
        attack = Attack("mine", FineTuning("head"), ("rebalance", {"name": "heal", "noise": 0.2}))  # type: ignore[arg-type]
        assert attack.edits == (Rebalance(), Heal(noise=0.2))
        assert attack.needs == ("some original data",)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("nosuch", "unknown edit 'nosuch'"),
            ({"name": "noise", "scale": -1}, "scale must be positive"),
            ({"name": "noise", "size": 1}, "unknown field of edit 'noise': 'size'; valid: scale"),
            ({"scale": 1}, "unknown edit"),
        ],
    )
    def test_bad_words(self, given: object, message: str) -> None:
        with pytest.raises(UserError, match=message):
            make_edit(given)
