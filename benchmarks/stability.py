"""Suppression loss over iterations (SOPHON, Figure 14): `python benchmarks/stability.py RUN`, a comparison's folder.

Reads the TensorBoard curves of every preset and seed, prints for each how many iterations were not finite or jumped,
and draws them, failures included, into `RUN/figures/stability.png`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from holdfast.report.figures import png

JUMP = 10.0  # from one iteration to the next by this factor, and by more than a tenth: an abrupt change
LEAST = 0.1


def curve(run: Path, name: str = "protect/fts") -> tuple[list[int], list[float]]:
    """Iterations and values of a scalar of a run's protection."""
    events = EventAccumulator(str(run / "protection" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars(name)
    return [p.step for p in points], [p.value for p in points]


def failures(values: list[float]) -> dict[str, int]:
    """How often a loss was not finite, and how often it jumped."""
    pairs = [(abs(a), abs(b)) for a, b in itertools.pairwise(values) if math.isfinite(a) and math.isfinite(b)]
    jumps = sum(max(p) > JUMP * max(min(p), 1e-12) and max(p) > LEAST for p in pairs)
    return {"not finite": sum(not math.isfinite(v) for v in values), "jumps": jumps}


def main() -> None:
    """Print one line a run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    folder = parser.parse_args().run
    runs = sorted(p.parent for p in folder.glob("seed-*/*/protection"))
    if not runs:
        parser.error(f"{folder} holds no comparison (expected seed-S/PRESET/protection)")
    names = sorted({r.name for r in runs})
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))
    for run in runs:
        steps, values = curve(run)
        print(json.dumps({"preset": run.name, "seed": run.parent.name, **failures(values), "last": values[-1]}))
        axes = panels[run.name]
        (line,) = axes.plot(steps, [abs(v) if math.isfinite(v) else math.nan for v in values], linewidth=1.2)
        broken = [s for s, v in zip(steps, values, strict=True) if not math.isfinite(v)]
        axes.plot(broken, [1.0] * len(broken), "x", color=line.get_color())
    for name, axes in panels.items():
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_title(f"{name} (×: not finite)", fontsize=10)
        axes.set_xlabel("iteration")
        axes.set_ylabel("suppression loss, absolute")
        axes.grid(alpha=0.25)
    path = folder / "figures" / "stability.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png(figure))
    print(path)


if __name__ == "__main__":
    main()
