"""Several defences in one table: the presets of one recipe, on the same clean model, data, attacks and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.audit import applicable, by_reason
from holdfast.defences.registry import Identity
from holdfast.distributed import current
from holdfast.errors import UserError, require, unknown
from holdfast.files import read_json
from holdfast.inputs import Inputs, Pixels
from holdfast.pipeline import Run
from holdfast.progress import Reporter
from holdfast.recipes import Recipe, load_recipe, read_recipe

TAKEN = ("..", "clean", "pretraining")  # in the folder of a seed


@dataclass(frozen=True)
class Plan:
    """One run of a comparison. `base`: the folder of its seed, whose `clean/` all presets start from; `first`: the run
    of the same seed whose controls serve all."""

    preset: str
    seed: int
    recipe: Recipe
    folder: Path
    base: Path
    first: Path


def presets_of(source: str | Path) -> list[str]:
    """The presets of a recipe, in its order."""
    return list(read_recipe(source).get("presets") or {})


def plan_comparison(
    source: str | Path,
    presets: Sequence[str],
    changes: Sequence[str],
    seeds: int,
    out: Path,
    sweeps: Sequence[str] = (),
) -> list[Plan]:
    """Every preset × protection seed, folder `out/seed-S/PRESET`. `UserError` where presets differ in more than the
    defence.

    `sweeps`: `defence.FIELD=V1,V2,…`, then every preset with each value, as `PRESET@FIELD=V`; or `PRESET:defence.…` for
    one of them, whose strength has another name.
    """
    known = presets_of(source)
    chosen = list(presets) or known
    require(bool(chosen), f"{source} has no presets to compare; each lays a `defence` over the recipe")
    for name in chosen:
        require(
            bool(name) and Path(name).name == name and name not in TAKEN,
            f"a compared preset is named as its folder: not empty, without /, and none of {', '.join(TAKEN)}; got "
            f"'{name}'",
        )
    require(len(set(chosen)) == len(chosen), f"a preset is named twice: {', '.join(chosen)}")
    require(seeds >= 1, f"a comparison needs at least 1 seed, but got {seeds}")
    require(
        not any(c.strip().startswith("seed=") for c in changes),
        "a comparison has the seeds 0 … n − 1; give --seeds N instead of seed=…",
    )
    require(
        not any(c.partition("=")[0].strip() in ("defence", "defence.name") for c in changes),
        "each preset of a comparison names its own defence: choose by --presets, or add a preset to the recipe; "
        "defence.name=… would run one defence under the names of others",
    )
    plans = []
    swept = _sweeps(sweeps, chosen)
    named = [(f"{p}{label}", p, extra) for p in chosen for label, extra in swept[p]]
    labels = [label for label, _, _ in named]
    for seed in range(seeds):
        recipes = [load_recipe(source, p, [*changes, *extra, f"seed={seed}"]) for _, p, extra in named]
        for preset, recipe in zip(labels[1:], recipes[1:], strict=True):
            differ = _differences(recipes[0], recipe)
            if differ:
                raise UserError(
                    f"presets {labels[0]} and {preset} differ in {', '.join(differ)}; only the defence may differ"
                )
        folder = out / f"seed-{seed}"
        for preset, recipe in zip(labels, recipes, strict=True):
            plans.append(Plan(preset, seed, recipe, folder / preset, folder, folder / labels[0]))
    return plans


def _sweeps(sweeps: Sequence[str], presets: Sequence[str]) -> dict[str, list[tuple[str, list[str]]]]:
    """For each preset what is added to its name, and the change, for each value; one of neither without a sweep."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for sweep in sweeps:
        before, colon, after = sweep.partition(":")
        whose, rest = (before.strip(), after) if colon and "=" not in before else ("", sweep)
        require(
            not whose or whose in presets,
            f"no preset '{whose}' is compared, which '{sweep}' would sweep; valid: {', '.join(presets)}",
        )
        require(whose not in found, f"{whose or 'every preset'} is swept twice; the second time by '{sweep}'")
        found[whose] = _swept(rest, sweep)
    return {p: found.get(p) or found.get("") or [("", [])] for p in presets}


