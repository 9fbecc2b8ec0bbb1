"""What there is, by name: for `holdfast list`."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from holdfast.attacks.batteries import BATTERIES
from holdfast.attacks.edits import EDITS
from holdfast.defences.registry import DEFENCES, Identity
from holdfast.recipes import list_recipes
from holdfast.sources import known_names
from holdfast.torchvision_sets import TORCHVISION

LISTS = ("defences", "attacks", "edits", "batteries", "domains", "models", "recipes")


def listing(what: str) -> dict[str, str]:
    """Name → one line, of one of `LISTS`."""
    if what == "defences":
        return {n: _first_line(c if c is Identity else sys.modules[c.__module__]) for n, c in DEFENCES.items()}
    if what == "batteries":
        return {n: f"v{b.version}, {len(b.attacks)} attacks: {b.summary}" for n, b in BATTERIES.items()}
    if what == "attacks":
        attacks = {a.name: a for b in BATTERIES.values() for a in b.attacks}
        return {
            n: f"{a.tuning.initialise}, trains {a.tuning.train}; needs {', '.join(a.needs)}" for n, a in attacks.items()
        }
    if what == "edits":
        return {n: f"{c().summary()}; needs {c.needs}" for n, c in EDITS.items()}
    if what == "domains":
        local = {n: "built in" if n == "digits" else "in HOLDFAST_DATA" for n in known_names()}
        remote = {n: f"torchvision {c}, downloaded" for n, (c, _) in TORCHVISION.items()}
        forms = {"PATH": "class folders or Parquet", "hf:NAME": "Hugging Face datasets"}
        return {**remote, **local, **forms}
    if what == "recipes":
        return {n: _describe(p) for n, p in list_recipes().items()}
    import timm

    return {
        "small_conv": "four convolutions, for work on a CPU",
        "unet2d": "a diffusion model: diffusers' UNet2DModel, small by default",
        "diffusers:FOLDER": "a pipeline of diffusers, or HUB/NAME",
        "module:factory": "your own: factory(classes) -> nn.Module",
        **dict.fromkeys(timm.list_models(), "timm"),
    }


def _first_line(documented: object) -> str:
    return (documented.__doc__ or "").strip().split("\n")[0]


def _describe(path: Path) -> str:

    raw = yaml.safe_load(path.read_text())
    return str(raw.get("description", "")).strip().split("\n")[0] if isinstance(raw, dict) else "(no recipe)"
