"""The table of edits. In YAML an edit is its name, or a mapping with `name` and its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from holdfast.attacks.diffusion import AnotherSchedule, AnotherTarget, PriorPreservation
from holdfast.attacks.preparation import BenignFirst, Distil, Heal
from holdfast.attacks.released import Edit
from holdfast.attacks.standardise import Standardise
from holdfast.attacks.structure import EarlierLayer, FoldBatchNorm, LeakyActivations
from holdfast.attacks.weights import BatchNormStatistics, Clip, Noise, Rebalance, Regrow, ShiftBiases, Shuffle
from holdfast.errors import UserError, unknown

EDITS: Mapping[str, type[Any]] = MappingProxyType(
    {
        "rebalance": Rebalance,
        "clip": Clip,
        "noise": Noise,
        "regrow": Regrow,
        "batchnorm": BatchNormStatistics,
        "shift-biases": ShiftBiases,
        "shuffle": Shuffle,
        "fold-batchnorm": FoldBatchNorm,
        "leaky": LeakyActivations,
        "standardise": Standardise,
        "earlier-layer": EarlierLayer,
        "heal": Heal,
        "benign-first": BenignFirst,
        "distil": Distil,
        "another-schedule": AnotherSchedule,
        "another-target": AnotherTarget,
        "prior-preservation": PriorPreservation,
    }
)


def _fields(edit: type[Any]) -> list[str]:
    return [f.name for f in fields(edit) if f.name != "name"]


def make_edit(value: Any) -> Edit:
    """An edit from its name, from a mapping, or as it is. `UserError` for names and fields that do not exist."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        if not hasattr(value, "apply"):
            raise UserError(f"an edit is a name, or a mapping with a name; got {value!r}; valid: {', '.join(EDITS)}")
        found: Edit = value
        return found
    name = str(value.get("name"))
    if name not in EDITS:
        raise unknown("edit", name, EDITS)
    from pydantic import TypeAdapter, ValidationError  # only at this edge

    try:
        made: Edit = TypeAdapter(EDITS[name]).validate_python({**value})
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "unexpected_keyword_argument":
            raise unknown(f"field of edit '{name}':", str(first["loc"][-1]), _fields(EDITS[name])) from None
        where = ".".join(map(str, first["loc"])) or name
        raise UserError(f"edit '{name}': {where}: {str(first['msg']).removeprefix('Value error, ')}") from None
    return made
