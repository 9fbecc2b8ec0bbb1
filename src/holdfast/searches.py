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
    with the same control, until nobody has chosen what another has not tried. Returns what was chosen, by
    (model, attack)."""
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
    while (told := Shares(specs, known)).lacking:
        with reporter.bar("search: what others chose", len(told.lacking)) as bar:
            for found in run_all(run_share, bench, told.lacking, jobs, ray):
                file.append([found])
                known.append(found)
                bar.advance(f"{found.model} · {found.attacks[0]}: lr {found.chosen['lr']:g}")
    file.keep(told.records)
    return {key: s.chosen for key, s in told.now.items()}


class Shares:
    """How far the telling has come. `lacking`: which settings each model has not yet seen to its end of those that were
    chosen for any attack with the same control; empty where none is left. `records`: all that count, in order; others
    were told by a smaller battery, which had less to tell. `now`: each search with what it was told, by model and
    attack.

    In rounds, of what was chosen before each: so the same is told whoever was first, after a kill, and by a larger
    battery.
    """

    def __init__(self, specs: Sequence[CellSpec], known: Sequence[SearchRecord]) -> None:
        self.records = [s for s in known if not s.before]
        self.lacking: list[Share] = []
        self.now = {(s.model, n): s for s in self.records for n in s.attacks}
        for control in (s for s in specs if s.model == "scratch"):
            group = [s for s in specs if not set(s.names).isdisjoint(control.names)]
            while shares := self._round(group):
                found = [next((r for r in known if r.before and s.is_told(r)), None) for s in shares]
                self.lacking += [s for s, r in zip(shares, found, strict=True) if r is None]
                if None in found:
                    break
                for record in found:
                    if record is not None:
                        self.records.append(record)
                        self.now.update(
                            {(record.model, n): _joined(self.now[record.model, n], record) for n in record.attacks}
                        )

    def _round(self, group: Sequence[CellSpec]) -> list[Share]:
        shares = []
        pool = [(s.attack, self.now[s.model, s.names[0]].chosen) for s in group]
        for spec in group:
            before = self.now[spec.model, spec.names[0]]
            seen = [t["setting"] for t in before.trials if not t["pruned"]]
            wanted: list[dict[str, Any]] = []
            for setting in (fitted(chosen, chooser, spec.attack) for chooser, chosen in pool):
                if not any(_same(setting, s) for s in [*seen, *wanted]):
                    wanted.append(setting)
            if wanted:
                shares.append(Share(**vars(spec), before=before, told=tuple(wanted)))
        return shares


def merged(known: Iterable[SearchRecord]) -> list[SearchRecord]:
    """One record a search, of those of a finished audit: its own tries, and those that others' choices added, with what
    was chosen of all."""
    found: dict[tuple[str, str], SearchRecord] = {}
    for record in known:
        key = (record.model, record.attacks[0])
        found[key] = _joined(found[key], record) if record.before else record
    return list(found.values())


def _joined(own: SearchRecord, told: SearchRecord) -> SearchRecord:
    costs = {n: getattr(own, n) + getattr(told, n) for n in ("steps", "samples", "flops", "seconds")}
    return replace(told, trials=own.trials + told.trials, told=[], before="", **costs)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two settings are one, but for the last digit of a rate."""
    rates = math.isclose(one["lr"], other["lr"], rel_tol=1e-9)
    return rates and {n: v for n, v in one.items() if n != "lr"} == {n: v for n, v in other.items() if n != "lr"}
