"""The structure that `docs/design.md` promises: each file imports only files above it."""

import ast
from pathlib import Path

import holdfast

ROOT = Path(holdfast.__file__).parent
ORDER = [
    "errors",
    "files",
    "checkpoints",
    "stopping",
    "sharding",
    "layers",
    "normalisation",
    "distributed",
    "seeding",
    "memory",
    "runtime",
    "progress",
    "ledger",
    "losses",
    "scales",
    "separation",
    "collapse",
    "diffusion.denoisers",
    "tasks",
    "diffusion.denoising",
    "preprocessing",
    "imagesets",
    "parquet",
    "torchvision_sets",
    "sources",
    "domains",
    "diffusion.sampling",
    "models",
    "tasktable",
    "features",
    "pruning",
    "optimisers",
    "training",
    "averaging",
    "adapters",
    "augmentation",
    "corruptions",
    "neighbourhood",
    "finetuning",
    "flops",
    "attacks.released",
    "attacks.chains",
    "attacks.weights",
    "attacks.structure",
    "attacks.standardise",
    "attacks.preparation",
    "attacks.diffusion",
    "attacks.edits",
    "simulation",
    "statistics",
    "metrics",
    "workplace",
    "snapshots",
    "attempts",
    "guard",
    "defences.base",
    "defences.probing",
    "defences.adversaries",
    "defences.sophon",
    "defences.ntp",
    "defences.skd",
    "defences.reverse_maml",
    "defences.ntl",
    "defences.unsir",
    "defences.places",
    "defences.reopening",
    "defences.lockout",
    "defences.registry",
    "attacks.attack",
    "attacks.batteries",
    "records",
    "intactness",
    "cells",
    "limits",
    "diffusion.distances",
    "search",
    "cluster",
    "workers",
    "searches",
    "audit",
    "diffusion.exhibits",
    "controls",
    "measured",
    "checks",
    "judgement",
    "summary",
    "pretraining",
    "selfsupervised",
    "packaging",
    "bundle",
    "diffusion.pipelines",
    "recipes",
    "report.words",
    "report.figures",
    "report.maps",
    "report.pictures",
    "report.frontier",
    "report.write",
    "inputs",
    "protection",
    "listing",
    "pipeline",
    "comparison",
    "report.compare",
    "tuning",
    "exits",
    "cli",
]


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not name.endswith("__init__") and name != "__main__":
            found[name] = path
    return found


def test_every_file_has_its_place() -> None:
    assert sorted(modules()) == sorted(ORDER)


def test_files_import_only_files_above_them() -> None:
    wrong = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("holdfast"):
                base = (node.module or "").removeprefix("holdfast").lstrip(".")
                targets = [base] if base in ORDER else [f"{base}.{a.name}".lstrip(".") for a in node.names]
                wrong += [(name, t) for t in targets if t not in ORDER or ORDER.index(t) >= ORDER.index(name)]
    assert wrong == []


def test_files_stay_readable() -> None:
    long = {n: len(p.read_text().splitlines()) for n, p in modules().items()}
    assert {n: c for n, c in long.items() if c > 330} == {}


def test_no_unsafe_loading() -> None:
    for path in modules().values():
        text = path.read_text()
        assert "weights_only=False" not in text
        assert "import pickle" not in text
        assert "yaml.load(" not in text


def test_documents_are_whole() -> None:
    """Relative links resolve, and nothing is left to be filled in."""
    import re

    root = ROOT.parents[1]
    if not (root / "README.md").exists():
        return
    wrong = []
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md")]:
        text = page.read_text()
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        wrong += [(page.name, link) for link in links if not (page.parent / link).exists()]
        wrong += [(page.name, mark) for mark in re.findall(r"@[A-Z_]+@", text)]
    assert wrong == []
