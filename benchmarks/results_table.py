"""Print the tables of `docs/results` from finished runs: `python benchmarks/results_table.py RUN [RUN …]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from holdfast.report.words import cost


def read(run: Path, name: str) -> Any:
    """A JSON file of a run."""
    return json.loads((run / name).read_text())


def points(value: float | None) -> str:
    """A metric in per cent."""
    return "–" if value is None else f"{100 * value:.1f}"


def table(run: Path, first: int | None = None) -> str:
    """One run as Markdown, with the `first` strongest attacks (default: all)."""
    summary, recipe = read(run, "summary.json"), read(run, "run.json")["recipe"]
    facts = next(reversed(read(run, "provenance.json").values()))
    restricted, intact = summary["restricted"], summary["intactness"]
    worst = restricted["worst_case"]
    lines = [
        f"### {recipe['name']}, {recipe['defence'].get('suppression', recipe['defence']['name'])}: "
        f"*{summary['verdict']}*",
        "",
        f"Original accuracy {points(intact['before'])} → {points(intact['after'])} % (ratio {intact['ratio']:.3f}). "
        f"Worst case on restricted test data: protected **{points(worst['protected']['final'])}** "
        f"(`{worst['protected']['attack']}`), clean {points(worst['clean']['final'])}, scratch "
        f"{points(worst['scratch']['final'])}; chance {points(restricted['chance'])}. Along the way: "
        f"{points(worst['protected']['along_the_way'])}, {points(worst['clean']['along_the_way'])}, "
        f"{points(worst['scratch']['along_the_way'])}.",
        "",
        f"| attack, {restricted['attacks'][0]['steps'][-1]} steps | scratch | clean | protected | recovery | "
        "cost ratio | protected − scratch, 95 % | alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kept = first or len(restricted["attacks"])
    for attack in restricted["attacks"][:kept]:
        cells = [
            f"{points(attack[m][-1])} ± {points(attack['deviation'][m][-1])}" for m in ("scratch", "clean", "protected")
        ]
        gap = " … ".join(f"{100 * v:+.1f}" for v in attack["interval"]) if attack["interval"] else "–"
        recovery = "–" if attack["recovery"] is None else f"{100 * attack['recovery']:.0f}"
        name = attack["name"] + (" (simulated)" if attack["simulated"] else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {recovery} | {cost(attack)} | {gap} | {attack['verdict']} |")
    hardware, versions, model, spent = facts["hardware"], facts["versions"], recipe["model"], summary["cost"]
    left = len(restricted["attacks"]) - kept
    if left:
        held = sum(a["verdict"] == "held" for a in restricted["attacks"][kept:])
        lines.append(f"| {left} weaker attacks, of which {held} held | | | | | | | |")
    lines += ["", *more(summary)]
    lines += [
        "",
        f"{model['name']}, {model['channels']}×{model['size']}×{model['size']}; "
        f"seed {facts['run_seed']}, audit seeds {', '.join(map(str, facts['audit_seeds']))}; adversary "
        f"{facts['restricted']['adversary']} images, test {facts['restricted']['test']}; protection "
        f"{spent['protect_seconds']:.0f} s, audit {spent['audit_seconds']:.0f} s of processor time; "
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['precision']}; torch {versions['torch']}, timm "
        f"{versions['timm']}; source {facts['revision']}.",
        "",
    ]
    return "\n".join(lines)


def more(summary: dict[str, Any]) -> list[str]:
    """SLC-AUC, the third domain, the searches, and failing checks, where there are any."""
    said = []
    undone, slc = summary["restricted"]["undone"], summary["restricted"]["slc"]
    if undone:
        said.append(
            f"Undone by {' and '.join(undone['edits'])}: {100 * undone['gain']:.1f} points {undone['measured']}."
        )
    if slc:
        areas = {m: f"{slc['auc'][m]['mean']:+.2f}" for m in ("protected", "clean")}
        said.append(
            f"SLC-AUC over {slc['images'][0]} to {slc['images'][-1]} images: protected {areas['protected']}, "
            f"clean {areas['clean']}."
        )
    if summary["benign"]:
        b = summary["benign"]
        said.append(
            f"Third domain: protected {points(b['protected'][-1])}, clean {points(b['clean'][-1])}, scratch "
            f"{points(b['scratch'][-1])} ({'kept' if b['kept'] else 'not kept'})."
        )
    spent = {m: f"{v['tries']} tries, {v['steps']} steps" for m, v in summary["search"].items()}
    said += [f"Searches: {'; '.join(f'{m} {v}' for m, v in spent.items())}."] if spent else []
    said += [f"Failing check: {c['name']} ({c['message']})." for c in summary["checks"] if not c["passed"]]
    return said


def main() -> None:
    """Print a table for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--first", type=int, help="only so many attacks, the strongest")
    given = parser.parse_args()
    for run in given.runs:
        print(table(run, given.first))


if __name__ == "__main__":
    main()
