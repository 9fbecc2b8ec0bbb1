"""Batteries: named, versioned lists of attacks, without knobs. Only the budget in steps is the recipe's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from holdfast.attacks.attack import Attack, Search
from holdfast.attacks.diffusion import AnotherSchedule, AnotherTarget, PriorPreservation
from holdfast.attacks.preparation import BenignFirst, Distil, Heal
from holdfast.attacks.standardise import Standardise
from holdfast.attacks.structure import EarlierLayer, FoldBatchNorm, LeakyActivations
from holdfast.attacks.weights import BatchNormStatistics, Clip, Noise, Rebalance, Regrow, ShiftBiases, Shuffle
from holdfast.errors import require, unknown
from holdfast.finetuning import FineTuning


@dataclass(frozen=True)
class Battery:
    """Attacks under a name and a version; a change of content, or of how its attacks are searched, is a new version."""

    name: str
    version: int
    summary: str
    attacks: tuple[Attack, ...]
    probes: bool = False  # whether every layer is probed as well: see `limits`

    @property
    def title(self) -> str:
        """`quick-v1`."""
        return f"{self.name}-v{self.version}"

    def holds(self, inner: Battery) -> bool:
        """Whether all of another one's attacks are in this one, each as it is there."""
        own = {a.name: a for a in self.attacks}
        return all(own.get(a.name) == a for a in inner.attacks) and self.probes >= inner.probes

    def within(self, steps: int) -> tuple[Attack, ...]:
        """The attacks, each with its share of a budget of `steps` optimiser steps."""
        return tuple(a.within(steps) for a in self.attacks)


def _attack(strategy: str, suffix: str = "", *edits: Any, **changes: Any) -> Attack:
    own = {n: changes.pop(n) for n in ("search", "budget", "fraction", "informed") if n in changes}
    return Attack(strategy + suffix, FineTuning.named(strategy, **changes), edits, **own)


# Defaults: momentum 0.9, lr 1e-4, batch 200, weight decay 1e-4, over 20 epochs of 25,000 images.
_TABLE_1 = (_attack("direct+all"), _attack("initFC+FC"), _attack("initFC+all"))

# SOPHON, Table 5. Learning rates are not stated there for this table: torch's own for those that adapt them.
_TABLE_5 = (
    _attack("direct+all", " · nesterov", optimiser="nesterov"),
    _attack("direct+all", " · adagrad", optimiser="adagrad", lr=1e-2),
    _attack("direct+all", " · adadelta", optimiser="adadelta", lr=1.0),
    _attack("direct+all", " · adam", optimiser="adam", lr=1e-4),
)
# Tables 6 and 7; lr 1e-4 and batch 200 are the default attack. 20 epochs are more steps of smaller batches.
_TABLE_6 = tuple(_attack("direct+all", f" · lr {lr:g}", lr=lr) for lr in (5e-6, 1e-5, 1e-3, 1e-2))
_TABLE_7 = tuple(
    _attack("direct+all", f" · batch {size}", batch_size=size, budget=200 / size) for size in (50, 100, 150, 250)
)

_ADAM: dict[str, Any] = {"optimiser": "adam", "lr": 1e-3, "weight_decay": 0.0}
_SWEEP = Search()
# Adadelta's natural learning rate is 1: its sweep goes on to 10.
_ADADELTA = Search(lr=(1.0, 1e-1, 1e-2, 10.0, 1e-3, 1e-4, 1e-5))


# Decoupled decay is what tells AdamW from Adam; 1e-4 for momentum is the paper's.
DECAY = {"momentum": 1e-4, "sam": 1e-4, "adamw": 1e-2}


def _swept(strategy: str, optimiser: str, **changes: Any) -> Attack:
    search = _ADADELTA if optimiser == "adadelta" else _SWEEP
    given = {"optimiser": optimiser, "lr": 1e-3, "search": search, "weight_decay": DECAY.get(optimiser, 0.0), **changes}
    return _attack(strategy, f" · {optimiser} swept", **given)


def _warmed(strategy: str) -> Attack:
    return replace(
        _swept(strategy, "adamw", schedule="cosine", warmup=10), name=f"{strategy} · adamw · warm-up · cosine · swept"
    )


def _edited(label: str, *edits: Any, strategy: str = "initFC+all", **changes: Any) -> Attack:
    tuned = _attack(strategy, "", *edits, **{**_ADAM, **changes})
    return replace(tuned, name=f"{label} → {strategy}")


def _both(label: str, *edits: Any, strategy: str = "initFC+all") -> tuple[Attack, ...]:
    """Edited weights under both kinds of optimiser, each at its own best learning rate."""
    swept = (_swept(strategy, o) for o in ("adam", "momentum"))
    return tuple(replace(a, name=f"{label} → {a.name}", edits=edits) for a in swept)


# Balancing changes no function, so it costs nothing to do it first.
_BALANCED_LAST = _attack("last-k+all", " · last 2 · adam 1e-3", Rebalance(), k=2, **_ADAM)
_BALANCED_LAST = replace(_BALANCED_LAST, name=f"rebalanced → {_BALANCED_LAST.name}")

