"""`summary.json`: what the records say, in numbers. Others build on its schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.audit import BENIGN, MODELS
from holdfast.intactness import intactness
from holdfast.judgement import Trial, judge, strengths, worst_entry
from holdfast.limits import limits
from holdfast.measured import Measured, measured, one_attack
from holdfast.metrics import area, log_area
from holdfast.records import Record, SearchRecord
from holdfast.scales import ACCURACY, scale_of
from holdfast.statistics import deviation, limits_of, mean, paired, spread

SCHEMA = 1


def summarise(
    records: Sequence[Record],
    chance: float,
    cost: dict[str, float | None],
    searches: Sequence[SearchRecord] = (),
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of `summary.json`. `chance`: of a constant answer on the restricted test data; `cost`: the keys
    `protect_seconds`, `audit_seconds` and `peak_memory_mb`; `facts`: the entry of `provenance.json`, for what is known
    of each attack, of those left out, and of the third domain."""
    facts, scale = facts or {}, scale_of(records[0].metric)
    about = facts.get("attacks", {})
    test, validation = (measured(records, split, about) for split in ("test", "validation"))
    intact = intactness(records)
    diverged = [(r.attack, r.model) for r in records if r.diverged]
    trial = Trial(test, validation, searches, diverged, intact is not None, facts, chance, scale)
    found = judge(trial)
    series = slc(test, about)
    return {
        "schema": SCHEMA,
        "verdict": found.verdict,
        "intactness": intact,
        "restricted": {
            "metric": records[0].metric,
            "chance": chance,
            "worst": found.worst.protected.name,
            "worst_case": worst_entry(found.worst),
            "strengths": strengths(trial, found),
            "undone": undone(test, about, scale.margin),
            "shuffled": shuffled(test, validation, about),
            "slc": series[0] if series else None,
            "slc_others": series[1:],
            "attacks": found.attacks,
        },
        "limits": limits(records),
        "benign": benign(records, (facts.get("benign") or {}).get("chance")),
        "search": search_cost(searches),
        "cost": cost,
        "checks": [c.as_dict() for c in found.checks],
    }


def undone(
    test: Sequence[Measured], about: Mapping[str, Mapping[str, Any]], margin: float = ACCURACY.margin
) -> dict[str, Any] | None:
    """The edit that undoes the defence: of the attacks that are within the margin of the best against the protected
    model, the edited one that gains most over the same fine-tuning without edits; None where none gains as much.

    At the end, or else along the way: weights that only slow an attacker down are undone by what makes it quick. What
    the same edit gives the clean model is taken off: an edit that helps everyone undoes nothing.
    """

    def strength(m: Measured, model: str, which: int) -> float:
        curve = m.mean(model)
        return area(curve) if which else curve[-1]

    pairs = [(m, plain) for m in test for plain in test if _twins(about.get(m.name), about.get(plain.name))]
    for which in (0, 1):
        top = max(strength(m, "protected", which) for m in test)
        gains = [
            (
                strength(m, "protected", which)
                - strength(plain, "protected", which)
                - max(0.0, strength(m, "clean", which) - strength(plain, "clean", which)),
                m,
                plain,
            )
            for m, plain in pairs
            if strength(m, "protected", which) >= top - margin
        ]
        gain, best, without = max(gains, key=lambda g: g[0], default=(0.0, None, None))
        if best is not None and without is not None and gain > margin:
            return {
                "attack": best.name,
                "edits": [e["name"] for e in about[best.name]["edits"]],
                "without": without.name,
                "gain": gain,
                "measured": ("at the end", "along the way")[which],
                **{model: strength(best, model, which) for model in ("protected", "scratch")},
            }
    return None


def shuffled(
    test: Sequence[Measured], validation: Sequence[Measured], about: Mapping[str, Mapping[str, Any]]
) -> dict[str, float] | None:
    """How far weights of which nothing but the scales is left (the edit `shuffle`) are ahead of those from scratch
    along the way, clean and protected: a lead that is no knowledge. Of the attacks that shuffle each model takes the
    one that is best on validation data, scratch too: others may bring what these do not, such as images. None where no
    attack shuffles."""
    own = [i for i, m in enumerate(test) if _shuffles(about.get(m.name, {}))]
    if not own:
        return None

    def best(model: str) -> float:
        return area(test[max(own, key=lambda i: area(validation[i].mean(model)))].mean(model))

    return {model: best(model) - best("scratch") for model in ("clean", "protected")}


