"""`kill -9` an audit at random moments, resume it each time, and compare: `python benchmarks/kill_audit.py`.

A run is made once undisturbed. Then its audit is begun anew, killed with all its workers after a random time, resumed,
killed again … `--kills` times, and left to finish. The records (times apart) must be those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FILES = ("records.jsonl", "searches.jsonl")


def command(recipe: str, out: Path, changes: list[str]) -> list[str]:
    """The run, as a user would type it."""
    sets = [word for change in changes for word in ("--set", change)]
    return [sys.executable, "-m", "holdfast", "run", recipe, "--out", str(out), "--resume", "--quiet", *sets]


def content(folder: Path) -> list[str]:
    """Records and searches without times, sorted: cells finish in any order."""
    found = []
    for name in FILES:
        for line in (folder / name).read_text().splitlines():
            row: dict[str, Any] = json.loads(line)
            row.pop("seconds")
            found.append(json.dumps(row, sort_keys=True))
    return sorted(found)


def cells(folder: Path) -> int:
    """Lines that are there already."""
    return sum((folder / n).read_bytes().count(b"\n") for n in FILES if (folder / n).exists())


def kill_once(arguments: list[str], out: Path, after: float) -> bool:
    """Start, wait until the audit goes on, let it run `after` seconds, kill the whole group. False: it had finished."""
    process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = cells(out)
    while process.poll() is None and cells(out) == before:
        time.sleep(0.02)
    time.sleep(after)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return alive


def main() -> None:
    """Run, kill, compare; exit code 1 where the records differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--longest", type=float, default=6.0, help="seconds of audit between two kills, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, torn = Path(folder) / "whole", Path(folder) / "torn"
        started = time.monotonic()
        subprocess.run(command(given.recipe, whole, given.set), check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        shutil.copytree(whole, torn)
        for name in (*FILES, "summary.json", "audit.json"):
            (torn / name).unlink(missing_ok=True)
        killed = 0
        for _ in range(given.kills):
            killed += kill_once(command(given.recipe, torn, given.set), torn, rng.uniform(0, given.longest))
            print(f"killed {killed} times; {cells(torn)} lines", file=sys.stderr)
        subprocess.run(command(given.recipe, torn, given.set), check=True, stdout=subprocess.DEVNULL)
        same = content(whole) == content(torn)
        lines = len(content(whole))
    print(json.dumps({"kills": killed, "lines": lines, "same": same, "undisturbed_seconds": round(seconds, 1)}))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
