"""Projections, ADMM's updates and the mask, by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from holdfast.errors import UserError
from holdfast.pruning import ADMM, Mask, keep_largest, prunable, soft_threshold, sparsity


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_prunable_weights() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    assert prunable(model) == ["0.weight", "3.weight"]
    assert prunable(model, keep=("3",)) == ["0.weight"]
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    assert prunable(attention) == ["0.out_proj.weight", "0.in_proj_weight"]


def test_sparsity_counts_exact_zeros() -> None:
    assert sparsity({"a": row(0, 1, 0), "b": row(1e-30)}) == 0.5


def test_soft_threshold() -> None:
    assert soft_threshold({"a": row(0.3, -0.3, 0.1, -0.05)}, 0.1)["a"].tolist() == pytest.approx([0.2, -0.2, 0, 0])


class TestKeepLargest:
    def test_over_all_or_layer_by_layer(self) -> None:
        values = {"a": row(1, -2, 3, -4), "b": row(10, 20, 30, 40)}
        whole = keep_largest(values, 0.5)
        assert whole["a"].tolist() == [0, 0, 0, -4], "one a tensor always stays"
        assert whole["b"].tolist() == [10, 20, 30, 40]
        each = keep_largest(values, 0.5, "layer")
        assert each["a"].tolist() == [0, 0, 3, -4]
        assert each["b"].tolist() == [0, 0, 30, 40]

    def test_it_is_the_nearest_point(self) -> None:
        """No other choice of two survivors is nearer."""
        value = torch.randn(4)
        found = (value - keep_largest({"a": value}, 0.5)["a"]).norm()
        for i in range(4):
            for j in range(i):
                other = torch.zeros(4)
                other[[i, j]] = value[[i, j]]
                assert found <= (value - other).norm() + 1e-6

    def test_nothing_to_prune_and_bad_values(self) -> None:
        assert keep_largest({"a": row(1, 2)}, 0.0)["a"].tolist() == [1, 2]
        with pytest.raises(UserError, match=r"\[0, 1\)"):
            keep_largest({"a": row(1.0)}, 1.0)
        with pytest.raises(UserError, match="budget"):
            keep_largest({"a": row(1.0)}, 0.5, "block")


class TestADMM:
    def test_two_rounds_by_hand(self) -> None:
        admm = ADMM({"w": row(3, 1)}, rho=2.0)
        assert admm.penalty({"w": row(4, 1)}).item() == 1.0  # 2/2·(1² + 0²)
        primal, dual = admm.update({"w": row(3, 1)}, lambda v: keep_largest(v, 0.5))
        assert admm.z["w"].tolist() == [3, 0]
        assert admm.u["w"].tolist() == [0, 1]  # 0 + W − Z
        assert primal == pytest.approx(1 / 10**0.5)  # ‖(0, 1)‖/‖(3, 1)‖
        assert dual == pytest.approx(1.0)  # ‖Z − Z_before‖/‖U‖ = 1/1
        assert admm.penalty({"w": row(3, 0.5)}).item() == pytest.approx(2.25)  # (0.5 − 0 + 1)²
        primal, dual = admm.update({"w": row(2, 0.5)}, lambda v: keep_largest(v, 0.5))
        assert admm.z["w"].tolist() == [2, 0]
        assert admm.u["w"].tolist() == [0, 1.5]
        assert dual == pytest.approx(1 / 1.5)

    def test_its_penalty_has_the_gradient_of_the_theory(self) -> None:
        """ρ·(W − Z + U)."""
        admm = ADMM({"w": row(3, 1)}, rho=0.5)
        admm.update({"w": row(3, 1)}, lambda v: keep_largest(v, 0.5))
        weight = row(1.0, 2.0).requires_grad_(True)
        (gradient,) = torch.autograd.grad(admm.penalty({"w": weight}), weight)
        assert gradient.tolist() == pytest.approx([0.5 * (1 - 3 + 0), 0.5 * (2 - 0 + 1)])

    def test_a_quadratic_converges_to_the_sparse_solution(self) -> None:
        """min ½‖W − a‖² with one survivor: W → Z = the largest entry of a."""
        target, weight = row(2.0, 0.5), row(0.0, 0.0)
        admm = ADMM({"w": target}, rho=1.0)
        for _ in range(100):
            weight = (target + admm.z["w"] - admm.u["w"]) / 2  # the exact first step
            primal, _ = admm.update({"w": weight}, lambda v: keep_largest(v, 0.5))
        assert weight.tolist() == pytest.approx([2, 0], abs=1e-3)
        assert primal < 1e-3

    def test_another_rho_keeps_the_multipliers(self) -> None:
        admm = ADMM({"w": row(3, 1)}, rho=2.0)
        admm.update({"w": row(3, 1)}, lambda v: keep_largest(v, 0.5))
        admm.strengthen(8.0)
        assert (admm.rho * admm.u["w"]).tolist() == pytest.approx([0, 2.0])

    def test_its_state_goes_back(self) -> None:
        admm = ADMM({"w": row(3, 1)}, rho=2.0)
        before = copy.deepcopy(admm.state_dict())
        admm.update({"w": row(3, 1)}, lambda v: keep_largest(v, 0.5))
        admm.load_state_dict(before)
        assert admm.z["w"].tolist() == [3, 1]
        assert admm.u["w"].tolist() == [0, 0]


def test_a_mask() -> None:
    mask, weight = Mask(), row(1, 2, 3)
    mask.enforce({"w": weight})
    assert weight.tolist() == [1, 2, 3]
    mask.fix({"w": row(0, 5, 0)}, iteration=7)
    mask.enforce({"w": weight})
    assert weight.tolist() == [0, 2, 0]
    other = Mask()
    other.load_state_dict(mask.state_dict())
    assert other.since == 7
    assert other.kept["w"].tolist() == [False, True, False]
