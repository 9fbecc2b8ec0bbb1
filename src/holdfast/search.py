"""The attacker's search: hyper-parameters by restricted validation data alone, with Optuna's sampler and pruner."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import optuna

from holdfast.attacks.attack import Attack, Search
from holdfast.cells import Bench, CellSpec, Meter, Prepared, follow, prepare, start
from holdfast.files import fingerprint
from holdfast.finetuning import MOST_LR
from holdfast.metrics import strongest
from holdfast.records import SearchRecord
from holdfast.scales import ACCURACY, Scale
from holdfast.seeding import derive
from holdfast.training import evaluate

SEED = 0  # the audit seed whose data the attacker searches on
LIMITS = (1e-8, MOST_LR)  # of the learning rate
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass
class Tries:
    """What was tried so far, and what it cost."""

    trials: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    samples: int = 0
    flops: float = 0.0
    scale: Scale = ACCURACY
    ready: dict[tuple[Any, ...], Prepared] = field(default_factory=dict)

    def prepared(self, bench: Bench, model: str, attack: Attack) -> Prepared:
        """The edited model: made, and paid for, once for all tries that edit alike."""
        if attack.edits not in self.ready:
            made = prepare(bench, model, attack, SEED)
            self.ready[attack.edits] = made
            self.samples += made.means.samples
            self.flops += made.means.flops
        return self.ready[attack.edits]

    def best(self) -> dict[str, Any] | None:
        """The strongest try that was not given up; None where there is none."""
        whole = [t for t in self.trials if not t["pruned"]]
        return whole[strongest([t["values"] for t in whole], scale=self.scale)] if whole else None

    def learned(self, chance: float) -> bool:
        """Whether any whole try did."""
        best = self.best()
        return best is not None and bool(best["values"][-1] - chance >= self.scale.learns)

    def exhausted(self, chance: float) -> bool:
        """Whether nothing was learned at any decade up to the largest rate there is: then no rate is missing."""
        beyond = self.at_edge(chance)
        return beyond is not None and beyond > LIMITS[1] and not self.learned(chance)

    def at_edge(self, chance: float) -> float | None:
        """Where to look on: ×10 beyond the best learning rate if it is the largest tried, ÷10 if the smallest; None
        where it lies between, or a rate between is as good. Where nothing was learned, beyond the largest: tiny
        gradients need large steps."""
        best = self.best()
        rates = [t["setting"]["lr"] for t in self.trials]
        low, high = min(rates), max(rates)
        if best is None or not self.learned(chance):
            return float(round(high * 10, 12))
        inner = [t for t in self.trials if not t["pruned"] and low < t["setting"]["lr"] < high]
        if any(t["values"][-1] >= best["values"][-1] - self.scale.margin for t in inner):
            return None
        lr = float(best["setting"]["lr"])
        beyond = lr * 10 if lr == high else lr / 10
        return round(beyond, 12)


@dataclass(frozen=True)
class Lagging(optuna.pruners.BasePruner):
    """Give up a run whose best value so far is more than the margin behind the median of the whole ones at this step,
    if that median has learned; never before step `warm_up`, nor with fewer than `startup` whole ones.

    On a plateau at `chance` nobody lags: a defence's delay must not make the attacker give up what takes off late.
    Neither does a run at a larger learning rate than the best whole one's. Small rates that lag stay behind, large ones
    take off late: with Adadelta at 10, 19 % at a quarter of the budget became 61 % at its end, ahead of all others.
    """

    chance: float
    warm_up: int
    startup: int = 2
    scale: Scale = ACCURACY

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether `trial` is to end; see `optuna.pruners.BasePruner`."""
        step, seen = trial.last_step, trial.intermediate_values
        whole = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        values = [t.intermediate_values[step] for t in whole if step in t.intermediate_values] if step else []
        if step is None or step < self.warm_up or len(values) < self.startup:
            return False
        best = max(whole, key=lambda t: t.value if t.value is not None else -math.inf)
        if trial.params.get("lr", 0.0) > best.params.get("lr", math.inf):
            return False
        middle = median(values)
        return middle - self.chance >= self.scale.learns and max(seen.values()) < middle - self.scale.margin


