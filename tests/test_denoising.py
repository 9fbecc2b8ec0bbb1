"""The task of a diffusion model: forward process, targets, losses and their gradients, the fixed grid."""

from __future__ import annotations

import json

import pytest
import torch

from holdfast.attacks.batteries import battery
from holdfast.attacks.diffusion import AnotherSchedule, AnotherTarget, PriorPreservation
from holdfast.attacks.released import Means, Released
from holdfast.averaging import WeightAverage
from holdfast.bundle import Bundle, read_weights
from holdfast.diffusion.denoisers import Denoiser
from holdfast.diffusion.denoising import LEVELS, WORST, Denoising, fixed_noise, fixed_steps, grid
from holdfast.diffusion.pipelines import resolved
from holdfast.diffusion.sampling import sample_images
from holdfast.domains import ImageData
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.losses import denial_of_service, inverse_mse, noise_error, signal_weighted_denial_of_service
from holdfast.models import Architecture, load_state, state_of
from holdfast.pipeline import load_model
from holdfast.runtime import Runtime
from holdfast.tasks import Classification

diffusers = pytest.importorskip("diffusers")

TINY = {"unet": {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}}


def tiny(seed: int = 1, **options) -> Denoiser:
    model = Architecture("unet2d", 8, 1, options={**TINY, **options}).build(3, seed=seed)
    assert isinstance(model, Denoiser)
    return model


