"""One protection: a recipe's defence at work on the clean model, and the record of what happened."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast import models
from holdfast.bundle import Bundle
from holdfast.defences.registry import measure_states
from holdfast.domains import public_name
from holdfast.files import write_json
from holdfast.inputs import Inputs
from holdfast.models import State, state_of
from holdfast.progress import duration
from holdfast.pruning import PRUNED, pruned
from holdfast.runtime import peak_memory_mb, reset_peak_memory, threads
from holdfast.snapshots import History
from holdfast.workplace import Workplace

SILENT = "protect: all simulated adversaries diverged in {} of {} iterations, and nothing was suppressed there"
NOTHING_FOUND = "protect: no state within the tolerance was better than the model as it was, which is what is kept"


def defend(given: Inputs, clean: Bundle, folder: Path, workplace: Workplace, intra_op: int | None) -> Bundle:
    """The model of `clean`, protected, with `intra_op` threads; `history.json` goes to `folder`. All processes of the
    workplace's group take part, and have the result."""
    group = workplace.group
    runtime = given.runtime
    if given.recipe.runtime.shard and group.count > 1:
        runtime, workplace = replace(runtime, sharing=group), replace(workplace, sharded=True)
    model = runtime.place(given.architecture.build(len(clean.classes)))
    models.load_state(model, clean.state)
    defender, _ = given.halves
    started = time.monotonic()
    reset_peak_memory(given.runtime.device)
    with threads(intra_op):
        history = given.recipe.defence_object.protect(
            model,
            given.original,
            defender,
            restricted_classes=len(given.restricted.classes),
            architecture=given.architecture,
            task=given.task,
            runtime=runtime,
            seed=given.recipe.seed,
            identity=given.work_identity,
            workplace=workplace,
        )
    cost = {
        "seconds": history.seconds or time.monotonic() - started,
        "peak_memory_mb": peak_memory_mb(given.runtime.device, children=False),
    }
    state = state_of(model)
    group.agreed(lambda: _note(given, clean, state, history, cost, folder, workplace))
    return _bundle(given, clean, state, history)


def _note(
    given: Inputs,
    clean: Bundle,
    state: State,
    history: History,
    cost: Mapping[str, float],
    folder: Path,
    workplace: Workplace,
) -> None:
    """Write what happened, and say how it ended."""
    say = workplace.reporter.say
    measured: dict[str, Any] = {}
    if given.recipe.defence_object.measures:
        model = given.runtime.place(given.architecture.build(len(clean.classes)))
        measured = measure_states(
            given.recipe.defence_object,
            given.given(model),
            {"clean": clean.state, "protected": state},
            given.restricted.test,
            workplace.reporter,
        )
    write_json(
        folder / "history.json",
        {
            **cost,
            "processes": workplace.group.count,
            "rollbacks": history.rollbacks,
            "silent": history.silent,
            "attempts": history.attempts,
            "released": history.released,
            "measured": measured,
            "checks": history.checks,
        },
    )
    say(f"protect: done in {duration(cost['seconds'])}, {history.rollbacks} times gone back")
    if history.silent:
        say(SILENT.format(history.silent, int(history.checks[-1]["iteration"])))
    if history.released == 0:
        say(NOTHING_FOUND)


def _bundle(given: Inputs, clean: Bundle, state: State, history: History) -> Bundle:
    """What is released, with what a reader of its card wants to know."""
    name, fields = given.recipe.defence_name, given.recipe.as_dict()["defence"]
    details: dict[str, Any] = {
        "defence": fields,
        "original": public_name(given.original.name),
        "restricted": public_name(given.restricted.name),
    }
    if history.released is not None:
        details["released"] = history.released
    zeros = pruned(state)
    if zeros > PRUNED:  # the mask is in the weights: what is exactly zero
        details["sparsity"] = round(zeros, 4)
    return Bundle(state, given.architecture, clean.classes, {**details, "protected_with": name})
