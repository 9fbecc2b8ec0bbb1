"""Figures over the whole audit: the worst case, heat maps, accuracy over the adversary's data. PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from holdfast.records import SearchRecord
from holdfast.report.figures import LABELS, STYLE, png

MISSING = "#e6e6e6"


def worst_case_curves(worst: Mapping[str, Any], chance: float, metric: str) -> bytes:
    """For each model and step the attack that is strongest there: three envelopes over all attacks."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for model, style in STYLE.items():
        found = worst[model]
        _band(axes, worst["steps"], found["envelope"], found["envelope_deviation"], LABELS[model], style)
    axes.axhline(100 * chance, color="#777777", linewidth=1.2, linestyle=":", label="chance")
    steps = list(worst["steps"])
    axes.set_xscale("symlog", linthresh=max(1, steps[1]))
    axes.set_xticks(steps[::-2][::-1] if len(steps) > 6 else steps)
    axes.get_xaxis().set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_xlim(0, 1.05 * steps[-1])
    axes.set_ylim(-2, 102)
    axes.set_xlabel("fine-tuning steps")
    axes.set_ylabel(f"restricted {metric} (%)")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    return png(figure)


def _band(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[float],
    spread: Sequence[float],
    label: str,
    style: Mapping[str, Any],
) -> None:
    mean, half = 100 * np.array(values), 100 * np.array(spread)
    axes.plot(x, mean, label=label, markersize=4, **style)
    axes.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)


def heat_over_seeds(attacks: Sequence[Mapping[str, Any]]) -> bytes:
    """Protected − scratch at the end, in points: attacks × seeds. Red: the weights help the attacker."""
    table = [[100 * d for d in a["difference"]] for a in attacks]
    seeds = [f"seed {s}" for s in range(len(table[0]))]
    return _heat(table, [a["name"] for a in attacks], seeds)


def heat_over_rates(searches: Sequence[SearchRecord]) -> bytes | None:
    """Protected − scratch on validation data at the end of each try, in points: searched attacks × learning rates.

    Grey: not tried, or given up. None where there is nothing to draw.
    """
    found = {m: _by_rate(searches, m) for m in ("protected", "scratch")}
    names = [n for n in found["protected"] if n in found["scratch"]]
    rates = sorted({lr for n in names for lr in found["protected"][n]})
    if not rates:
        return None
    table = [
        [
            100 * (found["protected"][n][lr] - found["scratch"][n][lr])
            if lr in found["protected"][n] and lr in found["scratch"][n]
            else float("nan")
            for lr in rates
        ]
        for n in names
    ]
    return _heat(table, names, [f"{lr:g}" for lr in rates], "learning rate")


def _by_rate(searches: Sequence[SearchRecord], model: str) -> dict[str, dict[float, float]]:
    """Attack → learning rate → last validation metric, of tries that vary nothing else and were not given up."""
    table: dict[str, dict[float, float]] = {}
    for search in searches:
        tries = [t for t in search.trials if not t["pruned"] and set(t["setting"]) == {"lr"}]
        for name in search.attacks if search.model == model and tries else ():
            table[name] = {t["setting"]["lr"]: t["values"][-1] for t in tries}
    return table


def _heat(table: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], what: str = "") -> bytes:
    values = np.ma.masked_invalid(np.array(table, dtype=float))
    figure = Figure(figsize=(4.0 + 0.75 * len(columns), 1.3 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    most = max(10.0, float(np.abs(values).max()) if values.count() else 0.0)
    axes.set_facecolor(MISSING)
    image = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_xlabel(what)
    axes.tick_params(length=0)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not np.ma.masked:
                dark = abs(float(value)) > 0.6 * most
                text = f"{float(value):+.0f}".replace("-", "−")
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.colorbar(image, ax=axes, label="protected − scratch (points)", shrink=min(1.0, 8 / max(1, len(rows)) + 0.3))
    return png(figure)


def data_curves(slc: Mapping[str, Any], chance: float, metric: str) -> bytes:
    """Metric over the share of the adversary's data, the axis of SLC-AUC (Non-Transferable Pruning)."""
    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    axes = figure.subplots()
    for model, style in STYLE.items():
        _band(axes, slc["fractions"], slc[model], slc["deviation"][model], LABELS[model], style)
    axes.axhline(100 * chance, color="#777777", linewidth=1.2, linestyle=":", label="chance")
    axes.set_xscale("log")
    ticks = list(slc["fractions"])
    axes.set_xticks(ticks, [f"{100 * x:.3g}" for x in ticks])
    axes.minorticks_off()
    axes.set_ylim(-2, 102)
    axes.set_xlabel("share of the adversary's images (%)")
    axes.set_ylabel(f"restricted {metric} (%)")
    axes.set_title(slc["attack"], fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=8, frameon=False)
    return png(figure)
