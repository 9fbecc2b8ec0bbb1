"""Attacks and batteries: their content is the papers', their controls are fair, their costs are counted."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.adapters import adaptable_layers, add_adapters
from holdfast.attacks.attack import Attack, Search
from holdfast.attacks.batteries import BATTERIES, battery
from holdfast.attacks.structure import LeakyActivations
from holdfast.attacks.weights import BatchNormStatistics, Rebalance
from holdfast.augmentation import augmented, shifted
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.flops import training_flops
from holdfast.models import Architecture
from holdfast.optimisers import SAM
from holdfast.pretraining import pretrain
from holdfast.recipes import PRETRAIN, parse_recipe
from holdfast.training import evaluate


class TestBatteries:
    def test_paper_has_every_setting_of_its_tables(self) -> None:
        found = {a.name: a for a in battery("paper").within(5000)}
        default = found["direct+all"].tuning
        assert (default.optimiser, default.lr, default.batch_size, default.weight_decay) == (
            "momentum",
            1e-4,
            200,
            1e-4,
        )
        tunings = [a.tuning for a in found.values()]
        assert {(t.initialise, t.train) for t in tunings} == {("keep", "all"), ("head", "head"), ("head", "all")}
        assert {t.optimiser for t in tunings} == {"momentum", "nesterov", "adagrad", "adadelta", "adam"}
        assert {t.lr for t in tunings if t.optimiser == "momentum"} == {5e-6, 1e-5, 1e-4, 1e-3, 1e-2}
        assert {t.batch_size for t in tunings} == {50, 100, 150, 200, 250}
        # §5.7: 20 epochs of 50,000 ÷ 2 images are 20,000 … 4,000 iterations for batches of 50 … 250 (of 50,000: ×2)
        assert {t.batch_size: t.steps for t in tunings} == {50: 20000, 100: 10000, 150: 6667, 200: 5000, 250: 4000}

    def test_by_name_and_version(self) -> None:
        assert battery("quick-v3") is battery("quick")
        with pytest.raises(UserError, match="this release has quick-v3, not quick-v2"):
            battery("quick-v2")

    def test_standard_sweeps_four_decades_with_six_optimisers(self) -> None:
        swept = [a for a in battery("standard").attacks if a.search]
        for start in ("keep", "head"):
            found = {a.tuning.optimiser for a in swept if a.tuning.initialise == start and not a.edits}
            assert found == {"momentum", "adam", "adamw", "adagrad", "adadelta", "sam"}
        decays = {a.tuning.optimiser: a.tuning.weight_decay for a in swept}
        assert decays["adamw"] > 0 == decays["adam"], "without decay AdamW is Adam"
        assert all({1e-5, 1e-4, 1e-3, 1e-2, 1e-1} <= set(a.search.lr) for a in swept if a.search)

    def test_standard_has_every_edit_and_adaptive_all_of_standard(self) -> None:
        from holdfast.attacks.edits import EDITS

        used = {n: {e.name for a in battery(n).attacks for e in a.edits} for n in ("standard", "generation")}  # type: ignore[attr-defined]
        assert used["standard"] | used["generation"] == set(EDITS)
        assert used["generation"] - used["standard"] == {"another-schedule", "another-target", "prior-preservation"}
        assert battery("adaptive").attacks[: len(battery("standard").attacks)] == battery("standard").attacks
        assert all(a.informed for a in battery("adaptive").attacks[len(battery("standard").attacks) :])
        tunings = [a.tuning for a in battery("standard").attacks]
        assert {"lora", "head", "all"} == {t.train for t in tunings}
        assert {2, 3} <= {t.k for t in tunings if t.initialise == "last-k"}
        assert any(t.augment != "none" for t in tunings)
        assert any(t.mixup for t in tunings)
        assert any(t.schedule == "cosine" and t.warmup for t in tunings)
        assert max(a.budget for a in battery("standard").attacks) == 4

    def test_slc_is_one_attack_on_six_shares_with_the_mask_and_without(self) -> None:
        found = battery("slc").within(100)
        shares = {0.01, 0.05, 0.1, 0.2, 0.5, 1.0}
        assert {(a.fraction, a.tuning.keep_zeros) for a in found} == {(f, m) for f in shares for m in (True, False)}
        assert len({replace(a.tuning, keep_zeros=False) for a in found}) == 1
        assert found[0].fraction == 1, "a comparison has a column for it"

    @pytest.mark.parametrize("name", sorted(BATTERIES.keys() - {"own"}))
    def test_every_attack_says_what_it_needs_and_costs(self, name: str) -> None:
        attacks = battery(name).within(100)
        assert len({a.name for a in attacks}) == len(attacks)
        for attack in attacks:
            assert attack.needs
            assert "steps of" in attack.cost()
            assert hash(attack) == hash(replace(attack))
        assert [a.tuning.steps for a in attacks if a.budget == 1] == [100] * sum(a.budget == 1 for a in attacks)

    def test_the_control_is_what_someone_without_the_weights_would_do(self) -> None:
        search = Search(edits=((), (Rebalance(),), (LeakyActivations(),)), initialise=("head", "last-k"), trials=4)
        attack = Attack(
            "x", FineTuning("last-k", "lora", k=3), (Rebalance(), LeakyActivations(0.2)), search, informed=True
        )
        control = attack.control()
        assert (control.tuning.initialise, control.tuning.train, control.tuning.k) == ("keep", "all", 1)
        assert control.edits == (LeakyActivations(0.2),)
        assert control.search is not None
        assert (control.search.trials, control.search.initialise) == (4, ())
        assert control.search.edits == ((), (LeakyActivations(),))
        assert FineTuning("head").control().initialise == "head"  # the same new head for all three models
        assert BatchNormStatistics.fresh

    def test_in_yaml(self) -> None:
        raw = {"original": "digits[0-4]", "restricted": "digits[5-9]"}
        mine = {"name": "m", "tuning": {"initialise": "head"}, "edits": ["leaky"], "search": {"lr": [0.1, 0.01]}}
        recipe = parse_recipe({**raw, "audit": {"attacks": [mine]}})
        attack = recipe.audit.attacks[0]
        assert attack == Attack("m", FineTuning("head"), (LeakyActivations(),), Search(lr=(0.1, 0.01)))
        assert recipe.audit.all_attacks()[-1].tuning.steps == recipe.audit.steps, (
            "within the budget unless it says more"
        )
        assert parse_recipe(recipe.as_dict()).audit.attacks == (attack,)
        for wrong, message in (
            ({"edits": [3]}, "an edit is a name, or a mapping with a name; got 3"),
            ({"edits": ["nosuch"]}, "unknown edit 'nosuch'; valid: .*leaky"),
            ({"edits": [{"name": "noise", "scale": 0}]}, "scale must be positive"),
            ({"search": {"lr": [0]}}, "search.lr must lie in"),
            ({"search": {"rate": [1]}}, "unknown key"),
            ({"search": {"batch_size": [50]}}, "set search.trials to at least 1"),
            ({"search": {"trials": 1, "batch_size": [0]}}, "batch_size must be at least 1"),
            ({"search": {"trials": 1, "initialise": ["foo"]}}, "unknown initialisation 'foo'"),
            ({"budget": 2, "tuning": {"steps": 9}}, "either its tuning's steps or a budget"),
            ({"edits": ["earlier-layer"], "tuning": {}}, "must have initialise: head"),
            ({"fraction": 2}, "fraction must lie in"),
        ):
            with pytest.raises(UserError, match=message):
                parse_recipe({**raw, "audit": {"attacks": [{**mine, **wrong}]}})


class TestOptimisers:
    def test_sam_steps_with_the_gradient_at_the_climbed_point(self) -> None:
        """f(w) = w²/2·a: g = a·w, the climbed point is w + ρ·sign(g), the step lr·a·(w + ρ)."""
        w = nn.Parameter(torch.tensor([2.0]))
        optimiser = SAM([w], lr=0.1, rho=0.5)

        def closure() -> None:
            optimiser.zero_grad()
            (1.5 * w.square() / 2).sum().backward()

        closure()
        optimiser.step(closure)
        assert w.item() == pytest.approx(2.0 - 0.1 * 1.5 * 2.5)

    def test_sam_without_a_closure(self) -> None:
        with pytest.raises(TypeError, match="closure"):
            SAM([nn.Parameter(torch.ones(1))], lr=0.1).step()


class TestAdapters:
    def test_the_function_is_kept_and_only_adapters_and_head_train(self, architecture: Architecture) -> None:
        model = architecture.build(5).eval()
        inputs = torch.randn(3, 1, 8, 8)
        before = model(inputs)
        chosen = FineTuning("head", "lora", rank=4).choose_parameters(model, architecture, 5)
        torch.testing.assert_close(model(inputs), before)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert len(chosen) == len(trained)
        assert {n for n in trained if "lora_" not in n} == {"14.weight", "14.bias"}
        assert {n.split(".")[0] for n in trained if "lora_" in n} == {"0", "3", "6", "9"}

    def test_names_that_end_alike_are_told_apart(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), nn.Flatten())
        add_adapters(model, 2, ["1.1"])
        assert {n.split(".lora_")[0] for n, _ in model.named_parameters() if "lora_" in n} == {"0"}

    def test_depthwise_convolutions_whose_groups_do_not_divide_the_rank_are_passed_over(self) -> None:
        model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4, 2))
        assert adaptable_layers(model, 8, ["3"]) == ["1"]
        assert adaptable_layers(model, 12, ["3"]) == ["0", "1"]
        with pytest.raises(UserError, match="no linear layer or convolution that takes"):
            add_adapters(nn.Sequential(nn.Linear(2, 2)), 4, ["0"])


class TestAugmentation:
    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3

    def test_shifts_move_images_by_at_most_an_eighth(self) -> None:
        images, labels = self.batch()
        ((moved, same),) = augmented([(images, labels)], "shift", 0.0, 3, 1)
        assert torch.equal(same, labels)
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        windows = [padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
        assert all(any(torch.equal(m, w[n]) for w in windows) for n, m in enumerate(moved))
        assert not torch.equal(moved, images)

    def test_every_shift_and_its_mirror_image_occur(self) -> None:
        torch.manual_seed(0)
        image = torch.randn(1, 2, 8, 6)
        padded = F.pad(image, (1, 1, 1, 1), mode="replicate")[0]
        windows = [padded[:, i : i + 8, j : j + 6] for i in range(3) for j in range(3)]
        found = shifted(image.expand(400, -1, -1, -1), 1, flip=True)
        counts = [sum(torch.equal(f, w) for f in found) for w in [*windows, *(w.flip(2) for w in windows)]]
        assert sum(counts) == 400
        assert min(counts) > 400 / 18 / 3
        plain = shifted(image.expand(400, -1, -1, -1), 1, flip=False)
        assert sum(torch.equal(f, w) for f in plain for w in windows) == 400

    def test_mixup_mixes_images_and_labels_alike(self) -> None:
        images, labels = self.batch()
        ((mixed, shares),) = augmented([(images, labels)], "none", 1.0, 3, 1)
        torch.testing.assert_close(shares.sum(1), torch.ones(6))
        share = shares.max(1).values.min()
        rolled = images.roll(1, 0)
        factor = ((mixed - rolled) * (images - rolled)).sum() / (images - rolled).square().sum()
        torch.testing.assert_close(mixed, factor * images + (1 - factor) * rolled, rtol=1e-4, atol=1e-5)
        assert 0 < share < 1

    def test_seeded(self) -> None:
        a, b, c = (next(iter(augmented([self.batch()], "shift+flip", 0.0, 3, s)))[0] for s in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)

    def test_a_run_that_goes_on_makes_the_same_batches(self) -> None:
        batches = [self.batch()] * 4
        whole = list(augmented(batches, "shift", 0.0, 3, 1))
        rest = list(augmented(batches[2:], "shift", 0.0, 3, 1, first_step=2))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[2:], rest, strict=True))
        assert not torch.equal(whole[1][0], whole[2][0])

    def test_pre_training_augments_as_it_is_told(self, architecture, original, task, runtime) -> None:
        tuning = replace(PRETRAIN, steps=3, batch_size=20)
        plain, moved, mixed = (
            pretrain(architecture, original, t, task, runtime)["0.weight"]
            for t in (tuning, replace(tuning, augment="shift"), replace(tuning, mixup=0.5))
        )
        assert not torch.equal(plain, moved)
        assert not torch.equal(plain, mixed)

    def test_it_trains(self, architecture, original, task, runtime, clean_state) -> None:
        tuning = FineTuning("scratch", optimiser="adam", lr=0.01, steps=60, batch_size=60, augment="shift", mixup=0.2)
        model = architecture.build(5)
        tuning.initialise_from(model, {}, architecture, 5, 0)
        tuning.run(model, original.train, task, architecture, 5, runtime=runtime, seed=0)
        assert evaluate(model, original.test, task, runtime)[0] > 0.8


class TestFlops:
    def test_by_hand(self) -> None:
        """A linear layer a → b on one sample: 2ab forward, 2ab for the weight's gradient, 2ab for the input's."""
        model = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3))
        example = torch.randn(1, 10)
        forward, weights, inner = 2 * (70 + 21), 2 * (70 + 21), 2 * 21
        assert training_flops(model, example) == forward + weights + inner
        assert training_flops(model, example, passes=2) == 2 * (forward + weights + inner)
        model[0].requires_grad_(False)
        assert training_flops(model, example) == forward + 2 * 21  # nothing flows into the first layer
        model.requires_grad_(False)
        assert training_flops(model, example) == forward

    def test_only_what_is_built_alike_is_counted_alike(self) -> None:
        class Repeated(nn.Module):
            def __init__(self, times: int) -> None:
                super().__init__()
                self.times, self.layer = times, nn.Linear(10, 10)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for _ in range(self.times):
                    x = self.layer(x)
                return x

        example = torch.randn(1, 10)
        once = training_flops(Repeated(1), example)
        assert once == 2 * 100 * 2  # forward, weights
        assert training_flops(Repeated(1), example) == once
        assert training_flops(Repeated(3), example) == 2 * 100 * 8  # forward, weights, two inner gradients
        assert training_flops(Repeated(1), torch.randn(4, 10)) == 4 * once
        convolutions = [nn.Conv2d(1, 2, 3, stride=s, padding=1) for s in (1, 2)]
        found = [training_flops(c, torch.randn(1, 1, 8, 8)) for c in convolutions]
        assert found[0] == 4 * found[1]

    def test_a_model_is_left_as_it_was(self, architecture: Architecture) -> None:
        model = architecture.build(5)
        before = {n: v.clone() for n, v in model.state_dict().items()}
        training_flops(model, architecture.example())
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert model.training


def test_facts_are_json(architecture: Architecture) -> None:
    import json

    from holdfast.inputs import attack_facts

    for attack in battery("adaptive").within(20):
        found = json.loads(json.dumps(attack_facts(attack)))
        assert found["tuning"] == json.loads(json.dumps(asdict(attack.tuning)))
