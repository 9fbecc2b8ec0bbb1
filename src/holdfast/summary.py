"""`summary.json`: what the records say, in numbers. Others build on its schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.audit import BENIGN, ORIGINAL
from holdfast.checks import Check, run_checks
from holdfast.errors import require
from holdfast.metrics import LEARNS, MARGIN, Verdict, area, cost_ratio, recovery, retention, scratch_learns, verdict
from holdfast.records import Record, curves
from holdfast.statistics import deviation, interval, mean, paired

SCHEMA = 1
Curves = list[list[float]]


@dataclass(frozen=True)
class Measured:
    """Curves (seeds, steps) of the three models under one attack, on one split."""

    name: str
    simulated: bool
    steps: list[int]
    protected: Curves
    clean: Curves
    scratch: Curves

    def mean(self, model: str) -> list[float]:
        """The mean over seeds at each step."""
        return [mean(column) for column in zip(*getattr(self, model), strict=True)]

    def deviation(self, model: str) -> list[float]:
        """The sample deviation over seeds at each step."""
        return [deviation(column) for column in zip(*getattr(self, model), strict=True)]

    def final(self, model: str) -> list[float]:
        """The last value of every seed."""
        return [curve[-1] for curve in getattr(self, model)]


def measured(records: Sequence[Record], split: str = "test") -> list[Measured]:
    """The attacks in the order in which they were planned. Raises `UserError` where cells are missing."""
    names = list(dict.fromkeys(r.attack for r in records if r.attack not in (ORIGINAL, BENIGN)))
    require(bool(names), "there are no records of an attack yet; run `holdfast audit` first")
    found = []
    for name in names:
        by_model = {m: curves(records, m, name, split) for m in ("protected", "clean", "scratch")}
        steps, seeds, _ = by_model["protected"]
        require(
            all(s == steps and n == seeds for s, n, _ in by_model.values()),
            f"the audit of '{name}' is unfinished; continue it with `holdfast audit … --resume`",
        )
        simulated = any(r.simulated for r in records if r.attack == name and r.model == "protected")
        found.append(Measured(name, simulated, steps, *(by_model[m][2] for m in ("protected", "clean", "scratch"))))
    return found


@dataclass(frozen=True)
class WorstCase:
    """The attack that each model's owner would choose on *validation* data, and what it gives on *test* data."""

    protected: Measured
    clean: Measured
    scratch: Measured
    verdict: Verdict


def worst_case(test: Sequence[Measured], validation: Sequence[Measured], chance: float) -> WorstCase:
    """The best on validation data for each model on its own: among the attacks whose final metric is within the
    margin of the best one (a difference that small is chance), the one that is best along the way."""

    def best(model: str) -> int:
        curves = [m.mean(model) for m in validation]
        top = max(c[-1] for c in curves)
        return max((i for i, c in enumerate(curves) if c[-1] >= top - MARGIN), key=lambda i: area(curves[i]))

    chosen = {m: test[best(m)] for m in ("protected", "clean", "scratch")}
    final = verdict(chosen["protected"].protected, chosen["clean"].clean, chosen["scratch"].scratch, chance)
    return WorstCase(chosen["protected"], chosen["clean"], chosen["scratch"], final)


def summarise(records: Sequence[Record], chance: float, cost: dict[str, float | None]) -> dict[str, Any]:
    """The contents of `summary.json`. `chance`: of a constant answer on the restricted test data; `cost`: the keys
    `protect_seconds`, `audit_seconds` and `peak_memory_mb`."""
    test, validation = measured(records, "test"), measured(records, "validation")
    worst = worst_case(test, validation, chance)
    attacks = [_attack_entry(m, chance) for m in test]
    # The strongest first: by what it gives the one who holds the protected weights.
    order = sorted(range(len(test)), key=lambda i: -mean(test[i].final("protected")))
    attacks = [attacks[i] for i in order]
    lead = next(i for i, a in enumerate(attacks) if a["name"] == worst.protected.name)
    attacks.insert(0, attacks.pop(lead))
    intact = intactness(records)
    diverged = [f"{r.attack} ({r.model})" for r in records if r.diverged]
    checks = run_checks(attacks, len(test[0].protected), chance, diverged, intact is not None)
    return {
        "schema": SCHEMA,
        "verdict": final_verdict(worst.verdict, checks),
        "intactness": intact,
        "restricted": {
            "metric": records[0].metric,
            "chance": chance,
            "worst": worst.protected.name,
            "worst_case": {
                model: {
                    "attack": found.name,
                    "final": mean(found.final(model)),
                    "deviation": deviation(found.final(model)),
                    "along_the_way": area(found.mean(model)),
                }
                for model, found in (
                    ("protected", worst.protected),
                    ("clean", worst.clean),
                    ("scratch", worst.scratch),
                )
            },
            "attacks": attacks,
        },
        "cost": cost,
        "checks": [c.as_dict() for c in checks],
    }


def final_verdict(found: Verdict, checks: Sequence[Check]) -> Verdict:
    """A failing check forbids *held*."""
    return "partial" if found == "held" and not all(c.passed for c in checks) else found


def intactness(records: Sequence[Record]) -> dict[str, Any] | None:
    """Original test metric before (clean) and after (protected), and their ratio; None where it was not measured."""
    values = {r.model: r for r in records if r.attack == ORIGINAL and r.split == "test"}
    if not {"clean", "protected"} <= values.keys():
        return None
    before, after = values["clean"].value, values["protected"].value
    return {
        "metric": values["clean"].metric,
        "before": before,
        "after": after,
        "ratio": retention(before, after),
    }


def _attack_entry(found: Measured, chance: float) -> dict[str, Any]:
    protected, clean, scratch = found.mean("protected"), found.mean("clean"), found.mean("scratch")
    difference = interval(paired(found.final("protected"), found.final("scratch")))
    return {
        "name": found.name,
        "simulated": found.simulated,
        "steps": found.steps,
        "protected": protected,
        "clean": clean,
        "scratch": scratch,
        "recovery": recovery(protected[-1], clean[-1], chance),
        "cost_ratio": cost_ratio(found.steps, protected, scratch, chance),
        "interval": list(difference) if difference else None,  # of protected − scratch at the end
        "deviation": {m: found.deviation(m) for m in ("protected", "clean", "scratch")},
        "scratch_learns": scratch_learns(found.steps, scratch, chance),
        "clean_ahead": area(clean) > area(scratch) + MARGIN,
        # An attack that does not train the clean model either shows nothing about a defence.
        "verdict": verdict(found.protected, found.clean, found.scratch, chance)
        if clean[-1] - chance >= LEARNS
        else "inconclusive",
    }
