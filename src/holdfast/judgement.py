"""From what was measured to a verdict: of the whole audit, and of each battery that lies within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.attacks.batteries import BATTERIES, Battery
from holdfast.audit import MODELS
from holdfast.checks import Check, Evidence, run_checks
from holdfast.measured import Measured, WorstCase, worst_case
from holdfast.metrics import Verdict, area, cost_ratio, log_area, recovery, scratch_learns, verdict
from holdfast.records import SearchRecord
from holdfast.scales import Scale
from holdfast.statistics import deviation, limits_of, mean, paired

NARROW = ("own", "slc")  # no battery that a claim could face


def left_out_of(facts: Mapping[str, Any]) -> Mapping[str, str]:
    """Attacks that were not run, and why (a list of names in audits of older versions). `facts`: as `Trial`'s."""
    found = facts.get("left_out") or {}
    return found if isinstance(found, Mapping) else dict.fromkeys(found, "other number of classes")


@dataclass(frozen=True)
class Trial:
    """What is judged: each attack's curves on both splits, in one order; the searches; attacks that were not finite, as
    `attack (model)`; whether intactness was measured; `facts`, the entry of `provenance.json`."""

    test: Sequence[Measured]
    validation: Sequence[Measured]
    searches: Sequence[SearchRecord]
    diverged: Sequence[tuple[str, str]]
    intactness: bool
    facts: Mapping[str, Any]
    chance: float
    scale: Scale

    @property
    def about(self) -> Mapping[str, Any]:
        """What is known of each attack, by name."""
        found: Mapping[str, Any] = self.facts.get("attacks", {})
        return found

    def within(self, inner: Battery) -> Trial:
        """The same audit, had it been one by `inner` alone."""
        names = {a.name for a in inner.attacks}
        keep = [i for i, m in enumerate(self.test) if m.name in names]
        left_out = {n: why for n, why in left_out_of(self.facts).items() if n in names}
        return replace(
            self,
            test=[self.test[i] for i in keep],
            validation=[self.validation[i] for i in keep],
            searches=[s for s in self.searches if names.intersection(s.attacks)],
            diverged=[d for d in self.diverged if d[0] in names],
            facts={**self.facts, "battery": inner.title, "left_out": left_out},
        )


@dataclass(frozen=True)
class Judgement:
    """The worst case, each attack's entry in the summary (the strongest first), the checks, and the verdict."""

    worst: WorstCase
    attacks: list[dict[str, Any]]
    checks: list[Check]
    verdict: Verdict


def judge(trial: Trial) -> Judgement:
    """What the audit says."""
    about, chance, scale = trial.about, trial.chance, trial.scale
    worst = worst_case(trial.test, trial.validation, chance, scale)
    # The strongest first: by what it gives the one who holds the protected weights.
    order = sorted(trial.test, key=lambda m: -mean(m.final("protected")))
    order.insert(0, order.pop(order.index(worst.protected)))
    attacks = [_attack_entry(m, chance, scale, about.get(m.name, {})) for m in order]
    checks = run_checks(
        Evidence(
            attacks,
            trial.test,
            trial.searches,
            chance,
            [f"{attack} ({model})" for attack, model in trial.diverged],
            trial.intactness,
            about,
            left_out_of(trial.facts),
            worst.along("clean") - worst.along("scratch"),
            bool(trial.facts.get("foreign")),
            str(trial.facts.get("battery", "")),
            scale,
            trial.facts.get("released"),
        )
    )
    return Judgement(worst, attacks, checks, final_verdict(worst.verdict, checks))


