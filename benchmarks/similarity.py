"""How alike two domains are, against what a defence did: `python benchmarks/similarity.py RUN [RUN …]`.

For each run MMD² and the proxy A-distance between the original and the restricted domain, on up to 500 validation
images of each, in what goes into the clean model's head; beside them SLC-AUC of the clean and of the protected model;
over three or more runs, the rank correlation of each measure with each area.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

from holdfast.domains import ImageData
from holdfast.features import Tap
from holdfast.inputs import Inputs
from holdfast.pipeline import load_model
from holdfast.recipes import parse_recipe
from holdfast.separation import a_distance, mmd

IMAGES = 500


@torch.no_grad()
def features(model: torch.nn.Module, layer: str, data: ImageData, inputs: Inputs) -> Tensor:
    """What goes into the head, (n, …), of up to `IMAGES` images."""
    images, _ = data.batch(
        torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:IMAGES], inputs.runtime
    )
    with Tap(model, layer) as tap:
        model(images)
    return tap.value.float().flatten(1)


def measure(run: Path) -> dict[str, float | str]:
    """One run's row."""
    recipe = parse_recipe(json.loads((run / "run.json").read_text())["recipe"])
    inputs = Inputs(recipe)
    model = inputs.runtime.place(load_model(run / "clean", inputs.architecture)).eval()
    layer = inputs.architecture.head(model, len(inputs.original.classes))[0]
    ours, theirs = (features(model, layer, d.validation, inputs) for d in (inputs.original, inputs.restricted))
    scale = torch.cat([ours, theirs]).std(0) + 1e-6
    restricted = json.loads((run / "summary.json").read_text())["restricted"]
    areas = {s["attack"]: s["auc"] for s in [restricted["slc"], *restricted["slc_others"]]}
    return {
        "pair": f"{recipe.original.data} → {recipe.restricted.data}",
        "MMD²": mmd(ours / scale, theirs / scale).item(),
        "A-distance": a_distance(ours, theirs),
        "clean": next(iter(areas.values()))["clean"]["mean"],
        **{f"protected ({name})": a["protected"]["mean"] for name, a in areas.items()},
    }


def main() -> None:
    """Print the table and the correlations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    rows = [measure(run) for run in parser.parse_args().runs]
    names = [n for n in rows[0] if n != "pair"]
    print("| pair | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for row in rows:
        print(f"| {row['pair']} | " + " | ".join(f"{row[n]:+.2f}" for n in names) + " |")
    for measure_name in names[:2] if len(rows) > 2 else ():
        for area in names[2:]:
            found = spearmanr([r[measure_name] for r in rows], [r[area] for r in rows])
            print(
                f"{measure_name} against SLC-AUC of {area}: rank correlation {found.statistic:+.2f}, {len(rows)} runs"
            )


if __name__ == "__main__":
    main()
