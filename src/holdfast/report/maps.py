"""Figures over the whole audit: the worst case, heat maps, accuracy over the adversary's data. PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from holdfast.records import SearchRecord
from holdfast.report.figures import LABELS, STYLE, band, metric_axis, png, steps_axis
from holdfast.scales import Scale

MISSING = "#e6e6e6"


def worst_case_curves(worst: Mapping[str, Any], chance: float, scale: Scale) -> bytes:
    """For each model and step the attack that is strongest there: three envelopes over all attacks."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for model, style in STYLE.items():
        found = worst[model]
        band(axes, worst["steps"], found["envelope"], found["envelope_deviation"], scale, LABELS[model], **style)
    metric_axis(axes, scale, "restricted", chance)
    steps_axis(axes, worst["steps"])
    axes.legend(loc="best", fontsize=9, frameon=False)
    return png(figure)


def limit_curves(limits: Sequence[Mapping[str, Any]], worst: Mapping[str, Any], chance: float, scale: Scale) -> bytes:
    """What a probe on each layer's input knows: clean, protected, random weights. The room between clean and random is
    what a defence can take away; the lines across are what fine-tuning makes of each in the worst case, along the
    way."""
    figure = Figure(figsize=(8.2, 4.4), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(limits)))
    for model, style in STYLE.items():
        means, spread = ([found[model][n] for found in limits] for n in ("mean", "deviation"))
        label = "random weights" if model == "scratch" else LABELS[model]
        band(axes, places, means, spread, scale, label, **style)
        tuned = scale.plotted(worst[model]["along_the_way"])
        axes.axhline(tuned, color=style["color"], linestyle=":", linewidth=1.4, label=f"{LABELS[model]}, fine-tuned")
    metric_axis(axes, scale, "restricted", chance)
    axes.set_xticks(places, [str(found["layer"]) for found in limits], rotation=30, ha="right", fontsize=8)
    axes.set_xlabel(
        "a probe on the input of this layer, first to last\ndotted: the worst case of fine-tuning, along the way"
    )
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return png(figure)


def heat_over_seeds(attacks: Sequence[Mapping[str, Any]], scale: Scale) -> bytes:
    """Protected − scratch at the end: attacks × seeds. Red: the weights help the attacker."""
    table = [a["difference"] for a in attacks]
    seeds = [f"seed {s}" for s in range(len(table[0]))]
    return _heat(table, [a["name"] for a in attacks], seeds, scale)


def heat_over_rates(searches: Sequence[SearchRecord], scale: Scale) -> bytes | None:
    """Protected − scratch on validation data at the end of each try: searched attacks × learning rates.

    Grey: not tried, or given up. None where there is nothing to draw.
    """
    found = {m: _by_rate(searches, m) for m in ("protected", "scratch")}
    names = [n for n in found["protected"] if n in found["scratch"]]
    rates = sorted({lr for n in names for lr in found["protected"][n]})
    if not rates:
        return None
    table = [
        [
            found["protected"][n][lr] - found["scratch"][n][lr]
            if lr in found["protected"][n] and lr in found["scratch"][n]
            else float("nan")
            for lr in rates
        ]
        for n in names
    ]
    return _heat(table, names, [f"{lr:g}" for lr in rates], scale, "learning rate")


def _by_rate(searches: Sequence[SearchRecord], model: str) -> dict[str, dict[float, float]]:
    """Attack → learning rate → last validation metric, of tries that vary nothing else and were not given up."""
    table: dict[str, dict[float, float]] = {}
    for search in searches:
        tries = [t for t in search.trials if not t["pruned"] and set(t["setting"]) == {"lr"}]
        for name in search.attacks if search.model == model and tries else ():
            table[name] = {t["setting"]["lr"]: t["values"][-1] for t in tries}
    return table


def _heat(
    table: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], scale: Scale, what: str = ""
) -> bytes:
    values = np.ma.masked_invalid(np.array(table, dtype=float))
    figure = Figure(figsize=(4.0 + 0.75 * len(columns), 1.3 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    most = max(5 * scale.margin, float(np.abs(values).max()) if values.count() else 0.0)
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
                text = scale.difference(float(value), 0)
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.colorbar(
        image,
        ax=axes,
        label=f"protected − scratch ({scale.counted})",
        shrink=min(1.0, 8 / max(1, len(rows)) + 0.3),
        format=lambda value, _: scale.difference(value, 0 if scale.unit == "points" else 2),
    )
    return png(figure)


def data_curves(slc: Mapping[str, Any], chance: float, scale: Scale) -> bytes:
    """Metric over the share of the adversary's data, the axis of SLC-AUC (Non-Transferable Pruning)."""
    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    axes = figure.subplots()
    for model, style in STYLE.items():
        band(axes, slc["fractions"], slc[model], slc["deviation"][model], scale, LABELS[model], **style)
    metric_axis(axes, scale, "restricted", chance)
    axes.set_xscale("log")
    ticks = list(slc["fractions"])
    axes.set_xticks(ticks, [f"{100 * x:.3g}" for x in ticks])
    axes.get_xaxis().set_minor_locator(NullLocator())
    axes.set_xlabel("share of the adversary's images (%)")
    axes.set_title(slc["attack"], fontsize=10)
    axes.legend(loc="best", fontsize=8, frameon=False)
    return png(figure)
