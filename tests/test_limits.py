"""Probes on every layer's input: what there is to know, and what random weights know."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from holdfast.cells import Bench
from holdfast.limits import PROBED, depth_of, fitted, limits, measure_limits, probes
from holdfast.models import Architecture, State
from holdfast.report.maps import limit_curves
from holdfast.report.words import limit
from holdfast.scales import ACCURACY


@pytest.fixture
def bench(bench: Bench, clean_state: State) -> Bench:
    """The protected model has a layer of zeros."""
    constant = {n: torch.zeros_like(v) if n == "9.weight" else v for n, v in clean_state.items()}
    return replace(bench, states={"protected": constant, "clean": clean_state})


def test_a_regression_finds_what_is_there_and_nothing_else() -> None:
    rng = torch.Generator().manual_seed(0)

    def side(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, 4, generator=rng).double()
        return x * torch.tensor([1e3, 1e-3, 1.0, 1.0]) + 7, (x[:, 1] > 0).long()  # in the smallest of the features

    data = {"train": side(200), "validation": side(200), "test": side(200)}
    assert fitted(data)["test"] > 0.95
    blind = {n: (torch.ones_like(x), y) for n, (x, y) in data.items()}
    assert 0.3 < fitted(blind)["test"] < 0.7


def test_every_layer_of_every_model(bench: Bench) -> None:
    found = [r for rows in measure_limits(bench, 2) for r in rows]
    names = [a.name for a in probes(bench)]
    assert [depth_of(n) for n in names] == ["3", "6", "9", "14"]
    assert {(r.model, r.attack, r.seed, r.split) for r in found} == {
        (m, n, s, p) for m in PROBED for n in names for s in (0, 1) for p in ("validation", "test")
    }
    table = {row["layer"]: row for row in limits(found)}
    assert table["14"]["protected"]["mean"] == pytest.approx(0.2, abs=0.08), "behind a layer of zeros there is nothing"
    assert table["9"]["protected"]["mean"] == table["9"]["clean"]["mean"], "before it all is as it was"
    assert table["14"]["clean"]["mean"] > table["14"]["scratch"]["mean"] > 0.25
    known = {(r.model, r.attack, r.seed) for r in found if r.seed == 0}
    assert {r.seed for rows in measure_limits(bench, 2, known) for r in rows} == {1}
    assert limit_curves(limits(found), 0.2, ACCURACY).startswith(b"\x89PNG")
    words = limit({"limits": limits(found), "restricted": {"metric": "accuracy"}})
    assert words.startswith("Probes on the protected model know −")


def test_no_more_than_six_of_a_deep_network(bench: Bench) -> None:
    deep = Architecture("resnet18", size=32, channels=3)
    state = deep.build(5, 0).state_dict()
    found = [depth_of(a.name) for a in probes(replace(bench, architecture=deep, states={"clean": state}))]
    assert len(found) == len(set(found)) == 6
    assert found[-1] == "fc"