@pytest.fixture
def pair() -> torch.Tensor:
    """Predictions and targets of two images of 1×2×2."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 1, 2, 2, generator=generator).requires_grad_()


class TestLosses:
    def test_values_by_hand(self) -> None:
        """Predictions (1, 2), truth (0, 4): errors (1 + 4)/2; DoS (1 + 4)/2."""
        outputs = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]])
        assert noise_error(outputs).tolist() == [2.5]
        assert inverse_mse(outputs).item() == -2.5
        assert denial_of_service(outputs).item() == 2.5

    def test_each_level_counts_by_its_signal(self) -> None:
        """Two images answered by (1, 2) and (3, 0), ᾱ 0.9 and 0.2: (0.9 · 5 + 0.2 · 9)/4; the truth plays no part."""
        answers, shares = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.9, 0.9], [0.2, 0.2]])
        outputs = torch.stack([answers, torch.full((2, 2), 7.0), shares], 1).requires_grad_()
        value = signal_weighted_denial_of_service(outputs)
        assert value.item() == pytest.approx((0.9 * 5 + 0.2 * 9) / 4)
        (gradient,) = torch.autograd.grad(value, outputs)
        torch.testing.assert_close(gradient[:, 0], 2 * shares * answers / 4)
        with pytest.raises(UserError, match=r"\(n, 3, …\)"):
            signal_weighted_denial_of_service(outputs[:, :2])

    def test_gradients_are_the_papers(self, pair) -> None:
        """Equation 15, 2·(ε̂ − ε), negated, and 2·ε̂ under Equation 16; per element of the mean."""
        count = pair[:, 0].numel()
        (grown,) = torch.autograd.grad(inverse_mse(pair), pair)
        (faded,) = torch.autograd.grad(denial_of_service(pair), pair)
        predicted, truth = pair.detach().unbind(1)
        torch.testing.assert_close(grown[:, 0], -2 * (predicted - truth) / count)
        torch.testing.assert_close(faded[:, 0], 2 * predicted / count)
        assert not faded[:, 1].any()

    def test_gradients_by_finite_differences(self, pair) -> None:
        exact = pair.detach().double().requires_grad_()
        for loss in (inverse_mse, denial_of_service):
            assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x).double(), exact, eps=1e-3, atol=1e-3)

    def test_another_shape_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"\(n, 2, …\)"):
            noise_error(torch.zeros(4, 10))
        with pytest.raises(UserError, match=r"\(n, 2, …\)"):
            denial_of_service(torch.zeros(4, 10))


class TestForwardProcess:
    def test_alphas_are_the_schedules(self) -> None:
        """ᾱ_t = Π (1 − β_s), β from 1e-4 to 0.02: DDPM's linear schedule."""
        model = tiny()
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        torch.testing.assert_close(model.alphas.double(), torch.cumprod(1 - betas, 0), rtol=1e-4, atol=1e-7)

    def test_noise_is_found_again_from_v(self) -> None:
        """ε from v and x_t, exactly: √(1 − ᾱ)·x_t + √ᾱ·v."""
        model = tiny(scheduler={"prediction_type": "v_prediction"})
        generator = torch.Generator().manual_seed(3)
        images, noise = (torch.randn(5, 1, 8, 8, generator=generator) for _ in range(2))
        steps = torch.tensor([0, 10, 300, 800, 999])
        noisy = model.diffuse(images, noise, steps)
        velocity = model.target(images, noise, steps)
        torch.testing.assert_close(model.noise_of(velocity, noisy, steps), noise, rtol=1e-4, atol=1e-5)
        kept = model.alphas[10]
        torch.testing.assert_close(velocity[1], kept.sqrt() * noise[1] - (1 - kept).sqrt() * images[1])

    def test_the_same_as_diffusers(self) -> None:
        model, generator = tiny(), torch.Generator().manual_seed(3)
        images, noise = (torch.randn(4, 1, 8, 8, generator=generator) for _ in range(2))
        steps = torch.tensor([1, 50, 500, 998])
        torch.testing.assert_close(model.diffuse(images, noise, steps), model.scheduler.add_noise(images, noise, steps))
        torch.testing.assert_close(
            tiny(scheduler={"prediction_type": "v_prediction"}).target(images, noise, steps),
            model.scheduler.get_velocity(images, noise, steps),
        )

    def test_another_schedule_is_measured_at_the_same_noise(self) -> None:
        """The cosine schedule has other ᾱ_t; the levels of the grid keep their own to within a step of it."""
        model = tiny()
        places = torch.tensor(grid(1000))
        wanted = model.reference[places]
        model.exchange(diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
        own = model.at_level(places)
        assert own.tolist() != places.tolist()
        torch.testing.assert_close(model.alphas[own].sqrt(), wanted.sqrt(), atol=3e-3, rtol=0)

    def test_other_targets_are_refused(self) -> None:
        with pytest.raises(UserError, match="prediction_type must be one of epsilon, v_prediction"):
            tiny(scheduler={"prediction_type": "sample"})


class TestGrid:
    def test_levels_lie_in_the_middles(self) -> None:
        assert grid(1000, 4) == [125, 375, 625, 875]
        assert grid(10, 20)[-1] == 9

    def test_an_image_meets_the_same_noise_in_any_batch(self) -> None:
        images = torch.zeros(6, 1, 2, 2)
        torch.testing.assert_close(fixed_noise(0, images)[4:], fixed_noise(4, images[:2]))
        assert fixed_steps(4, 2, 1000).tolist() == fixed_steps(0, 6, 1000)[4:].tolist()
        assert fixed_steps(LEVELS, 1, 1000).tolist() == [grid(1000)[0]]

    def test_few_images_meet_little_noise_and_much(self) -> None:
        places = fixed_steps(0, 6, 1000)
        assert places.tolist() == [25, 375, 725, 75, 425, 775]
        assert sorted(fixed_steps(3, 20, 1000).tolist()) == grid(1000)

    def test_training_draws_and_evaluation_does_not(self) -> None:
        model, task = tiny().eval(), Denoising()
        images, labels = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
        with torch.no_grad():
            drawn = [task.forward(model, images, labels) for _ in range(2)]
            fixed = [task.forward(model, images, labels, 8) for _ in range(2)]
        assert not torch.equal(*drawn)
        torch.testing.assert_close(*fixed)
        torch.testing.assert_close(fixed[0][:, 1], fixed_noise(8, images))
        torch.testing.assert_close(fixed[0][:, 2, 0, 0, 0], model.alphas[fixed_steps(8, 4, len(model.alphas))])

    def test_imitation_sees_the_same_noise_and_no_truth(self) -> None:
        """Of itself nothing is left to learn; of another network, the mean squared difference of the predictions."""
        model, other, task = tiny().eval(), tiny(seed=2).eval(), Denoising()
        images, labels = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
        assert task.beside(model, model, images, labels)[1].item() == 0.0
        torch.manual_seed(5)
        found = task.beside(model, other, images, labels)[1]
        torch.manual_seed(5)
        theirs = task.forward(other, images, labels)[:, 0]
        torch.manual_seed(5)
        ours = task.forward(model, images, labels)[:, 0]
        torch.testing.assert_close(found, (ours - theirs).square().mean())
        found.backward()
        assert all(p.grad is None for p in other.parameters())


class TestTask:
    def test_score_by_hand(self) -> None:
        """MSE 0.25, 9 and NaN: 0.75, and no less than 1 − WORST."""
        zero = torch.zeros(1, 1, 2, 2)
        outputs = torch.cat([torch.stack([zero + x, zero], 1) for x in (0.5, 3.0, float("nan"))])
        torch.testing.assert_close(
            Denoising().score(outputs, torch.zeros(3)), torch.tensor([0.75, 1 - WORST, 1 - WORST])
        )

    def test_the_answer_zero_is_chance(self) -> None:
        noise = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        outputs = torch.stack([torch.zeros_like(noise), noise], 1)
        task = Denoising()
        assert task.score(outputs, torch.zeros(500)).mean().item() == pytest.approx(
            task.chance(torch.zeros(500)), abs=0.02
        )

    def test_each_task_refuses_the_others_models(self) -> None:
        with pytest.raises(UserError, match="needs a diffusion model"):
            Denoising().check(Architecture("small_conv", 8).build(3))
        with pytest.raises(UserError, match="task: denoising"):
            Classification().check(tiny())

    @pytest.mark.parametrize(
        ("options", "size"), [({"unet": {**TINY["unet"], "out_channels": 2}}, 8), (TINY, 9)], ids=["channels", "size"]
    )
    def test_a_network_that_cannot_work_on_the_images_is_refused(self, options, size) -> None:
        architecture = Architecture("unet2d", size, 1, options=options)
        with pytest.raises(UserError, match=r"the U-Net (must answer|cannot work)"):
            Denoising().check(architecture.build(1), architecture.example())

    def test_chance_is_what_the_answer_zero_reaches(self) -> None:
        """For ε 0. A v of zero stands for √(1 − ᾱ)·x_t = √(1 − ᾱ)·(√ᾱ·x + √(1 − ᾱ)·ε); for x = 0 the MSE is ᾱ²."""
        images = torch.zeros(2000, 1, 2, 2)
        assert Denoising().fitted(tiny(), images).chance(torch.zeros(3)) == 0.0
        model = tiny(scheduler={"prediction_type": "v_prediction"})
        expected = model.alphas[torch.tensor(grid(1000))].square().mean().item()
        assert Denoising().fitted(model, images).zero == pytest.approx(expected, rel=0.03)

    def test_of_mixed_classes_the_larger_is_told(self) -> None:
        model = tiny(conditional=True)
        shares = torch.tensor([[0.3, 0.7, 0.0], [0.9, 0.1, 0.0]])
        assert model.told(shares).tolist() == [1, 0]
        assert tiny().told(shares) is None
        Denoising().forward(model, torch.zeros(2, 1, 8, 8), shares)

    def test_losses_by_name(self) -> None:
        task = Denoising()
        assert task.suppression(None) is denial_of_service
        assert task.suppression("mse") is inverse_mse
        with pytest.raises(UserError, match="unknown suppression loss 'ice'"):
            task.suppression("ice")

    def test_conditional_networks_are_told_the_class(self) -> None:
        model, task = tiny(conditional=True).eval(), Denoising()
        assert model.head_layers() == ["unet.class_embedding"]
        images = torch.zeros(2, 1, 8, 8)
        with torch.no_grad():
            first, second = (task.forward(model, images, torch.tensor(c), 0)[:, 0] for c in ([0, 1], [2, 1]))
        assert not torch.allclose(first[0], second[0])
        torch.testing.assert_close(first[1], second[1])
        assert Architecture("unet2d", 8, 1, options={**TINY, "conditional": True}).head(model, 3) == model.head_layers()

    def test_options_in_one_line(self) -> None:
        with pytest.raises(UserError, match="options of 'unet2d' are unet, scheduler"):
            Architecture("unet2d", 8, 1, options={"width": 3}).build(1)
        with pytest.raises(UserError, match="cannot build 'unet2d'"):
            Architecture("unet2d", 8, 1, options={"unet": {"colour": 3}}).build(1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"unet": "big"}, "options.unet of 'unet2d' holds arguments by name, but got 'big'"),
            ({"scheduler": [1]}, "options.scheduler of 'unet2d' holds arguments by name"),
            ({"conditional": "no"}, "must be true or false, but got 'no'"),
            ({"scheduler": {"num_train_timesteps": 0}}, "cannot build|has no timesteps"),
            ({"scheduler": {"beta_start": 5.0, "beta_end": 6.0}}, r"must lie in \[0, 1\]"),
        ],
    )
    def test_values_that_do_not_fit(self, options, message) -> None:
        with pytest.raises(UserError, match=message):
            Architecture("unet2d", 8, 1, options={**TINY, **options}).build(1)


