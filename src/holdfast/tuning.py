"""The defender's search: a defence's own hyper-parameters by Optuna, against the recipe's audit, on pairs that no final
figure is to come from."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.storages.journal import JournalFileBackend

from holdfast.comparison import Plan, check_comparison, listed, run_comparison
from holdfast.distributed import current
from holdfast.errors import UserError, require
from holdfast.files import fingerprint, write_json
from holdfast.inputs import Pixels
from holdfast.progress import Reporter
from holdfast.recipes import Recipe, find_recipe, load_recipe
from holdfast.scales import scale_of
from holdfast.seeding import derive

SEED = 0  # of the protections, and of the sampler
KEEP = 0.97  # intactness below which a setting pays
PENALTY = 10.0  # in points of advantage for a point of intactness below
STUDY = "tune"
WORKED, LEFT = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED  # left: stopped early, or refused
DONE = (WORKED, LEFT)
SURE = 4  # tries that have come as far, before one is stopped early


@dataclass(frozen=True)
class Axis:
    """A field of the defence and what it may be: `choices`, as they are written in YAML, or a range, `log`arithmic
    where it spans a decade, of `whole` numbers where the field holds such."""

    key: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    choices: tuple[str, ...] = ()

    @property
    def log(self) -> bool:
        """Whether the range is searched by its logarithm."""
        return self.low > 0 and self.high >= 10 * self.low

    def within(self, defence: Mapping[str, Any]) -> Any:
        """Its value in a defence's settings (`sophon.iterations` lies within `sophon`); None where there is none."""
        found: Any = defence
        for name in self.key.removeprefix("defence.").split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def suggest(self, trial: optuna.Trial) -> Any:
        """A value for this trial."""
        if self.choices:
            return trial.suggest_categorical(self.key, list(self.choices))
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def ends(self) -> tuple[Any, ...]:
        """Every choice, or both ends of the range."""
        if self.choices:
            return self.choices
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def own(self, value: Any) -> Any:
        """`value` as this axis would suggest it; None where it lies elsewhere."""
        if self.choices:
            return next((c for c in self.choices if yaml.safe_load(c) == value), None)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if number and self.low <= value <= self.high else None


def parse_axis(text: str) -> Axis:
    """`defence.spread=0.25..4` or `defence.close=2,4`; `UserError` for anything else."""
    key, _, given = (part.strip() for part in text.partition("="))
    require(
        key.startswith("defence.") and bool(given),
        f"what is searched is defence.FIELD=LOW..HIGH or defence.FIELD=A,B,…; got '{text}'",
    )
    numbers = re.fullmatch(r"([-+.\deE]+?)\.\.([-+.\deE]+)", given)
    if numbers is None:
        choices = listed(given)
        require(len(choices) > 1, f"'{text}' leaves nothing to choose: give LOW..HIGH or A,B,…")
        return Axis(key, choices=choices)
    try:
        low, high = map(float, numbers.groups())
    except ValueError:
        low, high = 1.0, 0.0
    require(low < high, f"'{text}' is no range: expected two numbers LOW..HIGH, the first below the second")
    return Axis(key, low, high)


def score(summary: Mapping[str, Any]) -> dict[str, float]:
    """What one audit says of a setting: `ahead`, the larger of the worst case's advantages over scratch, at the end and
    along the way; `ratio`, intactness; `loss` = ahead + 10 · max(0, 0.97 − ratio), which is minimised."""
    worst, ratio = summary["restricted"]["worst_case"], float(summary["intactness"]["ratio"])
    ours, theirs = worst["protected"], worst["scratch"]
    ahead = max(ours[n] - theirs[n] for n in ("final", "along_the_way"))
    return {"ahead": ahead, "ratio": ratio, "loss": ahead + PENALTY * max(0.0, KEEP - ratio)}


