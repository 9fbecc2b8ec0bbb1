"""Figures of what diffusion models make: error by noise level, strips, samples. PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from holdfast.diffusion.denoising import grid
from holdfast.diffusion.exhibits import ATTACKED, RELEASED
from holdfast.report.figures import LABELS, STYLE, png

Exhibits = Mapping[tuple[str, str], Mapping[str, Tensor]]
TITLES = {"released": "as released", "attacked": "after the attack"}


def draw_exhibits(found: Exhibits) -> dict[str, bytes]:
    """All figures by name; none where there is nothing to show."""
    drawn: dict[str, bytes] = {}
    if not found:
        return drawn
    shown = {"original": [("released", m) for m in RELEASED], "restricted": [("attacked", m) for m in ATTACKED]}
    domains = [d for d, models in shown.items() if all(f"{d}/levels" in found[m] for m in models)]
    if domains:
        drawn["levels"] = level_curves(found, domains)
    if "restricted" in domains:
        drawn["strips-restricted"] = strip(found, "restricted", "attacked", ("scratch", "clean", "protected"))
    if "original" in domains:
        drawn["strips-original"] = strip(found, "original", "released", ("clean", "protected"))
    drawn["samples"] = sample_grids(found)
    return drawn


def level_curves(found: Exhibits, domains: Sequence[str]) -> bytes:
    """MSE over the noise level: original images as released, restricted ones after the attack."""
    figure = Figure(figsize=(5.0 * len(domains), 3.6), layout="constrained")
    panels = figure.subplots(1, len(domains), squeeze=False)[0]
    for axes, domain in zip(panels, domains, strict=True):
        how = "released" if domain == "original" else "attacked"
        for model in RELEASED if how == "released" else ATTACKED:
            errors = found[how, model][f"{domain}/levels"].tolist()
            axes.plot(grid(100, len(errors)), errors, label=LABELS[model], markersize=3, **STYLE[model])
        axes.set_yscale("log")
        axes.set_xlabel("noise level (timestep, per cent of T)")
        axes.set_ylabel("MSE")
        axes.set_title(f"{domain} images, {TITLES[how]}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    return png(figure)


def strip(found: Exhibits, domain: str, how: str, models: Sequence[str]) -> bytes:
    """Images with noise of several levels, and what each model makes of them (SOPHON, Figures 5 and 6)."""
    first = found[how, models[0]]
    levels = len(first[f"{domain}/noisy"])
    rows = [("test image", first[f"{domain}/images"])]
    for level in range(levels):
        rows.append((f"noise {level + 1}", first[f"{domain}/noisy"][level]))
        rows += [(f"  {LABELS[m]}", found[how, m][f"{domain}/denoised"][level]) for m in models]
    count = len(rows[0][1])
    figure = Figure(figsize=(1.8 + 0.55 * count, 0.56 * len(rows) + 0.4), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (label, images) in zip(panels, rows, strict=True):
        axes.imshow(_tiled(images, count), interpolation="nearest")
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
    figure.suptitle(f"{domain} images, models {TITLES[how]}", fontsize=10)
    return png(figure)


def sample_grids(found: Exhibits) -> bytes:
    """Samples from the same noise: as released, and after the attack."""
    plan = [("released", m) for m in RELEASED] + [("attacked", m) for m in ATTACKED]
    figure = Figure(figsize=(2.4 * len(plan), 2.0), layout="constrained")
    for axes, (how, model) in zip(figure.subplots(1, len(plan)), plan, strict=True):
        axes.imshow(_tiled(found[how, model]["samples"], 8), interpolation="nearest")
        axes.set_title(f"{LABELS[model]},\n{TITLES[how]}", fontsize=8)
        axes.axis("off")
    return png(figure)


def _tiled(images: Tensor, columns: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 (n, c, h, w) as one picture (H, W, 3)."""
    joined = make_grid(images.to(torch.uint8), nrow=columns, padding=1, pad_value=255)
    picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = joined.permute(1, 2, 0).numpy().astype(np.uint8)
    return picture
