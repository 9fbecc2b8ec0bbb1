"""Probes on every layer's input: what there is to know, and what random weights know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.cells import Bench
from holdfast.limits import PROBED, depth_of, fitted, limits, measure_limits, probes, run_probes
from holdfast.models import Architecture, State
from holdfast.progress import Reporter
from holdfast.records import RecordFile
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
    found = [r for rows in measure_limits(bench, probes(bench), 2) for r in rows]
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
    assert {r.seed for rows in measure_limits(bench, probes(bench), 2, known) for r in rows} == {1}
    worst = {m: {"along_the_way": v} for m, v in (("protected", 0.45), ("clean", 0.7), ("scratch", 0.4))}
    assert limit_curves(limits(found), worst, 0.2, ACCURACY).startswith(b"\x89PNG")
    words = limit({"limits": limits(found), "restricted": {"metric": "accuracy", "worst_case": worst}})
    assert words.startswith("Probes on the protected model know −")
    assert "+30.0 points beside scratch from the clean model, +5.0 from the protected one." in words


def test_what_is_said_of_a_layer_that_is_left() -> None:
    """Two layers: the clean model knows 0.3 and 0.5 more than random weights, the protected one 0.1 and 0.2."""

    def row(layer: str, *values: float) -> dict[str, object]:
        return {
            "layer": layer,
            **{m: {"mean": v} for m, v in zip(("scratch", "clean", "protected"), values, strict=True)},
        }

    worst = {m: {"along_the_way": v} for m, v in (("protected", 0.45), ("clean", 0.7), ("scratch", 0.5))}
    found = [row("conv", 0.2, 0.5, 0.3), row("head", 0.3, 0.8, 0.5)]
    words = limit({"limits": found, "restricted": {"metric": "accuracy", "worst_case": worst}})
    assert words == (
        "Over the 2 layers probed the clean model knows 40 points more of the restricted domain than random "
        "weights do; the protected one 15 points. Most is left at the input of head: +20.0 points. What attackers "
        "who fine-tune make of it, along the way in the worst case: +20.0 points beside scratch from the clean model, "
        "−5.0 from the protected one."
    )
    assert limit({"limits": []}) == ""


def test_no_more_than_six_of_a_deep_network(bench: Bench) -> None:
    deep = Architecture("resnet18", size=32, channels=3)
    state = deep.build(5, 0).state_dict()
    found = [depth_of(a.name) for a in probes(replace(bench, architecture=deep, states={"clean": state}))]
    assert len(found) == len(set(found)) == 6
    assert found[-1] == "fc"


def test_a_model_that_overflows_is_measured_too() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=rng).double()
    y = (x[:, 0] > 0).long()
    x[3, 1], x[4, 2] = float("inf"), float("nan")
    assert 0.0 <= fitted(dict.fromkeys(("train", "validation", "test"), (x, y)))["test"] <= 1.0


class _Windows(nn.Module):
    """A layer that sees four windows of each image, and a table that sees none."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)
        self.table, self.head = nn.Linear(2, 4), nn.Linear(4, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        maps = self.first(inputs)
        windows = maps.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).mean(4).permute(0, 2, 3, 1).reshape(-1, 1, 4)
        inner = self.inner(windows).view(len(inputs), 4, 4).mean(1)
        return self.head(inner + self.table(torch.ones(1, 2, device=inputs.device)))


def test_layers_that_do_not_see_an_image_a_row_are_not_probed(bench: Bench) -> None:
    architecture = Architecture("windows", size=8, channels=1, factory=_Windows)
    given = replace(bench, architecture=architecture, states={"clean": _Windows(5).state_dict()})
    (probe,) = probes(given)
    assert depth_of(probe.name) == "head"
    (first, *_) = measure_limits(given, [probe], 1, {("protected", probe.name, 0)})
    assert first[0].model == "clean"


def test_probing_goes_on_where_it_was(bench: Bench, tmp_path: Path) -> None:
    file, quiet = RecordFile(tmp_path / "records.jsonl"), Reporter(quiet=True)
    run_probes(bench, probes(bench), 1, file, quiet)
    whole = file.read()
    assert len(whole) == len(PROBED) * len(probes(bench)) * 2
    kept = [r for r in whole if r.attack != whole[0].attack]
    file.keep(kept)
    run_probes(bench, probes(bench), 1, file, quiet)
    again = file.read()
    assert again[: len(kept)] == kept
    assert {(r.model, r.attack, r.split, r.value) for r in again} == {
        (r.model, r.attack, r.split, r.value) for r in whole
    }
    assert len(again) == len(whole)
    before = file.path.read_bytes()
    run_probes(bench, probes(bench), 1, file, quiet)
    assert file.path.read_bytes() == before
