"""The frontier of a comparison: what a defence keeps of the original domain against what it leaves to an attacker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from holdfast.report.figures import COLOURS, png
from holdfast.scales import Scale

MARKERS = "osD^vP*X"
MEASURED = {"end": "at the end", "along": "along the way"}


def in_order(points: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, Mapping[str, Any]]]:
    """The points of one curve, (`field=value`, standing), as the curve joins them: by the value that was swept, or,
    where one is no number, by intactness. Two values may keep the same of the original; by that alone the curve would
    run back and forth between them."""
    try:
        return sorted(points, key=lambda p: float(p[0].rpartition("=")[2]))
    except ValueError:
        return sorted(points, key=lambda p: float(p[1]["ratio"][0]))


def frontier(rows: Mapping[str, Mapping[str, Any]], clean: Mapping[str, Any], scale: Scale) -> bytes:
    """PNG. Two panels: at the end, along the way. One curve a defence, a point for each value that was swept
    (`defence@field=value`); `rows` and `clean`: what `summary.standing` has found."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2, sharex=True)
    curves: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, found in rows.items():
        defence, _, value = name.partition("@")
        curves.setdefault(defence, []).append((value, found))
    for axes, (key, title) in zip(panels, MEASURED.items(), strict=True):
        heights = [0.0, scale.width(float(clean[key][0]))]
        axes.axhline(0, color="#999999", linestyle=":", linewidth=1.2)
        for i, (defence, points) in enumerate(curves.items()):
            ordered = in_order(points)
            xs = [float(p["ratio"][0]) for _, p in ordered]
            ys = [scale.width(float(p[key][0])) for _, p in ordered]
            heights += ys
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(xs, ys, linewidth=1.4, markersize=5, label=defence if key == "end" else None, **style)  # type: ignore[arg-type]
            for x, y, (value, _) in zip(xs, ys, ordered, strict=True):
                short = value.rpartition("=")[2]
                axes.annotate(short, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7, color="#555555")
        star: dict[str, Any] = {"marker": "*", "markersize": 12, "color": "#555555", "linestyle": ""}
        label = "unprotected" if key == "end" else None
        axes.plot([1.0], [scale.width(float(clean[key][0]))], label=label, **star)
        low, high = min(heights), max(heights)
        room = 0.12 * max(high - low, 1e-6)
        axes.set_ylim(low - room, high + room)
        axes.axhspan(low - room, 0, color="#f1f6f1", zorder=0)  # no better than from scratch
        axes.set_xlabel("intactness: original test metric after ÷ before")
        axes.set_ylabel(f"worst case ahead of scratch, {scale.counted}")
        axes.set_title(title, fontsize=10)
    figure.legend(loc="outside upper center", ncols=min(6, len(curves) + 1), fontsize=8, frameon=False)
    return png(figure)