class TestPipelines:
    def test_a_bundle_is_a_pipeline(self, tmp_path) -> None:
        """Saved, loaded by diffusers and by us: the same images, the same predictions."""
        architecture = Architecture("unet2d", 8, 3, options=TINY)
        model = architecture.build(1, seed=5).eval()
        Bundle(state_of(model), architecture, ("all",), {"stage": "clean"}).save(tmp_path / "out", "# card\n")
        pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
        assert not list((tmp_path / "out").glob("model.safetensors")), "the weights are there once"
        here = diffusers.DDPMPipeline(model.unet, model.scheduler)
        drawn = [
            p(batch_size=2, num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(1)).images
            for p in (pipeline, here)
        ]
        assert (drawn[0] == drawn[1]).all()
        again = load_model(tmp_path / "out")
        images = torch.zeros(2, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(again(images, 7), model(images, 7))

    def test_a_checkpoint_of_diffusers(self, tmp_path) -> None:
        saved = tiny()
        diffusers.DDPMPipeline(
            saved.unet, diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        ).save_pretrained(tmp_path / "theirs")
        found = resolved(Architecture(f"diffusers:{tmp_path / 'theirs'}", 64))
        assert (found.name, found.size, found.channels) == ("unet2d", 8, 1)
        model = found.build(1)
        assert isinstance(model, Denoiser)
        assert model.prediction == "v_prediction"
        load_state(model, read_weights(str(tmp_path / "theirs"), found))
        images = torch.ones(1, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(model(images, 3), saved(images, 3))

    def test_a_conditional_checkpoint_has_the_domains_classes(self, tmp_path) -> None:
        model = tiny(conditional=True)
        diffusers.DDPMPipeline(model.unet, model.scheduler).save_pretrained(tmp_path / "theirs")
        found = resolved(Architecture(f"diffusers:{tmp_path / 'theirs'}"))
        assert [found.build(n).classes for n in (3, 5)] == [3, 5]
        state = read_weights(str(tmp_path / "theirs"), found)
        load_state(found.build(3), state)
        with pytest.raises(UserError, match="does the number of classes agree"):
            load_state(found.build(5), state)

    def test_the_layout_of_the_first_pipelines(self, tmp_path) -> None:
        """U-Net and scheduler beside the index, as in `google/ddpm-cifar10-32`; released in folders of their own."""
        saved, theirs = tiny(), tmp_path / "theirs"
        diffusers.DDPMPipeline(saved.unet, saved.scheduler).save_pretrained(theirs)
        for part in ("unet", "scheduler"):
            for file in (theirs / part).iterdir():
                file.rename(theirs / file.name)
            (theirs / part).rmdir()
        scheduler = theirs / "scheduler_config.json"
        settings = json.loads(scheduler.read_text())
        settings["timesteps"] = settings.pop("num_train_timesteps") // 2
        scheduler.write_text(json.dumps(settings))
        found = resolved(Architecture(f"diffusers:{theirs}"))
        model = found.build(1)
        load_state(model, read_weights(str(theirs), found))
        assert len(model.alphas) == 500
        Bundle(state_of(model), found, ("all",), {}).save(tmp_path / "out", "# card\n")
        pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
        for name, value in saved.unet.state_dict().items():
            assert torch.equal(pipeline.unet.state_dict()[name], value), name
        assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()

    @pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "ScoreSdeVeScheduler"])
    def test_other_processes_are_refused(self, scheduler, tmp_path) -> None:
        theirs = tmp_path / "theirs"
        diffusers.DDPMPipeline(tiny().unet, getattr(diffusers, scheduler)()).save_pretrained(theirs)
        with pytest.raises(UserError, match=f"the pipeline's {scheduler} has no schedule of β"):
            resolved(Architecture(f"diffusers:{theirs}"))

    def test_a_quantised_first_stage_is_refused(self, tmp_path) -> None:
        model = tiny()
        diffusers.DDPMPipeline(model.unet, model.scheduler).save_pretrained(tmp_path / "theirs")
        (tmp_path / "theirs" / "vqvae").mkdir()
        with pytest.raises(UserError, match="VQModel in front of its U-Net"):
            resolved(Architecture(f"diffusers:{tmp_path / 'theirs'}"))

    @pytest.mark.parametrize(
        ("wrong", "message"), [("", "no pipeline of diffusers"), ("missing", "pipeline not found")]
    )
    def test_no_pipeline_in_one_line(self, wrong, message, tmp_path) -> None:
        with pytest.raises(UserError, match=message):
            resolved(Architecture(f"diffusers:{tmp_path / wrong}"))


