"""The page of a comparison: one row a defence, the beneficial accuracy, the malicious curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from holdfast.errors import require
from holdfast.files import write_atomic, write_json
from holdfast.report.figures import png
from holdfast.report.words import percent
from holdfast.statistics import deviation, mean

Summaries = Mapping[str, Sequence[Mapping[str, Any]]]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288")
STYLES = ("-", "-.", (0, (1, 1)))


def write_comparison(out: Path, found: Summaries, attack: str) -> dict[str, Any]:
    """Write `comparison.json`, `comparison.md` and two figures into `out`; return the JSON's contents.

    `attack`: whose curves are drawn and whose final metric is a column, the paper's own as a rule. Values are means
    over protection seeds of means over audit seeds; ± is the sample deviation over protection seeds (for one protection
    over audit seeds, where that is known).
    """
    rows = {name: _row(summaries, attack) for name, summaries in found.items()}
    result = {
        "attack": attack,
        "seeds": len(next(iter(found.values()))),
        "rows": rows,
        "controls": _controls(found, attack),
    }
    write_json(out / "comparison.json", result)
    write_atomic(out / "figures" / "beneficial.png", _beneficial(rows))
    write_atomic(out / "figures" / "malicious.png", _malicious(found, attack))
    write_atomic(out / "comparison.md", as_markdown(result))
    return result


def _entry(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    attacks = {a["name"]: a for a in summary["restricted"]["attacks"]}
    require(name in attacks, f"no attack '{name}' in this comparison; valid: {', '.join(attacks)}")
    found: Mapping[str, Any] = attacks[name]
    return found


def _row(summaries: Sequence[Mapping[str, Any]], attack: str) -> dict[str, Any]:
    worst = [s["restricted"]["worst_case"]["protected"] for s in summaries]
    ends = [_entry(s, attack) for s in summaries]
    protections = [s["protection"] for s in summaries]
    benign = [s["benign"]["difference"] for s in summaries if s["benign"]]
    return {
        "before": _spread([s["intactness"]["before"] for s in summaries]),
        "after": _spread([s["intactness"]["after"] for s in summaries]),
        "attack": _spread([a["protected"][-1] for a in ends], ends[0]["deviation"]["protected"][-1]),
        "worst": _spread([w["final"] for w in worst], worst[0]["deviation"]),
        "worst_attacks": sorted({w["attack"] for w in worst}),
        "along": _spread([w["along_the_way"] for w in worst]),
        "slc_auc": _areas(summaries, "protected"),
        "benign": _spread(benign) if benign else None,
        "unprotected": sum(p["released"] == 0 for p in protections),
        "measured": _measured(protections),
        "verdicts": [s["verdict"] for s in summaries],
        "seconds": mean([s["cost"]["protect_seconds"] or 0.0 for s in summaries]),
        "memory_mb": max(p["peak_memory_mb"] for p in protections),
    }


def _areas(summaries: Sequence[Mapping[str, Any]], model: str) -> dict[str, list[float | None]]:
    """SLC-AUC of `model` under every attack that was run on shares of the data."""
    found: dict[str, list[float]] = {}
    for summary in (s["restricted"] for s in summaries):
        for series in [summary["slc"], *summary["slc_others"]] if summary["slc"] else []:
            found.setdefault(series["attack"], []).append(series["auc"][model]["mean"])
    return {name: _spread(values) for name, values in found.items()}


def _measured(protections: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """What the defence's paper reports beside the metric: by name, of the clean and of the protected models."""
    own = [p["measured"] for p in protections if p.get("measured")]
    return {
        name: {model: _spread([m[model][name] for m in own]) for model in ("clean", "protected")}
        for name in (own[0]["protected"] if own else ())
    }


def _spread(values: Sequence[float], within: float | None = None) -> list[float | None]:
    """Mean, and the sample deviation over protections (`within`: over audit seeds, for one protection)."""
    return [mean(values), deviation(values) if len(values) > 1 else within]


def _controls(found: Summaries, attack: str) -> dict[str, Any]:
    """What clean and scratch reach: the same in every run of a seed."""
    summaries = next(iter(found.values()))
    controls = {}
    for model in ("clean", "scratch"):
        worst = [s["restricted"]["worst_case"][model] for s in summaries]
        ends = [_entry(s, attack) for s in summaries]
        controls[model] = {
            "attack": _spread([a[model][-1] for a in ends], ends[0]["deviation"][model][-1]),
            "worst": _spread([w["final"] for w in worst], worst[0]["deviation"]),
            "along": _spread([w["along_the_way"] for w in worst]),
            "slc_auc": _areas(summaries, model) if model == "clean" else {},  # of scratch: 0, by definition
        }
    return controls


