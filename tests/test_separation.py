"""Fisher ratio and MMD: values by hand, invariances, gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from holdfast.errors import UserError
from holdfast.separation import a_distance, class_mmd, fisher_ratio, mmd


class TestFisherRatio:
    def test_by_hand(self) -> None:
        """Unit vectors at 0° and 90° (class 0), at 180° twice (class 1).

        μ0 = (½, ½), μ1 = (−1, 0), μ = (−¼, ¼). S_B = 2·(9/16 + 1/16) + 2·(9/16 + 1/16) = 5/2;
        S_W = ½ + ½ + 0 + 0 = 1.
        """
        features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-1.0, 0.0]])
        assert fisher_ratio(features, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(2.5)

    def test_lengths_do_not_count_and_neither_do_names(self) -> None:
        features = torch.randn(12, 5)
        labels = torch.arange(12) % 3
        value = fisher_ratio(features, labels)
        assert torch.allclose(fisher_ratio(features * torch.rand(12, 1).add(0.1), labels), value, rtol=1e-4)
        assert torch.allclose(fisher_ratio(features, labels * 7 + 2), value)
        assert torch.allclose(fisher_ratio(features.reshape(12, 5, 1, 1), labels), value)

    def test_zero_where_classes_share_their_mean_and_where_all_is_zero(self) -> None:
        pair = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        assert fisher_ratio(pair.repeat(2, 1), torch.tensor([0, 0, 1, 1])).item() == pytest.approx(0, abs=1e-6)
        assert fisher_ratio(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])).item() == 0

    def test_a_class_of_one_sample_does_not_count(self) -> None:
        features, labels = torch.randn(9, 5), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 3])
        assert torch.allclose(fisher_ratio(features, labels), fisher_ratio(features[:7], labels[:7]))
        alone = torch.randn(2, 5, requires_grad=True)
        ratio = fisher_ratio(alone, torch.tensor([0, 1]))
        assert ratio.item() == 0
        assert not torch.autograd.grad(ratio, alone)[0].any()

    def test_gradient(self) -> None:
        features = torch.randn(6, 3, requires_grad=True)
        labels = torch.tensor([0, 0, 1, 1, 2, 2])
        (gradient,) = torch.autograd.grad(fisher_ratio(features, labels), features)
        step = 1e-2
        for i, j in ((0, 0), (3, 2), (5, 1)):
            moved = [features.detach().clone() for _ in range(2)]
            moved[0][i, j] += step
            moved[1][i, j] -= step
            expected = (fisher_ratio(moved[0], labels) - fisher_ratio(moved[1], labels)) / (2 * step)
            assert gradient[i, j].item() == pytest.approx(expected.item(), rel=2e-2, abs=1e-3)


class TestMMD:
    def test_by_hand(self) -> None:
        """One point each, at distance 2: the squared distances are 0, 4, 4, 0, so b̄ = 8/(4 − 2) = 4; with one kernel
        MMD² = 1 + 1 − 2·exp(−4/4)."""
        value = mmd(torch.tensor([[0.0]]), torch.tensor([[2.0]]), kernels=1)
        assert value.item() == pytest.approx(2 - 2 * math.exp(-1), abs=1e-6)

    def test_five_kernels_by_hand(self) -> None:
        """The same points: the widths are 1, 2, 4, 8, 16."""
        value = mmd(torch.tensor([[0.0]]), torch.tensor([[2.0]]))
        expected = sum(2 - 2 * math.exp(-4 / w) for w in (1, 2, 4, 8, 16))
        assert value.item() == pytest.approx(expected, abs=1e-5)

    def test_equal_samples_and_unequal_sizes(self) -> None:
        sample = torch.randn(7, 3)
        assert mmd(sample, sample).item() == pytest.approx(0, abs=1e-6)
        assert mmd(sample, torch.randn(4, 3) + 5).item() > 1

    def test_gradient_pushes_apart(self) -> None:
        first, second = torch.randn(5, 2), torch.randn(5, 2, requires_grad=True)
        (gradient,) = torch.autograd.grad(mmd(first, second), second)
        assert mmd(first, second + 0.1 * gradient).item() > mmd(first, second).item()

    def test_gradient(self) -> None:
        """Finite differences of Σ_w E k(x, x′) + E k(y, y′) − 2·E k(x, y) at fixed widths: no gradient goes through
        the bandwidth."""
        first, second = torch.randn(4, 3).double(), torch.randn(3, 3).double().requires_grad_()
        every = torch.cat([first, second]).detach()
        width = torch.cdist(every, every).square().sum() / (49 - 7)

        def at(moved: torch.Tensor) -> torch.Tensor:
            def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
                squares = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(2)
                return sum(torch.exp(-squares / (width * 2.0**k)).mean() for k in range(-2, 3))

            return kernel(first, first) + kernel(moved, moved) - 2 * kernel(first, moved)

        value = mmd(first, second)
        assert value.item() == pytest.approx(at(second.detach()).item(), abs=1e-5)
        (gradient,) = torch.autograd.grad(value, second)
        for i, j in ((0, 0), (1, 2), (2, 1)):
            step = torch.zeros(3, 3).double()
            step[i, j] = 1e-5
            expected = (at(second.detach() + step) - at(second.detach() - step)) / 2e-5
            assert gradient[i, j].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-4)

    def test_bad_values(self) -> None:
        with pytest.raises(UserError, match="kernels ≥ 1"):
            mmd(torch.zeros(2, 2), torch.zeros(2, 2), kernels=0)
        with pytest.raises(UserError, match="shape"):
            mmd(torch.zeros(2), torch.zeros(2))


class TestClassMMD:
    def test_by_hand(self) -> None:
        """Classes {0, 2} and {2, 4} on a line: squared distances 4 within each, 4, 16, 0, 4 across; b̄ = 2·32/12 = 16/3.
        K_00 = K_11 = exp(−¾), K_01 = (2·exp(−¾) + exp(−3) + 1)/4."""
        features = torch.tensor([[0.0], [2.0], [2.0], [4.0]])
        value = class_mmd(features, torch.tensor([5, 5, 7, 7]), kernels=1)
        near, far = math.exp(-0.75), math.exp(-3)
        assert value.item() == pytest.approx(2 * near - 2 * (2 * near + far + 1) / 4, abs=1e-6)

    def test_the_mean_over_pairs_of_classes(self) -> None:
        """Against the definition, in loops: three classes of unequal size, and one of a single sample, which counts
        for nothing but the width."""
        features, labels = torch.randn(10, 4).double(), torch.tensor([0, 1, 0, 2, 1, 0, 2, 1, 0, 9])
        kept, marks = features[:9], labels[:9]
        width = torch.cdist(features, features).square().sum() / 90
        kernel = sum(torch.exp(-torch.cdist(kept, kept).square() / (width * 2.0**k)) for k in range(-2, 3))

        def mean(c: int, d: int) -> float:
            return float(
                torch.stack(
                    [kernel[i, j] for i in range(9) for j in range(9) if marks[i] == c and marks[j] == d and i != j]
                ).mean()
            )

        pairs = [(0, 1), (0, 2), (1, 2)]
        expected = sum(mean(c, c) + mean(d, d) - 2 * mean(c, d) for c, d in pairs) / 3
        assert class_mmd(features, labels).item() == pytest.approx(expected, abs=1e-5)
        assert class_mmd(features * 50, labels).item() == pytest.approx(expected, abs=1e-5)

    def test_gradient_against_finite_differences(self) -> None:
        """Of the definition in float64; the kernels' width is a constant to the gradient."""
        features, labels = torch.randn(7, 3, requires_grad=True), torch.tensor([0, 1, 0, 2, 1, 2, 0])
        (gradient,) = torch.autograd.grad(class_mmd(features, labels), features)
        given = features.detach().double()
        width = torch.cdist(given, given).square().sum() / 42

        def at(x: torch.Tensor) -> torch.Tensor:
            kernel = sum(torch.exp(-torch.cdist(x, x).square() / (width * 2.0**k)) for k in range(-2, 3))
            kernel = kernel - torch.diag(kernel.diagonal())
            ones = [(labels == c).double() for c in range(3)]
            total = torch.zeros(()).double()
            for c, d in ((0, 1), (0, 2), (1, 2)):
                for e in (c, d):
                    count = ones[e].sum()
                    total = total + ones[e] @ kernel @ ones[e] / (count * (count - 1))
                total = total - 2 * ones[c] @ kernel @ ones[d] / (ones[c].sum() * ones[d].sum())
            return total / 3

        for i in range(7):
            for j in range(3):
                step = torch.zeros_like(given)
                step[i, j] = 1e-5
                expected = (at(given + step) - at(given - step)) / 2e-5
                assert gradient[i, j].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-4)

    def test_zero_on_average_where_classes_are_drawn_alike_and_more_where_only_their_spread_differs(self) -> None:
        draws = torch.Generator().manual_seed(0)
        samples, labels = torch.randn(200, 16, 3, generator=draws), torch.arange(16) % 2
        alike = torch.stack([class_mmd(s, labels) for s in samples])
        assert abs(alike.mean()) < 4 * alike.std() / len(alike) ** 0.5
        wider = samples * (1 + 3 * labels).view(16, 1)
        spread = torch.stack([class_mmd(s, labels) for s in wider])
        assert spread.mean() > 10 * spread.std() / len(spread) ** 0.5

    def test_nothing_to_compare(self) -> None:
        features = torch.randn(4, 2, requires_grad=True)
        value = class_mmd(features, torch.tensor([0, 0, 1, 2]))
        assert value.item() == 0
        assert not torch.autograd.grad(value, features)[0].any()
        assert class_mmd(torch.ones(4, 2), torch.tensor([0, 0, 1, 1])).item() == pytest.approx(0, abs=1e-6)

    def test_in_float32_within_autocast_too(self) -> None:
        """Far from the origin of their spread, where bf16 would leave a difference of squares two digits."""
        labels = torch.arange(40) % 4
        features = torch.randn(40, 64) + 8 * torch.randn(4, 64)[labels]
        with torch.autocast("cpu", torch.bfloat16):
            value = class_mmd(features, labels)
        assert value.item() == class_mmd(features, labels).item()

    def test_its_gradient_brings_classes_together(self) -> None:
        labels = torch.arange(12) % 3
        features = (torch.randn(12, 3) + 3 * labels.unsqueeze(1)).detach().requires_grad_()
        value = class_mmd(features, labels)
        (gradient,) = torch.autograd.grad(value, features)
        assert class_mmd(features - 0.1 * gradient / gradient.norm(), labels) < value


class TestADistance:
    def test_two_where_a_plane_tells_them_apart_and_about_zero_where_nothing_does(self) -> None:
        points = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        assert a_distance(points[:100], points[100:] + 100) == pytest.approx(2)
        assert abs(a_distance(points[:100], points[100:])) < 0.5

    def test_by_hand(self) -> None:
        """One feature, ±1: three in four of the first have +1, three in four of the second −1. The best guess is wrong
        for a quarter of both, so 2·(1 − 2/4) = 1; also where the first are twice as many."""
        first, second = torch.ones(80, 1), -torch.ones(80, 1)
        first[::4], second[::4] = -1, 1
        assert a_distance(first, second) == pytest.approx(1)
        assert a_distance(first.repeat(2, 1), second) == pytest.approx(1)

    def test_too_few(self) -> None:
        with pytest.raises(UserError, match="2 ≤ folds ≤ 3"):
            a_distance(torch.zeros(3, 2), torch.zeros(9, 2))