_QUICK = (
    *_TABLE_1,
    _swept("direct+all", "adam"),
    _swept("initFC+all", "adam"),
    _swept("initFC+all", "momentum"),
    _BALANCED_LAST,
    *_both("rebalanced", Rebalance()),
    _edited("rebalanced + leaky + biases shifted", Rebalance(), LeakyActivations(), ShiftBiases()),
    # In evaluation mode: running statistics enter no training step in which the whole network trains.
    _edited("BatchNorm re-estimated", BatchNormStatistics(), strategy="initFC+FC", lr=1e-2),
)

FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)  # and 1, the whole: NTP's axis for SLC-AUC
_DATA = (
    _attack("initFC+all", " · adam 1e-3", **_ADAM),
    *(_attack("initFC+all", f" · adam 1e-3 · {f:.0%} of data", fraction=f, **_ADAM) for f in FRACTIONS),
)

_OPTIMISERS = ("momentum", "adam", "adamw", "adagrad", "adadelta", "sam")
_STANDARD = (
    *_TABLE_1,
    *(_swept("direct+all", o) for o in _OPTIMISERS),
    *(_swept("initFC+all", o) for o in _OPTIMISERS),
    _warmed("initFC+all"),
    _attack("direct+all", " · adam 1e-3", **_ADAM),
    _attack("direct+all", " · adam 1e-3 · 4× budget", budget=4.0, **_ADAM),
    _attack("initFC+all", " · adam 1e-3 · 4× budget", budget=4.0, **_ADAM),
    *(_attack("last-k+all", f" · last {k} · adam 1e-3", k=k, **_ADAM) for k in (2, 3)),
    _swept("initFC+FC", "adam"),
    *(_edited(f"probe {k} layers down", EarlierLayer(k), strategy="initFC+FC", search=_SWEEP) for k in (2, 3)),
    _swept("initFC+LoRA", "adam"),
    _edited("BatchNorm re-estimated", BatchNormStatistics(), strategy="initFC+FC", lr=1e-2),
    _edited("BatchNorm reset", BatchNormStatistics(how="reset")),
    _edited("BatchNorm folded", FoldBatchNorm()),
    *_both("rebalanced", Rebalance(), strategy="direct+all"),
    *_both("rebalanced", Rebalance()),
    _BALANCED_LAST,
    _edited("singular values clipped", Clip()),
    _edited("leaky", LeakyActivations()),
    _edited("standardised", Standardise(), search=_SWEEP),
    _edited("biases shifted", ShiftBiases()),
    _edited("noise", Noise()),
    _edited("regrown", Regrow()),
    *_both("shuffled", Shuffle()),  # what scales alone are worth
    _edited("healed", Heal(), strategy="direct+all", search=_SWEEP),
    _edited("healed", Heal(), search=_SWEEP),
    _edited("benign first", BenignFirst()),
    _edited("distilled", Distil()),
    _attack("initFC+all", " · adam 1e-3 · shifts", augment="shift", **_ADAM),
    _attack("initFC+all", " · adam 1e-3 · mixup", mixup=0.2, **_ADAM),
    *_DATA,
)

# What someone would try who has read how the defences of this field work.
_JOINT = Search(
    trials=16,
    optimiser=("adam", "adamw", "momentum", "adadelta"),
    initialise=("head", "last-k"),
    k=(1, 2, 3),
    batch_size=(50, 200),
    edits=(
        (),
        (Rebalance(),),
        (LeakyActivations(), ShiftBiases()),
        (BatchNormStatistics(how="reset"),),
        (Standardise(),),
        (Noise(scale=0.3), Rebalance()),
    ),
)
_INFORMED = (
    # Suppression by simulation: start where no simulated adversary started, and go where none went.
    _attack("initFC+all", " · everything searched", informed=True, search=_JOINT, **_ADAM),
    _edited("strong noise + healed", Heal(noise=0.5, budget=1.0), strategy="direct+all", informed=True),
    # Dead features: restart below them, or read above them.
    *(
        _attack("last-k+all", f" · last {k} · adam swept", k=k, informed=True, search=_SWEEP, **_ADAM)
        for k in (2, 3, 4)
    ),
    _edited("leaky 0.3 + biases shifted", LeakyActivations(0.3), ShiftBiases(), informed=True),
    # Features that hardly vary: make them vary.
    _edited("standardised", Standardise(), strategy="direct+all", search=_SWEEP, informed=True),
    _edited("standardised", Standardise(), strategy="initFC+FC", search=_SWEEP, informed=True),
    _edited("standardised + leaky", Standardise(), LeakyActivations(), search=_SWEEP, informed=True),
    _edited("probe 4 layers down", EarlierLayer(4), strategy="initFC+FC", lr=1e-2, informed=True),
    _edited("cut 2 layers down", EarlierLayer(2), strategy="initFC+all", informed=True),
    # Pruning: prune's mask gone, and weights that ADMM shrank made large again.
    _edited("regrown + rebalanced", Regrow(), Rebalance(), informed=True),
    _edited("everything undone", FoldBatchNorm(), Rebalance(), LeakyActivations(), ShiftBiases(), informed=True),
)