def run_search(bench: Bench, spec: CellSpec) -> SearchRecord:
    """Everything `Search` says, for one model; see there. The last try at the edge is recorded as such."""
    search, tries = _searchable(spec.attack), Tries(scale=bench.task.scale)
    began = time.monotonic()
    steps = bench.curve(spec.attack.tuning.steps)
    chance = bench.task.chance(bench.restricted.validation.labels)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=derive(SEED, "search") % 2**32),
        pruner=Lagging(chance, max(1, spec.attack.tuning.steps // 4), scale=bench.task.scale),
    )

    def attempt(lr: float | None) -> None:
        _try(bench, spec, search, study, tries, steps, lr)

    for lr in search.lr:
        attempt(lr)
    _extend(attempt, search, tries, chance)
    for _ in range(search.trials):
        attempt(None)
    return _recorded(bench, spec, tries, chance, began)


@dataclass(frozen=True, kw_only=True)
class Share(CellSpec):
    """What other models' searches chose, for one that has not seen it to its end: `told` beside `before`, all that it
    tried until then."""

    before: SearchRecord
    told: tuple[dict[str, Any], ...]

    def is_told(self, record: SearchRecord) -> bool:
        """Whether a record is of this."""
        same = record.model == self.model and record.attacks[0] == self.names[0]
        return same and record.before == fingerprint(self.before.trials) and record.told == list(self.told)


def run_share(bench: Bench, share: Share) -> SearchRecord:
    """Every setting that is told to its end, and decades beyond while the best of all tries lies at their edge. The
    record has the tries made here, and what was chosen among all."""
    search, tries = _searchable(share.attack), Tries(list(share.before.trials), scale=bench.task.scale)
    began = time.monotonic()
    steps = bench.curve(share.attack.tuning.steps)
    chance = bench.task.chance(bench.restricted.validation.labels)
    for setting in share.told:
        _run(bench, share, setting, tries, steps)

    def attempt(lr: float) -> None:
        best = tries.best()
        _run(bench, share, {**(best["setting"] if best else share.told[0]), "lr": lr}, tries, steps)

    _extend(attempt, search, tries, chance)
    found = _recorded(bench, share, tries, chance, began)
    own = found.trials[len(share.before.trials) :]
    return replace(found, trials=own, told=list(share.told), before=fingerprint(share.before.trials))


def _searchable(attack: Attack) -> Search:
    if attack.search is None:
        raise ValueError(f"attack '{attack.name}' has nothing to search")
    return attack.search


def _extend(attempt: Callable[[float], None], search: Search, tries: Tries, chance: float) -> None:
    """Further decades while the best lies at the edge, as `Search.extend` allows."""
    for extension in itertools.count():
        beyond = tries.at_edge(chance)
        if beyond is None or not LIMITS[0] <= beyond <= LIMITS[1]:
            break
        # A model that learned nothing is tried at every decade there is: that none helps is then known, not supposed.
        if extension >= search.extend and (search.extend == 0 or tries.learned(chance)):
            break
        attempt(beyond)


def _recorded(bench: Bench, spec: CellSpec, tries: Tries, chance: float, began: float) -> SearchRecord:
    best = tries.best()
    return SearchRecord(
        model=spec.model,
        attacks=list(spec.names),
        trials=tries.trials,
        chosen=best["setting"] if best else {"lr": _searchable(spec.attack).lr[0]},
        edge=tries.at_edge(chance) is not None and not tries.exhausted(chance),
        steps=tries.steps,
        samples=tries.samples,
        flops=tries.flops,
        seconds=round(time.monotonic() - began, 3),
        provenance=bench.provenance,
    )


def resolved(attack: Attack, setting: dict[str, Any]) -> Attack:
    """The attack with what a search chose, and nothing left to search."""
    own = {n: v for n, v in setting.items() if n != "edits"}
    number = int(setting["edits"].partition(":")[0]) if "edits" in setting else 0
    chain = attack.search.edits[number] if attack.search and "edits" in setting else ()
    return replace(attack, tuning=replace(attack.tuning, **own), edits=(*attack.edits, *chain), search=None)


def _try(
    bench: Bench,
    spec: CellSpec,
    search: Search,
    study: optuna.Study,
    tries: Tries,
    steps: list[int],
    lr: float | None,
) -> None:
    """One run at `lr` with everything else as the attack has it; None: as the sampler draws it."""
    if lr is not None:
        study.enqueue_trial({"lr": lr, **{n: c[0] for n, c in axes(spec.attack, search).items()}})
    trial = study.ask()
    tried = [t["setting"]["lr"] for t in tries.trials] + list(search.lr) + ([] if lr is None else [lr])
    low, high = min(tried), max(tried)
    setting: dict[str, Any] = {"lr": trial.suggest_float("lr", low, high, log=True)}
    for name, choices in axes(spec.attack, search).items():
        setting[name] = trial.suggest_categorical(name, choices)

    def lags(step: int, value: float) -> bool:
        trial.report(value, step)
        return step < steps[-1] and trial.should_prune()

    made = _run(bench, spec, setting, tries, steps, lags)
    state = optuna.trial.TrialState.PRUNED if made["pruned"] else optuna.trial.TrialState.COMPLETE
    study.tell(trial, None if made["pruned"] else made["values"][-1], state)


def _run(
    bench: Bench,
    spec: CellSpec,
    setting: dict[str, Any],
    tries: Tries,
    steps: list[int],
    lags: Callable[[int, float], bool] = lambda step, value: False,
) -> dict[str, Any]:
    """One run, measured at `steps`, until `lags` gives it up; it is added to the tries."""
    attack = resolved(spec.attack, setting)
    bench = bench.suited(attack)
    prepared = tries.prepared(bench, spec.model, attack)
    model = start(bench, prepared, SEED)
    architecture, ground = prepared.released.architecture, prepared.ground
    meter = Meter(prepared, attack, bench.runtime, architecture.head(model, ground.classes))
    made, values, pruned = [0], [0.0], False

    def note(step: int, how: str) -> bool:
        nonlocal pruned
        value = evaluate(model, ground.validation, bench.task, bench.runtime)[0]
        if step == 0:
            values[0] = value
            return False
        made.append(step)
        values.append(value)
        late = lags(step, value)
        pruned = how == "running" and late
        return pruned

    result = follow(bench, meter, model, SEED, note)
    tries.steps += result.steps
    tries.samples += meter.samples(result.steps) - meter.samples(0)
    tries.flops += meter.flops(result.steps) - meter.flops(0)
    tries.trials.append({"setting": setting, "steps": made, "values": values, "pruned": pruned})
    return tries.trials[-1]


def fitted(setting: dict[str, Any], chooser: Attack, attack: Attack) -> dict[str, Any]:
    """What `chooser`'s search chose, as `attack` can have it: along its own axes, and where it cannot have what was
    chosen along one (a fresh model has no layers to keep), as it has that itself."""
    found = {"lr": setting["lr"]}
    for name, choices in axes(attack, _searchable(attack)).items():
        wanted = setting.get(name)
        if name == "edits" and wanted is not None:  # numbered among each one's own
            chains = _searchable(attack).edits
            chain = _searchable(chooser).edits[int(wanted.partition(":")[0])]
            wanted = choices[chains.index(chain)] if chain in chains else None
        found[name] = wanted if wanted in choices else choices[0]
    return found


def axes(attack: Attack, search: Search) -> dict[str, list[Any]]:
    """What the sampler may vary beside the learning rate, the attack's own value first."""
    found: dict[str, list[Any]] = {}
    for name in Search.AXES:
        values = getattr(search, name)
        if values:
            found[name] = list(dict.fromkeys((getattr(attack.tuning, name), *values)))
    if search.edits:
        names = [" and ".join(getattr(e, "name", type(e).__name__) for e in chain) for chain in search.edits]
        found["edits"] = [f"{i}: {n or 'none'}" for i, n in enumerate(names)]
    return found
