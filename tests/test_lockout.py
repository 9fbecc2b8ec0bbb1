"""Lockout's terms against values derived by hand; its places in networks of every kind; what it does to a network."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.collapse import between_images, hinge, leak, log_spread_ratio, peak, reopened
from holdfast.defences.base import SETTLING, Given
from holdfast.defences.lockout import Lockout
from holdfast.defences.places import examples
from holdfast.defences.reopening import ENOUGH, Reopening, altered
from holdfast.defences.sophon import Sophon
from holdfast.domains import DomainSpec, load_domain
from holdfast.errors import UserError
from holdfast.features import Place, Tap, Taps, activations, closed_at, depths
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture, state_of
from holdfast.normalisation import Lent
from holdfast.recipes import parse_recipe
from holdfast.runtime import Runtime
from holdfast.separation import class_mmd


def test_what_depends_on_the_image_by_hand() -> None:
    """Two units over three images: 0, 3, 6 has the variance 6; 5, 5, 5 has none: the mean is 3."""
    assert between_images(torch.tensor([[0.0, 5.0], [3.0, 5.0], [6.0, 5.0]])).item() == pytest.approx(3.0)
    spots = torch.tensor([[[1.0, 9.0]], [[1.0, 9.0]]])  # differs over places, not over images
    assert between_images(spots).item() == 0.0
    with pytest.raises(UserError, match="shape"):
        between_images(torch.zeros(3))


def test_what_depends_on_the_image_is_the_same_in_every_layout_and_type() -> None:
    """The variance, mean over units, and 2·(x − x̄)/entries, as autograd finds it; a half's gradient is a half's."""
    x = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = x.var(0, correction=0).mean()
    (wanted,) = torch.autograd.grad(value, x)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.detach().to(memory_format=layout).requires_grad_()
        (found,) = torch.autograd.grad(between_images(y), y)
        assert between_images(y).item() == pytest.approx(value.item(), rel=1e-6)
        torch.testing.assert_close(found, wanted)
    half = x.detach().bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(between_images(half), half)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=1e-4)


def test_the_ratio_of_spreads_by_hand_and_under_scaling() -> None:
    restricted, original = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [20.0]])
    assert log_spread_ratio(restricted, original, floor=0.0).item() == pytest.approx(math.log(1 / 100))
    assert log_spread_ratio(3 * restricted, 3 * original).item() == pytest.approx(
        log_spread_ratio(restricted, original).item()
    )
    still = torch.ones(4, 2)
    assert log_spread_ratio(still, original.repeat(1, 2), floor=1e-3).item() == pytest.approx(math.log(1e-3))


def test_a_dead_layer_has_nothing_to_say() -> None:
    """Of residual branches weight decay leaves some that are zero for every image; the gradient was not a number."""
    dead, faint = torch.zeros(4, 3), 1e-8 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for restricted in (dead, faint, faint + 1):
        restricted = restricted.clone().requires_grad_()
        value = log_spread_ratio(restricted, dead)
        assert value.item() == pytest.approx(math.log(1e-4), abs=1e-3)
        value.backward()
        assert restricted.grad.isfinite().all()
    assert log_spread_ratio(torch.tensor([[0.0], [2.0]]), dead).item() == pytest.approx(math.log(1e6))


def test_the_peak_is_led_by_the_depth_at_which_most_is_left() -> None:
    """Ratios 1, 1/10 and 1/10,000: mean 0.3667; the gradient is each one's share of the sum."""
    logs = [torch.tensor(math.log(r), requires_grad=True) for r in (1.0, 0.1, 1e-4)]
    value = peak(logs)
    assert value.item() == pytest.approx(math.log(1.1001 / 3))
    value.backward()
    assert [v.grad.item() for v in logs] == pytest.approx([1 / 1.1001, 0.1 / 1.1001, 1e-4 / 1.1001])


