"""Source-only NTL: the GAN's losses by hand, and copies that leave the domain as far as they are told to."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.defences.base import Given
from holdfast.defences.ntl import NTL
from holdfast.errors import UserError
from holdfast.features import Tap
from holdfast.neighbourhood import (
    NOISE,
    Generator,
    Making,
    discriminator_loss,
    generator_loss,
    held_still,
    leaving_loss,
    make_images,
)
from holdfast.preprocessing import Preprocessing
from holdfast.separation import mmd
from test_defences import protect


class Fixed(nn.Module):
    """A discriminator whose realness is an image's mean; all classes are equally likely to it."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return images.flatten(1), images.flatten(1).mean(1), torch.zeros(len(images), 4)


def test_losses_by_hand() -> None:
    """(1 − 1)² + (0.5)² + ln 4, and (0.5 − 1)² + ln 4."""
    real, made, labels = torch.ones(3, 1, 2, 2), torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, 1, 2])
    assert discriminator_loss(Fixed(), real, labels, made).item() == pytest.approx(0.25 + 1.386294)
    assert generator_loss(Fixed(), made, labels).item() == pytest.approx(0.25 + 1.386294)


class Body(Fixed):
    """The same, with its features as a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Flatten()


def test_leaving_is_rewarded_up_to_the_distance() -> None:
    """One point each, images (0) and (2): five kernels of width 1 … 16, as in `mmd`; the classes' ln 4 on top."""
    real, made, label = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0, requires_grad=True), torch.tensor([1])
    apart = sum(2 - 2 * math.exp(-4 / w) for w in (1, 2, 4, 8, 16))
    assert leaving_loss(Body(), real, made, label, 10.0).item() == pytest.approx(math.log(4) - apart, abs=1e-5)
    near = leaving_loss(Body(), real, made, label, 0.3)
    assert near.item() == pytest.approx(math.log(4) - 0.3)
    (gradient,) = torch.autograd.grad(near, made)
    assert gradient.item() == 0, "no further than that"


def test_images_lie_in_the_domains_range() -> None:
    shape = Preprocessing(8, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.5))
    source = Generator(shape, 2)
    made = source(torch.randn(4, NOISE), torch.tensor([0, 1, 0, 1]))
    assert made.shape == (4, 3, 8, 8)
    low, high = shape.normalise(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 3, 1, 1))
    assert ((made >= low) & (made <= high)).all()
    images, labels = make_images(source, 3, torch.Generator().manual_seed(0), shape)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match="that 4 divides"):
        Generator(Preprocessing(10, 1), 2)


def test_a_part_of_the_channels_is_held_still() -> None:
    masks = [held_still(nn.Linear(3, 8), k, 4) for k in range(4)]
    assert masks[1]["weight"][:, 0].tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    assert (sum(1 - m["bias"] for m in masks) == 1).all(), "every channel once"


def test_copies_leave_as_far_as_they_are_told_to(original, runtime) -> None:
    making = Making(original.train, 5, 0, runtime)
    losses = [making.learn(step) for step in range(60)]
    assert losses[-1]["generator"] < losses[0]["generator"]
    before = {n: v.clone() for n, v in making.generator.state_dict().items()}
    near, far = (making.go(d, 0, 2, 30, 10) for d in (0.05, 2.0))
    assert far > near
    assert all(torch.equal(v, before[n]) for n, v in making.generator.state_dict().items()), "copies, not itself"
    found = making.result()
    assert len(found) == 2 * 5 * 10
    assert found.labels.bincount().tolist() == [20] * 5


def test_its_state_goes_back(original, runtime) -> None:
    making = Making(original.train, 5, 0, runtime)
    making.learn(0)
    saved = copy.deepcopy(making.state_dict())
    expected = (making.learn(1), making.go(0.1, 0, 2, 2, 3))
    making.load_state_dict(saved)
    assert len(making.images) == 0
    assert (making.learn(1), making.go(0.1, 0, 2, 2, 3)) == expected


