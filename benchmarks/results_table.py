"""Print the tables of `docs/results` from finished runs: `python benchmarks/results_table.py RUN [RUN …]`.

With `--rows` one line a run, to compare protections: what is left of the original, the attacker who chooses best along
the way and at the end, all attacks taken alone, what the layers know, and a third domain. Folders without a finished
audit, such as a comparison's `clean`, are left out and named.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from holdfast.report.words import cost
from holdfast.scales import scale_of
from holdfast.statistics import mean


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


COLUMNS = (
    "",
    "verdict",
    "original",
    "along the way: scratch, clean, protected",
    "at the end",
    "protected − scratch, 95 %: along the way",
    "at the end",
    "attacks *held* taken alone, of those that tell",
    "above the same from scratch beyond chance, at the end",
    "protected − scratch under the same attack, mean of all (clean)",
    "SLC-AUC (clean's)",
    "probes, mean of the layers: random, clean, protected",
    "third domain, − clean: along the way, end",
)


def row(run: Path) -> str:
    """One run as a line of the table whose head is `COLUMNS`."""
    summary, name = read(run, "summary.json"), f"{run.name}, seed {read(run, 'run.json')['recipe']['seed']}"
    restricted, intact, benign = summary["restricted"], summary["intactness"], summary["benign"]
    worst, attacks = restricted["worst_case"], restricted["attacks"]
    alone, scale = [a["verdict"] for a in attacks], scale_of(restricted["metric"])

    def ahead(key: str, interval: str) -> str:
        difference = scale.difference(worst["protected"][key] - worst["scratch"][key])
        return f"{difference} ({scale.interval(worst[interval])})" if worst[interval] else difference

    def apart(model: str) -> float:
        """Mean over attacks of the mean over steps, without the first, of a model's difference to scratch."""
        return mean([mean(a[model][1:]) - mean(a["scratch"][1:]) for a in attacks])

    def probed(model: str) -> float:
        return mean([depth[model]["mean"] for depth in summary["limits"]])

    areas = (restricted["slc"] or {}).get("auc", {})
    cells = [
        name,
        summary["verdict"],
        f"{scale.number(intact['before'])} → {scale.number(intact['after'])} ({intact['ratio']:.3f})",
        ", ".join(scale.number(worst[m]["along_the_way"]) for m in ("scratch", "clean", "protected")),
        ", ".join(scale.number(worst[m]["final"]) for m in ("scratch", "clean", "protected")),
        ahead("along_the_way", "interval_along"),
        ahead("final", "interval"),
        f"{alone.count('held')} of {len(alone) - alone.count('inconclusive')}",
        str(sum(bool(a["interval"]) and a["interval"][0] > 0 for a in attacks)),
        f"{scale.difference(apart('protected'))} ({scale.difference(apart('clean'))})",
        f"{areas['protected']['mean']:+.2f} ({areas['clean']['mean']:+.2f})".replace("-", "−") if areas else "–",
        ", ".join(scale.number(probed(m)) for m in ("scratch", "clean", "protected")) if summary["limits"] else "–",
        f"{scale.difference(benign['along_the_way'])}, {scale.difference(benign['difference'])}" if benign else "–",
    ]
    return f"| {' | '.join(cells)} |"


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
    parser.add_argument("--rows", action="store_true", help="one line a run, to compare protections")
    given = parser.parse_args()
    runs = [run for run in given.runs if (run / "summary.json").exists()]
    if not runs:
        parser.error(f"no summary.json of a finished run in any of: {', '.join(map(str, given.runs))}")
    if without := [run.name for run in given.runs if run not in runs]:
        print(f"left out, without a summary.json: {', '.join(without)}", file=sys.stderr)
    if given.rows:
        print(f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(row, runs), sep="\n")
        return
    for run in runs:
        print(table(run, given.first))


if __name__ == "__main__":
    main()
