"""Numbers as people read them, and the conclusion in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.audit import PAPER_DEFAULT, by_reason
from holdfast.checks import HELPS
from holdfast.scales import Scale, scale_of
from holdfast.statistics import mean
from holdfast.summary import standing

EXPLAINED = {
    "held": "In the worst case the protected weights bring the attacker no more than training from scratch.",
    "partial": "The protected weights bring the attacker less than the unprotected ones, if only a delay; that they "
    "bring no more than training from scratch is not shown.",
    "failed": "In the worst case the protected weights serve the attacker as well as the unprotected ones.",
}


def percent(value: float | None, digits: int = 1) -> str:
    """`0.873` → `87.3 %`."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def ratio(value: float | None) -> str:
    """A cost ratio; `not reached` where the budget was too small."""
    return "not reached" if value is None else f"{value:.2f}"


INTACT = 0.9  # below this share of its original metric a model counts as spoilt, whatever its protection


def cost(attack: dict[str, Any]) -> str:
    """The cost ratio of an attack, or why there is none."""
    return ratio(attack["cost_ratio"]) if attack["scratch_learns"] else "scratch does not learn by it"


def headlines(summary: dict[str, Any]) -> list[str]:
    """Verdict and headline figures, for a terminal."""
    restricted, intact = summary["restricted"], summary["intactness"]
    scale = scale_of(restricted["metric"])
    worst, lead = restricted["worst_case"], restricted["attacks"][0]
    failing = [c["name"] for c in summary["checks"] if not c["passed"]]
    kept = (
        f"{intact['ratio']:.3f} ({scale.shown(intact['before'])} → {scale.shown(intact['after'])})"
        if intact
        else "not measured"
    )
    return [
        f"verdict      {summary['verdict']}" + (f"   (checks that fail: {', '.join(failing)})" if failing else ""),
        f"intactness   {kept}",
        f"worst case   protected {scale.shown(worst['protected']['final'])}, clean "
        f"{scale.shown(worst['clean']['final'])}, from scratch {scale.shown(worst['scratch']['final'])}, each at its "
        f"best; protected under {restricted['worst']}",
        f"cost ratio   {cost(lead)}   (under {lead['name']}: steps to reach from-scratch {scale.name} ÷ from scratch's "
        "own)",
    ]


def conclusion(summary: dict[str, Any]) -> list[str]:
    """What the audit found, one sentence a finding: the worst case, the default attack, stronger attacks."""
    restricted = summary["restricted"]
    scale = scale_of(restricted["metric"])
    worst = restricted["worst_case"]
    attacks = {a["name"]: a for a in restricted["attacks"]}
    said = [
        _explain(summary),
        *_released(summary),
        *_intactness(summary["intactness"], scale),
        *_standing(summary, scale),
        *_weakened(summary.get("protection", {})),
        *_scales(restricted.get("shuffled"), scale),
        f"The attack that validation data choose, {worst['protected']['attack']}, takes the protected model to "
        f"{scale.shown(worst['protected']['final'])} on test data; their own choices take the clean model to "
        f"{scale.shown(worst['clean']['final'])}, a model from scratch to {scale.shown(worst['scratch']['final'])} "
        f"(chance {scale.shown(restricted['chance'])}).",
    ]
    said += _weaker(restricted.get("strengths"), summary["verdict"])
    said += _undone(restricted["undone"], scale)
    default = attacks.get(PAPER_DEFAULT)
    if default:
        below = default["protected"][-1] < min(default["clean"][-1], default["scratch"][-1])
        said.append(
            f"Under the paper's default attack ({PAPER_DEFAULT}) it reaches {scale.shown(default['protected'][-1])} "
            f"against {scale.shown(default['clean'][-1])} clean and {scale.shown(default['scratch'][-1])} from "
            f"scratch: {'worse than both controls' if below else 'not worse than both controls'}."
        )
        stronger = [
            a["name"] for a in attacks.values() if a["protected"][-1] > default["protected"][-1] + 2.5 * scale.margin
        ]
        if stronger:
            said.append(
                f"Resisting that attack alone shows little: {len(stronger)} of the {len(attacks) - 1} other attacks do "
                f"more than {scale.amount(2.5 * scale.margin)} better ({_some(stronger)})."
            )
    telling = [a for a in attacks.values() if a["verdict"] != "inconclusive"]
    beaten = [a["name"] for a in telling if a["verdict"] != "held"]
    said.append(
        f"Taken one by one, {len(telling) - len(beaten)} of {len(telling)} attacks that train the clean model are held"
        + (f"; not held: {_some(beaten)}." if beaten else ".")
    )
    return said + _benign(summary["benign"], scale)


