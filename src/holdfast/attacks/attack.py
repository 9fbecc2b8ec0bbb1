"""An attack: weight edits first, then a fine-tuning, whose hyper-parameters may be searched for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar

from holdfast.adapters import adaptable_layers
from holdfast.attacks.edits import make_edit
from holdfast.attacks.released import DEFENCE_KNOWN, ORIGINAL_DATA, THIRD_DOMAIN, WEIGHTS_ONLY, Edit, Released
from holdfast.errors import UserError, require
from holdfast.finetuning import MOST_LR, FineTuning

DECADES = (1e-3, 1e-2, 1e-4, 1e-1, 1e-5)  # the likeliest first, so that those after it can be given up early


@dataclass(frozen=True)
class Search:
    """What the attacker tries on restricted validation data before the attack counts.

    First every learning rate of `lr`, then further decades while the best lies at the edge of what was tried (at most
    `extend`; while nothing was learned, to the largest rate there is),
    then `trials` draws of Optuna's TPE sampler over all axes: the learning rate between the extremes tried,
    and whichever of the tuples below hold something. A run is given up (`search.Lagging`) that is more than two points
    behind the median of the whole ones before it, once that median has learned and a quarter of the budget is spent,
    unless its rate is larger than that of the best. Then each model tries what the others chose, and goes on where that
    lies at the edge (`searches`).
    """

    lr: tuple[float, ...] = DECADES
    extend: int = 2
    trials: int = 0
    optimiser: tuple[str, ...] = ()
    initialise: tuple[str, ...] = ()
    k: tuple[int, ...] = ()
    batch_size: tuple[int, ...] = ()
    weight_decay: tuple[float, ...] = ()
    schedule: tuple[str, ...] = ()
    edits: tuple[tuple[Any, ...], ...] = ()
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    AXES: ClassVar[tuple[str, ...]] = ("optimiser", "initialise", "k", "batch_size", "weight_decay", "schedule")

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(tuple(make_edit(e) for e in chain) for chain in self.edits))
        require(bool(self.lr), "search.lr must not be empty")
        require(all(0 < lr <= MOST_LR for lr in self.lr), f"search.lr must lie in (0, {MOST_LR:g}], got {self.lr}")
        require(len(set(self.lr)) == len(self.lr), f"search.lr names a value twice: {self.lr}")
        require(self.extend >= 0, f"search.extend must be at least 0, but got {self.extend}")
        require(self.trials >= 0, f"search.trials must be at least 0, but got {self.trials}")
        given = [n for n in (*self.AXES, "edits") if getattr(self, n)]
        require(
            not given or self.trials > 0,
            f"search.{', search.'.join(given)}: only drawn tries vary these; set search.trials to at least 1",
        )

    def control(self) -> Search:
        """For a model from scratch: the same number of tries, without the axes that only a released model has."""
        return replace(self, initialise=(), k=(), edits=tuple(c for c in self.edits if all(e.fresh for e in c)))


@dataclass(frozen=True)
class Attack:
    """A name, `edits` in order, the strategy `tuning`, and how much of the audit's budget and data it takes.

    `budget`: steps as a multiple of the audit's. `fraction`: share of the adversary's images, at least one a class.
    `informed`: made with a particular defence in mind. `search`: what is tuned on validation data first.
    """

    name: str
    tuning: FineTuning
    edits: tuple[Any, ...] = ()
    search: Search | None = None
    budget: float = 1.0
    fraction: float = 1.0
    informed: bool = False
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "an attack needs a name")
        object.__setattr__(self, "edits", tuple(make_edit(e) for e in self.edits))
        for axis in Search.AXES if self.search else ():
            for value in getattr(self.search, axis):
                _ = replace(self.tuning, **{axis: value})  # raises for a value that no tuning can have
        require(0 < self.budget <= 1000, f"budget must lie in (0, 1000], but got {self.budget}")
        require(0 < self.fraction <= 1, f"fraction must lie in (0, 1], but got {self.fraction}")
        probes = any(e.name == "earlier-layer" for e in self.all_edits() if hasattr(e, "name"))
        require(
            not probes or self.tuning.initialise == "head",
            f"attack '{self.name}': earlier-layer puts a new head on, so its tuning must have initialise: head",
        )

    def all_edits(self) -> tuple[Edit, ...]:
        """Its own, and those that its search may choose."""
        searched = [e for chain in (self.search.edits if self.search else ()) for e in chain]
        return (*self.edits, *searched)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the attacker must have."""
        found = {e.needs for e in self.all_edits()} - {WEIGHTS_ONLY}
        needed = [n for n in (ORIGINAL_DATA, THIRD_DOMAIN) if n in found]
        return tuple(needed + [DEFENCE_KNOWN] * self.informed) or (WEIGHTS_ONLY,)

    @property
    def keeps_head(self) -> bool:
        """Whether it can only be run where the domains have equally many classes."""
        return "keep" in (self.tuning.initialise, *(self.search.initialise if self.search else ()))

    def within(self, steps: int) -> Attack:
        """The attack with its share of a budget of `steps` optimiser steps."""
        return replace(self, tuning=replace(self.tuning, steps=max(2, round(self.budget * steps))))

    def control(self) -> Attack:
        """The same from scratch: baseline B1. Edits stay only where a fresh model would have them too."""
        return replace(
            self,
            name="from scratch",
            tuning=self.tuning.control(),
            edits=tuple(e for e in self.edits if e.fresh),
            search=self.search.control() if self.search else None,
            informed=False,
        )

    def obstacle(self, released: Released) -> str | None:
        """Why it does not apply to this model; None where it does."""
        why = next((why for e in self.edits if (why := e.obstacle(released))), None)
        anew = {self.tuning.initialise, *(self.search.initialise if self.search else ())}
        if why or (self.tuning.train == "all" and anew == {"keep"}):
            return why
        if not released.head() and (anew - {"keep", "last-k"} or self.tuning.train == "head"):
            return "the model has no head"
        if self.tuning.train == "all" and self.tuning.initialise != "last-k":
            return None
        model = released.architecture.build(released.classes)
        if self.tuning.train == "lora":
            if find_spec("peft") is None:
                return "needs peft: pip install 'holdfast[lora]'"
            layers = adaptable_layers(model, self.tuning.rank, released.head())
            return None if layers else f"no layer takes an adapter of rank {self.tuning.rank}"
        try:
            self.tuning.fresh_layers(model, released.architecture, released.classes)
        except UserError as error:
            return str(error)
        return None

    def fitted(self, released: Released) -> Attack:
        """The attack without what its search cannot do to this model: more layers anew than it has."""
        if self.search is None or not self.search.k:
            return self
        last_k = replace(self.tuning, initialise="last-k")
        fits = [k for k in self.search.k if replace(self, tuning=replace(last_k, k=k)).obstacle(released) is None]
        return replace(self, search=replace(self.search, k=tuple(fits)))

    def cost(self) -> str:
        """In words, before anything was run."""
        t = self.tuning
        parts = [f"{t.steps} steps of {t.batch_size} images, {t.optimiser}"]
        parts += [] if self.search else [f"lr {t.lr:g}"]
        parts += [f"{share:g}× the budget to prepare" for e in self.edits if (share := getattr(e, "budget", 0))]
        if self.search:
            tries = len(self.search.lr) + self.search.trials
            parts.append(f"searched in {tries} tries or more")
        return ", ".join(parts)


def attack_facts(attack: Attack) -> dict[str, Any]:
    """An attack as a reader of the report wants it: what it does, what it needs, what it costs."""
    search = attack.search
    return {
        "tuning": asdict(attack.tuning),
        "edits": [{"name": getattr(e, "name", type(e).__name__), "summary": e.summary()} for e in attack.edits],
        "may_edit": bool(attack.all_edits()),
        "revives": any(e.revives for e in attack.edits),
        "needs": list(attack.needs),
        "informed": attack.informed,
        "cost": attack.cost(),
        "fraction": attack.fraction,
        "searched": sorted(search.lr) if search else None,
    }
