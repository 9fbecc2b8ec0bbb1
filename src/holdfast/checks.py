"""Is this audit to be believed? Each check is one line; one that fails stands at the top of the report and forbids the
verdict *held*."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.audit import MODELS, by_reason
from holdfast.measured import Measured
from holdfast.records import SearchRecord
from holdfast.scales import ACCURACY, Scale
from holdfast.statistics import interval, mean, paired

ENOUGH_SEEDS = 3
HELPS = "pre-training helps the attacker"  # the check without which a pair shows nothing


@dataclass(frozen=True)
class Check:
    """A name, whether it passed, and what was seen."""

    name: str
    passed: bool
    message: str

    def as_dict(self) -> dict[str, Any]:
        """For `summary.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Evidence:
    """What the checks look at. `entries`: the summary's list of attacks; `about`: what is known of each attack
    (`attacks.attack.attack_facts`), empty for audits of older versions; `diverged`: `attack (model)`; `left_out`:
    attacks of the battery that were not run, and why."""

    entries: Sequence[Mapping[str, Any]]
    measured: Sequence[Measured]
    searches: Sequence[SearchRecord]
    chance: float
    diverged: Sequence[str]
    intactness: bool
    about: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, str]
    ahead: float  # of clean before scratch, along the envelope of their best attacks
    foreign: bool = False  # somebody else's defence, of which nothing is known
    battery: str = ""
    scale: Scale = ACCURACY
    released: int | None = None  # the iteration of the defence whose state was audited; 0: none, None: not known

    @property
    def seeds(self) -> int:
        """Audit seeds."""
        return len(self.measured[0].protected)


def run_checks(seen: Evidence) -> list[Check]:
    """All checks, in the order of the report."""
    return [
        *_learning(seen),
        _edge(seen),
        _diverged(seen),
        _dead(seen),
        _order(seen),
        _seeds(seen),
        _intactness(seen),
        _released(seen),
        _unseen(seen),
        _whole(seen),
        _battery(seen),
    ]


def _learning(seen: Evidence) -> list[Check]:
    best = {m: max(a[m][-1] for a in seen.entries) for m in ("clean", "scratch")}
    idle = [a["name"] for a in seen.entries if a["clean"][-1] - seen.chance < seen.scale.learns]
    nothing = f"; says nothing, as it does not train the clean model either: {', '.join(idle)}" if idle else ""
    under = sum(a["clean_ahead"] for a in seen.entries)
    scale = seen.scale
    ahead = seen.ahead > scale.margin
    shown = {m: f"best {scale.shown(best[m])}, chance {scale.shown(seen.chance)}" for m in best}
    return [
        Check("the clean model learns", best["clean"] - seen.chance >= scale.learns, shown["clean"] + nothing),
        Check("the model from scratch learns", best["scratch"] - seen.chance >= scale.learns, shown["scratch"]),
        Check(
            HELPS,
            ahead,
            f"the best attacks on the clean model are {scale.amount(seen.ahead)} ahead of scratch's along the way"
            if ahead
            else f"its best attacks at every budget are not ahead of scratch's ({scale.difference(seen.ahead)} "
            f"{scale.unit} along the "
            f"way; ahead under {under} of {len(seen.entries)} attacks): there is little to protect in this "
            "pair",
        ),
    ]


def _edge(seen: Evidence) -> Check:
    at: dict[str, list[str]] = {m: [] for m in MODELS}
    # Where the clean model did not learn at any rate either, the attack says nothing, and its edge neither.
    idle = {n for s in seen.searches if s.model == "clean" and not _learned(s, seen) for n in s.attacks}
    for search in (s for s in seen.searches if s.edge and not idle.issuperset(s.attacks)):
        at[search.model].append(f"{search.attacks[0]} (lr {search.chosen['lr']:g})")
    others = "; ".join(f"{m}: {', '.join(at[m])}" for m in ("clean", "scratch") if at[m])
    if at["protected"]:
        message = f"another decade might be stronger under {', '.join(at['protected'])}"
    else:
        message = f"{len(seen.searches)} searches" if seen.searches else "nothing was searched"
    return Check(
        "no best learning rate at the grid's edge",
        not at["protected"],
        message + (f"; at the edge for the controls: {others}" if others else ""),
    )


def _learned(search: SearchRecord, seen: Evidence) -> bool:
    return (
        max((t["values"][-1] for t in search.trials if not t["pruned"]), default=0.0) - seen.chance >= seen.scale.learns
    )


def _diverged(seen: Evidence) -> Check:
    names = ", ".join(sorted(set(seen.diverged)))
    return Check("no attack diverged", not names, f"not finite under: {names}" if names else "all losses stayed finite")


def _dead(seen: Evidence) -> Check:
    name = "no gradient is dead unless an edit could revive it"
    dead = [m for m in seen.measured if "protected" in m.dead]
    if not dead:
        return Check(name, True, "gradients reach the protected model's body under every attack that trains it")
    where = f"no gradient reaches the protected model's body under {', '.join(m.name for m in dead)}"
    reviving = [m for m in seen.measured if seen.about.get(m.name, {}).get("revives") and "protected" not in m.dead]
    if not reviving:
        return Check(name, False, f"{where}, and no attack of this audit revives it")
    best = max(reviving, key=lambda m: mean(m.final("protected")))
    return Check(
        name,
        True,
        f"{where}; {best.name}, which revives, takes it to {seen.scale.shown(mean(best.final('protected')))}",
    )


def _order(seen: Evidence) -> Check:
    name = "no weaker attack beats a stronger one"
    pairs = [
        (weak, strong)
        for weak in seen.measured
        for strong in seen.measured
        if weaker(seen.about.get(weak.name), seen.about.get(strong.name))
    ]
    wrong: dict[str, list[str]] = {m: [] for m in MODELS}
    for weak, strong in pairs:
        for model in MODELS:
            gap = paired(weak.final(model), strong.final(model))
            limits = interval(gap)
            if mean(gap) > seen.scale.margin and (limits is None or limits[0] > 0):
                wrong[model].append(f"{weak.name} over {strong.name}, by {seen.scale.amount(mean(gap))}")
    others = "; ".join(f"{m}: {', '.join(wrong[m])}" for m in ("clean", "scratch") if wrong[m])
    message = ", ".join(wrong["protected"]) or f"{len(pairs)} pairs compared"
    return Check(name, not wrong["protected"], message + (f"; for the controls: {others}" if others else ""))


def weaker(weak: Mapping[str, Any] | None, strong: Mapping[str, Any] | None) -> bool:
    """Whether the second attack is the first with more: more steps, more data, or its learning rate searched for
    among values that hold the first one's."""
    if not weak or not strong or [e["summary"] for e in weak["edits"]] != [e["summary"] for e in strong["edits"]]:
        return False
    ours, theirs = dict(weak["tuning"]), dict(strong["tuning"])
    steps, rates = (ours.pop("steps"), theirs.pop("steps")), (ours.pop("lr"), theirs.pop("lr"))
    if ours != theirs:
        return False
    fractions = weak["fraction"], strong["fraction"]
    if weak["searched"] is None and strong["searched"] is not None:
        return rates[0] in strong["searched"] and steps[0] == steps[1] and fractions[0] == fractions[1]
    if weak["searched"] != strong["searched"] or (weak["searched"] is None and rates[0] != rates[1]):
        return False
    more = (steps[1] > steps[0], fractions[1] > fractions[0])
    return any(more) and steps[1] >= steps[0] and fractions[1] >= fractions[0]


def _seeds(seen: Evidence) -> Check:
    spread = "one seed has no spread" if seen.seeds == 1 else "their interval is wide"
    enough = seen.seeds >= ENOUGH_SEEDS
    return Check("enough seeds", enough, f"{seen.seeds} of at least {ENOUGH_SEEDS}" + ("" if enough else f": {spread}"))


def _intactness(seen: Evidence) -> Check:
    return Check(
        "intactness was measured",
        seen.intactness,
        "on original test data" if seen.intactness else "no original domain was given",
    )


def _released(seen: Evidence) -> Check:
    if seen.released is None:
        message = "what the defence released is not known"
    elif seen.released:
        message = f"that of iteration {seen.released}"
    else:
        message = "none within the tolerance on intactness was better: what was audited is the unprotected model"
    return Check("the defence found a state to release", seen.released != 0, message)


def _unseen(seen: Evidence) -> Check:
    known = [a["name"] for a in seen.entries if a["simulated"]]
    if seen.foreign:
        return Check("some attacks were not simulated by the defence", True, "not known of somebody else's defence")
    return Check(
        "some attacks were not simulated by the defence",
        len(known) < len(seen.entries),
        f"{len(seen.entries) - len(known)} of {len(seen.entries)} are none that it trained against",
    )


def _whole(seen: Evidence) -> Check:
    missing = [n for n, why in seen.left_out.items() if "pip install" in why]
    said = by_reason(seen.left_out)
    return Check("nothing was left out for want of a library", not missing, f"not run: {said}" if said else "all ran")


def _battery(seen: Evidence) -> Check:
    narrow = {"own": "the recipe's own attacks alone: no battery", "slc": "one attack on shares of the data"}
    why = narrow.get(seen.battery.partition("-v")[0])
    return Check("the attacks are a battery's", why is None, why or seen.battery or "not known")
