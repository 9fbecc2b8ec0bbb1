"""Independent pieces of one audit at work: in this process, in several on this machine, or on a Ray cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from holdfast.attacks.released import ORIGINAL_DATA, THIRD_DOMAIN
from holdfast.cells import Bench, CellSpec
from holdfast.cluster import TRIES, leave, run_on_cluster
from holdfast.domains import ImageData
from holdfast.errors import UserError
from holdfast.memory import keep_freed, release_freed
from holdfast.runtime import Runtime, threads

R = TypeVar("R")
S = TypeVar("S", bound=CellSpec)
Work = Callable[[Bench, S], R]
CPU = Runtime("cpu")
GPU_SHARE = 4  # cells of small models that share one GPU


def run_all(
    work: Work[S, R], bench: Bench, specs: Sequence[S], jobs: int | None = None, ray: str | None = None
) -> Iterator[R]:
    """`work(bench, spec)` for every spec, in whatever order they are done.

    `jobs`: processes, one thread each (default: one a core; on a GPU, where cells share the device, four). `ray`: the
    address of a Ray cluster instead, `local` for one on this machine with `jobs` workers.
    """
    if ray is not None:
        yield from _on_ray(work, bench, specs, jobs, ray)
        return
    on_cpu = bench.runtime.device == "cpu"
    workers = min(len(specs), jobs or ((os.cpu_count() or 1) if on_cpu else GPU_SHARE))
    if workers <= 1:
        with threads(1 if on_cpu else None):
            yield from (work(bench, spec) for spec in specs)
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # inherited: threads that spin starve their neighbour
    sent, left = bench.to(CPU), dict(enumerate(specs))
    release_freed()  # the workers want it
    for attempt in range(TRIES):
        parallel = Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch="2*n_jobs", batch_size=1)
        try:
            for number, found in parallel(
                delayed(_numbered)(i, work, needed(sent, spec), spec) for i, spec in list(left.items())
            ):
                del left[number]
                yield found
            break
        except TerminatedWorkerError:  # killed: for want of memory, most often
            if attempt == TRIES - 1:
                raise UserError(
                    f"{TRIES} times a worker was killed, for want of memory perhaps ({len(left)} of {len(specs)} "
                    "left); go on with --resume and fewer --jobs"
                ) from None


@contextmanager
def released() -> Iterator[None]:
    """Let the processes go that calls of `run_all` within started, and kept. Only then is their peak memory known."""
    try:
        yield
    finally:
        leave()
        if "joblib.externals.loky.reusable_executor" in sys.modules:  # else there are none to let go
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True)


def needed(bench: Bench, spec: CellSpec) -> Bench:
    """The bench without what the spec's cell does not look at: less to send."""
    means = {e.needs for e in spec.attack.all_edits()}
    states = {n: s for n, s in bench.states.items() if n == spec.model}  # none for one from scratch
    original = _only(bench.original, spec.seed) if ORIGINAL_DATA in means else ()
    benign = bench.benign if spec.benign or THIRD_DOMAIN in means else None
    grounds = [replace(g, train=_only(g.train, spec.seed)) if g else None for g in (bench.restricted, benign)]
    restricted = grounds[0] or bench.restricted
    return replace(bench, states=states, restricted=restricted, original=original, benign=grounds[1])


def _only(data: tuple[ImageData, ...], seed: int) -> tuple[ImageData, ...]:
    """One seed's data in its place; of the others nothing."""
    return tuple(d if i == seed else d.subset(torch.zeros(0, dtype=torch.int64)) for i, d in enumerate(data))


def _numbered(number: int, work: Work[S, R], bench: Bench, spec: S) -> tuple[int, R]:
    return number, _elsewhere(work, bench, spec)


def _elsewhere(work: Work[S, R], bench: Bench, spec: S) -> R:
    """In a worker: one thread, the data on the device."""
    if bench.runtime.device == "cpu":
        keep_freed()
    with threads(1):
        try:
            return work(bench.to(bench.runtime), spec)
        finally:
            release_freed()


def _on_ray(work: Work[S, R], bench: Bench, specs: Sequence[S], jobs: int | None, address: str) -> Iterator[R]:
    share = 1 / GPU_SHARE if bench.runtime.device.startswith("cuda") else 0
    own = replace(bench.runtime, device="cuda") if share else bench.runtime  # Ray shows a worker one GPU, its 0
    shared = replace(bench.to(CPU), runtime=own)
    return run_on_cluster(address, partial(_elsewhere, work), shared, specs, jobs, share)