def _weaker(found: Sequence[Mapping[str, Any]] | None, verdict: str) -> list[str]:
    """Where a weaker audit would have said something else of the same weights."""
    other = [f"{s['battery']} alone says {s['verdict']}" for s in found or () if s["verdict"] != verdict]
    return [f"A weaker audit would have judged the same weights otherwise: {', '.join(other)}."] if other else []


def _attacks(count: int) -> str:
    return "1 attack reaches" if count == 1 else f"{count} attacks reach"


def _some(names: Sequence[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _undone(found: dict[str, Any] | None, scale: Scale) -> list[str]:
    if found is None:
        return []
    edits = " and ".join(found["edits"])
    return [
        f"What undoes it: {edits}. {found['attack']} does {scale.amount(found['gain'])} better {found['measured']} "
        f"than the same without ({found['without']}), beyond what that gives the clean model: "
        f"{scale.shown(found['protected'])}, where it takes a model from scratch to {scale.shown(found['scratch'])}."
    ]


def _benign(found: dict[str, Any] | None, scale: Scale) -> list[str]:
    if found is None:
        return []
    says = "stays as trainable" if found["kept"] else "is harder to train"
    return [
        f"For a harmless third domain the protected model {says}: {scale.shown(found['protected'][-1])} "
        f"against {scale.shown(found['clean'][-1])} of the clean model ({scale.shown(found['scratch'][-1])} from "
        "scratch)."
    ]


def weaknesses(summary: dict[str, Any], left_out: Mapping[str, str], battery: str) -> list[str]:
    """What would break this: attacks that beat scratch, more steps, more data, and what was not tried."""
    restricted = summary["restricted"]
    scale = scale_of(restricted["metric"])
    ahead = [a for a in restricted["attacks"] if a["interval"] and a["interval"][0] > 0]
    said = []
    for attack in ahead[:5]:
        gap = sum(attack["difference"]) / len(attack["difference"])
        needs = ", ".join(attack["needs"]) or "weights only"
        cost = f" ({attack['cost']})" if attack["cost"] else ""
        said.append(f"{attack['name']}: {scale.amount(gap)} better than scratch, needs {needs}{cost}.")
    if len(ahead) > 5:
        said.append(f"{len(ahead) - 5} more end above scratch beyond chance.")
    if not ahead and not any(a["interval"] for a in restricted["attacks"]):
        best = max(restricted["attacks"], key=lambda a: a["difference"][0])
        said.append(
            f"One seed has no spread: whether an attack is above scratch beyond chance, this audit cannot tell. The "
            f"furthest ahead at the end is {best['name']}: {scale.difference(best['difference'][0])} {scale.unit}."
        )
    elif not ahead:
        worst = restricted["worst_case"]
        level = worst["clean"]["final"] <= worst["scratch"]["final"] + scale.margin
        said.append(
            "In the end no attack is above scratch beyond chance"
            + ("; nor is the clean model: what its weights save here is steps, if anything." if level else ".")
        )
    sooner = sorted(
        (a for a in restricted["attacks"] if a["cost_ratio"] is not None and a["cost_ratio"] < 1),
        key=lambda a: a["cost_ratio"],
    )
    if sooner:
        fastest = ", ".join(f"{a['name']} ({a['cost_ratio']:.2f})" for a in sooner[:3])
        said.append(f"{_attacks(len(sooner))} scratch's level in fewer steps than scratch: {fastest}.")
    said += _more_data([s for s in (restricted["slc"], *restricted["slc_others"]) if s])
    if left_out:
        said.append(f"Not tried, as it could not be: {by_reason(left_out)}.")
    untried = "" if battery.startswith("adaptive") else " The battery adaptive adds an attacker who knows the defence."
    last = max(a["steps"][-1] for a in restricted["attacks"])
    said.append(f"Longer than {last} steps, and with more images than here, nobody has tried.{untried}")
    return said


def _more_data(series: Sequence[dict[str, Any]]) -> list[str]:
    """SLC-AUC of the attacker for whom the weights are worth most."""
    if not series:
        return []
    found = max(series, key=lambda s: s["auc"]["protected"]["mean"])
    auc = found["auc"]["protected"]
    limits = f" ({auc['interval'][0]:+.2f} … {auc['interval'][1]:+.2f})" if auc["interval"] else ""
    return [
        f"SLC-AUC over {percent(found['fractions'][0], 0)} to 100 % of the adversary's data under {found['attack']}: "
        f"{auc['mean']:+.2f}"
        f"{limits}; clean {found['auc']['clean']['mean']:+.2f}. Below 0 the weights are worse than none."
    ]


def limit(summary: dict[str, Any]) -> str:
    """Where the protected model stands between what the clean one knows and what random weights know."""
    found = summary["limits"]
    if not found:
        return ""
    scale = scale_of(summary["restricted"]["metric"])

    def at(model: str) -> float:
        return mean([float(f[model]["mean"]) for f in found])

    room, kept = at("clean") - at("scratch"), at("protected") - at("scratch")
    ahead = max(found, key=lambda f: f["protected"]["mean"] - f["scratch"]["mean"])
    most = ahead["protected"]["mean"] - ahead["scratch"]["mean"]
    said = (
        f"Over the {len(found)} layers probed the clean model knows {scale.amount(room)} more of the restricted domain "
        f"than random weights do; the protected one {scale.amount(kept)}"
        if room > 0 and kept > 0
        else f"Probes on the protected model know {scale.difference(kept)} {scale.unit} beside random weights on "
        f"average over {len(found)} layers, on the clean one {scale.difference(room)}"
    )
    most_said = f"Most is left at the input of {ahead['layer']}: {scale.difference(most)} {scale.unit}"
    worst = summary["restricted"]["worst_case"]
    gain = {m: worst[m]["along_the_way"] - worst["scratch"]["along_the_way"] for m in ("clean", "protected")}
    return (
        f"{said}. {most_said}. What attackers who fine-tune make of it, along the way in the worst case: "
        f"{scale.difference(gain['clean'])} {scale.unit} beside scratch from the clean model, "
        f"{scale.difference(gain['protected'])} from the protected one."
    )


def _intactness(found: dict[str, Any] | None, scale: Scale) -> list[str]:
    if found is None or found["ratio"] >= INTACT:
        return []
    return [
        f"The model's own ability is lost: {scale.shown(found['before'])} → {scale.shown(found['after'])} on the "
        "original domain. The verdict speaks of the restricted domain alone; such a model protects nothing worth "
        "having."
    ]


def _standing(summary: dict[str, Any], scale: Scale) -> list[str]:
    """Where the model stands between the two: what protection cost, and what it left of pre-training's advantage."""
    found = summary["intactness"]
    if found is None:
        return []
    tolerance = summary.get("protection", {}).get("tolerance")
    allowed = "" if tolerance is None else f"; the tolerance is {percent(tolerance)} on validation data"

    def ahead(model: str) -> str:
        stands = standing([summary], model)
        return f"{scale.difference(stands['along'][0])} along the way, {scale.difference(stands['end'][0])} at the end"

    beside = "Beside scratch (below 0 is ahead)" if scale.error else "Ahead of scratch"
    return [
        f"Where it stands: intactness {found['ratio']:.3f} ({scale.shown(found['before'])} → "
        f"{scale.shown(found['after'])} on the original domain{allowed}). {beside}, each at its best, in "
        f"{scale.counted}: unprotected {ahead('clean')}; protected {ahead('protected')}."
    ]


def _weakened(protection: Mapping[str, Any]) -> list[str]:
    """What the guard took back to keep within the tolerance, where that is much."""
    strength, attempts = protection.get("strength"), protection.get("attempts") or []
    if not protection.get("released") or strength is None or (strength > 0.95 and not attempts):
        return []
    said = f"To keep within the tolerance the defence was down to {strength:.2g} of its strength in what was released"
    tried = " and ".join(", ".join(f"{s:.2g}" for s in attempts).rsplit(", ", 1))
    which = "an attempt" if len(attempts) == 1 else f"{len(attempts)} attempts"
    return [said + (f", after {which} that did not end within it, at {tried}." if attempts else ".")]


def _scales(found: dict[str, float] | None, scale: Scale) -> list[str]:
    """What of a lead is no knowledge."""
    if found is None:
        return []
    ahead = {m: scale.difference(v) for m, v in found.items()}
    return [
        "With the entries of every tensor shuffled, so that scales are left and nothing learned, the unprotected "
        f"weights are {ahead['clean']} {scale.unit} beside scratch along the way, the protected ones "
        f"{ahead['protected']}: what of this lies above 0 is a lead without knowledge."
    ]


def _released(summary: dict[str, Any]) -> list[str]:
    """What was audited, where it is not what the defence made."""
    if summary.get("protection", {}).get("released") != 0:
        return []
    return [
        "The defence found nothing better within its tolerance: what stands here as protected is the model as it was."
    ]


def _explain(summary: dict[str, Any]) -> str:
    if all(a["verdict"] == "inconclusive" for a in summary["restricted"]["attacks"]):
        return "This audit shows nothing: no attack trains the unprotected model either. Give it more steps or data."
    said = EXPLAINED[summary["verdict"]]
    if any(c["name"] == HELPS and not c["passed"] for c in summary["checks"]):
        said += " But unprotected ones bring hardly more than training from scratch: the pair tells nothing."
    return said
