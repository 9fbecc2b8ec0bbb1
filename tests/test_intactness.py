"""What protection cost the original domain, in numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.corruptions import CORRUPTIONS, corrupted, corruptions
from holdfast.domains import Domain
from holdfast.intactness import ORIGINAL, costs, intactness, measure_intactness, part_of, parts
from holdfast.metrics import calibration_error
from holdfast.models import Architecture
from holdfast.runtime import Runtime
from holdfast.tasks import Classification
from holdfast.training import evaluate


def test_calibration_error_by_hand() -> None:
    """Two bins: 0.9 sure and right 3 of 4 times (a gap of 0.15), 0.5 sure and right always (0.5)."""
    confidence, right = [0.9] * 4 + [0.5] * 2, [True, True, True, False, True, True]
    assert calibration_error(confidence, right) == pytest.approx((4 * 0.15 + 2 * 0.5) / 6)
    assert calibration_error([1.0, 1.0], [True, True]) == 0.0
    assert calibration_error([], []) == 0.0


class TestCorruptions:
    def test_all_by_their_definition(self) -> None:
        rng = torch.Generator().manual_seed(0)
        images = torch.randint(40, 200, (64, 3, 20, 20), generator=rng).to(torch.uint8)
        plain = images.float() / 255
        found = {k: corrupted(images, k).float() / 255 for k in CORRUPTIONS}
        assert all(v.shape == images.shape for v in found.values())
        assert (found["noise"] - plain).std().item() == pytest.approx(0.08, abs=0.004)
        assert (found["brightness"] - plain).mean().item() == pytest.approx(0.15, abs=0.002)
        assert (found["contrast"].std((2, 3)) / plain.std((2, 3))).mean().item() == pytest.approx(0.4, abs=0.01)
        assert (found["contrast"].mean((2, 3)) - plain.mean((2, 3))).abs().max() < 0.005
        assert found["blur"].std() < 0.7 * plain.std()
        assert torch.unique(found["pixelate"][0, 0]).numel() < torch.unique(plain[0, 0]).numel()
        assert 0 < (found["jpeg"] - plain).abs().mean() < 0.2
        assert torch.equal(corrupted(images, "noise"), corrupted(images, "noise"))

    def test_jpeg_wants_grey_or_colour(self) -> None:
        assert "jpeg" in corruptions(1)
        assert "jpeg" in corruptions(3)
        assert "jpeg" not in corruptions(4)


class _Says(nn.Module):
    """Answers `label` always, as sure as `sure`."""

    def __init__(self, classes: int, label: int, sure: float) -> None:
        super().__init__()
        rest = (1 - sure) / (classes - 1)
        logits = torch.full((classes,), rest).log()
        logits[label] = torch.tensor(sure).log()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(inputs), -1)


def test_records_of_a_model_that_always_says_the_same(original: Domain, runtime: Runtime, task: Classification) -> None:
    architecture = replace(
        Architecture("small_conv", size=8, channels=1), factory=lambda classes: _Says(classes, 2, 0.7)
    )
    states = {n: _Says(5, 2, s).state_dict() for n, s in (("clean", 0.7), ("protected", 0.9))}
    rows = measure_intactness(states, architecture, original, task, runtime, "here")
    assert {(r.model, r.attack) for r in rows} == {(m, n) for m in states for n in parts(original, task)}
    share = (original.test.labels == 2).float().mean().item()
    found = intactness(rows)
    assert found is not None
    assert found["ratio"] == pytest.approx(1.0)
    assert found["before"] == pytest.approx(share)
    assert [v["after"] for v in found["classes"].values()] == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert found["calibration"]["before"] == pytest.approx(0.7 - share, abs=1e-5)
    assert found["calibration"]["after"] == pytest.approx(0.9 - share, abs=1e-5)
    assert set(found["corruptions"]) == set(CORRUPTIONS)
    assert [c[0] for c in costs(found)][-7:] == ["all corruptions, mean", *(f"under {k}" for k in CORRUPTIONS)]
    known = {(r.model, r.attack) for r in rows[:5]}
    again = measure_intactness(states, architecture, original, task, runtime, "here", known)
    assert {(r.model, r.attack) for r in again} == {(r.model, r.attack) for r in rows} - known


def test_the_class_of_every_image_counts(
    original: Domain,
    clean_state: dict[str, torch.Tensor],
    architecture: Architecture,
    runtime: Runtime,
    task: Classification,
) -> None:
    """Class accuracies weighted by their shares are the accuracy."""
    rows = measure_intactness({"clean": clean_state}, architecture, original, task, runtime, "")
    whole = next(r.value for r in rows if r.attack == ORIGINAL and r.split == "test")
    labels = original.test.labels
    classes = [r.value for r in rows if " · class " in r.attack]
    shares = [(labels == i).float().mean().item() for i in range(5)]
    assert sum(v * s for v, s in zip(classes, shares, strict=True)) == pytest.approx(whole, abs=1e-5)
    model = architecture.build(5)
    model.load_state_dict(clean_state)
    noisy = replace(original.test, images=corrupted(original.test.images, "noise"))
    expected = evaluate(model, noisy, task, runtime)[0]
    assert next(r.value for r in rows if r.attack.endswith("under noise")) == pytest.approx(expected)


def test_names_of_attacks_are_no_parts() -> None:
    assert part_of(ORIGINAL) == ""
    assert part_of(f"{ORIGINAL} · class 3") == "class 3"
    assert part_of("initFC+all") is None
