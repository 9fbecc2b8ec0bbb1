"""Adam in one pass over the memory does the same arithmetic as Adam operation by operation, in every memory format."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from holdfast.optimisers import adam


def channels_last() -> nn.Parameter:
    rng = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(4, 3, 5, 5, generator=rng).to(memory_format=torch.channels_last))


def gradients(contiguous: bool) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    made = [torch.randn(4, 3, 5, 5, generator=rng) for _ in range(6)]
    return made if contiguous else [g.to(memory_format=torch.channels_last) for g in made]


def plain(decoupled: bool) -> Tensor:
    parameter = channels_last()
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimiser = kind([parameter], 0.1, weight_decay=0.01, foreach=False)
    for gradient in gradients(True):
        parameter.grad = gradient
        optimiser.step()
    return parameter.detach()


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_a_gradient_in_any_memory_format(decoupled: bool, contiguous: bool) -> None:
    parameter = channels_last()
    optimiser = adam([parameter], 0.1, 0.01, decoupled=decoupled)
    for gradient in gradients(contiguous):
        parameter.grad = gradient
        optimiser.step()
    assert torch.allclose(parameter, plain(decoupled), atol=1e-6)


def test_moments_from_a_file_that_keeps_no_memory_format() -> None:
    parameter = channels_last()
    optimiser, rest = adam([parameter], 0.1, 0.01), gradients(True)
    for gradient in rest[:3]:
        parameter.grad = gradient
        optimiser.step()
    state = copy.deepcopy(optimiser.state_dict())
    for moments in state["state"].values():
        moments.update({k: v.contiguous() for k, v in moments.items()})
    again = adam([parameter], 0.1, 0.01)
    again.load_state_dict(state)
    for gradient in rest[3:]:
        parameter.grad = gradient
        again.step()
    assert torch.allclose(parameter, plain(False), atol=1e-6)
