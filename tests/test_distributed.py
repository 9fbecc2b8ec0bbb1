"""Several processes under torchrun: two real ones."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from holdfast.distributed import ALONE, Group, current
from holdfast.errors import UserError
from holdfast.runtime import Runtime
from holdfast.training import minibatches

HERE = Path(__file__).parent
RECIPE = {
    "name": "spread",
    "original": "digits[0-4]",
    "restricted": {"data": "digits[5-9]", "adversary": 60},
    "model": {"name": "small_conv", "size": 8, "channels": 1, "options": {"width": 8}},
    "pretrain": {"steps": 12, "lr": 0.003, "warmup": 2},
    "defence": {
        "adversaries": 2,
        "inner_steps": 2,
        "inner_batch_size": [20],
        "inner_lr": [0.001],
        "iterations": 8,
        "ntr_batch_size": 31,
        "probe_steps": 2,
        "check_every": 4,
        "tolerance": 0.9,
    },
    "audit": {
        "battery": "own",
        "attacks": [{"name": "initFC+all", "tuning": {"initialise": "head"}}],
        "steps": 5,
        "seeds": 1,
        "evaluations": 2,
    },
    "runtime": {"precision": "float32", "jobs": 1},
}


def start(*words: object, restarts: int = 0, **environment: str) -> subprocess.Popen[str]:
    """`words` in two processes of torchrun; they see no GPU, for which two would be needed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spread") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_two_processes_together_do_what_each_does_alone(tmp_path: Path) -> None:
    code, out, err = finish(start(HERE / "two_processes.py", tmp_path))
    assert code == 0, err
    apart = json.loads(out)
    assert apart["batch_statistics"] < 1e-12
    assert apart["training"] < 1e-12
    assert apart["shards"] < 1e-12
    assert apart["gathering"] == apart["errors"] == 0
    assert apart["protecting 1"] < 1e-5  # one of the two has no adversary
    assert apart["protecting 3"] < 1e-5  # two and one
    assert apart["protecting in shards"] < 1e-5
    assert apart["resuming"] == apart["resuming shards"] == 0


def test_a_process_that_is_killed_is_started_again_and_nothing_is_lost(recipe: Path, tmp_path: Path) -> None:
    words = ("-m", "holdfast", "run", recipe, "--out", tmp_path / "shot", "--resume")
    process = start(*words, restarts=1, HOLDFAST_SAVE_SECONDS="0")
    wait_for(tmp_path / "shot" / "protection" / "checkpoint.previous.pt", process)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    history = json.loads((tmp_path / "shot" / "protection" / "history.json").read_text())
    assert history["processes"] == 2
    assert [c["iteration"] for c in history["checks"]] == [0, 4, 8]
    assert out.count("verdict") == 1  # the first process alone speaks
    assert err.count("pretrain: accuracy") == 1  # trained once, before the shot
    records = (tmp_path / "shot" / "records.jsonl").read_text().splitlines()
    assert len(records) == len({line.split(', "seconds"')[0] for line in records})
    assert (tmp_path / "shot" / "report.html").is_file()


def test_one_line_for_what_all_stumble_over(recipe: Path, tmp_path: Path) -> None:
    words = ("-m", "holdfast", "protect", recipe, "--out", tmp_path / "x", "--set", "defence=unsir")
    code, out, err = finish(start(*words))
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code != 0
    assert out == ""
    assert lines == [
        "error: UNSIR works in one process, but 2 were started; start it without torchrun (sophon spreads over several)"
    ]
    assert not (tmp_path / "x").exists()


def test_alone_there_is_nothing_to_join() -> None:
    value = torch.tensor([1.0, 2.0])
    ALONE.sum([value])
    assert value.tolist() == [1.0, 2.0]
    assert current() == ALONE
    assert ALONE.first
    assert ALONE.stream == ()
    assert list(ALONE.own(3)) == [0, 1, 2]
    assert ALONE.agreed(lambda: 7) == 7
    assert ALONE.any(True)
    assert not ALONE.any(False)


def test_parts_of_a_batch_are_the_batch(original, runtime: Runtime) -> None:
    whole = list(minibatches(original.train, 7, 3, 0, runtime))
    parts = [list(minibatches(original.train, 7, 3, 0, runtime, group=Group(r, 2))) for r in (0, 1)]
    for step, (images, labels) in enumerate(whole):
        assert [len(parts[r][step][1]) for r in (0, 1)] == [4, 3]
        for rank in (0, 1):
            assert torch.equal(parts[rank][step][0], images[rank::2])
            assert torch.equal(parts[rank][step][1], labels[rank::2])


def test_a_batch_smaller_than_the_processes_is_refused(original, runtime: Runtime) -> None:
    with pytest.raises(UserError, match="a batch of 2 cannot be shared by 3 processes"):
        next(minibatches(original.train, 2, 1, 0, runtime, group=Group(0, 3)))


def children(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < until, "the moment to shoot never came"
        time.sleep(0.02)
