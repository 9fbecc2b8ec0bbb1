"""The table of defences. A defence that is not here does not exist for the command line or the contract test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from torch import nn

from holdfast.defences.base import Given
from holdfast.defences.lockout import Lockout
from holdfast.defences.ntl import NTL
from holdfast.defences.ntp import NTP
from holdfast.defences.reverse_maml import ReverseMAML
from holdfast.defences.skd import SKD
from holdfast.defences.sophon import Sophon
from holdfast.defences.unsir import UNSIR
from holdfast.domains import Domain, ImageData
from holdfast.errors import unknown
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture, State, load_state
from holdfast.progress import Reporter
from holdfast.runtime import Runtime
from holdfast.snapshots import History
from holdfast.tasks import Task
from holdfast.workplace import Workplace


class Defence(Protocol):
    """A frozen dataclass whose fields are hyper-parameters, all with defaults."""

    measures: ClassVar[bool]  # whether `measure` finds anything

    def simulates(self, tuning: FineTuning, edits: Sequence[Any] = ()) -> bool:
        """Whether the defence trained against this strategy: the report tells such attacks from unseen ones."""
        ...

    def check(self, given: Given, build: bool = True) -> None:
        """`UserError` where the defence cannot work with this network, these data or classes; before any work begins.
        May change `given.model`; without `build` nothing else as large is built."""
        ...

    def measure(self, given: Given, restricted: ImageData) -> Mapping[str, float]:
        """What the defence's paper reports of a model beside its metric, by name; see `Guarded.measure`."""
        ...

    def protect(
        self,
        model: nn.Module,
        original: Domain,
        restricted: ImageData,
        *,
        restricted_classes: int,
        architecture: Architecture,
        task: Task,
        runtime: Runtime,
        seed: int = 0,
        identity: str = "",
        workplace: Workplace | None = None,
    ) -> History:
        """Protect `model` in place; see `Sophon.protect`."""
        ...


@dataclass(frozen=True)
class Identity:
    """No defence at all: the negative control. An audit that does not report it as *failed* is broken."""

    measures: ClassVar[bool] = False
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def simulates(self, tuning: FineTuning, edits: Sequence[Any] = ()) -> bool:
        """It simulates nothing."""
        return False

    def check(self, given: Given, build: bool = True) -> None:
        """Any will do."""

    def measure(self, given: Given, restricted: ImageData) -> Mapping[str, float]:
        """Nothing."""
        return {}

    def protect(self, model: nn.Module, original: Domain, restricted: ImageData, **_: Any) -> History:
        """Leave the model as it is."""
        return History()


DEFENCES: Mapping[str, type[Any]] = MappingProxyType(
    {
        "sophon": Sophon,
        "ntp": NTP,
        "skd": SKD,
        "reverse-maml": ReverseMAML,
        "ntl": NTL,
        "unsir": UNSIR,
        "lockout": Lockout,
        "identity": Identity,
    }
)


def measure_states(
    defence: Defence, given: Given, states: Mapping[str, State], restricted: ImageData, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """`defence.measure` of `given.model` with each of `states`, by their names; the last stays loaded. Nothing for a
    defence that measures nothing."""
    if not defence.measures:
        return {}
    found = {}
    with reporter.bar("measure", len(states)) as bar:
        for name, state in states.items():
            load_state(given.model, state)
            found[name] = {n: round(v, 6) for n, v in defence.measure(given, restricted).items()}
            bar.advance(name)
    return found


def defence_class(name: str) -> type[Any]:
    """The dataclass behind a defence's name; `UserError` lists the valid ones."""
    if name not in DEFENCES:
        raise unknown("defence", name, DEFENCES)
    return DEFENCES[name]
