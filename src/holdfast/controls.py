"""What of another run stands in this one: the results of a smaller audit; or those of the controls, the clean and the
from-scratch models, on the same data under the same attacks.

Defences are compared on one clean model; its cells, and those from scratch, are then the same for all of them, but
where a protected model's search chose what the controls had not tried: each is held against controls that did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.attacks.batteries import BATTERIES, battery, lies_within
from holdfast.audit import AuditFiles
from holdfast.cells import CellSpec
from holdfast.errors import UserError, require
from holdfast.files import read_json
from holdfast.limits import depth_of
from holdfast.records import Record

CONTROLS = ("clean", "scratch")
SECTIONS = ("original", "restricted", "benign", "seed", "audit")  # of the recipe
FACTS = ("python", "versions", "revision", "hardware", "model")  # of provenance


def smaller(identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Identities of runs whose results stand in that of `identity`: the same with fewer audit seeds, with a battery
    that lies within its own, or both."""
    recipe, audit = identity["recipe"], identity["recipe"]["audit"]
    inner = [n for b in BATTERIES.values() if battery(audit["battery"]).holds(b) for n in (b.name, b.title)]
    return [
        {**identity, "recipe": {**recipe, "audit": {**audit, "battery": name, "seeds": seeds}}}
        for name in (audit["battery"], *inner)
        for seeds in range(1, audit["seeds"] + 1)
    ]


def check_controls(folder: Path, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> set[str]:
    """Names of the provenance entries in `folder` whose records serve this run. `UserError` where there are none: other
    data, clean weights, audit, versions or hardware. How many audit seeds there were does not matter: a cell is of one,
    a search of none, and a run to which seeds were added serves as one that had them from the start; nor that its
    battery lies within this one's, or did before it was made larger."""
    for name in ("run.json", "provenance.json"):
        require((folder / name).is_file(), f"controls: {folder} holds no audited run (no {name})")
    theirs = read_json(folder / "run.json")["recipe"]
    own = json.loads(json.dumps(recipe))  # tuples as the lists that a file holds
    for audited in (theirs, own):
        for name in ("seeds", "battery"):  # of the battery each entry speaks
            audited["audit"].pop(name, None)
    sections = [n for n in SECTIONS if theirs.get(n) != own.get(n)]
    wrong = {
        name: sections + _differences(entry, facts) for name, entry in read_json(folder / "provenance.json").items()
    }
    if not any(not w for w in wrong.values()):
        differ = sorted(set(next(reversed(wrong.values()), ["everything"])))
        raise UserError(
            f"controls: the run in {folder} differs from this one in {', '.join(differ)}; its clean and from-scratch "
            "results say nothing here"
        )
    return {name for name, w in wrong.items() if not w}


def _differences(entry: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    wrong = [n for n in FACTS if entry.get(n) != json.loads(json.dumps(facts.get(n)))]
    ours, theirs = facts["content_sha256"], entry["content_sha256"]
    wrong += [n for n in ours.keys() & theirs.keys() - {"weights", "protected"} if ours[n] != theirs[n]]
    if not lies_within(entry.get("battery"), facts["battery"]):
        wrong.append("battery")
    same = entry["weights_sha256"]["clean"] == facts["weights_sha256"]["clean"]
    return wrong if same else [*wrong, "clean weights"]


def adopt_searches(folder: Path, good: Set[str], files: AuditFiles, specs: Sequence[CellSpec], provenance: str) -> int:
    """Copy the controls' searches that `specs` ask for and `files` lack, of the provenances `good`; how many."""
    known = files.searches.read()
    files.searches.keep(known)  # without a torn last line
    done = {(s.model, n) for s in known for n in s.attacks}
    found, theirs = [], [s for s in AuditFiles(folder).searches.read() if s.provenance in good]
    for spec in specs:
        if spec.model not in CONTROLS or any((spec.model, n) in done for n in spec.names):
            continue  # what is there under one of its names serves the others: `run_searches`
        # Their own tries alone: what another protection's attackers chose is no part of this comparison.
        own = (s for s in theirs if s.model == spec.model and not s.before)
        same = (s for s in own if not set(s.attacks).isdisjoint(spec.names))
        search = next(same, None)
        if search is not None:
            found.append(replace(search, attacks=list(spec.names), provenance=provenance))
    if found:
        files.searches.append(found)
    return len(found)


def adopt_cells(folder: Path, good: Set[str], files: AuditFiles, specs: Sequence[CellSpec], provenance: str) -> int:
    """Copy the controls' records that `specs` ask for and `files` lack, found by the same settings; how many cells."""
    done = files.records.recover()
    wanted = {
        (s.model, name, s.seed): (flag, setting)
        for s in specs
        if s.model in CONTROLS
        for name, flag, setting in s.named()
        if (s.model, name, s.seed) not in done
    }
    found = []
    seeds = {s.seed for s in specs}
    for record in AuditFiles(folder).records.read():
        if record.seed in seeds and _probed(record, done) and record.provenance in good:
            found.append(replace(record, provenance=provenance))
            continue
        flag, setting = wanted.get((record.model, record.attack, record.seed), (None, None))
        if flag is not None and record.setting == setting and record.provenance in good:
            found.append(replace(record, simulated=flag, provenance=provenance))
    if found:
        files.records.append(found)
        files.records.recover()  # of a run that is still at work, whole cells alone
    return len({(r.model, r.attack, r.seed) for r in found})


def _probed(record: Record, done: Set[tuple[str, str, int]]) -> bool:
    """Whether a record of a control is a probe's, and is not there yet."""
    known = record.model not in CONTROLS or (record.model, record.attack, record.seed) in done
    return not known and depth_of(record.attack) is not None
