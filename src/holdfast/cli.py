"""The command line: `holdfast run | pretrain | protect | audit | report | compare | tune | demo | list`."""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin starve other processes

from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.bundle import is_bundle, is_pipeline, load_bundle
from holdfast.comparison import check_comparison, plan_comparison, run_comparison
from holdfast.diffusion.pipelines import SCHEME
from holdfast.distributed import current
from holdfast.errors import require, unknown
from holdfast.exits import exit_with
from holdfast.files import RunFolder
from holdfast.inputs import Inputs, Pixels
from holdfast.listing import LISTS, listing
from holdfast.pipeline import Run
from holdfast.progress import Reporter
from holdfast.recipes import Recipe, load_recipe, parse_recipe

app = typer.Typer(
    name="holdfast",
    help="Protect a pre-trained model against fine-tuning to a restricted domain; audit whether the protection holds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"holdfast {metadata.version('holdfast')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None: ...


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped name: `holdfast list recipes`.")
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The run's folder: new, or this run's own.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as audit.seeds=5. Repeatable."),
]
Preset = Annotated[
    str | None, typer.Option("--preset", metavar="NAME", help="Lay one of the recipe's presets over it, such as paper.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what has begun in --out.")]
Jobs = Annotated[
    int | None, typer.Option("--jobs", "-j", help="Audit processes, one thread each. Default: one a core.")
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="ADDRESS", help="Run the audit on a Ray cluster: auto, HOST:PORT, ray://…, or local."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def _load(
    recipe: str, preset: str | None, changes: list[str] | None, jobs: int | None = None, ray: str | None = None
) -> Recipe:
    return load_recipe(recipe, preset, [*(changes or []), *_workers(jobs, ray)])


def _workers(jobs: int | None, ray: str | None) -> list[str]:
    """Options for the audit's workers, as changes of a recipe."""
    given = {"runtime.jobs": jobs, "runtime.ray": ray}
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]


def _stage(run: Run, stage: str) -> None:
    """Run one stage of the chain in the folder's lock, after all input has been read."""
    run.inputs.check()
    with run.claim():
        getattr(run, stage)()


@app.command()
def run(
    recipe: RecipeArgument,
    out: Out,
    preset: Preset = None,
    changes: Set = None,
    resume: Resume = False,
    jobs: Jobs = None,
    ray: Ray = None,
    quiet: Quiet = False,
) -> None:
    """The whole chain: pre-train where needed, protect, audit, report."""
    work = Run(Inputs(_load(recipe, preset, changes, jobs, ray)), out, resume, Reporter(quiet))
    _headlines(work.all(), out)


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    resume: Resume = False,
    jobs: Jobs = None,
    quiet: Quiet = False,
    changes: Set = None,
) -> None:
    """The whole chain on built-in digits in a few minutes: 0-4 are kept, 5-9 are restricted."""
    _headlines(Run(Inputs(_load("demo", None, changes, jobs)), out, resume, Reporter(quiet)).all(), out)


@app.command()
def pretrain(
    recipe: RecipeArgument,
    out: Out,
    preset: Preset = None,
    changes: Set = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Train the recipe's model on the original domain; the clean model goes to DIR/clean."""
    work = Run(Inputs(_load(recipe, preset, changes)), out, resume, Reporter(quiet))
    _stage(work, "pretrain")
    typer.echo(f"clean model: {work.clean_folder}")


@app.command()
def protect(
    recipe: RecipeArgument,
    out: Out,
    preset: Preset = None,
    changes: Set = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Protect the recipe's model; the bundle to release goes to DIR/bundle."""
    work = Run(Inputs(_load(recipe, preset, changes)), out, resume, Reporter(quiet))
    _stage(work, "protect")
    typer.echo(f"protected model: {work.bundle_folder}")


@app.command()
def audit(
    out: Out,
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="The recipe of a run, or what to audit a checkpoint with."),
    ] = None,
    protected: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Somebody's protected weights: safetensors, state dict, bundle or pipeline folder."
        ),
    ] = None,
    clean: Annotated[str | None, typer.Option(metavar="PATH", help="Its weights before protection.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Their model: small_conv, unet2d, a timm name, module:factory; a bundle or pipeline knows.",
        ),
    ] = None,
    original: Annotated[
        str | None, typer.Option(metavar="DATA", help="Original domain, such as cifar10[0-4]; for intactness.")
    ] = None,
    restricted: Annotated[
        str | None, typer.Option(metavar="DATA", help="Restricted domain, such as cifar10[5-9].")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Input size in pixels.")] = None,
    preset: Preset = None,
    changes: Set = None,
    resume: Resume = False,
    jobs: Jobs = None,
    ray: Ray = None,
    quiet: Quiet = False,
) -> None:
    """Attack a protected model beside two controls, and report. Needs a RECIPE, or --protected with --clean.

    Own run: holdfast audit RECIPE --out DIR.
    A checkpoint: holdfast audit --protected P.safetensors --clean C.safetensors --model resnet18 --size 32
    --original "cifar10[0-4]" --restricted "cifar10[5-9]" --out DIR.
    """
    sections = {"model.name": model, "model.size": size, "original": original, "restricted": restricted}
    given = [f"{k}={json.dumps(v)}" for k, v in {**sections, "weights": clean}.items() if v is not None]
    if recipe is not None:
        loaded = _load(recipe, preset, [*given, *(changes or [])], jobs, ray)
    else:
        require(
            bool(protected and clean and restricted),
            "audit needs a RECIPE, or all of --protected, --clean and --restricted",
        )
        raw: dict[str, Any] = {"name": "audit of a checkpoint", "original": original or restricted}
        raw["model"] = _model_of(clean, protected)
        loaded = parse_recipe(raw, None, [*given, *(changes or []), *_workers(jobs, ray)], "audit")
    if protected:
        require(loaded.weights not in (None, "timm"), "--protected needs --clean: the same model's unprotected weights")
    has_original = protected is None or recipe is not None or original is not None
    work = Run(Inputs(loaded, protected, has_original), out, resume, Reporter(quiet))
    _stage(work, "audit")
    _headlines(work.report(), out)