def test_what_is_left_is_brought_back_by_hand() -> None:
    """0 and 2 have the mean 1 and the variance 1: spread as 9 is −2 and 4. Nothing is made smaller, or 100 times as
    large; what is alike stays alike. To the gradient the factor k = 3 is a constant: (k ± 1)/2."""
    x = torch.tensor([[0.0], [2.0]], requires_grad=True)
    found = reopened(x, 9.0)
    assert found.flatten().tolist() == pytest.approx([-2.0, 4.0])
    (gradient,) = torch.autograd.grad(found[0, 0], x)
    assert gradient.flatten().tolist() == pytest.approx([2.0, -1.0])
    assert torch.equal(reopened(x, 0.5), x)
    assert reopened(x * 1e-3, 1.0, most=10.0).flatten().tolist() == pytest.approx([-9e-3, 11e-3])
    assert torch.equal(reopened(torch.ones(3, 2), 1.0), torch.ones(3, 2))
    assert reopened(x.bfloat16(), 9.0).dtype == torch.bfloat16


def test_the_hinge_by_hand() -> None:
    """z = −3, 1 and −1, −1 with margin 2: over by 0, 3 and 1, 1; mean 1.25, largest of each image 3 and 1: 2."""
    z = torch.tensor([[-3.0, 1.0], [-1.0, -1.0]])
    assert hinge(z, 0.0, None, 2.0, worst=0.0).item() == pytest.approx(1.25)
    assert hinge(z, 0.0, None, 2.0, worst=1.0).item() == pytest.approx(3.25)
    unit = torch.tensor([[2.0, 4.0]])  # −1.5, 0.25; −0.5, −0.25
    assert hinge(z, 0.0, unit, 2.0, worst=0.0).item() == pytest.approx((0.5 + 2.25 + 1.5 + 1.75) / 4)
    assert hinge(z - 10, -4.0, None, 2.0).item() == 0.0
    assert leak(z, 0.0).tolist() == [0.5, 0.0]


FIXED = torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.5, 3.0]])
TERMS = {
    "between": between_images,
    "ratio, restricted": lambda x: log_spread_ratio(x, FIXED),
    "ratio, original": lambda x: log_spread_ratio(FIXED, x),
    "hinge": lambda x: hinge(x, 0.1, None, 0.5, worst=0.7),
    "peak": lambda x: peak([log_spread_ratio(x, FIXED), log_spread_ratio(x * x, FIXED)]),
}


@pytest.mark.parametrize("name", TERMS)
def test_gradients_against_finite_differences(name) -> None:
    torch.manual_seed(0)
    term, x, step = TERMS[name], torch.randn(3, 2, requires_grad=True), 1e-2
    (gradient,) = torch.autograd.grad(term(x), x)
    for i in range(x.numel()):
        moved = step * torch.eye(x.numel())[i].view_as(x)
        difference = (term(x.detach() + moved) - term(x.detach() - moved)) / (2 * step)
        assert gradient.flatten()[i].item() == pytest.approx(difference.item(), abs=5e-3)


class Shared(nn.Module):
    """One activation at two places, as torchvision's residual blocks have it, and at a third that sees no image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(2, 2), nn.Linear(2, 3), nn.ReLU(inplace=True)
        for layer in (self.first, self.second):  # no draw in which either place is dead, and so depends on no image
            nn.init.uniform_(layer.weight, 0.5, 1.0)
            nn.init.zeros_(layer.bias)
        self.aside = nn.Parameter(torch.ones(1, 3))

    def forward(self, x):
        return self.act(self.second(self.act(self.first(x)))) + self.act(self.aside + 1)


def test_an_activation_module_that_serves_several_places_is_several() -> None:
    """Each has its own values, and each can be opened by itself; what depends on no image is none of them."""
    model, x = Shared(), torch.tensor([[1.0, 2.0], [-0.5, 3.0]])
    found = activations(model, x)
    assert found == {"act#0": True, "act#1": True}
    assert closed_at(model, "act#1") == 0.0
    for _ in range(2):  # counted anew in every pass
        with Taps(model, list(found)) as taps:
            model(x)
        first = model.first(x)
        torch.testing.assert_close(taps.values[0], first)
        torch.testing.assert_close(taps.values[1], model.second(first.relu()))
    with altered(Place(model, "act#1"), lambda z: z * 0 + 5.0):
        torch.testing.assert_close(model(x), torch.full((2, 3), 7.0))
    torch.testing.assert_close(model(x), model.second(first.relu()).relu() + 2)


def test_a_tap_on_what_comes_out_does_not_ask_for_what_goes_in() -> None:
    """A module that is called by names alone has no positional input."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(input=x)

    model = Named()
    with Tap(model, "inner", "output") as tap:
        assert torch.equal(model(torch.ones(1, 2)), tap.value)


