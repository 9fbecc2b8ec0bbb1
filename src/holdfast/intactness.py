"""What protection cost the original domain: its metric, and for classifiers also class by class, calibration, common
corruptions. One record a model, split and part, under the name of no attack."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.corruptions import corrupted, corruptions
from holdfast.domains import Domain, ImageData
from holdfast.layers import evaluating
from holdfast.metrics import calibration_error
from holdfast.models import Architecture, State, load_state
from holdfast.records import Record
from holdfast.runtime import Runtime
from holdfast.scales import scale_of
from holdfast.statistics import mean
from holdfast.tasks import Task
from holdfast.training import evaluate

ORIGINAL = "original domain"  # the "attack" under which intactness is recorded: none
CALIBRATION = "calibration"
BATCH = 100
CALIBRATED = "1 − calibration error"  # its metric


def part_of(attack: str) -> str | None:
    """What is measured under this name in the records: "" for the original domain as a whole; None for an attack."""
    if attack == ORIGINAL:
        return ""
    return attack.removeprefix(f"{ORIGINAL} · ") if attack.startswith(f"{ORIGINAL} · ") else None


def parts(original: Domain, task: Task) -> list[str]:
    """Names under which intactness is recorded, the whole domain first."""
    if not task.labelled:
        return [ORIGINAL]
    present = set(torch.unique(original.test.labels).tolist())  # a class without test images has no accuracy
    classes = [f"class {c}" for i, c in enumerate(original.classes) if i in present]
    kinds = [f"under {c}" for c in corruptions(original.test.images.shape[1])]
    return [ORIGINAL, *(f"{ORIGINAL} · {p}" for p in (CALIBRATION, *classes, *kinds))]


@dataclass(frozen=True)
class _Found:
    part: str
    split: str
    metric: str
    value: float
    loss: float | None


def measure_intactness(
    models: Mapping[str, State],
    architecture: Architecture,
    original: Domain,
    task: Task,
    runtime: Runtime,
    provenance: str,
    known: Collection[tuple[str, str]] = (),
) -> list[Record]:
    """Original-domain metric of each model on validation and test data; where the task has labels, on test data also
    of every class, 1 − the calibration error, and the metric under each of `corruptions`. `known`: pairs (model, name)
    that are left out."""
    model: nn.Module = runtime.place(architecture.build(len(original.classes)))
    records = []
    for name, state in models.items():
        load_state(model, state)
        started = time.monotonic()
        for found in _measure(model, original, task, runtime):
            seconds, started = time.monotonic() - started, time.monotonic()
            if (name, found.part) in known:
                continue
            records.append(
                Record(
                    model=name,
                    attack=found.part,
                    seed=0,
                    step=0,
                    last_step=0,
                    split=found.split,
                    metric=found.metric,
                    value=found.value,
                    loss=found.loss,
                    samples=0,
                    seconds=round(seconds, 3),
                    simulated=False,
                    diverged=False,
                    provenance=provenance,
                )
            )
    return records


def _measure(model: nn.Module, original: Domain, task: Task, runtime: Runtime) -> Iterator[_Found]:
    metric = task.scale.metric

    def whole(part: str, split: str, data: ImageData) -> _Found:
        value, loss = evaluate(model, data, task, runtime)
        return _Found(part, split, metric, value, loss if math.isfinite(loss) else None)

    yield whole(ORIGINAL, "validation", original.validation)
    yield whole(ORIGINAL, "test", original.test)
    if not task.labelled:
        return
    confidence, right = _answers(model, original.test, task, runtime)
    error = calibration_error(confidence.tolist(), right.tolist())
    yield _Found(f"{ORIGINAL} · {CALIBRATION}", "test", CALIBRATED, 1 - error, None)
    labels = original.test.labels.cpu()
    for index in torch.unique(labels).tolist():
        name = original.classes[index]
        value = right[labels == index].float().mean().item()
        yield _Found(f"{ORIGINAL} · class {name}", "test", metric, value, None)
    images = original.test.images
    for kind in corruptions(images.shape[1]):
        changed = replace(original.test, images=corrupted(images, kind).to(images.device))
        yield whole(f"{ORIGINAL} · under {kind}", "test", changed)


@torch.no_grad()
def _answers(model: nn.Module, data: ImageData, task: Task, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """The probability of each image's most likely class, (n,), and whether it is right, (n,)."""
    found: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(data), BATCH):
            images, labels = data.batch(torch.arange(start, min(start + BATCH, len(data))), runtime)
            with runtime.autocast():
                outputs = task.forward(model, images, labels, start)
            confidence, answer = outputs.float().softmax(1).max(1)
            found.append(torch.stack([confidence, (answer == labels).float()]).cpu())
    confidence, right = torch.cat(found, 1)
    return confidence, right.bool()


def intactness(records: Collection[Record]) -> dict[str, Any] | None:
    """Original test metric `before` (clean) and `after` (protected), and their `ratio`; None where it was not measured.

    `classes`, `corruptions`: the same by name; `calibration`: the errors before and after. Absent where the task has
    none, as in audits of older versions.
    """
    values: dict[str, dict[str, Record]] = {}
    for r in records:
        part = part_of(r.attack)
        if part is not None and r.split == "test":
            values.setdefault(part, {})[r.model] = r
    whole = {p: v for p, v in values.items() if {"clean", "protected"} <= v.keys()}
    if "" not in whole:
        return None

    def pair(part: str) -> dict[str, float]:
        return {"before": whole[part]["clean"].value, "after": whole[part]["protected"].value}

    metric = whole[""]["clean"].metric
    found: dict[str, Any] = {"metric": metric, **pair("")}
    found["ratio"] = scale_of(metric).retention(found["before"], found["after"])
    for key, prefix in (("classes", "class "), ("corruptions", "under ")):
        named = {p.removeprefix(prefix): pair(p) for p in whole if p.startswith(prefix)}
        found |= {key: named} if named else {}
    if CALIBRATION in whole:
        found["calibration"] = {n: 1 - v for n, v in pair(CALIBRATION).items()}
    return found


def costs(found: Mapping[str, Any], worst: int = 5) -> list[tuple[str, float, float]]:
    """Rows (what, before, after) of a table: the classes that lost most, the mean over corruptions, each of them."""
    classes = sorted(found.get("classes", {}).items(), key=lambda c: c[1]["after"] - c[1]["before"])
    kinds = found.get("corruptions", {})
    rows = [(f"class {n}", v["before"], v["after"]) for n, v in classes[:worst]]
    if kinds:
        before, after = (mean([v[n] for v in kinds.values()]) for n in ("before", "after"))
        rows.append(("all corruptions, mean", before, after))
    return rows + [(f"under {n}", v["before"], v["after"]) for n, v in kinds.items()]
