"""The defender's search: a defence's own hyper-parameters by Optuna, against the recipe's audit, on pairs that no final
figure is to come from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

from holdfast.comparison import Plan, check_comparison, run_comparison
from holdfast.errors import require
from holdfast.files import fingerprint, write_json
from holdfast.progress import Reporter
from holdfast.recipes import find_recipe, load_recipe

SEED = 0  # of the protections, and of the sampler
KEEP = 0.97  # intactness below which a setting pays
PENALTY = 10.0  # in points of advantage for a point of intactness below
STUDY = "tune"
WORKED = optuna.trial.TrialState.COMPLETE


@dataclass(frozen=True)
class Axis:
    """A field of the defence and what it may be: `choices`, or a range, `log`arithmic where it spans a decade."""

    key: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    choices: tuple[str, ...] = ()

    @property
    def log(self) -> bool:
        """Whether the range is searched by its logarithm."""
        return self.low > 0 and self.high >= 10 * self.low

    def suggest(self, trial: optuna.Trial) -> Any:
        """A value for this trial."""
        if self.choices:
            return trial.suggest_categorical(self.key, list(self.choices))
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether a value lies on the axis."""
        return str(value) in self.choices if self.choices else self.low <= float(value) <= self.high


def parse_axis(text: str) -> Axis:
    """`defence.spread=0.25..4` or `defence.close=2,4,all`; `UserError` for anything else."""
    key, _, given = (part.strip() for part in text.partition("="))
    require(
        key.startswith("defence.") and bool(given),
        f"what is searched is defence.FIELD=LOW..HIGH or defence.FIELD=A,B,…; got '{text}'",
    )
    numbers = re.fullmatch(r"([-+.\deE]+?)\.\.([-+.\deE]+)", given)
    if numbers is None:
        choices = tuple(c.strip() for c in given.split(","))
        require(all(choices) and len(choices) > 1, f"'{text}' leaves nothing to choose: give LOW..HIGH or A,B,…")
        return Axis(key, choices=choices)
    try:
        low, high = map(float, numbers.groups())
    except ValueError:
        low, high = 1.0, 0.0
    require(low < high, f"'{text}' is no range: expected two numbers LOW..HIGH, the first below the second")
    return Axis(key, low, high, all(re.fullmatch(r"[-+]?\d+", n) for n in numbers.groups()))


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
    reporter: Reporter | None = None

    def __post_init__(self) -> None:
        require(bool(self.axes), "give at least one --space, such as defence.spread=0.25..4")
        keys = [a.key for a in self.axes]
        require(len(set(keys)) == len(keys), f"a field is searched twice: {', '.join(keys)}")
        names = [self._name(r) for r in self.recipes]
        require(len(set(names)) == len(names), f"two recipes are named alike: {', '.join(names)}")

    @staticmethod
    def _name(recipe: str) -> str:
        return find_recipe(recipe).stem

    def plans(self, setting: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> list[Plan]:
        """A run for each pair with this setting; `first`: the setting whose controls serve all."""
        extra = [f"{n}={json.dumps(v) if not isinstance(v, str) else v}" for n, v in setting.items()]
        found = []
        for recipe in self.recipes:
            loaded = load_recipe(recipe, self.preset, [*self.changes, *extra, f"seed={SEED}"])
            base = self.out / self._name(recipe)
            folder = base / _folder(setting)
            found.append(Plan(_folder(setting), SEED, loaded, folder, base, base / _folder(first or setting)))
        return found

    def default(self) -> dict[str, Any]:
        """The recipe's own setting, the first to be tried, where it lies within the space."""
        defence = load_recipe(self.recipes[0], self.preset, [*self.changes]).as_dict()["defence"]
        own = {a.key: defence.get(a.key.removeprefix("defence.")) for a in self.axes}
        known = {a.key: own[a.key] for a in self.axes if isinstance(own[a.key], int | float | str)}
        kept = {a.key: known[a.key] for a in self.axes if a.key in known and a.holds(known[a.key])}
        return {a.key: str(kept[a.key]) if a.choices else kept[a.key] for a in self.axes if a.key in kept}

    def run(self, trials: int, resume: bool = False) -> dict[str, Any]:
        """Try until `trials` settings are done; write `tune.json` after each, and return its contents. A search that
        was killed goes on with the try that it was at."""
        require(trials >= 1, f"a search needs at least 1 trial, but got {trials}")
        journal = self.out / "study.log"
        require(resume or not journal.exists(), f"{self.out} already holds a search; add --resume to continue it")
        for plan in self.plans(self.default()):
            check_comparison([plan])
        self.out.mkdir(parents=True, exist_ok=True)
        study = self._study(journal)
        while (done := len(study.get_trials(deepcopy=False, states=(WORKED,)))) < trials:
            trial = study.ask()
            setting = {a.key: a.suggest(trial) for a in self.axes}
            if self.reporter:
                self.reporter.say(f"— try {done + 1} of {trials}: {_words(setting)} —")
            finished = study.get_trials(deepcopy=False, states=(WORKED,))
            plans = self.plans(setting, finished[0].user_attrs["setting"] if finished else None)
            found = {p.base.name: run_comparison([p], True, self.reporter)[p.preset][0] for p in plans}
            scores = {name: score(s) for name, s in found.items()}
            trial.set_user_attr("setting", setting)
            trial.set_user_attr("scores", scores)
            trial.set_user_attr("verdicts", {n: s["verdict"] for n, s in found.items()})
            study.tell(trial, sum(s["loss"] for s in scores.values()) / len(scores))
            result = self._result(study)
            write_json(self.out / "tune.json", result)
        return self._result(study)

    def _study(self, journal: Path) -> optuna.Study:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        sampler = optuna.samplers.TPESampler(seed=SEED, n_startup_trials=6)
        study = optuna.create_study(storage=storage, study_name=STUDY, sampler=sampler, load_if_exists=True)
        asked: dict[str, Any] = {"axes": [repr(a) for a in self.axes], "recipes": [self._name(r) for r in self.recipes]}
        asked |= {"preset": self.preset, "changes": list(self.changes)}
        known = study.user_attrs.get("asked")
        require(known in (None, asked), f"{self.out} holds another search, of {known}; choose another --out")
        if known is None:
            study.set_user_attr("asked", asked)
            study.enqueue_trial(self.default())
        for left in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.enqueue_trial(left.params)  # killed at it: its folder goes on where it was
            study.tell(left.number, state=optuna.trial.TrialState.FAIL)
        return study

    def _result(self, study: optuna.Study) -> dict[str, Any]:
        tried = [
            {"setting": t.user_attrs["setting"], "loss": t.value, "scores": t.user_attrs["scores"],
             "verdicts": t.user_attrs["verdicts"]}
            for t in study.get_trials(deepcopy=False, states=(WORKED,))
        ]  # fmt: skip
        best = min(tried, key=lambda t: float(t["loss"]))
        return {"recipes": [self._name(r) for r in self.recipes], "best": best, "trials": tried}


def as_table(result: Mapping[str, Any]) -> str:
    """The tries, best first, and the best as options of the command line."""
    lines = ["| loss | " + " | ".join(f"{n}: ahead, intactness" for n in result["recipes"]) + " | setting |"]
    lines.append("|---|" + "---|" * (len(result["recipes"]) + 1))
    for trial in sorted(result["trials"], key=lambda t: float(t["loss"])):
        found = [trial["scores"][n] for n in result["recipes"]]
        cells = " | ".join(f"{100 * s['ahead']:+.1f}, {s['ratio']:.3f}" for s in found)
        lines.append(f"| {trial['loss']:+.4f} | {cells} | {_words(trial['setting'])} |")
    chosen = " ".join(f"--set {n}={_short(v)}" for n, v in result["best"]["setting"].items())
    return "\n".join([*lines, "", f"best: {chosen}"])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{n.removeprefix('defence.')} {_short(v)}" for n, v in setting.items())


def _folder(setting: Mapping[str, Any]) -> str:
    return f"try-{fingerprint(dict(setting))[:10]}"