def _model_of(*paths: str | None) -> dict[str, Any]:
    """The `model` section that a bundle or a pipeline of diffusers among `paths` knows; empty where none is one."""
    for path in paths:
        if path is not None and is_pipeline(Path(path).expanduser()) and not is_bundle(Path(path)):
            return {"name": f"{SCHEME}{path}"}
        if path is not None and is_bundle(Path(path)):
            arch = load_bundle(Path(path)).architecture
            return {n: getattr(arch, n) for n in ("name", "size", "channels", "mean", "std", "options")}
    return {}


@app.command()
def report(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder of a run that was audited.")],
) -> None:
    """Write the report of an audited run anew, from its records alone."""
    from holdfast.report.write import write_report

    require(out.is_dir(), f"folder not found: {out}")
    require(RunFolder(out).manifest.is_file(), f"{out} holds no run of holdfast (no run.json)")

    def write() -> dict[str, Any]:
        with RunFolder(out).lock():
            return write_report(out)

    _headlines(current().agreed(write), out)


@app.command()
def compare(
    recipe: RecipeArgument,
    out: Out,
    presets: Annotated[
        str | None, typer.Option("--presets", metavar="A,B,…", help="Which of the recipe's presets. Default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Protections of each, with recipe seeds 0 … n − 1.")] = 1,
    attack: Annotated[
        str | None, typer.Option(metavar="NAME", help="The attack with a column and a figure of its own.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PRESET:]KEY=V1,V2,…",
            help="Each preset, or the one that is named, with each value, as defence.tolerance=0.01,0.05. Repeatable.",
        ),
    ] = None,
    changes: Set = None,
    resume: Resume = False,
    jobs: Jobs = None,
    ray: Ray = None,
    quiet: Quiet = False,
) -> None:
    """Run several presets of a recipe, each a defence, on one clean model; put them into one table."""
    from holdfast.report.compare import as_markdown, write_comparison

    chosen = [p.strip() for p in presets.split(",")] if presets else []
    plans = plan_comparison(recipe, chosen, [*(changes or []), *_workers(jobs, ray)], seeds, out, sweep or [])
    pixels: Pixels = {}
    column = check_comparison(plans, attack, pixels)
    found = run_comparison(plans, resume, Reporter(quiet), pixels)
    table = current().agreed(lambda: as_markdown(write_comparison(out, found, column, plans[0].recipe.name)))
    typer.echo(f"\n{table}\n{(out / 'comparison.md').resolve()}")


@app.command()
def tune(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE…", help="One or more: the validation pairs.")],
    out: Out,
    space: Annotated[
        list[str], typer.Option(metavar="KEY=…", help="What is searched: defence.spread=0.25..4, defence.close=2,4.")
    ],
    trials: Annotated[int, typer.Option(help="How many settings are tried.")] = 20,
    preset: Preset = None,
    changes: Set = None,
    resume: Resume = False,
    jobs: Jobs = None,
    ray: Ray = None,
    quiet: Quiet = False,
) -> None:
    """Search a defence's hyper-parameters against the audit of one or more recipes."""
    from holdfast.tuning import Tuning, as_table, parse_axis

    axes, who = [parse_axis(s) for s in space], _workers(jobs, ray)
    search = Tuning(recipes, axes, out, preset, changes or [], who, Reporter(quiet))
    typer.echo(f"\n{as_table(search.run(trials, resume))}\n{(out / 'tune.json').resolve()}")


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(metavar="WHAT", help=", ".join(LISTS))],
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object, name → summary.")] = False,
) -> None:
    """What there is: defences, attacks, edits, batteries, domains, models, recipes."""
    if what not in LISTS:
        raise unknown("list", what, LISTS)
    found = listing(what)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    width = min(40, max(map(len, found), default=0))
    for name, text in found.items():
        typer.echo(f"{name:<{width}}  {text}".rstrip())


def _headlines(summary: dict[str, Any], out: Path) -> None:
    from holdfast.report.words import headlines

    typer.echo("\n".join(["", *headlines(summary), f"report       {(out / 'report.html').resolve()}"]))


def main() -> None:
    """Entry point; see `exits.exit_with`."""
    exit_with(app)


if __name__ == "__main__":
    main()