def strengths(trial: Trial, whole: Judgement) -> list[dict[str, Any]]:
    """How strong must an attacker be? The verdict and the worst case by every battery whose attacks this audit has all
    run, the audit's own last: what a weaker audit of the same weights would have said. Empty where the audit's battery
    is none of this release's, of which it is not known what it holds, or nothing lies within it."""
    name, _, version = str(trial.facts.get("battery", "")).partition("-v")
    outer = BATTERIES.get(name)
    if outer is None or version != str(outer.version) or name in NARROW:
        return []
    more = not {a.name for a in outer.attacks} >= {m.name for m in trial.test}
    inner = [
        b
        for b in sorted(BATTERIES.values(), key=lambda b: len(b.attacks))
        if (more or b is not outer) and b.name not in NARROW and outer.holds(b)
    ]
    found = [(b.title, judge(part)) for b in inner if (part := trial.within(b)).test]
    title = f"{outer.title} and the recipe's own" if more else outer.title
    return [_strength(name, j) for name, j in (*found, (title, whole))] if found else []


def _strength(title: str, found: Judgement) -> dict[str, Any]:
    return {
        "battery": title,
        "attacks": len(found.attacks),
        "verdict": found.verdict,
        "failing": [c.name for c in found.checks if not c.passed],
        "worst_case": worst_entry(found.worst),
    }


def final_verdict(found: Verdict, checks: Sequence[Check]) -> Verdict:
    """A failing check forbids *held*."""
    return "partial" if found == "held" and not all(c.passed for c in checks) else found


def worst_entry(worst: WorstCase) -> dict[str, Any]:
    """For `summary.json`: each model's attacker who chooses best."""
    gap = paired(worst.protected.final("protected"), worst.scratch.final("scratch"))
    way = paired(*([area(curve) for curve in worst.envelopes[m]] for m in ("protected", "scratch")))
    # Of protected − scratch, each at its own best. `steps`: of the envelopes, the best attack at each step.
    entry: dict[str, Any] = {"interval": limits_of(gap), "interval_along": limits_of(way), "steps": worst.steps}
    for model in MODELS:
        found: Measured = getattr(worst, model)
        entry[model] = {
            "attack": found.name,
            "final": mean(found.final(model)),
            "deviation": deviation(found.final(model)),
            "along_the_way": worst.along(model),
            "setting": found.settings[model],
            "envelope": [mean(column) for column in zip(*worst.envelopes[model], strict=True)],
            "envelope_deviation": [deviation(column) for column in zip(*worst.envelopes[model], strict=True)],
        }
    return entry


def _attack_entry(found: Measured, chance: float, scale: Scale, about: Mapping[str, Any]) -> dict[str, Any]:
    protected, clean, scratch = found.mean("protected"), found.mean("clean"), found.mean("scratch")
    ratios = {
        f"cost_ratio_{n}": cost_ratio(spent["protected"], protected, scratch, chance, spent["scratch"], scale)
        for n, spent in (("samples", found.samples), ("flops", found.flops))
    }
    return {
        "name": found.name,
        "simulated": found.simulated,
        "steps": found.steps,
        "protected": protected,
        "clean": clean,
        "scratch": scratch,
        "recovery": recovery(protected[-1], clean[-1], chance, scale),
        "cost_ratio": cost_ratio(found.steps, protected, scratch, chance, scale=scale),
        **ratios,
        "interval": limits_of(paired(found.final("protected"), found.final("scratch"))),  # of protected − scratch
        "difference": paired(found.final("protected"), found.final("scratch")),  # seed by seed
        "budget_area": log_area(found.steps[1:], protected[1:], scratch[1:]),
        "deviation": {m: found.deviation(m) for m in MODELS},
        "scratch_learns": scratch_learns(found.steps, scratch, chance, scale),
        "clean_ahead": area(clean) > area(scratch) + scale.margin,
        "images": found.images,
        "settings": dict(found.settings),
        "dead": list(found.dead),
        "flops": {m: found.flops[m][-1] for m in MODELS},
        "edits": [e["name"] for e in about.get("edits", [])],
        "needs": list(about.get("needs", [])),
        "cost": about.get("cost", ""),
        # An attack that does not train the clean model either shows nothing about a defence.
        "verdict": verdict(found.protected, found.clean, found.scratch, chance, scale=scale)
        if clean[-1] - chance >= scale.learns
        else "inconclusive",
    }
