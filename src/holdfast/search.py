"""The attacker's search: hyper-parameters by restricted validation data alone, with Optuna's sampler and pruner."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import optuna

from holdfast.attacks.attack import Attack, Search
from holdfast.cells import Bench, CellSpec, Meter, follow, start
from holdfast.finetuning import MOST_LR
from holdfast.metrics import LEARNS, MARGIN, strongest
from holdfast.records import SearchRecord
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

    def best(self) -> dict[str, Any] | None:
        """The strongest try that was not given up; None where there is none."""
        whole = [t for t in self.trials if not t["pruned"]]
        return whole[strongest([t["values"] for t in whole])] if whole else None

    def at_edge(self, chance: float) -> float | None:
        """Where to look on: ×10 beyond the best learning rate if it is the largest tried, ÷10 if the smallest; None
        where it lies between, or a rate between is as good. Where nothing was learned, beyond the largest: tiny
        gradients need large steps."""
        best = self.best()
        rates = [t["setting"]["lr"] for t in self.trials]
        low, high = min(rates), max(rates)
        if best is None or best["values"][-1] - chance < LEARNS:
            return float(round(high * 10, 12))
        inner = [t for t in self.trials if not t["pruned"] and low < t["setting"]["lr"] < high]
        if any(t["values"][-1] >= best["values"][-1] - MARGIN for t in inner):
            return None
        lr = float(best["setting"]["lr"])
        beyond = lr * 10 if lr == high else lr / 10
        return round(beyond, 12)

    def lags(self, step: int, value: float, chance: float) -> bool:
        """Whether a try is more than the margin behind the median of the whole ones at this step, which have learned.

        On a plateau at chance, nobody lags: a defence's delay must not make the attacker give up what takes off late.
        """
        values = [dict(zip(t["steps"], t["values"], strict=True))[step] for t in self.trials if not t["pruned"]]
        middle = median(values) if values else 0.0
        return middle - chance >= LEARNS and value < middle - MARGIN


def run_search(bench: Bench, spec: CellSpec) -> SearchRecord:
    """Everything `Search` says, for one model; see there. The last try at the edge is recorded as such."""
    search = spec.attack.search
    if search is None:
        raise ValueError(f"attack '{spec.attack.name}' has nothing to search")
    began, tries = time.monotonic(), Tries()
    steps = bench.curve(spec.attack.tuning.steps)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=derive(SEED, "search") % 2**32),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=max(1, spec.attack.tuning.steps // 4)),
    )
    chance = bench.task.chance(bench.restricted.validation.labels)
    for lr in search.lr:
        _try(bench, spec, search, study, tries, steps, lr)
    for _ in range(search.extend):
        beyond = tries.at_edge(chance)
        if beyond is None or not LIMITS[0] <= beyond <= LIMITS[1]:
            break
        _try(bench, spec, search, study, tries, steps, beyond)
    for _ in range(search.trials):
        _try(bench, spec, search, study, tries, steps, None)
    best = tries.best()
    return SearchRecord(
        model=spec.model,
        attacks=list(spec.names),
        trials=tries.trials,
        chosen=best["setting"] if best else {"lr": search.lr[0]},
        edge=tries.at_edge(chance) is not None,
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
    attack = resolved(spec.attack, setting)
    prepared, model = start(bench, spec.model, attack, SEED)
    architecture, ground = prepared.released.architecture, prepared.ground
    meter = Meter(prepared, attack, bench.runtime, architecture.head(model, ground.classes))
    made, values, pruned = [0], [0.0], False
    chance = bench.task.chance(ground.validation.labels)

    def note(step: int, how: str) -> bool:
        nonlocal pruned
        value = evaluate(model, ground.validation, bench.task, bench.runtime)[0]
        if step == 0:
            values[0] = value
            return False
        made.append(step)
        values.append(value)
        trial.report(value, step)
        early = how == "running" and step < steps[-1]
        pruned = early and bool(trial.should_prune()) and tries.lags(step, value, chance)
        return pruned

    result = follow(bench, meter, model, SEED, note)
    state = optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.COMPLETE
    study.tell(trial, None if pruned else values[-1], state)
    tries.steps += result.steps
    tries.samples += meter.samples(result.steps)
    tries.flops += meter.flops(result.steps)
    tries.trials.append({"setting": setting, "steps": made, "values": values, "pruned": pruned})


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
