"""Batteries: named, versioned lists of attacks, without knobs. Only the budget in steps is the recipe's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

from holdfast.errors import require, unknown
from holdfast.finetuning import FineTuning


@dataclass(frozen=True)
class Attack:
    """A name and the strategy that the adversary follows."""

    name: str
    tuning: FineTuning
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "an attack needs a name")


@dataclass(frozen=True)
class Battery:
    """Attacks under a name and a version; a change of content is a new version."""

    name: str
    version: int
    summary: str
    attacks: tuple[Attack, ...]

    @property
    def title(self) -> str:
        """`quick-v1`."""
        return f"{self.name}-v{self.version}"

    def within(self, steps: int) -> tuple[Attack, ...]:
        """The attacks, each with a budget of `steps` optimiser steps."""
        return tuple(replace(a, tuning=replace(a.tuning, steps=steps)) for a in self.attacks)


def _attack(strategy: str, suffix: str = "", **changes: Any) -> Attack:
    return Attack(strategy + suffix, FineTuning.named(strategy, **changes))


# SOPHON, Table 1: momentum 0.9, lr 1e-4, batch 200, weight decay 1e-4.
_PAPER = (_attack("direct+all"), _attack("initFC+FC"), _attack("initFC+all"))
_ADAM: dict[str, Any] = {"optimiser": "adam", "lr": 1e-3, "weight_decay": 0.0}
_STRONG = (
    _attack("direct+all", " · adam 1e-3", **_ADAM),
    _attack("initFC+all", " · adam 1e-3", **_ADAM),
    _attack("direct+all", " · momentum 1e-2", lr=1e-2),
    _attack("initFC+all", " · momentum 1e-2", lr=1e-2),
    Attack("last-2+all · adam 1e-3", FineTuning.named("last-k+all", k=2, **_ADAM)),
)

BATTERIES: Mapping[str, Battery] = MappingProxyType(
    {
        b.name: b
        for b in (
            Battery("paper-default", 1, "the three strategies of SOPHON's Table 1 at its default attack", _PAPER),
            Battery(
                "quick",
                1,
                "paper-default and five stronger: Adam, larger steps, layers anew",
                _PAPER + _STRONG,
            ),
        )
    }
)


def battery(name: str) -> Battery:
    """A battery by name; `UserError` lists the valid ones."""
    if name not in BATTERIES:
        raise unknown("battery", name, BATTERIES)
    return BATTERIES[name]
