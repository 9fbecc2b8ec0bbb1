"""Recipes: one YAML file a run, validated into frozen dataclasses before any work begins."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

from holdfast.audit import AuditSpec
from holdfast.defences.registry import DEFENCES, Defence, defence_class
from holdfast.defences.sophon import Sophon
from holdfast.domains import DomainSpec
from holdfast.errors import UserError, require, unknown
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture
from holdfast.runtime import Compile
from holdfast.selfsupervised import SelfSupervision
from holdfast.tasktable import TASKS

PRETRAIN = FineTuning("scratch", optimiser="adam", lr=1e-3, schedule="cosine", batch_size=64, steps=1000)


@dataclass(frozen=True)
class RuntimeSpec:
    """`device`: auto, cpu, cuda. `precision`: auto, float32, bf16. `compile`: by `torch.compile`, or `graphs`: recorded
    as CUDA graphs too. `checkpointing`: activations are computed anew in
    the backward pass, for less memory and a third more work. `shard`: the processes of torchrun hold one model together
    while it is protected, instead of one each. `jobs`: audit processes (default: one a core).
    `ray`: address of a Ray cluster for the audit instead, or `local`.
    `threads`: of pre-training and protection (default: one for small networks, else torch's choice)."""

    device: str = "auto"
    precision: str = "auto"
    compile: Compile = False
    checkpointing: bool = False
    shard: bool = False
    jobs: int | None = None
    ray: str | None = None
    threads: int | None = None
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(
            self.precision in ("auto", "float32", "bf16"),
            f"precision must be auto, float32 or bf16, but got '{self.precision}'",
        )
        for name in ("jobs", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, but got {value}")


@dataclass(frozen=True)
class Recipe:
    """A whole run. `task`: classification or denoising (diffusion models); None for what the model is made for.
    `weights`: a file or bundle folder to start from, `timm` for timm's published weights, `diffusers` for those of a
    checkpoint `diffusers:…`, or None to pre-train from scratch on the original domain; with `timm`, `pretrain`
    fine-tunes them to it. `self_supervised`: pre-train without labels. `benign`: a third domain, to which fine-tuning
    should stay possible."""

    original: DomainSpec
    restricted: DomainSpec
    benign: DomainSpec | None = None
    name: str = "run"
    description: str = ""
    task: str | None = None
    seed: int = 0
    model: Architecture = field(default_factory=Architecture)
    weights: str | None = None
    pretrain: FineTuning = PRETRAIN
    self_supervised: SelfSupervision | None = None
    defence: Any = field(default_factory=Sophon)
    audit: AuditSpec = field(default_factory=AuditSpec)
    runtime: RuntimeSpec = field(default_factory=RuntimeSpec)
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise unknown("task", self.task, TASKS)
        require(
            self.self_supervised is None or self.weights is None,
            "self_supervised pre-trains from scratch; it cannot go with weights",
        )
        require(
            self.self_supervised is None or (self.pretrain.augment == "none" and not self.pretrain.mixup),
            "self_supervised makes views of its own; it cannot go with pretrain.augment or pretrain.mixup",
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; `load` of it gives the same recipe."""
        value = asdict(replace(self, model=replace(self.model, factory=None)))
        value["model"].pop("factory")
        value["defence"] = {"name": self.defence_name, **asdict(self.defence)}
        return value

    @property
    def defence_name(self) -> str:
        """The defence's name in the table."""
        return next(n for n, c in DEFENCES.items() if isinstance(self.defence, c))

    @property
    def defence_object(self) -> Defence:
        """The defence, typed."""
        found: Defence = self.defence
        return found


def load_recipe(source: str | Path, preset: str | None = None, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path, or by name (`sophon/mnist-usps`), lay a preset and `key=value` changes over it, validate.

    Raises `UserError`: one line with the key at fault.
    """
    return parse_recipe(read_recipe(source), preset, changes, find_recipe(source).name)


def read_recipe(source: str | Path) -> dict[str, Any]:
    """The mapping in a recipe's file, not yet validated; `UserError` where there is none."""
    path = find_recipe(source)
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    require(isinstance(raw, dict), f"{path} is no recipe: expected a mapping of keys, such as 'original: digits[0-4]'")
    presets = raw.get("presets") or {}
    require(
        isinstance(presets, dict) and all(isinstance(n, str) for n in presets),
        f"{path}: presets must be a mapping from names to what they lay over the recipe",
    )
    return dict(raw)


def parse_recipe(
    raw: Mapping[str, Any], preset: str | None = None, changes: Sequence[str] = (), where: str = "recipe"
) -> Recipe:
    """Validate a mapping; see `load_recipe`."""
    from pydantic import TypeAdapter, ValidationError

    merged = apply_changes(choose_preset(raw, preset, where), changes)
    for key in ("original", "restricted", "benign"):
        if isinstance(merged.get(key), str):
            merged[key] = {"data": merged[key]}
    defence = merged.pop("defence", {"name": "sophon"})
    defence = {"name": defence} if isinstance(defence, str) else {} if defence is None else defence
    require(
        isinstance(defence, Mapping),
        f"{where}: defence: expected a name or a mapping with a 'name', but got {defence!r}",
    )
    defence = dict(defence)
    cls = defence_class(str(defence.pop("name", "sophon")))
    try:
        built = TypeAdapter(cls).validate_python(defence)
    except ValidationError as error:
        raise _explain(error, where, "defence", [f.name for f in fields(cls)]) from None
    if isinstance(merged.get("pretrain"), Mapping):
        merged["pretrain"] = {**asdict(PRETRAIN), **merged["pretrain"]}
    try:
        recipe: Recipe = TypeAdapter(Recipe).validate_python({**merged, "defence": built})
    except ValidationError as error:
        raise _explain(error, where) from None
    _refuse_flags({**merged, "defence": defence}, recipe, where)
    return recipe


def _refuse_flags(given: Any, built: Any, where: str, *path: str) -> None:
    """`UserError` where true or false was given and became a number: pydantic makes 1.0 of `lr: true`."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            inner = built.get(name) if isinstance(built, Mapping) else getattr(built, str(name), None)
            _refuse_flags(value, inner, where, *path, str(name))
    elif isinstance(given, list | tuple) and isinstance(built, list | tuple):
        for value, inner in zip(given, built, strict=False):
            _refuse_flags(value, inner, where, *path)
    elif isinstance(given, bool) and isinstance(built, int | float) and not isinstance(built, bool):
        raise UserError(f"{where}: {'.'.join(path)}: expected a number, but got {str(given).lower()}")


def choose_preset(raw: Mapping[str, Any], preset: str | None, where: str = "recipe") -> dict[str, Any]:
    """The recipe with one of its `presets` laid over it: `preset`, else the recipe's own `preset`."""
    merged = copy.deepcopy(dict(raw))
    presets = merged.pop("presets", None) or {}
    default = merged.pop("preset", None)
    name = preset or default
    if name is None:
        return merged
    if not isinstance(presets, Mapping) or name not in presets:
        raise unknown(f"preset of {where}", name, presets or ["(none)"])
    laid = {} if presets[name] is None else presets[name]
    require(isinstance(laid, Mapping), f"{where}: preset '{name}' must be a mapping of keys, but got {laid!r}")
    return overlay(merged, laid)


def overlay(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`, mapping by mapping. Another defence takes the place of one: it has other fields."""
    for key, value in top.items():
        if key == "defence" and isinstance(value, Mapping) and _another(base.get(key), value.get("name")):
            base[key] = copy.deepcopy(dict(value))
        elif isinstance(value, Mapping) and isinstance(base.get(key), dict):
            base[key] = overlay(base[key], value)
        else:
            base[key] = copy.deepcopy(value)
    return base


def _another(defence: Any, name: Any) -> bool:
    """Whether `name` is that of another defence than the section's."""
    return isinstance(defence, dict) and name is not None and name != defence.get("name", "sophon")


def apply_changes(raw: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Apply `section.key=value`; the value is read as YAML."""
    for change in changes:
        key, sign, text = change.partition("=")
        require(bool(sign and key.strip()), f"--set expects key=value, such as audit.seeds=5, but got '{change}'")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {key}: '{text}' is not a YAML value") from None
        target = raw
        *sections, last = key.strip().split(".")
        for section in sections:
            inner = target.setdefault(section, {})
            if isinstance(inner, str) and section in ("original", "restricted", "benign"):
                inner = target[section] = {"data": inner}
            if isinstance(inner, str) and section == "defence":
                inner = target[section] = {"name": inner}
            require(isinstance(inner, dict), f"--set {key}: '{section}' is a value, not a section")
            target = inner
        if sections == ["defence"] and last == "name" and _another(target, value):
            target.clear()
        target[last] = value
    return raw


MEMBER = re.compile(r"(bool|int|float|str|literal\[.*)$")  # of a union, as pydantic names it


def _explain(error: Any, where: str, prefix: str = "", valid: Sequence[str] = ()) -> UserError:
    """pydantic's first complaint as one line: the key, what was expected, what came. `valid`: the section's keys."""
    errors = error.errors()
    first = errors[0]
    # A value that fits no member of a union has an error for each, with the member's name at the end of its place.
    alike = [e for e in errors if e["loc"] and e["loc"][:-1] == first["loc"][:-1] and MEMBER.match(str(e["loc"][-1]))]
    place = first["loc"][:-1] if len(alike) > 1 else first["loc"]
    key = ".".join([prefix, *(str(p) for p in place)]).strip(".")
    others = len(errors) - max(1, len(alike))
    more = f" (and {others} more)" if others else ""
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        if valid:
            return UserError(f"{where}: {unknown('key', key, [f'{prefix}.{n}' for n in valid])}{more}")
        return UserError(f"{where}: unknown key '{key}'{more}; see docs/recipes.md for the valid keys")
    if first["type"] in ("missing", "missing_argument"):
        return UserError(f"{where}: '{key}' is missing{more}")
    message = str(first["msg"]).removeprefix("Value error, ")
    shown = ""
    if first["type"] != "value_error":
        message = re.split(", unable to|, got a| or an instance of", message)[0].replace("Input should be", "expected")
        for theirs, ours in (("a dictionary", "a mapping"), ("a valid dictionary", "a mapping"), ("tuple", "list")):
            message = message.replace(theirs, ours)
        for other in alike[1:]:
            message += f" or {str(other['msg']).removeprefix('Input should be ')}"
        shown = f", but got {first['input']!r}"
    return UserError(f"{where}: {key or 'recipe'}: {message}{shown}{more}")


def recipe_folders() -> list[Path]:
    """Where recipes by name are looked for: the working folder's, the source tree's, the installed package's."""
    here = Path(__file__).resolve()
    folders = (Path("recipes"), here.parents[2] / "recipes", here.parent / "_recipes")
    return [f for f in folders if f.is_dir()]


def list_recipes() -> dict[str, Path]:
    """Name → path of every recipe that ships."""
    found: dict[str, Path] = {}
    for folder in recipe_folders():
        for path in sorted(folder.rglob("*.yaml")):
            found.setdefault(str(path.relative_to(folder).with_suffix("")), path.resolve())
    return found


def find_recipe(source: str | Path) -> Path:
    """A path that exists, or a shipped recipe's name; `UserError` otherwise."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    shipped = list_recipes()
    name = str(source).removeprefix("recipes/").removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise UserError(f"recipe not found: {source}{hint}; expected a YAML file, or one of: {', '.join(sorted(shipped))}")
