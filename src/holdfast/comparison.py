"""Several defences in one table: the presets of one recipe, on the same clean model, data, attacks and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from holdfast.errors import UserError, require
from holdfast.inputs import Inputs
from holdfast.pipeline import Run
from holdfast.progress import Reporter
from holdfast.recipes import Recipe, find_recipe, load_recipe


@dataclass(frozen=True)
class Plan:
    """One run of a comparison. `first`: the run of the same seed that pre-trains, and whose controls serve all."""

    preset: str
    seed: int
    recipe: Recipe
    folder: Path
    first: Path


def presets_of(source: str | Path) -> list[str]:
    """The presets of a recipe, in its order."""
    raw = yaml.safe_load(find_recipe(source).read_text())
    found = raw.get("presets") if isinstance(raw, dict) else None
    return list(found or {})


def plan_comparison(
    source: str | Path, presets: Sequence[str], changes: Sequence[str], seeds: int, out: Path
) -> list[Plan]:
    """Every preset × protection seed, folder `out/seed-S/PRESET`. `UserError` where presets differ in more than the
    defence."""
    known = presets_of(source)
    chosen = list(presets) or known
    require(bool(chosen), f"{source} has no presets to compare; each lays a `defence` over the recipe")
    require(len(set(chosen)) == len(chosen), f"a preset is named twice: {', '.join(chosen)}")
    require(seeds >= 1, f"a comparison needs at least 1 seed, but got {seeds}")
    plans = []
    for seed in range(seeds):
        recipes = [load_recipe(source, p, [*changes, f"seed={seed}"]) for p in chosen]
        for preset, recipe in zip(chosen[1:], recipes[1:], strict=True):
            differ = _differences(recipes[0], recipe)
            if differ:
                raise UserError(
                    f"presets {chosen[0]} and {preset} differ in {', '.join(differ)}; only the defence may differ"
                )
        folder = out / f"seed-{seed}"
        for preset, recipe in zip(chosen, recipes, strict=True):
            plans.append(Plan(preset, seed, recipe, folder / preset, folder / chosen[0]))
    return plans


def _differences(first: Recipe, second: Recipe) -> list[str]:
    ours, theirs = first.as_dict(), second.as_dict()
    return [n for n in ours if n not in ("defence", "name", "description") and ours[n] != theirs[n]]


def run_comparison(
    plans: Sequence[Plan], resume: bool = False, reporter: Reporter | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Run what is left to run; returns the summaries of each preset, seed by seed."""
    reporter = reporter or Reporter(quiet=True)
    for plan in plans:
        reporter.say(f"— {plan.preset}, seed {plan.seed} —")
        recipe, controls = plan.recipe, None
        if plan.folder != plan.first:
            recipe, controls = replace(recipe, weights=str(plan.first / "clean")), plan.first
        done = Run(Inputs(recipe), plan.folder, resume or plan.folder.exists(), reporter, controls)
        done.all()
    return read_comparison(plans)


def read_comparison(plans: Sequence[Plan]) -> dict[str, list[dict[str, Any]]]:
    """The summaries of finished runs, by preset."""
    from holdfast.files import read_json

    found: dict[str, list[dict[str, Any]]] = {}
    for plan in plans:
        found.setdefault(plan.preset, []).append(read_json(plan.folder / "summary.json"))
    return found
