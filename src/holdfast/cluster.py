"""Pieces of work on a Ray cluster: machines that come, hang and go; each piece's result once."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from holdfast.errors import UserError, one_line, require

R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")
TRIES = 3  # before a piece of work is given up whose worker, or its machine, is lost
WINDOW = 1000  # pieces that Ray holds at a time: enough for it to see how much there is to do
PATIENCE = 60.0  # seconds without a result before stragglers are thought of,
SLOW = 3.0  # and no less than so many times the longest piece so far
_joined: list[str] = []  # what this process has connected to, and not its caller


def run_on_cluster(
    address: str, work: Callable[[T, S], R], shared: T, specs: Sequence[S], jobs: int | None = None, gpus: float = 0
) -> Iterator[R]:
    """`work(shared, spec)` for every spec, in whatever order they are done; `shared` is sent once.

    `address`: of a Ray cluster, or `local` for one on this machine with `jobs` workers, which stays until `leave`;
    `gpus`: what a piece needs of one. What a lost worker or machine had at hand is started again elsewhere. Where
    nothing has come for long, all that is left is started a second time, and of each piece the first result counts.
    Raises what `work` raises, and `UserError` where no cluster is found, or a piece's worker is lost again and again.
    """
    ray = _connect(address, jobs)
    require(
        not gpus or ray.cluster_resources().get("GPU", 0) >= gpus,
        f"the cells are to run on a GPU, and the Ray cluster at '{address}' has none; set runtime.device: cpu",
    )
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=TRIES - 1)(_timed).options(name="holdfast_cell")
    try:
        yield from _first_results(ray, partial(task.remote, work, ray.put(shared)), specs)
    except ray.exceptions.RayTaskError as error:  # raised by the work itself
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"{TRIES} times a worker of one cell was lost, or the cluster itself ({one_line(error, 120)}); go on with "
            "--resume"
        ) from None


def leave() -> None:
    """Disconnect from the cluster that this process has joined, if it has; stop the local one that it has started."""
    if _joined:
        import ray

        ray.shutdown()
        _joined.clear()


def _timed(work: Callable[[T, S], R], shared: T, spec: S) -> tuple[float, R]:
    """In a worker: seconds, and the result."""
    started = time.monotonic()
    found = work(shared, spec)
    return time.monotonic() - started, found


def _first_results(ray: Any, start: Callable[[S], Any], specs: Sequence[S]) -> Iterator[Any]:
    """The first result of every spec; `start` gives a piece of work to Ray and returns its reference."""
    queue = deque(range(len(specs)))
    flying: dict[Any, int] = {}
    twice: set[int] = set()
    longest = 0.0
    while queue or flying:
        while queue and len(flying) < WINDOW:
            number = queue.popleft()
            flying[start(specs[number])] = number
        done, _ = ray.wait(list(flying), num_returns=1, timeout=max(PATIENCE, SLOW * longest))
        if not done:
            if longest and not queue:  # else nobody knows how long a piece takes, or none would be free for another
                slow = set(flying.values()) - twice
                flying.update({start(specs[n]): n for n in sorted(slow)})
                twice |= slow
            continue
        number = flying.pop(done[0])
        try:
            seconds, found = ray.get(done[0])
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError) or number not in flying.values():
                raise
            continue  # its twin may do better
        longest = max(longest, seconds)
        for twin in [other for other, n in flying.items() if n == number]:
            del flying[twin]
            ray.cancel(twin, force=True)
        yield found


def _knock(address: str) -> None:
    """Raise `OSError` where nobody listens: Ray itself would try for minutes."""
    host, sign, port = address.removeprefix("ray://").rpartition(":")
    if sign:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass


def _connect(address: str, jobs: int | None) -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray: pip install 'holdfast[ray]'") from None
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a CPU cell must not hide the GPUs of others
    if ray.is_initialized():
        return ray
    try:
        _knock(address)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address == "local":
            count = jobs or os.cpu_count()
            ray.init(num_cpus=count, num_gpus=torch.cuda.device_count(), include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
        _joined.append(address)
    except Exception as error:  # whatever a cluster that is not there makes Ray raise
        raise UserError(
            f"cannot reach a Ray cluster at '{address}': {one_line(error, 160)}; expected auto, HOST:PORT, "
            "ray://HOST:10001, or local"
        ) from None
    return ray
