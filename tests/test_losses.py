"""Suppression losses against values derived by hand, and where float arithmetic is hard."""

import math

import pytest
import torch
import torch.nn.functional as F

from holdfast.errors import UserError
from holdfast.losses import distillation, inverse_cross_entropy, inverse_logits_cross_entropy, kl_from_uniform

LOSSES = [inverse_cross_entropy, kl_from_uniform, inverse_logits_cross_entropy]


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([[math.log(p) for p in probabilities]])


def test_ice_is_minus_log_of_one_minus_p() -> None:
    value = inverse_cross_entropy(logits_of(0.25, 0.6, 0.15), torch.tensor([1]))
    assert value.item() == pytest.approx(-math.log(0.4), rel=1e-6)


def test_ice_is_the_mean_over_the_batch() -> None:
    logits = torch.cat([logits_of(0.5, 0.5), logits_of(0.2, 0.8)])
    value = inverse_cross_entropy(logits, torch.tensor([0, 1]))
    assert value.item() == pytest.approx((math.log(2) + math.log(5)) / 2, rel=1e-6)


def test_klu_of_a_hand_computed_distribution() -> None:
    p = (0.5, 0.3, 0.2)
    expected = -sum(math.log(3 * x) for x in p) / 3
    assert kl_from_uniform(logits_of(*p), torch.tensor([0])).item() == pytest.approx(expected, rel=1e-6)


def test_klu_is_zero_at_uniform_whatever_the_number_of_classes() -> None:
    for classes in (2, 7, 100):
        assert kl_from_uniform(torch.full((3, classes), 1.7), None).item() == pytest.approx(0, abs=1e-6)


def test_ice_logits_is_cross_entropy_of_the_negated_logits_and_of_one_minus_them() -> None:
    z, y = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([2])
    expected = math.log(math.exp(-1) + math.exp(2) + math.exp(-0.5)) + 0.5
    assert inverse_logits_cross_entropy(z, y).item() == pytest.approx(expected, rel=1e-6)
    assert F.cross_entropy(1 - z, y).item() == pytest.approx(expected, rel=1e-6)
    assert inverse_cross_entropy(z, y).item() != pytest.approx(expected, rel=1e-2)  # another loss than Eq. 11


def test_ice_gradient_is_equation_12() -> None:
    z = torch.tensor([[0.3, -1.1, 2.0]], requires_grad=True)
    inverse_cross_entropy(z, torch.tensor([0])).backward()
    p = z.detach().softmax(1)[0]
    expected = torch.stack([p[0], -p[1] * p[0] / (1 - p[0]), -p[2] * p[0] / (1 - p[0])])
    assert torch.allclose(z.grad[0], expected, atol=1e-6)


def test_klu_gradient_is_equation_14() -> None:
    z = torch.tensor([[0.3, -1.1, 2.0, 0.0]], requires_grad=True)
    kl_from_uniform(z, None).backward()
    assert torch.allclose(z.grad[0], z.detach().softmax(1)[0] - 0.25, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_agree_with_finite_differences(loss) -> None:
    rng = torch.Generator().manual_seed(0)
    z, y = torch.randn(4, 5, generator=rng), torch.tensor([0, 3, 2, 4])
    z.requires_grad_(True)
    loss(z, y).backward()
    step = 1e-2
    for i in range(4):
        for j in range(5):
            offset = torch.zeros_like(z)
            offset[i, j] = step
            with torch.no_grad():
                slope = (loss(z + offset, y) - loss(z - offset, y)) / (2 * step)
            assert z.grad[i, j].item() == pytest.approx(slope.item(), abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0, 1e4])
def test_finite_with_finite_gradients_from_p_near_0_to_p_near_1(dtype, loss, scale) -> None:
    for sign in (1, -1):
        z = torch.zeros(2, 4, dtype=dtype)
        z[:, 0] = sign * scale
        z.requires_grad_(True)
        value = loss(z, torch.tensor([0, 0]))
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert z.grad.isfinite().all()


def test_ice_keeps_its_value_and_gradient_where_naive_float32_loses_them() -> None:
    sure = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)  # 1 − p is below float32's resolution
    value = inverse_cross_entropy(sure, torch.tensor([0]))
    value.backward()
    assert value.item() == pytest.approx(40 - math.log(2), rel=1e-6)
    assert sure.grad[0].tolist() == pytest.approx([1.0, -0.5, -0.5])
    unsure = inverse_cross_entropy(torch.tensor([[-25.0, 0.0, 0.0]]), torch.tensor([0]))
    assert unsure.item() == pytest.approx(math.exp(-25) / 2, rel=1e-4)  # naive: exactly 0


def test_the_wrong_shape_is_one_line() -> None:
    with pytest.raises(UserError, match=r"shape \(n, C\)"):
        kl_from_uniform(torch.zeros(3, 1), None)


def test_distillation_by_hand() -> None:
    """KL((¼, ¾) ‖ (½, ½)) = ¼·ln ½ + ¾·ln 3⁄2; at T = 2 the answers are softened, and T² is a factor."""
    student, teacher = logits_of(0.5, 0.5), logits_of(0.25, 0.75)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert distillation(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    soft = 1 / (1 + math.sqrt(3))
    expected = 4 * (soft * math.log(2 * soft) + (1 - soft) * math.log(2 * (1 - soft)))
    assert distillation(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert distillation(teacher, teacher).item() == 0.0
