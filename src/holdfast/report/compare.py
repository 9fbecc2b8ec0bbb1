"""The page of a comparison: one row a defence, the beneficial accuracy, the malicious curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.figure import Figure

from holdfast.errors import unknown
from holdfast.files import write_atomic, write_json
from holdfast.report.figures import COLOURS, band, metric_axis, png, steps_axis
from holdfast.report.frontier import frontier
from holdfast.scales import ACCURACY, Scale, scale_of
from holdfast.statistics import deviation, mean, spread
from holdfast.summary import standing

Summaries = Mapping[str, Sequence[Mapping[str, Any]]]
STYLES = ("-", "-.", (0, (1, 1)))


def write_comparison(out: Path, found: Summaries, attack: str, title: str = "comparison") -> dict[str, Any]:
    """Write `comparison.json`, `comparison.md` and three figures into `out`; return the JSON's contents.

    `attack`: whose curves are drawn and whose final metric is a column, the paper's own as a rule. Values are means
    over protection seeds of means over audit seeds; ± is the sample deviation over protection seeds (for one protection
    over audit seeds, where that is known).
    """
    rows = {name: _row(summaries, attack) for name, summaries in found.items()}
    result = {
        "title": title,
        "metric": next(iter(found.values()))[0]["restricted"]["metric"],
        "attack": attack,
        "seeds": len(next(iter(found.values()))),
        "rows": rows,
        "controls": _controls(found, attack),
    }
    write_json(out / "comparison.json", result)
    stands = {name: row["standing"] for name, row in rows.items()}
    drawn = frontier(stands, standing(next(iter(found.values())), "clean"), scale_of(str(result["metric"])))
    write_atomic(out / "figures" / "frontier.png", drawn)
    write_atomic(out / "figures" / "beneficial.png", _beneficial(rows, scale_of(str(result["metric"]))))
    write_atomic(out / "figures" / "malicious.png", _malicious(found, attack))
    write_atomic(out / "comparison.md", as_markdown(result))
    return result


def _entry(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    attacks = {a["name"]: a for a in summary["restricted"]["attacks"]}
    if name not in attacks:
        raise unknown("attack of this comparison", name, attacks)
    found: Mapping[str, Any] = attacks[name]
    return found


def _row(summaries: Sequence[Mapping[str, Any]], attack: str) -> dict[str, Any]:
    worst = [s["restricted"]["worst_case"]["protected"] for s in summaries]
    ends = [_entry(s, attack) for s in summaries]
    protections = [s["protection"] for s in summaries]
    benign = [s["benign"]["difference"] for s in summaries if s["benign"]]
    return {
        "before": spread([s["intactness"]["before"] for s in summaries]),
        "after": spread([s["intactness"]["after"] for s in summaries]),
        "standing": standing(summaries),
        "attack": spread([a["protected"][-1] for a in ends], _within(ends[0], ends[0]["deviation"]["protected"][-1])),
        "worst": spread([w["final"] for w in worst], _within(ends[0], worst[0]["deviation"])),
        "worst_attacks": sorted({w["attack"] for w in worst}),
        "along": spread([w["along_the_way"] for w in worst]),
        "slc_auc": _areas(summaries, "protected"),
        "benign": spread(benign) if benign else None,
        "unprotected": sum(p["released"] == 0 for p in protections),
        "measured": _measured(protections),
        "verdicts": [s["verdict"] for s in summaries],
        "weaker": _weaker(summaries),
        "failing": sorted({c["name"] for s in summaries for c in s["checks"] if not c["passed"]}),
        "seconds": mean([s["cost"]["protect_seconds"] or 0.0 for s in summaries]),
        "memory_mb": max(p["peak_memory_mb"] for p in protections),
    }


def _areas(summaries: Sequence[Mapping[str, Any]], model: str) -> dict[str, list[float | None]]:
    """SLC-AUC of `model` under every attack that was run on shares of the data."""
    found: dict[str, list[float]] = {}
    for summary in (s["restricted"] for s in summaries):
        for series in [summary["slc"], *summary["slc_others"]] if summary["slc"] else []:
            found.setdefault(series["attack"], []).append(series["auc"][model]["mean"])
    return {name: spread(values) for name, values in found.items()}


def _measured(protections: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """What the defence's paper reports beside the metric: by name, of the clean and of the protected models."""
    own = [p["measured"] for p in protections if p.get("measured")]
    return {
        name: {model: spread([m[model][name] for m in own]) for model in ("clean", "protected")}
        for name in (own[0]["protected"] if own else ())
    }