# NTP's own experiment, fine-tuning on shares of the data with the mask kept, and beside it the one that it left out.
_MASK = tuple(
    _attack("initFC+all", f" · mask {how}{share}", fraction=f, keep_zeros=how == "kept", **_ADAM)
    for how in ("kept", "ignored")
    for f, share in ((1.0, ""), *((f, f" · {f:.0%} of data") for f in FRACTIONS))
)

# Diffusion models: no head to re-initialise (SOPHON, §5.2.2), so every strategy begins with the whole network.
_FEW = (0.01, 0.05, 0.2)
_GENERATION_QUICK = (
    _attack("direct+all"),
    *(_swept("direct+all", o) for o in ("adam", "momentum")),
    _swept("direct+LoRA", "adam"),
    _attack("direct+all", " · adam 1e-3 · averaged weights", ema=0.99, **_ADAM),
    _edited("another noise schedule", AnotherSchedule(), strategy="direct+all"),
    _edited("another prediction target", AnotherTarget(), strategy="direct+all"),
)
_GENERATION = (
    _attack("direct+all"),
    *(_swept("direct+all", o) for o in _OPTIMISERS),
    _warmed("direct+all"),
    _attack("direct+all", " · adam 1e-3", **_ADAM),
    _attack("direct+all", " · adam 1e-3 · 4× budget", budget=4.0, **_ADAM),
    *(_attack("last-k+all", f" · last {k} · adam 1e-3", k=k, **_ADAM) for k in (2, 3)),
    _swept("direct+LoRA", "adam"),
    *(_attack("direct+all", f" · adam 1e-3 · {f:.0%} of data", fraction=f, **_ADAM) for f in _FEW),
    _attack("direct+LoRA", " · adam 1e-3 · 1% of data", fraction=0.01, **_ADAM),
    *(
        _edited(f"DreamBooth, {f:.0%} of data", PriorPreservation(), strategy="direct+all", fraction=f)
        for f in _FEW[:2]
    ),
    *(_attack("direct+all", f" · adam 1e-3 · averaged weights {d}", ema=d, **_ADAM) for d in (0.9, 0.99)),
    _edited("another noise schedule", AnotherSchedule(), strategy="direct+all"),
    _edited("another prediction target", AnotherTarget(), strategy="direct+all"),
    _edited("singular values clipped", Clip(), strategy="direct+all"),
    _edited("noise", Noise(), strategy="direct+all"),
    _edited("regrown", Regrow(), strategy="direct+all"),
    _edited("healed", Heal(), strategy="direct+all"),
    _edited("benign first", BenignFirst(), strategy="direct+all"),
    _attack("direct+all", " · adam 1e-3 · shifts and flips", augment="shift+flip", **_ADAM),
)

# For recipes that repeat somebody's own evaluation. Whatever it says, no claim rests on it: see `checks`. Its attacks
# are not ours to count, but how they are searched is: the version says that (2: `searches`, until all is even).
OWN = Battery("own", 2, "none but the recipe's own attacks", ())

BATTERIES: Mapping[str, Battery] = MappingProxyType(
    {
        b.name: b
        for b in (
            OWN,
            Battery("slc", 1, "NTP's sample-wise learning curve, with the mask kept and ignored", _MASK),
            Battery("paper-default", 1, "the three strategies of SOPHON's Table 1 at its default attack", _TABLE_1),
            Battery(
                "paper",
                1,
                "every setting of SOPHON's §5.2–5.7: Tables 1, 5, 6, 7",
                _TABLE_1 + _TABLE_5 + _TABLE_6 + _TABLE_7,
            ),
            Battery("quick", 3, "paper-default, swept learning rates and the cheapest edits: minutes", _QUICK),
            Battery("standard", 4, "what any claim must face: six optimisers swept, every edit", _STANDARD, True),
            Battery(
                "generation-quick",
                2,
                "for diffusion models: swept rates, LoRA, EMA, schedule, target",
                _GENERATION_QUICK,
            ),
            Battery(
                "generation", 2, "for diffusion models, what any claim must face: `standard` without heads", _GENERATION
            ),
            Battery("adaptive", 4, "standard, and an attacker who knows the defence", _STANDARD + _INFORMED, True),
        )
    }
)


def lies_within(inner: Any, outer: str) -> bool:
    """Whether the battery of one title lies within that of another, as this release knows them; each in itself."""
    by_title = {b.title: b for b in BATTERIES.values()}
    return inner == outer or (inner in by_title and outer in by_title and by_title[outer].holds(by_title[inner]))


def battery(name: str) -> Battery:
    """A battery by name, or by name and version (`quick-v3`); `UserError` lists the valid ones."""
    plain, sign, version = name.rpartition("-v")
    if sign and plain in BATTERIES and version.isdigit():
        found = BATTERIES[plain]
        require(found.version == int(version), f"this release has {found.title}, not {name}")
        return found
    if name not in BATTERIES:
        raise unknown("battery", name, BATTERIES)
    return BATTERIES[name]
