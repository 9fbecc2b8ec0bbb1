"""From records to curves: what each model reached under each attack, what it cost, and the worst case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.audit import BENIGN, MODELS
from holdfast.errors import require
from holdfast.intactness import part_of
from holdfast.limits import depth_of
from holdfast.metrics import Verdict, area, strongest, verdict
from holdfast.records import Record, curves
from holdfast.scales import ACCURACY, Scale
from holdfast.statistics import deviation, mean

Curves = list[list[float]]
DEAD = 0.99  # share of the weights without a gradient from which a body counts as dead: all but a last bias


@dataclass(frozen=True)
class Measured:
    """Curves (seeds, steps) of the three models under one attack, on one split.

    `samples` and `flops`: what the attacker had spent at each evaluation, by model. `images`: how many it has.
    `settings`: what a search chose, by model. `dead`: models whose body got no gradient in the first step, but for a
    last bias perhaps.
    """

    name: str
    simulated: bool
    steps: list[int]
    protected: Curves
    clean: Curves
    scratch: Curves
    samples: Mapping[str, list[float]]
    flops: Mapping[str, list[float]]
    images: int
    settings: Mapping[str, dict[str, Any] | None]
    dead: tuple[str, ...]

    def mean(self, model: str) -> list[float]:
        """The mean over seeds at each step."""
        return [mean(column) for column in zip(*getattr(self, model), strict=True)]

    def deviation(self, model: str) -> list[float]:
        """The sample deviation over seeds at each step."""
        return [deviation(column) for column in zip(*getattr(self, model), strict=True)]

    def final(self, model: str) -> list[float]:
        """The last value of every seed."""
        return [curve[-1] for curve in getattr(self, model)]

    def lead(self, model: str) -> float:
        """Steps' worth of FLOPs that edits spent before the first step."""
        spent = self.flops[model]
        a_step = (spent[-1] - spent[0]) / self.steps[-1]
        return spent[0] / a_step if a_step > 0 else 0.0

    def points(self, budget: int) -> int:
        """How many evaluations (step 0 included) lie within `budget` steps; never fewer than two."""
        return max(2, sum(s <= budget for s in self.steps))


def measured(records: Sequence[Record], split: str = "test", planned: Iterable[str] = ()) -> list[Measured]:
    """The attacks in the order in which they were `planned`, which decides between equals; those that it does not
    name as they come. Raises `UserError` where cells are missing."""
    there = {r.attack for r in records}
    every = dict.fromkeys([*(n for n in planned if n in there), *(r.attack for r in records)])
    names = [a for a in every if a != BENIGN and part_of(a) is None and depth_of(a) is None]
    require(bool(names), "there are no records of an attack yet; run `holdfast audit` first")
    return [one_attack(records, name, split) for name in names]


def require_finished(records: Iterable[Record], facts: Mapping[str, Any]) -> None:
    """`UserError` where `records` lack a cell of what the audit set out to do, by its `facts` in `provenance.json`: an
    audit that was stopped is no audit, and one stopped on its way to a larger battery or more seeds not that one."""
    there = {(r.attack, r.model, r.seed) for r in records}
    names = [*facts.get("attacks", {}), *facts.get("probes", []), *([BENIGN] if facts.get("benign") else [])]
    seeds = facts.get("audit_seeds", [])
    planned = [(n, m, s) for n in names for m in MODELS for s in seeds]
    lacking = [cell for cell in planned if cell not in there]
    require(
        not lacking,
        f"the audit ({facts.get('battery')}, {len(seeds)} seeds) is unfinished: {len(lacking)} of {len(planned)} "
        "results are missing; continue it with `holdfast audit … --resume`",
    )


def one_attack(records: Sequence[Record], name: str, split: str = "test") -> Measured:
    """One attack's curves. Raises `UserError` where cells are missing."""
    own = [r for r in records if r.attack == name and r.split == split]
    by_model = {m: curves(own, m, name, split) for m in MODELS}
    steps, seeds, _ = by_model["protected"]
    require(
        all(s == steps and n == seeds for s, n, _ in by_model.values()),
        f"the audit of '{name}' is unfinished; continue it with `holdfast audit … --resume`",
    )
    rows = {m: [r for r in own if r.model == m] for m in MODELS}
    return Measured(
        name,
        any(r.simulated for r in rows["protected"]),
        steps,
        by_model["protected"][2],
        by_model["clean"][2],
        by_model["scratch"][2],
        samples={m: _spent(rows[m], steps, "samples") for m in MODELS},
        flops={m: _spent(rows[m], steps, "flops") for m in MODELS},
        images=max(r.images for r in own),
        settings={m: rows[m][0].setting for m in MODELS},
        dead=tuple(m for m in MODELS if any(r.dead >= DEAD for r in rows[m])),
    )


def _spent(rows: Sequence[Record], steps: Sequence[int], what: str) -> list[float]:
    return [mean([getattr(r, what) for r in rows if r.step == step]) for step in steps]


@dataclass(frozen=True)
class WorstCase:
    """What each model's owner would choose on *validation* data, and what that gives on *test* data.

    In the end: one attack for each model. Along the way: at every step of `steps` (up to the budget that most attacks
    have) the attack that is best there, for someone who can afford no more: `envelopes`, (seeds, steps) by model.
    """

    protected: Measured
    clean: Measured
    scratch: Measured
    steps: list[int]
    envelopes: Mapping[str, Curves]
    verdict: Verdict

    def along(self, model: str) -> float:
        """Mean over the envelope's steps after 0."""
        return mean([area(curve) for curve in self.envelopes[model]])


def worst_case(
    test: Sequence[Measured], validation: Sequence[Measured], chance: float, scale: Scale = ACCURACY
) -> WorstCase:
    """In the end, the best on validation data for each model on its own: among the attacks whose final metric is
    within the margin of the best one (a difference that small is chance), the one that is best along the way."""
    budget = Counter(m.steps[-1] for m in test).most_common(1)[0][0]
    steps = next(m.steps for m in test if m.steps[-1] == budget)
    chosen: dict[str, Measured] = {}
    envelopes: dict[str, Curves] = {}
    for model in MODELS:
        curves = [m.mean(model) for m in validation]
        chosen[model] = test[strongest(curves, [m.points(budget) for m in validation], scale)]
        envelopes[model] = _envelope(test, validation, steps, model)
    joined = [[[*way, end] for way, end in zip(envelopes[m], chosen[m].final(m), strict=True)] for m in MODELS]
    count = len(steps)
    found = verdict(joined[0], joined[1], joined[2], chance, (count, count, count), scale)
    return WorstCase(chosen["protected"], chosen["clean"], chosen["scratch"], steps, envelopes, found)


def _envelope(test: Sequence[Measured], validation: Sequence[Measured], steps: Sequence[int], model: str) -> Curves:
    """At each step the test values (by seed) of the attack that is best there on validation data. An attack that has
    no evaluation there counts with its last one before; one whose edits train first begins that much later."""
    columns = []
    for step in steps:
        at = [sum(s + m.lead(model) <= step for s in m.steps) - 1 for m in validation]
        able = [i for i in range(len(test)) if at[i] >= 0]
        best = max(able, key=lambda i: validation[i].mean(model)[at[i]])
        columns.append([curve[at[best]] for curve in getattr(test[best], model)])
    return [list(row) for row in zip(*columns, strict=True)]
