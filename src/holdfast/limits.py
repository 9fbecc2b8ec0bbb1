"""Where the limit is: how much a probe on each layer's input knows of the restricted domain, for the protected and the
clean model, and for one with random weights.

What the clean model's layers give over random features is what there is to take away: whoever restarts above a layer
has what that layer lets through. Random features are the floor, for an attacker always has those.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from holdfast.attacks.attack import Attack
from holdfast.attacks.released import Released
from holdfast.attacks.structure import EarlierLayer, Probe
from holdfast.attacks.weights import BatchNormStatistics
from holdfast.cells import Bench, prepare, start
from holdfast.domains import ImageData
from holdfast.features import Taps
from holdfast.finetuning import FineTuning
from holdfast.layers import WEIGHT_LAYERS, evaluating, executed_layers
from holdfast.models import load_state
from holdfast.progress import Reporter
from holdfast.records import Record, RecordFile
from holdfast.statistics import deviation, mean

PROBED = ("protected", "clean", "scratch")  # scratch: random features, frozen as the others' are
DEPTHS = 6  # at most so many layers, spread over the network
BATCH = 100
HUGE = 1e6  # what an overflow counts as
PENALTIES = (0.01, 0.1, 1.0, 10.0)  # the inverse strength of the regulariser, chosen on validation data
PREFIX = "probe · input of "


def depth_of(attack: str) -> str | None:
    """The layer whose input is probed under this name in the records; None for an attack."""
    return attack.removeprefix(PREFIX) if attack.startswith(PREFIX) else None


def probes(bench: Bench) -> list[Attack]:
    """The probes, first layer to last, as attacks that train nothing but a head."""
    tuning = FineTuning.named("initFC+FC")
    released = prepare(bench, "clean", Attack("as it is", tuning), 0).released
    refit = BatchNormStatistics()
    first = (refit,) if refit.obstacle(released) is None else ()  # random weights have no statistics of their own
    layers = _layers(released)
    count = min(DEPTHS, len(layers))
    chosen = [layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count)]
    return [Attack(PREFIX + name, tuning, (*first, EarlierLayer(k))) for name, k in chosen]


def _layers(released: Released) -> list[tuple[str, int]]:
    """Layers that may be probed, first to last, each with its k, counted from the last: those whose input has one row
    an image. (The layers of a window of attention, or of a table of positions, have not.)"""
    model = released.architecture.build(released.classes)
    example = released.architecture.example(3)
    order = [n for n in executed_layers(model, example) if isinstance(model.get_submodule(n), WEIGHT_LAYERS)]
    with torch.no_grad(), evaluating(model), Taps(model, order) as taps:
        model(example)
    return [(n, len(order) - i) for i, n in enumerate(order) if i and len(taps.values[i]) == len(example)]


def measure_limits(
    bench: Bench, attacks: Sequence[Attack], seeds: int, known: Collection[tuple[str, str, int]] = ()
) -> Iterator[list[Record]]:
    """Records of every probe (`attacks`), model and seed but those `known`, as they come: a logistic regression on
    standardised features of the adversary's images, its penalty chosen on validation data."""
    for attack in attacks:
        for seed in range(seeds):
            for model in PROBED:
                if (model, attack.name, seed) not in known:
                    yield _records(bench, model, attack, seed)


def run_probes(bench: Bench, attacks: Sequence[Attack], seeds: int, file: RecordFile, reporter: Reporter) -> None:
    """All `probes`, of all models, as far as `file` lacks them."""
    done = file.recover()
    planned = [(m, a.name, s) for a in attacks for s in range(seeds) for m in PROBED]
    left = sum(p not in done for p in planned)
    if not left:
        return
    with reporter.bar("probes", len(planned), len(planned) - left) as bar:
        for found in measure_limits(bench.to(bench.runtime), attacks, seeds, done):
            file.append(found)
            bar.advance(f"{found[-1].model} · {found[-1].attack} · seed {found[-1].seed}")


def _records(bench: Bench, model: str, attack: Attack, seed: int) -> list[Record]:
    began = time.monotonic()
    prepared = prepare(bench, model, attack, seed)
    probe = cast(Probe, start(bench, prepared, seed))  # the last edit made it one
    # The head is the regression's: of the body the state has all, of the head what the released model's had.
    state = {n: v for n, v in prepared.released.state.items() if n.startswith("body.")}
    load_state(probe, {**probe.state_dict(), **state})
    parts = {"train": prepared.train, "validation": prepared.ground.validation, "test": prepared.ground.test}
    features = {n: _features(bench, probe, d) for n, d in parts.items()}
    found = fitted({n: (features[n], d.labels.cpu()) for n, d in parts.items()})
    seconds = round(time.monotonic() - began, 3)
    return [
        Record(
            model=model,
            attack=attack.name,
            seed=seed,
            step=0,
            last_step=0,
            split=split,
            metric=bench.task.scale.metric,
            value=value,
            loss=None,
            samples=0,
            seconds=seconds,
            simulated=False,
            diverged=False,
            provenance=bench.provenance,
            images=prepared.images,
        )
        for split, value in found.items()
    ]


@torch.no_grad()
def _features(bench: Bench, probe: Probe, data: ImageData) -> Tensor:
    """(n, width), float64 on the CPU."""
    found = []
    with evaluating(probe):
        for begin in range(0, len(data), BATCH):
            images, _ = data.batch(torch.arange(begin, min(begin + BATCH, len(data))), bench.runtime)
            found.append(probe.features(images).double().cpu())
    return torch.cat(found)


def fitted(data: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracy on `validation` and `test` of a regression on `train`, each (features (n, d), labels (n,))."""
    from sklearn.exceptions import ConvergenceWarning  # a second to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sides = {n: (x.nan_to_num(0.0, HUGE, -HUGE).clamp(-HUGE, HUGE).numpy(), y.numpy()) for n, (x, y) in data.items()}
    best: dict[str, float] = {}
    for penalty in PENALTIES:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=300))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 300 steps are the probe's definition
            model.fit(*sides["train"])
        scores = {n: float(model.score(*sides[n])) for n in ("validation", "test")}
        if not best or scores["validation"] > best["validation"]:
            best = scores
    return best


def limits(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each probed layer, first to last: its name, and mean and deviation of test accuracy over seeds by model."""
    names = list(dict.fromkeys(r.attack for r in records if depth_of(r.attack) is not None))
    found = []
    for name in names:
        own = {m: [r.value for r in records if (r.attack, r.model, r.split) == (name, m, "test")] for m in PROBED}
        if all(own.values()):
            values = {m: {"mean": mean(v), "deviation": deviation(v)} for m, v in own.items()}
            found.append({"layer": depth_of(name), **values})
    return found
