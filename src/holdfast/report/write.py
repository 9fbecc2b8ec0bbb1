"""Read a run's folder, write its report: `summary.json`, `report.md`, `report.html`, `figures/*.png`."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from holdfast.audit import AuditFiles, by_reason
from holdfast.diffusion.exhibits import distances_table, read_exhibits
from holdfast.errors import UserError, require
from holdfast.files import read_json, write_atomic, write_json
from holdfast.intactness import costs
from holdfast.judgement import left_out_of
from holdfast.measured import measured, require_finished
from holdfast.records import Record, RecordFile, SearchRecord
from holdfast.report import figures, maps
from holdfast.report.pictures import draw_exhibits
from holdfast.report.words import conclusion, cost, limit, percent, weaknesses
from holdfast.scales import scale_of
from holdfast.searches import merged
from holdfast.summary import summarise


def write_report(folder: Path) -> dict[str, Any]:
    """Write everything and return the summary. Raises `UserError` where the folder holds no finished audit."""
    records = RecordFile(folder / "records.jsonl").read()
    if not records:
        raise UserError(f"{folder} holds no audit (no records.jsonl); run `holdfast audit` or `holdfast run` first")
    searches = merged(AuditFiles(folder).searches.read())
    facts = _facts(folder, records, searches)
    require_finished(records, facts["provenance"])
    chance = facts["provenance"]["restricted"]["chance"]
    made = {"released": (facts["protection"] or {}).get("released")}
    summary = summarise(records, chance, facts["cost"], searches, {**facts["provenance"], **made})
    if facts["protection"]:  # `released`: an iteration; 0 where no state within tolerance beat the model as it was
        summary["protection"] = _protection(facts)
    pictures = _draw(folder, summary, facts, searches)
    context = _context(folder, records, summary, facts, pictures)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("holdfast.report", "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scale = scale_of(records[0].metric)
    shown = {n: getattr(scale, n) for n in ("shown", "number", "spread", "difference", "interval")}
    environment.filters.update(percent=percent, cost=cost, by_reason=by_reason, **shown)
    write_json(folder / "summary.json", summary)
    for name in ("report.md", "report.html"):
        write_atomic(folder / name, environment.get_template(f"{name}.j2").render(context))
    return summary


def _protection(facts: dict[str, Any]) -> dict[str, Any]:
    """How the protection ended; `strength`: of the restricted terms, in what was released."""
    history = facts["protection"]
    kept = ("released", "attempts", "rollbacks", "peak_memory_mb", "measured")
    strengths = {c["iteration"]: c.get("strength") for c in history["checks"]}
    tolerance = facts["manifest"]["recipe"]["defence"].get("tolerance")
    strength = strengths.get(history.get("released"))
    return {**{n: history.get(n) for n in kept}, "strength": strength, "tolerance": tolerance}


MADE_BY = ("python", "versions", "revision", "hardware")  # of the last record, should the audit since have added none


def _facts(folder: Path, records: list[Record], searches: Sequence[SearchRecord]) -> dict[str, Any]:
    """What the folder knows beside its records."""
    manifest = read_json(folder / "run.json")
    known = read_json(folder / "provenance.json")
    require(records[-1].provenance in known, f"{folder / 'provenance.json'} does not know these records")
    made = known[records[-1].provenance]
    history = folder / "protection" / "history.json"
    protection = read_json(history) if history.exists() else None
    audit = folder / "audit.json"
    memory = [m["peak_memory_mb"] for m in (protection, read_json(audit) if audit.exists() else None) if m]
    cost = {
        "protect_seconds": round(protection["seconds"], 3) if protection else None,
        "audit_seconds": round(_cell_seconds(records) + sum(s.seconds for s in searches), 3),
        "peak_memory_mb": round(max(memory), 1) if memory else None,
    }
    return {
        "manifest": manifest,
        "provenance": {**next(reversed(known.values())), **{n: made[n] for n in MADE_BY}},
        "protection": protection,
        "cost": cost,
    }


def _cell_seconds(records: list[Record]) -> float:
    """Processor time of all cells. A from-scratch run that serves several attacks stands in the records several
    times, with the same seconds: it counts once."""
    ends: dict[tuple[str, int, str], float] = {}
    for r in records:
        if r.step == r.last_step and r.split == "test":
            ends[r.model, r.seed, r.attack if r.model != "scratch" else str(r.seconds)] = r.seconds
    return sum(ends.values())


PANELS = 12  # attacks with a figure of their own, the strongest; `curves` has all


def _draw(
    folder: Path, summary: dict[str, Any], facts: dict[str, Any], searches: Sequence[SearchRecord]
) -> dict[str, Path]:
    restricted = summary["restricted"]
    chance, scale = restricted["chance"], scale_of(restricted["metric"])
    drawn = {
        "curves": figures.all_curves(restricted["attacks"], chance, scale),
        "worst-case": maps.worst_case_curves(restricted["worst_case"], chance, scale),
        "heat-seeds": maps.heat_over_seeds(restricted["attacks"], scale),
    }
    if summary["limits"]:
        drawn["limits"] = maps.limit_curves(summary["limits"], restricted["worst_case"], chance, scale)
    rates = maps.heat_over_rates(searches, scale)
    drawn |= {"heat-rates": rates} if rates else {}
    drawn |= {"slc": maps.data_curves(restricted["slc"], chance, scale)} if restricted["slc"] else {}
    for number, attack in enumerate(restricted["attacks"][:PANELS], start=1):
        drawn[_picture(number, attack)] = figures.learning_curves(attack, chance, scale)
    protection = facts["protection"]
    if protection and protection["checks"]:
        tolerance = facts["manifest"]["recipe"]["defence"].get("tolerance")
        before = protection["checks"][0].get("original")
        floor = scale.floor(before, tolerance) if tolerance is not None and before is not None else None
        drawn["protection"] = figures.protection_curves(protection["checks"], floor, scale)
    shown = read_exhibits(folder / "exhibits")
    if shown:
        drawn |= draw_exhibits(shown)
        summary["exhibits"] = distances_table(shown)
    paths = {}
    for name, data in drawn.items():
        paths[name] = folder / "figures" / f"{name}.png"
        write_atomic(paths[name], data)
    return paths


def _simulated(foreign: bool) -> Callable[[dict[str, Any]], str]:
    """Whether the defence trained against an attack, in a word; of somebody else's nothing is known."""
    return lambda attack: "unknown" if foreign else "yes" if attack["simulated"] else "no"