def _shuffles(known: Mapping[str, Any]) -> bool:
    return [e["name"] for e in known.get("edits", [])] == ["shuffle"]


def _twins(edited: Mapping[str, Any] | None, plain: Mapping[str, Any] | None) -> bool:
    """Whether the second attack is the first without its edits. Who shuffles undoes nothing: he starts anew."""
    if not edited or not plain or not edited["edits"] or plain.get("may_edit", plain["edits"]) or _shuffles(edited):
        return False
    same = ("tuning", "searched", "fraction")
    return all(edited[n] == plain[n] for n in same)


def slc(test: Sequence[Measured], about: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """SLC-AUC: accuracy over ln of the fraction of the adversary's data, area between a model and scratch, with the
    t-interval over seeds. One entry for every attack that was run with several fractions, that with the most first."""
    series: dict[str, dict[int, Measured]] = {}
    planned = {name: place for place, name in enumerate(about)}
    for m in sorted((m for m in test if m.name in about), key=lambda m: planned[m.name]):
        known = about[m.name]
        if known:
            series.setdefault(str((known["tuning"], known["edits"], known["searched"])), {})[m.images] = m
    several = [s for s in series.values() if len(s) > 1]
    return [_slc([s[images] for images in sorted(s)]) for s in sorted(several, key=len, reverse=True)]


def _slc(ordered: Sequence[Measured]) -> dict[str, Any]:
    fractions = [m.images / ordered[-1].images for m in ordered]

    def areas(model: str) -> list[float]:
        seeds = range(len(ordered[0].protected))
        return [
            log_area(fractions, [m.final(model)[s] for m in ordered], [m.final("scratch")[s] for m in ordered])
            for s in seeds
        ]

    return {
        "attack": ordered[-1].name,
        "fractions": fractions,
        "images": [m.images for m in ordered],
        **{model: [mean(m.final(model)) for m in ordered] for model in MODELS},
        "deviation": {model: [deviation(m.final(model)) for m in ordered] for model in MODELS},
        "auc": {m: {"mean": mean(areas(m)), "interval": limits_of(areas(m))} for m in ("protected", "clean")},
    }


def benign(records: Sequence[Record], chance: float | None) -> dict[str, Any] | None:
    """Fine-tuning to a harmless third domain: protected against clean; None where none was run. `kept`: the protected
    model is as trainable there, that is, no more than the margin behind at the end and along the way."""
    if not any(r.attack == BENIGN for r in records):
        return None
    found, margin = one_attack(records, BENIGN), scale_of(records[0].metric).margin
    gap = paired(found.final("protected"), found.final("clean"))
    way = area(found.mean("protected")) - area(found.mean("clean"))
    return {
        "chance": chance,
        "steps": found.steps,
        **{m: found.mean(m) for m in MODELS},
        "deviation": {m: found.deviation(m) for m in MODELS},
        "difference": mean(gap),
        "interval": limits_of(gap),
        "along_the_way": way,
        "kept": mean(gap) >= -margin and way >= -margin,
    }


def search_cost(searches: Sequence[SearchRecord]) -> dict[str, Any]:
    """What the attackers' searches cost, by model: tries, those given up, steps, samples, FLOPs, seconds."""
    return {
        model: {
            "tries": sum(len(s.trials) for s in own),
            "given_up": sum(t["pruned"] for s in own for t in s.trials),
            **{n: sum(getattr(s, n) for s in own) for n in ("steps", "samples", "flops", "seconds")},
        }
        for model in MODELS
        if (own := [s for s in searches if s.model == model])
    }


def standing(summaries: Sequence[Mapping[str, Any]], model: str = "protected") -> dict[str, Any]:
    """Where a model stands: `ratio`, its intactness (1 for the clean one), and `end` and `along`, how far its
    worst case is ahead of scratch's, each with the sample deviation over protections (None for one)."""

    def ahead(key: str) -> list[float]:
        worst = [s["restricted"]["worst_case"] for s in summaries]
        return [w[model][key] - w["scratch"][key] for w in worst]

    ratios = [s["intactness"]["ratio"] if model == "protected" else 1.0 for s in summaries]
    return {n: spread(v) for n, v in (("ratio", ratios), ("end", ahead("final")), ("along", ahead("along_the_way")))}