NETWORKS = {
    "plain": (Architecture("small_conv", 8, 1, options={"width": 8, "norm": False}), 4, 4),
    "normalised": (Architecture("small_conv", 8, 1, options={"width": 8}), 4, 4),
    "residual": (Architecture("resnet10t", 32, 3), 11, 11),
    "caformer": (Architecture("caformer_s18", 32, 3), 18, 60),
    "convnext": (Architecture("convnext_tiny", 32, 3, options={"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}), 4, 15),
    "vit": (
        Architecture(
            "vit_tiny_patch16_224", 16, 3, options={"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
        ),
        2,
        8,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_has_its_places_and_makes_a_step(name, task, runtime) -> None:
    """Activations that can be closed, depths at which an attacker may restart; the calibrated scale is a channel's."""
    architecture, least_closed, least_depths = NETWORKS[name]
    domain = load_domain(DomainSpec("digits[0-4]", per_class=8, test_per_class=2), architecture.preprocessing)
    model = architecture.build(5)
    spec = Lockout(close=2, iterations=2, steps=1, batch_size=4, check_every=1, probe_steps=1)
    engine = spec.prepare(Given(model, domain, domain.train, 5, architecture, task, runtime))
    found = activations(model, examples(Given(model, domain, domain.train, 5, architecture, task, runtime)))
    assert len(found) >= least_closed
    assert all(threshold <= 0 for threshold in engine.places.thresholds)
    assert len(engine.places.depths) >= least_depths
    with torch.no_grad(), Taps(model, engine.places.closed) as taps:
        model(architecture.example(2))
    for place, unit, values in zip(engine.places.closed, engine.places.units, taps.values, strict=True):
        channels = values.shape[-1] if found[place] else values.shape[1]
        assert unit.numel() == channels == unit.shape[-1 if found[place] else 1]
        assert found[place] == (name in ("caformer", "convnext", "vit")), "given by a linear layer"
    before = state_of(model)
    losses = engine.iterate(1, 1.0)
    assert losses.keys() == {"lockout", "kept", "hinge", "flat", "spread"}
    assert all(map(math.isfinite, losses.values()))
    assert any(not torch.equal(before[n], v) for n, v in model.state_dict().items())
    alike = replace(spec, hinge=0, flat=0, spread=0, mmd=1.0, fisher=0.1, batch_size=20)
    engine = alike.prepare(Given(model, domain, domain.train, 5, architecture, task, runtime))
    assert not engine.places.closed, "what has no weight is not looked at"
    losses = engine.iterate(1, 1.0)
    assert losses.keys() == {"lockout", "kept", "mmd", "fisher"}
    assert all(map(math.isfinite, losses.values()))


def test_the_margin_is_in_deviations_of_each_channel(original, restricted, task, runtime, clean_state) -> None:
    """A channel whose pre-activations are three times as wide has three times the margin, the others keep theirs."""
    architecture = Architecture("small_conv", size=8, channels=1, options={"width": 8})
    units = []
    for factor in (1.0, 3.0):
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        last = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
        with torch.no_grad():
            last.weight[1] *= factor
            if last.bias is not None:
                last.bias[1] *= factor
        given = Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime)
        units.append(Lockout(close=1, batch_size=20).prepare(given).places.units[0].flatten())
        model.eval()
        with torch.no_grad(), Taps(model, list(activations(model, examples(given)))[-1:]) as taps:
            model(original.train.batch(torch.arange(len(original.train)), runtime)[0])
        seen = taps.values[0].transpose(0, 1).flatten(1).std(1)
        assert units[-1] == pytest.approx(seen, rel=0.1), "of original images"
    assert units[1] / units[0] == pytest.approx(torch.tensor([1.0, 3.0] + [1.0] * (len(units[0]) - 2)), rel=1e-4)


def test_every_term_is_a_loss_of_its_own(task, runtime) -> None:
    architecture, *_ = NETWORKS["normalised"]
    domain = load_domain(DomainSpec("digits[0-4]", per_class=8, test_per_class=2), architecture.preprocessing)
    spec = Lockout(
        close=2,
        iterations=2,
        steps=1,
        batch_size=20,
        check_every=1,
        peak=1.0,
        reopen=0.7,
        fisher=0.5,
        mmd=0.5,
        answer=0.5,
    )
    engine = spec.prepare(Given(architecture.build(5), domain, domain.train, 5, architecture, task, runtime))
    losses = engine.iterate(1, 1.0)
    assert losses.keys() == {
        "lockout",
        "kept",
        "hinge",
        "flat",
        "spread",
        "peak",
        "reopened",
        "fisher",
        "mmd",
        "answer",
    }
    assert losses["peak"] > losses["spread"], "the mean's logarithm is above the logarithms' mean"
    terms = sum(v for n, v in losses.items() if n != "lockout")
    assert losses["lockout"] == pytest.approx(terms, rel=1e-5)


def test_spared_layers_are_the_first_and_have_no_part_in_the_ratios(task, runtime) -> None:
    architecture, *_ = NETWORKS["normalised"]
    domain = load_domain(DomainSpec("digits[0-4]", per_class=8, test_per_class=2), architecture.preprocessing)
    shares = {}
    for spared in range(3):
        spec = Lockout(close=2, iterations=2, steps=1, batch_size=10, check_every=1, spared=spared, distillation=0.0)
        given = Given(architecture.build(5, 0), domain, domain.train, 5, architecture, task, runtime)
        engine = spec.prepare(given)
        shares[spared] = engine.places.depths, engine.iterate(1, 1.0)["spread"]
    every = shares[0][0]
    assert [depths for depths, _ in shares.values()] == [every, every[1:], every[2:]]
    assert len({value for _, value in shares.values()}) == 3


class Branches(nn.Module):
    """A stream, and a branch that joins it again: what `act` gives feeds `branch` and passes it by."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.act, self.inner = nn.ReLU(), nn.ReLU()
        for layer in (self.first, self.branch, self.last):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = self.act(self.first(x))
        return self.last(x + self.inner(self.branch(x)))


def test_behind_an_opened_place_lies_what_it_does_not_feed_itself() -> None:
    """`act` feeds `branch`, and reaches `last` by way of it too; `inner` reaches `last` in the sum alone."""
    inputs = torch.tensor([[1.0, 2.0], [0.5, 3.0]])
    found = Reopening(Branches(), ["act", "inner"], ["branch", "last"], inputs)
    assert found.places == [("act", [1])]
    pooled = Architecture("small_conv", 8, 1, options={"width": 8}).build(5)
    names = list(activations(pooled, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))))
    behind = Reopening(pooled, names, ["6", "9", "12"], torch.randn(4, 1, 8, 8)).places
    assert [n for n, _ in behind] == names[:-1], "the last feeds the head, pooled"
    with pytest.raises(UserError, match="reopen is above 0, but behind no activation module"):
        Reopening(Branches(), ["act", "inner"], ["branch"], inputs)


def test_what_an_opened_place_lets_through_by_hand() -> None:
    """Original images spread by 1 (mean over both units) behind `first`, restricted ones by 0.01, about 5: opened they
    do so too, and `last`, which sees twice of it, spreads as it does for original ones: a ratio of 1, not of 1/100."""
    model = Branches()
    original, restricted = torch.tensor([[4.0, 4.0], [6.0, 6.0]]), torch.tensor([[4.9, 4.9], [5.1, 5.1]])
    opening = Reopening(model, ["act"], ["branch", "last"], original)
    with Taps(model, ["branch", "last"]) as taps:
        with opening.watching(torch.Generator()) as opened:
            model(original)
        values = [between_images(v) for v in taps.values]
        model(restricted)
        assert log_spread_ratio(taps.values[1], values[1], 0.0).item() == pytest.approx(math.log(0.01), abs=1e-4)
        found = opened.peak(lambda: model(restricted), taps, values)
        assert found.item() == pytest.approx(math.log(1 + ENOUGH), abs=1e-4)
        model(restricted)
        assert taps.values[1].var(0, correction=0).mean().item() == pytest.approx(0.04, rel=1e-3), "closed again"


def test_a_layer_that_no_image_reaches_is_no_depth() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.clock, self.last = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(torch.relu(self.first(x) + self.clock(torch.ones(len(x), 2))))

    assert depths(TwoInputs(), torch.randn(4, 3)) == ["last"]


@pytest.mark.parametrize("affine", [True, False])
def test_borrowed_statistics_by_hand(affine) -> None:
    """(y − mean x)/√(var x + ε)·w + b, the gradient reaching x too; the running statistics follow x alone."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, affine=affine).train()
    if affine:
        nn.init.uniform_(layer.weight)
        nn.init.uniform_(layer.bias)
    x, y = torch.randn(4, 3, 2, 2, requires_grad=True), torch.randn(5, 3, 2, 2)
    lent = Lent()
    with lent.lending():
        lead = layer(x)
    after = state_of(layer)
    with lent.borrowing():
        found = layer(y)
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    expected = (y - mean) / (variance + layer.eps).sqrt()
    own = (x - mean) / (variance + layer.eps).sqrt()
    if affine:
        expected = expected * layer.weight.view(1, 3, 1, 1) + layer.bias.view(1, 3, 1, 1)
        own = own * layer.weight.view(1, 3, 1, 1) + layer.bias.view(1, 3, 1, 1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(lead, own)
    weights = torch.randn_like(found)
    (got,) = torch.autograd.grad((found * weights).sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(got, wanted)
    assert all(torch.equal(after[n], layer.state_dict()[n]) for n in ("running_mean", "running_var"))
    assert not torch.equal(after["running_mean"], torch.zeros(3))
    with pytest.raises(ValueError, match="more often than it lent"), lent.borrowing():
        layer(layer(y))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_statistics_are_borrowed_by_a_network_of_any_type(kind) -> None:
    """As in float32, up to what the type can hold, with the gradient of the weight too."""
    found, lent = [], Lent()
    for dtype in (torch.float32, kind):
        draw = torch.Generator().manual_seed(0)
        layer = nn.BatchNorm2d(3).to(dtype).train()
        x, y = (torch.randn(n, 3, 2, 2, generator=draw).to(dtype) for n in (4, 5))
        with lent.lending():
            layer(x)
        with lent.borrowing():
            output = layer(y)
        assert output.dtype == dtype
        (gradient,) = torch.autograd.grad(output.square().sum(), layer.weight)
        found.append((output.float(), gradient.float()))
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05)


def test_borrowed_statistics_are_evaluation_once_the_running_ones_have_arrived(architecture) -> None:
    model, lent = architecture.build(5), Lent()
    x, y = torch.randn(8, 1, 8, 8), torch.randn(6, 1, 8, 8)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()
    with torch.no_grad(), lent.lending():
        model(x)
    with torch.no_grad(), lent.borrowing():
        found = model(y)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(found, model(y), atol=0.05, rtol=0.1)  # running variances are the unbiased ones


SHORT = Lockout(iterations=20, steps=10, check_every=5, probe_steps=10, batch_size=50, lr=2e-3, close=2, tolerance=0.05)


def _values(network: nn.Module, layers: list[str], images: torch.Tensor) -> list[torch.Tensor]:
    """What goes into each of `layers` when the network is used."""
    with torch.no_grad(), Taps(network.eval(), layers) as taps:
        network(images)
    return taps.values


@pytest.fixture(scope="module")
def locked(clean_state, original, restricted, task, runtime):
    """A short lockout of the small network, and what it measures before and after."""
    architecture = Architecture("small_conv", size=8, channels=1, options={"width": 8})
    spec = replace(SHORT, hinge=0.3, flat=0.5, spread=0.1)
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    half = restricted.halves(0)[0]
    given = Given(model, original, half, 5, architecture, task, runtime)
    before = spec.measure(given, restricted.test)
    history = spec.protect(
        model, original, half, restricted_classes=5, architecture=architecture, task=task, runtime=runtime
    )
    return model, history, before, spec.measure(given, restricted.test)


def test_restricted_images_are_shut_out_and_original_ones_are_not(locked) -> None:
    _, history, before, after = locked
    assert history.released
    assert history.checks[-1]["original"] >= 0.95 * history.checks[0]["original"]
    assert after["leak, restricted"] < 0.1 * before["leak, restricted"]
    assert after["leak, original"] > 0.5 * before["leak, original"]


def test_what_is_released_spreads_less_at_every_depth(locked, clean_state, original, restricted, runtime) -> None:
    model, *_ = locked
    clean = Architecture("small_conv", size=8, channels=1, options={"width": 8}).build(5)
    clean.load_state_dict(clean_state)
    images = [d.batch(torch.arange(100), runtime)[0] for d in (restricted.test, original.test)]
    layers, ratios = depths(clean, images[0][:4]), []
    for network in (clean, model):
        values = [_values(network, layers, x) for x in images]
        ratios.append([log_spread_ratio(r, o).item() for r, o in zip(*values, strict=True)])
    gains = [before - after for before, after in zip(*ratios, strict=True)]
    assert min(gains) > 0
    assert gains[-1] > 3, "the head sees one answer to all restricted images"


def test_classes_are_made_alike_and_images_stay_apart(locked, original, restricted, task, runtime, clean_state) -> None:
    """`mmd` alone: on images that the defender never saw nothing tells classes apart as before, at any depth, though
    the images differ as they did; what closes units and collapses images leaves them nothing to differ in. The control
    has the same images with labels drawn anew: it makes no class alike that there is."""
    architecture = Architecture("small_conv", size=8, channels=1, options={"width": 8})
    clean, alike, blind = (architecture.build(5) for _ in range(3))
    half = restricted.halves(0)[0]
    order = torch.randperm(len(half), generator=torch.Generator().manual_seed(0))
    shuffled = replace(half, labels=half.labels[order])
    spec = replace(SHORT, hinge=0, flat=0, spread=0, mmd=10)
    for model in (clean, alike, blind):
        model.load_state_dict(clean_state)
    how = {"restricted_classes": 5, "architecture": architecture, "task": task, "runtime": runtime}
    history = spec.protect(alike, original, half, **how)
    assert history.released
    spec.protect(blind, original, shuffled, **how)
    images, labels = restricted.test.batch(torch.arange(len(restricted.test)), runtime)
    ours, _ = original.test.batch(torch.arange(100), runtime)
    layers, apart, spread = depths(clean, images[:4]), [], []
    for model in (clean, alike, locked[0], blind):
        values = [_values(model, layers, x) for x in (images, ours)]
        apart.append([class_mmd(v, labels).item() for v in values[0]])
        spread.append([log_spread_ratio(r, o).item() for r, o in zip(*values, strict=True)])
    assert history.checks[-1]["original"] >= 0.95 * history.checks[0]["original"]
    shares = [after / before for before, after in zip(apart[0], apart[1], strict=True)]
    assert max(shares) < 0.9
    assert max(shares[1:]) < 0.7
    assert all(after > before - 0.3 for before, after in zip(spread[0], spread[1], strict=True))
    assert apart[2][1] > 0.9 * apart[0][1], "images collapsed by a fifth, and classes as far apart within them"
    assert min(a / b for a, b in zip(apart[3], apart[0], strict=True)) > 0.9, "the control"


def test_running_statistics_are_those_of_the_weights_at_hand(original, restricted, task, runtime, clean_state) -> None:
    """After the check's iteration the first layer's mean is that over `SETTLING` whole batches; before it, it lags."""
    architecture = Architecture("small_conv", size=8, channels=1, options={"width": 8})
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    spec = Lockout(iterations=4, steps=2, check_every=2, batch_size=20, close=2, lr=1e-2)
    given = Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime)
    engine = spec.engine(given)

    def gap() -> float:
        batches = given.batches(original.train, 20, "settle", 2 * SETTLING, SETTLING)
        with torch.no_grad():
            means = [model[0](images).mean((0, 2, 3)) for images, _ in batches]
        return (torch.stack(means).mean(0) - model[1].running_mean).abs().max().item()

    for iteration in (1, 2):
        engine.iterate(iteration, 1.0)
        assert gap() > 1e-3
    given.settle(2, engine.settling)
    assert gap() < 1e-5
    assert model.training
    assert model[1].momentum == 0.1


def test_intactness_is_a_constraint_once_the_rate_has_halved(original, restricted, task, runtime, clean_state) -> None:
    """Of 10 iterations the last 4 repair: rates 1, 0.854, 0.5, 0.146 by half a cosine."""
    architecture = Architecture("small_conv", size=8, channels=1, options={"width": 8})
    given = Given(architecture.build(5), original, restricted.halves(0)[0], 5, architecture, task, runtime)
    engine = Lockout(iterations=10, repair=0.4, close=2).engine(given)
    assert [engine.phase(i) for i in range(7, 11)] == ["free", "free", "candidate", "candidate"]
    assert engine.phase(1) == "free"
    assert Lockout(iterations=1, close=2).engine(given).phase(1) == "candidate", "something has to be released"


def test_strength_is_what_the_guard_would_have_to_weaken_it_to(
    original, restricted, task, runtime, clean_state
) -> None:
    """Both stages: half of everything by the field, or by the guard, is the same half."""
    architecture = Architecture("small_conv", size=8, channels=1, options={"width": 8})
    second = Sophon(adversaries=1, inner_steps=2, inner_batch_size=(20,), iterations=1, ntr_loops=1)
    found = []
    for own, guard in ((0.5, 1.0), (1.0, 0.5), (1.0, 1.0)):
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        spec = Lockout(iterations=1, steps=2, close=2, batch_size=20, strength=own, sophon=second)
        engine = spec.prepare(Given(model, original, restricted.halves(0)[0], 5, architecture, task, runtime))
        for iteration in (1, 2):
            engine.iterate(iteration, guard)
        found.append(state_of(model)["0.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_bad_values_are_one_line(original, restricted, architecture, task, runtime) -> None:
    for field, value in (
        ("hinge", -1.0),
        ("repair", 0.0),
        ("close", -1),
        ("batch_size", 1),
        ("tolerance", 1.0),
        ("strength", 0.0),
    ):
        with pytest.raises(UserError, match=field):
            replace(Lockout(), **{field: value})
    with pytest.raises(UserError, match="unknown augmentation 'flip'"):
        Lockout(augment="flip")
    with pytest.raises(UserError, match="must be above 0, but all are 0"):
        Lockout(hinge=0.0, flat=0.0, spread=0.0)
    with pytest.raises(UserError, match="must be above 0, but all are 0"):
        Lockout(close=0, spread=0.0)
    with pytest.raises(UserError, match="needs a head for the restricted classes too"):
        Lockout(answer=1.0).check_classes(5, 6)
    for term in ("fisher", "mmd"):
        spec = Lockout(**{term: 1.0}, batch_size=11)
        spec.check_classes(2, 5)
        with pytest.raises(UserError, match="batch_size must be at least 12, two images of each restricted class"):
            spec.check_classes(2, 6)
        few = Given(
            architecture.build(5), original, original.train.subset(torch.arange(11)), 6, architecture, task, runtime
        )
        with pytest.raises(
            UserError, match="half must have at least 12 images, two of each restricted class, but has 11"
        ):
            replace(spec, batch_size=100).check(few)
    given = Given(architecture.build(5), original, restricted.halves(0)[0], 5, architecture, task, runtime)
    with pytest.raises(UserError, match=r"close is 9, but the network runs 4 .*; set defence\.close to 4$"):
        Lockout(close=9).check(given)
    with pytest.raises(UserError, match="spared is 4, but the network has 4 weight layers after the first"):
        Lockout(spared=4).check(given)


def test_the_second_stage_is_sophons_loop_with_lockouts_loss(original, restricted, task, runtime, clean_state) -> None:
    """Its adversaries move the model beside lockout's steps; what they simulate counts as simulated."""
    architecture = Architecture("small_conv", size=8, channels=1, options={"width": 8})
    second = Sophon(
        adversaries=1, inner_steps=3, inner_batch_size=(20,), inner_lr=(1e-2,), iterations=3, ntr_loops=2, alpha=1e-2
    )
    alone = Lockout(iterations=2, steps=2, check_every=1, probe_steps=2, batch_size=20, tolerance=0.5)
    half, ends, fields = restricted.halves(0)[0], [], []
    for spec in (alone, replace(alone, sophon=second), replace(alone, sophon=replace(second, alpha=1e-9))):
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        engine = spec.prepare(Given(model, original, half, 5, architecture, task, runtime))
        assert engine.length == (2 if spec.sophon is None else 5)
        for i in range(1, engine.length + 1):
            losses = engine.iterate(i, 1.0)
        ends.append(state_of(model)["0.weight"])
        fields.append(losses.keys())
    assert "fts" not in fields[0]
    assert fields[1] == {"fts", *fields[0]}
    assert not torch.equal(ends[1], ends[2])
    tuned = FineTuning(optimiser="adam", lr=1e-2, weight_decay=0.0)
    assert replace(alone, sophon=second).simulates(tuned)
    assert not alone.simulates(tuned)
    with pytest.raises(UserError, match="alternating within lockout"):
        Lockout(sophon=Sophon(update="joint"))
    for own in ({"repair": 0.4}, {"augment": "shift"}, {"reinforcement": "distillation"}):
        with pytest.raises(UserError, match="must be left alone within lockout"):
            Lockout(sophon=Sophon(**own))


def test_what_recomputes_a_forward_pass_knows_nothing_of_lockout(original, restricted, architecture, task) -> None:
    """Said before any work; a network without batch normalisation has nothing to lose."""
    runtime = Runtime.choose("cpu", "float32", checkpointing=True)
    plain, _, _ = NETWORKS["plain"]
    for network, spec, refused in (
        (architecture, Lockout(), True),
        (plain, Lockout(), False),
        (plain, Lockout(reopen=1.0), True),
    ):
        given = Given(network.build(5), original, restricted.train, 5, network, task, runtime)
        if refused:
            with pytest.raises(UserError, match=r"runtime\.checkpointing recomputes forward passes"):
                spec.require_fit(given)
        else:
            spec.require_fit(given)


def test_a_recipe_nests_sophon(tmp_path) -> None:
    raw = {
        "name": "nested",
        "original": "digits[0-4]",
        "restricted": "digits[5-9]",
        "model": {"name": "small_conv", "size": 8, "channels": 1},
        "defence": {"name": "lockout", "sophon": {"inner_steps": 7}},
    }
    assert parse_recipe(raw).defence_object == Lockout(sophon=Sophon(inner_steps=7))
    changed = parse_recipe(raw, changes=["defence.sophon.inner_steps=9"])
    assert changed.defence_object.sophon.inner_steps == 9
    with pytest.raises(UserError, match="inner_stepz"):
        parse_recipe({**raw, "defence": {"name": "lockout", "sophon": {"inner_stepz": 7}}})


def test_another_attempt_is_a_fresh_protection_at_that_strength(
    original, restricted, architecture, task, runtime, clean_state, monkeypatch
) -> None:
    """The first of two is told that it ended at half of the original metric, where a tenth may go: 0.9·0.1/0.5."""
    told: list[float] = []
    monkeypatch.setattr(Given, "original_metric", lambda _: told.pop(0) if told else 1.0)

    def protected(**changes):
        model = architecture.build(5)
        model.load_state_dict(clean_state)
        spec = Lockout(iterations=4, steps=2, batch_size=20, probe_steps=1, tolerance=0.1, **changes)
        given = (original, restricted.halves(0)[0])
        own = {"restricted_classes": 5, "architecture": architecture, "task": task, "runtime": runtime}
        history = spec.protect(model, *given, **own)
        return state_of(model), history

    told += [1.0, 0.5, 0.5]  # unprotected; the checks after iterations 3 and 4
    second, history = protected(attempts=2)
    assert history.attempts == [1.0]
    assert history.released == 8
    (strength,) = {c["strength"] for c in history.checks if c["iteration"] > 4}
    assert strength == pytest.approx(0.18)
    fresh, _ = protected(strength=strength)
    assert all(torch.equal(v, fresh[n]) for n, v in second.items())
    full, _ = protected()
    assert not torch.equal(full["0.weight"], fresh["0.weight"])