def _picture(number: int, attack: dict[str, Any]) -> str:
    """A figure's name: the attack's rank, strongest first, keeps names apart that differ in signs alone."""
    return f"attack-{number}-{figures.slug(attack['name'])}"


def _context(
    folder: Path, records: list[Record], summary: dict[str, Any], facts: dict[str, Any], pictures: dict[str, Path]
) -> dict[str, Any]:
    rows = []
    by_name = {m.name: m for m in measured(records)}
    for number, attack in enumerate(summary["restricted"]["attacks"], start=1):
        found = by_name[attack["name"]]
        rows.append(
            {
                "attack": attack,
                "picture": _picture(number, attack),
                "about": facts["provenance"].get("attacks", {}).get(attack["name"]),
                "seeds": len(found.protected),
                "models": [(m, attack[m], attack["deviation"][m]) for m in ("scratch", "clean", "protected")],
            }
        )
    tables: dict[tuple[int, ...], list[dict[str, Any]]] = {}  # attacks with another budget have other columns
    for row in rows:
        tables.setdefault(tuple(row["attack"]["steps"]), []).append(row)
    return {
        "summary": summary,
        "scale": scale_of(summary["restricted"]["metric"]),
        "rows": rows,
        "tables": list(tables.items()),
        "conclusion": conclusion(summary),
        "weaknesses": weaknesses(summary, left_out_of(facts["provenance"]), facts["provenance"]["battery"]),
        "limit_words": limit(summary),
        "costs": costs(summary["intactness"] or {}),
        "panels": PANELS,
        "needs": sorted({n for a in summary["restricted"]["attacks"] for n in a["needs"]}),
        "left_out": left_out_of(facts["provenance"]),
        "recipe": facts["manifest"]["recipe"],
        "fingerprint": facts["manifest"]["fingerprint"],
        "provenance": facts["provenance"],
        "protection": facts["protection"],
        "defence": "unknown" if facts["manifest"].get("protected") else facts["manifest"]["recipe"]["defence"]["name"],
        "simulated": _simulated(bool(facts["manifest"].get("protected"))),
        "failing": [c for c in summary["checks"] if not c["passed"]],
        "pictures": {n: base64.b64encode(p.read_bytes()).decode() for n, p in pictures.items()},
        "folder": folder.name,
    }