def _weaker(summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Verdicts of the batteries within the audit, by name: what a weaker audit of the same weights would have said."""
    found: dict[str, list[str]] = {}
    for summary in summaries:
        for part in summary["restricted"].get("strengths", [])[:-1]:
            found.setdefault(part["battery"], []).append(part["verdict"])
    return found


def _counted(verdicts: Sequence[str]) -> str:
    return ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))


def _verdicts(row: Mapping[str, Any]) -> str:
    """The audit's own, and those of weaker batteries that would have said something else."""
    other = [f"{_counted(v)} by {name} alone" for name, v in row["weaker"].items() if v != row["verdicts"]]
    return "; ".join([_counted(row["verdicts"]), *other])


def _within(entry: Mapping[str, Any], found: float) -> float | None:
    """A deviation over audit seeds, where there are several."""
    return None if entry["interval"] is None else found


def _controls(found: Summaries, attack: str) -> dict[str, Any]:
    """What clean and scratch reach, by the first protection's audit: the same in all of a seed, but where another's
    search chose what they had not tried."""
    summaries = next(iter(found.values()))
    controls = {}
    for model in ("clean", "scratch"):
        worst = [s["restricted"]["worst_case"][model] for s in summaries]
        ends = [_entry(s, attack) for s in summaries]
        controls[model] = {
            "attack": spread([a[model][-1] for a in ends], _within(ends[0], ends[0]["deviation"][model][-1])),
            "worst": spread([w["final"] for w in worst], _within(ends[0], worst[0]["deviation"])),
            "along": spread([w["along_the_way"] for w in worst]),
            "slc_auc": _areas(summaries, model) if model == "clean" else {},  # of scratch: 0, by definition
        }
    return controls


def _mean(value: Sequence[Any], scale: Scale) -> str:
    return scale.number(value[0]) + ("" if value[1] is None else f" ± {scale.spread(value[1])}")


def _gap(value: Sequence[Any] | None, scale: Scale) -> str:
    if value is None:
        return "–"
    return scale.difference(value[0]) + ("" if value[1] is None else f" ± {scale.spread(value[1])}")


def _slc(areas: Mapping[str, Sequence[Any]]) -> str:
    return "; ".join(f"{v[0]:+.2f}{'' if v[1] is None else f' ± {v[1]:.2f}'} ({n})" for n, v in areas.items())


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table: one row a defence, then the controls."""
    scale = scale_of(result["metric"])
    seeds = f"{result['seeds']} protection seed{'s' if result['seeds'] > 1 else ''}"
    lines = [
        f"# {result['title']}",
        "",
        f"Restricted {scale.titled}, {seeds}, under `{result['attack']}` and in the worst case.",
        "",
        f"| defence | original before → after | {result['attack']} | worst case (attack) | along the way | SLC-AUC | "
        "third domain, − clean | verdict | protect s | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        count = len(row["verdicts"])
        none = f" († {row['unprotected']} of {count})" if row["unprotected"] else ""
        lines.append(
            f"| {name}{none} | {scale.shown(row['before'][0])} → {_mean(row['after'], scale)} | "
            f"{_mean(row['attack'], scale)} | "
            f"{_mean(row['worst'], scale)} ({'; '.join(row['worst_attacks'])}) | {_mean(row['along'], scale)} | "
            f"{_slc(row['slc_auc']) or '–'} | {_gap(row['benign'], scale)} | {_verdicts(row)} | {row['seconds']:.0f} | "
            f"{row['memory_mb']:.0f} |"
        )
    for name, row in result["controls"].items():
        lines.append(
            f"| *{name}* | | {_mean(row['attack'], scale)} | {_mean(row['worst'], scale)} | "
            f"{_mean(row['along'], scale)} | {_slc(row['slc_auc'])} | | | | |"
        )
    for name, row in result["rows"].items():
        said = [
            f"{n} {_mean(v['protected'], ACCURACY)} (unprotected {_mean(v['clean'], ACCURACY)})"
            for n, v in row["measured"].items()
        ]
        lines += ["", f"{name}, in %: {'; '.join(said)}"] if said else []
    for name, row in result["rows"].items():
        lines += ["", f"{name}, checks that do not pass: {'; '.join(row['failing'])}."] if row["failing"] else []
    links = [
        f"{name} ({', '.join(f'[seed {s}](seed-{s}/{quote(name)}/report.html)' for s in range(result['seeds']))})"
        for name in result["rows"]
    ]
    lines += [
        "",
        f"Reports: {'; '.join(links)}. Figures: [original metric](figures/beneficial.png), [restricted metric]"
        "(figures/malicious.png), [intactness against the worst case](figures/frontier.png).",
    ]
    if any(row["unprotected"] for row in result["rows"].values()):
        lines += [
            "",
            "† no state within the tolerance on intactness was found: what was audited is the unprotected model.",
        ]
    return "\n".join(lines) + "\n"


def _beneficial(rows: Mapping[str, Mapping[str, Any]], scale: Scale) -> bytes:
    """The metric on original test data of every defence, as in Figure 1 of "Transfer Resistant Model Training"."""
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        list(rows),
        [scale.plotted(r["after"][0]) for r in rows.values()],
        yerr=[math.nan if r["after"][1] is None else scale.width(r["after"][1]) for r in rows.values()],
        color=[COLOURS[i % len(COLOURS)] for i in range(len(rows))],
        capsize=3,
    )
    before = mean([r["before"][0] for r in rows.values()])
    axes.axhline(scale.plotted(before), color="#555555", linestyle=":", linewidth=1.2, label="unprotected")
    axes.tick_params(axis="x", rotation=30 if sum(map(len, rows)) > 50 else 0)
    axes.set_ylabel(f"original {scale.titled}")
    figure.legend(loc="outside upper right", fontsize=8, frameon=False)
    return png(figure)


def _malicious(found: Summaries, attack: str) -> bytes:
    """The restricted metric over the steps of one attack, as in Figure 2 there; bands: one deviation over protections
    (over audit seeds, for one protection)."""
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.subplots()
    curves = {name: [_entry(s, attack) for s in summaries] for name, summaries in found.items()}
    own = next(iter(curves.values()))
    scale = scale_of(next(iter(found.values()))[0]["restricted"]["metric"])
    lines: list[tuple[str, Sequence[Mapping[str, Any]], str, str, Any]] = [
        (name, entries, "protected", COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)])
        for i, (name, entries) in enumerate(curves.items())
    ]
    lines += [("clean", own, "clean", "#555555", "--"), ("scratch", own, "scratch", "#999999", ":")]
    for name, entries, model, colour, style in lines:
        middle = [mean(column) for column in zip(*(e[model] for e in entries), strict=True)]
        width = entries[0]["deviation"][model]
        if len(entries) > 1:
            width = [deviation(column) for column in zip(*(e[model] for e in entries), strict=True)]
        band(axes, own[0]["steps"], middle, width, scale, name, color=colour, linestyle=style, linewidth=1.6)
    metric_axis(axes, scale, "restricted")
    steps_axis(axes, own[0]["steps"])
    axes.set_title(attack, fontsize=10)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return png(figure)