class TestEdits:
    def released(self, **options) -> Released:
        architecture = Architecture("unet2d", 8, 1, options={**TINY, **options})
        return Released(architecture, state_of(architecture.build(1)), 1)

    def test_another_schedule_and_target(self) -> None:
        released, means = self.released(), None
        for edit, schedule, target in (
            (AnotherSchedule(), "squaredcos_cap_v2", "epsilon"),
            (AnotherTarget(), "linear", "v_prediction"),
        ):
            assert edit.obstacle(released) is None
            edited = edit.apply(released, means)
            model = edited.build(Runtime())
            assert isinstance(model, Denoiser)
            assert (model.scheduler.config.beta_schedule, model.prediction) == (schedule, target)
            assert torch.equal(model.reference, released.build(Runtime()).reference), "measured where it was"
            assert edited.state is released.state
        trained = self.released(scheduler={"trained_betas": [0.01, 0.02, 0.03]})
        edited = AnotherSchedule().apply(trained, means).build(Runtime())
        assert not torch.equal(edited.alphas, edited.reference), "the list makes way for the schedule"
        assert AnotherSchedule("linear").obstacle(released) == "the model has it already"
        cosine = self.released(scheduler={"beta_schedule": "squaredcos_cap_v2"}).build(Runtime())
        assert AnotherSchedule().setting(cosine) == {"beta_schedule": "linear"}, "none named: one that it has not"
        assert AnotherTarget().setting(
            self.released(scheduler={"prediction_type": "v_prediction"}).build(Runtime())
        ) == {"prediction_type": "epsilon"}

    @pytest.mark.parametrize("edit", [AnotherSchedule(), AnotherTarget()])
    def test_they_compose_with_any_tuning(self, edit, runtime) -> None:
        after = edit.apply(self.released(), None)
        data = ImageData(
            torch.zeros(6, 1, 8, 8, dtype=torch.uint8),
            torch.zeros(6, dtype=torch.int64),
            after.architecture.preprocessing,
        )
        for tuning in (FineTuning("keep", steps=2), FineTuning("keep", "lora", steps=2), FineTuning("last-k", steps=2)):
            model = runtime.place(after.build(runtime))
            tuning.initialise_from(model, after.state, after.architecture, 1, 1)
            result = tuning.run(model, data, Denoising(), after.architecture, 1, runtime=runtime, seed=1)
            assert result.diverged_at is None

    @pytest.mark.parametrize(("count", "least", "half"), [(3, 5, 5), (6, 2, 6)])
    def test_prior_preservation_is_half_of_what_is_trained_on(self, count, least, half, runtime) -> None:
        released = self.released()
        images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8)
        few = ImageData(images, torch.zeros(count, dtype=torch.int64), released.architecture.preprocessing)
        means = Means(few, Denoising(), runtime, 1, 10)
        assert PriorPreservation(least).apply(released, means).state is released.state
        mixed = means.restricted
        assert (len(mixed), mixed.images.dtype, mixed.labels.dtype) == (2 * half, torch.uint8, torch.int64)
        assert torch.equal(mixed.images[:half], images[torch.arange(half) % count])
        made = sample_images(released.build(runtime), half, (1, 8, 8), runtime)
        assert torch.equal(mixed.images[half:], few.preprocessing.restore(made))
        assert means.samples == 0
        assert means.flops > 0
        assert len(few) == count, "the attacker's own data are not touched"

    def test_a_classifier_has_none_of_them(self) -> None:
        architecture = Architecture("small_conv", 8, 1)
        released = Released(architecture, state_of(architecture.build(3)), 3)
        for edit in (AnotherTarget(), PriorPreservation()):
            assert edit.obstacle(released) == "not a diffusion model"

    def test_what_needs_a_head_is_left_out(self) -> None:
        released = self.released()
        why = {a.name: a.obstacle(released) for a in battery("standard").within(20)}
        assert why["direct+all"] is None
        assert why["initFC+all"] == why["initFC+FC"] == why["initFC+LoRA · adam swept"] == "the model has no head"
        assert why["distilled → initFC+all"]
        assert why["BatchNorm folded → initFC+all"]
        assert all(a.obstacle(released) is None for a in battery("generation").within(20) if not a.edits)


def test_averaged_weights_by_hand() -> None:
    """d = min(0.5, 1/10, 2/11 …): w̄ after w = 1, 2 from 0: 0.9·1, then 2/11·0.9 + 9/11·2."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.5)
    for value in (1.0, 2.0):
        torch.nn.init.constant_(model.weight, value)
        average.update()
    expected = 2 / 11 * 0.9 + 9 / 11 * 2
    assert average.mean["weight"].item() == pytest.approx(expected)
    with average.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 2.0
    saved = average.state_dict()
    average.update()
    average.load_state_dict(saved)
    assert (average.steps, average.mean["weight"].item()) == (2, pytest.approx(expected))