def _swept(sweep: str, given: str) -> list[tuple[str, list[str]]]:
    key, _, text = sweep.partition("=")
    key, values = key.strip(), listed(text)
    require(
        key.startswith("defence.") and key not in ("defence.", "defence.name") and bool(values) and "/" not in text,
        "a sweep is defence.FIELD=V1,V2,… such as defence.tolerance=0.01,0.02,0.05, or PRESET:defence.FIELD=…; got "
        f"'{given}'",
    )
    require(len(set(values)) == len(values), f"a value is swept twice: {text}")
    field = key.removeprefix("defence.")
    return [(f"@{field}={v}", [f"{key}={v}"]) for v in values]


def listed(text: str) -> tuple[str, ...]:
    """Values between commas, each as it was written; commas within brackets part nothing."""
    found, depth = [""], 0
    for sign in text:
        depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and depth == 0:
            found.append("")
        else:
            found[-1] += sign
    values = tuple(v.strip() for v in found)
    return values if all(values) else ()


def _differences(first: Recipe, second: Recipe) -> list[str]:
    ours, theirs = first.as_dict(), second.as_dict()
    return [n for n in ours if n not in ("defence", "name", "description") and ours[n] != theirs[n]]


def check_comparison(plans: Sequence[Plan], attack: str | None = None, pixels: Pixels | None = None) -> str:
    """Find bad input before hours of work: the data and the model once, the classes for every defence, the attack.

    Returns the attack with a column and a figure of its own: `attack`, or the recipe's first, else the battery's, that
    can be run on this model and these domains. `pixels`: as `Inputs`'.
    """
    inputs = Inputs(plans[0].recipe, pixels={} if pixels is None else pixels)
    inputs.check()
    classes = len(inputs.head_classes)
    for plan in plans:
        model = inputs.runtime.place(inputs.architecture.build(classes))
        try:
            plan.recipe.defence_object.check(inputs.given(model))
        except UserError as error:
            raise UserError(f"preset {plan.preset}: {error}") from None
    audit = plans[0].recipe.audit
    run, left_out = applicable(audit.all_attacks(), inputs.bench({"clean": model.state_dict()}))
    names = [a.name for a in run]
    require(bool(names), f"no attack of this audit can be run: {by_reason(left_out)}")
    if attack in left_out:
        raise UserError(f"{attack} cannot be run here ({left_out[attack]}); valid: {', '.join(names)}")
    if attack is not None and attack not in names:
        raise unknown("attack of this comparison", attack, names)
    return attack or next((a.name for a in audit.attacks if a.name in names), names[0])


def run_comparison(
    plans: Sequence[Plan], resume: bool = False, reporter: Reporter | None = None, pixels: Pixels | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Run what is left to run; returns the summaries of each preset, seed by seed. `pixels`: as `Inputs`'; the data are
    decoded once a seed."""
    reporter = reporter or Reporter(quiet=True)
    pixels = {} if pixels is None else pixels
    seed = plans[0].seed
    for plan in plans:
        if plan.seed != seed:  # other images: nobody asks for those before again
            pixels.clear()
            seed = plan.seed
        # No preset's own, so that it does not matter which comes first; claimed, so that no other recipe's is taken.
        recipe = replace(plan.recipe, defence=Identity(), name="clean model", description="")
        clean = Run(Inputs(recipe, pixels=pixels), plan.base, resume, reporter)
        with clean.claim():
            clean.pretrain()
        reporter.say(f"— {plan.preset}, seed {plan.seed} —")
        controls = plan.first if plan.folder != plan.first else None
        going = resume or not plan.folder.exists()
        given = Inputs(plan.recipe, pixels=pixels)
        Run(given, plan.folder, going, reporter, controls, plan.base / "clean").all()
    return current().agreed(lambda: read_comparison(plans))


def read_comparison(plans: Sequence[Plan]) -> dict[str, list[dict[str, Any]]]:
    """The summaries of finished runs, by preset."""
    found: dict[str, list[dict[str, Any]]] = {}
    for plan in plans:
        found.setdefault(plan.preset, []).append(read_json(plan.folder / "summary.json"))
    return found
