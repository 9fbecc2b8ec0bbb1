"""Figures as PNG bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colour-blind safe (Okabe–Ito), told apart by line and marker too.
STYLE: Mapping[str, dict[str, Any]] = {
    "protected": {"color": "#0072B2", "marker": "o", "linestyle": "-", "linewidth": 2.2},
    "clean": {"color": "#D55E00", "marker": "s", "linestyle": "-", "linewidth": 1.6},
    "scratch": {"color": "#555555", "marker": "^", "linestyle": "--", "linewidth": 1.6},
}
LABELS = {"protected": "protected", "clean": "clean (B2)", "scratch": "from scratch (B1)"}


def slug(name: str) -> str:
    """The part of a file name that says which attack."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def learning_curves(attack: Mapping[str, Any], chance: float, metric: str) -> bytes:
    """The three models under one attack: mean over seeds with a band of one sample deviation (SOPHON, Figure 3)."""
    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    axes = figure.subplots()
    _draw_curves(axes, attack, chance, metric)
    axes.legend(loc="best", fontsize=9, frameon=False)
    return png(figure)


def all_curves(attacks: Sequence[Mapping[str, Any]], chance: float, metric: str) -> bytes:
    """One panel for each attack."""
    columns = min(4, len(attacks))
    rows = -(-len(attacks) // columns)
    figure = Figure(figsize=(4.0 * columns, 3.2 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, attack in zip(grid, attacks, strict=False):
        _draw_curves(axes, attack, chance, metric)
    for axes in grid[len(attacks) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return png(figure)


def _draw_curves(axes: Axes, attack: Mapping[str, Any], chance: float, metric: str) -> None:
    steps = list(attack["steps"])
    for model, style in STYLE.items():
        mean = [100 * v for v in attack[model]]
        spread = [100 * v for v in attack["deviation"][model]]
        axes.plot(steps, mean, label=LABELS[model], markersize=4, **style)
        low, high = ([m + s * d for m, d in zip(mean, spread, strict=True)] for s in (-1, 1))
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.axhline(100 * chance, color="#777777", linewidth=1.2, linestyle=":", label="chance")
    axes.set_xscale("symlog", linthresh=max(1, steps[1]))
    axes.set_xticks(steps[::-2][::-1] if len(steps) > 6 else steps)
    axes.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.minorticks_off()
    axes.set_xlim(0, steps[-1] * 1.05)
    axes.set_ylim(-2, 102)
    axes.set_xlabel("fine-tuning steps")
    axes.set_ylabel(f"restricted {metric} (%)")
    axes.set_title(attack["name"], fontsize=10)
    axes.grid(alpha=0.25)


COMMON = ("iteration", "original", "restricted", "strength", "rolled_back")  # in every defence's checks


def protection_curves(checks: Sequence[Mapping[str, float]], floor: float | None) -> bytes:
    """What happened while the model was protected: original and restricted metric at every check, and breaches; beside
    them whatever else the defence noted (losses, residuals, sparsity)."""
    others = [n for n in dict.fromkeys(k for c in checks for k in c) if n not in COMMON]
    figure = Figure(figsize=(9.4 if others else 5.2, 3.7), layout="constrained")
    axes, *beside = figure.subplots(1, 2 if others else 1, squeeze=False)[0]
    for key, colour, label in (
        ("original", "#009E73", "original (validation)"),
        ("restricted", "#0072B2", "restricted, after a probing fine-tuning"),
    ):
        points = [(c["iteration"], 100 * c[key]) for c in checks if key in c]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.6)
    breaches = [(c["iteration"], 100 * c["original"]) for c in checks if c.get("rolled_back") and "original" in c]
    if breaches:
        axes.plot(*zip(*breaches, strict=True), "x", color="#CC3311", label="breach: gone back")
    if floor is not None:
        axes.axhline(100 * floor, color="#009E73", linestyle=":", linewidth=1, label="tolerance")
    axes.set_ylim(-2, 102)
    axes.set_xlabel("iteration")
    axes.set_ylabel("metric (%)")
    axes.legend(loc="best", fontsize=8, frameon=False)
    axes.grid(alpha=0.25)
    for other in beside:
        for name in others:
            other.plot(*zip(*((c["iteration"], c[name]) for c in checks if name in c), strict=True), label=name)
        other.set_yscale("symlog", linthresh=1e-2)
        other.set_xlabel("iteration")
        other.legend(loc="best", fontsize=8, frameon=False)
        other.grid(alpha=0.25)
    return png(figure)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
