"""Measures and statistics against values worked out by hand."""

import pytest

from holdfast.metrics import (
    area,
    cost_ratio,
    evaluation_steps,
    recovery,
    scratch_learns,
    steps_to_reach,
    verdict,
)
from holdfast.scales import ACCURACY, MSE, scale_of
from holdfast.statistics import deviation, interval, mean, paired


def test_recovery() -> None:
    assert recovery(0.4, 0.9, 0.1) == pytest.approx(0.3 / 0.8)
    assert recovery(0.05, 0.9, 0.1) == pytest.approx(-0.05 / 0.8)
    assert recovery(0.1, 0.12, 0.1) is None  # the clean model did not learn either


def test_evaluation_steps_double_up_to_the_last() -> None:
    assert evaluation_steps(160, 4) == [0, 20, 40, 80, 160]
    assert evaluation_steps(3, 8) == [0, 1, 2, 3]


def test_steps_to_reach_interpolates() -> None:
    assert steps_to_reach([0, 10, 20], [0.1, 0.3, 0.7], 0.5) == pytest.approx(15)
    assert steps_to_reach([0, 10, 20], [0.6, 0.3, 0.7], 0.5) == 0
    assert steps_to_reach([0, 10], [0.1, 0.2], 0.5) is None


def test_cost_ratio() -> None:
    steps, scratch = [0, 10, 20], [0.1, 0.32, 0.52]  # target 0.50: scratch arrives at step 19
    assert cost_ratio(steps, [0.1, 0.5, 0.9], scratch, 0.1) == pytest.approx(10 / 19)
    assert cost_ratio(steps, [0.1, 0.1, 0.2], scratch, 0.1) is None
    assert cost_ratio(steps, scratch, scratch, 0.1) == pytest.approx(1)


def test_without_learning_from_scratch_there_is_no_cost_to_compare_with() -> None:
    flat = [0.1, 0.11, 0.12]
    assert not scratch_learns([0, 10, 20], flat, 0.1)
    assert cost_ratio([0, 10, 20], [0.5, 0.7, 0.9], flat, 0.1) is None
    assert scratch_learns([0, 10, 20], [0.1, 0.3, 0.5], 0.1)


def test_area_leaves_step_0_out() -> None:
    assert area([0.9, 0.2, 0.4]) == pytest.approx(0.3)


def test_statistics() -> None:
    assert mean([1, 2, 6]) == 3
    assert deviation([1, 2, 6]) == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    low, high = interval([1, 2, 6])
    half = 4.302653 * 7**0.5 / 3**0.5  # t for 2 degrees of freedom at 97.5 %
    assert (low, high) == pytest.approx((3 - half, 3 + half), rel=1e-5)
    assert interval([0.4]) is None
    assert paired([3, 5], [1, 6]) == [2, -1]


def curves(*finals: float) -> list[list[float]]:
    return [[0.1, f * 0.6, f] for f in finals]


CLEAN, SCRATCH = curves(0.9, 0.91, 0.9), curves(0.6, 0.61, 0.6)


@pytest.mark.parametrize(
    ("protected", "expected"),
    [
        (curves(0.3, 0.31, 0.3), "held"),
        (curves(0.6, 0.61, 0.6), "held"),
        (curves(0.75, 0.76, 0.75), "partial"),
        (curves(0.89, 0.91, 0.9), "failed"),
        (CLEAN, "failed"),
        (curves(0.3, 0.9, 0.31), "partial"),  # one seed gets through: not excluded, so not held
        ([[0.1, 0.59, 0.6]] * 3, "partial"),  # same end, but far ahead of scratch on the way
    ],
)
def test_verdict(protected, expected) -> None:
    assert verdict(protected, CLEAN, SCRATCH, 0.1) == expected


def test_one_seed_cannot_hold() -> None:
    assert verdict(curves(0.2), curves(0.9), curves(0.6), 0.1) == "partial"


def test_identity_fails_even_where_pre_training_brings_nothing() -> None:
    assert verdict(SCRATCH, SCRATCH, curves(0.9, 0.9, 0.9), 0.1) == "failed"


def test_slower_than_scratch_to_the_same_end_is_held() -> None:
    slow = [[0.1, 0.2, 0.98]] * 3
    assert verdict(slow, [[0.1, 0.95, 0.98]] * 3, [[0.1, 0.6, 0.98]] * 3, 0.1) == "held"


def test_an_error_is_read_upside_down() -> None:
    """MSE 0.05 → 0.06: 1 − MSE falls from 0.95 to 0.94, and intactness is 0.05 ÷ 0.06."""
    assert ACCURACY.retention(0.8, 0.76) == pytest.approx(0.95)
    assert MSE.retention(0.95, 0.94) == pytest.approx(0.05 / 0.06)
    assert ACCURACY.floor(0.9, 0.1) == pytest.approx(0.81)
    assert MSE.floor(0.95, 0.1) == pytest.approx(1 - 0.055)
    assert (ACCURACY.shown(0.873), MSE.shown(0.873), MSE.shown(None)) == ("87.3 %", "0.127", "–")
    assert (ACCURACY.difference(-0.123), ACCURACY.difference(0.05)) == ("−12.3", "+5.0")
    assert MSE.difference(0.02) == "−0.020", "a higher metric is a lower error"
    assert ACCURACY.interval([-0.01, 0.03]) == "−1.0 … +3.0"
    assert MSE.interval([-0.01, 0.03]) == "−0.030 … +0.010", "the lower end of the error first"
    assert (ACCURACY.amount(0.03), MSE.amount(-0.03)) == ("3 points", "0.030 of MSE")
    assert (ACCURACY.counted, MSE.counted) == ("points", "MSE")
    assert scale_of("1 − MSE") is MSE


def test_margins_are_the_scales_own() -> None:
    """One hundredth of MSE is twice its margin, of accuracy half of it."""
    near = [[0.0, 0.93, 0.94]] * 3
    clean, scratch = [[0.0, 0.98, 0.98]] * 3, [[0.0, 0.92, 0.93]] * 3
    assert verdict(near, clean, scratch, 0.0) == "held"
    assert verdict(near, clean, scratch, 0.0, scale=MSE) == "partial"
