"""The attackers' searches of an audit: each model's own, then what one of them chose for all.

A search gives up tries that lag, goes on where its best lies at the edge, and draws at random: so a learning rate that
one model was measured at another may never have been, though it would have served it better. A comparison of bests is
one only if all have tried what any of them chose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from holdfast.attacks.attack import Attack
from holdfast.cells import Bench, CellSpec
from holdfast.progress import Reporter
from holdfast.records import LineFile, SearchRecord
from holdfast.search import SEED, Share, fitted, run_search, run_share
from holdfast.workers import run_all

Chosen = dict[tuple[str, str], dict[str, Any]]  # by model and attack


def plan_searches(attacks: Iterable[Attack]) -> list[CellSpec]:
    """One spec for each model and attack with something to search; attacks with one control share its search."""
    searched = [a for a in attacks if a.search]
    specs = [
        CellSpec(model, attack, (attack.name,), (False,), SEED)
        for attack in searched
        for model in ("protected", "clean")
    ]
    groups: dict[Attack, list[Attack]] = {}
    for attack in searched:
        groups.setdefault(attack.control(), []).append(attack)
    for control, group in groups.items():
        specs.append(CellSpec("scratch", control, tuple(a.name for a in group), (False,) * len(group), SEED))
    return specs


def run_searches(
    specs: Sequence[CellSpec],
    bench: Bench,
    file: LineFile[SearchRecord],
    reporter: Reporter,
    jobs: int | None = None,
    ray: str | None = None,
) -> Chosen:
    """Run the searches that `file` lacks; then have each model try, to the end, what the others' chose under attacks
    with the same control. Returns what was chosen, by (model, attack).

    Only what own searches chose is told of, so the same is told whoever was first, and after a kill."""
    known = file.read()
    done = {(s.model, n) for s in known for n in s.attacks}
    for spec in specs:
        there = [i for i, s in enumerate(known) if s.model == spec.model and not set(s.attacks).isdisjoint(spec.names)]
        if there and not all((spec.model, n) in done for n in spec.names):  # by a smaller battery, for some of them
            for i in there:
                known[i] = replace(known[i], attacks=list(spec.names))
            done |= {(spec.model, n) for n in spec.names}
    file.keep(known)  # also without a torn last line
    left = [s for s in specs if not all((s.model, n) in done for n in s.names)]
    if left:
        with reporter.bar("search", len(specs), len(specs) - len(left)) as bar:
            for found in run_all(run_search, bench, left, jobs, ray):
                file.append([found])
                known.append(found)
                bar.advance(f"{found.model} · {found.attacks[0]}: lr {found.chosen['lr']:g} of {len(found.trials)}")
    shares = plan_shares(specs, known)
    if shares:
        with reporter.bar("search: what others chose", len(shares)) as bar:
            for found in run_all(run_share, bench, shares, jobs, ray):
                file.append([found])
                known.append(found)
                bar.advance(f"{found.model} · {found.attacks[0]}: lr {found.chosen['lr']:g}")
    return {(s.model, n): s.chosen for s in merged(known) for n in s.attacks}


def plan_shares(specs: Sequence[CellSpec], known: Sequence[SearchRecord]) -> list[Share]:
    """Which settings each model's own search has not seen to its end of those that own searches chose for any attack
    with the same control; nothing where it was told of these, and of no others."""
    own = {(s.model, n): s for s in known if not s.shared for n in s.attacks}
    told = {(s.model, n): s for s in known if s.shared for n in s.attacks}
    shares = []
    for control in (s for s in specs if s.model == "scratch"):
        group = [s for s in specs if not set(s.names).isdisjoint(control.names)]
        pool = [own[s.model, s.names[0]].chosen for s in group]
        for spec in group:
            key = spec.model, spec.names[0]
            seen = [t["setting"] for t in own[key].trials if not t["pruned"]]
            wanted: list[dict[str, Any]] = []
            for setting in (fitted(p, spec.attack) for p in pool):
                if not any(_same(setting, s) for s in [*seen, *wanted]):
                    wanted.append(setting)
            done = [t["setting"] for t in told[key].trials] if key in told else []
            if len(done) < len(wanted) or not all(map(_same, wanted, done)):
                shares.append(Share(**vars(spec), before=own[key], settings=tuple(wanted)))
    return shares


def merged(known: Iterable[SearchRecord]) -> list[SearchRecord]:
    """One record a search: its own tries, and those that others' choices added, with what was chosen of all. Where a
    larger battery had more to tell, what the smaller one told is passed over."""
    found: dict[tuple[str, str], SearchRecord] = {}
    told: dict[tuple[str, str], SearchRecord] = {}
    for record in known:
        (told if record.shared else found)[record.model, record.attacks[0]] = record
    for key, record in told.items():
        own = found[key]
        costs = {n: getattr(own, n) + getattr(record, n) for n in ("steps", "samples", "flops", "seconds")}
        found[key] = replace(record, trials=own.trials + record.trials, shared=False, **costs)
    return list(found.values())


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two settings are one, but for the last digit of a rate."""
    rates = math.isclose(one["lr"], other["lr"], rel_tol=1e-9)
    return rates and {n: v for n, v in one.items() if n != "lr"} == {n: v for n, v in other.items() if n != "lr"}
