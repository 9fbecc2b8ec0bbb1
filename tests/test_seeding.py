"""Streams of randomness: functions of the seed and of what they are for."""

import torch

from holdfast.seeding import derive, reseed, seeded


def test_reseeding_is_torchs_own_on_the_cpu() -> None:
    torch.manual_seed(derive(3, "step", 1))
    expected = torch.rand(5)
    reseed(derive(3, "step", 1))
    assert torch.equal(torch.rand(5), expected)


def test_a_block_leaves_the_global_generator_where_it_was() -> None:
    before = torch.get_rng_state()
    with seeded(1, "a"):
        first = torch.rand(3)
    with seeded(1, "a"):
        assert torch.equal(torch.rand(3), first)
    with seeded(1, "b"):
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)