def test_one_step_of_supervised_ntl_by_hand(clean_state, original, restricted, architecture, task, runtime) -> None:
    """Descent on original images, ascent on restricted ones, features of both apart; Adam's first step is −lr·sign."""
    spec = NTL(batch_size=20, loss_scale=0.5, distance_scale=0.7, loss_bound=50.0, distance_bound=50.0)
    model, twin = architecture.build(5), architecture.build(5)
    for m in (model, twin):
        m.load_state_dict(clean_state)
        m.train()
    given = Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime)
    engine = spec.prepare(given)
    (ours,) = given.batches(original.train, 20, "original", 0)
    (theirs,) = given.batches(given.restricted, 20, "restricted", 0)
    with Tap(twin, given.head()[0]) as tap:
        kept = task.loss(twin(ours[0]), ours[1])
        near = tap.value
        statistics = {n: b.clone() for n, b in twin.named_buffers()}
        pushed = task.loss(twin(theirs[0]), theirs[1])
        apart = mmd(near, tap.value, spec.kernels, spec.factor)
    total = kept - 0.8 * (0.5 * pushed) * (0.7 * apart)
    total.backward()
    losses = engine.iterate(1, 0.8)
    assert losses == pytest.approx(
        {"ntl": total.item(), "original loss": kept.item(), "restricted loss": pushed.item(), "mmd": apart.item()},
        rel=1e-4,
    )
    for name, p in model.named_parameters():
        gradient = twin.get_parameter(name).grad
        sure = gradient.abs() > 1e-4
        step = (p.detach() - clean_state[name])[sure]
        assert torch.allclose(step, -spec.lr * gradient[sure].sign(), rtol=0.02), name
    for name, b in model.named_buffers():
        assert torch.allclose(b.float(), statistics[name].float(), atol=1e-6), "restricted images leave no trace"


def test_copies_that_a_state_gone_back_to_lacks_are_made_anew(
    clean_state, original, restricted, architecture, task, runtime
) -> None:
    spec = NTL(iterations=2, gan_steps=2, distances=(0.1, 0.3), directions=2, leave_steps=2, generated=5)
    spec = replace(spec, auxiliary="generated")
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    engine = spec.engine(Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime))
    for i in range(1, 4):
        engine.iterate(i, 1.0)
    saved = copy.deepcopy(engine.making.state_dict())
    for i in range(4, 7):
        engine.iterate(i, 1.0)
    whole = engine.making.images.clone()
    assert len(whole) == 4 * 5 * 5
    engine.making.load_state_dict(copy.deepcopy(saved))  # as the guard does where the loss was not finite
    engine.iterate(6, 1.0)
    assert torch.equal(engine.making.images, whole), "in the middle of making"
    engine.making.load_state_dict(saved)
    losses = engine.iterate(7, 1.0)
    assert torch.equal(engine.making.images, whole), "after it"
    assert all(math.isfinite(v) for v in losses.values())


def test_source_only_never_looks_at_restricted_images(
    clean_state, original, restricted, architecture, task, runtime
) -> None:
    spec = NTL(iterations=6, gan_steps=4, distances=(0.1, 0.3), directions=2, leave_steps=2, generated=5)
    spec = replace(spec, auxiliary="generated", check_every=7, probe_steps=2)
    model, history = protect(spec, clean_state, original, restricted, architecture, task, runtime)
    assert history.checks[-1]["iteration"] == 4 + 4 + 6
    assert "away" in history.checks[1]
    blank = replace(restricted, train=replace(restricted.train, images=restricted.train.images * 0 + 7))
    other, _ = protect(spec, clean_state, original, blank, architecture, task, runtime)
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in model.state_dict().items())
    assert any(not torch.equal(v, clean_state[n]) for n, v in model.state_dict().items())
    spec.check_classes(5, 50)
