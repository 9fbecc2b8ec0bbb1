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

from holdfast.scales import Scale

# Colour-blind safe (Okabe–Ito), told apart by line and marker too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288")
STYLE: Mapping[str, dict[str, Any]] = {
    "protected": {"color": "#0072B2", "marker": "o", "linestyle": "-", "linewidth": 2.2},
    "clean": {"color": "#D55E00", "marker": "s", "linestyle": "-", "linewidth": 1.6},
    "scratch": {"color": "#555555", "marker": "^", "linestyle": "--", "linewidth": 1.6},
}
LABELS = {"protected": "protected", "clean": "clean (B2)", "scratch": "from scratch (B1)"}


def slug(name: str) -> str:
    """The part of a file name that says which attack."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def learning_curves(attack: Mapping[str, Any], chance: float, scale: Scale) -> bytes:
    """The three models under one attack: mean over seeds with a band of one sample deviation (SOPHON, Figure 3)."""
    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    axes = figure.subplots()
    _draw_curves(axes, attack, chance, scale)
    axes.legend(loc="best", fontsize=9, frameon=False)
    return png(figure)


def all_curves(attacks: Sequence[Mapping[str, Any]], chance: float, scale: Scale) -> bytes:
    """One panel for each attack."""
    columns = min(4, len(attacks))
    rows = -(-len(attacks) // columns)
    figure = Figure(figsize=(4.0 * columns, 3.2 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, attack in zip(grid, attacks, strict=False):
        _draw_curves(axes, attack, chance, scale)
    for axes in grid[len(attacks) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return png(figure)


def _draw_curves(axes: Axes, attack: Mapping[str, Any], chance: float, scale: Scale) -> None:
    steps = list(attack["steps"])
    for model, style in STYLE.items():
        band(axes, steps, attack[model], attack["deviation"][model], scale, LABELS[model], **style)
    metric_axis(axes, scale, "restricted", chance)
    steps_axis(axes, steps)
    axes.set_title(attack["name"], fontsize=10)


def band(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[float],
    deviations: Sequence[float],
    scale: Scale,
    label: str,
    **style: Any,
) -> None:
    """A curve of a metric as people read it, and one deviation on both sides."""
    middle = [scale.plotted(v) for v in values]
    axes.plot(x, middle, label=label, markersize=4, **style)
    low, high = ([m + s * scale.width(d) for m, d in zip(middle, deviations, strict=True)] for s in (-1, 1))
    if scale.error:  # on a logarithmic axis nothing lies below zero
        low = [max(v, m / 2) for v, m in zip(low, middle, strict=True)]
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def metric_axis(axes: Axes, scale: Scale, what: str, chance: float | None = None) -> None:
    """The vertical axis: all of 0 … 100 %, or the logarithm of an error; a dotted line at chance."""
    if chance is not None:
        axes.axhline(scale.plotted(chance), color="#777777", linewidth=1.2, linestyle=":", label="chance")
    if scale.error:
        axes.set_yscale("log")
        axes.get_yaxis().set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
        axes.get_yaxis().set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.get_yaxis().set_major_locator(matplotlib.ticker.LogLocator(10, (1, 2, 5)))
    else:
        axes.set_ylim(-2, 102)
    axes.set_ylabel(f"{what} {scale.titled}")
    axes.grid(alpha=0.25)


def steps_axis(axes: Axes, steps: Sequence[int]) -> None:
    """The horizontal axis: the attacker's steps, evenly where they double."""
    axes.set_xscale("symlog", linthresh=max(1, steps[1]))
    axes.set_xticks(steps[::-2][::-1] if len(steps) > 6 else steps)
    axes.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.get_xaxis().set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlim(0, steps[-1] * 1.05)
    axes.set_xlabel("fine-tuning steps")


COMMON = ("iteration", "original", "restricted", "strength", "rolled_back")  # in every defence's checks


def protection_curves(checks: Sequence[Mapping[str, float]], floor: float | None, scale: Scale) -> bytes:
    """What happened while the model was protected: original and restricted metric at every check, and breaches; beside
    them whatever else the defence noted (losses, residuals, sparsity)."""
    others = [n for n in dict.fromkeys(k for c in checks for k in c) if n not in COMMON]
    figure = Figure(figsize=(9.4 if others else 5.2, 3.7), layout="constrained")
    axes, *beside = figure.subplots(1, 2 if others else 1, squeeze=False)[0]
    for key, colour, label in (
        ("original", "#009E73", "original (validation)"),
        ("restricted", "#0072B2", "restricted, after a probing fine-tuning"),
    ):
        points = [(c["iteration"], scale.plotted(c[key])) for c in checks if key in c]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.6, **dot(points))
    breaches = [
        (c["iteration"], scale.plotted(c["original"])) for c in checks if c.get("rolled_back") and "original" in c
    ]
    if breaches:
        axes.plot(*zip(*breaches, strict=True), "x", color="#CC3311", label="breach: gone back")
    if floor is not None:
        axes.axhline(scale.plotted(floor), color="#009E73", linestyle=":", linewidth=1, label="tolerance")
    metric_axis(axes, scale, "original, restricted")
    axes.set_xlabel("iteration")
    axes.legend(loc="best", fontsize=8, frameon=False)
    for other in beside:
        for name in others:
            points = [(c["iteration"], c[name]) for c in checks if name in c]
            other.plot(*zip(*points, strict=True), label=name, **dot(points))
        other.set_yscale("symlog", linthresh=1e-2)
        other.set_xlabel("iteration")
        other.legend(loc="best", fontsize=8, frameon=False)
        other.grid(alpha=0.25)
    return png(figure)


def dot(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """A marker for what is but a point or two, and would not be seen as a line."""
    return {"marker": "o", "markersize": 4} if len(points) < 3 else {}


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