@dataclass
class Tuning:
    """One search in one folder: `recipes` are the pairs, `axes` what is searched, laid over `preset` and `changes`."""

    recipes: Sequence[str]
    axes: Sequence[Axis]
    out: Path
    preset: str | None = None
    changes: Sequence[str] = ()
    workers: Sequence[str] = ()  # changes that say who computes, and are no part of the search
    reporter: Reporter | None = None
    pixels: Pixels = field(default_factory=dict, repr=False)  # every try's data are the same

    def __post_init__(self) -> None:
        require(bool(self.axes), "give at least one --space, such as defence.spread=0.25..4")
        keys = [a.key for a in self.axes]
        require(len(set(keys)) == len(keys), f"a field is searched twice: {', '.join(keys)}")
        names = self._names()
        require(len(set(names)) == len(names), f"two recipes are named alike: {', '.join(names)}")
        defence = self._load(self.recipes[0], {}).as_dict()["defence"]
        self.axes = [replace(a, whole=type(a.within(defence)) is int and not a.choices) for a in self.axes]

    def _names(self) -> list[str]:
        return [_stem(r) for r in self.recipes]

    def plans(self, setting: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> list[Plan]:
        """A run for each pair with this setting; `first`: the setting whose controls serve all."""
        found = []
        for recipe in self.recipes:
            loaded = self._load(recipe, setting)
            base = self.out / _stem(recipe)
            folder = base / _folder(setting)
            found.append(Plan(_folder(setting), SEED, loaded, folder, base, base / _folder(first or setting)))
        return found

    def _load(self, recipe: str, setting: Mapping[str, Any]) -> Recipe:
        extra = [f"{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in setting.items()]
        return load_recipe(recipe, self.preset, [*self.changes, *self.workers, *extra, f"seed={SEED}"])

    def default(self) -> dict[str, Any]:
        """The recipe's own setting, the first to be tried, as far as it lies within the space."""
        defence = self._load(self.recipes[0], {}).as_dict()["defence"]
        found = {a.key: a.own(a.within(defence)) for a in self.axes}
        return {n: v for n, v in found.items() if v is not None}

    def check(self) -> None:
        """`UserError` before any work: for fields that there are not, values that no defence can have, and what the
        recipes' own runs would say."""
        require(current().count == 1, "a search works in one process; start it without torchrun")
        for axis in self.axes:
            for value in axis.ends():
                for recipe in self.recipes:
                    self._load(recipe, {axis.key: value})
        for plan in self.plans(self.default()):
            check_comparison([plan], pixels=self.pixels)

    def run(self, trials: int, resume: bool = False) -> dict[str, Any]:
        """Try until `trials` settings are done; write `tune.json` after each, and return its contents. A search that
        was killed goes on with the try that it was at. A setting that the defence refuses counts as tried, and is
        passed over; one whose pairs so far are worse, on average, than they were for half of the tries that have come
        as far is tried on no further pair."""
        require(trials >= 1, f"a search needs at least 1 trial, but got {trials}")
        journal = self.out / "study.log"
        require(resume or not journal.exists(), f"{self.out} already holds a search; add --resume to continue it")
        self.check()
        self.out.mkdir(parents=True, exist_ok=True)
        study = self._study(journal)
        while (done := len(study.get_trials(deepcopy=False, states=DONE))) < trials:
            study.sampler = _sampler(len(study.get_trials(deepcopy=False)))
            trial = study.ask()
            setting = {a.key: a.suggest(trial) for a in self.axes}
            trial.set_user_attr("setting", setting)
            if self.reporter:
                self.reporter.say(f"— try {done + 1} of {trials}: {_words(setting)} —")
            self._try(study, trial, setting)
            if study.get_trials(deepcopy=False, states=(WORKED,)):
                write_json(self.out / "tune.json", self._result(study))
        return self._result(study)

    def _try(self, study: optuna.Study, trial: optuna.Trial, setting: Mapping[str, Any]) -> None:
        finished = study.get_trials(deepcopy=False, states=(WORKED,))
        try:
            plans = self.plans(setting, finished[0].user_attrs["setting"] if finished else None)
            for plan in plans:  # a network may refuse what the recipe's check lets pass
                check_comparison([plan], pixels=self.pixels)
        except UserError as error:
            if self.reporter:
                self.reporter.say(f"passed over: {error}")
            study.tell(trial, state=LEFT)
            return
        found: dict[str, Any] = {}
        for i, plan in enumerate(plans, 1):
            found[plan.base.name] = run_comparison([plan], True, self.reporter, self.pixels)[plan.preset][0]
            scores = {name: score(s) for name, s in found.items()}
            mean = sum(s["loss"] for s in scores.values()) / i
            trial.report(mean, i)
            if i < len(plans) and _behind(study, i, mean):
                break
        trial.set_user_attr("scores", scores)
        trial.set_user_attr("verdicts", {n: s["verdict"] for n, s in found.items()})
        trial.set_user_attr("metric", next(iter(found.values()))["restricted"]["metric"])
        if len(scores) == len(plans):
            study.tell(trial, mean)
            return
        if self.reporter:
            self.reporter.say(f"stopped after {i} of {len(plans)} pairs: {mean:+.4f} is worse than half of the tries")
        study.tell(trial, state=LEFT)

    def _study(self, journal: Path) -> optuna.Study:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(storage=storage, study_name=STUDY, load_if_exists=True)
        asked: dict[str, Any] = {"space": [repr(a) for a in self.axes], "recipes": self._names()}
        asked |= {"preset": self.preset, "changes": list(self.changes)}
        known = study.user_attrs.get("asked")
        differ = [n for n in asked if known and known[n] != asked[n]]
        require(not differ, f"{self.out} holds a search with another {' and '.join(differ)}; choose another --out")
        if known is None:
            if not study.get_trials(deepcopy=False):
                study.enqueue_trial(self.default())
            study.set_user_attr("asked", asked)
        for left in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            # Killed at it: its folder goes on where it was.
            study.enqueue_trial({**left.system_attrs.get("fixed_params", {}), **left.params})
            study.tell(left.number, state=optuna.trial.TrialState.FAIL)
        return study

    def _result(self, study: optuna.Study) -> dict[str, Any]:
        kept = ("setting", "scores", "verdicts")
        finished = study.get_trials(deepcopy=False, states=(WORKED,))
        tried = [{"loss": t.value, **{n: t.user_attrs[n] for n in kept}} for t in finished]
        left = study.get_trials(deepcopy=False, states=(LEFT,))
        refused = [t.user_attrs["setting"] for t in left if "scores" not in t.user_attrs]
        stopped = [{"loss": t.value, **{n: t.user_attrs[n] for n in kept}} for t in left if "scores" in t.user_attrs]
        require(bool(tried), "the defence refuses every setting that was tried")
        best = min(tried, key=lambda t: float(t["loss"]))
        metric = finished[0].user_attrs["metric"]
        others = {"stopped": stopped, "refused": refused}
        return {"recipes": self._names(), "metric": metric, "best": best, "trials": tried, **others}


def _stem(recipe: str) -> str:
    return find_recipe(recipe).stem


def _behind(study: optuna.Study, pairs: int, mean: float) -> bool:
    """Whether the mean loss over so many pairs is above the median of all tries that have come as far."""
    before = [t.intermediate_values for t in study.get_trials(deepcopy=False, states=DONE)]
    known = [values[pairs] for values in before if pairs in values]
    return len(known) >= SURE and mean > statistics.median(known)


def _sampler(tries: int) -> optuna.samplers.TPESampler:
    """A search that goes on must not draw again what it drew."""
    return optuna.samplers.TPESampler(seed=derive(SEED, "tune", tries) % 2**32, n_startup_trials=6)


def as_table(result: Mapping[str, Any]) -> str:
    """The tries, best first, then those that were stopped early; and the best as options of the command line."""
    scale = scale_of(result["metric"])
    lines = ["| loss | " + " | ".join(f"{n}: ahead, intactness" for n in result["recipes"]) + " | setting |"]
    lines.append("|---|" + "---|" * (len(result["recipes"]) + 1))
    tries = [t for n in ("trials", "stopped") for t in sorted(result[n], key=lambda t: float(t["loss"]))]
    for trial in tries:
        found = [trial["scores"].get(n) for n in result["recipes"]]
        cells = " | ".join(f"{scale.difference(s['ahead'])}, {s['ratio']:.3f}" if s else "–" for s in found)
        early = ", stopped" if None in found else ""
        lines.append(f"| {trial['loss']:+.4f}{early} | {cells} | {_words(trial['setting'])} |")
    chosen = " ".join(f"--set {n}={v}" for n, v in result["best"]["setting"].items())
    return "\n".join([*lines, "", f"best: {chosen}"])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{n.removeprefix('defence.')} {_short(v)}" for n, v in setting.items())


def _folder(setting: Mapping[str, Any]) -> str:
    return f"try-{fingerprint(dict(setting))[:10]}"
