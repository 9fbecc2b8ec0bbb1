"""`kill -9` a run at random moments, resume it each time, and compare: `python benchmarks/kill.py`.

A run is made once undisturbed. Then the same run is begun anew: pre-training, protection, audit; killed with all its
workers a random time after it last got on, resumed, killed again … `--kills` times, and left to finish. Checkpoints are
written after every step, so that many kills fall into the writing of one. The weights before and after protection must
be those of the undisturbed run bit for bit, and so the records (times apart), none of them twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

RECORDS = ("records.jsonl", "searches.jsonl")
STAGES = {"pretraining/*.pt": "pre-training", "protection/*.pt": "protection", "*.jsonl": "audit"}
WEIGHTS = ("clean/model.safetensors", "bundle/model.safetensors")


def command(recipe: str, out: Path, changes: list[str]) -> list[str]:
    """The run, as a user would type it."""
    sets = [word for change in changes for word in ("--set", change)]
    return [sys.executable, "-m", "holdfast", "run", recipe, "--out", str(out), "--resume", "--quiet", *sets]


def records(folder: Path) -> list[str]:
    """Records and searches without times, sorted: cells finish in any order."""
    found = []
    for name in RECORDS:
        for line in (folder / name).read_text().splitlines():
            row: dict[str, Any] = json.loads(line)
            row.pop("seconds")
            found.append(json.dumps(row, sort_keys=True))
    return sorted(found)


def progress(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes whenever a step is saved or a cell is done, and in which stage."""
    found = {}
    for pattern, stage in STAGES.items():
        for path in folder.glob(pattern):
            try:
                stat = path.stat()
            except FileNotFoundError:  # about to be replaced
                continue
            found[f"{stage} {path.name}"] = (stat.st_size, stat.st_mtime_ns)
    return found


def kill_once(arguments: list[str], out: Path, after: float) -> str | None:
    """Start, wait until the run gets on, let it run `after` seconds, kill the whole group. Returns the stage that it
    was in, None where it had finished."""
    process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    before = progress(out)
    while process.poll() is None and progress(out) == before:
        time.sleep(0.01)
    time.sleep(after)
    now = progress(out)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    _, said = process.communicate()
    if not alive and process.returncode:
        sys.exit(f"the run failed: {said.decode()}")
    changed = max((n for n in now if now[n] != before.get(n)), key=lambda n: now[n][1], default="start ")
    return changed.split()[0] if alive else None


def same_weights(first: Path, second: Path) -> bool:
    """Bit for bit."""
    tensors = [load_file(path) for path in (first, second)]
    return tensors[0].keys() == tensors[1].keys() and all(t.equal(tensors[1][n]) for n, t in tensors[0].items())


def main() -> None:
    """Run, kill, compare; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds of work between two kills, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    os.environ["HOLDFAST_SAVE_SECONDS"] = "0"
    rng, stages = random.Random(given.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        whole, torn = Path(folder) / "whole", Path(folder) / "torn"
        started = time.monotonic()
        subprocess.run(command(given.recipe, whole, given.set), check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        for _ in range(given.kills):
            stage = kill_once(command(given.recipe, torn, given.set), torn, rng.uniform(0, given.longest))
            if stage is None:
                break
            stages[stage] += 1
            print(f"killed {stages.total()} times; {dict(stages)}", file=sys.stderr)
        subprocess.run(command(given.recipe, torn, given.set), check=True, stdout=subprocess.DEVNULL)
        same = {"records": records(whole) == records(torn)}
        same |= {name: same_weights(whole / name, torn / name) for name in WEIGHTS}
        lines = len(records(whole))
    found = {"kills": stages.total(), "stages": dict(stages), "records": lines, "same": same}
    print(json.dumps({**found, "undisturbed_seconds": round(seconds, 1)}))
    sys.exit(0 if all(same.values()) else 1)


if __name__ == "__main__":
    main()