def _with_spread(value: Sequence[Any] | None, form: str, scale: float = 1.0) -> str:
    if value is None:
        return "–"
    spread = "" if value[1] is None else f" ± {scale * value[1]:{form.lstrip('+')}}"
    return f"{scale * value[0]:{form}}{spread}"


def _points(value: Sequence[Any] | None, sign: str = "") -> str:
    return _with_spread(value, f"{sign}.1f", 100)


def _slc(areas: Mapping[str, Sequence[Any]]) -> str:
    return "; ".join(f"{_with_spread(v, '+.2f')} ({n})" for n, v in areas.items())


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table: one row a defence, then the controls."""
    lines = [
        f"Restricted metric in %, {result['seeds']} protection seeds, under `{result['attack']}` and in the worst "
        "case.",
        "",
        f"| defence | original before → after | {result['attack']} | worst case (attack) | along the way | SLC-AUC | "
        "third domain, − clean | verdict | protect s | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        count = len(row["verdicts"])
        none = f" († {row['unprotected']} of {count})" if row["unprotected"] else ""
        verdicts = ", ".join(f"{row['verdicts'].count(v)} {v}" for v in dict.fromkeys(row["verdicts"]))
        lines.append(
            f"| {name}{none} | {percent(row['before'][0])} → {_points(row['after'])} | {_points(row['attack'])} | "
            f"{_points(row['worst'])} ({'; '.join(row['worst_attacks'])}) | {_points(row['along'])} | "
            f"{_slc(row['slc_auc']) or '–'} | {_points(row['benign'], '+')} | {verdicts} | {row['seconds']:.0f} | "
            f"{row['memory_mb']:.0f} |"
        )
    for name, row in result["controls"].items():
        lines.append(
            f"| *{name}* | | {_points(row['attack'])} | {_points(row['worst'])} | {_points(row['along'])} | "
            f"{_slc(row['slc_auc'])} | | | | |"
        )
    for name, row in result["rows"].items():
        said = [
            f"{n} {_points(v['protected'])} (unprotected {_points(v['clean'])})" for n, v in row["measured"].items()
        ]
        lines += ["", f"{name}, in %: {'; '.join(said)}"] if said else []
    if any(row["unprotected"] for row in result["rows"].values()):
        lines += [
            "",
            "† no state within the tolerance on intactness was found: what was audited is the unprotected model.",
        ]
    return "\n".join(lines) + "\n"


def _beneficial(rows: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Accuracy on original test data of every defence, as in Figure 1 of "Transfer Resistant Model Training"."""
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        list(rows),
        [100 * r["after"][0] for r in rows.values()],
        yerr=[100 * (r["after"][1] or 0.0) for r in rows.values()],
        color=[COLOURS[i % len(COLOURS)] for i in range(len(rows))],
        capsize=3,
    )
    before = mean([r["before"][0] for r in rows.values()])
    axes.axhline(100 * before, color="#555555", linestyle=":", linewidth=1.2, label="unprotected")
    axes.tick_params(axis="x", rotation=30 if len(rows) > 6 else 0)
    axes.set_ylabel("original metric (%)")
    axes.legend(loc="lower right", fontsize=8)
    return png(figure)


def _malicious(found: Summaries, attack: str) -> bytes:
    """Restricted accuracy over the steps of one attack, as in Figure 2 there; bands: one deviation over protections
    (over audit seeds, for one protection)."""
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.subplots()
    curves = {name: [_entry(s, attack) for s in summaries] for name, summaries in found.items()}
    own = next(iter(curves.values()))
    lines: list[tuple[str, Sequence[Mapping[str, Any]], str, str, Any]] = [
        (name, entries, "protected", COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)])
        for i, (name, entries) in enumerate(curves.items())
    ]
    lines += [("clean", own, "clean", "#555555", "--"), ("scratch", own, "scratch", "#999999", ":")]
    for name, entries, model, colour, style in lines:
        middle = [100 * mean(column) for column in zip(*(e[model] for e in entries), strict=True)]
        width = [100 * w for w in entries[0]["deviation"][model]]
        if len(entries) > 1:
            width = [100 * deviation(column) for column in zip(*(e[model] for e in entries), strict=True)]
        axes.plot(own[0]["steps"], middle, linestyle=style, color=colour, label=name, linewidth=1.6)
        low, high = ([m + s * w for m, w in zip(middle, width, strict=True)] for s in (-1, 1))
        axes.fill_between(own[0]["steps"], low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("attacker's steps")
    axes.set_ylabel("restricted metric (%)")
    axes.set_title(attack, fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=1 + len(lines) // 10)
    axes.grid(alpha=0.25)
    return png(figure)
